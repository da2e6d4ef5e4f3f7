"""Floats as integers of the same order: what sorts and atomic minima can be trusted with."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.dtypes import MX

_SIGNED_BITS = {"float16": mx.int16, "bfloat16": mx.int16, "float32": mx.int32}
_NAN_BITS = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}


def _swapped(bits: mx.array) -> mx.array:
    """Between sign-and-magnitude and two's complement; its own inverse. No `where`: on CPU it costs 11 ns an element, these ops 0.3."""
    width, magnitude = (15, 0x7FFF) if bits.dtype == mx.int16 else (31, 0x7FFFFFFF)
    return bits ^ ((bits >> mx.array(width, bits.dtype)) & mx.array(magnitude, bits.dtype))


def total_order(x: mx.array, dtype: str) -> mx.array:
    """-NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    return _swapped(x.view(_SIGNED_BITS[dtype]))


def from_total_order(order: mx.array, dtype: str) -> mx.array:
    """The floats of a `total_order`."""
    return _swapped(order).view(MX[dtype])


def canonical_order(x: mx.array, dtype: str) -> mx.array:
    """As `total_order`, with both zeros equal and every NaN equal to the last."""
    order = nan_at_end(x, dtype)
    return order + (order == mx.array(-1, order.dtype)).astype(order.dtype)  # -0 is -1


def nan_at_end(x: mx.array, dtype: str, *, first: bool = False) -> mx.array:
    """As `total_order`, with every NaN equal to the last, or to the first."""
    order = total_order(x, dtype)
    nan = mx.array(~_NAN_BITS[dtype] if first else _NAN_BITS[dtype], order.dtype)
    number = (x == x).astype(order.dtype) * mx.array(-1, order.dtype)  # all bits, or none for a NaN
    return (order & number) | (nan & (number ^ mx.array(-1, order.dtype)))
