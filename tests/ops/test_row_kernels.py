"""Kernels for rows: their own source, compiled for the CPU, in the place of kernels that only CUDA has."""

from __future__ import annotations

import ctypes
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import optax
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of, to_numpy
from ops.kernels import in_turns, library, needs_compiler
from rewrites.proof import fused
from rewrites.test_norms import by_division, flax_layer_norm, flax_rms_norm, gpt, in_float32, llama, plain

from jax_mps.ops import row_kernels
from jax_mps.ops.dtypes import mx_array
from jax_mps.plan.text import module_text
from jax_mps.rewrites import rewrite
from jax_mps.rewrites import row_kernels as islands

NAMES = {mx.bool_: "bool", mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t", mx.uint32: "uint32_t"}


@functools.cache
def compiled(source: str, inputs: tuple[mx.Dtype, ...], outputs: tuple[mx.Dtype, ...], arguments: tuple[int, ...]):
    """The library's function for arrays of these types."""
    names = [("sizes", "const uint32_t"), *((f"in{i}", f"const {NAMES[t]}") for i, t in zip(arguments, inputs, strict=True))]
    names += [(f"out{i}", NAMES[t]) for i, t in enumerate(outputs)]
    return library(in_turns(source, dict(names), row_kernels.HEADER), "-O1", "-w", "-ffp-contract=off").run


def placed(x: np.ndarray, offset: int) -> np.ndarray:
    """A copy so many elements after an address that 64 divides."""
    room = np.zeros(x.nbytes + 128 + offset * x.itemsize, np.uint8)
    start = -room.ctypes.data % 64 + offset * x.itemsize
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def kernel_on_cpu(source: str, arguments: tuple[int, ...], results: int, offset: int = 0):
    """As `row_kernels._kernel`. offset: where arrays begin, in elements."""

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        sizes, *arrays = (placed(to_numpy(x), offset) for x in inputs)
        outs = [placed(to_numpy(mx.full(shape, 7).astype(dtype)), offset) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        run = compiled(source, tuple(x.dtype for x in inputs[1:]), tuple(output_dtypes), arguments)
        pointers = [a.ctypes.data for a in (sizes, *arrays, *outs)]
        run(grid[0] // threadgroup[0], threadgroup[0], (ctypes.c_void_p * len(pointers))(*pointers))
        return [mx_array(a, str(dtype).rsplit(".", 1)[-1]) for a, dtype in zip(outs, output_dtypes, strict=True)]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """Islands and kernels as on CUDA, of arrays of any size; the kernels' texts."""
    needs_compiler()
    used = []
    for module in (row_kernels, islands):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    for name in ("_FEWEST", "_FEWEST_ROWS"):
        monkeypatch.setattr(islands, name, 1)
    monkeypatch.setattr(row_kernels, "_kernel", lambda *key: used.append(key[0]) or kernel_on_cpu(*key))
    return used


R = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return R.normal(0.0, 1.0, shape).astype(getattr(ml_dtypes, dtype, dtype))


def run(f, *args, names=("row_kernel",), rtol=2e-6, atol=1e-6):
    """Checked against the steps as they were, and more loosely against JAX on the CPU; names: the rewritten steps."""
    case = Case("rows", f, args, rtol=4 * rtol, atol=4 * atol)
    plan, program, arguments = lowered(case, rewritten=True)
    assert fused(plan) == list(names)
    ours = results_of(plan, program(*arguments), case)
    plain_plan, plain, _ = lowered(case)
    assert_same(ours, results_of(plain_plan, plain(*arguments), case), Case("rows, unfused", f, args, rtol, atol))
    assert_same(ours, reference(case), case)
    return plan


def vjp(f):
    return lambda x, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x))


# ---- softmax and its relatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [32, 33, 40, 130, 512, 514, 1000, 4096, 5001])
def test_columns(columns, cuda) -> None:
    """Rows of a warp, of several, and those that are read again."""
    run(jax.nn.softmax, normal(5, columns))


@pytest.mark.parametrize("columns", [64, 5000])
@pytest.mark.parametrize("f", [
    jax.nn.log_softmax,
    lambda x: jax.nn.logsumexp(x, axis=-1),
    lambda x: jax.nn.logsumexp(x, axis=-1, keepdims=True),
    lambda x: jax.nn.logsumexp(x, axis=-1, where=x > 0),
    lambda x: jax.nn.softmax(x, where=x > 0),
    jax.vmap(jax.nn.softmax),
    lambda x: jnp.argmax(x, -1) + jax.nn.softmax(x)[:, 0],
    lambda x: jnp.exp(jax.nn.log_softmax(x)) * x,
])  # fmt: skip
def test_forms(f, columns, cuda) -> None:
    run(f, 3 * normal(6, columns))


@pytest.mark.parametrize("f", [jax.nn.softmax, jax.nn.log_softmax])
def test_gradients(f, cuda) -> None:
    run(vjp(f), normal(3, 4, 65), normal(3, 4, 65), names=["row_kernel"] * 2)
    run(lambda x, g: vjp(f)(x, g)[1], normal(3, 4, 65), normal(3, 4, 65))


def test_of_columns(cuda) -> None:
    """vmap turns the rows around."""
    run(jax.vmap(jax.nn.softmax, in_axes=1), normal(40, 33, 36))


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("columns", [64, 65])
def test_half_types(columns, dtype, tolerance, cuda) -> None:
    """The steps round after each, the kernel once, as MLX's do."""
    x, g = normal(6, columns, dtype=dtype), normal(6, columns, dtype=dtype)
    for f in (jax.nn.softmax, jax.nn.log_softmax, lambda x: jax.nn.logsumexp(x.astype(np.float32), axis=-1)):
        run(f, x, rtol=tolerance, atol=tolerance)
    run(lambda x, g: vjp(jax.nn.softmax)(x, g)[1], x, g, rtol=tolerance, atol=tolerance)


ODD = np.array([[-np.inf] * 4, [np.nan, 1, 2, 3], [np.inf, 1, 2, 3], [np.inf, np.inf, 0, 0], [-np.inf, 1, 2, -np.inf], [3e38, -3e38, 0, 1]], np.float32)
LONG = np.concatenate([np.full((6, 4500), -np.inf, np.float32), ODD], 1)
ODD = np.concatenate([ODD, np.repeat(ODD[:, -1:], 70, 1)], 1)


@pytest.mark.parametrize("f", [jax.nn.softmax, jax.nn.log_softmax, lambda x: jax.nn.logsumexp(x, axis=-1), vjp(jax.nn.softmax), vjp(jax.nn.log_softmax)])
@pytest.mark.parametrize("x", [ODD, LONG, LONG[:, ::-1]], ids=["short", "long", "long, reversed"])
def test_infinities_and_nan(f, x, cuda) -> None:
    args = (x, np.ones_like(x)) if f.__name__ == "<lambda>" and f.__code__.co_argcount == 2 else (x,)
    case = Case("odd", f, args)
    names = fused(lowered(case, rewritten=True)[0])
    assert set(names) == {"row_kernel"}
    run(f, *args, names=names)


# ---- attention -------------------------------------------------------------------------------------------------------------------------


def attend(q, k, v):
    """As benchmarks/rows/gpt.py."""
    visible = jnp.tril(jnp.ones((q.shape[-2], k.shape[-2]), bool))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v


def masked(q, k, v, mask):
    """As flax has it; the mask may lack dimensions, or have them with size 1."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min)) @ v


def biased(q, k, v, bias):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) + bias) @ v


def heads() -> list[np.ndarray]:
    return [normal(2, 3, 40, 8) for _ in range(3)]


def gradient(f):
    return jax.value_and_grad(lambda *a: jnp.square(f(*a)).sum(), (0, 1, 2))


def reads_of(plan) -> list[list[str]]:
    """What the kernels read."""
    return [[str(v.type) for v in step.operands] for step in plan.steps if step.name == "jax_mps.row_kernel"]


WHOLE = "tensor<2x3x40x40xf32>"


def test_attention(cuda) -> None:
    """The scale, the mask, the softmax; and the gradient of all three, from the softmax. The mask is not read."""
    plan = run(gradient(attend), *heads(), names=["row_kernel"] * 2, rtol=2e-5, atol=2e-5)
    assert reads_of(plan) == [[WHOLE], [WHOLE] * 2] and len(cuda) == 2


@pytest.mark.parametrize("shape", [(40, 40), (1, 1, 40, 40), (2, 1, 40, 40), (2, 1, 1, 40), (3, 1, 40), (2, 3, 40, 1), (40,), ()])
def test_masks(shape, cuda) -> None:
    """Read where they are, however they are spread; a row that sees nothing has equal weights."""
    mask = R.random(shape) < 0.7
    plan = run(gradient(masked), *heads(), mask, names=["row_kernel"] * 2, rtol=2e-5, atol=2e-5)
    size = f"tensor<{''.join(f'{n}x' for n in shape)}i1>"
    assert [[t for t in reads if t != WHOLE] for reads in reads_of(plan)] == [[size]] * 2


@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40), (2, 1, 1, 40)])
def test_biases(shape, cuda) -> None:
    run(gradient(biased), *heads(), normal(*shape), names=["row_kernel"] * 2, rtol=2e-5, atol=2e-5)


def test_rows_that_see_nothing(cuda) -> None:
    """NaN, as the steps give it."""
    x, mask = normal(4, 64), np.arange(64) < np.array([0, 5, 64, 1])[:, None]
    run(lambda x, m: jax.nn.softmax(jnp.where(m, x, -jnp.inf)), x, mask)
    run(lambda x, m: jax.nn.softmax(x, where=m), x, mask)


# ---- norms -----------------------------------------------------------------------------------------------------------------------------


def affine(columns: int) -> tuple[np.ndarray, ...]:
    return normal(columns), normal(columns)


CLOSE = {"rtol": 2e-5, "atol": 4e-6}  # MLX adds up in another order, flax the squares


@pytest.mark.parametrize("columns", [32, 33, 130, 768, 1000, 4096, 5001])
@pytest.mark.parametrize("f", [gpt, lambda x, s, b: llama(x, s)], ids=["layer", "rms"])
def test_norms(f, columns, cuda) -> None:
    run(f, 2 + normal(5, columns), *affine(columns), **CLOSE)


@pytest.mark.parametrize("f", [
    gpt, flax_layer_norm, by_division, lambda x, s, b: plain(x), lambda x, s, b: gpt(x, s, 0), lambda x, s, b: llama(x, 1), lambda x, s, b: llama(x, s) + b,
    lambda x, s, b: flax_rms_norm(x, s), lambda x, s, b: jax.nn.relu(gpt(x, s, b)), lambda x, s, b: gpt(x, s.reshape(1, 1, -1), b.astype(np.float16)),
])  # fmt: skip
def test_forms_of_norms(f, cuda) -> None:
    plan = run(f, 2 + normal(3, 4, 40), *affine(40), **CLOSE)
    assert [len(step.results) for step in plan.steps if step.name == "jax_mps.row_kernel"] == [1]


@pytest.mark.parametrize(("given", "close"), [
    ({"loc": 300.0}, {"rtol": 1e-4, "atol": 3e-4}),  # rows whose mean is known to 3e-5, times a scale
    ({"scale": 1e15}, CLOSE), ({"scale": 1e-15}, CLOSE), ({"scale": 0.0, "loc": 3.0}, CLOSE),
])  # fmt: skip
@pytest.mark.parametrize("columns", [64, 5000])
def test_sizes_of_numbers_in_norms(given, close, columns, cuda) -> None:
    run(gpt, R.normal(size=(4, columns), **given).astype(np.float32), *affine(columns), **close)


def test_norms_of_odd_rows(cuda) -> None:
    x = normal(4, 64)
    x[0, 3], x[1, 5], x[2, 7] = np.nan, np.inf, -np.inf
    run(gpt, x, *affine(64), **CLOSE)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("f", [in_float32, gpt, flax_layer_norm])
def test_norms_in_half_types(f, dtype, tolerance, cuda) -> None:
    """Rounded once, where the steps round after each."""
    scales = affine(48) if f is in_float32 else [v.astype(getattr(ml_dtypes, dtype, dtype)) for v in affine(48)]
    run(f, normal(2, 3, 48, dtype=dtype), *scales, rtol=tolerance, atol=2 * tolerance)


def residual(norm):
    """Between two products; what is added to the stream, and its norm, are read by what follows."""

    def f(x, h, w, p, *scales):
        x = x + (h @ w + p)
        return x + norm(x, *scales) @ w

    return f


def widths(plan) -> list[tuple[int, int]]:
    """How many arrays as large as the first result the kernels read, and how many they write."""
    kernels = [step for step in plan.steps if step.name == "jax_mps.row_kernel"]
    return [tuple(sum(v.type.size == step.results[0].type.size for v in values) for values in (step.operands, step.results)) for step in kernels]


def streams(columns: int, dtype: str = "float32") -> list[np.ndarray]:
    return [normal(2, 3, columns, dtype=dtype), normal(2, 3, columns, dtype=dtype), (normal(columns, columns) / 8).astype(getattr(ml_dtypes, dtype, dtype))]


@pytest.mark.parametrize("columns", [40, 33])
@pytest.mark.parametrize("norm", [gpt, flax_layer_norm, lambda x, s, b: llama(x, s)], ids=["gpt", "flax", "rms"])
def test_residuals(norm, columns, cuda) -> None:
    """The sum is computed and written by the norm's kernel."""
    plan = run(residual(norm), *streams(columns), normal(columns), *affine(columns), rtol=1e-4, atol=1e-5)
    assert widths(plan) == [(2, 2)]


def test_a_scale_around_one(cuda) -> None:
    """What makes it is part of the kernel, which would else have to wait for it."""
    f = lambda x, w, s, b: (lambda y: (y @ w, llama(y, 1 + s.astype(np.float32))))(x + lax.sort(x))  # noqa: E731
    plan = run(f, normal(4, 8, 40), streams(40)[2], normal(40, dtype="bfloat16"), normal(40), rtol=1e-4, atol=2e-5)
    assert widths(plan) == [(2, 2)] and "tensor<40xbf16>" in reads_of(plan)[0]


def test_residual_of_one_row(cuda) -> None:
    f = lambda x, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(x + lax.sort(x))  # noqa: E731
    assert widths(run(f, normal(1, 40), streams(40)[2], *affine(40), rtol=1e-4, atol=2e-5)) == [(4, 2)]  # scale and bias are as large


def test_residuals_of_long_rows(cuda) -> None:
    """Read again by each pass."""
    x, h = normal(3, 5000), normal(3, 5000)
    f = lambda x, h, s, b: (lambda y: (lax.sort(y), gpt(y, s, b)))(x + lax.sort(h))  # noqa: E731
    assert widths(run(f, x, h, *affine(5000), **CLOSE)) == [(2, 2)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_residuals_in_half_types(dtype, cuda) -> None:
    """The sum is rounded before it is normalised."""
    plan = run(residual(in_float32), *streams(40, dtype), normal(40, dtype=dtype), *affine(40), rtol=4e-2, atol=4e-2)
    assert widths(plan) == [(2, 2)]


def test_a_training_step_of_blocks(cuda) -> None:
    """Each sum, and the norm of it, is one kernel; a gradient reads the sum."""

    def loss(x, w, s, b):
        for _ in range(3):
            x = x + jnp.tanh(gpt(x, s, b) @ w) @ w + b
        return jnp.sin(gpt(x, s, b) @ w).sum()

    x, _, w = streams(40)
    plan, *_ = lowered(Case("blocks", jax.grad(loss, (0, 1, 2, 3)), (x, w, *affine(40))), rewritten=True)
    assert [w for w in widths(plan) if w[1] > 1] == [(2, 2)] * 3
    assert fused(plan).count("norm_gradient") == 4
    run(jax.grad(loss, (0, 1, 2, 3)), x, w, *affine(40), names=fused(plan), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("f", "arrays"), [
    (lambda x, h, w, s, b: (lambda y: (y, gpt(y, s, b)))(x + h), (2, 2)),  # a result of the program
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(x + h), (2, 2)),
    (lambda x, h, w, s, b: (lambda y: (y.reshape(6, -1) @ w, gpt(y, s, b)))(x + h), (2, 2)),
    (lambda x, h, w, s, b: (lambda y: (jnp.sin(y), gpt(y, s, b)))(x + h), (1, 1)),  # read with other steps of its own
    (lambda x, h, w, s, b: (lambda y: (jnp.sin(y.reshape(6, -1)), gpt(y, s, b)))(x + h), (1, 1)),
    (lambda x, h, w, s, b: gpt(x + h, s, b), (2, 1)),  # read by the norm alone
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(x + h.reshape(3, 2, -1).swapaxes(0, 1)), (1, 1)),  # would be copied
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(x + (h @ jnp.tile(w, 2))[..., 8:48]), (1, 1)),
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(x + jnp.concatenate([h, h])[1:3]), (2, 2)),  # neighbours
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s * (y @ w)[0, 0], b)))(x + h), (1, 1)),  # a scale that is made of the sum
    (lambda x, h, w, s, b: (lambda t: (lambda y: (y @ w, gpt(y, s, b), lax.cosh(t) * 3))(x + t))(x * h), (1, 1)),  # what it is made of is nowhere
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(jnp.atan2(x, h)), (2, 2)),
    (lambda x, h, w, s, b: (lambda y: (y @ w, gpt(y, s, b)))(lax.nextafter(x, h)), (1, 1)),  # no text
])  # fmt: skip
def test_what_a_norm_s_kernel_makes_for_others(f, arrays, cuda) -> None:
    plan = run(f, *streams(40), *affine(40), rtol=1e-4, atol=2e-5)
    assert widths(plan) == [arrays]


