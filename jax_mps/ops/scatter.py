"""scatter, in its general form. An update window that does not fit into the operand is dropped whole, as XLA does.

Several windows become linear indices (ops/indexing.py) into rows of the operand; a single one is a `slice_update`.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.bodies import constant_of
from jax_mps.ops.indexing import Windows, batch_shape, batching_axes, known
from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.ops.rows import COMBINERS, writer
from jax_mps.ops.slices import clamp_starts
from jax_mps.plan.types import Region, Step, Value


@lowers("stablehlo.scatter")
def scatter(op: Step, update_computation: LoweredRegion) -> Run:
    count = len(op.results)
    windows = _windows(op)
    if op.results[0].type != op.operand:
        raise Unsupported(op, "a body that promotes the element type")
    if op.operand.size == 0 or op.operands[-1].type.size == 0:
        return lambda *arrays: arrays[:count]
    if windows.count == 1:
        return _one_window(op, windows, update_computation)
    kinds = [body_of(update_computation.region, i) for i in range(count)]
    if None not in kinds:
        singles = [_many_windows(op, windows, kind, v) for kind, v in zip(kinds, op.operands[:count], strict=True) if kind is not None]
        return lambda *arrays: [run(arrays[i], arrays[count], arrays[count + 1 + i]) for i, run in enumerate(singles)]
    if op.unique_indices and update_computation.is_elementwise:
        return _unique(op, windows, update_computation)
    raise Unsupported(op, "an update computation other than set, add, multiply, min, max, and, or, xor, with indices that may repeat")


def _windows(op: Step) -> Windows:
    indices = op.operands[len(op.results)].type
    gone = {*op.inserted_window_dims, *op.input_batching_dims}
    extents = iter(op.operands[-1].shape[d] for d in op.update_window_dims)
    return Windows(
        shape=op.operand.shape,
        sizes=tuple(1 if d in gone else next(extents) for d in range(op.operand.rank)),
        batch=batch_shape(indices, op.index_vector_dim),
        columns={d: k for k, d in enumerate(op.scatter_dims_to_operand_dims)},
        batching=batching_axes(op.input_batching_dims, op.scatter_indices_batching_dims, op.index_vector_dim),
        index_vector_dim=op.index_vector_dim,
    )


def body_of(region: Region, position: int) -> str | None:
    """What the body makes of one operand: "set", "keep", the name of a combining op, or None for anything else.

    The whole body is matched: nothing but one op on this operand's two arguments, whatever is done with the other operands.
    """
    count = len(region.arguments) // 2
    old, new = region.arguments[position], region.arguments[count + position]
    result = region.results[position]
    if result is new:
        return "set"
    if result is old:
        return "keep"
    step = next((s for s in region.steps if result in s.results), None)
    if step is None or step.name not in COMBINERS or set(step.operands) != {old, new}:
        return None
    return step.name


# ---- one window ------------------------------------------------------------------------------------------------------------------


def _one_window(op: Step, windows: Windows, body: LoweredRegion) -> Run:
    """Read the window, combine, write it back: any body, any type, nothing but the window is touched."""
    count = len(op.results)
    place = _static_place(windows, known(op.operands[count]))
    if place is None:
        return lambda *arrays: arrays[:count]
    plain_set = [body_of(body.region, i) == "set" for i in range(count)]
    if not all(plain_set) and not body.is_elementwise:
        raise Unsupported(op, "an update computation that is not elementwise")

    def run(*arrays: mx.array) -> list[mx.array]:
        inputs, indices, updates = arrays[:count], arrays[count], arrays[count + 1 :]
        window = _Window(windows, indices, place)
        new = [mx.reshape(u, windows.sizes) for u in updates]
        if all(plain_set) and window.fits is None:
            return [window.write(x, n) for x, n in zip(inputs, new, strict=True)]
        old = [window.read(x) for x in inputs]
        if not all(plain_set):
            new = [mx.broadcast_to(n, windows.sizes) for n in body(*old, *new)]
        if window.fits is not None:
            new = [mx.where(window.fits, n, o) for n, o in zip(new, old, strict=True)]
        return [window.write(x, n) for x, n in zip(inputs, new, strict=True)]

    return run


Place = tuple[slice, ...]


def _static_place(windows: Windows, vector: np.ndarray[Any, Any] | None) -> Place | None:
    """Where the only window lies, if that is known now; () if it is not, None if it lies outside of the operand."""
    if vector is None and windows.columns:
        return ()
    starts = [0] * len(windows.shape)
    for d, k in windows.columns.items():
        starts[d] = int(vector.reshape(-1)[k]) if vector is not None else 0
        if not 0 <= starts[d] <= windows.shape[d] - windows.sizes[d]:
            return None
    return tuple(slice(start, start + size) for start, size in zip(starts, windows.sizes, strict=True))


class _Window:
    """The only window, where it is known (`place`) or where the clamped indices say; `fits` is a scalar, None if it is known to fit."""

    __slots__ = ("fits", "moving", "place", "sizes", "start", "whole")

    def __init__(self, windows: Windows, indices: mx.array, place: Place) -> None:
        self.place, self.sizes, self.moving = place, windows.sizes, tuple(windows.moving)
        self.whole = windows.sizes == windows.shape
        self.fits = None if place else _fits(windows, indices)
        self.fits = None if self.fits is None else mx.reshape(self.fits, ())
        self.start = mx.reshape(windows.starts(indices), (len(self.moving),)) if self.moving and not place else None

    def read(self, x: mx.array) -> mx.array:
        if self.whole:
            return x
        return x[self._static()] if self.start is None else mx.slice(x, self.start, self.moving, self.sizes)

    def write(self, x: mx.array, window: mx.array) -> mx.array:
        if self.whole:
            return window
        if self.start is not None:
            return mx.slice_update(x, window, self.start, self.moving)
        x = x[...]
        x[self._static()] = window
        return x

    def _static(self) -> Place:
        return self.place or tuple(slice(0, s) for s in self.sizes)


def _fits(windows: Windows, indices: mx.array) -> mx.array | None:
    """For each window (shape `batch`): whether it lies inside the operand. None: all do."""
    if not windows.columns:
        return None
    vectors = windows.vectors(indices)
    last = [windows.shape[d] - windows.sizes[d] for d in windows.columns]
    inside = clamp_starts(vectors, last).astype(vectors.dtype) == vectors
    return mx.reshape(inside, windows.batch) if len(last) == 1 else mx.all(inside, axis=-1)


# ---- many windows ----------------------------------------------------------------------------------------------------------------


def _many_windows(op: Step, windows: Windows, kind: str, operand: Value) -> Run:
    if kind == "keep":
        return lambda x, indices, update: x
    put = writer(op, kind, operand.type, to_zeros=constant_of(operand) == 0)  # as in a gradient
    locate = _Rows(op, windows)

    def run(x: mx.array, indices: mx.array, update: mx.array) -> mx.array:
        index, fits = locate.index(indices)
        return locate.restore(put(locate.rows_of(x), index, locate.updates(update), fits))

    return run


class _Rows:
    """The operand as (rows, row), updates as (indices, row), and the index of each update's row."""

    __slots__ = ("known_to_fit", "last", "op", "order", "row", "rows", "windows")

    def __init__(self, op: Step, windows: Windows) -> None:
        moved = [d for d, (s, size) in enumerate(zip(windows.shape, windows.sizes, strict=True)) if size < s or d in windows.batching]
        self.op, self.windows = op, windows
        self.last = max(moved, default=-1) + 1
        self.rows, self.row = math.prod(windows.shape[: self.last]), math.prod(windows.shape[self.last :])
        update = op.operands[-1].type
        window = list(op.update_window_dims)
        self.order = [d for d in range(update.rank) if d not in set(window)] + window
        self.known_to_fit = _known_to_fit(windows, known(op.operands[len(op.results)]))

    def index(self, indices: mx.array) -> tuple[mx.array, mx.array | None]:
        """In bounds always; and whether the window fits, None if all do."""
        windows = self.windows
        linear = windows.linear(windows.starts(indices) if windows.moving else None, 0, self.last)
        fits = None if self.known_to_fit else _fits(windows, indices)
        if fits is not None:
            fits = mx.reshape(mx.broadcast_to(mx.reshape(fits, (windows.count, 1)), linear.shape), (-1,))
        return mx.reshape(linear, (-1,)), fits

    def rows_of(self, x: mx.array) -> mx.array:
        return mx.reshape(x, (self.rows, self.row))

    def updates(self, update: mx.array) -> mx.array:
        if self.order != sorted(self.order):
            update = mx.transpose(update, self.order)
        return mx.reshape(update, (-1, self.row))

    def restore(self, rows: mx.array) -> mx.array:
        return mx.reshape(rows, self.op.operand.shape)


