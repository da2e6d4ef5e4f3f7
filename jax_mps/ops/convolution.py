"""`convolution`: any dimension numbers, strides, dilations and groups, by MLX's own kernels or as a matrix product over windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.dot import is_precise
from jax_mps.ops.dtypes import MX
from jax_mps.ops.products import product
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import DEVICE_DTYPES, Step

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Window:
    """How the kernel moves, one entry a spatial dimension, and what it asks of the arithmetic. `groups` are feature groups."""

    size: Ints
    strides: Ints
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Ints
    rhs_dilation: Ints
    out: Ints
    groups: int
    dtype: str
    precise: bool

    @property
    def rank(self) -> int:
        return len(self.size)


@lowers("stablehlo.convolution")
def convolution(op: Step) -> Run:
    for value in (*op.operands, *op.results):
        if value.dtype not in DEVICE_DTYPES:
            raise Unsupported(op, f"a convolution with {value.dtype}")
    kernel, result = op.operands[1].type, op.result
    if 0 in result.shape or 0 in kernel.shape or 0 in op.operand.shape:
        return lambda x, w: mx.zeros(result.shape, MX[result.dtype])
    if op.batch_group_count > 1 and op.feature_group_count > 1:
        raise Unsupported(op, "batch groups together with feature groups")
    window = _Window(
        size=tuple(kernel.shape[d] for d in op.kernel_spatial_dimensions),
        strides=tuple(op.window_strides),
        padding=tuple((int(low), int(high)) for low, high in op.padding),
        lhs_dilation=tuple(op.lhs_dilation),
        rhs_dilation=tuple(op.rhs_dilation),
        out=tuple(result.shape[d] for d in op.output_spatial_dimensions),
        groups=op.feature_group_count * op.batch_group_count,
        dtype=result.dtype,
        precise=is_precise(op),
    )
    inputs = (op.input_batch_dimension, *op.input_spatial_dimensions, op.input_feature_dimension)
    kernels = (op.kernel_output_feature_dimension, *op.kernel_spatial_dimensions, op.kernel_input_feature_dimension)
    outputs = _inverse((op.output_batch_dimension, *op.output_spatial_dimensions, op.output_feature_dimension))
    reversed_axes = [axis for axis, flag in enumerate(op.window_reversal, start=1) if flag]

    def run(x: mx.array, w: mx.array) -> mx.array:
        x = _batch_to_features(mx.transpose(x, inputs), op.batch_group_count)
        w = _reversed(mx.transpose(w, kernels), reversed_axes)
        return mx.transpose(_convolve(x, w, window), outputs)

    return run


def _inverse(order: Sequence[int]) -> Ints:
    return tuple(sorted(range(len(order)), key=lambda i: order[i]))


def _batch_to_features(x: mx.array, groups: int) -> mx.array:
    """A convolution in batch groups is one in feature groups over the batches' features side by side."""
    if groups == 1:
        return x
    n, *spatial, features = x.shape
    x = mx.moveaxis(x.reshape(groups, n // groups, *spatial, features), 0, -2)
    return x.reshape(n // groups, *spatial, groups * features)


def _reversed(w: mx.array, axes: Sequence[int]) -> mx.array:
    for axis in axes:
        if w.shape[axis] > 1:  # by index: views with negative strides go wrong on Metal (mlx#4528)
            w = mx.take(w, mx.arange(w.shape[axis] - 1, -1, -1), axis=axis)
    return w


def _convolve(x: mx.array, w: mx.array, window: _Window) -> mx.array:
    """`x[N, ..., C]` with `w[O, ..., C / groups]` to `[N, ..., O]`."""
    floating = window.dtype in ("float16", "bfloat16", "float32")
    if window.rank not in (1, 2, 3) or not floating:
        return _by_product(x, w, window)
    return _by_mlx(x, w, window)


def _by_mlx(x: mx.array, w: mx.array, window: _Window) -> mx.array:
    dtype = MX[window.dtype]
    if device_kind() == "cpu" or not x.dtype == w.dtype == dtype:
        x, w = x.astype(mx.float32), w.astype(mx.float32)
    padding, dilation = window.padding, window.lhs_dilation
    if any(side < 0 for sides in padding for side in sides):
        x, padding, dilation = _dilated(x, window), ((0, 0),) * window.rank, (1,) * window.rank
    low, high = [sides[0] for sides in padding], [sides[1] for sides in padding]
    out = mx.conv_general(
        x, w, stride=window.strides, padding=(low, high), kernel_dilation=window.rhs_dilation, input_dilation=dilation, groups=window.groups
    )
    return out.astype(dtype)


# ---- as a matrix product -------------------------------------------------------------------------------------------------------------


def _by_product(x: mx.array, w: mx.array, window: _Window) -> mx.array:
    """Every dtype and any number of spatial dimensions: lay the windows out as rows and multiply."""
    groups, features = window.groups, x.shape[-1] // window.groups
    rows = _windows(_dilated(x, window), window).reshape(x.shape[0], *window.out, *window.size, groups, features)
    rows = mx.moveaxis(rows, -2, 0).reshape(groups, x.shape[0] * math.prod(window.out), -1)
    columns = mx.swapaxes(w.reshape(groups, w.shape[0] // groups, -1), -1, -2)
    out = product(rows, columns, window.dtype, precise=window.precise)
    return mx.moveaxis(out, 0, 1).reshape(x.shape[0], *window.out, -1)


def _dilated(x: mx.array, window: _Window) -> mx.array:
    """The input with its holes and edges filled with zeros; negative edges cut off. The spec dilates, then pads."""
    spatial = range(1, window.rank + 1)
    if max(window.lhs_dilation, default=1) > 1:
        holes = [(0, 0)] * (2 * x.ndim)
        shape: list[int] = []
        for axis, size in enumerate(x.shape):
            dilation = window.lhs_dilation[axis - 1] if axis in spatial else 1
            holes[2 * axis + 1] = (0, dilation - 1)
            shape.append(size * dilation)
        x = mx.pad(mx.expand_dims(x, tuple(range(1, 2 * x.ndim, 2))), holes).reshape(shape)
    edges = [(0, 0)] * x.ndim
    kept = [slice(None)] * x.ndim
    for axis, (low, high), dilation in zip(spatial, window.padding, window.lhs_dilation, strict=True):
        end = x.shape[axis] - (dilation - 1) + min(high, 0)
        kept[axis] = slice(max(-low, 0), max(end, 0))
        edges[axis] = (max(low, 0), max(high, 0))
    x = x[tuple(kept)]
    return mx.pad(x, edges) if any(side for sides in edges for side in sides) else x


def _windows(x: mx.array, window: _Window) -> mx.array:
    """`[N, ..., C]` as a view `[N, out..., size..., C]`."""
    strides = [math.prod(x.shape[d + 1 :]) for d in range(x.ndim)]
    moved = [s * by for s, by in zip(strides[1:-1], window.strides, strict=True)]
    inside = [s * by for s, by in zip(strides[1:-1], window.rhs_dilation, strict=True)]
    return mx.as_strided(x, (x.shape[0], *window.out, *window.size, x.shape[-1]), (strides[0], *moved, *inside, strides[-1]))
