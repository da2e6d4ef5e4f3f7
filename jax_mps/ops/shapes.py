"""Ops that rearrange elements by static rules: broadcast, reshape, transpose, concatenate, reverse, pad, iota.

The `dynamic_*` forms are here when their result type is static: the shape operand then says nothing that the type does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.dtypes import MX, mx_array
from jax_mps.ops.registry import Run, defining_step, lowers
from jax_mps.ops.strided import concatenated
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, TensorType

Shape = tuple[int, ...]


def empty(kind: TensorType) -> mx.array:
    """An array of the type's shape, which has no elements."""
    return mx.zeros(kind.shape, MX[kind.dtype])


@lowers("stablehlo.broadcast_in_dim")
def broadcast_in_dim(op: Step) -> Run:
    step = defining_step(op.operands[0])
    if step is not None and step.name == "stablehlo.constant" and op.operand.rank == 0 and small_on_cpu(op.result):
        value = np.broadcast_to(step.value, op.result.shape)
        return lambda x: mx_array(value, op.result.dtype)
    return _broadcast(op.operand.shape, tuple(op.broadcast_dimensions), op.result.shape)


def small_on_cpu(kind: TensorType) -> bool:
    """Whether a splat is cheaper as bytes: on CPU each op of a graph costs 1 us; on a GPU a fused kernel has scalars in its source."""
    return device_kind() == "cpu" and 0 < kind.nbytes <= 256


@lowers("stablehlo.dynamic_broadcast_in_dim")
def dynamic_broadcast_in_dim(op: Step) -> Run:
    return _first_operand(broadcast_in_dim(op))


@lowers("stablehlo.broadcast")
def broadcast(op: Step) -> Run:
    added = len(op.broadcast_sizes)
    return _broadcast(op.operand.shape, tuple(range(added, added + op.operand.rank)), op.result.shape)


def _broadcast(operand: Shape, dimensions: Shape, result: Shape) -> Run:
    order = sorted(range(len(operand)), key=lambda axis: dimensions[axis])  # the spec lets them come in any order
    aligned = [1] * len(result)
    for axis, dimension in enumerate(dimensions):
        aligned[dimension] = operand[axis]
    sorted_already = order == list(range(len(operand)))
    while len(aligned) > len(operand) and aligned[0] == 1:
        del aligned[0]  # MLX aligns at the end: no reshape, which costs an op and ends a fused kernel

    def run(x: mx.array) -> mx.array:
        x = x if sorted_already else mx.transpose(x, order)
        return mx.broadcast_to(mx.reshape(x, aligned), result)

    return run


@lowers("stablehlo.reshape")
def reshape(op: Step) -> Run:
    shape = op.result.shape
    return lambda x: mx.reshape(x, shape)


@lowers("stablehlo.dynamic_reshape")
def dynamic_reshape(op: Step) -> Run:
    return _first_operand(reshape(op))


@lowers("stablehlo.transpose")
def transpose(op: Step) -> Run:
    permutation = tuple(op.permutation)
    if permutation == tuple(range(len(permutation))):
        return lambda x: x
    return lambda x: mx.transpose(x, permutation)


def arranged(x: mx.array, permutation: Sequence[int], shape: Shape) -> mx.array:
    """Transposed, then reshaped: by the latter alone where only dimensions of size 1 move, since each view is an op."""
    moved = [d for d in permutation if x.shape[d] != 1]
    return mx.reshape(x if moved == sorted(moved) else mx.transpose(x, permutation), shape)


@lowers("stablehlo.concatenate")
def concatenate(op: Step) -> Run:
    axis = op.dimension
    kept = [i for i, v in enumerate(op.operands) if v.shape[axis]]
    lines = device_kind() != "cpu" and 1 < op.result.shape[axis] == len(kept) <= _FEW_LINES and op.result.size <= _SMALL

    def run(*inputs: mx.array) -> mx.array:
        parts = [inputs[i] for i in kept] or [inputs[0]]
        if lines:
            place = mx.reshape(mx.array(list(range(len(parts))), mx.int32), [-1 if d == axis else 1 for d in range(op.result.rank)])
            return _chosen(parts, place, 0)
        return parts[0] if len(parts) == 1 else concatenated(parts, axis, op.result.shape)

    return run


# On a GPU, MLX copies each operand by a kernel of its own; lines of a small array are chosen by comparisons, which become one (with `mx.compile`).
_FEW_LINES, _SMALL = 16, 1 << 18


def _chosen(parts: list[mx.array], place: mx.array, first: int) -> mx.array:
    """At each place, what the part of that number has there."""
    if len(parts) == 1:
        return parts[0]
    middle = len(parts) // 2
    low, high = _chosen(parts[:middle], place, first), _chosen(parts[middle:], place, first + middle)
    return mx.where(place < mx.array(first + middle, mx.int32), low, high)


