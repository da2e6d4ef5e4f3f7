"""Conditions of loops that the host can answer from a few scalars: comparisons, and what joins them. The device then computes none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_mps.plan.loops import Constants
from jax_mps.plan.types import DEVICE_DTYPES, Region, Step, Value

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip
_JOINED: Mapping[str, Callable[..., bool]] = {"and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.not_}

# "carry" and "capture" (a position), "constant" (a number), or an operation and the places of its operands among the terms before it.
Term = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Condition:
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
                    operation = _COMPARISONS.get(name) or _JOINED[name]
                    known.append(operation(*(known[i] for i in rest)))
        return bool(known[-1])


def find_condition(cond: Region, captures: Sequence[Value], constants: Constants) -> Condition | None:
    """The condition in that form; None if the host cannot answer it exactly as the device would."""
    places: dict[Value, int] = {}
    terms: list[Term] = []

    def place(value: Value) -> int | None:
        if value in places:
            return places[value]
        term = leaf(value)
        if term is None:
            return None
        places[value] = len(terms)
        terms.append(term)
        return places[value]

    def leaf(value: Value) -> Term | None:
        if value.type.rank or value.dtype not in DEVICE_DTYPES or value.type.is_complex:
            return None
        if value in cond.arguments:
            return "carry", cond.arguments.index(value)
        if value in constants:
            number = constants[value].reshape(()).astype("float64" if value.type.is_floating else constants[value].dtype).item()
            return ("constant", number) if number == number and abs(number) != float("inf") else None  # JSON has no others
        return ("capture", captures.index(value)) if value in captures else None

    constants = {**constants, **{s.results[0]: s.value for s in cond.steps if s.name == "stablehlo.constant"}}
    for step in cond.steps:
        if step.name == "stablehlo.constant":
            continue
        name = _operation(step)
        operands = [place(v) for v in step.operands]
        if name is None or any(p is None for p in operands):
            return None
        places[step.results[0]] = len(terms)
        terms.append((name, *operands))
    last = place(cond.results[0])
    return Condition(tuple(terms)) if last is not None and last == len(terms) - 1 else None


def _operation(step: Step) -> str | None:
    if step.name == "stablehlo.compare":
        return None if step.attributes.get("compare_type") == "TOTALORDER" else str(step.comparison_direction)
    name = step.name.removeprefix("stablehlo.")
    return name if name in _JOINED and step.operand.dtype == "bool" else None
