"""A rewrite is proved three ways: it fires (or does not, on a near miss), it gives what the steps gave that it replaces, also after export
and import, and it gives what JAX gives on XLA's CPU backend."""

from __future__ import annotations

from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of, through_a_file

from jax_mps.plan.types import Plan
from jax_mps.rewrites import rewrite


def fused(plan: Plan) -> list[str]:
    """The names of the plan's fused steps, in order."""
    return [step.name.removeprefix("jax_mps.") for step in plan.body.walk() if step.name.startswith("jax_mps.")]


def prove(case: Case, *names: str, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Assert that exactly these fire, and what follows from it. rtol, atol: of the comparison with the steps as they were."""
    plan, run, arguments = lowered(case, rewritten=True)
    assert fused(plan) == list(names)
    ours = results_of(plan, run(*arguments), case)
    plain_plan, plain, _ = lowered(case)
    assert_same(ours, results_of(plain_plan, plain(*arguments), case), Case(f"{case.name} unfused", case.f, case.args, rtol, atol))
    loaded = results_of(plan, through_a_file(run, arguments), case)
    assert [a.tobytes() for a in ours] == [a.tobytes() for a in loaded], f"{case.name}: differs after export and import"
    assert_same(ours, reference(case), case)


def refuse(case: Case) -> None:
    """Assert that nothing fires: a near miss."""
    assert fused(rewrite(plan_of(case))) == []
