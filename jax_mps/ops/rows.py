"""Writing rows of a matrix at indices that may repeat: what scatter does when it has several windows.

An update whose `fits` is false is dropped. In a small operand it goes to a spare row; a large one is not copied for that, the update is
made harmless instead.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.order import from_total_order, nan_at_end
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, TensorType

Combine = Callable[[mx.array, mx.array], mx.array]
Scatter = Callable[[mx.array, mx.array, mx.array], mx.array]  # rows (n, row), index (m,) in bounds, updates (m, row)
Put = Callable[[mx.array, mx.array, mx.array, mx.array | None], mx.array]  # the same and `fits` (m,)

# Bodies of one op: associative and commutative, so that duplicates may be combined in any order.
COMBINERS: dict[str, Combine] = {
    "stablehlo.add": mx.add,
    "stablehlo.multiply": mx.multiply,
    "stablehlo.minimum": mx.minimum,
    "stablehlo.maximum": mx.maximum,
    "stablehlo.and": mx.bitwise_and,
    "stablehlo.or": mx.bitwise_or,
    "stablehlo.xor": mx.bitwise_xor,
}

# How many times larger than the updates an operand must be to count as large
_LARGE = 8


def writer(op: Step, kind: str, type_: TensorType, *, to_zeros: bool = False) -> Put:
    """How one operand's rows are written; `kind` is "set" or the name of a combiner. to_zeros: the rows are known to be zero.

    Raises:
        Unsupported: the order of complex numbers.
    """
    dtype, on_gpu = type_.dtype, device_kind() != "cpu"
    wide_on_gpu = on_gpu and dtype in ("int64", "uint64", "complex64")
    if kind == "set":
        return _set_words if wide_on_gpu else _set
    if type_.is_complex and kind in ("stablehlo.minimum", "stablehlo.maximum"):
        raise Unsupported(op, "an order of complex numbers")
    if dtype == "bool":
        return _segmented(_LOGICAL[kind])
    if kind in ("stablehlo.and", "stablehlo.or", "stablehlo.xor"):
        return _segmented(COMBINERS[kind])
    if wide_on_gpu and (dtype != "complex64" or kind != "stablehlo.add"):
        return _segmented(COMBINERS[kind])
    if kind == "stablehlo.add":
        return _add(to_zeros=to_zeros)
    if kind == "stablehlo.multiply":
        return _dropping(_multiply, 1)
    return _ordered(kind, dtype) if type_.is_floating else _extreme(kind)


_LOGICAL: dict[str, Combine] = {
    "stablehlo.and": mx.bitwise_and, "stablehlo.multiply": mx.bitwise_and, "stablehlo.minimum": mx.bitwise_and,
    "stablehlo.or": mx.bitwise_or, "stablehlo.add": mx.bitwise_or, "stablehlo.maximum": mx.bitwise_or,
    "stablehlo.xor": mx.bitwise_xor,
}  # fmt: skip


def _is_large(rows: mx.array, updates: mx.array) -> bool:
    return bool(rows.size > _LARGE * updates.size)


def _spare(scatter: Scatter, rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
    """Scatter into one row more, where dropped updates go."""
    count = rows.shape[0]
    longer = mx.concatenate([rows, mx.zeros((1, rows.shape[1]), rows.dtype)])
    return scatter(longer, index if fits is None else mx.where(fits, index, mx.array(count, index.dtype)), updates)[:count]


def _is_in_words(rows: mx.array) -> bool:
    """Whether elements are parts of the 4-byte words that Metal writes. MLX writes into a slice that nobody else reads (0.32), which may begin
    inside of one; a new array does not."""
    return device_kind() == "metal" and rows.itemsize < 4


def _dropping(scatter: Scatter, neutral: float) -> Put:
    """Dropped updates of a large operand become the neutral element."""

    def put(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
        if _is_in_words(rows) or (fits is not None and not _is_large(rows, updates)):
            return _spare(scatter, rows, index, updates, fits)
        if fits is None:
            return scatter(rows, index, updates)
        return scatter(rows, index, mx.where(fits[:, None], updates, mx.array([neutral], updates.dtype)))  # not 0-d, see dtypes.literal

    return put


# ---- set -------------------------------------------------------------------------------------------------------------------------


def _set(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
    """The last of several updates wins on CPU, as with XLA; on a GPU any may, as with XLA."""
    if fits is None and not _is_in_words(rows):
        return _set_all(rows, index, updates)
    if fits is not None and not _is_in_words(rows) and _is_large(rows, updates):
        return _set_all(rows, *_resent(rows, index, updates, fits))
    return _spare(_set_all, rows, index, updates, fits)


def _set_all(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    if device_kind() == "cpu":
        flat = mx.put_along_axis(mx.reshape(rows, (-1,)), _elements(index, rows.shape[1]), mx.reshape(updates, (-1,)), axis=0)
        return mx.reshape(flat, rows.shape)
    rows = rows[...]  # assignment changes the Python object
    rows[index] = updates
    return rows


def _elements(index: mx.array, row: int) -> mx.array:
    """One index for each element of the rows: on CPU several times faster than MLX's scatter of rows."""
    if row == 1:
        return index
    return mx.reshape(index[:, None] * mx.array(row, index.dtype) + mx.arange(row, dtype=index.dtype), (-1,))


