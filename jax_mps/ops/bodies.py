"""What the body of a reduction, window or scatter computes, matched whole: every step and every result, never the last op alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_mps.ops.registry import defining_step
from jax_mps.plan.types import Region, Value

_COMMUTATIVE = frozenset(["add", "multiply", "maximum", "minimum", "and", "or", "xor"])
_FOLDS = frozenset(f"stablehlo.{name}" for name in _COMMUTATIVE)
_COMPARE_FLIPPED = {"GT": "LT", "LT": "GT", "GE": "LE", "LE": "GE", "EQ": "EQ", "NE": "NE"}

Expression = tuple[Any, ...]


def folds(region: Region) -> tuple[str, ...] | None:
    """The op that combines each operand with its own accumulator ("add", "maximum", ...), if that is all that the body does."""
    count = len(region.results)
    names: list[str] = []
    for i, result in enumerate(region.results):
        step = next((s for s in region.steps if result in s.results), None)
        if step is None or step.name not in _FOLDS or {*step.operands} != {region.arguments[i], region.arguments[count + i]}:
            return None
        names.append(step.name.removeprefix("stablehlo."))
    return tuple(names) if len(region.steps) == count else None


def comparison(region: Region) -> str | None:
    """The direction of a body that is `compare(direction, %0, %1)` and nothing else, in floating or integer order."""
    body = expressions(region)
    if body is None or len(body) != 1 or body[0][0] != "compare":
        return None
    _, direction, left, right = body[0]
    if {left, right} != {("argument", 0), ("argument", 1)}:
        return None
    return str(direction if left == ("argument", 0) else _COMPARE_FLIPPED[direction])


def argument_of(region: Region) -> str | None:
    """ "argmax" or "argmin" for the two-operand body of JAX's arg-reductions: NaN first, then the extreme value, then the lowest index."""
    body = expressions(region)
    if body is None or len(region.arguments) != 4:
        return None
    has_nan = region.arguments[0].type.is_floating or region.arguments[0].type.is_complex
    for name, direction in (("argmax", "GT"), ("argmin", "LT")):
        if body == _arg_body(direction, nan=True) or (not has_nan and body == _arg_body(direction, nan=False)):
            return name
    return None


def _arg_body(direction: str, *, nan: bool) -> list[Expression]:
    x, i, y, j = (("argument", n) for n in range(4))
    better: Expression = ("compare", direction, x, y)
    if nan:
        better = _commuted("or", better, ("compare", "NE", x, x))
    tie = _commuted("and", ("compare", "EQ", x, y), ("compare", "LT", i, j))
    return [("select", better, x, y), ("select", _commuted("or", better, tie), i, j)]


def expressions(region: Region) -> list[Expression] | None:
    """The region's results as nested tuples over its arguments, operands of commutative ops in one order.

    None where it holds anything but arithmetic: nested regions, captures, a total order.
    """
    known: dict[Value, Expression] = {v: ("argument", n) for n, v in enumerate(region.arguments)}
    for step in region.steps:
        if step.regions or len(step.results) != 1 or any(v not in known for v in step.operands):
            return None
        name, operands = step.name.removeprefix("stablehlo."), [known[v] for v in step.operands]
        if name == "compare":
            if step.compare_type == "TOTALORDER":
                return None
            known[step.results[0]] = ("compare", step.comparison_direction, *operands)
        elif name in _COMMUTATIVE:
            known[step.results[0]] = _commuted(name, *operands)
        elif name == "constant":
            known[step.results[0]] = ("constant", step.result.dtype, step.result.shape, np.ascontiguousarray(step.value).tobytes())
        elif not step.attributes:
            known[step.results[0]] = (name, *operands)
        else:
            return None
    results = [known.get(v) for v in region.results]
    return None if None in results else [r for r in results if r is not None]


def _commuted(name: str, *operands: Expression) -> Expression:
    return (name, *sorted(operands, key=repr))


def constant_of(value: Value) -> Any:
    """The value of a scalar operand that is a constant of the program, as init values nearly always are; None where that is not known."""
    step = defining_step(value)
    while step is not None and step.name in ("stablehlo.broadcast_in_dim", "stablehlo.reshape"):
        step = defining_step(step.operands[0])
    if step is None or step.name != "stablehlo.constant" or step.result.size != 1:
        return None
    return np.asarray(step.value).reshape(()).item()


def identity(name: str, dtype: str) -> Any:
    """The neutral element of a fold in a dtype, as a Python value."""
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    if name in ("add", "or", "xor"):
        return kind.type(0).item()
    if name == "multiply":
        return kind.type(1).item()
    if name == "and":
        return True if kind.kind == "b" else kind.type(-1 if kind.kind == "i" else np.iinfo(kind).max).item()
    return _extreme(kind, lowest=name == "maximum")


def _extreme(kind: np.dtype[Any], *, lowest: bool) -> Any:
    if kind.kind == "b":
        return not lowest
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return limits.min if lowest else limits.max
    return -np.inf if lowest else np.inf


def is_identity(name: str, value: Value) -> bool:
    """Whether an init value is known to be a fold's neutral element."""
    return bool(constant_of(value) == identity(name, value.dtype))
