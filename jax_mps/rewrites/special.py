"""Special functions that arrive as their decompositions into arithmetic, and that MLX has as one op."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from jax_mps.plan.types import Step
from jax_mps.rewrites.match import Numbers, fuse, splat
from jax_mps.rewrites.table import Scope

# M. Giles, "Approximating the erfinv function" (2010), highest power first: where -log(1 - x^2) < 5, and beyond
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164, 0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047, 1.00167406, 2.83297682,
)  # fmt: skip


def erf_inv(step: Step, scope: Scope) -> Step | None:
    """chlo.erf_inv of float32, whose sixty steps MLX would compute in several passes."""
    test = scope.maker(step.operands[0], "stablehlo.compare")
    magnitude = test and scope.maker(test.operands[0], "stablehlo.abs")
    if not magnitude or step.result.dtype != "float32" or magnitude.operand != step.result:
        return None
    numbers = Numbers()
    x = magnitude.operands[0]
    found = [numbers.of_value(v, x, scope) for v in step.operands]
    if None in found or numbers.of("select", *found) != _erf_inv(numbers.of, numbers.of("leaf")):
        return None
    return fuse("jax_mps.erf_inv", step, (x,), scope)


def _erf_inv(of: Callable[..., int], x: int) -> int:
    def constant(value: float) -> int:
        return of("constant", float(np.float32(value)))

    w = of("negate", of("log_plus_one", of("multiply", x, of("negate", x))))
    central = of("compare", "LT", w, constant(5))
    t = of("select", central, of("subtract", w, constant(2.5)), of("subtract", of("sqrt", w), constant(3)))
    p = of("select", central, constant(_CENTRE[0]), constant(_TAIL[0]))
    for a, b in zip(_CENTRE[1:], _TAIL[1:], strict=True):
        p = of("add", of("select", central, constant(a), constant(b)), of("multiply", p, t))
    edge = of("compare", "EQ", of("abs", x), constant(1))
    return of("select", edge, of("multiply", x, constant(math.inf)), of("multiply", p, x))


def logistic(step: Step, scope: Scope) -> Step | None:
    """1 / (1 + exp(-x)), as JAX writes sigmoid and silu."""
    total = scope.maker(step.operands[1], "stablehlo.add")
    if total is None or not step.result.is_floating or splat(step.operands[0], scope) != 1.0:
        return None
    for one, power in (total.operands, total.operands[::-1]):
        made = scope.maker(power, "stablehlo.exponential")
        negative = made and scope.maker(made.operands[0], "stablehlo.negate")
        if negative and splat(one, scope) == 1.0:
            return fuse("stablehlo.logistic", step, negative.operands, scope)
    return None
