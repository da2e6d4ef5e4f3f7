"""Where MLX's views have their elements: strides of transpositions and reshapes, without an array at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_mps.plan.types import Step, Value

Strides = tuple[int, ...]


def row_major(shape: Sequence[int]) -> Strides:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements are side by side, row by row."""
    return all(size == 1 or stride == expected for size, stride, expected in zip(shape, strides, row_major(shape), strict=True))


def reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> Strides | None:
    """The strides of a reshape that is a view, as MLX finds them; None if it has to copy."""
    runs: list[tuple[int, int]] = []  # dimensions that follow each other in memory: their size, the stride of the last
    for size, stride in zip(shape, strides, strict=True):
        if size > 1 and runs and runs[-1][1] == stride * size:
            runs[-1] = runs[-1][0] * size, stride
        elif size > 1:
            runs.append((size, stride))
    found: list[int] = []
    left = 1
    for size in new:
        if size > 1 and left == 1:
            left, stride = runs.pop(0)
        if left % size:
            return None
        left //= size
        found.append(left * stride if size > 1 else 0)
    return tuple(found)


def transposition(value: Value, result: Value, permutation: Sequence[int]) -> Step:
    text = f"array<i64: {', '.join(map(str, permutation))}>"
    return Step("stablehlo.transpose", (value,), (result,), {"permutation": tuple(permutation)}, text=(("permutation", text),))
