"""Conditions of loops that the host can answer from a few scalars: comparisons, and what joins them. The device then computes none."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mps.plan.loops import Constants
from jax_mps.plan.trips import JOINED, Condition, Term
from jax_mps.plan.types import DEVICE_DTYPES, Region, Step, Value


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
    return name if name in JOINED and step.operand.dtype == "bool" else None
