"""gather, in its general form: clamped starts, any index layout, batching dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from jax_mps.ops import lookup
from jax_mps.ops.dtypes import MX
from jax_mps.ops.indexing import Windows, batch_shape, batching_axes
from jax_mps.ops.registry import Run, defining_step, lowers
from jax_mps.ops.shapes import empty
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, numpy_dtype

# A row at least this long is copied whole; below it one index for each element is faster (CPU: 20 ns a row against 2 ns an element)
_LONG_ROW = 12


@lowers("stablehlo.gather")
def gather(op: Step) -> Run:
    run, dtype = _gather(op, tuple(op.slice_sizes)), MX[op.result.dtype]
    return run if op.operand.dtype == op.result.dtype else lambda x, start_indices, *rest: run(x, start_indices).astype(dtype)  # rewrites/indices.py


@lowers("stablehlo.dynamic_gather")
def dynamic_gather(op: Step) -> Run:
    """The sizes are read at run time; those that are not 1 are in the result's type."""
    gone = {*op.collapsed_slice_dims, *op.operand_batching_dims}
    offsets = iter(op.result.shape[d] for d in op.offset_dims)
    run = _gather(op, tuple(1 if d in gone else next(offsets) for d in range(op.operand.rank)))
    return lambda x, start_indices, slice_sizes: run(x, start_indices)


def _gather(op: Step, slice_sizes: tuple[int, ...]) -> Callable[[mx.array, mx.array], mx.array]:
    indices = op.operands[1].type
    windows = Windows(
        shape=op.operand.shape,
        sizes=slice_sizes,
        batch=batch_shape(indices, op.index_vector_dim),
        columns={d: k for k, d in enumerate(op.start_index_map)},
        batching=batching_axes(op.operand_batching_dims, op.start_indices_batching_dims, op.index_vector_dim),
        index_vector_dim=op.index_vector_dim,
        wrapped=op.attributes.get("wrapped", False),
    )
    if op.result.size == 0:
        return lambda x, start_indices: empty(op.result)
    if _looks_up(windows, op):
        return _looked_up(windows, op)
    if windows.count == 1:
        return _one_window(windows, op)
    if not windows.indexed:
        return _same_window(windows, op)
    return _many_windows(windows, op)


def _looks_up(windows: Windows, op: Step) -> bool:
    """Whether windows are whole rows of a table that lies in one piece."""
    if list(windows.columns) != [0] or list(windows.moving) != [0] or windows.batching or windows.sizes[1:] != windows.shape[1:]:
        return False
    if (maker := defining_step(op.operands[0])) is not None and maker.name in _IN_PIECES:
        return False
    return lookup.fits(op.operands[1].dtype, numpy_dtype(op.operand.dtype).itemsize, windows.count, windows.shape, windows.sizes[0])


_IN_PIECES = frozenset(f"stablehlo.{name}" for name in ("transpose", "broadcast_in_dim", "reverse", "slice"))  # views


def _looked_up(windows: Windows, op: Step) -> Run:
    finish = _layout(windows, op, 0, 1)
    return lambda x, start_indices: finish(lookup.rows_at(x, mx.reshape(start_indices, (-1,)), windows.sizes[0], wrapped=windows.wrapped))


def _one_window(windows: Windows, op: Step) -> Run:
    moving, shape = tuple(windows.moving), op.result.shape
    if not moving:
        return lambda x, start_indices: mx.reshape(x[_static(windows)], shape)

    def run(x: mx.array, start_indices: mx.array) -> mx.array:
        start = mx.reshape(windows.starts(start_indices), (len(moving),))
        return mx.reshape(mx.slice(x, start, moving, windows.sizes), shape)

    return run


def _same_window(windows: Windows, op: Step) -> Run:
    offset_dims = set(op.offset_dims)
    aligned = [s if d in offset_dims else 1 for d, s in enumerate(op.result.shape)]
    return lambda x, start_indices: mx.broadcast_to(mx.reshape(x[_static(windows)], aligned), op.result.shape)


def _static(windows: Windows) -> tuple[slice, ...]:
    return tuple(slice(0, s) for s in windows.sizes)


def _many_windows(windows: Windows, op: Step) -> Run:
    first, last = windows.indexed[0], windows.indexed[-1] + 1
    row = math.prod(windows.sizes[last:])
    aligned = _aligned_axis(windows, op)
    if aligned is not None:
        return lambda x, start_indices: mx.take_along_axis(x, mx.reshape(windows.positions(start_indices), op.result.shape), axis=aligned)
    straight = windows.line is not None and not windows.batching and (math.prod(windows.sizes[:first]) == 1 or device_kind() != "cpu")
    if not straight and (row >= _LONG_ROW or math.prod(windows.sizes[:first]) == 1):
        first = 0
    finish = _layout(windows, op, first, last)
    outer = tuple(slice(0, s) if not first <= d < last else slice(None) for d, s in enumerate(windows.sizes))
    whole = all(windows.sizes[d] == windows.shape[d] for d in range(len(outer)) if not first <= d < last)
    before, rows = math.prod(windows.sizes[:first]), math.prod(windows.shape[first:last])

    def run(x: mx.array, start_indices: mx.array) -> mx.array:
        if straight:
            index = windows.positions(start_indices)
        else:
            starts = windows.starts(start_indices) if windows.moving else None
            index = mx.reshape(windows.linear(starts, first, last), (-1,))
        x = x if whole else x[outer]
        return finish(_take(x, index, (before, rows, row)))

    return run


def _aligned_axis(windows: Windows, op: Step) -> int | None:
    """The axis of a `take_along_axis`: every other dimension goes along with the same dimension of the indices."""
    axis, rank = windows.line, op.operand.rank
    if axis is None or len(windows.batch) != rank or any(s != 1 for s in windows.sizes) or tuple(windows.batch) != op.result.shape:
        return None
    return axis if windows.batching == {d: d for d in range(rank) if d != axis} else None


def _take(x: mx.array, index: mx.array, shape: tuple[int, int, int]) -> mx.array:
    """Rows `index` of x seen as (before, rows, row)."""
    before, rows, row = shape
    if before == row == 1:
        return mx.take_along_axis(mx.reshape(x, (rows,)), index, axis=0)
    if before == 1 and row >= _LONG_ROW:
        return mx.take(mx.reshape(x, (rows, row)), index, axis=0)
    if device_kind() != "cpu":
        return mx.take(mx.reshape(x, shape), index, axis=1)
    return mx.take_along_axis(mx.reshape(x, shape), index[None, :, None], axis=1)


def _layout(windows: Windows, op: Step, first: int, last: int) -> Callable[[mx.array], mx.array]:
    """From (before, batch, window, row) order to the result's."""
    gone = {*op.collapsed_slice_dims, *op.operand_batching_dims}
    offsets = iter(op.offset_dims)
    window = {d: next(offsets) for d in range(op.operand.rank) if d not in gone}
    batch = [d for d in range(op.result.rank) if d not in set(op.offset_dims)]
    axes = [window[d] for d in range(first) if d in window] + batch + [window[d] for d in range(first, op.operand.rank) if d in window]
    extents = [op.result.shape[a] for a in axes]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order == list(range(len(axes))):
        return lambda y: mx.reshape(y, op.result.shape)
    return lambda y: mx.transpose(mx.reshape(y, extents), order)
