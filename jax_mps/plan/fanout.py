"""Many slices of one array, in two steps: MLX's export takes time in the square of the number of ops that read one array.

10,000 rows taken one by one cost 700 us each; as 157 blocks of 64 rows, 60 us. Slices are views, so the blocks copy nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jax_mps.plan.types import Step, TensorType, Value

# An array with more slices than this is cut into blocks of so many of them.
_MANY = 256
_BLOCK = 64


def in_blocks(steps: Sequence[Step]) -> list[Step]:
    """The steps, with blocks between an array and its slices where there are many of them along one axis."""
    slices: dict[Value, list[Step]] = {}
    for step in steps:
        if step.name == "stablehlo.slice":
            slices.setdefault(step.operands[0], []).append(step)
    block_of: dict[Step, Step] = {}
    for value, readers in slices.items():
        axis = _axis(readers) if len(readers) > _MANY else None
        if axis is not None:
            block_of.update(_blocks(value, readers, axis))
    placed: set[Step] = set()
    result: list[Step] = []
    for step in steps:
        block = block_of.get(step)
        if block is None:
            result.append(step)
            continue
        if block not in placed:
            placed.add(block)
            result.append(block)
        result.append(_within(step, block))
    return result


def _axis(readers: Sequence[Step]) -> int | None:
    """The axis along which the slices differ most, if together they are hardly more than the array: no blocks of nearly all of it."""
    starts = [s.start_indices for s in readers]
    axis = max(range(len(starts[0])), key=lambda d: len({s[d] for s in starts}), default=None)
    if axis is None:
        return None
    taken = sum(s.limit_indices[axis] - s.start_indices[axis] for s in readers)
    return axis if taken <= 4 * len({s[axis] for s in starts}) + 2 * readers[0].operand.shape[axis] else None


def _blocks(value: Value, readers: list[Step], axis: int) -> dict[Step, Step]:
    ordered = sorted(readers, key=lambda s: s.start_indices[axis])
    found: dict[Step, Step] = {}
    for first in range(0, len(ordered), _BLOCK):
        group = ordered[first : first + _BLOCK]
        start = [0] * value.type.rank
        limit = list(value.shape)
        start[axis], limit[axis] = group[0].start_indices[axis], max(s.limit_indices[axis] for s in group)
        kind = TensorType(tuple(b - a for a, b in zip(start, limit, strict=True)), value.dtype)
        named = {"start_indices": tuple(start), "limit_indices": tuple(limit), "strides": (1,) * len(start)}
        block = Step("stablehlo.slice", (value,), (Value(kind),), named)
        found.update(dict.fromkeys(group, block))
    return found


def _within(step: Step, block: Step) -> Step:
    """The same slice, taken from its block."""
    moved = {n: tuple(a - b for a, b in zip(step.attributes[n], block.start_indices, strict=True)) for n in ("start_indices", "limit_indices")}
    return replace(step, operands=block.results, attributes={**step.attributes, **moved})
