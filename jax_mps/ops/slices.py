"""Windows of an array: slice, dynamic_slice, dynamic_update_slice, real_dynamic_slice.

Starts are always clamped: MLX reads and writes outside the buffer where they are not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from jax_mps.ops import lookup
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.shapes import empty
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, numpy_dtype

INT32_MAX = 2**31 - 1
_NARROW = (mx.bool_, mx.int8, mx.uint8, mx.int16, mx.uint16)


def clamp_starts(starts: mx.array, last: Sequence[int]) -> mx.array:
    """Clamp start indices of any integer type to 0..last, as int32; `last` goes along the final axis of `starts`.

    The clamp comes before the narrowing, so that 2**40 is past the end and not somewhere in the middle.
    """
    if starts.dtype in _NARROW:  # whose range may not hold the limit
        starts = starts.astype(mx.int32)
    limit = mx.array(last[0] if len(last) == 1 else list(last), starts.dtype)
    lower = starts if starts.dtype in (mx.uint32, mx.uint64) else mx.maximum(starts, mx.array(0, starts.dtype))
    return mx.minimum(lower, limit).astype(mx.int32)


@lowers("stablehlo.slice")
def slice_(op: Step) -> Run:
    index = tuple(slice(*bounds) for bounds in zip(op.start_indices, op.limit_indices, op.strides, strict=True))
    if not index or op.operand.shape == op.result.shape:
        return lambda x: x
    return lambda x: x[index]


@lowers("stablehlo.dynamic_slice")
def dynamic_slice(op: Step) -> Run:
    sizes = tuple(op.slice_sizes)
    window = _moving(op.operand.shape, sizes)
    if op.result.size == 0:
        return lambda x, *starts: empty(op.result)
    if not window:
        return lambda x, *starts: x
    if list(window) == [0] and lookup.fits(op.operands[1].dtype, numpy_dtype(op.operand.dtype).itemsize, 1, op.operand.shape, sizes[0]):
        return lambda x, *starts: mx.reshape(lookup.rows_at(x, mx.reshape(starts[0], (1,)), sizes[0]), sizes)
    return lambda x, *starts: mx.slice(x, _window_starts(starts, window), tuple(window), sizes)


@lowers("stablehlo.dynamic_update_slice")
def dynamic_update_slice(op: Step) -> Run:
    update = op.operands[1].type
    window = _moving(op.operand.shape, update.shape)
    if update.size == 0:
        return lambda x, update, *starts: x
    if not window:
        return lambda x, update, *starts: update
    if list(window.values()) == [op.operand.shape[next(iter(window))] - 1] and device_kind() == "cuda" and op.operand.nbytes <= _SELECTED:
        return lambda x, update, *starts: _with_row(x, update, _window_starts(starts, window), *window)
    return lambda x, update, *starts: mx.slice_update(x, update, _window_starts(starts, window), tuple(window))


# A row of a small array is put in by a selection over all of it: on CUDA, MLX 0.32 takes 17 us and two kernels for a window at a computed
# place (24 of them in a step of GPT-2 with a cache of keys and values).
_SELECTED = 4 << 20


def _with_row(x: mx.array, row: mx.array, index: mx.array, axis: int) -> mx.array:
    return mx.where(_positions(x.shape[axis], x.ndim - 1 - axis) == index, row, x)


@functools.cache
def _positions(size: int, after: int) -> mx.array:
    """0, 1, ... along an axis with so many after it; a constant, since MLX fuses no arange and no reshape."""
    return mx.array(np.arange(size, dtype=np.int32).reshape(-1, *[1] * after))


def _moving(shape: Sequence[int], sizes: Sequence[int]) -> dict[int, int]:
    """Axes along which the window can move, each with its last possible start."""
    return {axis: d - s for axis, (d, s) in enumerate(zip(shape, sizes, strict=True)) if d > s}


def _window_starts(starts: Sequence[mx.array], window: dict[int, int]) -> mx.array:
    chosen = [starts[axis] for axis in window]
    stacked = chosen[0] if len(chosen) == 1 else mx.stack(chosen)
    return clamp_starts(stacked, tuple(window.values()))


@lowers("stablehlo.real_dynamic_slice")
def real_dynamic_slice(op: Step) -> Run:
    """Start, limit and strides are read at run time; the result's type already says how many elements each dimension has."""
    if op.result.size == 0:
        return lambda x, *bounds: empty(op.result)

    def run(x: mx.array, start_indices: mx.array, limit_indices: mx.array, strides: mx.array) -> mx.array:
        starts, steps = start_indices.astype(mx.int64), strides.astype(mx.int64)
        for axis, size in enumerate(op.result.shape):
            index = starts[axis] + mx.arange(size, dtype=mx.int64) * steps[axis]
            x = mx.take(x, mx.clip(index, 0, op.operand.shape[axis] - 1), axis=axis)
        return x

    return run
