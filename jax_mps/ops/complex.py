"""Complex numbers: construction, parts, and functions of complex64."""

from __future__ import annotations

import math

import mlx.core as mx

from jax_mps.ops.bits import constant as const
from jax_mps.ops.bits import signed
from jax_mps.ops.registry import elementwise
from jax_mps.ops.target import device_kind


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
    """Metal's kernel squares and overflows at 1.8e19 (mlx#4344); elsewhere MLX calls hypot."""
    return _abs_scaled(x) if device_kind() == "metal" else mx.abs(x)


def _abs_scaled(x: mx.array) -> mx.array:
    re, im = mx.abs(mx.real(x)), mx.abs(mx.imag(x))
    high, low = mx.maximum(re, im), mx.minimum(re, im)
    ratio = low / high
    plain = (high == 0) | (high == math.inf)
    return mx.where(plain, high, high * mx.sqrt(1 + ratio * ratio))


def divide(a: mx.array, b: mx.array) -> mx.array:
    """Metal's kernel squares the divisor's parts; elsewhere MLX divides as C does."""
    return _divide_scaled(a, b) if device_kind() == "metal" else mx.divide(a, b)


def _divide_scaled(a: mx.array, b: mx.array) -> mx.array:
    """Scales the divisor to 1 first. By zero it is the dividend times infinity, by infinity zero, as in C's annex G."""
    ar, ai, br, bi = mx.real(a), mx.imag(a), mx.real(b), mx.imag(b)
    size = mx.maximum(mx.abs(br), mx.abs(bi))
    infinite = size == math.inf
    scale = mx.where(infinite | (size == 0), 1.0, size)
    p, q = mx.where(infinite, 0.0, br / scale), mx.where(infinite, 0.0, bi / scale)
    norm = mx.where(infinite, math.inf, p * p + q * q)
    re = mx.where(size == 0, ar / br, (ar * p + ai * q) / norm / scale)
    im = mx.where(size == 0, ai / br, (ai * p - ar * q) / norm / scale)
    return complex_(re, im)


def power(a: mx.array, b: mx.array) -> mx.array:
    """MLX's 0^0 is NaN; it is 1."""
    return mx.where(b == 0, const(1, mx.complex64), mx.power(a, b))


def sign(x: mx.array) -> mx.array:
    """x / |x|, part by part; 0 is itself."""
    m = abs_(x)
    return mx.where(m == 0, x, complex_(mx.real(x) / m, mx.imag(x) / m))


def sqrt(x: mx.array) -> mx.array:
    """Metal's kernel takes the smaller part from a difference of numbers that may be nearly equal."""
    return _sqrt_scaled(x) if device_kind() == "metal" else mx.sqrt(x)


def _sqrt_scaled(x: mx.array) -> mx.array:
    """The larger part is the root of (|x| + |re|) / 2, of a quarter of large numbers; the smaller is what makes twice the product im."""
    re, im = mx.real(x), mx.imag(x)
    large = mx.maximum(mx.abs(re), mx.abs(im)) > 1e38
    z = complex_(mx.where(large, re * 0.25, re), mx.where(large, im * 0.25, im))
    a, b = mx.abs(mx.real(z)), mx.abs(mx.imag(z))
    more = mx.where((a == math.inf) | (b == math.inf), math.inf, mx.sqrt(0.5 * (a + _abs_scaled(z))))
    less = mx.where((more == 0) | (b == math.inf), b, 0.5 * b / more)
    scale = mx.where(large, 2.0, 1.0)
    left = re < 0
    y = mx.where(left, more, less) * scale
    return complex_(mx.where(left, less, more) * scale, mx.where(signed(im) < 0, -y, y))


def rsqrt(x: mx.array) -> mx.array:
    return divide(const(1, mx.complex64), sqrt(x))


def exponential(x: mx.array) -> mx.array:
    return mx.exp(x)


def expm1(x: mx.array) -> mx.array:
    """exp(re) cos(im) - 1, without cancellation where both parts are small."""
    re, im = mx.real(x), mx.imag(x)
    half = mx.sin(im * 0.5)
    m = mx.expm1(re)
    imaginary = mx.where(im == 0, im, (m + 1) * mx.sin(im))
    return complex_(mx.where(im == 0, m, m * mx.cos(im) - 2 * half * half), imaginary)


def log(x: mx.array) -> mx.array:
    return mx.log(x)


def log1p(x: mx.array) -> mx.array:
    """log|1 + x| by log1p of |1 + x|^2 - 1 where x is small."""
    re, im = mx.real(x), mx.imag(x)
    near = 0.5 * mx.log1p(re * (2 + re) + im * im)
    far = mx.log(abs_(complex_(1 + re, im)))
    return complex_(mx.where(mx.maximum(mx.abs(re), mx.abs(im)) < 0.5, near, far), mx.arctan2(im, 1 + re))


def atan2(y: mx.array, x: mx.array) -> mx.array:
    """-i log((x + iy) / sqrt(x^2 + y^2))."""
    i = const(1j, mx.complex64)
    return -i * mx.log(divide(x + i * y, sqrt(x * x + y * y)))


def logistic(x: mx.array) -> mx.array:
    one = const(1, mx.complex64)
    return divide(one, one + mx.exp(-x))


def tanh(x: mx.array) -> mx.array:
    """Metal's kernel subtracts what is nearly equal from 1, CUDA's doubles the imaginary part, which may overflow (MLX 0.32)."""
    return mx.tanh(x) if device_kind() == "cpu" else complex_(*_tanh(mx.real(x), mx.imag(x)))


def tan(x: mx.array) -> mx.array:
    """As above: -i tanh(ix)."""
    if device_kind() == "cpu":
        return mx.tan(x)
    re, im = _tanh(-mx.imag(x), mx.real(x))
    return complex_(im, -re)


def _tanh(re: mx.array, im: mx.array) -> tuple[mx.array, mx.array]:
    """sinh(re) cosh(re) and sin(im) cos(im), both over sinh(re)^2 + cos(im)^2; at infinities, and zero beside NaN, as C's annex G has it."""
    far, endless = mx.abs(re) > 10, mx.abs(re) == math.inf
    near = mx.clip(re, -10, 10)
    sin, cos, sinh = mx.sin(im), mx.cos(im), mx.sinh(near)
    over = sinh * sinh + cos * cos
    sign = mx.where(endless | mx.isfinite(im), mx.sign(re), math.nan)
    top = mx.where(far, sign, sinh * mx.cosh(near) / over)
    side = mx.where(far, 4 * sin * cos * mx.exp(-2 * mx.abs(re)), sin * cos / over)
    side = mx.where(endless & ~mx.isfinite(im), 0.0, side)
    return mx.where(re == 0, re, top), mx.where(im == 0, im, side)


def sin(x: mx.array) -> mx.array:
    return mx.sin(x)


def cos(x: mx.array) -> mx.array:
    return mx.cos(x)


elementwise({"stablehlo.complex": complex_, "stablehlo.real": real, "stablehlo.imag": imag})
