"""What rewrites make of several steps: ops of our own, each with the meaning of the StableHLO steps that it stands for.

Only primitives that an exported function keeps are used. Further operands, which only the original steps read, are ignored.
"""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.dtypes import MX
from jax_mps.ops.elementwise import exp
from jax_mps.ops.reduce import sum_of
from jax_mps.ops.registry import Run, lowers
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
    count = op.scaled + op.shifted

    def run(x: mx.array, *rest: mx.array) -> mx.array:
        scale, bias = [mx.reshape(v, (size,)) for v in rest[:count]] + [None] * (2 - count)
        return mx.fast.layer_norm(x, scale, bias, op.eps) if layer else mx.fast.rms_norm(x, scale, op.eps)

    return run
