"""Layer and RMS normalisation, as flax and equinox (whose formulas stand here) and people write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from rewrites.proof import fused, prove, refuse

import jax_mps.ops.fused as fused_ops
from jax_mps.rewrites import rewrite

R = np.random.default_rng(0)
X = (R.normal(size=(3, 4, 24)) * 3 + 1).astype(np.float32)
S, B = R.normal(size=(2, 24)).astype(np.float32)
LN, RMS = "layer_norm", "rms_norm"


def plain(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def gpt(x, s, b):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * s + b


def flax_layer_norm(x, s, b):
    mean, square = x.mean(-1), (x * x).mean(-1)
    variance = jnp.maximum(0.0, square - mean * mean)
    factor = lax.rsqrt(jnp.expand_dims(variance, -1) + 1e-6) * s.reshape(1, 1, -1)
    return (x - jnp.expand_dims(mean, -1)) * factor + b.reshape(1, 1, -1)


def flax_rms_norm(x, s):
    square = (x * x).mean(-1)
    return (x - jnp.zeros_like(square)[..., None]) * (lax.rsqrt(square[..., None] + 1e-6) * s.reshape(1, 1, -1))


def equinox_layer_norm(x, s, b):
    def one(x):
        variance = jnp.maximum(0.0, jnp.var(x, keepdims=True))
        return s * ((x - jnp.mean(x, keepdims=True)) * lax.rsqrt(variance + 1e-5)) + b

    return jax.vmap(one)(x[0])


def equinox_rms_norm(x, s):
    return jax.vmap(lambda x: s * (lax.rsqrt(jnp.mean(x**2) + 1e-5) * x))(x[0])


def by_division(x, s, b):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * s + b


def llama(x, s):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * s


@pytest.mark.parametrize(
    ("f", "args", "name"),
    [
        (plain, (X,), LN), (lambda x: plain(x)[0] + 1, (X,), LN), (gpt, (X, S, B), LN), (lambda x, s: gpt(x, s, 0), (X, S), LN),
        (flax_layer_norm, (X, S, B), LN), (equinox_layer_norm, (X, S, B), LN), (by_division, (X, S, B), LN),
        (flax_rms_norm, (X, S), RMS), (equinox_rms_norm, (X, S), RMS), (llama, (X, S), RMS), (lambda x: llama(x, 1), (X,), RMS),
        (lambda x, s, b: gpt(x[0, 0], s, b), (X, S, B), LN),
        (lambda x, s, b: gpt(x.astype(jnp.float32), s, b).astype(jnp.bfloat16), (X.astype(jnp.bfloat16), S, B), LN),
    ],
)  # fmt: skip
def test_fires(f, args, name) -> None:
    prove(Case("norm", f, args, rtol=2e-5 if args[0].dtype == np.float32 else None, atol=2e-6), name, rtol=2e-5, atol=2e-6)


def test_constant_rows() -> None:
    """No variance: 0 / sqrt(eps), not NaN."""
    prove(Case("constant", gpt, (np.full((2, 8), 3, np.float32), S[:8], B[:8])), LN)


def test_rows_with_nan() -> None:
    x = X.copy()
    x[0, 0, 0], x[1, 1, 1] = np.nan, np.inf
    prove(Case("nan", gpt, (x, S, B), rtol=2e-5, atol=2e-6), LN, rtol=2e-5, atol=2e-6)


def along_another_axis(x):
    return (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 1e-5)


def unbiased(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5)


def of_another(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt((2 * x).var(-1, keepdims=True) + 1e-5)


def without_eps(x):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True))


def eps_of_each(x, s):
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + s[0])


def root_is_read(x):
    root = lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
    return (x - x.mean(-1, keepdims=True)) * root, root


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (along_another_axis, (X,)), (unbiased, (X,)), (of_another, (X,)), (without_eps, (X,)), (eps_of_each, (X, S)), (root_is_read, (X,)),
        (lambda x: x * lax.rsqrt(jnp.mean(x, -1, keepdims=True) + 1e-6), (X,)),
        (lambda x: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6), (X,)),
        (lambda x: (x - jnp.median(x, -1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5), (X,)),
    ],
)  # fmt: skip
def test_near_misses(f, args) -> None:
    refuse(Case("near", f, args))


@pytest.mark.parametrize("f", [lambda x, s: plain(x) * s * s, lambda x, s: plain(x) + 1, lambda x, s: plain(x) * 2 * s, lambda x, s: plain(x) + s])
def test_what_is_no_scale_or_bias_is_left(f) -> None:
    prove(Case("affine", f, (X, S), rtol=2e-5, atol=2e-6), LN, rtol=2e-5, atol=2e-6)


def test_a_scale_for_each_row_is_no_scale() -> None:
    prove(Case("rows", lambda x, s: plain(x) * s[:3, None, None], (X, S), rtol=2e-5, atol=2e-6), LN, rtol=2e-5, atol=2e-6)


# ---- gradients -----------------------------------------------------------------------------------------------------------------------

G = R.normal(size=X.shape).astype(np.float32)
CLOSE = {"rtol": 2e-5, "atol": 1e-5}  # sums of 24 and of 12 terms, in another order


def pulled(norm, *, residual=True):
    """Gradients of everything that a block with this norm reads; other things read its rows, too."""

    def loss(x, g, *scales):
        y = norm(x, *scales)
        return (y * g.astype(y.dtype)).sum() + (jnp.sin(x).sum() if residual else 0)

    return lambda x, g, *scales: jax.grad(loss, (0, *range(2, 2 + len(scales))))(x, g, *scales)


def gradients(case: Case) -> list[tuple[str, int, bool, int]]:
    """Norm, results, whether scaled, what is added, of each gradient."""
    steps = [s for s in rewrite(plan_of(case)).body.walk() if s.name == "jax_mps.norm_gradient"]
    return [(s.norm, len(s.results), s.scaled, s.added) for s in steps]


@pytest.mark.parametrize(
    ("norm", "scales", "name"),
    [
        (plain, (), LN), (gpt, (S, B), LN), (flax_layer_norm, (S, B), LN), (by_division, (S, B), LN), (llama, (S,), RMS), (flax_rms_norm, (S,), RMS),
        (lambda x, s: flax_layer_norm(x, s, jnp.zeros(24)), (S,), LN), (lambda x, s: s * plain(x), (S,), LN),
        (lambda x, s, b: equinox_layer_norm(x.reshape(1, 12, 24), s, b).reshape(x.shape), (S, B), LN),
        (lambda x, s: equinox_rms_norm(x.reshape(1, 12, 24), s).reshape(x.shape), (S,), RMS),
        (jax.checkpoint(gpt), (S, B), LN),
    ],
)  # fmt: skip
@pytest.mark.parametrize("residual", [True, False])
def test_gradients(norm, scales, name, residual) -> None:
    case = Case("gradient", pulled(norm, residual=residual), (X, G, *scales), **CLOSE)
    ((found, results, scaled, added),) = gradients(case)
    assert (found, results, scaled) == (name, 1 + bool(scales), bool(scales))
    assert added <= residual
    prove(case, "norm_gradient", **CLOSE)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 2), (2, 1, 3, 5), (300, 257)])
def test_shapes_of_gradients(shape) -> None:
    random = np.random.default_rng(1)  # rows of two that are nearly equal would need a tolerance of their own
    x, g = random.normal(size=(2, *shape)).astype(np.float32) * 2 + 1
    s, b = random.normal(size=(2, shape[-1])).astype(np.float32)
    close = {"rtol": 1e-4, "atol": 3e-5}  # up to 300 terms
    case = Case("shape", pulled(gpt), (x, g, s, b), **close)
    assert gradients(case)[0][1] == (1 if len(shape) == 1 else 2)  # a scale for one row is not summed over rows
    prove(case, *(["layer_norm"] if len(shape) == 1 else []), "norm_gradient", **close)


def train(norm):
    """Two blocks: the second reads what the first adds to its rows."""

    def loss(x, w, *scales):
        for _ in range(2):
            x = x + jnp.tanh(norm(x, *scales) @ w.astype(x.dtype))
        return (x.astype(jnp.float32) ** 2).sum()

    return lambda *args: jax.value_and_grad(loss, tuple(range(len(args))))(*args)


W = R.normal(size=(24, 24)).astype(np.float32) / 5


@pytest.mark.parametrize(("norm", "scales", "name"), [(gpt, (S, B), LN), (flax_layer_norm, (S, B), LN), (plain, (), LN), (llama, (S,), RMS)])
def test_nothing_is_kept_for_the_gradient(norm, scales, name) -> None:
    close = {"rtol": 1e-4, "atol": 1e-4}  # gradients of up to 60, through two blocks
    case = Case("train", train(norm), (X, W, *scales), **close)
    prove(case, name, name, "norm_gradient", "norm_gradient", **close)
    assert not {"stablehlo.rsqrt", "stablehlo.sqrt"} & {s.name for s in rewrite(plan_of(case)).body.walk()}


def in_float32(x, s, b):
    return gpt(x.astype(jnp.float32), s, b).astype(x.dtype)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("norm", "wide"), [(in_float32, True), (gpt, False), (flax_layer_norm, False), (lambda x, s, b: llama(x, s) + b, False)])
def test_gradients_in_half_types(norm, wide, dtype) -> None:
    """Sums of rounded numbers, rounded once where the steps round each."""
    narrow = X.astype(dtype), G.astype(dtype), *(v if wide else v.astype(dtype) for v in (S, B))
    close = {"rtol": 2e-2, "atol": 6e-2} if dtype is jnp.bfloat16 else {"rtol": 4e-3, "atol": 8e-3}
    prove(Case("half", pulled(norm), narrow, **close), "norm_gradient", **close)


def test_large_offsets() -> None:
    """Rows far from 0, whose variance is a difference of large numbers unless it is taken in two passes."""
    x = X + np.float32(3000)
    wanted = [np.asarray(v) for v in exact_gradients(x.astype(np.float64), G.astype(np.float64), S.astype(np.float64))]
    for norm in (gpt, flax_layer_norm):
        errors = []
        for rewritten in (True, False):
            case = Case("offset", pulled(norm, residual=False), (x, G, S, B))
            plan, run, arguments = lowered(case, rewritten=rewritten)
            ours = results_of(plan, run(*arguments), case)[:2]
            errors.append([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, wanted, strict=True)])
        assert all(e < 1e-4 for e in errors[0])
        assert all(a <= 2 * b for a, b in zip(*errors, strict=True))  # a rounding of the mean more or less


def exact_gradients(x, g, s):
    """In float64, by NumPy."""
    c = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + 1e-5)
    u = g * s
    return r * (u - u.mean(-1, keepdims=True) - c * r * r * (u * c).mean(-1, keepdims=True)), (g * c * r).sum((0, 1))


def test_rows_with_nan_and_rows_without_variance() -> None:
    x = X.copy()
    x[0, 0, 0], x[1, 1, 1], x[2, 2] = np.nan, np.inf, 3
    for norm, scales in ((gpt, (S, B)), (llama, (S,))):
        prove(Case("odd", pulled(norm), (x, G, *scales), rtol=2e-5, atol=1e-4), "norm_gradient", rtol=2e-5, atol=1e-4)


def test_second_order() -> None:
    def second(x, g, s, b):
        return jax.grad(lambda x: (pulled(gpt)(x, g, s, b)[0] * G).sum())(x)

    case = Case("second", second, (X, G, S, B), rtol=1e-4, atol=1e-4)
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)


def test_what_others_read_is_still_there() -> None:
    def f(x, g, s, b):
        root = lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return root, x.mean(-1), pulled(gpt)(x, g, s, b)

    prove(Case("read", f, (X, G, S, B), **CLOSE), "norm_gradient", **CLOSE)


def test_scale_that_is_known_too_late() -> None:
    """What is added is computed from the gradient of the scale, which has to stay apart."""

    def f(x, g, s):
        c = x - x.mean(-1, keepdims=True)
        r = lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)
        of_scale = (c * r * g).sum((0, 1))
        u = g * s
        return r * u + jnp.outer(jnp.arange(12.0), of_scale).reshape(x.shape) - r * u.mean(-1, keepdims=True) - c * r**3 * (c * u).mean(-1, keepdims=True)

    case = Case("late", f, (X, G, S), rtol=2e-5, atol=1e-4)
    assert gradients(case) == []  # it ends in a subtraction
    case = Case("late", lambda *a: -f(*a) + 0 * a[0], (X, G, S), rtol=2e-5, atol=1e-4)
    assert gradients(case) == []


def stopped(what):
    """The gradient does not go through one of the statistics."""

    def f(x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        mean, variance = (lax.stop_gradient(v) if name == what else v for name, v in (("mean", mean), ("variance", variance)))
        return (x - mean) * lax.rsqrt(variance + 1e-5)

    return f


def sharper(x):
    """The gradient of another power."""
    c = x - x.mean(-1, keepdims=True)
    return c * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) ** 2


@pytest.mark.parametrize(
    "norm",
    [
        stopped("mean"), stopped("variance"), sharper, unbiased, along_another_axis, of_another, without_eps,
        lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(jnp.clip(x.var(-1, keepdims=True), 4) + 1e-5),
    ],
)  # fmt: skip
def test_near_misses_of_gradients(norm) -> None:
    case = Case("near", pulled(norm), (X, G))
    assert gradients(case) == []


@pytest.mark.parametrize(
    ("norm", "count"),
    [
        (lambda x: plain(x) + by_division(x, S, B), 2),
        (lambda x: plain(x) * jnp.where(x.var(-1, keepdims=True) > 4, 1.0, 2.0), 1),
    ],
)
def test_gradients_within_others(norm, count) -> None:
    """One part of the gradient of the rows is that of a norm; the rest is added to it."""
    case = Case("within", pulled(norm), (X, G), **CLOSE)
    assert len(gradients(case)) == count
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)


@pytest.mark.parametrize(("norm", "scales", "name"), [(gpt, (S, B), LN), (plain, (), LN), (llama, (S,), RMS)])
def test_the_form_for_a_gpu(norm, scales, name, monkeypatch) -> None:
    """MLX's own gradient, which it composes on CPU."""
    monkeypatch.setattr(fused_ops, "device_kind", lambda: "cuda")
    prove(Case("gpu", pulled(norm), (X, G, *scales), **CLOSE), "norm_gradient", **CLOSE)


