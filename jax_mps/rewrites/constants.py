"""Rewrites by what is known when the program is translated: shifts that stay inside the width, slices that start at a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from jax_mps.plan.types import Step, numpy_dtype
from jax_mps.rewrites.table import Scope

SHIFTS = frozenset(["stablehlo.shift_left", "stablehlo.shift_right_logical", "stablehlo.shift_right_arithmetic"])


def shift_in_range(step: Step, scope: Scope) -> Step | None:
    """A shift by constants below the width: one MLX op; MLX leaves the others undefined, so they cost three."""
    if not step.operand.is_integer:
        return None
    amount = scope.constant(step.operands[1])
    bits = 8 * numpy_dtype(step.operand.dtype).itemsize
    if amount is None or not np.all((amount.astype(np.int64) >= 0) & (amount.astype(np.int64) < bits)):
        return None
    return replace(step, attributes={**step.attributes, "in_range": True})


_COMPARISONS = {"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal}
_FOLDED: dict[str, Callable[..., Any]] = {
    "stablehlo.add": np.add, "stablehlo.subtract": np.subtract, "stablehlo.multiply": np.multiply,
    "stablehlo.negate": np.negative, "stablehlo.divide": np.divide,
    "stablehlo.minimum": np.minimum, "stablehlo.maximum": np.maximum, "stablehlo.select": np.where,
    "stablehlo.convert": lambda x: x, "stablehlo.reshape": lambda x: x,
}  # fmt: skip
_ROUNDED = frozenset(f"stablehlo.{n}" for n in ("add", "subtract", "multiply", "divide", "negate", "compare"))  # of floats: once, by all alike
ARITHMETIC = frozenset([*_FOLDED, "stablehlo.compare"])


def fold_conversion(step: Step, scope: Scope) -> Step | None:
    """A scalar constant converted to a float type (JAX writes `where(mask, x, 0)` with an integer)."""
    known = scope.constant(step.operands[0]) if step.result.rank == 0 and step.result.is_floating else None
    if known is None or step.operand.is_complex:
        return None
    value = known.astype(numpy_dtype(step.result.dtype)).reshape(())
    return Step("stablehlo.constant", (), step.results, {"value": value}, location=step.location, text=())


def fold_scalars(step: Step, scope: Scope) -> Step | None:
    """Scalars computed from constants: what JAX does to an index (is it negative? then add the size) before it slices, or `jnp.var` to its
    divisor (is it positive?)."""
    if len(step.results) != 1 or step.result.rank or not step.operands:
        return None
    values = (*step.operands, *step.results)
    if any(v.type.rank or not (v.type.is_integer or v.dtype in ("bool", "float32")) for v in values):
        return None
    if step.name not in _ROUNDED if step.operand.is_floating else step.name == "stablehlo.divide":
        return None
    if step.operand.dtype == "bool" and step.name not in ("stablehlo.select", "stablehlo.compare"):
        return None
    function: Callable[..., Any] = _COMPARISONS[step.comparison_direction] if step.name == "stablehlo.compare" else _FOLDED[step.name]
    known = [scope.constant(v) for v in step.operands]
    if any(k is None for k in known):
        return None
    with np.errstate(all="ignore"):  # integers wrap, as the spec's do
        value = np.asarray(function(*(np.asarray(k) for k in known))).astype(numpy_dtype(step.result.dtype))
    return Step("stablehlo.constant", (), step.results, {"value": value}, location=step.location, text=())


def dynamic_slice_at_constants(step: Step, scope: Scope) -> Step | None:
    """`dynamic_slice` whose starts are all constants (unrolled loops make many): a static slice, clamped now as the spec clamps then."""
    starts = [scope.constant(v) for v in step.operands[1:]]
    if any(s is None for s in starts):
        return None
    shape, sizes = step.operand.shape, step.slice_sizes
    first = tuple(min(max(int(s.item()), 0), d - n) for s, d, n in zip(starts, shape, sizes, strict=True) if s is not None)
    last = tuple(f + n for f, n in zip(first, sizes, strict=True))
    named = {"start_indices": first, "limit_indices": last, "strides": (1,) * len(first)}
    text = tuple((name, f"array<i64: {', '.join(map(str, values))}>" if values else "array<i64>") for name, values in named.items())
    return Step("stablehlo.slice", step.operands[:1], step.results, named, location=step.location, text=text)
