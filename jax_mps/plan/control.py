"""Segments that choose what runs next: loops and branches, driven from the host over blocks of other segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps._shim import lib
from jax_mps.errors import Interrupted
from jax_mps.plan.loops import Counter
from jax_mps.plan.segments import Block, Device, Files, Manifest, Segment


def read_scalar(value: Any) -> int:
    """A 0-d integer or bool, waiting for it."""
    if isinstance(value, mx.array):
        runtime.start([value])
        runtime.wait()
        lib.shim_lock()
        try:
            return int(value.item())  # type: ignore[arg-type]  # an integer or a bool: the caller knows
        finally:
            lib.shim_unlock()
    return int(np.asarray(value).item())


# Iterations of a loop between evaluations of its carry: enough to hide the wait, few enough to bound the graph.
_EVALUATE_OPS = 192


@dataclass(slots=True, eq=False, repr=False)
class Loop(Segment):
    """A `while`: the carry first, then what condition and body capture.

    With a counter, the trip count is computed from the carry and the predicate is never read; `chunk` runs `chunk_length` iterations at
    once. Without, `fused` gives the next carry and predicate together where the body is one device segment.
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

    def counted(self, values: list[Any], captures: list[Any], trips: int) -> list[Any]:
        carry = list(values)
        values.clear()  # nobody else may hold a carry: its memory is the next one's
        seen = lib.shim_interrupts()
        if self.chunk is not None:
            while trips >= self.chunk_length:
                carry = self.chunk.run(carry + captures)
                trips -= self.chunk_length
                settle(carry, seen)
        every = max(1, _EVALUATE_OPS // max(1, ops_of(self.body)))
        for trip in range(trips):
            carry = self.body.run(carry + captures)
            if trip % every == every - 1:
                settle(carry, seen)
        return carry

    def tested(self, values: list[Any], captures: list[Any]) -> list[Any]:
        carry = list(values)
        values.clear()
        seen = lib.shim_interrupts()
        going = read_scalar(self.cond.run(carry + captures)[0])
        while going:
            if self.fused is not None:
                *carry, predicate = self.fused.run(carry + captures)
            else:
                carry = self.body.run(carry + captures)
                predicate = self.cond.run(carry + captures)[0]
            settle([*carry, predicate], seen)
            going = read_scalar(predicate)
        return carry

    def walk(self) -> Sequence[Segment]:
        blocks = [b for b in (self.cond, self.body, self.fused, self.chunk) if b is not None]
        return [self, *(s for b in blocks for s in b.walk())]

    def bind(self, markers: Mapping[str, str]) -> Loop:
        fused, chunk = (b and b.bind(markers) for b in (self.fused, self.chunk))
        return replace(self, cond=self.cond.bind(markers), body=self.body.bind(markers), fused=fused, chunk=chunk)

    def to_manifest(self) -> Manifest:
        counter = self.counter and [self.counter.position, self.counter.step, self.counter.direction, self.counter.bound, self.counter.bound_carry]
        blocks = {n: b and b.to_manifest() for n, b in (("cond", self.cond), ("body", self.body), ("fused", self.fused), ("chunk", self.chunk))}
        fields = {"carry": self.carry, "chunk_length": self.chunk_length, "bound_capture": self.bound_capture, "type": self.kind}
        return {"kind": "loop", **blocks, **fields, "counter": counter}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Loop:
        cond, body = (Block.from_manifest(manifest[n], files) for n in ("cond", "body"))
        fused, chunk = (manifest[n] and Block.from_manifest(manifest[n], files) for n in ("fused", "chunk"))
        counter = manifest["counter"] and Counter(*manifest["counter"])
        length, capture = int(manifest["chunk_length"]), manifest["bound_capture"]
        return cls(int(manifest["carry"]), cond, body, fused, chunk, length, counter, capture, str(manifest["type"]))


def settle(values: Sequence[Any], interrupts: int) -> None:
    """Start evaluating a whole carry (never just its predicate: the rest would grow for the whole loop), and notice Ctrl-C."""
    if lib.shim_interrupts() != interrupts or lib.shim_stopping():
        raise Interrupted("a loop was interrupted")
    arrays = [v for v in values if isinstance(v, mx.array)]
    if arrays:
        runtime.start(arrays)


def ops_of(block: Block) -> int:
    """Device ops in a block, nested segments included."""
    return sum(s.ops for s in block.walk() if isinstance(s, Device))


@dataclass(slots=True, eq=False, repr=False)
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
