"""Gradients of norms on CUDA: the kernel's own source, compiled for the CPU, whose threads take turns, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import ctypes
import functools
import types

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from ops.harness import Case, assert_same, lowered, reference, results_of
from ops.kernels import in_turns, library, needs_compiler
from rewrites.test_norms import by_division, flax_layer_norm, flax_rms_norm, gpt, in_float32, llama, plain

import jax_mps.ops.fused as fused_ops
from jax_mps.ops import norm_rows
from jax_mps.rewrites import norm_ends


def rows_of(array: mx.array) -> np.ndarray:
    """Row by row, as MLX hands it to a kernel; bfloat16 as bits."""
    return np.ascontiguousarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


@functools.cache
def compiled(how: norm_rows.Form, threads: int, backwards: bool = False):
    """As `norm_rows._kernel`; backwards: the last block first."""
    names = dict(zip(("x", "g", "y"), (norm_rows._TYPES[t] for t in how.types), strict=True))
    names |= {"sizes": "uint32_t", "eps": "float", "scale": "float", "added": names["y"], "arrived": "uint32_t", "total": "float", "done": "float"}
    read = how.inputs
    order = [*read, *how.outputs]
    parameters = {name: f"{'const ' if name in read else ''}{names[name]}" for name in order}
    body = norm_rows.source(how).replace(norm_rows.BARRIER, "__syncthreads();")
    loaded = library(in_turns(body, parameters), "-O1")

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        assert [len(inputs), grid[1:], threadgroup] == [len(read), (1, 1), (threads, 1, 1)]
        arrays = [rows_of(v).copy() for v in inputs]
        dtypes = [np.dtype("uint16" if d == mx.bfloat16 else str(d).rpartition(".")[2]) for d in output_dtypes]
        outputs = [np.full(shape, 255, dtype) for shape, dtype in zip(output_shapes, dtypes, strict=True)]
        pointers = (ctypes.c_void_p * 10)(*(a.ctypes.data for a in (*arrays, *outputs)))
        ctypes.c_bool.in_dll(loaded, "backwards").value = backwards
        loaded.run(grid[0] // threads, threads, pointers)
        assert all(np.array_equal(rows_of(x), a, equal_nan=True) for x, a in zip(inputs, arrays, strict=True)), "wrote what it reads"
        return [mx.array(v).view(mx.bfloat16) if d == mx.bfloat16 else mx.array(v) for v, d in zip(outputs, output_dtypes, strict=True)]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """The plan and its lowering for CUDA, of arrays of any size; the kernels that were used."""
    needs_compiler()
    used = []
    for module in (norm_rows, fused_ops, norm_ends):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(norm_rows, "_FEWEST", 0)
    monkeypatch.setattr(norm_rows, "_THREADS", 64)
    monkeypatch.setattr(norm_rows, "_BLOCKS", 3)
    monkeypatch.setattr(norm_rows, "_kernel", lambda how: used.append(how) or compiled(how, norm_rows._THREADS))
    return used


R = np.random.default_rng(0)
HALVES = {"float16": 1e-3, "bfloat16": 8e-3}


def exact(x, g, scale, added, eps, *, centred, sums):
    """In float64, by NumPy."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    c = x - x.mean(-1, keepdims=True) if centred else x
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    u = g if scale is None else g * scale
    y = r * (u - (u.mean(-1, keepdims=True) if centred else 0) - c * r * r * (u * c).mean(-1, keepdims=True))
    y = y if added is None else y + added
    every = {"scale": (g * c * r).sum(0), "cotangent": g.sum(0), "rows": y.sum(0)}
    return [y, *(every[name] for name in sums)]


def narrow(x: np.ndarray, dtype: str) -> tuple[mx.array, np.ndarray]:
    """As MLX and as NumPy has it."""
    rounded = mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))
    return rounded, np.array(rounded.astype(mx.float32))


