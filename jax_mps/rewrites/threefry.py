"""JAX's random bits: the function of twenty rounds that it calls for each draw, its counters, and what it makes of the two words.

The function is recognised while calls are inlined (`whole`), by its body: every step is compared with the algorithm, up to the order of
operands of commutative ops. The name counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from jax_mps.plan.types import Region, Step, Value
from jax_mps.rewrites.match import Numbers, fuse, origin, splat
from jax_mps.rewrites.table import Scope

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD_OPS = frozenset(["add", "xor", "or", "shift_left", "shift_right_logical"])


def _rounds(of: Callable[..., int], key0: int, key1: int, x: int, y: int) -> tuple[int, int]:
    """The algorithm (ops/random.py computes it), as JAX writes it down."""
    keys = (key0, key1, of("xor", of("xor", key0, key1), of("constant", _PARITY)))
    x, y = of("add", x, key0), of("add", y, key1)
    for group in range(5):
        for r in _ROTATIONS[group % 2]:
            x = of("add", x, y)
            turned = of("or", of("shift_left", y, of("constant", r)), of("shift_right_logical", y, of("constant", 32 - r)))
            y = of("xor", x, turned)
        x = of("add", x, keys[(group + 1) % 3])
        y = of("add", of("add", y, keys[(group + 2) % 3]), of("constant", group + 1))
    return x, y


def whole(operands: Sequence[Value], steps: Sequence[Step], results: Sequence[Value]) -> Step | None:
    """One step for the body of a function that a program calls, if it is ThreeFry2x32 of (key, key, counter, counter), words of any shapes."""
    if len(operands) != 4 or len(results) != 2 or any(v.dtype != "uint32" for v in (*operands, *results)) or len(set(results)) != 2:
        return None
    numbers = Numbers()
    known: dict[Value, int] = {}
    for position, value in enumerate(operands):
        known.setdefault(value, numbers.of("operand", position))
    leaves = tuple(known[v] for v in operands)
    for step in steps:
        number = _number(step, known, numbers)
        if number is None:
            return None
        known[step.results[0]] = number
    if tuple(known.get(v) for v in results) != _rounds(numbers.of, *leaves):
        return None
    original = Region(tuple(operands), tuple(steps), tuple(results))
    return Step("jax_mps.threefry2x32", tuple(operands), tuple(results), {"original": original}, location=steps[-1].location, text=())


def _number(step: Step, known: dict[Value, int], numbers: Numbers) -> int | None:
    if step.name == "stablehlo.constant":
        value = np.asarray(step.value)
        return numbers.of("constant", int(value.reshape(-1)[0])) if value.size and not any(value.strides) else None
    operands = [known.get(v) for v in step.operands]
    if None in operands or len(step.results) != 1:
        return None
    name = step.name.removeprefix("stablehlo.")
    if name == "broadcast_in_dim":  # as NumPy would: from a scalar, or along axes of size 1
        rank = step.operand.rank
        return operands[0] if rank == 0 or (rank == step.result.rank and list(step.broadcast_dimensions) == list(range(rank))) else None
    return numbers.of(name, *operands) if name in _WORD_OPS and step.result.dtype == "uint32" else None


# ---- counters ------------------------------------------------------------------------------------------------------------------------


def counted(step: Step, scope: Scope) -> Step | None:
    """Counters that are the positions of the draw's elements: nothing to read, and the high word is 0."""
    key0, key1, high, low = step.operands
    shape = step.result.shape
    drawn = _positions(high, low, scope)
    if drawn is None or math.prod(drawn) >= 2**32 or not _trails(high, low, drawn, shape, scope):
        return None
    return fuse("jax_mps.threefry_counted", step, (key0, key1), scope, {"drawn": drawn}, shared=True)


def _trails(high: Value, low: Value, drawn: tuple[int, ...], shape: tuple[int, ...], scope: Scope) -> bool:
    """Whether both counters run along the last dimensions of the result, as a draw of shape `drawn` does, and are repeated along the others
    (which keys of a `vmap` run along)."""
    lead = len(shape) - len(drawn)
    if lead < 0 or shape[lead:] != drawn:
        return False
    for value in (high, low):
        if value.type.rank != len(shape) or value.shape[lead:] != drawn or any(s != 1 for s in value.shape[:lead]):
            return False
        if origin(value, scope)[1] != [None] * lead + [d if s > 1 else None for d, s in enumerate(drawn)]:
            return False
    return True


