"""scatter, in its general form. An update window that does not fit into the operand is dropped whole, as XLA does.

Several windows become linear indices (ops/indexing.py) into rows of the operand; a single one is a `slice_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.dtypes import MX
from jax_mps.ops.indexing import Windows, batch_shape, batching_axes
from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.ops.slices import clamp_starts
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, TensorType

Combine = Callable[[mx.array, mx.array], mx.array]

# Bodies of one op: associative and commutative, so that duplicates may be combined in any order.
_COMBINERS: dict[str, Combine] = {
    "stablehlo.add": mx.add,
    "stablehlo.multiply": mx.multiply,
    "stablehlo.minimum": mx.minimum,
    "stablehlo.maximum": mx.maximum,
    "stablehlo.and": mx.bitwise_and,
    "stablehlo.or": mx.bitwise_or,
    "stablehlo.xor": mx.bitwise_xor,
}


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
        singles = [_many_windows(op, windows, kind, v.type) for kind, v in zip(kinds, op.results, strict=True) if kind is not None]
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
    if step is None or step.name not in _COMBINERS or set(step.operands) != {old, new}:
        return None
    return step.name


# ---- one window ------------------------------------------------------------------------------------------------------------------


def _one_window(op: Step, windows: Windows, body: LoweredRegion) -> Run:
    """Read the window, combine, write it back: any body, any type, nothing but the window is touched."""
    count, moving = len(op.results), tuple(windows.moving)
    plain_set = [body_of(body.region, i) == "set" for i in range(count)]
    if not all(plain_set) and not body.is_elementwise:
        raise Unsupported(op, "an update computation that is not elementwise")

    def run(*arrays: mx.array) -> list[mx.array]:
        inputs, indices, updates = arrays[:count], arrays[count], arrays[count + 1 :]
        fits = _fits(windows, indices)
        start = mx.reshape(windows.starts(indices), (len(moving),)) if moving else None
        old = [x if start is None else mx.slice(x, start, moving, windows.sizes) for x in inputs]
        new = [mx.reshape(u, windows.sizes) for u in updates]
        if not all(plain_set):
            new = [mx.broadcast_to(n, windows.sizes) for n in body(*old, *new)]
        if fits is not None:
            new = [mx.where(fits, n, o) for n, o in zip(new, old, strict=True)]
        return [_write(x, n, start, windows) for x, n in zip(inputs, new, strict=True)]

    return run


def _write(x: mx.array, window: mx.array, start: mx.array | None, windows: Windows) -> mx.array:
    if start is not None:
        return mx.slice_update(x, window, start, tuple(windows.moving))
    if windows.sizes == windows.shape:
        return window
    return mx.slice_update(x, window, mx.zeros((len(windows.sizes),), mx.int32), tuple(range(len(windows.sizes))))


def _fits(windows: Windows, indices: mx.array) -> mx.array | None:
    """For each window (shape `batch`): whether it lies inside the operand. None: all do."""
    if not windows.columns:
        return None
    vectors = windows.vectors(indices)
    last = [windows.shape[d] - windows.sizes[d] for d in windows.columns]
    inside = clamp_starts(vectors, last).astype(vectors.dtype) == vectors
    return mx.reshape(inside, windows.batch) if len(last) == 1 else mx.all(inside, axis=-1)


# ---- many windows ----------------------------------------------------------------------------------------------------------------


def _many_windows(op: Step, windows: Windows, kind: str, type_: TensorType) -> Run:
    if kind == "keep":
        return lambda x, indices, update: x
    put = _writer(op, kind, type_)
    locate = _Rows(op, windows)

    def run(x: mx.array, indices: mx.array, update: mx.array) -> mx.array:
        index = locate.index(indices)
        return locate.restore(put(locate.rows_of(x), index, locate.updates(update)))

    return run


class _Rows:
    """The operand as (rows, row), updates as (indices, row), and the index of each update's row; `rows` stands for "dropped"."""

    __slots__ = ("last", "op", "order", "row", "rows", "windows")

    def __init__(self, op: Step, windows: Windows) -> None:
        moved = [d for d, (s, size) in enumerate(zip(windows.shape, windows.sizes, strict=True)) if size < s or d in windows.batching]
        self.op, self.windows = op, windows
        self.last = max(moved, default=-1) + 1
        self.rows, self.row = math.prod(windows.shape[: self.last]), math.prod(windows.shape[self.last :])
        update = op.operands[-1].type
        window = list(op.update_window_dims)
        self.order = [d for d in range(update.rank) if d not in set(window)] + window

    def index(self, indices: mx.array) -> mx.array:
        windows = self.windows
        starts = windows.starts(indices) if windows.moving else None
        linear = windows.linear(starts, 0, self.last)
        fits = _fits(windows, indices)
        if fits is not None:
            linear = mx.where(mx.reshape(fits, (windows.count, 1)), linear, mx.array(self.rows, linear.dtype))
        return mx.reshape(linear, (-1,))

    def rows_of(self, x: mx.array) -> mx.array:
        return mx.reshape(x, (self.rows, self.row))

    def updates(self, update: mx.array) -> mx.array:
        if self.order != sorted(self.order):
            update = mx.transpose(update, self.order)
        return mx.reshape(update, (-1, self.row))

    def restore(self, rows: mx.array) -> mx.array:
        return mx.reshape(rows, self.op.operand.shape)