# ---- batch norm ----------------------------------------------------------------------------------------------------------------------

IMAGES = (R.normal(size=(2, 3, 5, 7)) * 2 + 1).astype(np.float32)
GI = R.normal(size=IMAGES.shape).astype(np.float32)


def flax_batch_norm(x, s, b, axes=(0, 1, 2)):
    mean, square = x.mean(axes), (x * x).mean(axes)
    variance = jnp.maximum(0.0, square - mean * mean)
    shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
    factor = lax.rsqrt(variance.reshape(shape) + 1e-5) * s.reshape(shape)
    return (x - mean.reshape(shape)) * factor + b.reshape(shape)


def batch_norm(x, s, b, axes=(0, 1, 2)):
    shape = [1 if d in axes else n for d, n in enumerate(x.shape)]
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5) * s.reshape(shape) + b.reshape(shape)


def channels_first(x, s, b):
    return batch_norm(x, s, b, axes=(0, 2, 3))


def of_each_image(x):
    return (x - x.mean((1, 2), keepdims=True)) * lax.rsqrt(x.var((1, 2), keepdims=True) + 1e-5)


def train_batch(norm):
    """With running statistics, a rectifier after the norm, and another reader of what it reads."""

    def loss(x, g, *scales):
        y = jnp.maximum(norm(x, *scales), 0)
        return ((y + jnp.sin(x)) * g).sum(), (x.mean((0, 1, 2)), (x * x).mean())

    return lambda x, g, *scales: jax.value_and_grad(loss, (0, *range(2, 2 + len(scales))), has_aux=True)(x, g, *scales)