# ---- cross entropy ---------------------------------------------------------------------------------------------------------------------

LABELS = R.integers(-3, 60, (6, 4)).astype(np.int32)


def integer_labels(x, labels):
    return (jax.nn.logsumexp(x, axis=-1) - jnp.take_along_axis(x, labels[..., None], -1)[..., 0]).mean()


def one_hot_labels(x, labels):
    return -(jax.nn.one_hot(labels, x.shape[-1]) * jax.nn.log_softmax(x)).sum(-1).mean()


def of_optax(x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def one_hot_of_optax(x, labels):
    return optax.softmax_cross_entropy(x, jax.nn.one_hot(labels, x.shape[-1])).mean()


@pytest.mark.parametrize("f", [integer_labels, one_hot_labels, of_optax, one_hot_of_optax])
@pytest.mark.parametrize("columns", [64, 4400])
def test_cross_entropy(f, columns, cuda) -> None:
    """The loss of each row and the gradient in one kernel, which reads the logits and no one-hot."""
    plan, *_ = lowered(Case("loss", jax.value_and_grad(f), (normal(6, 4, columns), LABELS)), rewritten=True)
    names = [name for name in fused(plan) if name != "row_kernel"]
    assert set(names) <= {"in_bounds"}
    plan = run(jax.value_and_grad(f), normal(6, 4, columns), LABELS, names=[*names, "row_kernel"])
    assert sum(t == f"tensor<6x4x{columns}xf32>" for t in reads_of(plan)[0]) == 1


def test_half_logits(cuda) -> None:
    """Nothing is kept of them in float32."""
    x = normal(6, 4, 72, dtype="bfloat16")
    plan = run(jax.value_and_grad(lambda x, labels: of_optax(x.astype(np.float32), labels)), x, LABELS, names=["in_bounds", "row_kernel"], atol=1e-4)
    assert not any(v.type.size == x.size and v.dtype == "float32" for step in plan.steps for v in step.results)


def weighted(x, labels, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    return (losses * weights).sum() / weights.sum()


@pytest.mark.parametrize("columns", [64, 4400])
def test_shared_sums(columns, cuda) -> None:
    """What comes between the loss and its gradient keeps them apart: the first gives the second the rows' maxima and sums."""
    args = normal(6, 4, columns), LABELS, R.random((6, 4)).astype(np.float32)
    plan = run(jax.value_and_grad(weighted), *args, names=["in_bounds", "row_kernel", "row_kernel"])
    forward, backward = (step for step in plan.steps if step.name == "jax_mps.row_kernel")
    assert len(forward.results) == 3 and set(forward.results[1:]) < set(backward.operands)
    assert "shfl" in cuda[0] and "shfl" not in cuda[1]


# ---- any other steps -------------------------------------------------------------------------------------------------------------------


def standardised(x):
    c = x - x.mean(-1, keepdims=True)
    return c / jnp.sqrt(jnp.abs(c).mean(-1, keepdims=True))


def clipped(x):
    """A row that is longer than 1 becomes 1 long; two results, one of a number a row."""
    length = jnp.sqrt((x * x).sum(-1))
    return x / jnp.maximum(length, 1.0)[..., None], length


def of_two(x, y):
    both = x + y
    return (both / both.min(-1, keepdims=True)).astype(np.float16)


def along_two(x):
    return x / jnp.abs(x).max((-1, -2), keepdims=True)


def products(x, y):
    p = lax.reduce(x, np.float32(1), lax.mul, (1,))
    return jnp.where(x > p[:, None], y, 0)


def reshaped(x):
    """Twelve rows or four times three."""
    y = x.reshape(4, 3, 64)
    return jnp.exp(y - y.max(-1, keepdims=True)).reshape(12, 64) * jnp.arange(12)[:, None]


def places(x):
    """Positions of both kinds, in both kinds of numbers."""
    row = lax.broadcasted_iota(np.int32, x.shape, 0)
    column = lax.broadcasted_iota(np.float32, x.shape, 1)
    return jnp.where(row % 2 == 0, x / x.sum(-1, keepdims=True), column)


def same_along_rows(x):
    """Results of full size that are one number a row."""
    return jax.nn.softmax(jnp.broadcast_to(x.sum(-1, keepdims=True), x.shape)), x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize(("f", "args"), [
    (same_along_rows, (4 + normal(7, 64),)),
    (standardised, (normal(7, 64),)),
    (standardised, (normal(5, 70),)),
    (clipped, (normal(7, 64),)),
    (of_two, (normal(7, 64), 8 + normal(64))),
    (of_two, (normal(7, 64), 8 + normal(7, 1))),
    (along_two, (normal(3, 4, 8, 10),)),
    (products, (1 + 0.1 * normal(5, 33), normal(5, 33))),
    (reshaped, (normal(12, 64),)),
    (places, (4 + normal(12, 64),)),
])  # fmt: skip
def test_other_steps(f, args, cuda) -> None:
    names = ["row_kernel"] * (2 if f is same_along_rows else 1)
    run(f, *args, names=names, rtol=1e-5 if f is not of_two else 1e-3)  # quotients of what nearly cancels; rounded to a half type


@pytest.mark.parametrize("offset", [0, 1])
def test_places_in_memory(offset, cuda, monkeypatch) -> None:
    """Arrays may begin at any element."""
    monkeypatch.setattr(row_kernels, "_kernel", lambda *key: kernel_on_cpu(*key, offset))
    run(vjp(jax.nn.softmax), normal(3, 64), normal(3, 64), names=["row_kernel"] * 2)


def read_in_between(x):
    """The sum is read before the second operand is there."""
    total = x.sum(-1)
    return x / (total[:, None] * lax.sort(jnp.broadcast_to(total[0], x.shape)))


@pytest.mark.parametrize("f", [
    lambda x: x / x.sum(0),
    lambda x: x.sum(-1) + 1,
    lambda x: (x.astype(np.int32) // x.astype(np.int32).sum(-1, keepdims=True)),
    lambda x: x / lax.reduce(x, np.float32(1), lax.add, (1,))[:, None],
    lambda x: x[:, :16] / x[:, :16].sum(-1, keepdims=True),
    read_in_between,
])  # fmt: skip
def test_near_misses(f, cuda) -> None:
    plan, *_ = lowered(Case("near", f, (normal(64, 64),)), rewritten=True)
    assert fused(plan) in ([], ["column_sums"])


def test_read_too_late(cuda) -> None:
    """What needs the kernel's own result stays outside."""
    plan = run(lambda x, y: (lambda t: (t, x / t[:, None] * lax.sort(y * t[0])))(x.sum(-1)), 1 + normal(40, 64), normal(40, 64), rtol=1e-4)
    assert [step.name for step in plan.steps][-1] == "stablehlo.multiply"


def test_small_arrays_stay(monkeypatch) -> None:
    for module in (row_kernels, islands):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    for shape, count in [((512, 512), 1), ((64, 64), 0), ((64, 8192), 0), ((32768, 16), 0), ((8, 4, 128, 128), 1)]:
        assert fused(rewrite(plan_of(Case("size", jax.nn.softmax, (np.zeros(shape, np.float32),))))).count("row_kernel") == count
    assert fused(rewrite(plan_of(Case("all", lambda x: x / x.sum(), (np.zeros((512, 512), np.float32),))))) == []


def test_on_no_other_device(monkeypatch) -> None:
    for device in ("cpu", "metal"):
        monkeypatch.setattr(islands, "device_kind", lambda device=device: device)
        assert fused(rewrite(plan_of(Case("device", jax.nn.softmax, (np.zeros((512, 512), np.float32),))))) == ["softmax"]


def test_on_the_host(cuda) -> None:
    """The steps that a kernel stands for can be printed, and give the same."""
    case = Case("host", jax.value_and_grad(of_optax), (normal(6, 4, 64), LABELS))
    plan, program, arguments = lowered(case, rewritten=True)
    text = Case("host", module_text(plan.arguments, plan.steps, plan.results), case.args, 1e-5, 1e-6)
    assert_same(results_of(plan, program(*arguments), case), reference(text), text)


# ---- programs that nobody wrote --------------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 40)
OPERANDS = [SHAPE, SHAPE, (3, 40), (40,), (2, 1, 1), (2, 3, 1), (2, 1, 40), ()]
STEPS = [
    lambda x, y, labels: x + y,
    lambda x, y, labels: 0.5 * x * y,
    lambda x, y, labels: jnp.where(whole(x) > y, whole(x), 0.5 * y),
    lambda x, y, labels: jax.nn.softmax(whole(x)),
    lambda x, y, labels: 0.1 * jax.nn.log_softmax(whole(x)),
    lambda x, y, labels: 0.3 * jax.nn.logsumexp(whole(x), axis=-1, keepdims=True),
    lambda x, y, labels: whole(x).max(-1, keepdims=True),
    lambda x, y, labels: whole(0.05 * whole(x).sum(-1, keepdims=True)),
    lambda x, y, labels: whole(x).reshape(6, 40).mean(-1).reshape(2, 3, 1) + y,
    lambda x, y, labels: x * (lax.broadcasted_iota(np.int32, SHAPE, 2) == labels[..., None]),
    lambda x, y, labels: jnp.where(lax.broadcasted_iota(np.int32, SHAPE, 1) > 1, whole(x), y),
    lambda x, y, labels: jnp.tanh(x),
]


def whole(x):
    return jnp.broadcast_to(x, SHAPE)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_programs(seed, long, cuda, monkeypatch) -> None:
    """Steps that read any two of those before, forward and backward; also with rows that do not fit into registers."""
    if long:
        for name, value in {"_MOST_TEAM": 4, "_HELD": 4, "_LONG_TEAM": 64, "_LONG_HELD": 4}.items():
            monkeypatch.setattr(row_kernels, name, value)
    draw = np.random.default_rng(seed)
    steps = [(STEPS[draw.integers(len(STEPS))], *draw.random(2)) for _ in range(10)]
    args = [draw.normal(size=OPERANDS[i]).astype(np.float32) for i in (0, *draw.integers(len(OPERANDS), size=2))]

    def f(labels, *values):
        values = list(values)
        for step, a, b in steps:
            values.append(step(values[int(a * len(values))], values[int(b * len(values))], labels))
        return values[-1], values[-4]

    def both(labels, *args):
        y, pull = jax.vjp(lambda *args: f(labels, *args), *args)
        return y, pull(y)

    case = Case("random", both, (draw.integers(-2, 40, (2, 3)).astype(np.int32), *args), 1e-4, 1e-4)  # sums of what nearly cancels
    plan, program, arguments = lowered(case, rewritten=True)
    plain_plan, plain, _ = lowered(case)
    assert_same(results_of(plan, program(*arguments), case), results_of(plain_plan, plain(*arguments), case), case)


# ---- places ----------------------------------------------------------------------------------------------------------------------------


def place(index, row: int, column: int) -> int:
    return sum(({"row": row, "column": column}[p.axis] // p.divisor % p.modulus) * p.stride for p in index)


@pytest.mark.parametrize("shape", [(6, 10), (2, 3, 10), (2, 1, 3, 2, 5), (60,), (6, 1, 10, 1)])
def test_coordinates(shape) -> None:
    """An index, its coordinates in any shape, and the index of these."""
    index = row_kernels.whole_index(6, 10)
    parts = row_kernels.coordinates(index, shape)
    for row in range(6):
        for column in range(10):
            at = np.unravel_index(row * 10 + column, shape)
            assert tuple(place(part, row, column) for part in parts) == tuple(map(int, at))
    assert row_kernels.joined(parts, shape) == index


def test_dimensions_that_rows_end_within() -> None:
    assert row_kernels.coordinates(row_kernels.whole_index(6, 10), (4, 15)) is None


# ---- small arrays ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_loops(monkeypatch):
    """As on CUDA, of arrays as large as they have to be; gives the islands of a function, as they are and in a loop's body."""
    for module in (row_kernels, islands):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")

    def count(f, x):
        looped = lambda x: lax.fori_loop(0, 1000, lambda i, x: f(x), x)  # noqa: E731
        plans = [rewrite(plan_of(Case("small", g, (x,)))) for g in (f, looped)]
        return [sum(step.name == "jax_mps.row_kernel" for step in plan.body.walk()) for plan in plans]

    return count


DIGITS = np.arange(128, dtype=np.int32) % 10


@pytest.mark.parametrize("f", [
    jax.grad(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, DIGITS).mean()),
    jax.nn.log_softmax,
    lambda x: (x - x.min(-1, keepdims=True)) / x.max(-1, keepdims=True),
])  # fmt: skip
def test_small_arrays_in_loops(f, in_loops) -> None:
    plain, looped = in_loops(f, normal(128, 10))
    assert plain == 0 and looped >= 1


@pytest.mark.parametrize(("f", "shape"), [
    (jax.nn.softmax, (128, 10)),  # one of MLX's kernels
    (lambda x: x - x.sum(-1, keepdims=True), (128, 10)),  # two
    (jax.nn.log_softmax, (1, 10)),  # no rows
    (jax.nn.log_softmax, (128, 3)),
    (jax.nn.log_softmax, (3, 5000)),  # a row that is read twice, by few processors
])  # fmt: skip
def test_small_arrays_that_stay(f, shape, in_loops) -> None:
    assert in_loops(f, normal(*shape)) == [0, 0]


@pytest.mark.parametrize(("f", "count"), [
    (lambda x: gpt(x + jnp.cos(x), 2, 1), 1),
    (lambda x: jax.nn.relu(llama(x, 2)), 1),
    (plain, 0),  # one of MLX's kernels
])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 768), (32, 768), (128, 10)])
def test_small_norms(f, count, shape, in_loops) -> None:
    """With a step before or after, in loops or not."""
    assert in_loops(f, normal(*shape)) == [count, count]


def test_large_arrays_beside_small_ones(in_loops) -> None:
    """Outside of loops, only the large ones."""
    plain, looped = in_loops(lambda x: x + jax.nn.log_softmax(jax.nn.log_softmax(x, axis=-1)[:4, :40] * 2).sum(), normal(512, 512))
    assert plain == 1 and looped == 2
