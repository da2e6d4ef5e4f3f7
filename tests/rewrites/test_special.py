"""Special functions that JAX writes as arithmetic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.harness import Case, plan_of
from rewrites.proof import prove

from jax_mps.rewrites import rewrite

# past where exp overflows or underflows, and what is no number
X = np.concatenate([np.linspace(-110, 110, 997), np.linspace(-4, 4, 500), [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(np.float32)


def sigmoids(f, *args) -> int:
    steps = rewrite(plan_of(Case("sigmoid", f, args))).body.walk()
    return sum(s.name == "stablehlo.logistic" for s in steps)


def mine(x):
    return 1 / (jnp.exp(-x) + 1)


def gradient(x):
    return jax.grad(lambda x: jax.nn.silu(x.astype(jnp.float32)).sum())(x)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("f", [jax.nn.sigmoid, jax.nn.silu, mine, gradient])
def test_sigmoid(f, dtype: str) -> None:
    """Half types round once, where the four steps round four times."""
    x = np.asarray(jnp.asarray(X[~(np.abs(X) > 80)] if dtype == "float32" else X[np.abs(X) < 10], dtype))
    assert sigmoids(f, x) == 1
    # an ulp for each of the four steps; in the gradient, x (1 - s) multiplies s's by x
    rtol, atol = {"float32": (5e-7, 3e-6), "float16": (4e-3, 1e-3), "bfloat16": (3e-2, 4e-3)}[dtype]
    prove(Case("sigmoid", f, (x,), rtol=rtol, atol=atol), rtol=rtol, atol=atol)


def test_sigmoid_of_many() -> None:
    """To a few ulps, however small; what is smaller than the least normal number may be 0."""
    prove(Case("many", jax.nn.sigmoid, (np.tile(X, 9),), rtol=1e-6, atol=2e-38), rtol=1e-6, atol=2e-38)
    prove(Case("few", jax.nn.sigmoid, (X,), rtol=1e-6, atol=2e-38), rtol=1e-6, atol=2e-38)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: 1 / (1 + jnp.exp(x)),
        lambda x: 2 / (1 + jnp.exp(-x)),
        lambda x: 1 / (2 + jnp.exp(-x)),
        lambda x: 1 / (1 - jnp.exp(-x)),
        lambda x: (1 / (1 + (e := jnp.exp(-x))), e),
        lambda x: (1 + jnp.exp(-x)) / 1,
        lambda x: 1 / (1 + jnp.exp(-(x + 1j))),
    ],
)
def test_near_misses(f) -> None:
    assert sigmoids(f, X) == 0
