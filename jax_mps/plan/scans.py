"""Counted loops whose trip count and counter are known when they are translated, as `lax.scan` makes them.

Rows of a captured array that an iteration reads at its counter, and rows of a carried array that it writes there and nobody reads, leave
the body: whoever drives the loop takes the former as slices and puts the latter together. The counter itself leaves the carry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jax_mps.plan.loops import Constants, constant_step, find_counter, in_range, increment, inline, invariants, size
from jax_mps.plan.trips import SMALL_ROW, Row
from jax_mps.plan.types import DEVICE_DTYPES, Region, Step, TensorType, Value, numpy_dtype

# Rows that a chunk of iterations returns one by one: each is an output, and Metal's kernels bind 31 buffers.
MAX_ROWS = 16


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """A loop in that form. `body` takes the carries that are left, one row of each of `sources`, and the counter; it returns the carries and one
    row for each of `stacks` (carry positions).
    """

    body: Region
    kept: tuple[int, ...]
    sources: tuple[tuple[Value, Row], ...]
    stacks: tuple[tuple[int, Row], ...]
    counter: int
    start: int
    step: int
    trips: int

    @property
    def uses_counter(self) -> bool:
        """Whether the body reads it."""
        return self.body.arguments[-1] in _read(self.body)

    def chunk_length(self, budget: int, *, joined: bool = False) -> int:
        """How many iterations one function of so many steps runs: a divisor of the trip count where that is not much less than what fits. joined: the
        small rows, which such a function puts together, do not count."""
        rows = [v for v in self.body.results[len(self.kept) :] if not joined or v.type.nbytes >= SMALL_ROW]
        most = min(budget // max(1, size(self.body)), MAX_ROWS // max(1, len(rows)), self.trips)
        divisor = next((n for n in range(max(1, most), 0, -1) if self.trips % n == 0), 1)
        return divisor if 2 * divisor > most else max(1, most)

    def repeated(self, times: int) -> Region:
        """A region that runs the body `times` times: carries, `times` rows of each source in one array, the counter before the first of them;
        carries, then the rows of the first stack, of the second, ...: small ones in one array."""
        count = len(self.kept)
        carry: Sequence[Value] = [Value(v.type) for v in self.body.arguments[:count]]
        sources = [Value(_long(v.type, row.axis, times)) for v, (_, row) in zip(self.body.arguments[count:-1], self.sources, strict=True)]
        counter = Value(self.body.arguments[-1].type)
        arguments = (*carry, *sources, counter)
        steps: list[Step] = []
        rows: list[list[Value]] = [[] for _ in self.stacks]
        for trip in range(times):
            taken = [_slice(v, row.axis, trip if row.sign > 0 else times - 1 - trip, steps) for v, (_, row) in zip(sources, self.sources, strict=True)]
            results = inline(self.body, [*carry, *taken, self._advanced(counter, trip, steps)], steps)
            carry = results[:count]
            for stack, row in zip(rows, results[count:], strict=True):
                stack.append(row)
        stacked = [v for found, (_, row) in zip(rows, self.stacks, strict=True) for v in _together(found, row, steps)]
        return Region(arguments, tuple(steps), (*carry, *stacked))

    def _advanced(self, counter: Value, trips: int, steps: list[Step]) -> Value:
        if trips == 0 or not self.uses_counter:
            return counter
        distance = constant_step(np.asarray(trips * self.step, counter.dtype), counter.dtype)
        add = Step("stablehlo.add", (counter, distance.results[0]), (Value(counter.type),), text=())
        steps += [distance, add]
        return add.results[0]


def _long(kind: TensorType, axis: int, count: int) -> TensorType:
    return TensorType((*kind.shape[:axis], count, *kind.shape[axis + 1 :]), kind.dtype)


def _together(rows: list[Value], row: Row, steps: list[Step]) -> list[Value]:
    """Rows as one array, in the order of the array that they are for; as they are, if they are large."""
    kind = rows[0].type
    if len(rows) == 1 or kind.nbytes >= SMALL_ROW:
        return rows
    ordered = tuple(rows if row.sign > 0 else rows[::-1])
    text = (("dimension", f"{row.axis} : i64"),)
    steps.append(Step("stablehlo.concatenate", ordered, (Value(_long(kind, row.axis, len(rows))),), {"dimension": row.axis}, text=text))
    return [steps[-1].results[0]]


def _slice(value: Value, axis: int, index: int, steps: list[Step]) -> Value:
    """One row of a value."""
    if value.shape[axis] == 1:
        return value
    starts = tuple(index if i == axis else 0 for i in range(value.type.rank))
    limits = tuple(index + 1 if i == axis else d for i, d in enumerate(value.shape))
    named = {"start_indices": starts, "limit_indices": limits, "strides": (1,) * value.type.rank}
    text = tuple((name, f"array<i64: {', '.join(map(str, numbers))}>") for name, numbers in named.items())
    steps.append(Step("stablehlo.slice", (value,), (Value(_long(value.type, axis, 1)),), named, text=text))
    return steps[-1].results[0]


def find_scan(loop: Step, constants: Constants, live: Callable[[Region], list[Step]]) -> Scan | None:
    """The loop as a Scan; None where its counter is not known now, or may wrap around. `live` gives a region's steps without the dead ones."""
    reader = read_counter(loop, constants, live)
    if reader is None:
        return None
    scan = reader.scan()
    return replace(scan, body=replace(scan.body, steps=tuple(live(scan.body))))


