"""Sums over the leading dimensions of a product, a square, or a square around a mean, as batch norm and its gradients take them, in one step; on CUDA.

There one kernel of our own reads what the product is made of and sums it up (ops/columns.py), where MLX keeps the product in memory first. A second
sum, of one of the two arrays alone, comes with it. Only arrays that are in memory anyway are read so: what a kernel of the elementwise steps before
could have multiplied on its way costs nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jax_mps.ops import columns
from jax_mps.ops.bodies import folds
from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, Value
from jax_mps.rewrites.match import fuse, origin, splat
from jax_mps.rewrites.table import Scope

ROOTS = frozenset(["stablehlo.reduce"])

_HALF = ("float16", "bfloat16")
_FUSED = frozenset(["jax_mps.channel_norm_gradient", "stablehlo.optimization_barrier"])  # parts of kernels, or no step at all
_SPREAD = frozenset(["stablehlo.broadcast_in_dim", "stablehlo.iota", "stablehlo.constant", "stablehlo.transpose", "stablehlo.slice", "stablehlo.reverse"])


@dataclass(frozen=True, slots=True)
class _Sum:
    """A sum over leading dimensions. kind: as in `columns.source`; arrays: what it reads; factors: rows that it is times or over, with the op's name."""

    step: Step
    kind: str
    arrays: tuple[Value, ...]
    factors: tuple[tuple[str, Value], ...] = ()


def column_sums(steps: Sequence[Step], scope: Scope) -> list[Step]:
    if device_kind() != "cuda":
        return []
    memory = _Memory(steps, scope)
    sums = [found for step in steps if step.name in ROOTS and (found := _sum(step, scope, memory)) is not None]
    plain = {(s.arrays[0], tuple(s.step.dimensions)): s for s in sums if s.kind == "x"}
    place = {value: i for i, step in enumerate(steps) for value in step.results}
    groups: list[Step] = []
    for product in sums:
        if product.kind == "x":
            continue
        dims = tuple(product.step.dimensions)
        beside = next(((v, plain[v, dims]) for v in _either(product) if (v, dims) in plain), None)
        group = _group(product, beside, scope, place) or _group(product, None, scope, place)
        if group is not None:
            groups.append(group)
            if beside is not None and len(group.results) == 2:
                del plain[beside[0], dims]
    groups += [group for s in plain.values() if (group := _group(s, None, scope, place)) is not None]
    return groups


class _Memory:
    """Which values are in memory whatever is done here."""

    def __init__(self, steps: Sequence[Step], scope: Scope) -> None:
        self.scope = scope
        self.read = {value for step in steps if not self._is_inside(step) for value in step.reads()}

    def _is_inside(self, step: Step) -> bool:
        return is_elementwise(step.name) or step.name in _FUSED or step.name in _SPREAD or step.name == "stablehlo.reshape"

    def holds(self, value: Value) -> bool:
        step = self.scope.producers.get(value)
        if step is None:
            return True
        if step.name == "stablehlo.reshape":
            return self.holds(step.operands[0])
        return step.name not in _SPREAD and (not self._is_inside(step) or value in self.read)


def _sum(step: Step, scope: Scope, memory: _Memory) -> _Sum | None:
    """What a reduction sums up, if the kernel is for it."""
    if len(step.results) != 1 or tuple(step.dimensions) != tuple(range(len(step.dimensions))) or not step.operand.is_floating:
        return None
    rows, width = math.prod(step.operand.shape[: len(step.dimensions)]), math.prod(step.operand.shape[len(step.dimensions) :])
    if not columns.fits(step.operand.dtype, rows, width) or folds(step.regions[0]) != ("add",) or splat(step.operands[1], scope) != 0.0:
        return None
    whole = _narrow(step.operands[0], scope)
    product = scope.maker(whole, "stablehlo.multiply")
    if product is not None and scope.reads(whole) == 1 and scope.reads(step.operands[0]) == 1:
        a, b = (_narrow(v, scope) for v in product.operands)
        if a is b:
            found = _product(step, a, b, scope, memory)
            return found or _plain(step, whole, memory)
        factors: list[tuple[str, Value]] = []
        a, b = (_without_rows(v, step, scope, memory, factors) for v in (a, b))
        for x, y in ((a, b), (b, a)):
            if a is not b and (found := _product(step, x, y, scope, memory)):
                return replace(found, factors=tuple(factors))
    return _plain(step, whole, memory)


