"""What each value of a counted loop's body depends on, and how those that no carry leads to are computed before the loop, for all iterations."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jax_mps.plan.batching import VIEWS, Batch, can_batch, is_pure
from jax_mps.plan.loops import constant_step, renamed
from jax_mps.plan.partition import live_steps
from jax_mps.plan.scans import Reader
from jax_mps.plan.trips import Row
from jax_mps.plan.types import Region, Step, Value

# Bytes of all that is computed for all iterations of a loop, or kept of all; where it would be more, each iteration does its own.
MOST_BYTES = 128 << 20


def is_costly(step: Step) -> bool:
    """Whether the step computes anything."""
    return step.name not in VIEWS and step.name not in ("stablehlo.constant", "stablehlo.iota")


class Dependence:
    """One loop. A value of its body is "constant", "fixed" (the same in each iteration), a "row" (of what all iterations could compute at once) or
    none of these. `sources`: the rows of captured arrays that the body reads at its counter.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self.body = reader, reader.body
        self.kinds: dict[Value, str | None] = dict.fromkeys(self.body.arguments)
        self.sources: dict[Value, tuple[Step, Row]] = {}
        for step in self.body.steps:
            kind = self._kind(step)
            self.kinds.update(dict.fromkeys(step.results, kind))

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
        """Of a value that the body makes or captures."""
        if value in self.kinds:
            return self.kinds[value]
        return "constant" if value in self.reader.constants else "fixed"

    def viewed(self, value: Value) -> Value:
        """What views made a value of."""
        while (step := self.reader.producers.get(value)) is not None and step.name in VIEWS:
            value = step.operands[0]
        return value

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

    def leader(self, steps: Iterable[Step]) -> tuple[Step, Row] | None:
        """The first of the body's rows that some steps begin with: all that is computed for all iterations is in the order of its array."""
        return next((self.sources[s.results[0]] for s in steps if s.results[0] in self.sources), None)

    def index(self, source: Step, row: Row, steps: list[Step]) -> Value:
        """Where an iteration's row stands among those of all iterations, in their order in the array; `steps` take what computes it."""
        index = source.operands[1 + row.axis]
        steps += self.steps_to([index])
        least, _ = row.range(0, self.reader.trips)
        if least == 0:
            return index
        distance = constant_step(np.asarray(least, index.dtype), index.dtype)
        steps += [distance, Step("stablehlo.subtract", (index, distance.results[0]), (Value(index.type),), text=())]
        return steps[-1].results[0]


class Outside(Batch):
    """What is computed before a loop: rows in the order of the array that `leader` takes its own from, and values that are the same in all iterations."""

    def __init__(self, on: Dependence, leader: Row | None) -> None:
        self.names: dict[Value, Value] = {}
        super().__init__(on.reader.trips, {}, self.same_of)
        self.on, self.leader = on, leader

    def same_of(self, value: Value) -> Value:
        return self.names.get(value, value)

    def add(self, step: Step) -> None:
        result = step.results[0]
        if result in self.on.sources:
            self.rows[result] = self._source(*self.on.sources[result])
        elif self.on.kind(result) == "row":
            super().add(step)
        else:
            self.steps.append(renamed(step, self.names))

    def _source(self, step: Step, row: Row) -> Value:
        """All rows that the iterations read, one after the other."""
        source, axis = step.operands[0], row.axis
        starts, limits = [0] * source.type.rank, list(source.shape)
        starts[axis], limits[axis] = row.range(0, self.count)
        taken = self.sliced(source, starts, limits, [1] * source.type.rank)
        if self.leader is not None and row.sign != self.leader.sign:
            taken = self.reversed(taken, (axis,))
        others = [d for d in range(source.type.rank) if d != axis]
        return self.reshaped(self.transposed(taken, (axis, *others)), (self.count, *step.result.shape))

    def live(self, wanted: Iterable[Value]) -> list[Step]:
        """The steps, without those that nobody reads."""
        return live_steps(Region((), tuple(self.steps), tuple(wanted)))