def read_counter(loop: Step, constants: Constants, live: Callable[[Region], list[Step]]) -> Reader | None:
    """What reads the body of a loop that runs once or more, and whose counter is known; None of any other."""
    cond, body = loop.regions
    counter = find_counter(cond, body, constants)
    if counter is None or counter.position in invariants(body):
        return None
    start, bound = constants.get(loop.operands[counter.position]), counter.bound
    if counter.bound_carry is not None:
        known = constants.get(loop.operands[counter.bound_carry])
        bound = None if known is None else int(known)
    elif counter.bound_capture is not None:
        known = constants.get(counter.bound_capture)
        bound = None if known is None else int(known)
    if start is None or bound is None or not in_range(counter, int(start), bound, loop.operands[counter.position].type):
        return None
    trips = counter.trips(int(start), bound)
    body = replace(body, steps=tuple(live(body)))
    return Reader(body, counter.position, int(start), counter.step, trips, constants) if trips >= 1 else None


class Reader:
    """Reads one body."""

    def __init__(self, body: Region, counter: int, start: int, step: int, trips: int, constants: Constants) -> None:
        self.body, self.counter, self.start, self.step, self.trips = body, counter, start, step, trips
        self.constants = {**constants, **{s.results[0]: s.value for s in body.steps if s.name == "stablehlo.constant"}}
        self.producers = {v: s for s in body.steps for v in s.results}
        self.inside = {*body.arguments, *self.producers}
        self.readers = _readers(body)

    def scan(self) -> Scan:
        """What leaves the body, and what is left."""
        sources = {s: row for s in self.body.steps if (row := self.source(s)) is not None}
        stacks = {i: found for i in range(len(self.body.arguments)) if i != self.counter and (found := self.stack(i)) is not None}
        kept = tuple(i for i in range(len(self.body.arguments)) if i != self.counter and i not in stacks)
        rows = {s: Value(s.results[0].type) for s in sources}
        renamed = {s.results[0]: rows[s] for s in sources}
        gone = {*sources, *(update for update, _ in stacks.values())}
        counter = self.body.arguments[self.counter]
        results = [self.body.results[i] for i in kept] + [update.operands[1] for update, _ in stacks.values()]
        arguments = (*(self.body.arguments[i] for i in kept), *rows.values(), counter)
        lean = in_place(Region(arguments, tuple(s for s in self.body.steps if s not in gone), tuple(results)), renamed)
        return Scan(
            lean,
            kept,
            tuple((s.operands[0], row) for s, row in sources.items()),
            tuple((i, row) for i, (_, row) in stacks.items()),
            self.counter,
            self.start,
            self.step,
            self.trips,
        )

    def source(self, step: Step) -> Row | None:
        """A row of a captured array."""
        source = step.operands[0] if step.name == "stablehlo.dynamic_slice" else None
        if source is None or source in self.inside or source in self.constants or source.dtype not in DEVICE_DTYPES:
            return None
        return self.row(step.operand.shape, tuple(step.slice_sizes), step.operands[1:])

    def stack(self, position: int) -> tuple[Step, Row] | None:
        """The step that writes a row of a carry which nothing else reads."""
        update = self.producers.get(self.body.results[position])
        argument = self.body.arguments[position]
        if update is None or update.name != "stablehlo.dynamic_update_slice" or update.operands[0] is not argument:
            return None
        if self.readers.get(argument) != 1 or self.readers.get(update.results[0]) != 1 or argument.dtype not in DEVICE_DTYPES:
            return None
        row = self.row(argument.shape, update.operands[1].shape, update.operands[2:])
        return None if row is None else (update, row)

    def row(self, shape: tuple[int, ...], sizes: tuple[int, ...], starts: Sequence[Value]) -> Row | None:
        """The one axis of which a single index is taken, all others whole; the index must follow the counter within the array."""
        partial = [axis for axis, (dim, taken) in enumerate(zip(shape, sizes, strict=True)) if taken != dim]
        if len(partial) != 1 or sizes[partial[0]] != 1:
            return None
        (axis,) = partial
        line = self.line(starts[axis])
        if line is None or abs(line[0]) != 1:
            return None
        slope, first = line
        last = first + slope * (self.trips - 1)
        return Row(axis, first, slope) if min(first, last) >= 0 and max(first, last) < shape[axis] else None

    def line(self, value: Value) -> tuple[int, int] | None:
        """(a, b) where an integer scalar is a * trip + b, without wrapping around; None where it may be anything else."""
        if value is self.body.arguments[self.counter]:
            return self.step, self.start
        known = self.constants.get(value)
        if known is not None:
            return (0, int(known)) if known.size == 1 and known.dtype.kind in "iu" else None
        step = self.producers.get(value)
        if step is None or not value.type.is_integer or value.type.rank:
            return None
        line = self.computed(step)
        if line is None:
            return None
        info = np.iinfo(numpy_dtype(value.dtype))
        return line if all(info.min <= line[0] * t + line[1] <= info.max for t in (0, self.trips - 1)) else None

    def computed(self, step: Step) -> tuple[int, int] | None:
        if step.name == "stablehlo.select":
            chosen = self.decided(self.producers.get(step.operands[0]))
            return None if chosen is None else self.line(step.operands[1 if chosen else 2])
        if step.name not in ("stablehlo.add", "stablehlo.subtract", "stablehlo.convert", "stablehlo.negate"):
            return None
        lines = [self.line(v) for v in step.operands]
        if any(line is None for line in lines):
            return None
        (a, b), *rest = (line for line in lines if line is not None)
        match step.name:
            case "stablehlo.add":
                return a + rest[0][0], b + rest[0][1]
            case "stablehlo.subtract":
                return a - rest[0][0], b - rest[0][1]
            case "stablehlo.negate":
                return -a, -b
            case _:
                return a, b

    def decided(self, compare: Step | None) -> bool | None:
        """Whether `index < 0`, as JAX asks before it wraps an index, where that is so in every iteration or in none."""
        if compare is None or compare.name != "stablehlo.compare" or compare.comparison_direction != "LT":
            return None
        lhs, rhs = (self.line(v) for v in compare.operands)
        if lhs is None or rhs is None:
            return None
        answers = {lhs[0] * t + lhs[1] < rhs[0] * t + rhs[1] for t in (0, self.trips - 1)}
        return answers.pop() if len(answers) == 1 else None  # both are straight lines: their order changes once at most


