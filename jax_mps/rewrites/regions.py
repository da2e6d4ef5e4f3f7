"""What passes over a whole plan share: every region in turn, and nothing made anew that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jax_mps.plan.types import Plan, Region


def innermost_first(plan: Plan, change: Callable[[Region], Region]) -> Plan:
    """The plan with each region as `change` returns it, those of a step before the one that the step stands in; unchanged parts are shared."""
    body = _changed(plan.body, change)
    return plan if body is plan.body else replace(plan, body=body)


def _changed(region: Region, change: Callable[[Region], Region]) -> Region:
    steps = []
    for step in region.steps:
        inner = tuple(_changed(r, change) for r in step.regions)
        steps.append(replace(step, regions=inner) if any(a is not b for a, b in zip(inner, step.regions, strict=True)) else step)
    if any(a is not b for a, b in zip(steps, region.steps, strict=True)):
        region = Region(region.arguments, tuple(steps), region.results)
    return change(region)
