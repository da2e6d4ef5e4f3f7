"""How much memory a program's values take at once, as translation foresees it."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, plan_of

from jax_mps.plan.translate import _peak
from jax_mps.rewrites import rewrite

X = np.ones((256, 256), np.float32)
ONE = X.nbytes


def chain(x):
    for _ in range(6):
        x = x @ x
    return x


def all_kept(x):
    made = [x @ x]
    for _ in range(4):
        made.append(made[-1] @ x)
    return made


def late(x):
    y = x @ x
    z = chain(x)
    return y.reshape(-1) @ z.reshape(-1)


def fused(x):
    y = x @ x
    z = jnp.tanh(jnp.exp(y) * 2 - jnp.sin(y)) + y
    return z @ x


def summed(x):
    return jnp.exp(x @ x).sum()


PEAKS = [
    (chain, 2 * ONE),  # the operand and the result
    (all_kept, 5 * ONE),
    (late, 3 * ONE),  # a view holds what it shows
    (fused, 2 * ONE),  # the product, and what its fused steps come to; that, and the result
    (summed, 2 * ONE),
    (lambda x: x.T.reshape(-1), 0),
    (lambda x: jnp.zeros((4096, 4096)), 0),
    (lambda x: lax.sort(x @ x), 2 * ONE),
]


@pytest.mark.parametrize(("function", "bytes_"), PEAKS, ids=[f.__name__ if f.__name__ != "<lambda>" else str(i) for i, (f, _) in enumerate(PEAKS)])
def test_peak(function, bytes_) -> None:
    plan = rewrite(plan_of(Case("peak", function, (X,))))
    assert _peak(SimpleNamespace(steps=plan.steps, reads=plan.arguments, writes=plan.results)) == bytes_
