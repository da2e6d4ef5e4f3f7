"""Products of transposed operands read through the transposition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops import test_dot
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of

from jax_mps.rewrites import rewrite

R = np.random.default_rng(0)
Q, K = R.normal(size=(2, 3, 4, 5, 8)).astype(np.float32)
A, B = R.normal(size=(2, 6, 6)).astype(np.float32)


def transposes(case: Case) -> int:
    return sum(s.name == "stablehlo.transpose" for s in rewrite(plan_of(case)).steps)


def check(case: Case) -> None:
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)


def dot(contract, batch):
    return lambda x, y: lax.dot_general(x, y, (contract, batch))


@pytest.mark.parametrize(
    ("f", "args", "left"),
    [
        (lambda a, b: a @ b.T, (A, B), 0),
        (lambda a, b: a.T @ b.T, (A, B), 0),
        (lambda q, k: q @ k.swapaxes(-1, -2), (Q, K), 0),
        (lambda q, k: q.swapaxes(0, 1) @ k.transpose(1, 0, 3, 2), (Q, K), 0),
        (lambda q, k: dot(((3,), (3,)), ((0, 1), (0, 2)))(q.transpose(0, 2, 1, 3), k), (Q, K), 0),
        (lambda q, k: q.swapaxes(1, 2) @ k.swapaxes(1, 2).swapaxes(2, 3), (Q, K), 0),  # one after the other
        (lambda a, b: a.T @ b + a.T, (A, B), 1),  # read elsewhere, too
        (lambda q, k: dot(((3,), (3,)), ((0,), (0,)))(q.transpose(0, 2, 1, 3), k), (Q, K), 1),  # its free dimensions change their order
        (lambda a, b: (a @ b).T, (A, B), 0),
        (lambda a, b: (a @ b.T).T, (A, B), 0),
        (lambda q, k: (q @ k.swapaxes(-1, -2)).swapaxes(-1, -2), (Q, K), 0),
        (lambda a, b: (lambda y: (y.T, y * 2))(a @ b), (A, B), 1),  # read elsewhere, too
        (lambda q, k: (q @ k.swapaxes(-1, -2)).swapaxes(0, 1), (Q, K), 1),  # it moves a batch
    ],
)
def test_fires_or_not(f, args, left) -> None:
    case = Case("product", f, args, rtol=1e-5, atol=1e-5)
    assert transposes(case) == left
    check(case)


@pytest.mark.parametrize("case", [c for c in test_dot.CASES if not isinstance(c.f, str)], ids=str)
def test_the_table_rewritten(case) -> None:
    check(case)


def test_half_types() -> None:
    check(Case("half", lambda a, b: jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16).T), (A, B)))


@pytest.mark.parametrize(("f", "shape", "names"), [
    (lambda x: x.reshape(1, 12, 8).swapaxes(0, 1) * 2, (1, 96), ["reshape"]),  # heads of one position
    (lambda x: jnp.sin(x).reshape(4, 1, 6).transpose(1, 0, 2).reshape(2, 12), (4, 6), ["reshape"]),
    (lambda x: x.reshape(2, 3, 4).swapaxes(0, 1).reshape(3, 8), (24,), ["reshape", "transpose", "reshape"]),
    (lambda x: x.T * 2, (3, 4), ["transpose"]), (lambda x: x.T * 2, (1, 4), ["reshape"]), (lambda x: x.T.reshape(2, 6) * 2, (3, 4), ["transpose", "reshape"]),
])  # fmt: skip
def test_what_moves_nothing_is_one_reshape(f, shape, names) -> None:
    case = Case("views", f, (R.normal(size=shape).astype(np.float32),))
    views = [s.name.removeprefix("stablehlo.") for s in rewrite(plan_of(case)).steps]
    assert [n for n in views if n in ("reshape", "transpose")] == names
    check(case)


@pytest.mark.parametrize(("f", "reduces"), [
    (lambda x: x.reshape(1, 1, 24).sum((0, 1)), 0), (lambda x: x.reshape(1, 24, 1).max((0, 2)) * 2, 1), (lambda x: x.sum((0,)), 1),
])  # fmt: skip
def test_a_sum_of_one_is_a_reshape(f, reduces) -> None:
    case = Case("one", f, (R.normal(size=(4, 6)).astype(np.float32),), atol=1e-6)  # sums near 0
    assert sum(s.name == "stablehlo.reduce" for s in rewrite(plan_of(case)).steps) == reduces
    check(case)


def test_a_sum_from_one_on_is_none() -> None:
    """(XLA leaves the one out: what it starts from has to be neutral.)"""
    case = Case("one", lambda x: lax.reduce(x.reshape(1, 24), np.float32(1), lax.add, (0,)), (R.normal(size=(4, 6)).astype(np.float32),))
    assert [s.name for s in rewrite(plan_of(case)).steps][-1] == "stablehlo.reduce"


def merged(x):
    return x.transpose(0, 2, 1, 3).reshape(2, 5, -1)


H, WIDE = (R.normal(size=(2, heads, 5, 8)).astype(np.float32) for heads in (3, 4))


@pytest.mark.parametrize(("f", "fires"), [
    (lambda x, y: jnp.concatenate([merged(x), merged(y), merged(x + 1)], -1), True),
    (lambda x, y: jnp.concatenate([merged(x), (y[:, 0] * 2).reshape(2, 5, 1, 8).reshape(2, 5, 8)], -1), True),
    (lambda x, y: jnp.concatenate([merged(x), jnp.sin(y).reshape(2, 5, 4, 8).reshape(2, 5, -1)], -1), True),
    (lambda x, y: jnp.concatenate([merged(x), y[:, 0] * 2], -1), False),  # nothing was merged
    (lambda x, y: jnp.concatenate([x.reshape(2, 15, 8), y.reshape(2, 20, 8)], 1), False),  # nothing moves
    (lambda x, y: jnp.concatenate([x.swapaxes(0, 1).reshape(3, -1), y.swapaxes(0, 1).reshape(4, -1)], 0), False),  # along another dimension
    (lambda x, y: jnp.concatenate([merged(x), y.transpose(0, 2, 3, 1).reshape(2, 5, -1)], -1), False),  # other dimensions inside
    (lambda x, y: (lambda m: (jnp.concatenate([m, merged(y)], -1), m * 2))(merged(x)), False),  # read elsewhere, too
])  # fmt: skip
def test_concatenations_before_dimensions_are_merged(f, fires) -> None:
    case = Case("heads", f, (H, WIDE))
    assert [s.name for s in rewrite(plan_of(case)).steps].count("jax_mps.concatenated") == fires
    check(case)
