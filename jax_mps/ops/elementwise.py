"""Elementwise arithmetic, comparison, conversion and constants.

What StableHLO defines and MLX does not is defined here: integer division by zero and of INT_MIN by -1, saturating conversions, total
order. Complex operands whose formulas differ go to `complex`; bit operations live in `bits`.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops import bits
from jax_mps.ops import complex as complex_
from jax_mps.ops.bits import constant as const
from jax_mps.ops.dtypes import BITS, MX, literal
from jax_mps.ops.registry import LoweredRegion, Run, defining_step, elementwise, lowers, mark_elementwise
from jax_mps.ops.shapes import small_on_cpu
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, Value

FLOATS = frozenset([mx.float16, mx.bfloat16, mx.float32])
SIGNED = frozenset([mx.int8, mx.int16, mx.int32, mx.int64])


def is_float(x: mx.array) -> bool:
    return x.dtype in FLOATS


def negative(x: mx.array) -> mx.array:
    """Whether the sign bit of a signed integer or float is set (-0.0 has it)."""
    s = bits.signed(x)
    return s < const(0, s.dtype)


# ---- integer division ----------------------------------------------------------------------------------------------------------


def divide(a: mx.array, b: mx.array) -> mx.array:
    if a.dtype == mx.complex64:
        return complex_.divide(a, b)
    if is_float(a):
        return mx.divide(a, b)
    return _divide_integers(a, b)


def _divide_integers(a: mx.array, b: mx.array) -> mx.array:
    """Truncates; x / 0 is all ones (-1) and INT_MIN / -1 wraps, as XLA has it: magnitudes are divided unsigned, where neither can trap."""
    if a.dtype not in SIGNED:
        zero = b == const(0, b.dtype)
        return mx.where(zero, const((1 << bits.WIDTH[a.dtype]) - 1, a.dtype), mx.floor_divide(a, mx.maximum(b, const(1, b.dtype))))
    m, n = bits.unsigned(mx.abs(a)), bits.unsigned(mx.abs(b))
    q = bits.signed(mx.floor_divide(m, mx.maximum(n, const(1, n.dtype))))
    q = mx.where(negative(a ^ b), -q, q)
    return mx.where(b == const(0, b.dtype), const(-1, a.dtype), q)


def remainder(a: mx.array, b: mx.array) -> mx.array:
    """The sign is the dividend's; x % 0 is x for integers, NaN for floats."""
    if is_float(a):
        r = mx.remainder(mx.abs(a), mx.abs(b))
        return mx.where(negative(a), -r, r)
    if a.dtype not in SIGNED:
        return mx.where(b == const(0, b.dtype), a, mx.remainder(a, mx.maximum(b, const(1, b.dtype))))
    m, n = bits.unsigned(mx.abs(a)), bits.unsigned(mx.abs(b))
    r = bits.signed(mx.remainder(m, mx.maximum(n, const(1, n.dtype))))
    return mx.where(b == const(0, b.dtype), a, mx.where(negative(a), -r, r))


def power(a: mx.array, b: mx.array) -> mx.array:
    if a.dtype == mx.complex64:
        return complex_.power(a, b)
    if is_float(a) or a.dtype not in SIGNED:
        return mx.power(a, b)
    return _power_signed(a, b)


def _power_signed(a: mx.array, b: mx.array) -> mx.array:
    """A negative exponent leaves only the units: 1, and -1 by parity; everything else is 0, as XLA has it."""
    zero, one = const(0, a.dtype), const(1, a.dtype)
    odd = (b & one) == one
    unit = mx.where(mx.abs(a) == one, mx.where(odd, a, one), zero)
    return mx.where(b < zero, unit, mx.power(a, mx.maximum(b, zero)))


def atan2(y: mx.array, x: mx.array) -> mx.array:
    return complex_.atan2(y, x) if y.dtype == mx.complex64 else mx.arctan2(y, x)


# ---- signs, rounding -----------------------------------------------------------------------------------------------------------


def sign(x: mx.array) -> mx.array:
    """MLX gives 0 for NaN and +0 for -0; both are themselves."""
    if is_float(x):
        return mx.where(mx.abs(x) > const(0, x.dtype), mx.sign(x), x)
    if x.dtype == mx.complex64:
        return complex_.sign(x)
    return mx.sign(x)


