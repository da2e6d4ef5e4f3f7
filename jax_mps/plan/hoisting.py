"""What leaves the body of a counted loop: products of the rows that an iteration reads, for all iterations at once, and what is the same in all.

An LSTM multiplies its inputs by the same weights in each step, and nothing of that waits for the step before. So the steps of a body that depend on no
carry, but on rows of captured arrays at the counter and on what never changes, are computed before the loop, as one large product instead
of many small ones (`batching`), and the body reads a row of the result. Before loops are unrolled, inner ones first: what an inner loop gives
up is a step of the outer one's body.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from jax_mps.plan.batching import VIEWS, Batch, can_batch, is_pure
from jax_mps.plan.loops import Constants, constant_step, renamed
from jax_mps.plan.partition import Target, live_steps, stays
from jax_mps.plan.scans import Reader, in_place, read_counter
from jax_mps.plan.trips import Row
from jax_mps.plan.types import Region, Step, TensorType, Value

# Bytes of all that is computed for all iterations of a loop; where it would be more, each iteration computes its own.
MOST_BYTES = 64 << 20


def hoisted(loop: Step, constants: Constants, target: Target) -> tuple[list[Step], Step]:
    """Steps to run before the loop, and the loop without them: itself, where nothing leaves it."""
    if not any(s.name == "stablehlo.dot_general" or s.name == "stablehlo.convert" for s in loop.regions[1].steps):
        return [], loop
    reader = read_counter(loop, constants, live_steps)
    if reader is None or reader.trips < 2:
        return [], loop
    hoister = _Hoister(reader)
    if not (hoister.chosen or hoister.fixed) or not stays(loop, constants, target):
        return [], loop
    steps, body = hoister.split()
    ahead = sum(is_costly(s) for s in steps)
    return steps, replace(loop, regions=(loop.regions[0], body), attributes={**loop.attributes, "hoisted": loop.attributes.get("hoisted", 0) + ahead})


def is_costly(step: Step) -> bool:
    """Whether the step computes anything."""
    return step.name not in VIEWS and step.name not in ("stablehlo.constant", "stablehlo.iota")


class _Hoister:
    """One loop. A value of its body is "constant", "fixed" (the same in each iteration), a "row" (of what all iterations could compute at once) or
    none of these.

    chosen, fixed: the values of either kind that the body is to read instead of computing them.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self.body = reader, reader.body
        self.kinds: dict[Value, str | None] = dict.fromkeys(self.body.arguments)
        self.sources: dict[Value, tuple[Step, Row]] = {}
        for step in self.body.steps:
            kind = self._kind(step)
            self.kinds.update(dict.fromkeys(step.results, kind))
        self.fixed = {s.results[0] for s in self.body.steps if self._is_worth_fixing(s)}
        self.chosen = self._chosen()

    # ---- what leaves the body -----------------------------------------------------------------------------------------------------

    def _kind(self, step: Step) -> str | None:
        if step.name == "stablehlo.constant":
            return "constant"
        if (row := self.reader.source(step)) is not None:
            self.sources[step.results[0]] = step, row
            return "row"
        if not is_pure(step):
            return None
        kinds = {self.kind(v) for v in step.reads()}
        if None in kinds:
            return None
        if "row" not in kinds:
            return "fixed" if "fixed" in kinds else "constant"
        return "row" if can_batch(step, lambda v: self.kind(v) == "row") else None

    def kind(self, value: Value) -> str | None:
        if value in self.kinds:
            return self.kinds[value]
        return "constant" if value in self.reader.constants else "fixed"

    def _is_worth_fixing(self, step: Step) -> bool:
        """Whether a step computes the same in each iteration, and no more than its operands hold (a product may)."""
        if not step.results or self.kind(step.results[0]) != "fixed" or not is_costly(step):
            return False
        return step.name == "stablehlo.dot_general" or step.result.nbytes <= max(2 * self.held(v) for v in step.operands)

    def held(self, value: Value) -> int:
        """Bytes of what views made a value of."""
        while (step := self.reader.producers.get(value)) is not None and step.name in VIEWS:
            value = step.operands[0]
        return value.type.nbytes

    def _chosen(self) -> set[Value]:
        """Products of rows, what feeds them, and what follows from these without being larger."""
        rows = [s for s in self.body.steps if s.results and self.kind(s.results[0]) == "row" and s.results[0] not in self.sources]
        chosen: set[Value] = set()
        for step in reversed(rows):
            if step.name == "stablehlo.dot_general" or step.results[0] in chosen:
                chosen.add(step.results[0])
                chosen.update(v for v in step.operands if v in self.reader.producers and self.kind(v) == "row" and v not in self.sources)
        if not chosen:
            return chosen
        following = set(chosen)
        for step in rows:
            before = [v for v in step.operands if v in following]
            if before and step.result.nbytes <= max(map(self.held, before)):
                following.add(step.results[0])
        for candidates in (following, chosen):
            costly = {s.results[0] for s in rows if s.results[0] in candidates and is_costly(s)}
            made = [s for s in self.steps_to(costly) if self.kind(s.results[0]) == "row" and s.results[0] not in self.sources and is_costly(s)]
            if self.reader.trips * sum(s.result.nbytes for s in made) <= MOST_BYTES:
                return costly
        return set()

    def steps_to(self, values: Iterable[Value]) -> list[Step]:
        """The steps of the body that lead to these values, in order; the rows that it reads are where they begin."""
        found: set[Step] = set()
        waiting = list(values)
        while waiting:
            step = self.reader.producers.get(waiting.pop())
            if step is not None and step not in found:
                found.add(step)
                waiting += () if step.results[0] in self.sources else step.reads()
        return [s for s in self.body.steps if s in found]

    # ---- the two parts ------------------------------------------------------------------------------------------------------------

    def split(self) -> tuple[list[Step], Region]:
        """Steps to run before the loop, and what is left of its body."""
        kept, wanted = self._kept()
        rows, fixed = ([v for v in wanted if v in values] for values in (self.chosen, self.fixed))
        before = self.steps_to(wanted)
        leader = next((self.sources[s.results[0]] for s in before if s.results[0] in self.sources), None)
        outside = _Outside(self, leader and leader[1])
        for step in before:
            outside.add(step)
        inside: list[Step] = []
        reads = {v: outside.same(v) for v in fixed}
        if leader is not None:
            index = self._index(*leader, inside)
            reads.update((v, _row_of(outside.rows[v], index, v.type, inside)) for v in rows)
        body = in_place(Region(self.body.arguments, (*inside, *(s for s in kept if s not in inside)), self.body.results), reads)
        return outside.live({outside.rows.get(v, outside.same(v)) for v in wanted}), body

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

    def _index(self, source: Step, row: Row, steps: list[Step]) -> Value:
        """Where an iteration's row stands among those of all iterations, in their order in the array; `steps` take what computes it."""
        index = source.operands[1 + row.axis]
        steps += self.steps_to([index])
        least, _ = row.range(0, self.reader.trips)
        if least == 0:
            return index
        distance = constant_step(np.asarray(least, index.dtype), index.dtype)
        steps += [distance, Step("stablehlo.subtract", (index, distance.results[0]), (Value(index.type),), text=())]
        return steps[-1].results[0]