Put = Callable[[mx.array, mx.array, mx.array], mx.array]  # rows (n, row), index (m,) in 0..n where n is dropped, updates (m, row)


def _writer(op: Step, kind: str, type_: TensorType) -> Put:
    wide_on_gpu = device_kind() != "cpu" and type_.dtype in ("int64", "uint64", "complex64")
    if kind == "set":
        return _set_words if wide_on_gpu else _set
    if kind in ("stablehlo.and", "stablehlo.or", "stablehlo.xor"):
        return _segmented(_logical(kind) if type_.dtype == "bool" else _COMBINERS[kind])
    if wide_on_gpu and (type_.dtype != "complex64" or kind != "stablehlo.add"):
        return _segmented(_COMBINERS[kind])
    if type_.dtype == "bool":
        return _segmented(_logical({"add": "or", "maximum": "or"}.get(kind.removeprefix("stablehlo."), "and")))
    if type_.is_complex and kind not in ("stablehlo.add", "stablehlo.multiply"):
        raise Unsupported(op, "an order of complex numbers")
    if kind in ("stablehlo.minimum", "stablehlo.maximum"):
        return _ordered(kind, type_) if type_.is_floating else _extreme(kind)
    return _add if kind == "stablehlo.add" else _multiply


def _with_spare(rows: mx.array) -> mx.array:
    """One row more, where dropped updates go."""
    return mx.concatenate([rows, mx.zeros((1, rows.shape[1]), rows.dtype)])


