"""Floats as integers of the same order: what sorts and atomic minima can be trusted with."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.dtypes import MX

_SIGNED_BITS = {"float16": mx.int16, "bfloat16": mx.int16, "float32": mx.int32}
_NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}


def _swapped(bits: mx.array) -> mx.array:
    """Between sign-and-magnitude and two's complement; its own inverse."""
    magnitude = mx.array(0x7FFF if bits.dtype == mx.int16 else 0x7FFFFFFF, bits.dtype)
    return mx.where(bits < 0, bits ^ magnitude, bits)


def total_order(x: mx.array, dtype: str) -> mx.array:
    """-NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    return _swapped(x.view(_SIGNED_BITS[dtype]))


def from_total_order(order: mx.array, dtype: str) -> mx.array:
    """The floats of a `total_order`."""
    return _swapped(order).view(MX[dtype])


def canonical_order(x: mx.array, dtype: str) -> mx.array:
    """As `total_order`, with both zeros equal and every NaN equal to the last."""
    kind = _SIGNED_BITS[dtype]
    order = nan_at_end(x, dtype)
    return mx.where(order == mx.array(-1, kind), mx.array(0, kind), order)  # -0


def nan_at_end(x: mx.array, dtype: str, *, first: bool = False) -> mx.array:
    """As `total_order`, with every NaN equal to the last, or to the first."""
    nan = ~_NAN_BITS[dtype] if first else _NAN_BITS[dtype]
    return mx.where(x != x, mx.array(nan, _SIGNED_BITS[dtype]), total_order(x, dtype))