def round_nearest_afz(x: mx.array) -> mx.array:
    """Halves away from zero; `floor(|x| + .5)` would round 0.49999997 up."""
    whole = mx.floor(mx.abs(x))
    up = mx.abs(x) - whole >= const(0.5, x.dtype)
    y = mx.where(up, whole + const(1, x.dtype), whole)
    return mx.where(negative(x), -y, y)


def is_finite(x: mx.array) -> mx.array:
    return mx.abs(x) < const(math.inf, x.dtype)


# ---- exponentials --------------------------------------------------------------------------------------------------------------


def exponential(x: mx.array) -> mx.array:
    return complex_.exponential(x) if x.dtype == mx.complex64 else exp(x)


def exp(x: mx.array) -> mx.array:
    """MLX's own on GPU; its float32 kernel on CPU is 63 ulp off (mlx#1341) and infinite from 88.38 on (MLX 0.32.4)."""
    if x.dtype == mx.float16 or device_kind() != "cpu":
        return mx.exp(x)
    return (_exp_by_power(x) if x.size < _SMALL else _exp_by_powers(x.astype(mx.float32))).astype(x.dtype)


_SMALL = 8192  # below, the number of MLX ops costs more than what they do


def _exp_by_power(x: mx.array) -> mx.array:
    """float64's power is libm's, and its exp is not: half an ulp of float32."""
    return mx.power(const(math.e, mx.float64), x.astype(mx.float64))


# exp(r) on |r| <= ln(2)/2: Cephes' minimax coefficients (expf), highest power first
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4  # Cody and Waite's two parts of ln(2)
_EXP_MAX, _EXP_MIN = 88.72284, -87.33655  # past these the result is infinite, or below the smallest normal number, which XLA flushes


def _exp_by_powers(x: mx.array) -> mx.array:
    """2^n exp(r), x = n ln(2) + r; the power of two goes straight into the exponent's bits."""
    n = mx.round(x * _LOG2_E)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * _EXP[0]
    for c in _EXP[1:-1]:
        p = (p + c) * r
    y = ((p + _EXP[-1]) * r) * r + r + 1.0
    scaled = (y.view(mx.int32) + (n.astype(mx.int32) << 23)).view(mx.float32)
    return mx.where(x <= _EXP_MAX, mx.where(x >= _EXP_MIN, scaled, 0.0), x * math.inf)


def sine(x: mx.array) -> mx.array:
    """MLX's own on GPU; on CPU it is up to 600 ulp off near its zeros below 1000, 80,000 ulp below 1e7, and takes -0 to 0 (MLX 0.32.4)."""
    if device_kind() != "cpu":
        return mx.sin(x)
    if x.size < _FEW:
        return mx.real(mx.sin(x.astype(mx.complex64))).astype(x.dtype)
    t = _half_tangent(x)
    return ((t + t) / (t * t + const(1, mx.float64))).astype(x.dtype)


def cosine(x: mx.array) -> mx.array:
    """As `sine`."""
    if device_kind() != "cpu":
        return mx.cos(x)
    if x.size < _FEW:
        return mx.real(mx.cos(x.astype(mx.complex64))).astype(x.dtype)
    square = mx.square(_half_tangent(x))
    one = const(1, mx.float64)
    return ((one - square) / (square + one)).astype(x.dtype)


# Below, the complex functions are faster, which are libm's (0.56 ulp): three ops instead of eight, but 16 ns an element or more.
_FEW = 512


def _half_tangent(x: mx.array) -> mx.array:
    """tan(x / 2) in float64, which is libm's: sine and cosine follow from it to half an ulp of float32, at 1.2 times the cost of MLX's."""
    return mx.tan(x.astype(mx.float64) * const(0.5, mx.float64))


def cbrt(x: mx.array) -> mx.array:
    """A power and one step of Newton's; x / y / y cannot overflow, y * y * y could."""
    m = mx.abs(x.astype(mx.float32))
    y = mx.power(m, const(1 / 3, mx.float32))
    better = y - (y - m / y / y) * const(1 / 3, mx.float32)
    y = mx.where((m > const(0, mx.float32)) & (m < const(math.inf, mx.float32)), better, y).astype(x.dtype)
    return mx.where(negative(x), -y, y)