def _known_to_fit(windows: Windows, indices: np.ndarray[Any, Any] | None) -> bool:
    if indices is None:
        return not windows.columns
    vectors = indices[..., None] if windows.index_vector_dim == indices.ndim else np.moveaxis(indices, windows.index_vector_dim, -1)
    last = [windows.shape[d] - windows.sizes[d] for d in windows.columns]
    return bool(((vectors >= 0) & (vectors <= np.array(last))).all())


def _unique(op: Step, windows: Windows, body: LoweredRegion) -> Run:
    """Any elementwise body where no element is updated twice: read the rows, apply the body to whole arrays, write them back."""
    count = len(op.results)
    locate = _Rows(op, windows)
    writers = [writer(op, "set", v.type) for v in op.results]

    def run(*arrays: mx.array) -> list[mx.array]:
        index, fits = locate.index(arrays[count])
        rows = [locate.rows_of(x) for x in arrays[:count]]
        updates = [locate.updates(u) for u in arrays[count + 1 :]]
        current = [mx.take(r, index, axis=0) for r in rows]
        new = [mx.broadcast_to(n, u.shape) for n, u in zip(body(*current, *updates), updates, strict=True)]
        return [locate.restore(put(r, index, n, fits)) for put, r, n in zip(writers, rows, new, strict=True)]

    return run
