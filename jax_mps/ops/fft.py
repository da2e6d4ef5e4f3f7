"""`fft`: MLX's transforms over the last dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step


@lowers("stablehlo.fft")
def fft(op: Step) -> Run:
    lengths = tuple(op.fft_length)
    axes = tuple(range(-len(lengths), 0))
    shape, dtype, kind = op.result.shape, MX[op.result.dtype], op.fft_type
    if 0 in shape or 0 in op.operand.shape or not lengths:
        return lambda x: mx.zeros(shape, dtype) if lengths else x
    longer = [(n, axis) for n, axis in zip(lengths, axes, strict=True) if n > 1]  # of an axis of length 1, CUDA refuses views (MLX 0.32)
    if lengths[-1] == 1 and kind == "RFFT":
        return lambda x: _transform("FFT", x.astype(mx.complex64), longer)
    if lengths[-1] == 1 and kind == "IRFFT":
        return lambda x: mx.real(_transform("IFFT", x, longer))
    return lambda x: _transform(kind, x, longer)


def _transform(kind: str, x: mx.array, lengths: Sequence[tuple[int, int]]) -> mx.array:
    transform = {"FFT": mx.fft.fftn, "IFFT": mx.fft.ifftn, "RFFT": mx.fft.rfftn, "IRFFT": mx.fft.irfftn}[kind]
    return transform(x, s=tuple(n for n, _ in lengths), axes=tuple(axis for _, axis in lengths)) if lengths else x