def _positions(high: Value, low: Value, scope: Scope) -> tuple[int, ...] | None:
    """The shape whose row-major positions, as 64 bits, the two words are."""
    if high.type.size == 1 and splat(high, scope) == 0 and splat(low, scope) == 0:
        return ()
    words = [scope.maker(origin(v, scope)[0], "stablehlo.convert") for v in (high, low)]
    if not words[0] or not words[1]:
        return None
    position = words[1].operands[0]
    shift = scope.maker(words[0].operands[0], "stablehlo.shift_right_logical")
    if not shift or shift.operands[0] is not position or splat(shift.operands[1], scope) != 32 or position.dtype != "uint64":
        return None
    strides = _strides(position, scope)
    wanted = {d: math.prod(position.shape[d + 1 :]) for d, size in enumerate(position.shape) if size > 1}
    return position.shape if strides is not None and {d: s for d, s in strides.items() if position.shape[d] > 1} == wanted else None


def _strides(value: Value, scope: Scope) -> dict[int, int] | None:
    """For a sum of iotas times constants: what each dimension counts by."""
    step = scope.producers.get(value)
    if step is None:
        return None
    if step.name == "stablehlo.iota":
        return {step.iota_dimension: 1}
    if step.name == "stablehlo.multiply":
        for factor, rest in (step.operands, step.operands[::-1]):
            by, counts = splat(factor, scope), scope.maker(rest, "stablehlo.iota")
            if by is not None and counts is not None:
                return {counts.iota_dimension: by}
        return None
    if step.name != "stablehlo.add":
        return None
    left, right = (_strides(v, scope) for v in step.operands)
    return {**left, **right} if left is not None and right is not None and not left.keys() & right.keys() else None


# ---- what is made of the words -------------------------------------------------------------------------------------------------------


def bits(step: Step, scope: Scope) -> Step | None:
    """The two words of each counter xored: 32 random bits for each element."""
    x, y = step.operands
    pair = scope.maker(x, "jax_mps.threefry_counted")
    if not pair or {x, y} != set(pair.results):
        return None
    return fuse("jax_mps.threefry_bits", step, pair.operands[:2], scope, {"drawn": pair.drawn})


# Mantissa bits, and the exponent's bits of 1, of the floats that random bits are made into
_ONE = {"float16": (10, 0x3C00), "bfloat16": (7, 0x3F80), "float32": (23, 0x3F800000)}


def unit(step: Step, scope: Scope) -> Step | None:
    """Random bits as the mantissa of a number from 1 to 2, less 1: an integer times a power of two, exactly the same number. No bits are
    reinterpreted, which MLX does not fuse."""
    if step.result.dtype not in _ONE or splat(step.operands[1], scope) != 1.0:
        return None
    mantissa, one = _ONE[step.result.dtype]
    cast = scope.maker(step.operands[0], "stablehlo.bitcast_convert")
    filled = cast and cast.operand.is_unsigned and cast.operand.shape == step.result.shape and scope.maker(cast.operands[0], "stablehlo.or")
    for shifted, exponent in (filled.operands, filled.operands[::-1]) if filled else ():
        shift = scope.maker(shifted, "stablehlo.shift_right_logical")
        by = splat(shift.operands[1], scope) if shift else None
        if shift and splat(exponent, scope) == one and by is not None and _width(shift.operands[0], scope) - by == mantissa:
            return fuse("jax_mps.unit", step, shift.operands[:1], scope, {"shift": by, "mantissa": mantissa})
    return None


def _width(value: Value, scope: Scope) -> int:
    """How many low bits of an unsigned integer may be set."""
    widened = scope.maker(value, "stablehlo.convert")
    dtypes = [value.dtype] + ([widened.operand.dtype] if widened and widened.operand.is_unsigned else [])
    return min(8 * np.dtype(dtype).itemsize for dtype in dtypes)