def _resent(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array) -> tuple[mx.array, mx.array]:
    """Each dropped update becomes a copy of the last that is not, which changes nothing; if all are, of what is there already."""
    position = mx.arange(index.size, dtype=mx.int32)
    last = mx.max(mx.where(fits, position, mx.array(-1, mx.int32)))
    chosen = mx.where(fits, position, mx.maximum(last, mx.array(0, mx.int32)))
    index, updates = mx.take(index, chosen), mx.take(updates, chosen, axis=0)
    return index, mx.where(last >= 0, updates, mx.take(rows, index[:1], axis=0))


def _set_words(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
    """GPUs scatter no 8-byte elements: write them as pairs of words."""
    return _set(rows.view(mx.uint32), index, updates.view(mx.uint32), fits).view(rows.dtype)


# ---- MLX's combiners -------------------------------------------------------------------------------------------------------------


def _add(*, to_zeros: bool) -> Put:
    in_place = _dropping(lambda rows, index, updates: rows.at[index].add(updates), -0.0)

    def put(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
        if not to_zeros and (device_kind() != "cpu" or _is_large(rows, updates)):
            return in_place(rows, index, updates, fits)
        target = index if fits is None else mx.where(fits, index, mx.array(rows.shape[0], index.dtype))
        total = sums(target, updates, (rows.shape[0], rows.shape[1]), rows.dtype, spare=fits is not None)
        return total if to_zeros else rows + total

    return put


def adds_itself(type_: TensorType) -> bool:
    """Whether MLX's own scatter adds elements of the type."""
    return type_.dtype != "bool" and (device_kind() == "cpu" or type_.dtype not in ("int64", "uint64"))


def sums(target: mx.array, updates: mx.array, shape: tuple[int, int], dtype: mx.Dtype, *, spare: bool) -> mx.array:
    """The sum of the updates of each of (count, row) rows. spare: a target of `count` drops its update.

    On CPU, MLX has its fast scatter-add (10 times, for short rows) only as the transpose of take_along_axis.
    """
    count, row = shape
    if device_kind() != "cpu":
        zeros = mx.zeros((count + spare, row) if row > 1 else (count + spare,), dtype)
        total = zeros.at[target].add(updates if row > 1 else mx.reshape(updates, (-1,)))
    else:
        elements = _elements(target, row)
        zeros = mx.zeros(((count + spare) * row,), dtype)
        _, (total,) = mx.vjp(lambda flat: mx.take_along_axis(flat, elements, axis=0), [zeros], [mx.reshape(updates, (-1,))])
        total = total[: count * row]
    return mx.reshape(total[:count] if device_kind() != "cpu" else total, shape)


def _multiply(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
    return rows.at[index].multiply(updates)


def _extreme(kind: str) -> Put:
    """min or max of integers."""

    def scatter(rows: mx.array, index: mx.array, updates: mx.array) -> mx.array:
        at = rows.at[index]
        return at.minimum(updates) if kind == "stablehlo.minimum" else at.maximum(updates)

    def put(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
        if fits is None and not _is_in_words(rows):
            return scatter(rows, index, updates)
        return _spare(scatter, rows, index, updates, fits)

    return put


def _ordered(kind: str, dtype: str) -> Put:
    """min or max of floats, as integers of the same order with NaN at the end that wins: MLX's own may lose a NaN."""
    extreme = _extreme(kind)
    nan_first = kind == "stablehlo.minimum"

    def put(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
        order = extreme(nan_at_end(rows, dtype, first=nan_first), index, nan_at_end(updates, dtype, first=nan_first), fits)
        return from_total_order(order, dtype)

    return put


# ---- combiners that MLX's scatter lacks -------------------------------------------------------------------------------------------


def _segmented(combine: Combine) -> Put:
    """Sort the updates by row, combine runs of equal rows by doubling, and write each run's total once."""

    def put(rows: mx.array, index: mx.array, updates: mx.array, fits: mx.array | None) -> mx.array:
        count = mx.array(rows.shape[0], index.dtype)
        index = index if fits is None else mx.where(fits, index, count)
        order = mx.argsort(index)
        index, updates = mx.take(index, order), mx.take(updates, order, axis=0)
        updates = _scan_runs(combine, index, updates)
        ends = mx.concatenate([index[1:] != index[:-1], mx.array([True])]) & (index != count)
        index = mx.where(ends, index, mx.array(0, index.dtype))
        total = combine(mx.take(rows, index, axis=0), updates)
        put_all = _set_words if device_kind() != "cpu" and rows.itemsize == 8 else _set
        return put_all(rows, index, total, ends)

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