class _Outside(Batch):
    """What is computed before the loop: rows in the order of the array that the first of them come from, and values that are the same in all iterations."""

    def __init__(self, hoister: _Hoister, leader: Row | None) -> None:
        self.names: dict[Value, Value] = {}
        super().__init__(hoister.reader.trips, {}, self.same_of)
        self.hoister, self.leader = hoister, leader

    def same_of(self, value: Value) -> Value:
        return self.names.get(value, value)

    def add(self, step: Step) -> None:
        result = step.results[0]
        if result in self.hoister.sources:
            self.rows[result] = self.source(*self.hoister.sources[result])
        elif self.hoister.kind(result) == "row":
            super().add(step)
        else:
            self.steps.append(renamed(step, self.names))

    def source(self, step: Step, row: Row) -> Value:
        """All rows that the iterations read, one after the other."""
        source, axis = step.operands[0], row.axis
        begin, end = row.range(0, self.count)
        starts, limits = [0] * source.type.rank, list(source.shape)
        starts[axis], limits[axis] = begin, end
        taken = self.sliced(source, starts, limits, [1] * source.type.rank)
        if self.leader is not None and row.sign != self.leader.sign:
            taken = self.reversed(taken, (axis,))
        others = [d for d in range(source.type.rank) if d != axis]
        return self.reshaped(self.transposed(taken, (axis, *others)), (self.count, *step.result.shape))

    def live(self, wanted: Iterable[Value]) -> list[Step]:
        """The steps, without those that nobody reads."""
        return live_steps(Region((), tuple(self.steps), tuple(wanted)))


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