@pytest.mark.parametrize(
    ("norm", "scales"),
    [
        (flax_batch_norm, (7, 7)), (batch_norm, (7, 7)), (channels_first, (3, 3)), (lambda x, s: batch_norm(x, s, jnp.zeros(7)), (7,)),
        (lambda x: batch_norm(x, jnp.ones(7), jnp.zeros(7)), ()), (of_each_image, ()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_of_batch_norm(norm, scales, batch) -> None:
    args = IMAGES[:batch], GI[:batch], *(R.normal(size=n).astype(np.float32) for n in scales)
    close = {"rtol": 1e-4, "atol": 3e-5}  # sums of 30
    prove(Case("batch", train_batch(norm), args, **close), "channel_norm_gradient", **close)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_batch_norm_in_half_types(dtype) -> None:
    """As flax computes it: statistics in float32."""

    def norm(x, s, b):
        return flax_batch_norm(x.astype(jnp.float32), s, b).astype(x.dtype)

    args = IMAGES.astype(dtype), GI.astype(dtype), *R.normal(size=(2, 7)).astype(np.float32)
    close = {"rtol": 2e-2, "atol": 6e-2} if dtype is jnp.bfloat16 else {"rtol": 4e-3, "atol": 8e-3}
    prove(Case("half", train_batch(norm), args, **close), "channel_norm_gradient", **close)


def test_channels_without_variance() -> None:
    """What JAX makes of a variance that is 0, or that rounding made less."""
    x = IMAGES.copy()
    x[..., 1], x[..., 2] = 3, 1e4
    x[..., 3] = 1e4 + np.round(IMAGES[..., 3], 3)
    s, b = R.normal(size=(2, 7)).astype(np.float32)
    close = {"rtol": 1e-3, "atol": 1e-2}  # a few ulp of 1e4 in each of the differences
    case = Case("constant", lambda x, g, s, b: pulled(flax_batch_norm, residual=False)(x, g, s, b)[0], (x, GI, s, b))
    plan, run, arguments = lowered(case, rewritten=True)
    (ours,), (theirs,) = results_of(plan, run(*arguments), case), reference(case)
    np.testing.assert_allclose(ours[..., :3], theirs[..., :3], **close)
    assert np.abs(ours[..., 3]).max() <= 2 * np.abs(theirs[..., 3]).max() + 1


def running(x, s, b):
    """Statistics from elsewhere."""
    return (x - x[0, 0, 0]) * lax.rsqrt(x[1, 0, 0] ** 2 + 1e-5) * s + b


@pytest.mark.parametrize(
    "norm",
    [
        running, lambda x, s, b: flax_batch_norm(lax.stop_gradient(x), s, b) + x,
        lambda x, s, b: (x - lax.stop_gradient(x.mean((0, 1, 2)))) * lax.rsqrt(x.var((0, 1, 2)) + 1e-5) * s + b,
        lambda x, s, b: (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1)) + 1e-5) * s + b,
        lambda x, s, b: (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2), ddof=1) + 1e-5) * s + b,
    ],
)  # fmt: skip
def test_near_misses_of_batch_norm(norm) -> None:
    case = Case("near", train_batch(norm), (IMAGES, GI, *R.normal(size=(2, 7)).astype(np.float32)))
    assert "channel_norm_gradient" not in fused(rewrite(plan_of(case)))


