"""A fused step still prints as the StableHLO steps that it stands for: the host may have to run it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.harness import Case, assert_same, plan_of, reference
from rewrites.proof import fused

from jax_mps.plan.text import module_text
from jax_mps.rewrites import rewrite

X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
KEY = np.array([1, 2], np.uint32)


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(
    ("f", "args"),
    [
        (lambda x: jax.vjp(jax.nn.softmax, x)[1](x)[0] + jax.nn.log_softmax(norm(x)), (X,)),
        (lambda x, i: jnp.take(x, i, axis=0), (X, np.array([-1, 2, 9], np.int32))),
        (lambda k: jax.random.normal(jax.random.split(jax.random.wrap_key_data(k))[1], (5,)), (KEY,)),
    ],
)
def test_prints_as_it_was(f, args) -> None:
    case = Case("host", f, args)
    plan = rewrite(plan_of(case))
    assert fused(plan)
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert_same(reference(Case("text", text, args)), reference(case), case)