def in_place(region: Region, names: Mapping[Value, Value]) -> Region:
    """The region with other values in place of some."""
    steps = tuple(replace(s, operands=tuple(names.get(v, v) for v in s.operands), regions=tuple(in_place(r, names) for r in s.regions)) for s in region.steps)
    return Region(region.arguments, steps, tuple(names.get(v, v) for v in region.results))


def counters(body: Region, constants: Constants) -> dict[int, int]:
    """Carries that only count, and by how much: no other step reads them."""
    readers = _readers(body)
    known = {**constants, **{s.results[0]: s.value for s in body.steps if s.name == "stablehlo.constant"}}
    found = {}
    for i, (argument, result) in enumerate(zip(body.arguments, body.results, strict=True)):
        if not argument.type.rank and argument.type.is_integer and readers.get(argument) == 1 and readers.get(result) == 1:
            step = increment(body, i, known)
            if step is not None:
                found[i] = step
    return found


def _readers(region: Region) -> dict[Value, int]:
    """How often each value is read, by nested regions and the region's results, too."""
    found: dict[Value, int] = {}
    for value in (*(v for s in region.steps for v in (*s.operands, *(v for r in s.regions for v in r.captures()))), *region.results):
        found[value] = found.get(value, 0) + 1
    return found


def _read(region: Region) -> set[Value]:
    return set(_readers(region))