def _plain(step: Step, whole: Value, memory: _Memory) -> _Sum:
    return _Sum(step, "x", (whole if memory.holds(whole) else step.operands[0],))


def _without_rows(value: Value, step: Step, scope: Scope, memory: _Memory, factors: list[tuple[str, Value]]) -> Value:
    """What is multiplied by rows or divided by them on the way to `value`; sum(x y r) is r sum(x y)."""
    while not memory.holds(value) and (maker := scope.maker(value, "stablehlo.multiply", "stablehlo.divide")) is not None:
        name = maker.name.removeprefix("stablehlo.")
        pairs = [maker.operands, maker.operands[::-1]] if name == "multiply" else [maker.operands]
        found = next(((array, row) for array, spread in pairs if (row := _row(spread, step, scope)) is not None), None)
        if found is None:
            break
        factors.append((name, found[1]))
        value = _narrow(found[0], scope)
    return value


def _row(value: Value, step: Step, scope: Scope) -> Value | None:
    """What is spread along the dimensions that are summed, and not along the others."""
    row, dims = origin(value, scope)
    lead = len(step.dimensions)
    kept = [d for d in dims[lead:] if d is not None]
    is_row = dims[:lead] == [None] * lead and kept == sorted(kept) and row.type.size == math.prod(step.operand.shape[lead:])
    return row if is_row and math.prod(step.operand.shape[:lead]) > 1 else None


def _product(step: Step, x: Value, y: Value, scope: Scope, memory: _Memory) -> _Sum | None:
    """Of two arrays in memory, or of one and a difference from a row."""
    if memory.holds(x) and (x is y or (memory.holds(y) and x.dtype == y.dtype)):
        return _Sum(step, "xx" if x is y else "xy", (x,) if x is y else (x, y))
    less = scope.maker(y, "stablehlo.subtract")
    if less is None:
        return None
    array, row = _narrow(less.operands[0], scope), _row(less.operands[1], step, scope)
    if row is None or not memory.holds(array):
        return None
    if x is y:
        return _Sum(step, "cc", (array, row))
    return _Sum(step, "xc", (x, array, row)) if memory.holds(x) and x.dtype == array.dtype else None


def _narrow(value: Value, scope: Scope) -> Value:
    """The half type's array that a float32 one was made of."""
    step = scope.maker(value, "stablehlo.convert")
    return step.operands[0] if step is not None and step.operand.dtype in _HALF and value.dtype == "float32" else value


def _either(product: _Sum) -> tuple[Value, ...]:
    return {"xx": product.arrays, "xy": product.arrays, "xc": product.arrays[:1]}.get(product.kind, ())


def _group(product: _Sum, beside: tuple[Value, _Sum] | None, scope: Scope, place: Mapping[Value, int]) -> Step | None:
    """The step for a sum, and for the one beside it; None if what it reads is not there by the first of the two."""
    first, *rest = product.arrays
    if beside is not None and first is not beside[0]:
        first, rest = beside[0], [first]
    read = (first, *rest, *(row for _, row in product.factors))
    kind = product.kind if beside is None else f"x,{product.kind}"
    given = {"kind": kind, "lead": len(product.step.dimensions), "factors": tuple(name for name, _ in product.factors)}
    group = fuse("jax_mps.column_sums", product.step, read, scope, given, shared=True)
    other = beside and fuse("jax_mps.column_sums", beside[1].step, (first,), scope, shared=True)
    if group is None or (beside is not None and other is None) or group.operands != read:
        return None
    if beside is not None and other:
        results = (*beside[1].step.results, *product.step.results)
        original = Region(read, tuple(dict.fromkeys((*other.original.steps, *group.original.steps))), results)
        group = replace(group, results=results, attributes={**given, "original": original})
    first_place = min(place[v] for v in group.results)
    return group if all(place.get(v, -1) < first_place for v in read) else None
