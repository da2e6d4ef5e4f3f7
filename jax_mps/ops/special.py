"""CHLO functions that JAX hands over as composites and that MLX computes better, or in fewer steps, than their decompositions.

What is not here (erfc, erf_inv, lgamma, digamma, Bessel functions, zeta, ...) arrives as StableHLO arithmetic, and is as accurate as XLA's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.registry import Run, lowers, mark_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

# At most 2 ulp, where the decompositions are up to 25 off (MLX 0.32.4 on CPU).
_NATIVE: dict[str, Callable[[mx.array], mx.array]] = {
    "chlo.acos": mx.arccos,
    "chlo.acosh": mx.arccosh,
    "chlo.asin": mx.arcsin,
    "chlo.asinh": mx.arcsinh,
    "chlo.atan": mx.arctan,
    "chlo.atanh": mx.arctanh,
    "chlo.cosh": mx.cosh,
    "chlo.sinh": mx.sinh,
    "chlo.square": mx.square,
    "chlo.tan": mx.tan,
}


@lowers(*_NATIVE)
def native(op: Step) -> Run:
    if op.operand.is_complex:
        raise Unsupported(op, "complex numbers, which its decomposition gets right at the edges")
    return _NATIVE[op.name]


@lowers("chlo.erf")
def erf(op: Step) -> Run:
    """MLX's own on GPU; on CPU its error is absolute: 0.4 % at 1e-5, all of it below 1e-8 (MLX 0.32.4)."""
    function = _erf if device_kind() == "cpu" else mx.erf
    dtype = op.operand.dtype
    if dtype == "float32":
        return function
    return lambda x: function(x.astype(mx.float32)).astype(x.dtype)


@lowers("jax_mps.erf_inv")
def erf_inv(op: Step) -> Run:
    """2.4 ulp off on CPU, the decomposition up to 65 (MLX 0.32.4)."""
    return lambda x: mx.erfinv(x)


# A rational approximation on [-4, 4], highest power first (Eigen's, which the decomposition uses as well)
_NUMERATOR = (
    -2.72614225801306e-10, 2.77068142495902e-8, -2.10102402082508e-6, -5.69250639462346e-5,
    -7.34990630326855e-4, -2.95460011e-3, -1.60960333262415e-2,
)  # fmt: skip
_DENOMINATOR = (-1.45660718464996e-5, -2.13374055278905e-4, -1.68282697438203e-3, -7.37332916720468e-3, -1.42647390514189e-2)


def _erf(x: mx.array) -> mx.array:
    x = mx.clip(x, -4.0, 4.0)
    y = x * x
    return mx.clip(x * _polynomial(y, _NUMERATOR) / _polynomial(y, _DENOMINATOR), -1.0, 1.0)


def _polynomial(x: mx.array, coefficients: Sequence[float]) -> mx.array:
    p = x * coefficients[0]
    for c in coefficients[1:-1]:
        p = (p + c) * x
    return p + coefficients[-1]


mark_elementwise(*_NATIVE, "chlo.erf", "jax_mps.erf_inv")
