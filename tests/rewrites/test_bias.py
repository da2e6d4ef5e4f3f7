"""Products and the row that is added to them, in the form for CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.harness import Case, plan_of
from rewrites.proof import fused, prove, refuse

from jax_mps.rewrites import bias, rewrite

R = np.random.default_rng(0)
X, W, B = (R.normal(size=shape).astype(np.float32) for shape in ((2, 6, 10), (10, 6), (6,)))
ROW, WIDE, LINE = (R.normal(size=shape).astype(np.float32) for shape in ((1, 10), (10, 40), (40,)))


@pytest.fixture(autouse=True)
def cuda(monkeypatch) -> None:
    monkeypatch.setattr(bias, "device_kind", lambda: "cuda")


def parts(x, w, b):
    """As attention's projections: what is cut from the sum goes to products."""
    q, k = jnp.split(x @ w + b, 2, axis=-1)
    return q @ k.swapaxes(-1, -2)


@pytest.mark.parametrize("f", [
    lambda x, w, b: x @ w + b, lambda x, w, b: b + x[0] @ w, parts, lambda x, w, b: jax.lax.sort(x @ w + b),
    lambda x, w, b: jax.lax.dot_general(x, w.T, (((2,), (1,)), ((), ()))) + b,
])  # fmt: skip
def test_fires(f) -> None:
    prove(Case("bias", f, (X, W, B), rtol=1e-5, atol=1e-6), "biased_product", rtol=1e-5, atol=1e-6)


def test_one_row() -> None:
    prove(Case("row", lambda x, w, b: x @ w + b, (ROW, WIDE, LINE), rtol=1e-5), "biased_product", rtol=1e-5)
    refuse(Case("row", lambda x, w, b: x @ w.T + b, (ROW, np.ascontiguousarray(WIDE.T), LINE)))
    refuse(Case("tiny", lambda x, w, b: x @ w + b, (ROW, W, B)))  # of so few elements that XLA's GPU backend does not round them to TF32


@pytest.mark.parametrize("f", [
    lambda x, w, b: jnp.tanh(x @ w + b),  # fused with what follows
    lambda x, w, b: x @ w + b[:, None],  # along another dimension
    lambda x, w, b: (lambda y: (y + b, y))(x @ w),
    lambda x, w, b: jnp.matmul(x, w, precision="highest") + b,
    lambda x, w, b: x @ w - b,
    lambda x, w, b: jnp.matmul(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32) + b,
    lambda x, w, b: x[..., :1] @ w[:1] + b,  # contracts nothing
])  # fmt: skip
def test_near_misses(f) -> None:
    refuse(Case("near", f, (X, W, np.arange(6, dtype=np.float32))))


def test_only_on_cuda(monkeypatch) -> None:
    monkeypatch.setattr(bias, "device_kind", lambda: "metal")
    refuse(Case("metal", lambda x, w, b: x @ w + b, (X, W, B)))


def test_a_sum_that_its_gradient_reads_takes_the_bias_along() -> None:
    """It is in memory for that; without a gradient it is a part of what follows."""

    def f(x, w, b, v):
        return ((jax.nn.gelu(x @ w + b) @ v @ v.T) ** 2).sum()

    args = tuple(0.2 * R.normal(size=shape).astype(np.float32) for shape in ((8, 16), (16, 32), (32,), (32, 4)))
    assert "biased_product" not in fused(rewrite(plan_of(Case("gelu", f, args))))
    case = Case("gelu and its gradient", jax.value_and_grad(f, argnums=(0, 1, 2)), args, rtol=1e-4, atol=1e-5)  # sums of products in another order
    prove(case, "biased_product", rtol=1e-4, atol=1e-5)
