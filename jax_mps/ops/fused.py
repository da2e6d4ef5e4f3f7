"""What rewrites make of several steps: ops of our own, each with the meaning of the StableHLO steps that it stands for.

Only primitives that an exported function keeps are used. Further operands, which only the original steps read, are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from jax_mps.ops import columns, decoding, norm_rows, strided
from jax_mps.ops.dtypes import MX
from jax_mps.ops.elementwise import exp
from jax_mps.ops.reduce import sum_of
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.shapes import arranged
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

# MLX's CPU kernels take 10 ns for each exponential, our composition 3: from this many elements on, that is more than its further ops cost.
_LARGE = 8192


def _composed(x: mx.array) -> bool:
    return device_kind() == "cpu" and x.size >= _LARGE


def _sum(x: mx.array) -> mx.array:
    """Along the rows, in float32 at least; the axis is kept."""
    return mx.expand_dims(sum_of(x, (x.ndim - 1,)), -1)


def _shifted(x: mx.array) -> mx.array:
    return x - mx.max(x, axis=-1, keepdims=True)


def _softmax(x: mx.array) -> mx.array:
    if not _composed(x):
        return mx.softmax(x, axis=-1, precise=True)
    e = exp(_shifted(x).astype(mx.float32))
    return (e / _sum(e)).astype(x.dtype)


def _log_sum_exp(shifted: mx.array) -> mx.array:
    """Of rows whose maximum is 0 (or NaN): no infinity to look after."""
    if not _composed(shifted):
        return mx.logsumexp(shifted, axis=-1, keepdims=True)
    return mx.log(_sum(exp(shifted.astype(mx.float32)))).astype(shifted.dtype)


@lowers("jax_mps.softmax")
def softmax(op: Step) -> Run:
    return lambda x, *rest: _softmax(x)


@lowers("jax_mps.log_softmax")
def log_softmax(op: Step) -> Run:
    """The maximum is taken away first, as JAX does it: x - logsumexp(x) would lose the bits of a small difference of large numbers."""

    def run(x: mx.array, *rest: mx.array) -> mx.array:
        shifted = _shifted(x)
        return shifted - _log_sum_exp(shifted)

    return run


@lowers("jax_mps.log_sum_exp")
def log_sum_exp(op: Step) -> Run:
    shape = op.result.shape
    return lambda shifted, *rest: mx.reshape(_log_sum_exp(shifted), shape)


@lowers("jax_mps.logsumexp")
def logsumexp(op: Step) -> Run:
    shape = op.result.shape

    def run(x: mx.array, *rest: mx.array) -> mx.array:
        if device_kind() == "cpu" and not _composed(x):
            return mx.reshape(mx.logsumexp(x, axis=-1), shape)
        top = mx.max(x, axis=-1, keepdims=True)
        if device_kind() != "cpu":  # an infinity in the row hides a NaN from MLX's kernel (0.32.4)
            return mx.reshape(mx.where(top == top, mx.logsumexp(x, axis=-1, keepdims=True), top), shape)
        m = mx.where(mx.isfinite(top), top, mx.zeros_like(top))
        return mx.reshape(_log_sum_exp(x - m) + m, shape)

    return run


@lowers("jax_mps.softmax_gradient")
def softmax_gradient(op: Step) -> Run:
    """s (g - sum(g s)); the softmax is the one of the forward pass, which MLX computes once."""

    def run(x: mx.array, g: mx.array, *rest: mx.array) -> mx.array:
        s = _softmax(x)
        return s * (g - _sum(g * s).astype(x.dtype))

    return run


@lowers("jax_mps.softmax_times")
def softmax_times(op: Step) -> Run:
    lead = (*op.result.shape[:-1], 1)
    dtype = MX[op.result.dtype]
    return lambda x, q, *rest: _softmax(x) * mx.reshape(q, lead).astype(dtype)


@lowers("jax_mps.in_bounds")
def in_bounds(op: Step) -> Run:
    """Whether indices, of which those below 0 count from the end, lie within a dimension."""
    shape, size = op.result.shape, op.size

    def run(i: mx.array, *rest: mx.array) -> mx.array:
        wide = i.astype(mx.int32) if i.dtype in (mx.int8, mx.int16) else i
        return mx.reshape((wide >= mx.array(-size, wide.dtype)) & (wide < mx.array(size, wide.dtype)), shape)

    return run


@lowers("jax_mps.layer_norm", "jax_mps.rms_norm")
def norm(op: Step) -> Run:
    """Operands: the rows, then the scale if there is one, then the bias if there is one."""
    size, layer = op.operand.shape[-1], op.name == "jax_mps.layer_norm"
    count, dtype = op.scaled + op.shifted, MX[op.result.dtype]

    def run(x: mx.array, *rest: mx.array) -> mx.array:
        scale, bias = [mx.reshape(v, (size,)) for v in rest[:count]] + [None] * (2 - count)
        x = x.astype(mx.float32) if dtype == mx.float32 else x  # not rounded to a half type on the way
        return (mx.fast.layer_norm(x, scale, bias, op.eps) if layer else mx.fast.rms_norm(x, scale, op.eps)).astype(dtype)

    return run


@lowers("jax_mps.norm_gradient")
def norm_gradient(op: Step) -> Run:
    """Operands: the rows, the cotangent, the scale if there is one, what is added to the gradient of the rows. Results: that, and sums over all rows, by
    their names in `sums`: of the terms of the scale's gradient, of the cotangent, and of the first result."""
    size, layer = op.operand.shape[-1], op.norm == "layer_norm"
    first = op.attributes.get("first_word")  # where the last operand are words to count in
    dtype, count = MX[op.result.dtype], op.operand.size // size
    ours = norm_rows.fits((op.operand.dtype, op.operands[1].dtype, op.result.dtype), count, size)
    pull = _pull_on_cpu if device_kind() == "cpu" else _pull

    def in_rows(x: mx.array, g: mx.array, scale: mx.array | None, added: list[mx.array], last: mx.array) -> list[mx.array]:
        more = mx.broadcast_to(sum(added[1:], start=added[0]), x.shape).astype(dtype) if added else None
        x, g = (mx.reshape(v, (count, size)) for v in (x, g))
        how = {"centred": layer, "sums": op.sums, "words": None if first is None else (last, first)}
        return norm_rows.gradient(x, g, scale, more if more is None else mx.reshape(more, x.shape), op.eps, dtype, **how)

    def in_steps(x: mx.array, g: mx.array, scale: mx.array | None, added: list[mx.array], last: mx.array) -> list[mx.array]:
        cotangent = g
        if scale is not None and "scale" not in op.sums:
            g, scale = g * scale, None
        rows, *of_scale = pull(x, mx.reshape(g, x.shape), scale, op.eps, layer=layer)
        rows = sum(added, start=rows.astype(dtype))
        summed = {"cotangent": cotangent, "rows": rows}
        return [rows, *(of_scale[0] if name == "scale" else sum_of(mx.reshape(summed[name], (count, size)), (0,)) for name in op.sums)]

    def run(x: mx.array, g: mx.array, *rest: mx.array) -> list[mx.array]:
        scale = mx.reshape(rest[0], (size,)) if op.scaled else None
        added = [mx.reshape(v, x.shape if v.size == x.size else (size,)) for v in rest[op.scaled : op.scaled + op.added]]
        found = (in_rows if ours else in_steps)(x, g, scale, added, (g, *rest)[-1])
        return [mx.reshape(v, r.shape).astype(MX[r.dtype]) for v, r in zip(found, op.results, strict=True)]

    return run