def check(shape, dtypes=("float32",) * 3, *, centred=True, scaled=True, added=True, sums=norm_rows.EVERY, eps=1e-5, spread=1.0, level=1.0) -> None:
    x, xs = narrow(R.normal(level, spread, shape), dtypes[0])
    g, gs = narrow(R.normal(0.5, 1, shape), dtypes[1])
    scale, weights = narrow(R.normal(size=shape[1]), "float32")
    more, mores = narrow(R.normal(size=shape), dtypes[2])
    how = {"centred": centred, "sums": sums}
    got = norm_rows.gradient(x, g, scale if scaled else None, more if added else None, eps, getattr(mx, dtypes[2]), **how)
    wanted = exact(xs, gs, weights if scaled else None, mores if added else None, eps, **how)
    assert [v.shape for v in got] == [v.shape for v in wanted] and got[0].dtype == getattr(mx, dtypes[2])
    for name, a, b in zip(("y", *sums), got, wanted, strict=True):
        rounded = HALVES.get(dtypes[2], 0) if name == "y" else 0
        largest = np.abs(b).max()
        np.testing.assert_allclose(np.array(a.astype(mx.float32)), b, rtol=rounded, atol=largest * 3e-6 + 1e-30, err_msg=name)


@pytest.mark.parametrize("shape", [
    (9, 8), (1, 8), (70, 12), (300, 5), (5, 1), (64, 64), (13, 130), (7, 768), (33, 33), (5, 515), (4, 600), (3, 2048), (2, 1501),
])  # fmt: skip
@pytest.mark.parametrize("centred", [True, False])
def test_the_kernel(shape, centred, cuda) -> None:
    check(shape, centred=centred)


@pytest.mark.parametrize("shape", [(4, 3000), (5, 1501), (9, 768)])
@pytest.mark.parametrize("centred", [True, False])
def test_whole_blocks(shape, centred, cuda, monkeypatch) -> None:
    """As many threads as on a GPU."""
    monkeypatch.setattr(norm_rows, "_THREADS", 256)
    check(shape, centred=centred)
    assert cuda[0].team >= 64


def test_teams_of_all_sizes() -> None:
    """A thread holds no more than it should, and a row has no team that does nothing."""
    for count in range(1, norm_rows._MOST_COLUMNS + 1):
        for dtype in ("float32", "bfloat16"):
            how = norm_rows.form((dtype,) * 3, count, centred=True, scaled=True, sums=norm_rows.EVERY)
            assert (how.width * how.runs <= norm_rows._MOST or how.team == norm_rows._THREADS) and how.width * how.runs * how.team >= count
            assert how.team <= norm_rows._THREADS and count % how.width == 0
            assert how.team in (1, 32) or how.width * how.runs * how.team < 2 * count + how.width * how.team


@pytest.mark.parametrize("dtypes", [
    ("float16",) * 3, ("bfloat16",) * 3, ("bfloat16", "float32", "float32"), ("bfloat16", "bfloat16", "float32"), ("float32", "float16", "float32"),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(11, 64), (6, 33), (5, 768)])
def test_half_types(dtypes, shape, cuda) -> None:
    check(shape, dtypes)


@pytest.mark.parametrize("given", [
    {"scaled": False}, {"added": False}, {"sums": ()}, {"sums": ("cotangent",)}, {"sums": ("scale",)}, {"sums": ("rows", "scale"), "added": False},
    {"scaled": False, "added": False, "sums": (), "centred": False},
])  # fmt: skip
def test_parts(given, cuda) -> None:
    check((9, 260), **given)


@pytest.mark.parametrize("given", [
    {"spread": 1e15}, {"spread": 1e-15, "level": 0}, {"spread": 1e-4, "level": 0, "eps": 1.0}, {"spread": 1e-12, "level": 0, "eps": 1e-22},
    {"spread": 1e-12, "level": 0, "eps": 1e-30, "centred": False},
])  # fmt: skip
def test_sizes_of_numbers(given, cuda) -> None:
    check((9, 40), **given)


# ---- programs ------------------------------------------------------------------------------------------------------------------------


def block(norm):
    """Gradients of a norm with a bias, between a product with a bias of its own and what reads its rows as well."""

    def loss(x, b, g, *scales):
        x = x + b
        y = norm(x, *scales)
        return (y.astype(g.dtype) * g).sum() + (x * jnp.sin(x)).sum()

    return lambda x, b, g, *scales: jax.grad(loss, (0, 1, *range(3, 3 + len(scales))))(x, b, g, *scales)


