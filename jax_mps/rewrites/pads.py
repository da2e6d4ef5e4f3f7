"""Sums of padded arrays that have no place in common: a concatenation; on CUDA.

The gradients of an array's slices (queries, keys and values out of one product) are added up as such: zeros, a copy into them for each, and a sum.
(-0.0 stays what it is, where -0.0 + 0.0 is 0.0.)
"""

from __future__ import annotations

from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, splat
from jax_mps.rewrites.table import Scope

_MOST = 16  # arrays


def concatenated(step: Step, scope: Scope) -> Step | None:
    """The last of the additions as the concatenation of what is padded."""
    if device_kind() != "cuda":
        return None
    pads: list[Step] = []
    waiting = list(step.operands)
    while waiting:
        value = waiting.pop()
        if (pad := scope.maker(value, "stablehlo.pad")) is not None:
            pads.append(pad)
        elif (added := scope.maker(value, "stablehlo.add")) is not None:
            waiting += added.operands
        else:
            return None
        if len(pads) + len(waiting) > _MOST:
            return None
    axes = {axis for pad in pads for axis in _padded(pad)}
    if len(axes) != 1 or not all(_is_plain(pad, scope) for pad in pads):
        return None
    (axis,) = axes
    pads.sort(key=lambda pad: pad.edge_padding_low[axis])
    end = 0
    operands: list[Value] = []
    for pad in pads:
        if pad.edge_padding_low[axis] != end:
            return None
        end += pad.operand.shape[axis]
        operands.append(pad.operands[0])
    return fuse("stablehlo.concatenate", step, operands, scope, {"dimension": axis}) if end == step.result.shape[axis] else None


def _padded(pad: Step) -> list[int]:
    """The dimensions with something at either end."""
    return [d for d, ends in enumerate(zip(pad.edge_padding_low, pad.edge_padding_high, strict=True)) if ends != (0, 0)]


def _is_plain(pad: Step, scope: Scope) -> bool:
    return not any(pad.interior_padding) and splat(pad.operands[1], scope) == 0