def logistic(x: mx.array) -> mx.array:
    if x.dtype == mx.complex64:
        return complex_.logistic(x)
    f = x.astype(mx.float32)  # half types' own kernels round twice
    if device_kind() != "cpu":
        y = mx.sigmoid(f)
    else:
        y = 1.0 / (mx.expm1(-f) + 2.0 if x.size < _SMALL else exp(-f) + 1.0)
    return y.astype(x.dtype)


def rsqrt(x: mx.array) -> mx.array:
    return mx.rsqrt(x.astype(mx.float32)).astype(x.dtype)  # as for logistic


# ---- rows ----------------------------------------------------------------------------------------------------------------------


def _real_or_complex(real: Run, complex_one: Run) -> Run:
    return lambda x: complex_one(x) if x.dtype == mx.complex64 else real(x)


elementwise(
    {
        "stablehlo.abs": _real_or_complex(mx.abs, complex_.abs_),
        "stablehlo.add": mx.add,
        "stablehlo.subtract": mx.subtract,
        "stablehlo.multiply": mx.multiply,
        "stablehlo.divide": divide,
        "stablehlo.remainder": remainder,
        "stablehlo.power": power,
        "stablehlo.maximum": mx.maximum,
        "stablehlo.minimum": mx.minimum,
        "stablehlo.negate": mx.negative,
        "stablehlo.sign": sign,
        "stablehlo.ceil": mx.ceil,
        "stablehlo.floor": mx.floor,
        "stablehlo.round_nearest_afz": round_nearest_afz,
        "stablehlo.round_nearest_even": mx.round,
        "stablehlo.is_finite": is_finite,
        "stablehlo.cbrt": cbrt,
        "stablehlo.sqrt": _real_or_complex(mx.sqrt, complex_.sqrt),
        "stablehlo.rsqrt": _real_or_complex(rsqrt, complex_.rsqrt),
        "stablehlo.exponential": exponential,
        "stablehlo.exponential_minus_one": _real_or_complex(mx.expm1, complex_.expm1),
        "stablehlo.log": _real_or_complex(mx.log, complex_.log),
        "stablehlo.log_plus_one": _real_or_complex(mx.log1p, complex_.log1p),
        "stablehlo.logistic": logistic,
        "stablehlo.tanh": _real_or_complex(mx.tanh, complex_.tanh),
        "stablehlo.tan": _real_or_complex(mx.tan, complex_.tan),
        "stablehlo.sine": _real_or_complex(sine, complex_.sin),
        "stablehlo.cosine": _real_or_complex(cosine, complex_.cos),
        "stablehlo.atan2": atan2,
        "stablehlo.clamp": lambda low, x, high: mx.minimum(mx.maximum(x, low), high),
    }
)


# ---- select --------------------------------------------------------------------------------------------------------------------

# MLX's CPU select branches once per element: 7-11 ns each where the condition is unpredictable, against 0.5-2 for selecting bits. Below
# this many elements the three more ops cost what they save.
_SELECT_BITS = 1 << 15
_WORDS = {
    mx.float32: mx.int32, mx.int32: mx.int32, mx.uint32: mx.int32, mx.float16: mx.int16, mx.bfloat16: mx.int16, mx.int16: mx.int16,
    mx.uint16: mx.int16, mx.int64: mx.int64, mx.uint64: mx.int64,
}  # fmt: skip


mark_elementwise("stablehlo.select")


@lowers("stablehlo.select")
def select(op: Step) -> Run:
    if device_kind() != "cpu" or op.result.size < _SELECT_BITS:
        return mx.where
    true_is_zero, false_is_zero = (_is_zero(v) for v in op.operands[1:])

    def run(pred: mx.array, on_true: mx.array, on_false: mx.array) -> mx.array:
        word = _WORDS.get(on_true.dtype)
        if word is None or pred.size < _SELECT_BITS:
            return mx.where(pred, on_true, on_false)
        one = pred.view(mx.uint8).astype(word)
        if true_is_zero:
            bits = on_false.view(word) & (one - const(1, word))
        elif false_is_zero:
            bits = on_true.view(word) & mx.negative(one)
        else:
            x, y = on_true.view(word), on_false.view(word)
            bits = y ^ ((x ^ y) & mx.negative(one))
        return bits.view(on_true.dtype)

    return run


