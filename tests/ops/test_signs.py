"""What a comparison of numbers does not see: signs of zeros, and the last bits of sine and cosine."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mps.plan.tensors import numpy_dtype

from .harness import Case, reference, run_on_mlx

NAMES = (
    "abs", "neg", "sign", "ceil", "floor", "round", "cbrt", "sqrt", "exp", "exp2", "expm1", "log1p", "logistic", "tanh", "tan", "sin", "cos", "sinh",
    "cosh", "asin", "acos", "atan", "asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "lgamma", "square", "bessel_i1e",
)  # fmt: skip
UNARY: dict[str, Callable[[jax.Array], jax.Array]] = {name: getattr(lax, name) for name in NAMES} | {
    "round_even": lambda x: lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN),
    "cubed": lambda x: lax.integer_pow(x, 3),
    "reciprocal": lambda x: 1 / x,
    "remainder": lambda x: lax.rem(x, jnp.asarray(3, x.dtype)),
    "angle": lambda x: lax.atan2(x, jnp.asarray(1, x.dtype)),
    "angle_behind": lambda x: lax.atan2(x, jnp.asarray(-1, x.dtype)),
    "half": lambda x: x.astype(jnp.float16),
    "brain": lambda x: x.astype(jnp.bfloat16),
    "reduced": lambda x: lax.reduce_precision(x, 5, 7),
}
POINTS = [-0.0, 0.0, -np.inf, np.inf, -1, 1, -1e-4, 1e-4, 0.25, -0.25, 0.5, -0.5, -1.5, 2.5]
LARGE = 40_000  # some lowerings have a way of their own for large arrays


@pytest.mark.parametrize("size", [len(POINTS), LARGE])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_signs(dtype: str, size: int) -> None:
    """Every unary op has XLA's sign at every edge, that of zero included."""
    x = np.resize(np.array(POINTS).astype(numpy_dtype(dtype)), size)
    case = Case(f"signs_{dtype}", lambda x: tuple(f(x) for f in UNARY.values()), (x,))
    for name, got, want in zip(UNARY, run_on_mlx(case), reference(case), strict=True):
        got, want = (a[: len(POINTS)].astype(np.float32) for a in (got, want))
        wrong = (np.signbit(got) != np.signbit(want)) & ~np.isnan(want)
        assert not wrong.any(), f"{name} at {np.array(POINTS)[wrong]}: {got[wrong]}, XLA has {want[wrong]}"


@pytest.mark.parametrize("most", [500, 1 << 20])
@pytest.mark.parametrize("largest", [10, 1e3, 1e6, 1e30])
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_near_the_zeros(name: str, largest: float, most: int) -> None:
    """Sine and cosine to 2 ulp however near a zero: 0.6 on CPU, where they go through float64 or complex functions."""
    zeros = np.arange(1, min(2 * largest / np.pi, 200_000)) * (np.pi / 2)
    x = np.concatenate([np.random.default_rng(0).uniform(-largest, largest, 5000), zeros, -zeros]).astype(np.float32)
    x = x[:: -(-x.size // most)]
    want = getattr(np, name)(x.astype(np.float64))
    (got,) = run_on_mlx(Case(name, getattr(lax, name), (x,)))
    ulps = np.abs(got - want) / np.spacing(np.abs(want.astype(np.float32))).astype(np.float64)
    assert ulps.max() <= 2