@pytest.mark.parametrize("told", [lambda v: v == 0, lambda v: v > 0, lambda v: v <= 0], ids=["is 0", "is above", "is not above"])
@pytest.mark.parametrize("branch", ["rows", "numbers"])
def test_what_rows_without_variance_are_given(told, branch) -> None:
    """A choice by the variance is looked through only where it is multiplied by rows less their mean; other choices stay."""

    def program(x, s, b):
        mean = x.mean(-1, keepdims=True)
        variance = jnp.broadcast_to(jnp.maximum(0.0, (x * x).mean(-1, keepdims=True) - mean * mean), x.shape)
        normed = (x - mean) * lax.rsqrt(variance + 1e-5) * s
        if branch == "rows":
            return jnp.where(told(variance), normed + b, 5.0), jnp.where(told(variance), 5.0, normed + b)
        return normed + b * jnp.where(told(variance), 1.0, 3.0), normed + b * jnp.where(told(variance), 3.0, 1.0)

    x = np.random.default_rng(5).integers(-4, 5, (6, 8)).astype("float32")
    x[1], x[4] = 2, 0  # exact: their variance is 0
    case = Case("told", program, (x, S[:8] if S.size >= 8 else np.ones(8, "float32"), np.full(8, 2, "float32")))
    found = []
    for rewritten in (True, False):
        plan, run, arguments = lowered(case, rewritten=rewritten)
        found.append(results_of(plan, run(*arguments), case))
    for ours, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-5)