def _is_zero(value: Value) -> bool:
    """Whether every bit of the value is known to be 0."""
    step = defining_step(value)
    while step is not None and step.name == "stablehlo.broadcast_in_dim":
        step = defining_step(step.operands[0])
    if step is None or step.name != "stablehlo.constant" or any(s for s, d in zip(step.value.strides, step.value.shape, strict=True) if d > 1):
        return False
    return not any(step.value[(slice(0, 1),) * step.value.ndim].tobytes())


# ---- comparison ----------------------------------------------------------------------------------------------------------------

_DIRECTIONS = {
    "EQ": mx.equal, "NE": mx.not_equal, "LT": mx.less, "LE": mx.less_equal, "GT": mx.greater, "GE": mx.greater_equal,
}  # fmt: skip


@lowers("stablehlo.compare")
def compare(op: Step) -> Run:
    direction = _DIRECTIONS[op.comparison_direction]
    if op.operand.is_complex and op.comparison_direction not in ("EQ", "NE"):
        raise Unsupported(op, "complex numbers have no order")
    if op.compare_type == "TOTALORDER":
        return lambda lhs, rhs: direction(total_order(lhs), total_order(rhs))
    return direction


def total_order(x: mx.array) -> mx.array:
    """Integers in the order that IEEE 754 gives all floats: -NaN < -inf < ... < -0 < +0 < ... < +inf < +NaN."""
    s = bits.signed(x)
    magnitude = const((1 << (bits.WIDTH[x.dtype] - 1)) - 1, s.dtype)
    return mx.where(s < const(0, s.dtype), s ^ magnitude, s)


# ---- conversion ----------------------------------------------------------------------------------------------------------------


@lowers("stablehlo.convert")
def convert(op: Step) -> Run:
    target = op.result.dtype
    return lambda x: convert_to(x, target)


def convert_to(x: mx.array, target: str) -> mx.array:
    """Element type conversion as XLA's CPU backend has it: float to integer truncates, saturates and takes NaN to 0.
    Of a complex number only the real part counts, for bool, too (JAX itself asks whether it differs from 0)."""
    if x.dtype == mx.complex64 and target != "complex64":
        x = mx.real(x)
    if target == "bool":
        return mx.not_equal(x, const(0, x.dtype))
    if is_float(x) and not target.startswith(("float", "bfloat", "complex")):
        return _float_to_integer(x.astype(mx.float32), MX[target], BITS[target], target.startswith("int"))
    return x.astype(MX[target])


def _float_to_integer(x: mx.array, target: mx.Dtype, width: int, signed: bool) -> mx.array:
    low = -(2 ** (width - 1)) if signed else 0
    high = 2 ** (width - 1) - 1 if signed else 2**width - 1
    top = float(np.nextafter(np.float32(high + 1), np.float32(0)))  # the largest float32 that the type can hold
    x = mx.where(x == x, x, const(0, mx.float32))
    y = mx.minimum(mx.maximum(x, const(low, mx.float32)), const(top, mx.float32)).astype(target)
    return mx.where(x > const(top, mx.float32), const(high, target), y)


@lowers("stablehlo.bitcast_convert")
def bitcast_convert(op: Step) -> Run:
    """A narrower result has one dimension more; a wider one has one less."""
    source, target = op.operand.dtype, op.result.dtype
    dtype = MX[target]
    if "bool" in (source, target) and source != target:
        raise Unsupported(op, "a bitcast of bool to or from another type")
    if BITS[source] > BITS[target]:
        return lambda x: x[..., None].view(dtype)
    if BITS[source] < BITS[target] and device_kind() != "cpu" and target != "complex64":
        return lambda x: _joined(x, bits.UINT[BITS[target]]).view(dtype)
    if BITS[source] < BITS[target]:
        return lambda x: x.view(dtype)[..., 0]
    return lambda x: x.view(dtype)