@lowers("jax_mps.channel_norm_gradient")
def channel_norm_gradient(op: Step) -> Run:
    """r w (u - mean(u) - c r^2 mean(u c)) and what is added, c = rows - mean: elementwise, one kernel once it is compiled.

    Operands: the rows, u, of each row the mean, r (or 1 / r, where root is -1) and sum(u c) (times factor r^power, and w if weighted), perhaps sum(u),
    the weights w, and what is added.
    """
    shape = op.operand.shape
    kept = [1 if d in op.axes else n for d, n in enumerate(shape)]
    size, dtype = math.prod(shape[d] for d in op.axes), MX[op.result.dtype]
    count = 5 + op.summed + len(op.weights)

    def run(*operands: mx.array) -> mx.array:
        wide = [v.astype(mx.float32) if v.dtype in (mx.float16, mx.bfloat16) else v for v in operands]
        x, u, mean, root, product, *more = [v if v.shape == shape else mx.reshape(v, kept) for v in wide[:count]]
        total = more.pop(0) if op.summed else mx.reshape(sum_of(u, op.axes), kept)
        r = root if op.root == 1 else 1 / root
        scale = r
        for weight, power in zip(more, op.weights, strict=True):  # not scale * weight: merged with the forward pass's, it would be a kernel of its own
            scale = (weight if power == 1 else weight**power) * scale
        slope = product * (1 / (op.factor * size))
        for _ in range(abs(2 - op.power)):
            slope = slope * r if op.power < 2 else slope / r
        if op.clamped:  # a variance that rounding made less than 0 had no gradient
            slope = mx.where(r * r * op.eps < 1 - 1e-6, slope, mx.zeros_like(slope))
        free, c = u - total * (1 / size), x - mean
        y = free * scale - c * (slope * r) if op.weighted else (free - c * slope) * scale
        return sum(wide[count : count + op.added], start=y).astype(dtype)

    return run


