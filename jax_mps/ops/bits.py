"""Bitwise ops of the spec, and the unsigned views and shifts that other families build on.

MLX leaves a shift by the width or more to the processor, and cannot export `~x` of an integer (`BitwiseInvert`, 0.32.4).
"""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.registry import Run, elementwise, lowers, mark_elementwise
from jax_mps.plan.types import Step

WIDTH: dict[mx.Dtype, int] = {
    mx.int8: 8, mx.int16: 16, mx.int32: 32, mx.int64: 64,
    mx.uint8: 8, mx.uint16: 16, mx.uint32: 32, mx.uint64: 64,
    mx.float16: 16, mx.bfloat16: 16, mx.float32: 32,
}  # fmt: skip
UINT: dict[int, mx.Dtype] = {8: mx.uint8, 16: mx.uint16, 32: mx.uint32, 64: mx.uint64}
INT: dict[int, mx.Dtype] = {8: mx.int8, 16: mx.int16, 32: mx.int32, 64: mx.int64}


def constant(value: int | float | complex, dtype: mx.Dtype) -> mx.array:
    """A 0-d array of `dtype`; unsigned 64-bit values past int64 are built from their two's complement (MLX's cast refuses them)."""
    if dtype == mx.uint64 and isinstance(value, int) and value >= 1 << 63:
        return mx.array(value - (1 << 64), dtype=mx.int64).view(mx.uint64)
    return mx.array(value, dtype=dtype)


def unsigned(x: mx.array) -> mx.array:
    """The bits of x as an unsigned integer of the same width."""
    return x.view(UINT[WIDTH[x.dtype]])


def signed(x: mx.array) -> mx.array:
    """The bits of x as a signed integer of the same width."""
    return x.view(INT[WIDTH[x.dtype]])


def not_(x: mx.array) -> mx.array:
    if x.dtype == mx.bool_:
        return mx.logical_not(x)
    return (signed(x) ^ constant(-1, INT[WIDTH[x.dtype]])).view(x.dtype)


def shift_left(x: mx.array, s: mx.array) -> mx.array:
    width, s = WIDTH[x.dtype], unsigned(s)
    inside = s < constant(width, s.dtype)
    shifted = mx.left_shift(unsigned(x), mx.minimum(s, constant(width - 1, s.dtype)))
    return mx.where(inside, shifted, constant(0, s.dtype)).view(x.dtype)


def shift_right_logical(x: mx.array, s: mx.array) -> mx.array:
    width, s = WIDTH[x.dtype], unsigned(s)
    inside = s < constant(width, s.dtype)
    shifted = mx.right_shift(unsigned(x), mx.minimum(s, constant(width - 1, s.dtype)))
    return mx.where(inside, shifted, constant(0, s.dtype)).view(x.dtype)


def shift_right_arithmetic(x: mx.array, s: mx.array) -> mx.array:
    """Past the width every bit is the sign, which is what a shift by width - 1 leaves. Unsigned operands shift as signed ones."""
    s = mx.minimum(unsigned(s), constant(WIDTH[x.dtype] - 1, UINT[WIDTH[x.dtype]]))
    return mx.right_shift(signed(x), signed(s)).view(x.dtype)


# General form, and the one for amounts that are known to lie in [0, width)
_SHIFTS: dict[str, tuple[Run, Run]] = {
    "stablehlo.shift_left": (shift_left, mx.left_shift),
    "stablehlo.shift_right_logical": (shift_right_logical, lambda x, s: mx.right_shift(unsigned(x), unsigned(s)).view(x.dtype)),
    "stablehlo.shift_right_arithmetic": (shift_right_arithmetic, lambda x, s: mx.right_shift(signed(x), signed(s)).view(x.dtype)),
}


@lowers(*_SHIFTS)
def shift(op: Step) -> Run:
    """A rewrite that knows the amounts says so with the attribute `in_range`: one MLX op instead of three (threefry has 40 shifts)."""
    general, in_range = _SHIFTS[op.name]
    return in_range if op.attributes.get("in_range", False) else general


mark_elementwise(*_SHIFTS)


def popcnt(x: mx.array) -> mx.array:
    """Count in parallel in ever wider fields: pairs, nibbles, bytes, then add the bytes with one product."""
    width = WIDTH[x.dtype]
    u = unsigned(x)
    ones = (1 << width) - 1

    def c(pattern: int) -> mx.array:
        return constant(pattern & ones, u.dtype)

    u = u - ((u >> c(1)) & c(ones // 3))
    u = (u & c(ones // 5)) + ((u >> c(2)) & c(ones // 5))
    u = (u + (u >> c(4))) & c(ones // 17)
    if width > 8:
        u = (u * c(ones // 255)) >> c(width - 8)
    return u.view(x.dtype)


def count_leading_zeros(x: mx.array) -> mx.array:
    """Smear the highest set bit downwards; the zeros above it are what popcnt does not count."""
    width = WIDTH[x.dtype]
    u = unsigned(x)
    step = 1
    while step < width:
        u = u | (u >> constant(step, u.dtype))
        step *= 2
    return (constant(width, u.dtype) - popcnt(u)).view(x.dtype)


elementwise(
    {
        "stablehlo.not": not_,
        "stablehlo.popcnt": popcnt,
        "stablehlo.count_leading_zeros": count_leading_zeros,
        "stablehlo.and": mx.bitwise_and,
        "stablehlo.or": mx.bitwise_or,
        "stablehlo.xor": mx.bitwise_xor,
    }
)
