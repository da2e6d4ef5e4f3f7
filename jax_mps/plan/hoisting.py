"""What leaves the body of a counted loop: products of the rows that an iteration reads, for all iterations at once, and what is the same in all.

An LSTM multiplies its inputs by the same weights in each step, and nothing of that waits for the step before. So the steps of a body that depend on no
carry, but on rows of captured arrays at the counter and on what never changes, are computed before the loop, as one large product instead
of many small ones (`batching`), and the body reads a row of the result. Before loops are unrolled, inner ones first: what an inner loop gives
up is a step of the outer one's body.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mps.plan import dependence
from jax_mps.plan.dependence import Dependence, Outside, is_costly
from jax_mps.plan.loops import Constants, constant_step
from jax_mps.plan.partition import Target, live_steps, stays
from jax_mps.plan.scans import in_place, read_counter
from jax_mps.plan.types import Region, Step, TensorType, Value


def hoisted(loop: Step, constants: Constants, target: Target) -> tuple[list[Step], Step]:
    """Steps to run before the loop, and the loop without them: itself, where nothing leaves it."""
    if not any(s.name in ("stablehlo.dot_general", "stablehlo.convert") for s in loop.regions[1].steps):
        return [], loop
    reader = read_counter(loop, constants, live_steps)
    if reader is None or reader.trips < 2:
        return [], loop
    hoister = _Hoister(Dependence(reader))
    if not (hoister.chosen or hoister.fixed) or not stays(loop, constants, target):
        return [], loop
    steps, body = hoister.split()
    ahead = loop.attributes.get("ahead", 0) + sum(map(is_costly, steps))
    return steps, replace(loop, regions=(loop.regions[0], body), attributes={**loop.attributes, "ahead": ahead})


class _Hoister:
    """One loop. chosen, fixed: the values, products of rows and the like and what is the same in all iterations, that the body is to read instead of
    computing them.
    """

    def __init__(self, on: Dependence) -> None:
        self.on, self.body = on, on.body
        self.fixed = {s.results[0] for s in self.body.steps if self._is_worth_fixing(s)}
        self.chosen = self._chosen()

    def _is_worth_fixing(self, step: Step) -> bool:
        """Whether a step computes the same in each iteration, and no more than its operands hold (a product may)."""
        if not step.results or self.on.kind(step.results[0]) != "fixed" or not is_costly(step):
            return False
        return step.name == "stablehlo.dot_general" or step.result.nbytes <= max(2 * self.on.viewed(v).type.nbytes for v in step.operands)

    def _chosen(self) -> set[Value]:
        """Products of rows, what feeds them, and what follows from these without being larger."""
        on = self.on
        rows = [s for s in self.body.steps if s.results and on.kind(s.results[0]) == "row" and s.results[0] not in on.sources]
        chosen: set[Value] = set()
        for step in reversed(rows):
            if step.name == "stablehlo.dot_general" or step.results[0] in chosen:
                chosen.add(step.results[0])
                chosen.update(v for v in step.operands if on.kind(v) == "row" and v not in on.sources)
        if not chosen:
            return chosen
        following = set(chosen)
        for step in rows:
            before = [v for v in step.operands if v in following]
            if before and step.result.nbytes <= max(on.viewed(v).type.nbytes for v in before):
                following.add(step.results[0])
        for candidates in (following, chosen):
            costly = {s.results[0] for s in rows if s.results[0] in candidates and is_costly(s)}
            made = [s for s in on.steps_to(costly) if on.kind(s.results[0]) == "row" and s.results[0] not in on.sources and is_costly(s)]
            if on.reader.trips * sum(s.result.nbytes for s in made) <= dependence.MOST_BYTES:
                return costly
        return set()

    def split(self) -> tuple[list[Step], Region]:
        """Steps to run before the loop, and what is left of its body."""
        kept, wanted = self._kept()
        before = self.on.steps_to(wanted)
        leader = self.on.leader(before)
        outside = Outside(self.on, leader and leader[1])
        for step in before:
            outside.add(step)
        inside: list[Step] = []
        reads = {v: outside.same_of(v) for v in wanted if v in self.fixed}
        if leader is not None:
            index = self.on.index(*leader, inside)
            reads.update((v, _row_of(outside.rows[v], index, v.type, inside)) for v in wanted if v in self.chosen)
        body = in_place(Region(self.body.arguments, (*inside, *(s for s in kept if s not in inside)), self.body.results), reads)
        return outside.live(outside.rows.get(v, outside.same_of(v)) for v in wanted), body

    def _kept(self) -> tuple[list[Step], list[Value]]:
        """The steps that stay, and what they read of those that leave."""
        needed, kept, wanted = set(self.body.results), list[Step](), list[Value]()
        for step in reversed(self.body.steps):
            if not any(v in needed for v in step.results):
                continue
            if step.results[0] in self.chosen or step.results[0] in self.fixed:
                wanted.append(step.results[0])
                continue
            kept.append(step)
            needed.update(step.reads())
        return kept[::-1], wanted[::-1]


def _row_of(value: Value, index: Value, kind: TensorType, steps: list[Step]) -> Value:
    """One of the rows along the first dimension."""
    zero = constant_step(np.asarray(0, index.dtype), index.dtype)
    sizes = (1, *kind.shape)
    taken = Step(
        "stablehlo.dynamic_slice",
        (value, index, *zero.results * kind.rank),
        (Value(TensorType(sizes, kind.dtype)),),
        {"slice_sizes": sizes},
        text=(("slice_sizes", f"array<i64: {', '.join(map(str, sizes))}>"),),
    )
    view = Step("stablehlo.reshape", taken.results, (Value(kind),), text=())
    steps += [zero, taken, view]
    return view.results[0]
