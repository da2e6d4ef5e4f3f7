"""Random bits from an explicit state, bit for bit those of XLA: ThreeFry2x32 (20 rounds) and Philox4x32 (10 rounds).

The counter algorithms are Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). `stablehlo.rng` draws from a state
that no operand shows; a graph has none, and would give the same numbers on every call, so it is refused (the host runs it).
"""

from __future__ import annotations

import math

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.bits import UINT
from jax_mps.ops.dtypes import BITS, MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step

U32, U64 = mx.uint32, mx.uint64
Words = tuple[mx.array, ...]


@lowers("stablehlo.rng")
def rng(op: Step) -> Run:
    raise Unsupported(op, "numbers from a hidden state, which an exported graph does not have")


@lowers("stablehlo.rng_bit_generator")
def rng_bit_generator(op: Step) -> Run:
    """The state is (key, counter) or, for Philox, (key, low, high); DEFAULT is Philox, as on XLA's CPU and GPU backends."""
    words = op.operand.size * BITS[op.operand.dtype] // 64
    output = op.results[1].type
    if output.dtype not in BITS or output.dtype in ("bool", "complex64"):
        raise Unsupported(op, f"random bits of type {output.dtype}")
    draw = three_fry if op.rng_algorithm == "THREE_FRY" else philox
    if words not in ((2,) if draw is three_fry else (2, 3)):
        raise Unsupported(op, f"a state of {words} 64-bit words with {op.rng_algorithm}")
    width, shape, kind = BITS[output.dtype], output.shape, MX[output.dtype]

    def run(state: mx.array) -> tuple[mx.array, mx.array]:
        new_state, bits = draw(state.view(U64), shape, width)
        return new_state.view(state.dtype), bits.astype(UINT[width]).view(kind)

    return run


def _split(x: mx.array) -> Words:
    """A vector of 64-bit words as scalar 32-bit ones, the low half of each first."""
    return tuple(x.view(U32)[i] for i in range(2 * x.size))


def _join(low: mx.array, high: mx.array) -> mx.array:
    return mx.stack([low, high], axis=-1).view(U64)[..., 0]


def _count(n: int) -> mx.array:
    return mx.arange(n, dtype=mx.int32).astype(U32)


def _advanced(counter: Words, steps: mx.array) -> Words:
    """A number of 32-bit words, lowest first, plus `steps`, with carry."""
    low = counter[0] + steps
    carry = (low < steps).astype(U32)
    words = [low]
    for word in counter[1:]:
        words.append(word + carry)
        carry = (words[-1] < carry).astype(U32)
    return tuple(words)


# ---- ThreeFry ------------------------------------------------------------------------------------------------------------------

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def three_fry_2x32(key: Words, counter: Words) -> Words:
    """Twenty rounds, a key injected before the first and after every fourth."""
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << r) | (y >> (32 - r)))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + (group + 1)
    return x, y


def three_fry(state: mx.array, shape: tuple[int, ...], width: int) -> tuple[mx.array, mx.array]:
    """New state and bits; narrow types keep the low bits of 32."""
    key_low, key_high, *counter = _split(state)
    half = shape if width == 64 else _half(shape)
    n = math.prod(half)
    x, y = three_fry_2x32((key_low, key_high), _advanced(tuple(counter), _count(n)))
    new_state = state + mx.array([0, n], dtype=U64)
    if width == 64:
        return new_state, _join(x, y).reshape(shape)
    return new_state, _combine(x.reshape(half), y.reshape(half), shape)


def _split_axis(shape: tuple[int, ...]) -> int:
    """XLA splits the first even dimension, or the first of the largest ones, in two."""
    even = [i for i, d in enumerate(shape) if d % 2 == 0]
    return even[0] if even else shape.index(max(shape))


def _half(shape: tuple[int, ...]) -> tuple[int, ...]:
    if not shape:
        return (1,)
    axis = _split_axis(shape)
    return (*shape[:axis], -(-shape[axis] // 2), *shape[axis + 1 :])


def _combine(x: mx.array, y: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Interleave the two halves along the split axis, and drop what is too much."""
    if not shape:
        return x.reshape(())
    axis = _split_axis(shape)
    both = mx.stack([x, y], axis=axis + 1).reshape(*shape[:axis], 2 * x.shape[axis], *shape[axis + 1 :])
    return both[(slice(None),) * axis + (slice(0, shape[axis]),)]


# ---- Philox --------------------------------------------------------------------------------------------------------------------

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply_high_low(x: mx.array, factor: int) -> Words:
    product = x.astype(U64) * mx.array(factor, dtype=U64)
    return (product >> 32).astype(U32), product.astype(U32)


def philox_4x32(key: Words, counter: Words) -> Words:
    """Ten rounds; the key grows by Weyl's constants between them."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(x0, _MULTIPLIERS[0])
        high1, low1 = _multiply_high_low(x2, _MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = k0 + mx.array(_WEYL[0], dtype=U32), k1 + mx.array(_WEYL[1], dtype=U32)
    return x0, x1, x2, x3


def philox(state: mx.array, shape: tuple[int, ...], width: int) -> tuple[mx.array, mx.array]:
    """New state and bits. A state of two words counts in (word 1, word 0) and gives back the low word only, as XLA does."""
    words = _split(state)
    counter = words[2:] if state.size == 3 else (*words[2:], *words[:2])
    size = math.prod(shape)
    n = -(-size * max(width, 32) // 128)
    vectors = philox_4x32(words[:2], _advanced(counter, _count(n)))
    bits = mx.stack(list(vectors), axis=-1)
    if width == 64:
        bits = bits.view(U64)
    end = _advanced(counter, mx.array(n, dtype=U32))
    new_state = mx.stack([*words[:2], *(end if state.size == 3 else end[:2])]).view(U64)
    return new_state, bits.reshape(-1)[:size].reshape(shape)
