"""`convolution`: any dimension numbers, strides, dilations and groups.

On a GPU, MLX's own kernels. On CPU these are slow but in one layout (groups and input dilation run as plain loops), so there, and for what they
lack everywhere (integers, complex, more than three dimensions), a convolution is a matrix product over windows laid out as rows or columns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.dot import is_precise
from jax_mps.ops.dtypes import MX
from jax_mps.ops.products import product, split
from jax_mps.ops.reduce import sum_of
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import DEVICE_DTYPES, Step

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Conv:
    """How the kernel moves, one entry a spatial dimension; which axis is which; what the arithmetic is.

    inputs, kernels, outputs: axes of (batch, feature, *spatial), (output feature, input feature, *spatial) and (batch, feature, *spatial).
    """

    size: Ints
    strides: Ints
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: Ints
    rhs_dilation: Ints
    out: Ints
    inputs: Ints
    kernels: Ints
    outputs: Ints
    feature_groups: int
    batch_groups: int
    dtype: str
    precise: bool

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def groups(self) -> int:
        return self.feature_groups * self.batch_groups


@lowers("stablehlo.convolution")
def convolution(op: Step) -> Run:
    for value in (*op.operands, *op.results):
        if value.dtype not in DEVICE_DTYPES:
            raise Unsupported(op, f"a convolution with {value.dtype}")
    if op.batch_group_count > 1 and op.feature_group_count > 1:
        raise Unsupported(op, "batch groups together with feature groups")
    kernel, result = op.operands[1].type, op.result
    if 0 in (*result.shape, *kernel.shape, *op.operand.shape):
        return lambda x, w: mx.zeros(result.shape, MX[result.dtype])
    conv = _Conv(
        size=tuple(kernel.shape[d] for d in op.kernel_spatial_dimensions),
        strides=tuple(op.window_strides),
        padding=tuple((int(low), int(high)) for low, high in op.padding),
        lhs_dilation=tuple(op.lhs_dilation),
        rhs_dilation=tuple(op.rhs_dilation),
        out=tuple(result.shape[d] for d in op.output_spatial_dimensions),
        inputs=(op.input_batch_dimension, op.input_feature_dimension, *op.input_spatial_dimensions),
        kernels=(op.kernel_output_feature_dimension, op.kernel_input_feature_dimension, *op.kernel_spatial_dimensions),
        outputs=(op.output_batch_dimension, op.output_feature_dimension, *op.output_spatial_dimensions),
        feature_groups=op.feature_group_count,
        batch_groups=op.batch_group_count,
        dtype=result.dtype,
        precise=is_precise(op),
    )
    backwards = [axis for axis, flag in zip(op.kernel_spatial_dimensions, op.window_reversal, strict=True) if flag]

    def run(x: mx.array, w: mx.array) -> mx.array:
        return _convolve(x, _reversed(w, backwards), conv)

    return run


def _reversed(w: mx.array, axes: Sequence[int]) -> mx.array:
    for axis in axes:
        if w.shape[axis] > 1:  # by index: views with negative strides go wrong on Metal (mlx#4528)
            w = mx.take(w, mx.arange(w.shape[axis] - 1, -1, -1), axis=axis)
    return w


def _convolve(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    floating = conv.dtype in ("float16", "bfloat16", "float32")
    if device_kind() == "cpu" and floating:
        x, w = x.astype(mx.float32), w.astype(mx.float32)
    elif floating and conv.rank in (1, 2, 3) and not (conv.rank == 3 and conv.groups > 1) and not (_is_slice(conv) and conv.groups == 1):
        dilated = max(conv.lhs_dilation) > 1 and device_kind() == "cuda"
        return _by_phases(x, w, conv) if dilated and not _is_halved(conv) else _by_mlx(x, w, conv)
    if max(conv.lhs_dilation, default=1) > 1:
        return _by_phases(x, w, conv)
    x = _padded(x, conv)
    if floating and (taps := _by_taps(x, w, conv)) is not None:
        return taps.astype(MX[conv.dtype])
    return _by_product(x, w, conv)


# ---- MLX's kernels -------------------------------------------------------------------------------------------------------------------


def _by_mlx(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    dtype = MX[conv.dtype]
    if not x.dtype == w.dtype == dtype:
        x, w = x.astype(mx.float32), w.astype(mx.float32)
    padding, dilation = conv.padding, conv.lhs_dilation
    if any(side < 0 for sides in padding for side in sides) or _is_read_past(conv):  # with a dilated input MLX cuts before it dilates
        x, padding, dilation = _padded(_dilated(x, conv), conv), ((0, 0),) * conv.rank, (1,) * conv.rank
    flip = (max(dilation) > 1 and device_kind() == "cuda") or _is_rough(x, w, dataclasses.replace(conv, lhs_dilation=dilation))
    if flip:
        w = _reversed(w, conv.kernels[2:])
    low, high = [sides[0] for sides in padding], [sides[1] for sides in padding]
    x = _batch_to_features(mx.transpose(x, _features_last(conv.inputs)), conv.batch_groups)
    w = mx.transpose(w, _features_last(conv.kernels))
    multiply = functools.partial(
        mx.conv_general,
        stride=conv.strides,
        padding=(low, high),
        kernel_dilation=conv.rhs_dilation,
        input_dilation=dilation,
        groups=conv.groups,
        flip=flip,
    )
    out = split(multiply, x, w) if conv.precise and device_kind() == "cuda" and x.dtype == mx.float32 else multiply(x, w)
    return mx.transpose(out.astype(dtype), _inverse(_features_last(conv.outputs)))


def _is_read_past(conv: _Conv) -> bool:
    """Whether Metal may read behind the input: three of its kernels (Winograd's, of one feature in each group, of few planes) take the padding to be
    no longer at the end than at the beginning (MLX 0.32)."""
    longer = any(high > low and stride == 1 for (low, high), stride in zip(conv.padding, conv.strides, strict=True))
    return device_kind() == "metal" and longer and max(conv.lhs_dilation) == 1


def _is_rough(x: mx.array, w: mx.array, conv: _Conv) -> bool:
    """Whether Metal would compute it by Winograd's algorithm, for which it rounds transformed images to the type (of half types, 40 times the error;
    mlx#4242), and must not. That is for kernels of 3 x 3 that move by 1 and are not to be flipped."""
    if device_kind() != "metal" or (x.dtype == mx.float32 and not conv.precise):
        return False
    plain = set(conv.strides) == set(conv.lhs_dilation) == set(conv.rhs_dilation) == {1} and conv.groups == 1
    return plain and conv.size == (3, 3) and x.shape[conv.inputs[1]] % 32 == 0 == w.shape[conv.kernels[0]] % 32


def _is_halved(conv: _Conv) -> bool:
    """The gradient of a convolution of stride 2 for its input. MLX 0.32.4 on CUDA ignores the input's dilation unless it is told to flip
    the kernel, and takes a plan of another dilation from its cache: so only this form goes there, and always flipped."""
    reach = [(size - 1) * by for size, by in zip(conv.size, conv.rhs_dilation, strict=True)]
    inside = all(0 <= low <= most and high >= 0 for (low, high), most in zip(conv.padding, reach, strict=True))
    return set(conv.lhs_dilation) == {2} and set(conv.strides) == {1} and conv.groups == 1 and inside


def _features_last(axes: Ints) -> Ints:
    return (axes[0], *axes[2:], axes[1])


def _inverse(order: Sequence[int]) -> Ints:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _batch_to_features(x: mx.array, groups: int) -> mx.array:
    """A convolution in batch groups is one in feature groups over the batches' features side by side."""
    if groups == 1:
        return x
    n, *spatial, features = x.shape
    x = mx.moveaxis(x.reshape(groups, n // groups, *spatial, features), 0, -2)
    return x.reshape(n // groups, *spatial, groups * features)


# ---- as a matrix product -------------------------------------------------------------------------------------------------------------

# An axis of the product's operands: ("group",), ("batch",), ("feature",), ("out", i) or ("in", i): a window, and a place in it.
_Axis = tuple[str, int]
_GROUP, _BATCH, _FEATURE, _OUTPUT = ("group", 0), ("batch", 0), ("feature", 0), ("output", 0)


def _by_product(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    """Windows times kernel. The windows' matrix is copied in the order in which the input lies in memory, so that rows stay runs."""
    windows, axes, innermost = _windows(x, conv)
    sizes = dict(zip(axes, windows.shape, strict=True))
    lead = [_GROUP] if conv.groups > 1 else []
    rows = [a for a in axes if a == _BATCH or a[0] == "out"]
    columns = [a for a in axes if a == _FEATURE or a[0] == "in"]
    keep_rows = innermost == _FEATURE or (innermost != _BATCH and sizes["in", innermost[1]] > sizes["out", innermost[1]])
    if not keep_rows and innermost != _BATCH and math.prod(conv.out) >= _LARGE:
        rows.remove(_BATCH)  # images with features outside: one product for each
        lead = [*lead, _BATCH]
    order = [*lead, *(rows + columns if keep_rows else columns + rows)]
    m, k = (math.prod(sizes[a] for a in part) for part in (rows, columns))
    matrix = mx.transpose(windows, [axes.index(a) for a in order]).reshape(*(sizes[a] for a in lead), *((m, k) if keep_rows else (k, m)))
    matrix = matrix if keep_rows else mx.swapaxes(matrix, -1, -2)
    kernel = _kernel_matrix(w, conv, columns)
    kernel = kernel if _BATCH not in lead else mx.expand_dims(kernel, -3)
    features = kernel.shape[-1]
    if conv.outputs[1] == len(conv.outputs) - 1:
        out = product(matrix, kernel, conv.dtype, precise=conv.precise)
        out_axes = [*lead, *rows, _OUTPUT]
    else:
        out = product(mx.swapaxes(kernel, -1, -2), mx.swapaxes(matrix, -1, -2), conv.dtype, precise=conv.precise)
        out_axes = [*lead, _OUTPUT, *rows]
    sizes[_OUTPUT] = features
    return _arranged(out.reshape([sizes[a] for a in out_axes]), out_axes, conv)


# From this many windows an image, features-first images are multiplied one by one.
_LARGE = 128


def _windows(x: mx.array, conv: _Conv) -> tuple[mx.array, list[_Axis], _Axis]:
    """A view of the padded input with each spatial axis as two, in the input's order; its axes; and the axis that lies innermost."""
    batch, feature, *spatial = conv.inputs
    sliced = _is_slice(conv)
    if sliced:
        steps = {d: s if size == 1 else r for d, size, s, r in zip(spatial, conv.size, conv.strides, conv.rhs_dilation, strict=True)}
        taken = {d: max(size, out) for d, size, out in zip(spatial, conv.size, conv.out, strict=True)}
        x = x[tuple(slice(0, (taken[d] - 1) * steps[d] + 1, steps[d]) if d in steps else slice(None) for d in range(x.ndim))]
    shape: list[int] = []
    strides: list[int] = []
    axes: list[_Axis] = []
    counts = x.shape
    if not sliced and not any(side > 0 for sides in conv.padding for side in sides):
        x = _row_by_row(x)
    for d, n in enumerate(counts):
        stride = math.prod(x.shape[d + 1 :])
        groups = {batch: conv.batch_groups, feature: conv.feature_groups}.get(d, 1)
        if d in (batch, feature):
            parts = [(_GROUP, groups, stride * (n // groups))] if groups > 1 else []
            parts.append((_BATCH if d == batch else _FEATURE, n // groups, stride))
        else:
            i = spatial.index(d)
            parts = [(("out", i), conv.out[i], stride * conv.strides[i]), (("in", i), conv.size[i], stride * conv.rhs_dilation[i])]
        for axis, count, by in parts:
            axes.append(axis)
            shape.append(count)
            strides.append(by)
    last = x.ndim - 1
    innermost = _BATCH if last == batch else _FEATURE if last == feature else ("out", spatial.index(last))
    return x.reshape(shape) if sliced else mx.as_strided(x, shape, strides), axes, innermost


def _row_by_row(x: mx.array) -> mx.array:
    """The array in memory of its own, one longer along an axis: MLX takes strides of nothing but rows, and what is not padded may be a
    broadcast or a strided view. Of the ops that copy, padding survives export."""
    longest = max(range(x.ndim), key=x.shape.__getitem__)
    return mx.pad(x, [(0, int(d == longest)) for d in range(x.ndim)])


def _is_slice(conv: _Conv) -> bool:
    """Whether windows do not overlap along any axis because there is one window, or one element in each."""
    plain = max(conv.lhs_dilation, default=1) == 1
    return plain and all(size == 1 or out == 1 for size, out in zip(conv.size, conv.out, strict=True))


def _kernel_matrix(w: mx.array, conv: _Conv, columns: Sequence[_Axis]) -> mx.array:
    """`[(group,) columns, features]`."""
    output, feature, *spatial = conv.kernels
    order = [output, *(feature if a == _FEATURE else spatial[a[1]] for a in columns)]
    w = mx.transpose(w, order)
    w = w.reshape(conv.groups, w.shape[0] // conv.groups, -1) if conv.groups > 1 else w.reshape(w.shape[0], -1)
    return mx.swapaxes(w, -1, -2)


def _arranged(out: mx.array, axes: Sequence[_Axis], conv: _Conv) -> mx.array:
    """The result's axes in their places, groups merged with the features of each."""
    batch, feature, *spatial = conv.outputs
    names: dict[int, list[_Axis]] = {batch: [_BATCH], feature: [_GROUP, _OUTPUT] if conv.groups > 1 else [_OUTPUT]}
    names |= {d: [("out", i)] for i, d in enumerate(spatial)}
    order = [axes.index(a) for d in range(len(names)) for a in names[d]]
    shape = [math.prod(out.shape[axes.index(a)] for a in names[d]) for d in range(len(names))]
    return mx.transpose(out, order).reshape(shape)


# ---- padding and dilation ------------------------------------------------------------------------------------------------------------


def _padded(x: mx.array, conv: _Conv) -> mx.array:
    """Zeros at the edges; negative edges cut off."""
    edges, kept = [(0, 0)] * x.ndim, [slice(None)] * x.ndim
    for axis, (low, high) in zip(conv.inputs[2:], conv.padding, strict=True):
        edges[axis] = (max(low, 0), max(high, 0))
        kept[axis] = slice(max(-low, 0), max(x.shape[axis] + min(high, 0), 0))
    if any(side < 0 for sides in conv.padding for side in sides):
        x = x[tuple(kept)]
    return mx.pad(x, edges) if any(map(sum, edges)) else x


def _dilated(x: mx.array, conv: _Conv) -> mx.array:
    """Zeros in the holes of the input's dilation."""
    by = dict(zip(conv.inputs[2:], conv.lhs_dilation, strict=True))
    if max(by.values(), default=1) == 1:
        return x
    holes = [pair for d in range(x.ndim) for pair in ((0, 0), (0, by.get(d, 1) - 1))]
    ends = [n * by.get(d, 1) - (by.get(d, 1) - 1) for d, n in enumerate(x.shape)]
    spread = mx.pad(mx.expand_dims(x, tuple(range(1, 2 * x.ndim, 2))), holes)
    return spread.reshape([n * by.get(d, 1) for d, n in enumerate(x.shape)])[tuple(slice(0, end) for end in ends)]


@dataclass(frozen=True, slots=True)
class _Phase:
    """One axis of a convolution over a dilated input, at the outputs that meet the same kernel elements: every `period`-th."""

    first: int
    step: int
    size: int
    stride: int
    dilation: int
    padding: tuple[int, int]


def _phases(conv: _Conv, axis: int, n: int) -> list[_Phase | None]:
    """The phases of one axis of size `n`, None for one that meets no kernel element (all zeros)."""
    stride, by, dilation, low = conv.strides[axis], conv.lhs_dilation[axis], conv.rhs_dilation[axis], conv.padding[axis][0]
    period, step = by // math.gcd(stride, by), by // math.gcd(dilation, by)
    count = -(-conv.out[axis] // period)
    found: list[_Phase | None] = []
    for phase in range(period):
        first = next((k for k in range(min(step, conv.size[axis])) if (stride * phase - low + k * dilation) % by == 0), None)
        if first is None:
            found.append(None)
            continue
        size, moved, inner = len(range(first, conv.size[axis], step)), stride * period // by, dilation * step // by
        left = -((stride * phase - low + first * dilation) // by)
        found.append(_Phase(first, step, size, moved, inner, (left, (count - 1) * moved + (size - 1) * inner + 1 - n - left)))
    return found


def _by_phases(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    """A convolution over a dilated input without its zeros: one over the input itself for each phase, interleaved."""
    axes = [_phases(conv, i, x.shape[d]) for i, d in enumerate(conv.inputs[2:])]
    out = tuple(-(-o // len(phases)) for o, phases in zip(conv.out, axes, strict=True))
    parts: list[mx.array | None] = []
    for chosen in itertools.product(*axes):
        phases = [p for p in chosen if p is not None]
        parts.append(_phase(x, w, dataclasses.replace(conv, out=out), phases) if len(phases) == conv.rank else None)
    some = next((p for p in parts if p is not None), None)
    if some is None:
        return mx.zeros(_result_shape(x, w, conv), MX[conv.dtype])
    whole = [mx.zeros_like(some) if p is None else p for p in parts]
    for axis, count in reversed([(d, len(phases)) for d, phases in zip(conv.outputs[2:], axes, strict=True)]):
        whole = [_interleaved(whole[i : i + count], axis) for i in range(0, len(whole), count)]
    return whole[0][tuple(slice(0, n) for n in _result_shape(x, w, conv))]


def _phase(x: mx.array, w: mx.array, conv: _Conv, phases: Sequence[_Phase]) -> mx.array:
    taken = [slice(None)] * w.ndim
    for axis, phase in zip(conv.kernels[2:], phases, strict=True):
        taken[axis] = slice(phase.first, None, phase.step)
    part = dataclasses.replace(
        conv, size=tuple(p.size for p in phases), strides=tuple(p.stride for p in phases), padding=tuple(p.padding for p in phases),
        lhs_dilation=(1,) * conv.rank, rhs_dilation=tuple(p.dilation for p in phases),
    )  # fmt: skip
    return _convolve(x, w[tuple(taken)], part)


def _interleaved(parts: Sequence[mx.array], axis: int) -> mx.array:
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return mx.stack(list(parts), axis=axis + 1).reshape(shape)


def _result_shape(x: mx.array, w: mx.array, conv: _Conv) -> Ints:
    sizes = {conv.outputs[0]: x.shape[conv.inputs[0]] // conv.batch_groups, conv.outputs[1]: w.shape[conv.kernels[0]]}
    sizes |= dict(zip(conv.outputs[2:], conv.out, strict=True))
    return tuple(sizes[d] for d in range(len(sizes)))


# ---- depthwise -----------------------------------------------------------------------------------------------------------------------

# At most this many shifted products are added up.
_TAPS = 64


def _by_taps(x: mx.array, w: mx.array, conv: _Conv) -> mx.array | None:
    """Depthwise convolutions and their kernel gradients, whose matrix products would have a single row or column in each group."""
    features = w.shape[conv.kernels[0]]
    if conv.groups == 1 or features != conv.groups:
        return None
    if conv.feature_groups > 1 and x.shape[conv.inputs[1]] == conv.groups and math.prod(conv.size) <= _TAPS:
        return _by_kernel_taps(x, w, conv)
    if conv.batch_groups > 1 and x.shape[conv.inputs[0]] == conv.groups and math.prod(conv.out) <= _TAPS:
        return _by_output_taps(x, w, conv)
    return None


def _by_kernel_taps(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    """One feature in, one out: each kernel element scales a shifted slice of the input."""
    kernel = mx.transpose(w, (*conv.kernels[2:], *conv.kernels[1::-1])).reshape(*conv.size, -1)
    spread = [-1 if d == conv.inputs[1] else 1 for d in range(x.ndim)]
    terms = [_slice(x, conv, place, conv.rhs_dilation, conv.strides, conv.out) * kernel[place].reshape(spread) for place in _places(conv.size)]
    return mx.transpose(functools.reduce(operator.add, terms), [conv.inputs[conv.outputs.index(d)] for d in range(x.ndim)])


def _by_output_taps(x: mx.array, w: mx.array, conv: _Conv) -> mx.array:
    """One image in each group: each output is the sum of the kernel times a slice of the input."""
    source = {conv.inputs[0]: conv.kernels[0], **dict(zip(conv.inputs[1:], conv.kernels[1:], strict=True))}
    kernel = mx.transpose(w, [source[d] for d in range(x.ndim)])
    summed = [d for d in range(x.ndim) if d != conv.inputs[0]]
    sums = [sum_of(_slice(x, conv, place, conv.strides, conv.rhs_dilation, conv.size) * kernel, summed) for place in _places(conv.out)]
    out = mx.stack(sums).reshape(*conv.out, 1, -1)  # out..., batch, feature
    at = {d: i for i, d in enumerate((*conv.outputs[2:], *conv.outputs[:2]))}
    return mx.transpose(out, [at[d] for d in range(x.ndim)])


def _places(shape: Ints) -> list[Ints]:
    return list(itertools.product(*map(range, shape)))


def _slice(x: mx.array, conv: _Conv, place: Ints, by: Ints, strides: Ints, counts: Ints) -> mx.array:
    taken = [slice(None)] * x.ndim
    for axis, k, move, stride, count in zip(conv.inputs[2:], place, by, strides, counts, strict=True):
        taken[axis] = slice(k * move, k * move + (count - 1) * stride + 1, stride)
    return x[tuple(taken)]