@lowers("stablehlo.reverse")
def reverse(op: Step) -> Run:
    dimensions = [d for d in op.dimensions if op.operand.shape[d] > 1]
    if not dimensions:
        return lambda x: x
    if device_kind() == "metal":
        return lambda x: _take_reversed(x, dimensions)
    index = tuple(slice(None, None, -1 if d in dimensions else 1) for d in range(op.operand.rank))
    return lambda x: x[index]


def _take_reversed(x: mx.array, dimensions: Sequence[int]) -> mx.array:
    """Views of negative stride are reduced and sorted wrongly on Metal (mlx#4528, mlx#4225)."""
    for d in dimensions:
        x = mx.take(x, mx.arange(x.shape[d] - 1, -1, -1), axis=d)
    return x


# ---- pad -------------------------------------------------------------------------------------------------------------------------


@lowers("stablehlo.pad")
def pad(op: Step) -> Run:
    source, place = _overlap(op)
    shape = op.result.shape
    if op.result.size == 0:
        return lambda x, padding_value: empty(op.result)
    if op.result.rank == 0:
        return lambda x, padding_value: x
    if any(s.start >= s.stop for s in source):
        return lambda x, padding_value: mx.broadcast_to(padding_value, shape)
    if all(p == slice(0, d, 1) for p, d in zip(place, shape, strict=True)):
        return lambda x, padding_value: x[source]

    def run(x: mx.array, padding_value: mx.array) -> mx.array:
        result = mx.broadcast_to(padding_value, shape)
        result[place] = x[source]
        return result

    return run


def _overlap(op: Step) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """For each dimension: which elements of the operand are kept, and where in the result they go."""
    source: list[slice] = []
    place: list[slice] = []
    for axis, size in enumerate(op.result.shape):
        low, step = op.edge_padding_low[axis], op.interior_padding[axis] + 1
        first = max(0, -(low // step))  # the first operand index that lands at or after 0
        stop = min(op.operand.shape[axis], -((low - size) // step))
        source.append(slice(first, stop))
        # One kept element has no step: MLX then sees a plain window
        place.append(slice(low + first * step, low + (stop - 1) * step + 1, step if stop - first > 1 else 1))
    return tuple(source), tuple(place)


@lowers("stablehlo.dynamic_pad")
def dynamic_pad(op: Step) -> Run:
    """The amounts are read at run time: each dimension of the result takes its elements of the operand, then the rest is padding."""
    if 0 in op.operand.shape or 0 in op.result.shape:
        return lambda x, padding_value, low, high, interior: mx.broadcast_to(padding_value, op.result.shape)

    def run(x: mx.array, padding_value: mx.array, low: mx.array, high: mx.array, interior: mx.array) -> mx.array:
        low, step = low.astype(mx.int64), interior.astype(mx.int64) + 1
        inside = mx.array(True)
        for axis, size in enumerate(op.result.shape):
            offset = mx.arange(size, dtype=mx.int64) - low[axis]
            index = mx.floor_divide(offset, step[axis])
            last = op.operand.shape[axis] - 1
            kept = (offset == index * step[axis]) & (index >= 0) & (index <= last)
            x = mx.take(x, mx.clip(index, 0, last), axis=axis)
            inside = inside & mx.reshape(kept, [size if d == axis else 1 for d in range(op.result.rank)])
        return mx.where(inside, x, padding_value)

    return run


# ---- iota, sizes -----------------------------------------------------------------------------------------------------------------


@lowers("stablehlo.iota")
def iota(op: Step) -> Run:
    dimension, kind = op.iota_dimension, op.result
    if kind.size == 0:
        return lambda: empty(kind)
    aligned = [size if d == dimension else 1 for d, size in enumerate(kind.shape)]
    # arange in a half type accumulates rounding errors, and has no bool
    wide = MX[kind.dtype] if kind.is_integer and kind.dtype not in _NARROW else mx.int32

    def run() -> mx.array:
        line = mx.arange(kind.shape[dimension], dtype=wide).astype(MX[kind.dtype])
        return mx.broadcast_to(mx.reshape(line, aligned), kind.shape)

    return run


_NARROW = frozenset(["int8", "uint8", "int16", "uint16"])


@lowers("stablehlo.dynamic_iota")
def dynamic_iota(op: Step) -> Run:
    run = iota(op)
    return lambda output_shape: run()


@lowers("stablehlo.get_dimension_size")
def get_dimension_size(op: Step) -> Run:
    size = op.operand.shape[op.dimension]
    return lambda x: mx.array(size, mx.int32)


@lowers("stablehlo.set_dimension_size")
def set_dimension_size(op: Step) -> Run:
    raise Unsupported(op, "a dimension whose size is known only at run time")


def _first_operand(run: Callable[[mx.array], mx.array]) -> Run:
    return lambda x, *rest: run(x)
