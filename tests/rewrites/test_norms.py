"""Layer and RMS normalisation, as flax and equinox (whose formulas stand here) and people write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case
from rewrites.proof import prove, refuse

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
    ],
)  # fmt: skip
def test_near_misses(f, args) -> None:
    refuse(Case("near", f, args))


def test_a_scale_for_each_row_is_no_scale() -> None:
    prove(Case("rows", lambda x, s: plain(x) * s[:3, None, None], (X, S), rtol=2e-5, atol=2e-6), LN, rtol=2e-5, atol=2e-6)