def _joined(x: mx.array, word: mx.Dtype) -> mx.array:
    """The elements along the last axis as one word, the first lowest. A view may start where no GPU reads a word: a slice's at any element."""
    width = bits.WIDTH[x.dtype]
    places = mx.array([width * i for i in range(x.shape[-1])], word)
    return mx.sum(bits.unsigned(x).astype(word) << places, axis=-1).astype(word)


# (exponent bits, mantissa bits) of the floats that are reduced
_FORMATS = {"float16": (5, 10), "bfloat16": (8, 7), "float32": (8, 23)}


@lowers("stablehlo.reduce_precision")
def reduce_precision(op: Step) -> Run:
    """Rounds to fewer mantissa bits, half to even; what the exponent cannot hold becomes infinite or zero. NaN stays."""
    if op.operand.dtype not in _FORMATS:
        raise Unsupported(op, f"reduced precision of {op.operand.dtype}")
    exponent, mantissa = _FORMATS[op.operand.dtype]
    exponent_bits, mantissa_bits = op.exponent_bits, op.mantissa_bits
    dtype, word = MX[op.operand.dtype], bits.UINT[BITS[op.operand.dtype]]
    magnitude_mask = (1 << (exponent + mantissa)) - 1
    bias, smaller_bias = (1 << (exponent - 1)) - 1, (1 << (exponent_bits - 1)) - 1
    infinity = const(((1 << exponent) - 1) << mantissa, word)

    def round_mantissa(u: mx.array) -> mx.array:
        last = mantissa - mantissa_bits
        if last <= 0:
            return u
        odd = (u >> const(last, word)) & const(1, word)
        u = u + odd + const((1 << (last - 1)) - 1, word)
        return u & const(magnitude_mask & ~((1 << last) - 1), word)

    def limit_exponent(u: mx.array) -> mx.array:
        if exponent_bits >= exponent:
            return u
        u = mx.where(u >= const((bias + smaller_bias + 1) << mantissa, word), infinity, u)
        return mx.where(u < const((bias - smaller_bias + 1) << mantissa, word), const(0, word), u)

    def run(operand: mx.array) -> mx.array:
        u = operand.view(word) & const(magnitude_mask, word)
        y = limit_exponent(round_mantissa(u)).view(dtype)
        y = mx.where(negative(operand), -y, y)
        return mx.where(operand == operand, y, operand)

    return run


mark_elementwise("stablehlo.compare", "stablehlo.convert", "stablehlo.bitcast_convert", "stablehlo.reduce_precision")


# ---- constants and the rest ----------------------------------------------------------------------------------------------------


@lowers("stablehlo.constant")
def constant(op: Step) -> Run:
    """A splat is a broadcast of one element: exported as an op, not as bytes."""
    value, dtype, shape = op.value, op.result.dtype, op.result.shape
    if value.size == 0:
        return lambda: mx.zeros(shape, MX[dtype])
    if value.ndim and not any(value.strides) and not small_on_cpu(op.result):
        return lambda: mx.broadcast_to(literal(value[(0,) * value.ndim], dtype), shape)
    return lambda: literal(value, dtype)


@lowers("stablehlo.map")
def map_(op: Step, computation: LoweredRegion) -> Run:
    if not computation.is_elementwise:
        raise Unsupported(op, "a computation that is not elementwise")
    shape = op.result.shape
    return lambda *inputs: mx.broadcast_to(computation(*inputs)[0], shape)


@lowers("stablehlo.optimization_barrier")
def optimization_barrier(op: Step) -> Run:
    """Each result is there when all operands are, and MLX takes none for the operand that it is: `jax.checkpoint` computes anew behind it."""
    return lambda *operands: mx.depends(list(operands), []) if operands else []


@lowers("stablehlo.after_all", "stablehlo.create_token")
def after_all(op: Step) -> Run:
    return lambda *tokens: tokens[0] if tokens else mx.array(False)


@lowers("stablehlo.partition_id", "stablehlo.replica_id")
def process_id(op: Step) -> Run:
    """There is one process, number 0."""
    return lambda: mx.array(0, dtype=mx.uint32)
