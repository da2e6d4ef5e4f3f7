"""What gather and scatter share: where their windows lie in the operand, as linear indices into merged dimensions.

The operand is seen as (before, rows, row): dimensions `first` to `last` are merged into `rows`, and every element of a window that lies
in those dimensions gets an index of its own; a run of whole trailing dimensions is copied as one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps.ops.registry import defining_step
from jax_mps.ops.slices import clamp_starts
from jax_mps.plan.types import Step, TensorType, Value, numpy_dtype

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of one op.

    shape: of the operand. sizes: of a window, one per operand dimension. batch: of the indices without `index_vector_dim`.
    columns: operand dimension -> component of the index vector. batching: operand dimension -> axis of `batch`.
    wrapped: negative components count from the end of their dimension, as a rewrite found out (rewrites/indices.py).
    """

    shape: Shape
    sizes: Shape
    batch: Shape
    columns: Mapping[int, int]
    batching: Mapping[int, int]
    index_vector_dim: int
    wrapped: bool = False

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(self.batch)

    @property
    def moving(self) -> dict[int, int]:
        """Dimensions along which windows differ by the index vector -> component; a window as long as its dimension starts at 0."""
        return {d: self.columns[d] for d in sorted(self.columns) if self.sizes[d] < self.shape[d]}

    @property
    def indexed(self) -> tuple[int, ...]:
        """Dimensions whose position depends on the window."""
        return tuple(sorted({*self.moving, *self.batching}))

    def vectors(self, indices: mx.array) -> mx.array:
        """The index array with its vectors along the last axis, counted from the start."""
        if self.wrapped:
            indices = self._from_start(indices, next(self.shape[d] for d in self.columns))
        if self.index_vector_dim == indices.ndim:
            return indices[..., None]
        return indices if self.index_vector_dim == indices.ndim - 1 else mx.moveaxis(indices, self.index_vector_dim, -1)

    @property
    def line(self) -> int | None:
        """The only dimension that windows are spread along, if they are one element thick there."""
        return next(iter(self.moving)) if len(self.moving) == 1 == len(self.columns) and self.sizes[next(iter(self.moving))] == 1 else None

    def positions(self, indices: mx.array) -> mx.array:
        """Along `line`, flat and clamped; of `wrapped` ones, those below 0 count from the end, as MLX's own indices do."""
        assert self.line is not None
        size = self.shape[self.line]
        flat = mx.reshape(indices, (-1,))
        if not self.wrapped:
            return clamp_starts(flat, [size - 1])
        wide = flat.astype(mx.int32) if flat.dtype in (mx.int8, mx.int16) else flat
        return mx.minimum(mx.maximum(wide, mx.array(-size, wide.dtype)), mx.array(size - 1, wide.dtype)).astype(mx.int32)

    def targets(self, indices: mx.array) -> mx.array:
        """Along `line`, flat, as unsigned integers; those that lie outside become the dimension's size."""
        assert self.line is not None
        size = self.shape[self.line]
        flat = mx.reshape(indices, (-1,))
        wide = self.unbounded(flat)
        unsigned = wide.view(mx.uint32 if wide.itemsize == 4 else mx.uint64)  # negative ones become large
        return mx.minimum(unsigned, mx.array(size, unsigned.dtype)).astype(mx.uint32)

    def unbounded(self, indices: mx.array) -> mx.array:
        """Along `line`, counted from the start, in 32 bits at least; outside as they are."""
        assert self.line is not None
        wide = indices if indices.dtype in (mx.int32, mx.uint32, mx.int64, mx.uint64) else indices.astype(mx.int32)
        return self._from_start(wide, self.shape[self.line]) if self.wrapped else wide

    @staticmethod
    def _from_start(indices: mx.array, size: int) -> mx.array:
        return mx.where(indices < mx.array(0, indices.dtype), indices + mx.array(size, indices.dtype), indices)

    def starts(self, indices: mx.array) -> mx.array:
        """Clamped start of each window along the moving dimensions, int32: batch + (number of them,)."""
        vectors, chosen = self.vectors(indices), list(self.moving.values())
        if chosen != list(range(vectors.shape[-1])):
            vectors = mx.take(vectors, mx.array(chosen), axis=-1) if len(chosen) > 1 else vectors[..., chosen[0] : chosen[0] + 1]
        return clamp_starts(vectors, [self.shape[d] - self.sizes[d] for d in self.moving])

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """(elements, stride) of the windows' own extent in dimensions `first` to `last`, whole inner dimensions merged."""
        found: list[tuple[int, int]] = []
        for d in range(first, last):
            stride = math.prod(self.shape[d + 1 : last])
            if self.sizes[d] == 1:
                continue
            if found and self.sizes[d] == self.shape[d] and found[-1][1] == stride * self.shape[d]:
                found[-1] = (found[-1][0] * self.sizes[d], stride)
            else:
                found.append((self.sizes[d], stride))
        return found

    def linear(self, starts: mx.array | None, first: int, last: int) -> mx.array:
        """Index into the merged dimensions of each window's elements: batch + window extents, flattened to one axis for each of the two.

        starts: as `starts` gives them, None if nothing moves.
        """
        dtype = mx.int32 if math.prod(self.shape[first:last]) < 2**31 - 1 else mx.int64
        strides = {d: math.prod(self.shape[d + 1 : last]) for d in range(first, last)}
        total = mx.zeros(self.batch, dtype) if starts is None else _dot(starts.astype(dtype), [strides[d] for d in self.moving])
        for d, axis in self.batching.items():
            if self.batch[axis] > 1:
                total = total + _along(mx.arange(self.batch[axis], dtype=dtype) * strides[d], axis, len(self.batch))
        runs = self.runs(first, last)
        total = mx.reshape(total, (self.count,) + (1,) * len(runs))
        for axis, (size, stride) in enumerate(runs):
            total = total + _along(mx.arange(size, dtype=dtype) * stride, 1 + axis, 1 + len(runs))
        return mx.reshape(total, (self.count, math.prod(size for size, _ in runs)))


