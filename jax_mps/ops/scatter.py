"""scatter, in its general form. An update window that does not fit into the operand is dropped whole, as XLA does.

Several windows become linear indices (ops/indexing.py) into rows of the operand; a single one is a `slice_update`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops import bins
from jax_mps.ops.bodies import constant_of
from jax_mps.ops.dtypes import MX
from jax_mps.ops.indexing import Windows, batch_shape, batching_axes, counting, known
from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.ops.rows import COMBINERS, adds_itself, sums, writer
from jax_mps.ops.slices import clamp_starts
from jax_mps.ops.target import device_kind
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
    if windows.count <= _FEW and (None in kinds or math.prod(windows.sizes) >= _BIG) and update_computation.is_elementwise:
        return _few_windows(op, windows, update_computation, is_set=set(kinds) == {"set"})
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
        wrapped=op.attributes.get("wrapped", False),
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
        window = _Window(windows.shape, windows.sizes, tuple(windows.moving))
        if place:
            window.place = place
        else:
            fits = _fits(windows, indices)
            window.fits = None if fits is None else mx.reshape(fits, ())
            window.start = mx.reshape(windows.starts(indices), (-1,)) if windows.moving else None
        new = [mx.reshape(u, windows.sizes) for u in updates]
        return window.update(inputs, new, None if all(plain_set) else body)

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
    """One window: where it is known (`place`), or from clamped starts along `axes`; `fits` is a scalar, None if it is known to fit."""

    __slots__ = ("axes", "fits", "place", "sizes", "start", "whole")

    def __init__(self, shape: tuple[int, ...], sizes: tuple[int, ...], axes: tuple[int, ...]) -> None:
        self.sizes, self.axes, self.whole = sizes, axes, sizes == shape
        self.place: Place = tuple(slice(0, s) for s in sizes)
        self.start: mx.array | None = None
        self.fits: mx.array | None = None

    def update(self, inputs: Sequence[mx.array], updates: list[mx.array], body: LoweredRegion | None) -> list[mx.array]:
        """Combine by the body (None: set) and write back."""
        if body is None and self.fits is None:
            return [self.write(x, u) for x, u in zip(inputs, updates, strict=True)]
        old = [self.read(x) for x in inputs]
        if body is not None:
            updates = [mx.broadcast_to(u, self.sizes) for u in body(*old, *updates)]
        if self.fits is not None:
            updates = [mx.where(self.fits, u, o) for u, o in zip(updates, old, strict=True)]
        return [self.write(x, u) for x, u in zip(inputs, updates, strict=True)]

    def read(self, x: mx.array) -> mx.array:
        if self.whole:
            return x
        return x[self.place] if self.start is None else mx.slice(x, self.start, self.axes, self.sizes)

    def write(self, x: mx.array, window: mx.array) -> mx.array:
        if self.whole:
            return window
        if self.start is not None:
            return mx.slice_update(x, window, self.start, self.axes)
        x = x[...]  # assignment changes the Python object
        x[self.place] = window
        return x


# ---- few windows -----------------------------------------------------------------------------------------------------------------

_FEW, _BIG = 16, 4096  # windows; elements of one


def _few_windows(op: Step, windows: Windows, body: LoweredRegion, *, is_set: bool) -> Run:
    """One after the other: any body, whatever repeats, and no index for each element of big windows."""
    count, locate = len(op.results), _Rows(op, windows)
    batching = {d: axis for d, axis in windows.batching.items() if windows.shape[d] > 1}
    axes = (*windows.moving, *batching)
    fixed = np.array([[at[axis] for axis in batching.values()] for at in np.ndindex(*windows.batch)], np.int32)

    def run(*arrays: mx.array) -> list[mx.array]:
        current, indices = list(arrays[:count]), arrays[count]
        parts = [mx.reshape(windows.starts(indices), (windows.count, -1))] if windows.moving else []
        parts += [mx.array(fixed)] if batching else []
        starts = mx.concatenate(parts, axis=1) if parts else None
        fits = None if locate.known_to_fit else _fits(windows, indices)
        updates = [mx.reshape(mx.transpose(u, locate.order), (windows.count, *windows.sizes)) for u in arrays[count + 1 :]]
        for i in range(windows.count):
            window = _Window(windows.shape, windows.sizes, axes)
            window.start = None if starts is None else starts[i]
            window.fits = None if fits is None else mx.reshape(fits, (-1,))[i]
            current = window.update(current, [u[i] for u in updates], None if is_set else body)
        return current

    return run


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
    to_zeros = constant_of(operand) == 0  # as in a gradient
    if to_zeros and kind == "stablehlo.add" and device_kind() != "cpu" and _is_one_a_line(op, windows):
        return _one_a_line(op, windows)
    locate = _Rows(op, windows)
    if to_zeros and kind == "stablehlo.add" and windows.line == 0 == locate.last - 1 and adds_itself(operand.type):
        if locate.row == 1 and bins.fits(operand.dtype, op.operands[len(op.results)].dtype, windows.count, locate.rows):
            summed = functools.partial(bins.sums, bins=locate.rows, dtype=operand.dtype, wrapped=windows.wrapped)
            return lambda x, indices, update: locate.restore(summed(indices, update))
        zeros, spare = MX[operand.dtype], not locate.known_to_fit
        return lambda x, indices, update: locate.restore(sums(windows.targets(indices), locate.updates(update), (locate.rows, locate.row), zeros, spare=spare))
    put = writer(op, kind, operand.type, to_zeros=to_zeros)

    def run(x: mx.array, indices: mx.array, update: mx.array) -> mx.array:
        index, fits = locate.index(indices)
        return locate.restore(put(locate.rows_of(x), index, locate.updates(update), fits))

    return run


def _is_one_a_line(op: Step, windows: Windows) -> bool:
    """Whether each line along one dimension gets one element, and every other dimension goes along with the same one of the indices."""
    axis, rank = windows.line, op.operand.rank
    if axis is None or len(windows.batch) != rank or any(s != 1 for s in windows.sizes) or op.operands[-1].shape != windows.batch:
        return False
    return windows.batch[axis] == 1 and windows.batching == {d: d for d in range(rank) if d != axis}


def line_of(op: Step) -> int | None:
    """The dimension along which each line gets one number added, if every other one goes along with the same one of the indices."""
    if len(op.results) != 1 or op.results[0].type != op.operand or body_of(op.regions[0], 0) != "stablehlo.add":
        return None
    windows = _windows(op)
    return windows.line if _is_one_a_line(op, windows) else None


def _one_a_line(op: Step, windows: Windows) -> Run:
    """Into zeros: a comparison of positions, which the ops after it are fused with, where a scatter writes and they read all of it."""
    axis, shape = windows.line, op.operand.shape
    assert axis is not None
    positions = [-1 if d == axis else 1 for d in range(len(shape))]

    def run(x: mx.array, indices: mx.array, update: mx.array) -> mx.array:
        target = windows.unbounded(mx.reshape(indices, windows.batch))
        here = mx.reshape(counting(shape[axis], target.dtype), positions) == target
        return mx.where(here, update, mx.array(0, update.dtype))

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
