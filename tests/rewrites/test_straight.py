"""Products in the order that their results are read in."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of

from jax_mps.ops.registry import lower_steps
from jax_mps.plan.text import module_text
from jax_mps.plan.types import Plan, Region
from jax_mps.rewrites import rewrite
from jax_mps.rewrites.straight import straightened

R = np.random.default_rng(0)
Q, K = (R.normal(size=shape).astype(np.float32) for shape in ((2, 6, 3, 4, 8), (2, 20, 3, 8)))
A, B = (R.normal(size=shape).astype(np.float32) for shape in ((5, 6), (6, 4)))


def straight(case: Case) -> Plan:
    plan = rewrite(plan_of(case))
    body = straightened(plan.body)
    return Plan(plan.name, Region(body.arguments, body.steps, body.results))


def transposes(plan: Plan) -> list[tuple[int, ...]]:
    """Of what is larger than queries and keys."""
    return [tuple(s.permutation) for s in plan.steps if s.name == "stablehlo.transpose" and s.operand.size > Q.size]


def dot(x, y, contract, batch=((), ())):
    return lax.dot_general(x, y, (contract, batch))


def scores(q, k):
    return dot(k, q, ((3,), (4,)), ((0, 2), (0, 2)))  # (b, k, s, t, g)


def weighted(w, k):
    return dot(w, k, ((2,), (1,)), ((0, 1), (0, 2)))  # of (b, k, s, t, g), sums over s: (b, k, t, g, d)


def merged(q, k):
    """Features before positions, and merged."""
    x = dot(k, scores(q, k), ((1,), (2,)), ((0, 2), (0, 1)))  # (b, k, d, t, g)
    return x.transpose(0, 3, 1, 4, 2).reshape(2, 6, -1)


@pytest.mark.parametrize(("f", "args", "before", "after"), [
    (lambda q, k: jnp.einsum("btkgd,bskd->bkgts", q, k), (Q, K), 1, 0),  # both operands' dimensions in another order
    (lambda q, k: scores(q, k).transpose(0, 1, 4, 3, 2), (Q, K), 1, 0),
    (lambda q, k: scores(q, k).transpose(0, 1, 2, 4, 3), (Q, K), 1, 0),  # one operand's
    (lambda q, k: scores(q, k).transpose(0, 1, 3, 2, 4), (Q, K), 1, 1),  # one between the others
    (lambda q, k: scores(q, k).transpose(1, 0, 2, 3, 4), (Q, K), 1, 1),  # batches
    (lambda q, k: (lambda y: (y.transpose(0, 1, 4, 3, 2), y * 2))(scores(q, k)), (Q, K), 1, 1),  # read elsewhere, too
    (lambda q, k: weighted(jnp.tanh(scores(q, k)).transpose(0, 1, 2, 4, 3), k), (Q, K), 1, 0),  # the product's result is smaller
    (lambda q, k: dot(q.transpose(0, 3, 2, 1, 4), k, ((4,), (3,)), ((0, 2), (0, 2))), (Q, K), 0, 0),  # larger
])  # fmt: skip
def test_order(f, args, before, after) -> None:
    case = Case("order", f, args)
    assert [len(transposes(rewrite(plan_of(case)))), len(transposes(straight(case)))] == [before, after]
    check(case)


@pytest.mark.parametrize(("f", "last"), [
    (merged, True),
    (lambda q, k: dot(k, scores(q, k), ((1,), (2,)), ((0, 2), (0, 1))).transpose(0, 3, 1, 4, 2) * 2, False),  # a kernel's step, which reads by strides
    (lambda q, k: dot(k, scores(q, k), ((1,), (2,)), ((0, 2), (0, 1))).transpose(0, 3, 4, 1, 2).reshape(2, 24, 3, 8), False),  # a view: not copied here
    (lambda q, k: jnp.concatenate([dot(k, scores(q, k), ((1,), (2,)), ((0, 2), (0, 1))).transpose(0, 3, 1, 4, 2)[:, :, None], q[:, :, None]], 2), True),
])  # fmt: skip
def test_lines(f, last) -> None:
    """What is copied after a product has its last dimension last in memory."""
    case = Case("lines", f, (Q, K))
    found = [s.permutation for s in straight(case).steps if s.name == "stablehlo.transpose" and s.operand.rank == 5]
    assert any(permutation[-1] == 4 for permutation in found) == last
    check(case)


def test_nothing_to_do() -> None:
    plan = rewrite(plan_of(Case("plain", lambda a, b: (a @ b) * 2, (A, B))))
    assert straightened(plan.body) is plan.body


def test_no_elements() -> None:
    check(Case("empty", lambda q, k: jnp.einsum("btkgd,bskd->bkgts", q[:0], k[:0]).reshape(-1), (Q, K)))


def check(case: Case) -> None:
    """Against XLA: the new steps, and those that the host would run."""
    case = Case(case.name, case.f, case.args, rtol=1e-4, atol=1e-4)  # sums of sums
    plan = straight(case)
    _, _, arguments = lowered(case)
    env = dict(zip(plan.arguments, arguments, strict=True))
    for step in lower_steps(plan.steps):
        step(env)
    assert_same(results_of(plan, [env[v] for v in plan.results], case), reference(case), case)
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert_same(reference(Case(case.name, text, case.args)), reference(case), case)
