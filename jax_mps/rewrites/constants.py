"""Rewrites by what is known when the program is translated: shifts that stay inside the width, slices that start at a constant."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jax_mps.plan.types import Step, numpy_dtype
from jax_mps.rewrites.table import Producers, constant_of

_SHIFTS = frozenset(["stablehlo.shift_left", "stablehlo.shift_right_logical", "stablehlo.shift_right_arithmetic"])


def shift_in_range(step: Step, producers: Producers) -> Step | None:
    """A shift by constants below the width: one MLX op; MLX leaves the others undefined, so they cost three."""
    if step.name not in _SHIFTS or not step.operand.is_integer:
        return None
    amount = constant_of(step.operands[1], producers)
    bits = 8 * numpy_dtype(step.operand.dtype).itemsize
    if amount is None or not np.all((amount.astype(np.int64) >= 0) & (amount.astype(np.int64) < bits)):
        return None
    return replace(step, attributes={**step.attributes, "in_range": True})


def dynamic_slice_at_constants(step: Step, producers: Producers) -> Step | None:
    """`dynamic_slice` whose starts are all constants (unrolled loops make many): a static slice, clamped now as the spec clamps then."""
    if step.name != "stablehlo.dynamic_slice":
        return None
    starts = [constant_of(v, producers) for v in step.operands[1:]]
    if any(s is None for s in starts):
        return None
    shape, sizes = step.operand.shape, step.slice_sizes
    first = tuple(min(max(int(s.item()), 0), d - n) for s, d, n in zip(starts, shape, sizes, strict=True) if s is not None)
    last = tuple(f + n for f, n in zip(first, sizes, strict=True))
    named = {"start_indices": first, "limit_indices": last, "strides": (1,) * len(first)}
    text = tuple((name, f"array<i64: {', '.join(map(str, values))}>" if values else "array<i64>") for name, values in named.items())
    return Step("stablehlo.slice", step.operands[:1], step.results, named, location=step.location, text=text)