def run(f, *args, **close) -> list[tuple[str, ...]]:
    """Compare with JAX on the CPU; the sums of each gradient."""
    case = Case("gradient", f, args, **close)
    plan, program, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)
    return [s.sums for s in plan.body.walk() if s.name == "jax_mps.norm_gradient"]


X, G = R.normal(size=(2, 3, 5, 24)).astype(np.float32) * 2 + 1
S, B, C = R.normal(size=(3, 24)).astype(np.float32)
CLOSE = {"rtol": 2e-5, "atol": 3e-5}  # sums of 24 and of 15 terms, in another order
ALL = norm_rows.EVERY


@pytest.mark.parametrize(("norm", "scales", "sums"), [
    (gpt, (S, B), ALL), (flax_layer_norm, (S, B), ALL), (by_division, (S, B), ALL), (lambda x, s, b: llama(x, s) + b, (S, B), ALL),
    (flax_rms_norm, (S,), ("scale", "rows")), (plain, (), ("rows",)), (lambda x, b: plain(x) + b, (B,), ("cotangent", "rows")),
])  # fmt: skip
def test_sums_of_gradients(norm, scales, sums, cuda) -> None:
    """Scale and bias of the norm, and the bias of what is normalised: one kernel computes the gradients of all."""
    assert run(block(norm), X, C, G, *scales, **CLOSE) == [sums]
    assert len(cuda) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", [in_float32, gpt, flax_layer_norm])
def test_gradients_in_half_types(norm, dtype, cuda) -> None:
    close = {"rtol": 2e-2, "atol": 0.15} if dtype is jnp.bfloat16 else {"rtol": 4e-3, "atol": 2e-2}  # sums of rounded numbers, rounded once here
    scales = (S, B) if norm is in_float32 else (S.astype(dtype), B.astype(dtype))
    (sums,) = run(block(norm), X.astype(dtype), C.astype(dtype), G.astype(dtype), *scales, **close)
    assert sums[:2] == ("scale", "cotangent") and cuda[0].types[:2] == (jnp.dtype(dtype).name,) * 2


@pytest.mark.parametrize("made", [lambda sums: jnp.outer(jnp.arange(15.0), jnp.cos(sums)).reshape(X.shape), lambda sums: sums], ids=["of it", "itself"])
@pytest.mark.parametrize("early", ["scale", "cotangent"])
def test_sums_that_are_read_too_early(early, made, cuda) -> None:
    """What is added to the gradient of the rows is made of a sum, which has to stay apart."""

    def f(x, g, s):
        c = x - x.mean(-1, keepdims=True)
        r = jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)
        sums = {"scale": lambda: (c * r * g).sum((0, 1)), "cotangent": lambda: g.sum((0, 1))}
        first = sums.pop(early)()
        added, (other,), u = made(first), [later() for later in sums.values()], g * s
        return added + (r * u - (r * u).mean(-1, keepdims=True)) + -c * r**3 * (c * u).mean(-1, keepdims=True), first, other

    (sums,) = run(f, X, G, S, rtol=2e-5, atol=1e-4)
    assert set(sums) == {"scale", "cotangent"} - {early}


def test_blocks_that_follow_each_other(cuda) -> None:
    """The gradient of one norm's rows is the cotangent of the next."""

    def f(x, g, s, b):
        return jax.grad(lambda x, s, b: (gpt(gpt(x, s, b), s, b) * g).sum(), (0, 1, 2))(x, s, b)

    assert run(f, X, G, S, B, rtol=1e-4, atol=1e-4) == [ALL, ("scale",)]  # each sum once


def test_cotangent_that_is_added(cuda) -> None:
    """As of a norm beside what it reads."""
    assert run(lambda *args: jax.vjp(lambda x, s, b: x + gpt(x, s, b), *args[1:])[1](args[0]), G, X, S, B, **CLOSE) == [ALL[:2]]


