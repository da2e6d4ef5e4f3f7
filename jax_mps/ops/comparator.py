"""What the comparator of a sort says: one or more keys in lexicographic order, or nothing that can be sorted by.

It is matched whole: each key must be the same elementwise function of the left and of the right arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.bodies import constant_of
from jax_mps.ops.order import canonical_order, total_order
from jax_mps.ops.registry import LoweredRegion
from jax_mps.plan.types import Region, Step, Value


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a lexicographic order: its value for the left arguments, the direction and how its elements compare."""

    value: Value
    descending: bool
    compare_type: str


class _Comparator:
    """A comparator's values as terms: equal terms are equal values. A term is a number; `terms` holds (op, attributes, operand terms)."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.terms: list[tuple[Any, ...]] = []
        self.of: dict[Value, int] = {v: self.number(("argument", i)) for i, v in enumerate(region.arguments)}
        self.steps: dict[int, Step] = {}
        self.mirrors: dict[int, int | None] = {}
        for step in region.steps:
            for position, result in enumerate(step.results):
                operands = tuple(self.term(v) for v in step.operands)
                self.of[result] = self.number((step.name, _frozen(step), position, *operands))
                self.steps.setdefault(self.of[result], step)

    def number(self, term: tuple[Any, ...]) -> int:
        if term not in self.numbers:
            self.numbers[term] = len(self.terms)
            self.terms.append(term)
        return self.numbers[term]

    def term(self, value: Value) -> int:
        if value not in self.of:  # a capture: the same for left and right
            self.of[value] = self.number(("capture", value))
        return self.of[value]

    def mirrored(self, number: int) -> int | None:
        """The term with left and right arguments exchanged, None if the comparator does not compute it."""
        if number not in self.mirrors:
            self.mirrors[number] = self._mirrored(self.terms[number], number)
        return self.mirrors[number]

    def _mirrored(self, term: tuple[Any, ...], number: int) -> int | None:
        if term[0] == "argument":
            return self.numbers[("argument", term[1] ^ 1)]
        if term[0] == "capture":
            return number
        operands = [self.mirrored(n) for n in term[3:]]
        return None if None in operands else self.numbers.get((*term[:3], *operands))

    def sides(self, number: int) -> set[int]:
        """Which arguments a term reads: 0 for left, 1 for right."""
        seen, waiting = {number}, [number]
        while waiting:
            term = self.terms[waiting.pop()]
            fresh = set() if term[0] in ("argument", "capture") else set(term[3:]) - seen
            seen |= fresh
            waiting.extend(fresh)
        return {self.terms[n][1] % 2 for n in seen if self.terms[n][0] == "argument"}

    def keys(self, number: int) -> list[Key] | None:
        """`number` as a lexicographic order; None if it is none."""
        step, operands = self.steps.get(number), self.terms[number][3:]
        if step is None:
            return None
        if step.name == "stablehlo.compare":
            key = self.key(step, operands)
            return None if key is None else [key]
        if step.name == "stablehlo.or":  # less(k) or (equal(k) and rest)
            return self.lexicographic(operands[0], operands[1]) or self.lexicographic(operands[1], operands[0])
        if step.name == "stablehlo.select":
            return self.selected(*operands)
        return None

    def lexicographic(self, less: int, both: int) -> list[Key] | None:
        step = self.steps.get(both)
        if step is None or step.name != "stablehlo.and":
            return None
        x, y = self.terms[both][3:]
        return self.chain(less, x, y, "EQ") or self.chain(less, y, x, "EQ")

    def selected(self, condition: int, x: int, y: int) -> list[Key] | None:
        """equal(k) ? rest : less(k), or differ(k) ? less(k) : rest."""
        return self.chain(y, condition, x, "EQ") or self.chain(x, condition, y, "NE")

    def chain(self, less: int, test: int, rest: int, direction: str) -> list[Key] | None:
        first, tested = self.steps.get(less), self.steps.get(test)
        if first is None or tested is None or first.name != "stablehlo.compare" or tested.name != "stablehlo.compare":
            return None
        if tested.comparison_direction != direction or tested.compare_type != first.compare_type:
            return None
        if {*self.terms[test][3:]} != {*self.terms[less][3:]}:
            return None
        key, others = self.key(first, self.terms[less][3:]), self.keys(rest)
        return None if key is None or others is None else [key, *others]

    def key(self, step: Step, operands: Sequence[int]) -> Key | None:
        if step.comparison_direction not in ("LT", "GT") or step.operand.is_complex:
            return None
        left, right = operands
        if self.mirrored(left) != right or len(self.sides(left)) != 1:
            return None
        swapped = self.sides(left) == {1}
        value = step.operands[1] if swapped else step.operands[0]
        return Key(value, (step.comparison_direction == "GT") != swapped, step.compare_type)


def _frozen(step: Step) -> Any:
    if step.regions:
        return step  # equal to itself alone
    if step.name == "stablehlo.constant":
        return (step.result.dtype, step.result.shape, np.ascontiguousarray(step.value).tobytes())
    return (step.result.dtype, repr(sorted(step.attributes.items())))


def keys_of(op: Step, comparator: LoweredRegion) -> list[Key]:
    """The comparator as a lexicographic order.

    Raises:
        Unsupported: it is none, or a key is not elementwise.
    """
    matched = _Comparator(comparator.region)
    keys = matched.keys(matched.term(comparator.region.results[0])) if comparator.is_elementwise else None
    if not keys:
        raise Unsupported(op, "a comparator that is not a lexicographic order of LT and GT comparisons")
    return keys


def plain(region: Region, key: Key) -> tuple[int, bool] | None:
    """(operand, canonical) if the key is an operand as it is, or with -0 and all NaNs made equal to 0 and one NaN."""
    if key.value in region.arguments:
        return region.arguments.index(key.value) // 2, False
    steps = {v: s for s in region.steps for v in s.results}
    outer = _select_if(steps, key.value, "NE")
    inner = outer and _select_if(steps, outer[2], "EQ")
    if not outer or not inner:
        return None
    x = inner[2]
    nan = _constant(steps, outer[3])
    is_nan = outer[0] is outer[1] is x and isinstance(nan, float) and math.isnan(nan)
    is_zero = inner[0] is x and _constant(steps, inner[1]) == 0 and _constant(steps, inner[3]) == 0
    return (region.arguments.index(x) // 2, True) if is_nan and is_zero and x in region.arguments else None


def _select_if(steps: dict[Value, Step], value: Value, direction: str) -> tuple[Value, Value, Value, Value] | None:
    """(a, b, otherwise, then) of select(compare(a, b), then, otherwise)."""
    select = steps.get(value)
    if select is None or select.name != "stablehlo.select":
        return None
    condition, then, otherwise = select.operands
    compare = steps.get(condition)
    if compare is None or compare.name != "stablehlo.compare" or compare.comparison_direction != direction or compare.compare_type != "FLOAT":
        return None
    return compare.operands[0], compare.operands[1], otherwise, then


def _constant(steps: dict[Value, Step], value: Value) -> Any:
    """Of a comparator, or of the block around it: equal constants of a program are one."""
    step = steps.get(value)
    if step is None:
        return constant_of(value) if value.type.rank == 0 else None
    return np.asarray(step.value).item() if step.name == "stablehlo.constant" and step.result.rank == 0 else None


# ---- keys as integers ------------------------------------------------------------------------------------------------------------


def ascending(x: mx.array, key: Key, canonical: bool = False) -> mx.array:
    """Integers whose ascending order is the key's."""
    dtype = key.value.dtype
    if dtype == "bool":
        x, dtype = x.astype(mx.uint8), "uint8"
    elif key.value.type.is_floating and (canonical or key.compare_type != "TOTALORDER"):
        if puts_nan_last(key):
            return canonical_order(-x, dtype)
        x = canonical_order(x, dtype)
    elif key.value.type.is_floating:
        x = total_order(x, dtype)
    if not key.descending:
        return x
    return x ^ mx.array(-1, mx.int64).astype(x.dtype)  # all bits; 2**64 - 1 is no Python int that MLX takes


def puts_nan_last(key: Key) -> bool:
    """A descending order by IEEE comparison: NaN is greater than nothing."""
    return key.value.type.is_floating and key.descending and key.compare_type != "TOTALORDER"
