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
    if device_kind() == "metal" and kind in ("RFFT", "IRFFT") and lengths[-1] <= _MOST_IN_PAIRS:
        return lambda x: _alone(kind, x, longer)
    return lambda x: _transform(kind, x, longer)


def _transform(kind: str, x: mx.array, lengths: Lengths) -> mx.array:
    transform = {"FFT": mx.fft.fftn, "IFFT": mx.fft.ifftn, "RFFT": mx.fft.rfftn, "IRFFT": mx.fft.irfftn}[kind]
    return transform(x, s=tuple(n for n, _ in lengths), axes=tuple(axis for _, axis in lengths)) if lengths else x


_MOST_ON_METAL, _MOST_IN_PAIRS = 1 << 24, 4096


def _elements(n: int) -> int:
    """What Metal's transform of one axis works on: where the length is no power of two, at least twice as many, and one."""
    return n if n & (n - 1) == 0 else 1 << (2 * n - 2).bit_length()


def _alone(kind: str, x: mx.array, lengths: Lengths) -> mx.array:
    """Metal transforms two real lines as one complex one: a NaN of one, its rounding errors, and the imaginary part of what is to be real (its first
    element) would be the other's, too. So each line is put beside zeros."""
    *outer, last = lengths
    x = _transform("IFFT", x, outer) if kind == "IRFFT" else x
    x = _transform(kind, mx.stack([x, mx.zeros_like(x)], axis=-2), [last])[..., 0, :]
    return _transform("FFT", x, outer) if kind == "RFFT" else x