@lowers("jax_mps.column_sums")
def column_sums(op: Step) -> Run:
    """Operands: one or two arrays, the row that the last is less by where there is one, and the rows that the product is times or over. On CUDA alone."""
    results = [(v.shape, MX[v.dtype]) for v in op.results]
    width = math.prod(op.operand.shape[op.lead :])
    first = op.attributes.get("first_word")  # where the last operand are words to count in
    count = len(op.operands) - len(op.factors) - (first is not None)

    def run(*operands: mx.array) -> list[mx.array]:
        arrays = [mx.reshape(v, (-1, width)) for v in operands[:count]]
        if "c" in op.kind:
            arrays[-1] = mx.reshape(arrays[-1], (width,)).astype(mx.float32)
        *plain, total = columns.sums(op.kind, *arrays, words=None if first is None else (operands[-1], first))
        for name, row in zip(op.factors, operands[count : count + len(op.factors)], strict=True):
            row = mx.reshape(row, (width,)).astype(mx.float32)
            total = total * row if name == "multiply" else total / row
        return [mx.reshape(v, shape).astype(dtype) for v, (shape, dtype) in zip((*plain, total), results, strict=True)]

    return run


@lowers("jax_mps.concatenated")
def concatenated(op: Step) -> Run:
    """permutation: of each operand's dimensions, before; None if they stay."""

    def run(*arrays: mx.array) -> mx.array:
        parts = arrays[: op.count] if op.permutation is None else [mx.transpose(x, op.permutation) for x in arrays[: op.count]]
        return strided.concatenated(parts, op.axis, op.result.shape)

    return run


def _pull(x: mx.array, g: mx.array, scale: mx.array | None, eps: float, *, layer: bool) -> list[mx.array]:
    """MLX's own kernel: gradients of the rows, and of the scale if there is one."""

    def norm(x: mx.array, *scale: mx.array) -> mx.array:
        weight = scale[0] if scale else None
        return mx.fast.layer_norm(x, weight, None, eps) if layer else mx.fast.rms_norm(x, weight, eps)

    primals = [x] if scale is None else [x, scale]
    wide = mx.result_type(g, *primals)
    if scale is not None and device_kind() == "metal":  # which sums over the rows in their type
        wide = mx.float32
    primals = [v.astype(wide) for v in primals]
    return mx.vjp(norm, primals, [g.astype(wide)])[1]


def _pull_on_cpu(x: mx.array, g: mx.array, scale: mx.array | None, eps: float, *, layer: bool) -> list[mx.array]:
    """The same in few steps: MLX's has no kernel there, and differentiates the steps of the norm one by one."""
    x, g = x.astype(mx.float32), g.astype(mx.float32)
    size = x.shape[-1]
    c = x - _sum(x) / size if layer else x
    r = mx.rsqrt(_sum(mx.square(c)) / size + eps)
    rows = c * r
    u = g if scale is None else g * scale.astype(mx.float32)
    gradient = u - rows * (_sum(u * rows) / size)
    gradient = r * (gradient - _sum(u) / size if layer else gradient)
    return [gradient] if scale is None else [gradient, sum_of(g * rows, range(x.ndim - 1))]