def _set(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    """The last of several updates wins on CPU, as with XLA; on a GPU any may, as with XLA."""
    count, row = rows.shape
    spare = _with_spare(rows)
    if device_kind() != "cpu":
        spare[index] = updates
        return spare[:count]
    flat = mx.put_along_axis(mx.reshape(spare, (-1,)), _elements(index, row), mx.reshape(updates, (-1,)), axis=0)
    return mx.reshape(flat[: count * row], rows.shape)


def _elements(index: mx.array, row: int) -> mx.array:
    """One index for each element of the rows: on CPU several times faster than MLX's scatter of rows."""
    if row == 1:
        return index
    return mx.reshape(index[:, None] * mx.array(row, index.dtype) + mx.arange(row, dtype=index.dtype), (-1,))


def _set_words(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    """GPUs scatter no 8-byte elements: write them as pairs of words."""
    return _set(rows.view(mx.uint32), index, updates.view(mx.uint32)).view(rows.dtype)


def _add(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    count, row = rows.shape
    if device_kind() != "cpu":
        return _with_spare(rows).at[index].add(updates)[:count]
    elements, size = _elements(index, row), (count + 1) * row

    def take(flat: mx.array) -> mx.array:
        return mx.take_along_axis(flat, elements, axis=0)

    # MLX has its fast scatter-add only as the transpose of take_along_axis
    _, (sums,) = mx.vjp(take, [mx.zeros((size,), rows.dtype)], [mx.reshape(updates, (-1,))])
    return rows + mx.reshape(sums[: count * row], rows.shape)


def _multiply(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    return _with_spare(rows).at[index].multiply(updates)[: rows.shape[0]]


def _extreme(kind: str) -> Put:
    def put(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
        at = _with_spare(rows).at[index]
        return (at.minimum(updates) if kind == "stablehlo.minimum" else at.maximum(updates))[: rows.shape[0]]

    return put


_BITS_OF = {"float16": mx.int16, "bfloat16": mx.int16, "float32": mx.int32}
_LAST = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}  # a NaN's bits; its complement orders below -inf


def _ordered(kind: str, type_: TensorType) -> Put:
    """Floats as integers of the same order, NaN beyond the end that wins: MLX's own min and max of floats may lose a NaN."""
    bits = _BITS_OF[type_.dtype]
    flip = mx.array(0x7FFF if bits == mx.int16 else 0x7FFFFFFF, bits)
    last = _LAST[type_.dtype]
    nan = mx.array(last if kind == "stablehlo.maximum" else ~last, bits)
    extreme = _extreme(kind)

    def swap(i: mx.array) -> mx.array:
        return mx.where(i < 0, i ^ flip, i)

    def encode(x: mx.array) -> mx.array:
        return mx.where(mx.isnan(x), nan, swap(x.view(bits)))

    def put(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
        return swap(extreme(encode(rows), index, encode(updates))).view(MX[type_.dtype])

    return put


def _logical(kind: str) -> Combine:
    return {"stablehlo.and": mx.logical_and, "and": mx.logical_and, "stablehlo.xor": mx.not_equal}.get(kind, mx.logical_or)


# ---- combiners that MLX's scatter lacks -------------------------------------------------------------------------------------------


def _segmented(combine: Combine) -> Put:
    """Sort the updates by row, combine runs of equal rows by doubling, and write each run's total once."""

    def put(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
        count = rows.shape[0]
        order = mx.argsort(index)
        index, updates = index[order], updates[order]
        updates = _scan_runs(combine, index, updates)
        ends = mx.concatenate([index[1:] != index[:-1], mx.array([True])])
        index = mx.where(ends, index, mx.array(count, index.dtype))
        current = _with_spare(rows)[index]
        total = combine(current, updates)
        return (_set_words if device_kind() != "cpu" and rows.itemsize == 8 else _set)(rows, index, total)

    return put


def _scan_runs(combine: Combine, index: mx.array, updates: mx.array) -> mx.array:
    """Inclusive scan within runs of equal `index`: log2 steps over whole arrays."""
    step, size = 1, index.shape[0]
    while step < size:
        same = (index[step:] == index[:-step])[:, None]
        later = mx.where(same, combine(updates[:-step], updates[step:]), updates[step:])
        updates = mx.concatenate([updates[:step], later])
        step *= 2
    return updates


# ---- any elementwise body, unique indices -----------------------------------------------------------------------------------------


def _unique(op: Step, windows: Windows, body: LoweredRegion) -> Run:
    """Read the rows, apply the body to whole arrays, write them back."""
    count = len(op.results)
    locate = _Rows(op, windows)
    writers = [_writer(op, "set", v.type) for v in op.results]

    def run(*arrays: mx.array) -> list[mx.array]:
        index = locate.index(arrays[count])
        rows = [locate.rows_of(x) for x in arrays[:count]]
        updates = [locate.updates(u) for u in arrays[count + 1 :]]
        current = [_with_spare(r)[index] for r in rows]
        new = [mx.broadcast_to(n, u.shape) for n, u in zip(body(*current, *updates), updates, strict=True)]
        return [locate.restore(put(r, index, n)) for put, r, n in zip(writers, rows, new, strict=True)]

    return run