def _dot(starts: mx.array, strides: Sequence[int]) -> mx.array:
    if len(strides) == 1:
        line = mx.reshape(starts, starts.shape[:-1])
        return line if strides[0] == 1 else line * mx.array(strides[0], starts.dtype)
    return mx.sum(starts * mx.array(list(strides), starts.dtype), axis=-1).astype(starts.dtype)


def _along(line: mx.array, axis: int, rank: int) -> mx.array:
    return mx.reshape(line, [-1 if d == axis else 1 for d in range(rank)])


def counting(size: int, dtype: mx.Dtype) -> mx.array:
    """0, 1, 2, ...: a constant where it is short, since MLX fuses no arange."""
    if size * dtype.size > _LARGEST_COUNT:
        return mx.arange(size, dtype=dtype)
    return mx.array(list(range(size)), dtype)


_LARGEST_COUNT = 2048  # bytes


def batch_shape(indices: TensorType, index_vector_dim: int) -> Shape:
    """The shape of an index array without its `index_vector_dim`."""
    return tuple(s for d, s in enumerate(indices.shape) if d != index_vector_dim)


def batching_axes(operand_dims: Sequence[int], indices_dims: Sequence[int], index_vector_dim: int) -> dict[int, int]:
    """Operand batching dimension -> axis of the batch shape."""
    return {d: i - (i > index_vector_dim) for d, i in zip(operand_dims, indices_dims, strict=True)}


# ---- indices known now -----------------------------------------------------------------------------------------------------------

_LARGEST_KNOWN, _DEEPEST_KNOWN = 4096, 12  # elements; steps, since shared operands are computed again


def known(value: Value) -> np.ndarray[Any, Any] | None:
    """The value of an index array that the program computes from constants, as `x.at[3]` and `x.at[::2]` do; None if it is not known."""
    return evaluated(value, defining_step, _LARGEST_KNOWN)


def evaluated(value: Value, maker: Callable[[Value], Step | None], largest: int, depth: int = 0) -> np.ndarray[Any, Any] | None:
    """The value of an array of integers or bools that is computed from constants, of at most `largest` elements; None if it is not known.

    maker: the step that makes a value.
    """
    step = maker(value)
    if step is None or step.name not in _KNOWN or value.type.size > largest or depth == _DEEPEST_KNOWN or value.type.is_floating:
        return None
    operands = [evaluated(v, maker, largest, depth + 1) for v in step.operands]
    if any(x is None for x in operands):
        return None
    with np.errstate(over="ignore"):
        return np.asarray(_KNOWN[step.name](step, *operands)).astype(numpy_dtype(value.dtype)).reshape(value.shape)


def _in_dim(step: Step, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    order = np.argsort(step.broadcast_dimensions)
    aligned = [1] * step.result.rank
    for axis, dimension in enumerate(step.broadcast_dimensions):
        aligned[dimension] = x.shape[axis]
    return np.broadcast_to(x.transpose(order).reshape(aligned), step.result.shape)


def _counting(step: Step) -> np.ndarray[Any, Any]:
    aligned = [size if d == step.iota_dimension else 1 for d, size in enumerate(step.result.shape)]
    return np.broadcast_to(np.arange(step.result.shape[step.iota_dimension]).reshape(aligned), step.result.shape)


_COMPARE = {"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal}
_KNOWN: dict[str, Callable[..., Any]] = {
    "stablehlo.constant": lambda step: step.value,
    "stablehlo.iota": _counting,
    "stablehlo.broadcast_in_dim": _in_dim,
    "stablehlo.reshape": lambda step, x: x,
    "stablehlo.transpose": lambda step, x: x.transpose(step.permutation),
    "stablehlo.concatenate": lambda step, *parts: np.concatenate(parts, step.dimension),
    "stablehlo.add": lambda step, x, y: x + y,
    "stablehlo.multiply": lambda step, x, y: x * y,
    "stablehlo.subtract": lambda step, x, y: x - y,
    "stablehlo.and": lambda step, x, y: x & y,
    "stablehlo.or": lambda step, x, y: x | y,
    "stablehlo.compare": lambda step, x, y: _COMPARE[step.comparison_direction](x, y),
    "stablehlo.select": lambda step, condition, x, y: np.where(condition, x, y),
}
