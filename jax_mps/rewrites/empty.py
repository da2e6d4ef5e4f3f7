"""Steps that compute no element, of whatever op, as constants: XLA does the same, and LAPACK divides by zero over such matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mps.plan.types import Plan, Region, Step, has_effects, numpy_dtype


def drop_empty(plan: Plan) -> Plan:
    """The plan with a constant for each result without elements; who computed it alone is then read by nobody."""
    if not any(0 in v.shape for step in plan.body.walk() for v in step.results):
        return plan
    return replace(plan, body=_region(plan.body))


def _region(region: Region) -> Region:
    steps = (replace(s, regions=tuple(map(_region, s.regions))) if s.regions else s for s in region.steps)
    return Region(region.arguments, tuple(map(_step, steps)), region.results)


def _step(step: Step) -> Step:
    if len(step.results) != 1 or 0 not in step.result.shape or step.name == "stablehlo.constant" or has_effects(step):
        return step
    value = np.zeros(step.result.shape, numpy_dtype(step.result.dtype))
    return Step("stablehlo.constant", (), step.results, {"value": value}, location=step.location, text=())
