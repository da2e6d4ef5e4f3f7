"""`fft`: MLX's transforms over the last dimensions."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step


@lowers("stablehlo.fft")
def fft(op: Step) -> Run:
    lengths = tuple(op.fft_length)
    axes = tuple(range(-len(lengths), 0))
    shape, dtype = op.result.shape, MX[op.result.dtype]
    if 0 in shape or 0 in op.operand.shape or not lengths:
        return lambda x: mx.zeros(shape, dtype) if lengths else x
    transform = {"FFT": mx.fft.fftn, "IFFT": mx.fft.ifftn, "RFFT": mx.fft.rfftn, "IRFFT": mx.fft.irfftn}[op.fft_type]
    return lambda x: transform(x, s=lengths, axes=axes)
