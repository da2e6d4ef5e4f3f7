"""Complex numbers: construction, parts, and functions of complex64."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.bits import constant as const
from jax_mps.ops.registry import elementwise

F32 = mx.float32


def complex_(re: mx.array, im: mx.array) -> mx.array:
    """Interleaves and views: `re + 1j * im` has NaN where im is infinite."""
    if re.shape != im.shape:
        re, im = mx.broadcast_arrays(re, im)
    return mx.stack([re, im], axis=-1).view(mx.complex64)[..., 0]


def real(x: mx.array) -> mx.array:
    return mx.real(x) if x.dtype == mx.complex64 else x


def imag(x: mx.array) -> mx.array:
    return mx.imag(x) if x.dtype == mx.complex64 else mx.zeros_like(x)


def abs_(x: mx.array) -> mx.array:
    return mx.abs(x)


def divide(a: mx.array, b: mx.array) -> mx.array:
    return mx.divide(a, b)


def power(a: mx.array, b: mx.array) -> mx.array:
    return mx.power(a, b)


def sign(x: mx.array) -> mx.array:
    return mx.sign(x)


def sqrt(x: mx.array) -> mx.array:
    return mx.sqrt(x)


def rsqrt(x: mx.array) -> mx.array:
    return mx.divide(const(1, mx.complex64), mx.sqrt(x))


def exponential(x: mx.array) -> mx.array:
    return mx.exp(x)


def expm1(x: mx.array) -> mx.array:
    return mx.exp(x) - const(1, mx.complex64)


def log(x: mx.array) -> mx.array:
    return mx.log(x)


def log1p(x: mx.array) -> mx.array:
    return mx.log(x + const(1, mx.complex64))


def logistic(x: mx.array) -> mx.array:
    one = const(1, mx.complex64)
    return one / (one + mx.exp(-x))


def tanh(x: mx.array) -> mx.array:
    return mx.tanh(x)


def tan(x: mx.array) -> mx.array:
    return mx.tan(x)


def sin(x: mx.array) -> mx.array:
    return mx.sin(x)


def cos(x: mx.array) -> mx.array:
    return mx.cos(x)


elementwise({"stablehlo.complex": complex_, "stablehlo.real": real, "stablehlo.imag": imag})
