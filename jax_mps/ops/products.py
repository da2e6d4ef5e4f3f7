"""The arithmetic of matrix products in every device dtype: what `mx.matmul` does right is its own, the rest is composed from it.

MLX multiplies no integers, and on CPU half types only slowly; CUDA rounds float32 operands to TF32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.ops.dtypes import BITS, MX
from jax_mps.ops.target import device_kind

# Up to here, an integer product is cheaper as multiply and sum than as limbs, and a float32 one that must be exact on CUDA than split.
_SMALL = 1 << 15
# XLA's GPU backend computes a product of fewer elements than this in float32 whatever its precision; so do we, up to so many terms in all.
TINY, _MOST_TERMS = 100, 1 << 22


def product(a: mx.array, b: mx.array, dtype: str, *, precise: bool = False) -> mx.array:
    """`a[..., M, K] @ b[..., K, N]` computed in and rounded to `dtype`; batch dimensions broadcast.

    precise: float32 products keep float32's accuracy on CUDA too, where the default is TF32.
    """
    if 0 in (a.shape[-1], a.shape[-2], b.shape[-1], *_batch(a, b)):  # on CUDA, MLX's would be the end of the process
        return mx.zeros((*_batch(a, b), a.shape[-2], b.shape[-1]), MX[dtype])
    if dtype == "bool":
        return product(a.astype(mx.float32), b.astype(mx.float32), "float32") > 0
    if a.shape[-1] == 1:
        return a.astype(MX[dtype]) * b.astype(MX[dtype])
    if dtype == "complex64":
        return _complex(a.astype(mx.complex64), b.astype(mx.complex64), precise)
    if dtype in ("float16", "bfloat16", "float32"):
        return _floating(a, b, dtype, precise)
    return _integer(a.astype(MX[dtype]), b.astype(MX[dtype]), dtype)


def _batch(a: mx.array, b: mx.array) -> tuple[int, ...]:
    pairs = zip(a.shape[:-2], b.shape[:-2], strict=True)
    return tuple(n if m == 1 else m for m, n in pairs)


def _floating(a: mx.array, b: mx.array, dtype: str, precise: bool) -> mx.array:
    kind = device_kind()
    if kind == "metal" and a.shape[-2] == b.shape[-1] == math.prod(_batch(a, b)) == 1:  # MLX (0.32) reads four elements at once, wherever a slice begins
        return _summed(a.astype(mx.float32), b.astype(mx.float32)).astype(MX[dtype])
    if kind != "cpu" and a.dtype == b.dtype == MX[dtype] != mx.float32:
        return mx.matmul(a, b)  # float32 accumulators
    exact = a.dtype in _HALVES and b.dtype in _HALVES  # their values are exact in TF32
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    if kind == "cuda" and not exact:
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        terms = m * k * n * math.prod(_batch(a, b))
        if terms <= (_MOST_TERMS if (m + n) * k < TINY else _SMALL if precise else 0):
            return _summed(a, b).astype(MX[dtype])
        if precise:
            return split(mx.matmul, a, b).astype(MX[dtype])
    return mx.matmul(a, b).astype(MX[dtype])


def _summed(a: mx.array, b: mx.array) -> mx.array:
    """The product as a sum of products, in the operands' own type."""
    return mx.sum(a[..., :, None, :] * mx.swapaxes(b, -1, -2)[..., None, :, :], axis=-1)


_HALVES = (mx.float16, mx.bfloat16)


def split(multiply: Callable[[mx.array, mx.array], mx.array], a: mx.array, b: mx.array) -> mx.array:
    """A float32 product of TF32 products: high and low parts, but for low times low. Infinities and NaNs stay in the high parts."""
    (a_high, a_finite, a_low), (b_high, b_finite, b_low) = _halves(a), _halves(b)
    cross = multiply(a_finite, b_low) + multiply(a_low, b_finite)
    return multiply(a_high, b_high) + cross


def _halves(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The part that TF32 holds exactly (eleven bits), the same with zeros for what is not finite, and the rest."""
    finite = mx.isfinite(x)
    kept = (x.view(mx.uint32) & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)
    zero = mx.array(0, mx.float32)
    return mx.where(finite, kept, x), mx.where(finite, kept, zero), mx.where(finite, x - kept, zero)


def _complex(a: mx.array, b: mx.array, precise: bool) -> mx.array:
    if device_kind() == "cpu":
        return mx.matmul(a, b)
    ar, ai, br, bi = (_floating(x, y, "float32", precise) for x, y in itertools.product((mx.real(a), mx.imag(a)), (mx.real(b), mx.imag(b))))
    return mx.stack([ar - bi, ai + br], axis=-1).view(mx.complex64)[..., 0]


# ---- integers: exact modulo 2**bits --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Split into signed limbs of `bits`, multiply these in `dtype` with at most `chunk` terms a sum, so that every sum is exact."""

    bits: int
    dtype: mx.Dtype
    chunk: int


_F32 = _Recipe(8, mx.float32, 256)  # |sum| <= 2**22; the operands are exact in TF32 too
_F32_NARROW = _Recipe(8, mx.float32, 1024)
_F64 = _Recipe(16, mx.float64, 1 << 22)
_F64_WIDE = _Recipe(22, mx.float64, 1 << 10)


def _recipe(width: int, terms: int) -> _Recipe:
    if device_kind() != "cpu":
        return _F32
    if width == 8 and terms <= _F32_NARROW.chunk:
        return _F32_NARROW
    return _F64_WIDE if width == 64 else _F64


def _integer(a: mx.array, b: mx.array, dtype: str) -> mx.array:
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if m * k * n <= _SMALL:
        return _summed(a, b).astype(MX[dtype])
    width = BITS[dtype]
    recipe = _recipe(width, k)
    work = mx.int64 if width == 64 else mx.int32
    count = -(-width // recipe.bits)
    left = [_chunked(x, recipe.chunk) for x in _limbs(a.astype(work), recipe, count)]
    right = [mx.swapaxes(_chunked(mx.swapaxes(x, -1, -2), recipe.chunk), -1, -2) for x in _limbs(b.astype(work), recipe, count)]
    total = None
    for place in range(count):
        terms = [mx.matmul(left[i], right[place - i]).astype(mx.int64).astype(work) for i in range(place + 1)]
        for term in terms:
            summed = mx.sum(term, axis=-3) if k > recipe.chunk else term
            shifted = summed << (recipe.bits * place) if place else summed
            total = shifted if total is None else total + shifted
    assert total is not None
    return total.astype(MX[dtype])


def _limbs(x: mx.array, recipe: _Recipe, count: int) -> list[mx.array]:
    """Signed digits of `x` in base `2**bits`, lowest first; what lies above the last wraps away in the sum."""
    empty = x.itemsize * 8 - recipe.bits
    digits = []
    for _ in range(count):
        digit = (x << empty) >> empty
        digits.append(digit.astype(recipe.dtype))
        x = (x - digit) >> recipe.bits
    return digits


def _chunked(x: mx.array, chunk: int) -> mx.array:
    """`[..., M, K]` to `[..., K / chunk, M, chunk]`, filled up with zeros."""
    k = x.shape[-1]
    if k <= chunk:
        return x
    count = -(-k // chunk)
    x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * chunk - k)])
    return mx.swapaxes(x.reshape(*x.shape[:-1], count, chunk), -2, -3)
