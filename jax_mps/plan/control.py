"""Segments that choose what runs next: loops and branches, driven from the host over blocks of other segments."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps._shim import lib
from jax_mps.errors import Interrupted
from jax_mps.ops.dtypes import MX
from jax_mps.plan.record import Record
from jax_mps.plan.segments import Block, Device, Files, Host, Manifest, Segment, to_device, type_from_json, type_to_json
from jax_mps.plan.tensors import TensorType
from jax_mps.plan.trips import SMALL_ROW, Condition, Counter, Row


def read_scalar(value: Any) -> int:
    """A 0-d integer or bool, waiting for it."""
    return int(read_number(value))


def read_number(value: Any, *, started: bool = False) -> Any:
    """A 0-d value as Python has it, waiting for it."""
    if not isinstance(value, mx.array):
        return np.asarray(value).item()
    if not started:
        runtime.start([value])
    runtime.wait()
    lib.shim_lock()
    try:
        return value.item()
    finally:
        lib.shim_unlock()


def read_numbers(values: Sequence[Any]) -> list[Any]:
    """0-d values that were started, as Python has them, waiting for them."""
    runtime.wait()
    lib.shim_lock()
    try:
        return [v.item() for v in values]
    finally:
        lib.shim_unlock()


# Ops of a loop between evaluations of its carry: enough to hide the wait (each wakes a thread up), few enough to bound the arrays alive: what
# one evaluation works on, and what is put together meanwhile.
_EVALUATE_OPS = 640
# On CUDA, kernels of one evaluation: MLX commits what has more than 100 half way, and then lets no more than ten such commits be under way, for
# which it sleeps. And how many evaluations may be under way there, which nothing else bounds.
_EVALUATE_KERNELS, _UNDER_WAY = 96, 8


class Rest(Record):
    """What runs the rest of a loop after so many iterations on the device: a function on the host, from the whole carry and the captures to the
    last carry. What ends before never gets there, and nothing is compiled for it.
    """

    host: Host
    patience: int

    def run(self, values: list[Any]) -> Sequence[Any]:
        """The last carry, from a carry and captures."""
        from jax_mps.plan.show import announce

        announce(self.host.reasons)
        return self.host.run(values)

    def to_manifest(self) -> Manifest:
        return {"host": self.host.to_manifest(), "patience": self.patience}

    @classmethod
    def from_manifest(cls, manifest: Manifest | None, files: Files) -> Rest | None:
        return None if manifest is None else cls(Host.from_manifest(manifest["host"], files), int(manifest["patience"]))


class Loop(Segment):
    """A `while`: the carry first, then what condition and body capture.

    With a counter, the trip count is computed from the carry and the predicate is never read; `chunk` runs `chunk_length` iterations at
    once. Without, `fused` gives the next carry and predicate together where the body is one device segment, and `chunk` the predicates of so
    many iterations. `rest`, if there is one, takes over when the loop goes on and on.
    """

    carry: int
    cond: Block
    body: Block
    fused: Block | None = None
    chunk: Block | None = None
    chunk_length: int = 0
    counter: Counter | None = None
    bound_capture: int | None = None  # position among the captures
    kind: str = "int32"  # the counter's type
    rest: Rest | None = None

    def run(self, values: list[Any]) -> Sequence[Any]:
        captures = values[self.carry :]
        del values[self.carry :]
        lib.shim_watch_interrupts(1)
        try:
            trips = self.trips(values, captures)
            if trips is not None:
                return self.counted(values, captures, trips)
            return self.tested(values, captures)
        finally:
            lib.shim_watch_interrupts(0)

    def trips(self, carry: list[Any], captures: list[Any]) -> int | None:
        """The trip count, or None if only the predicate can tell."""
        counter = self.counter
        if counter is None:
            return None
        start = read_scalar(carry[counter.position])
        if counter.bound is not None:
            bound = counter.bound
        else:
            bound = read_scalar(carry[counter.bound_carry] if counter.bound_carry is not None else captures[self.bound_capture or 0])
        info = np.iinfo(np.dtype(self.kind))
        trips = counter.trips(start, bound)
        return trips if info.min <= start + trips * counter.step <= info.max else None

    def counted(self, values: list[Any], captures: list[Any], trips: int) -> Sequence[Any]:
        if self.rest is not None and trips > self.rest.patience:
            return self.rest.run(values + captures)
        carry = list(values)
        values.clear()  # nobody else may hold a carry: its memory is the next one's
        seen, pace = lib.shim_interrupts(), Pace()
        while trips:
            block, length = (self.chunk, self.chunk_length) if self.chunk is not None and trips >= self.chunk_length else (self.body, 1)
            carry = block.run(carry + captures)
            trips -= length
            if pace.is_due(ops_of(block)):
                pace.settle(carry, seen)
        return carry

    def tested(self, values: list[Any], captures: list[Any]) -> Sequence[Any]:
        carry = list(values)
        values.clear()
        seen = lib.shim_interrupts()
        going = read_scalar(self.cond.run(carry + captures)[0])
        trips, patience = 0, self.rest.patience if self.rest is not None else None
        while going:
            if self.rest is not None and trips >= self.rest.patience:
                return self.rest.run(carry + captures)
            if self.counter is None and self.chunk is not None and 2 * trips >= self.chunk_length:
                ahead = Ahead(self.chunk, self.chunk_length, self.body, captures, seen)
                carry, trips, going = ahead.run(carry, lambda trip, predicates: predicates[0], trips, patience)
                continue
            if self.fused is not None:
                *carry, predicate = self.fused.run(carry + captures)
            else:
                carry = self.body.run(carry + captures)
                predicate = self.cond.run(carry + captures)[0]
            settle([*carry, predicate], seen)
            trips += 1
            going = read_number(predicate, started=True)
        return carry

    def walk(self) -> Sequence[Segment]:
        blocks = [b for b in (self.cond, self.body, self.fused, self.chunk) if b is not None]
        return [self, *(s for b in blocks for s in b.walk())]

    def bind(self, markers: Mapping[str, str]) -> Loop:
        fused, chunk = (b and b.bind(markers) for b in (self.fused, self.chunk))
        return self.replaced(cond=self.cond.bind(markers), body=self.body.bind(markers), fused=fused, chunk=chunk)

    def to_manifest(self) -> Manifest:
        counter = self.counter and [self.counter.position, self.counter.step, self.counter.direction, self.counter.bound, self.counter.bound_carry]
        blocks = {n: b and b.to_manifest() for n, b in (("cond", self.cond), ("body", self.body), ("fused", self.fused), ("chunk", self.chunk))}
        fields = {"carry": self.carry, "chunk_length": self.chunk_length, "bound_capture": self.bound_capture, "type": self.kind}
        return {"kind": "loop", **blocks, **fields, "counter": counter, "rest": self.rest and self.rest.to_manifest()}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Loop:
        cond, body = (Block.from_manifest(manifest[n], files) for n in ("cond", "body"))
        fused, chunk = (manifest[n] and Block.from_manifest(manifest[n], files) for n in ("fused", "chunk"))
        counter = manifest["counter"] and Counter(*manifest["counter"])
        length, capture = int(manifest["chunk_length"]), manifest["bound_capture"]
        rest = Rest.from_manifest(manifest["rest"], files)
        return cls(int(manifest["carry"]), cond, body, fused, chunk, length, counter, capture, str(manifest["type"]), rest)


class Ahead(Record):
    """Iterations that run before it is known whether the one before them was the last. `chunk` runs `length` of them and returns the carry,
    then what tells of the end, iteration by iteration; on a GPU, the next chunk is started before this is read. Nobody sees what ran beyond the
    end: the body has no effects, and the last iterations are run again, from where their chunk began.
    """

    chunk: Block
    length: int
    body: Block
    captures: list[Any]
    seen: int

    def run(self, carry: list[Any], goes_on: Callable[[int, list[Any]], bool], trips: int, patience: int | None) -> tuple[list[Any], int, bool]:
        """From a carry after so many iterations that goes on to the last one, their number then, and whether the loop goes on still, after
        `patience` of them or more; goes_on(trips, told) is asked after each."""
        early = runtime.device_kind() != "cpu"
        after, told = self.start(carry)
        while True:
            following = self.start(after) if early else None
            numbers = read_numbers(told)
            each = len(numbers) // self.length
            for trip in range(self.length):
                if not goes_on(trips + trip + 1, numbers[trip * each : (trip + 1) * each]):
                    return (after if trip + 1 == self.length else self.again(carry, trip + 1)), trips + trip + 1, False
            trips += self.length
            if patience is not None and trips >= patience:
                return after, trips, True
            carry, (after, told) = after, following or self.start(after)

    def start(self, carry: list[Any]) -> tuple[list[Any], list[Any]]:
        results = self.chunk.run(carry + self.captures)
        settle(results, self.seen)
        return results[: len(carry)], results[len(carry) :]

    def again(self, carry: list[Any], trips: int) -> list[Any]:
        for _ in range(trips):
            carry = self.body.run(carry + self.captures)
        settle(carry, self.seen)
        return carry


class Until(Segment):
    """A `while` whose condition the host answers from a few scalars. It reads the carries that the body keeps, those that only count
    (`counters`: position, step), which the body never sees, and captures; it writes all carries. `chunk`, if there is one, runs `chunk_length`
    iterations, and returns what the condition reads after each, too. `rest` as in Loop.
    """

    kept: tuple[int, ...]
    counters: tuple[tuple[int, int], ...]
    kinds: tuple[str, ...]  # of all carries
    condition: Condition
    body: Block
    chunk: Block | None
    chunk_length: int
    rest: Rest | None

    def run(self, values: list[Any]) -> Sequence[Any]:
        kept, counted = len(self.kept), len(self.kept) + len(self.counters)
        carry, counts, captures = values[:kept], values[kept:counted], values[counted:]
        values.clear()  # nobody else may hold a carry: its memory is the next one's
        places = [(p, self.kept.index(p)) for p in self.condition.carries() if p in self.kept]
        counting = [(p, step, read_scalar(counts[i])) for i, (p, step) in enumerate(self.counters) if p in self.condition.carries()]
        outside = {i: read_number(captures[i]) for i in self.condition.captures()}
        seen = lib.shim_interrupts()
        lib.shim_watch_interrupts(1)
        trips, patience = 0, self.rest.patience if self.rest is not None else None

        def goes_on(trips: int, numbers: Sequence[Any]) -> bool:
            known = {p: number for (p, _), number in zip(places, numbers, strict=True)}
            known |= {p: _wrapped(start + trips * step, self.kinds[p]) for p, step, start in counting}
            return self.condition.holds(known, outside)

        try:
            going = goes_on(trips, [read_number(carry[i]) for _, i in places])
            while going and (patience is None or trips < patience):
                if self.chunk is not None and 2 * trips >= self.chunk_length:
                    ahead = Ahead(self.chunk, self.chunk_length, self.body, captures, seen)
                    carry, trips, going = ahead.run(carry, goes_on, trips, patience)
                    continue
                carry = self.body.run(carry + captures)
                settle(carry, seen)
                trips += 1
                going = goes_on(trips, [read_number(carry[i], started=True) for _, i in places])
        finally:
            lib.shim_watch_interrupts(0)
        results = dict(zip(self.kept, carry, strict=True))
        with runtime.locked():
            for value, (position, step) in zip(counts, self.counters, strict=True):
                kind = self.kinds[position]
                results[position] = to_device(value, kind) + mx.array(_wrapped(trips * step, kind), MX[kind])
        everything = [results[i] for i in range(len(results))]
        return self.rest.run(everything + captures) if going and self.rest is not None else everything

    def walk(self) -> Sequence[Segment]:
        return [self, *(s for b in (self.body, self.chunk) if b is not None for s in b.walk())]

    def bind(self, markers: Mapping[str, str]) -> Until:
        return self.replaced(body=self.body.bind(markers), chunk=self.chunk and self.chunk.bind(markers))

    def to_manifest(self) -> Manifest:
        fields = {"kept": list(self.kept), "counters": [list(c) for c in self.counters], "types": list(self.kinds)}
        blocks = {n: b and b.to_manifest() for n, b in (("body", self.body), ("chunk", self.chunk))}
        fields |= {"condition": [list(t) for t in self.condition.terms], "chunk_length": self.chunk_length}
        return {"kind": "until", **blocks, **fields, "rest": self.rest and self.rest.to_manifest()}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Until:
        counters = tuple((int(p), int(s)) for p, s in manifest["counters"])
        condition = Condition(tuple(tuple(t) for t in manifest["condition"]))
        kept = tuple(int(i) for i in manifest["kept"])
        kinds, length = tuple(map(str, manifest["types"])), int(manifest["chunk_length"])
        chunk = manifest["chunk"] and Block.from_manifest(manifest["chunk"], files)
        body, rest = Block.from_manifest(manifest["body"], files), Rest.from_manifest(manifest["rest"], files)
        return cls(kept, counters, kinds, condition, body, chunk, length, rest)


def _wrapped(value: int, kind: str) -> int:
    """An integer as its type holds it."""
    info = np.iinfo(np.dtype(kind))
    return (value - int(info.min)) % (int(info.max) - int(info.min) + 1) + int(info.min)


# So many pieces of small rows wait to be written together.
_MAX_WAITING = 512
# Slices of a source that are made at once.
_WINDOW = 64


class _Stack:
    """A carry that each iteration writes one row of, which the body returned instead."""

    __slots__ = ("kind", "row", "rows", "small", "taken", "target", "trip")

    def __init__(self, target: Any, row: Row, kind: TensorType) -> None:
        self.target, self.row, self.kind = target, row, kind
        self.small = kind.nbytes // kind.shape[row.axis] < SMALL_ROW
        self.rows: list[Any] = []
        self.trip = 0  # of the first row that waits
        self.taken = False  # whether the target is ours alone

    def add(self, rows: Sequence[Any]) -> None:
        self.rows += rows
        if not self.small or len(self.rows) >= _MAX_WAITING:
            self.write(together=self.small)

    def write(self, together: bool = True) -> None:
        """Put the rows that wait into the array: in place, once only we hold it."""
        if not self.rows:
            return
        with runtime.locked():
            rows = [to_device(r, self.kind.dtype) for r in self.rows]
            self.rows = []
            for piece in [self._joined(rows)] if together else rows:
                self._write(piece)

    def _joined(self, rows: list[mx.array]) -> mx.array:
        return mx.concatenate(rows if self.row.sign > 0 else rows[::-1], axis=self.row.axis) if len(rows) > 1 else rows[0]

    def _write(self, piece: mx.array) -> None:
        axis, count = self.row.axis, piece.shape[self.row.axis]
        begin, end = self.row.range(self.trip, count)
        self.trip += count
        if count == self.kind.shape[axis]:
            self.target = piece
            return
        if not self.taken:
            self.target, self.taken = to_device(self.target, self.kind.dtype)[...], True  # an array object of our own: it is written below
        self.target[(slice(None),) * axis + (slice(begin, end),)] = piece


class Scan(Segment):
    """A loop whose counter is known (plan/scans.py). It reads the carries that its body keeps, those that it stacks rows in, the arrays that it
    takes rows of, and captures; it writes all carries of the `while`.
    """

    kept: tuple[int, ...]
    stacked: tuple[int, ...]
    types: tuple[TensorType, ...]  # of what it reads, captures left out
    counter: int
    kind: str  # the counter's type
    start: int
    step: int
    trips: int
    uses_counter: bool
    sources: tuple[Row, ...]
    stacks: tuple[Row, ...]
    body: Block | None
    chunk: Block | None
    chunk_length: int
    ahead: int = 0  # ops of its body that are computed before it, for all iterations at once (plan/hoisting.py)
    behind: int = 0  # carries that wait until after it (plan/sinking.py)

    def run(self, values: list[Any]) -> Sequence[Any]:
        kept, sources = len(self.kept), len(self.kept) + len(self.stacks)
        carry, captures = values[:kept], values[sources + len(self.sources) :]
        stacks = [_Stack(v, row, kind) for v, row, kind in zip(values[kept:sources], self.stacks, self.types[kept:sources], strict=True)]
        read = values[sources : sources + len(self.sources)]
        values.clear()  # nobody else may hold a carry: its memory is the next one's
        lib.shim_watch_interrupts(1)
        try:
            done = 0
            if self.chunk is not None:
                done = self.trips - self.trips % self.chunk_length
                carry = self._drive(self.chunk, self.chunk_length, range(0, done, self.chunk_length), carry, stacks, read, captures)
            if self.body is not None:
                carry = self._drive(self.body, 1, range(done, self.trips), carry, stacks, read, captures)
        finally:
            lib.shim_watch_interrupts(0)
        for stack in stacks:
            stack.write()
        results = dict(zip(self.kept, carry, strict=True)) | dict(zip(self.stacked, (s.target for s in stacks), strict=True))
        results[self.counter] = mx.array(self.start + self.trips * self.step, MX[self.kind])
        return [results[i] for i in range(len(results))]

    def _drive(self, block: Block, length: int, trips: range, carry: list[Any], stacks: list[_Stack], read: list[Any], captures: list[Any]) -> list[Any]:
        """Run a block of `length` iterations for each of `trips`, from `carry` to the next."""
        seen = lib.shim_interrupts()
        kept, pace = len(carry), Pace()
        rows: list[list[mx.array]] = [[] for _ in read]
        for number, trip in enumerate(trips):
            if number % _WINDOW == 0 and read:
                rows = self._rows(read, trip, length, min(_WINDOW, len(trips) - number))
            counter = mx.array(self.start + trip * self.step, MX[self.kind]) if self.uses_counter else None
            inputs = [*carry, *(r.pop() for r in rows), counter, *captures]
            carry = []  # the inputs have one owner, who drops them
            results = block.run(inputs)
            carry = results[:kept]
            at = kept
            for stack in stacks:
                count = 1 if stack.small else length
                stack.add(results[at : at + count])
                at += count
            del results
            if pace.is_due(ops_of(block)):
                pace.settle([*carry, *(v for s in stacks for v in ([s.target, *s.rows] if s.taken else s.rows))], seen)
        return carry

    def _rows(self, read: list[Any], trip: int, length: int, count: int) -> list[list[mx.array]]:
        """Rows for the next `count` runs of `length` iterations, the last first."""
        found = []
        with runtime.locked():
            for value, row, kind in zip(read, self.sources, self.types[len(self.types) - len(read) :], strict=True):
                begin, end = row.range(trip, length * count)
                window = to_device(value, kind.dtype)[(slice(None),) * row.axis + (slice(begin, end),)]
                pieces = mx.split(window, count, axis=row.axis) if count > 1 else [window]
                found.append(list(reversed(pieces)) if row.sign > 0 else list(pieces))
        return found

    def walk(self) -> Sequence[Segment]:
        return [self, *(s for b in (self.body, self.chunk) if b is not None for s in b.walk())]

    def bind(self, markers: Mapping[str, str]) -> Scan:
        body, chunk = (b and b.bind(markers) for b in (self.body, self.chunk))
        return self.replaced(body=body, chunk=chunk)

    def to_manifest(self) -> Manifest:
        blocks = {n: b and b.to_manifest() for n, b in (("body", self.body), ("chunk", self.chunk))}
        rows = {n: [[r.axis, r.first, r.sign] for r in found] for n, found in (("sources", self.sources), ("stacks", self.stacks))}
        numbers = {n: getattr(self, n) for n in ("counter", "start", "step", "trips", "uses_counter", "chunk_length", "ahead", "behind")}
        carries = {"kept": list(self.kept), "stacked": list(self.stacked), "types": [type_to_json(t) for t in self.types], "type": self.kind}
        return {"kind": "scan", **blocks, **rows, **numbers, **carries}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Scan:
        body, chunk = (manifest[n] and Block.from_manifest(manifest[n], files) for n in ("body", "chunk"))
        sources, stacks = (tuple(Row(*map(int, r)) for r in manifest[n]) for n in ("sources", "stacks"))
        counter, start, step, trips = (int(manifest[n]) for n in ("counter", "start", "step", "trips"))
        length, ahead, behind = (int(manifest[n]) for n in ("chunk_length", "ahead", "behind"))
        kept, stacked = (tuple(int(i) for i in manifest[n]) for n in ("kept", "stacked"))
        types = tuple(type_from_json(t) for t in manifest["types"])
        uses = bool(manifest["uses_counter"])
        kind = str(manifest["type"])
        return cls(kept, stacked, types, counter, kind, start, step, trips, uses, sources, stacks, body, chunk, length, ahead, behind)


def settle(values: Sequence[Any], interrupts: int) -> None:
    """Start evaluating a whole carry (never just its predicate: the rest would grow for the whole loop), and notice Ctrl-C."""
    if lib.shim_interrupts() != interrupts or lib.shim_stopping():
        raise Interrupted("a loop was interrupted")
    arrays = [v for v in values if isinstance(v, mx.array)]
    if arrays:
        runtime.start(arrays)


class Pace:
    """When the carry of a counted loop is evaluated, and how far ahead of the device the loop may be."""

    __slots__ = ("on_cuda", "pending", "under_way")

    def __init__(self) -> None:
        self.on_cuda = runtime.device_kind() == "cuda"
        self.pending = 0
        self.under_way: deque[mx.array] = deque()

    def is_due(self, ops: int) -> bool:
        """After so many ops more, and before as many again."""
        self.pending += ops
        due = self.pending + ops > _EVALUATE_KERNELS if self.on_cuda else self.pending >= _EVALUATE_OPS
        if due:
            self.pending = 0
        return due

    def settle(self, values: Sequence[Any], interrupts: int) -> None:
        if not self.on_cuda:
            settle(values, interrupts)
            return
        self.under_way.append(runtime.sentinel())
        settle([*values, self.under_way[-1]], interrupts)
        if len(self.under_way) > _UNDER_WAY:
            mx.eval(self.under_way.popleft())


def ops_of(block: Block) -> int:
    """How many arrays a run of the block makes, about; loops inside settle their own."""
    return 1 + sum(n.segment.width for n in block.nodes if isinstance(n.segment, Device))


class Branch(Segment):
    """A `case` or `if`: reads the index (or predicate: true is arm 0) and runs one arm. Out of range means the last arm."""

    arms: tuple[Block, ...]
    predicate: bool

    def run(self, values: list[Any]) -> Sequence[Any]:
        index = read_scalar(values[0])
        captures = values[1:]
        values.clear()
        if self.predicate:
            index = 0 if index else 1
        arm = self.arms[index if 0 <= index < len(self.arms) else -1]
        return arm.run(captures)

    def walk(self) -> Sequence[Segment]:
        return [self, *(s for arm in self.arms for s in arm.walk())]

    def bind(self, markers: Mapping[str, str]) -> Branch:
        return Branch(tuple(a.bind(markers) for a in self.arms), self.predicate)

    def to_manifest(self) -> Manifest:
        return {"kind": "branch", "arms": [a.to_manifest() for a in self.arms], "predicate": self.predicate}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Branch:
        return cls(tuple(Block.from_manifest(a, files) for a in manifest["arms"]), bool(manifest["predicate"]))
