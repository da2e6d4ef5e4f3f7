"""CUDA C++ of elementwise steps, for kernels that are written for a program's own steps.

In registers a half type's number is a float that its type can hold: computed in float32, rounded after each step. What is not here (complex numbers,
integer division, ...) has no text, and stays outside of such kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_mps.plan.types import Step

HALF = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_INTEGERS = {f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}

MEMORY: dict[str, str] = {"bool": "bool", "float32": "float", **HALF, **_INTEGERS}
REGISTER: dict[str, str] = {**MEMORY, "float16": "float", "bfloat16": "float"}

# What the text needs besides CUDA's own functions, once before it.
HEADER = """
template <typename T> __device__ T jax_to_integer(float x, float high) {  // truncates, saturates, NaN gives 0
  const T most = (T(-1) > T(0)) ? T(-1) : T((((unsigned long long)1) << (8 * sizeof(T) - 1)) - 1);
  const float low = (T(-1) > T(0)) ? 0.0f : -high;
  return x != x ? T(0) : x >= high ? most : x <= low ? T(T(-1) > T(0) ? T(0) : T(-most - 1)) : T(x);
}
__device__ inline float jax_sigmoid(float x) {
  float y = 1.0f / (1.0f + expf(fabsf(x)));
  return x < 0 ? y : 1.0f - y;
}
"""


def load(dtype: str, text: str) -> str:
    """What is read from memory as it is in registers."""
    return f"(float)({text})" if dtype in HALF else text


def store(dtype: str, text: str) -> str:
    """What is in registers as it is written to memory."""
    return f"{HALF[dtype]}({text})" if dtype in HALF else text


def rounded(dtype: str, text: str) -> str:
    """A float with a half type's precision; any other type's text as it is."""
    return f"(float)({HALF[dtype]}({text}))" if dtype in HALF else text


def constant(dtype: str, value: Any) -> str:
    """A literal, exactly."""
    if dtype == "bool":
        return "true" if value else "false"
    if dtype in _INTEGERS:
        whole = int(value)
        if whole == -(1 << 63):
            return "(-9223372036854775807ll - 1)"
        return f"(({REGISTER[dtype]}){whole}{'u' if dtype.startswith('u') else ''}ll)"
    number = np.float32(value)
    if not np.isfinite(number):
        return f"__int_as_float(0x{number.view(np.uint32):08x})"
    return f"({float(number).hex()}f)"


def expression(step: Step, operands: Sequence[str]) -> str | None:
    """What a step computes for one element, of variables or literals in registers (they may be repeated); None if it has no text."""
    kinds = [*(v.dtype for v in step.operands), *(v.dtype for v in step.results)]
    if len(step.results) != 1 or any(kind not in REGISTER for kind in kinds):
        return None
    kind, name = step.operand.dtype if step.operands else "", step.name.partition(".")[2]
    if step.name == "stablehlo.compare":
        return None if step.compare_type == "TOTALORDER" else f"({operands[0]} {_COMPARED[step.comparison_direction]} {operands[1]})"
    if step.name == "stablehlo.select":
        return f"({operands[0]} ? {operands[1]} : {operands[2]})"
    if step.name == "stablehlo.convert":
        return _converted(kind, step.result.dtype, operands[0])
    if step.name == "stablehlo.reduce_precision":
        return rounded("bfloat16", operands[0]) if (step.exponent_bits, step.mantissa_bits, kind) == (8, 7, "float32") else None
    if kind == "bool":
        text = _BOOL.get(name)
    elif kind in _INTEGERS:
        text = _INTEGER.get(name) if step.name.startswith("stablehlo.") else None
    else:
        text = _FLOAT.get(name)
    if text is None:
        return None
    a, b, c = (*operands, "", "", "")[:3]
    unsigned = f"u{kind.removeprefix('u')}_t"
    text = "(" + text.format(a=a, b=b, c=c, T=REGISTER[kind], U=unsigned if kind in _INTEGERS else "") + ")"
    return text if name == "is_finite" else rounded(kind, text)


def _converted(source: str, target: str, a: str) -> str | None:
    if target == "bool":
        return f"({a} != 0)"
    if target in _INTEGERS:
        if source in _INTEGERS or source == "bool":
            return f"(({REGISTER[target]}){a})"
        bits = int(target.removeprefix("u").removeprefix("int"))
        return f"jax_to_integer<{REGISTER[target]}>({a}, {constant('float32', math.ldexp(1, bits - target.startswith('int')))})"
    if source in _INTEGERS and target in HALF and not source.endswith(("8", "16")):
        return None  # would be rounded twice
    return rounded(target, f"((float){a})") if source not in HALF or target in HALF else a


_COMPARED = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}

_BOOL = {"and": "{a} && {b}", "or": "{a} || {b}", "xor": "{a} != {b}", "not": "!{a}"}

_INTEGER = {
    "add": "({T})(({U}){a} + ({U}){b})", "subtract": "({T})(({U}){a} - ({U}){b})", "negate": "({T})(0 - ({U}){a})",
    "multiply": "({T})((unsigned long long){a} * (unsigned long long){b})",  # not in int, to which 16 bits would be widened
    "maximum": "{a} > {b} ? {a} : {b}", "minimum": "{a} < {b} ? {a} : {b}",
    "clamp": "{b} < {a} ? ({c} < {a} ? {c} : {a}) : {c} < {b} ? {c} : {b}",
    "and": "({T})({a} & {b})", "or": "({T})({a} | {b})", "xor": "({T})({a} ^ {b})", "not": "({T})~{a}",
}  # fmt: skip

_MAXIMUM, _MINIMUM = "{a} != {a} || {a} > {b} ? {a} : {b}", "{a} != {a} || {a} < {b} ? {a} : {b}"  # NaN wins

_FLOAT: dict[str, str] = {
    "add": "{a} + {b}", "subtract": "{a} - {b}", "multiply": "{a} * {b}", "divide": "{a} / {b}", "negate": "-{a}", "square": "{a} * {a}",
    "maximum": _MAXIMUM, "minimum": _MINIMUM,
    "clamp": "{b} != {b} ? {b} : {a} != {a} ? {a} : {c} != {c} ? {c} : fminf(fmaxf({b}, {a}), {c})",
    "abs": "fabsf({a})", "sign": "{a} > 0 ? 1.0f : {a} < 0 ? -1.0f : {a}", "is_finite": "fabsf({a}) < __int_as_float(0x7f800000)",
    "floor": "floorf({a})", "ceil": "ceilf({a})", "round_nearest_even": "rintf({a})", "round_nearest_afz": "roundf({a})",
    "sqrt": "sqrtf({a})", "rsqrt": "rsqrtf({a})", "cbrt": "cbrtf({a})", "logistic": "jax_sigmoid({a})",
    "exponential": "expf({a})", "exponential_minus_one": "expm1f({a})", "log": "logf({a})", "log_plus_one": "log1pf({a})",
    "sine": "sinf({a})", "cosine": "cosf({a})", "tan": "tanf({a})", "tanh": "tanhf({a})", "erf": "erff({a})",
    "power": "powf({a}, {b})", "atan2": "atan2f({a}, {b})", "remainder": "fmodf({a}, {b})",
}  # fmt: skip