def ends(f, *args, **close) -> list[tuple[int, str]]:
    """What is added to each gradient, and its dtype."""
    case = Case("ends", f, args, **close)
    plan, program, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)
    return [(s.added, s.result.dtype) for s in plan.body.walk() if s.name == "jax_mps.norm_gradient"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_ends_in_half_types(dtype, cuda) -> None:
    """Norms in float32 between products in a half type: rows are read and written in that, and what passes by the norm is added at once."""

    def f(x, w, s, b):
        def loss(x, w, s, b):
            for _ in range(2):
                x = x + jnp.tanh(in_float32(x, s, b) @ w) @ w + b.astype(dtype)
            return (x.astype(jnp.float32) ** 2).mean()

        return jax.grad(loss, (0, 1, 2, 3))(x, w, s, b)

    w = R.normal(size=(24, 24)) / 5
    close = {"rtol": 3e-2, "atol": 2e-2} if dtype is jnp.bfloat16 else {"rtol": 4e-3, "atol": 2e-3}  # sums of rounded numbers, rounded once here
    assert ends(f, X.astype(dtype), w.astype(dtype), S, B, **close) == [(1, jnp.dtype(dtype).name)] * 2
    assert {how.types for how in cuda} == {(jnp.dtype(dtype).name,) * 3}


def gradient(x, g, s):
    return jax.vjp(lambda x: gpt(x, s, 0), x)[1](g)[0]


@pytest.mark.parametrize(("f", "added", "dtype"), [
    (lambda x, g, s: gradient(x, g, s) + x, 1, "float32"),
    (lambda x, g, s: (gradient(x, g, s) + x) + g, 2, "float32"),
    (lambda x, g, s: g - (gradient(x, g, s) + x), 1, "float32"),
    (lambda x, g, s: (lambda y: (y + x, y))(gradient(x, g, s)), 0, "float32"),  # read twice
    (lambda x, g, s: (lambda y: y + y)(gradient(x, g, s)), 0, "float32"),
    (lambda x, g, s: (lambda y: y + jnp.cos(y.sum(-1, keepdims=True)))(gradient(x, g, s)), 0, "float32"),
    (lambda x, g, s: gradient(x, g, s) + s, 0, "float32"),  # a line for all rows
    (lambda x, g, s: gradient(x, g, s).astype(jnp.float16), 0, "float16"),
    (lambda x, g, s: (gradient(x, g, s) + x).astype(jnp.float16), 1, "float32"),  # what is added is not rounded
    (lambda x, g, s: gradient(x, g, s).astype(jnp.float16) + x.astype(jnp.float16), 1, "float16"),
    (lambda x, g, s: gradient(x, g, s).astype(jnp.float16).astype(jnp.float32) + x, 0, "float16"),
    (lambda x, g, s: gradient(x, g, s).astype(jnp.int32), 0, "float32"),
])  # fmt: skip
def test_ends(f, added, dtype, cuda) -> None:
    halves = "float16" in {str(v.dtype) for v in jax.tree.leaves(jax.eval_shape(f, X, G, S))} | {dtype}
    assert ends(f, X, G, S, **({"rtol": 1e-3, "atol": 4e-3} if halves else CLOSE)) == [(added, dtype)]  # rounded to a half type, once or twice


def test_where_the_kernel_is_not_used(monkeypatch) -> None:
    """The same sums beside MLX's gradient, and beside its formula."""
    monkeypatch.setattr(norm_ends, "device_kind", lambda: "cuda")
    monkeypatch.setattr(norm_ends, "norm_rows", types.SimpleNamespace(fits=lambda *how: True))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(fused_ops, "device_kind", lambda device=device: device)
        assert run(block(gpt), X, C, G, S, B, **CLOSE) == [ALL]
        assert run(block(lambda x, b: plain(x) + b), X, C, G, B, **CLOSE) == [ALL[1:]]


@pytest.mark.parametrize(("dtypes", "rows", "columns", "fits"), [
    (("float32",) * 3, 4096, 768, True), (("bfloat16", "float16", "float32"), 4096, 768, True), (("float32",) * 3, 8, 768, False),
    (("float32",) * 3, 4096, 8193, False), (("float32", "complex64", "float32"), 4096, 768, False),
])  # fmt: skip
def test_what_it_is_for(dtypes, rows, columns, fits, monkeypatch) -> None:
    for device in ("cpu", "metal"):
        monkeypatch.setattr(norm_rows, "device_kind", lambda device=device: device)
        assert not norm_rows.fits(dtypes, rows, columns)
    monkeypatch.setattr(norm_rows, "device_kind", lambda: "cuda")
    assert norm_rows.fits(dtypes, rows, columns) is fits
