"""Sums of padded arrays as concatenations, on CUDA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of

from jax_mps.rewrites import pads, rewrite, transposes

R = np.random.default_rng(0)
X, Y = R.normal(size=(2, 4, 6)).astype(np.float32)


def pad(x, low, high, axis=1, value=0, interior=0):
    return lax.pad(x, np.asarray(value, x.dtype), [(low, high, interior) if d == axis else (0, 0, 0) for d in range(x.ndim)])


def slices(x):
    return jnp.sin(x[:, :2]) @ x[:2, 2:3], jnp.cos(x[:, 3:]) * x[:, 2:3]


@pytest.fixture
def cuda(monkeypatch):
    for module in (pads, transposes):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")


def names(case: Case) -> list[str]:
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)
    return [step.name.partition(".")[2] for step in plan.body.walk()]


@pytest.mark.parametrize("f", [
    lambda x, y: pad(x, 0, 6) + pad(y, 6, 0),
    lambda x, y: pad(x, 8, 2, 0) + (pad(y, 0, 10, 0) + pad(x * 2, 4, 6, 0)) + pad(y[:2], 12, 0, 0),
    lambda x, y: pad(x.astype(int), 0, 6) + pad(y.astype(int), 6, 0),
    lambda x, y: jnp.stack([pad(a, 0, 1) + pad(b[:, :1], 6, 0) for a, b in ((x, y), (y, x))]) if x.ndim else x,
])  # fmt: skip
def test_fires(f, cuda) -> None:
    found = names(Case("pads", f, (X, Y)))
    assert "concatenate" in found and not {"pad", "add"} & set(found)


@pytest.mark.parametrize("f", [
    lambda x, y: pad(x, 0, 5) + pad(y, 5, 0),  # one column of both
    lambda x, y: pad(x, 0, 7) + pad(y, 7, 0),  # one of neither
    lambda x, y: pad(x, 0, 6, value=1) + pad(y, 6, 0),
    lambda x, y: pad(x, 0, 6) - pad(y, 6, 0),
    lambda x, y: pad(x, 0, 5, interior=1) + pad(y, 10, 0),
    lambda x, y: pad(x, 0, 4, 0)[:, :6] + pad(y, 0, 4, 0),  # the same place
    lambda x, y: lax.pad(x, np.float32(0), [(0, 4, 0), (0, 6, 0)]) + lax.pad(y, np.float32(0), [(4, 0, 0), (6, 0, 0)]),  # corners
    lambda x, y: (lambda p: (p + pad(y, 6, 0), p * 2))(pad(x, 0, 6)),  # read elsewhere, too
    lambda x, y: pad(x, 0, 6) + jnp.ones((4, 12)) + pad(y, 6, 0),
])  # fmt: skip
def test_near_misses(f, cuda) -> None:
    assert "concatenate" not in names(Case("pads", f, (X, Y)))


def test_gradients_of_slices(cuda) -> None:
    found = names(Case("gradient", jax.grad(lambda x: sum(y.sum() for y in slices(x))), (X,), rtol=1e-5, atol=1e-5))
    assert "pad" in found  # some places are read twice
    found = names(Case("gradient", jax.grad(lambda x: (jnp.sin(x[:, :2]).sum() * x[:, 2:]).sum()), (X,), rtol=1e-5, atol=1e-5))
    assert "concatenate" in found and "pad" not in found


def test_elsewhere() -> None:
    assert "concatenate" not in names(Case("pads", lambda x, y: pad(x, 0, 6) + pad(y, 6, 0), (X, Y)))


@pytest.mark.parametrize(("f", "fires"), [
    (lambda x, y: jnp.stack([x, y]).transpose(1, 0, 2).reshape(4, 12), True),  # heads that were unpacked
    (lambda x, y: jnp.concatenate([x, y[:1]], 0).T, True),
    (lambda x, y: jnp.concatenate([x, y[:1]], 0)[:, None].swapaxes(0, 1), False),  # moves nothing
    (lambda x, y: (lambda c: (c.T, c * 2))(jnp.concatenate([x, y[:1]], 0)), False),  # read elsewhere, too
])  # fmt: skip
def test_transposed_concatenations(f, fires, cuda) -> None:
    case = Case("transposed", f, (X, Y))
    assert ("jax_mps.concatenated" in [step.name for step in rewrite(plan_of(case)).steps]) == fires
    names(case)
