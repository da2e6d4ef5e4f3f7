"""Peepholes on a plan: ordered tables, each applied once from the first step to the last, inner regions included.

A rewrite looks at one step, at what produced its operands and at who else reads them, and gives its replacement or None. Its place in the
table has a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, Value


class Scope:
    """What a rewrite may look at: what made each value so far (arguments are made by nothing), and how often the plan reads it."""

    __slots__ = ("body", "counted", "producers")

    def __init__(self, body: Region) -> None:
        self.body = body
        self.producers: dict[Value, Step] = {}
        self.counted: dict[Value, int] | None = None

    def reads(self, value: Value) -> int:
        """How many operands and results of regions the value is; counted when it is first asked for."""
        if self.counted is None:
            self.counted = _reads(self.body)
        return self.counted.get(value, 0)

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

    roots: the ops that it looks at. needs: ops one of which every plan holds that holds one of these; none for any plan.
    """

    name: str
    replace: Callable[[Step, Scope], Step | None]
    roots: frozenset[str]
    reason: str
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Sweep:
    """`groups(steps, scope)` looks at the steps of one region and gives steps that compute results of several of them, each from operands that
    are known where the first of these results is made: there it is put, in place of those that made them.

    roots: ops one of which every region holds that holds such a group.
    """

    name: str
    groups: Callable[[Sequence[Step], Scope], list[Step]]
    roots: frozenset[str]
    reason: str


Table = tuple[Rewrite | Sweep, ...]


def apply(plan: Plan, table: Table) -> Plan:
    """The plan with every rewrite applied in the table's order, without the steps that nobody reads any more."""
    present = {step.name for step in plan.body.walk()}
    roots: dict[str, list[Rewrite]] = {}
    sweeps = [row for row in table if isinstance(row, Sweep) and row.roots & present]
    for rewrite in table:
        if isinstance(rewrite, Rewrite) and (not rewrite.needs or rewrite.needs & present):
            for name in rewrite.roots & present:
                roots.setdefault(name, []).append(rewrite)
    if not roots and not sweeps:
        return plan
    body = _region(plan.body, Scope(plan.body), roots, sweeps)
    return plan if body is plan.body else replace(plan, body=body)


def _reads(body: Region) -> dict[Value, int]:
    reads: dict[Value, int] = {}
    for value in body.results:
        reads[value] = reads.get(value, 0) + 1
    for step in body.walk():
        for value in step.operands:
            reads[value] = reads.get(value, 0) + 1
        for region in step.regions:
            for value in region.results:
                reads[value] = reads.get(value, 0) + 1
    return reads


def _region(region: Region, scope: Scope, roots: Mapping[str, list[Rewrite]], sweeps: Sequence[Sweep]) -> Region:
    """The region, itself where nothing changed."""
    steps: list[Step] = []
    changed = False
    for old in region.steps:
        step = old
        if step.regions:
            inner = tuple(_region(r, scope, roots, sweeps) for r in step.regions)
            if any(new is not r for new, r in zip(inner, step.regions, strict=True)):
                step = replace(step, regions=inner)
        for rewrite in roots.get(step.name, ()):
            if step.name in rewrite.roots:
                step = rewrite.replace(step, scope) or step
        for value in step.results:
            scope.producers[value] = step
        changed = changed or step is not old
        steps.append(step)
    for sweep in sweeps:
        groups = sweep.groups(steps, scope) if any(step.name in sweep.roots for step in steps) else []
        steps, changed = _with_groups(steps, groups), changed or bool(groups)
        scope.producers.update((value, group) for group in groups for value in group.results)
    if not changed:
        return region
    done = Region(region.arguments, tuple(steps), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)


def _with_groups(steps: list[Step], groups: Sequence[Step]) -> list[Step]:
    """The steps, each group in place of the first that made one of its results."""
    group_of = {value: group for group in groups for value in group.results}
    return list(dict.fromkeys(next((group_of[v] for v in step.results if v in group_of), step) for step in steps)) if groups else steps
