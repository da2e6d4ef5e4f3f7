"""`fft`: MLX's transforms over the last dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

Lengths = Sequence[tuple[int, int]]  # of each transform, with its axis


@lowers("stablehlo.fft")
def fft(op: Step) -> Run:
    lengths = tuple(op.fft_length)
    axes = tuple(range(-len(lengths), 0))
    shape, dtype, kind = op.result.shape, MX[op.result.dtype], op.fft_type
    if 0 in shape or 0 in op.operand.shape or not lengths:
        return lambda x: mx.zeros(shape, dtype) if lengths else x
    if device_kind() == "metal" and max(map(_elements, lengths)) > _MOST_ON_METAL:
        raise Unsupported(op, f"transforms of length {max(lengths)} on Metal")
    longer = [(n, axis) for n, axis in zip(lengths, axes, strict=True) if n > 1]  # of an axis of length 1, CUDA refuses views (MLX 0.32)
    if lengths[-1] == 1 and kind == "RFFT":
        return lambda x: _transform("FFT", x.astype(mx.complex64), longer)
    if lengths[-1] == 1 and kind == "IRFFT":
        return lambda x: mx.real(_transform("IFFT", x, longer))
    if device_kind() == "metal" and kind == "IRFFT" and not _has_small_factors(lengths[-1]):
        return lambda x: _to_real(x, longer)
    return lambda x: _transform(kind, x, longer)


def _transform(kind: str, x: mx.array, lengths: Lengths) -> mx.array:
    transform = {"FFT": mx.fft.fftn, "IFFT": mx.fft.ifftn, "RFFT": mx.fft.rfftn, "IRFFT": mx.fft.irfftn}[kind]
    return transform(x, s=tuple(n for n, _ in lengths), axes=tuple(axis for _, axis in lengths)) if lengths else x


_MOST_ON_METAL = 1 << 24


def _elements(n: int) -> int:
    """What Metal's transform of one axis works on: where the length is no power of two, at least twice as many, and one."""
    return n if n & (n - 1) == 0 else 1 << (2 * n - 2).bit_length()


def _has_small_factors(n: int) -> bool:
    for factor in (2, 3, 5, 7, 11, 13):
        while n % factor == 0:
            n //= factor
    return n == 1


def _to_real(x: mx.array, lengths: Lengths) -> mx.array:
    """Metal's kernel for lengths with large factors takes a first element as it is, whose imaginary part the spec does not see."""
    x = _transform("IFFT", x, lengths[:-1])
    x = mx.concatenate([mx.real(x[..., :1]).astype(mx.complex64), x[..., 1:]], axis=-1)
    return _transform("IRFFT", x, lengths[-1:])
