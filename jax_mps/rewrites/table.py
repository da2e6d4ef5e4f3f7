"""Peepholes on a plan: ordered tables, each applied once from the first step to the last, inner regions included.

A rewrite looks at one step, at what produced its operands and at who else reads them, and gives its replacement or None. Its place in the
table has a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, Value


class Scope:
    """What a rewrite may look at: what made each value so far (arguments are made by nothing), and how often the plan reads it."""

    __slots__ = ("producers", "reads")

    def __init__(self, reads: Mapping[Value, int]) -> None:
        self.producers: dict[Value, Step] = {}
        self.reads = reads

    def maker(self, value: Value, *names: str) -> Step | None:
        """The step that made a value, if it is one of these ops."""
        step = self.producers.get(value)
        return step if step is not None and step.name in names else None

    def constant(self, value: Value) -> np.ndarray[Any, Any] | None:
        """The value of a constant, looking through broadcasts and reshapes (whose elements are the same ones); None if it is none."""
        step = self.producers.get(value)
        while step is not None and step.name in ("stablehlo.broadcast_in_dim", "stablehlo.reshape"):
            step = self.producers.get(step.operands[0])
        return step.value if step is not None and step.name == "stablehlo.constant" else None


@dataclass(frozen=True, slots=True)
class Rewrite:
    """`replace(step, scope)` is the step in a better form, with the same results, or None if it is not one of these.

    roots: the ops that it looks at. needs: an op without which no plan holds one of these.
    """

    name: str
    replace: Callable[[Step, Scope], Step | None]
    roots: frozenset[str]
    reason: str
    needs: str | None = None


Table = tuple[Rewrite, ...]


def apply(plan: Plan, table: Table) -> Plan:
    """The plan with every rewrite applied in the table's order, without the steps that nobody reads any more."""
    present = {step.name for step in plan.body.walk()}
    roots: dict[str, list[Rewrite]] = {}
    for rewrite in table:
        if rewrite.needs is None or rewrite.needs in present:
            for name in rewrite.roots & present:
                roots.setdefault(name, []).append(rewrite)
    if not roots:
        return plan
    return replace(plan, body=_region(plan.body, Scope(_reads(plan.body)), roots))


def _reads(body: Region) -> Counter[Value]:
    reads: Counter[Value] = Counter(body.results)
    for step in body.walk():
        reads.update(step.operands)
        for region in step.regions:
            reads.update(region.results)
    return reads


def _region(region: Region, scope: Scope, roots: Mapping[str, list[Rewrite]]) -> Region:
    steps = []
    for step in region.steps:
        if step.regions:
            step = replace(step, regions=tuple(_region(r, scope, roots) for r in step.regions))
        for rewrite in roots.get(step.name, ()):
            if step.name in rewrite.roots:
                step = rewrite.replace(step, scope) or step
        scope.producers.update(dict.fromkeys(step.results, step))
        steps.append(step)
    done = Region(region.arguments, tuple(steps), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)
