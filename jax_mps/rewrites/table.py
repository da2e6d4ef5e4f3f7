"""Peepholes on a plan: an ordered table, applied once from the first step to the last, inner regions included.

A rewrite looks at one step and at what produced its operands, and gives its replacement or None. Its place in the table has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from jax_mps.plan.types import Plan, Region, Step, Value

Producers = Mapping[Value, Step]  # what made each value in scope; arguments are made by nothing


@dataclass(frozen=True, slots=True)
class Rewrite:
    """`replace(step, producers)` is the step in a better form, with the same results, or None if it is not one of these."""

    name: str
    replace: Callable[[Step, Producers], Step | None]
    reason: str


def constant_of(value: Value, producers: Producers) -> np.ndarray[Any, Any] | None:
    """The value of a constant, looking through broadcasts and reshapes (whose elements are the same ones); None if it is none."""
    step = producers.get(value)
    while step is not None and step.name in ("stablehlo.broadcast_in_dim", "stablehlo.reshape"):
        step = producers.get(step.operands[0])
    return step.value if step is not None and step.name == "stablehlo.constant" else None


def apply(plan: Plan, table: tuple[Rewrite, ...]) -> Plan:
    """The plan with every rewrite applied in the table's order."""
    return replace(plan, body=_region(plan.body, {}, table))


def _region(region: Region, outer: Producers, table: tuple[Rewrite, ...]) -> Region:
    producers = dict(outer)
    steps = []
    for step in region.steps:
        if step.regions:
            step = replace(step, regions=tuple(_region(r, MappingProxyType(producers), table) for r in step.regions))
        for rewrite in table:
            step = rewrite.replace(step, producers) or step
        producers.update(dict.fromkeys(step.results, step))
        steps.append(step)
    return Region(region.arguments, tuple(steps), region.results)