# ---- attention -----------------------------------------------------------------------------------------------------------------------


@lowers("jax_mps.attention")
def attention(op: Step) -> Run:
    """Operands: queries, keys, values, the mask if there is one; in MLX they are (batch, heads, positions, width)."""
    queries, keys, values = (
        tuple(v.shape[d] for d in order) for v, order in zip(op.operands[:3], (op.queries_order, op.keys_order, op.values_order), strict=True)
    )
    batches = queries[: sum(kind == "batch" for kind, _ in op.order)]
    length = queries[-2] if len(queries) > len(batches) + 1 else 1
    batch, heads, groups = math.prod(batches[:-1]), math.prod(batches[-1:]), math.prod(queries[len(batches) : -1]) // length
    few = takes_few(op.result.dtype, queries[len(batches) : -1], queries[-1], values[-1], op.mask)

    def run(q: mx.array, k: mx.array, v: mx.array, *rest: mx.array) -> mx.array:
        q = arranged(q, op.queries_order, (batch, heads * groups, length, queries[-1]))
        k = arranged(k, op.keys_order, (batch, heads, *keys[-2:]))
        v = arranged(v, op.values_order, (batch, heads, *values[-2:]))
        if few:
            mask = _mask(rest[0], op, (*queries[:-1], keys[-2]), len(batches)) if op.mask == "array" else None
            fill = op.fill if op.mask == "array" else -math.inf
            y = decoding.attention(q, k, v, mask, scale=op.scale, causal=op.mask == "causal", fill=fill)
        elif op.mask == "array":
            mask = _mask(rest[0], op, (*queries[:-1], keys[-2]), len(batches))
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=op.scale, mask=mask)
            seen = mask if mask.dtype == mx.bool_ else mask > -math.inf
            y = mx.where(mx.any(seen, axis=-1, keepdims=True), y, _unseeing(v, op.fill, groups)) if op.guarded else y
        else:
            y = mx.fast.scaled_dot_product_attention(q, k, v, scale=op.scale, mask="causal" if op.mask == "causal" else None)
        return arranged(y.reshape(*queries[:-1], values[-1]), op.result_order, op.result.shape)

    return run


def takes_few(dtype: str, queries: Sequence[int], width: int, values: int, mask: str) -> bool:
    """Whether our own kernel does it: few queries, where MLX would compose the steps (float32 on CUDA, or an array for a mask)."""
    return decoding.fits(dtype, queries, width, values) and (dtype == "float32" or mask == "array")


def _mask(mask: mx.array, op: Step, shape: tuple[int, ...], batches: int) -> mx.array:
    """As (batch, heads, positions, keys), 1 where nothing depends on it; shape: of the scores in MLX's order, before axes are merged."""
    kept = [d for d in op.mask_order if d is not None]
    rest = [d for d in range(mask.ndim) if d not in kept]  # of size 1
    mask = mx.transpose(mask, (*kept, *rest)).reshape([1 if d is None else n for d, n in zip(op.mask_order, shape, strict=True)])
    heads = max(batches - 1, 0)
    parts = [shape[:heads], shape[heads:-2] if len(shape) > batches + 1 else shape[heads:-1], shape[-2:-1] if len(shape) > batches + 1 else ()]
    full: list[int] = []
    merged: list[int] = []
    for part in (*parts, shape[-1:]):
        own = tuple(mask.shape[len(full) : len(full) + len(part)])
        one = all(n == 1 for n in own)
        full += [1] * len(part) if one else part
        merged.append(1 if one else math.prod(part))
    return mx.broadcast_to(mask, full).reshape(merged)


def _unseeing(values: mx.array, fill: float, groups: int) -> mx.array:
    """What a row gives that sees nothing: NaN if what it does not see is -inf, the mean of all values if it is finite."""
    if fill == -math.inf:
        return mx.array(math.nan, values.dtype)
    mean = mx.mean(values.astype(mx.float32), axis=-2, keepdims=True).astype(values.dtype)
    return mx.repeat(mean, groups, axis=1) if groups > 1 else mean
