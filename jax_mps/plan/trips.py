"""What a loop knows of its trips when it runs: its counter, the rows that an iteration reads or writes, its condition.

NamedTuples, in a module of their own: a program that is read back needs no more of loops than this.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jax_mps.plan.types import Value

COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip
JOINED: Mapping[str, Callable[..., bool]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.not_}

# "carry" and "capture" (a position), "constant" (a number), or an operation and the places of its operands among the terms before it.
Term = tuple[Any, ...]


class Counter(NamedTuple):
    """Carry `position` runs from its initial value by `step` while `direction` holds against `bound` (a constant, or the value of a carry
    that the body never changes, or a captured value)."""

    position: int
    step: int
    direction: str
    bound: int | None
    bound_carry: int | None = None
    bound_capture: Value | None = None

    def trips(self, start: int, bound: int) -> int:
        """Number of times that the body runs."""
        distance = bound - start
        match self.direction:
            case "LT":
                return max(0, -(-distance // self.step))
            case "LE":
                return max(0, distance // self.step + 1)
            case "GT":
                return max(0, -(distance // -self.step)) if distance < 0 else 0
            case _:  # GE
                return max(0, -distance // -self.step + 1) if distance <= 0 else 0


# Rows of fewer bytes than this are put together before they are written.
SMALL_ROW = 1 << 16


class Row(NamedTuple):
    """One index of one axis in each iteration: `first` in the first one, then up (`sign` 1) or down (-1)."""

    axis: int
    first: int
    sign: int

    def range(self, trip: int, count: int) -> tuple[int, int]:
        """Where the rows of so many iterations from `trip` on begin and end."""
        at = self.first + self.sign * trip
        return (at, at + count) if self.sign > 0 else (at - count + 1, at + 1)


class Condition(NamedTuple):
    """A condition as terms, the last of which is the answer."""

    terms: tuple[Term, ...]

    def carries(self) -> tuple[int, ...]:
        """The carry positions it reads."""
        return tuple(t[1] for t in self.terms if t[0] == "carry")

    def captures(self) -> tuple[int, ...]:
        """The captures it reads."""
        return tuple(t[1] for t in self.terms if t[0] == "capture")

    def holds(self, carries: Mapping[int, Any], captures: Mapping[int, Any]) -> bool:
        """The answer, for the scalars that it reads."""
        known: list[Any] = []
        for name, *rest in self.terms:
            match name:
                case "carry":
                    known.append(carries[rest[0]])
                case "capture":
                    known.append(captures[rest[0]])
                case "constant":
                    known.append(rest[0])
                case _:
                    operation = COMPARISONS.get(name) or JOINED[name]
                    known.append(operation(*(known[i] for i in rest)))
        return bool(known[-1])
