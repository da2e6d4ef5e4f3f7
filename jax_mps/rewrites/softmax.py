"""softmax, log_softmax, logsumexp and their gradients along the last axis, as JAX emits them: from the maximum to the division.

All are found by the exponential of a row less its maximum. MLX's own kernels read a row once or twice where these steps read it five times.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, row_origin, row_origin_rounded, row_reduction, same, splat
from jax_mps.rewrites.table import Scope

Shape: TypeAlias = tuple[int, ...]


def softmax(step: Step, scope: Scope) -> Step | None:
    """exp(x - max(x)) / sum(exp(x - max(x)))."""
    exponential, total = step.operands
    x = _shifted_exponential(exponential, scope)
    if x is None or not _is_total(total, exponential, scope):
        return None
    return fuse("jax_mps.softmax", step, (x,), scope)


def log_softmax(step: Step, scope: Scope) -> Step | None:
    """d - log(sum(exp(d))), d = x - max(x)."""
    shifted, logarithm = step.operands
    x = _shifted(shifted, scope)
    source = x and row_origin(logarithm, x.shape[:-1], scope)
    log = source and scope.maker(source, "stablehlo.log")
    if not x or not log or not _is_total_of_exponentials(log.operands[0], shifted, scope):
        return None
    return fuse("jax_mps.log_softmax", step, (x,), scope)


def log_of_sum(step: Step, scope: Scope) -> Step | None:
    """log(sum(exp(d))), d = x - max(x), where d is read elsewhere, too: a cross entropy."""
    total = step.operands[0]
    exponential = _summed(total, scope)
    maker = exponential and scope.maker(exponential, "stablehlo.exponential")
    if not maker or _shifted(maker.operands[0], scope) is None:
        return None
    return fuse("jax_mps.log_sum_exp", step, maker.operands, scope)


def logsumexp(step: Step, scope: Scope) -> Step | None:
    """log(|sum(exp(x - m))|) + m, m the maximum if that is finite, else 0."""
    for logarithm, m in (step.operands, step.operands[::-1]):
        log = scope.maker(logarithm, "stablehlo.log")
        magnitude = log and scope.maker(log.operands[0], "stablehlo.abs")
        exponential = magnitude and _summed(magnitude.operands[0], scope)
        maker = exponential and scope.maker(exponential, "stablehlo.exponential")
        x = maker and _finitely_shifted(maker.operands[0], scope)
        if maker and x and _shift_of(maker.operands[0], scope) is m:
            return fuse("jax_mps.logsumexp", step, (x,), scope)
    return None


# ---- gradients: before the forward rewrites, which fire only where these have left nothing to read their parts --------------------------


def softmax_gradient(step: Step, scope: Scope) -> Step | None:
    """(g / sum(e) - sum(g e / sum(e)^2)) e, e = exp(x - max(x)): what differentiating the division gives."""
    for scaled, exponential in (step.operands, step.operands[::-1]):
        x = _shifted_exponential(exponential, scope)
        parts = x and scope.maker(scaled, "stablehlo.add")
        if not x or not parts:
            continue
        for direct, through_sum in (parts.operands, parts.operands[::-1]):
            division = scope.maker(direct, "stablehlo.divide")
            if division and _is_total(division.operands[1], exponential, scope):
                g = division.operands[0]
                if _is_pull_through_sum(through_sum, g, exponential, scope):
                    return fuse("jax_mps.softmax_gradient", step, (x, g), scope, shared=True)
    return None


def _is_pull_through_sum(value: Value, g: Value, exponential: Value, scope: Scope) -> bool:
    """Whether it is -sum(g * 1 / sum(e)^2 * e), spread over the row."""
    lead = exponential.shape[:-1]
    row = row_origin_rounded(value, lead, scope)
    negated = row and scope.maker(row, "stablehlo.negate")
    total = negated and row_origin_rounded(negated.operands[0], lead, scope)
    product = total and row_reduction(total, "add", scope)
    return bool(product and _is_product(product, g, exponential, scope))


def _is_product(product: Value, g: Value, exponential: Value, scope: Scope) -> bool:
    """Whether it is (g * 1 / sum(e)^2) * e in any order of the factors."""
    factors = _factors(product, scope)
    inverses = [f for f in factors if f is not g and f is not exponential]
    if len(factors) != 3 or len(inverses) != 1:
        return False
    inverse = row_origin(inverses[0], exponential.shape[:-1], scope)
    one = inverse and scope.maker(inverse, "stablehlo.divide")
    if not one or splat(one.operands[0], scope) != 1.0:
        return False
    square = scope.maker(one.operands[1], "stablehlo.multiply")
    return bool(square and square.operands[0] is square.operands[1] and _is_total(square.operands[0], exponential, scope))


def _factors(value: Value, scope: Scope, depth: int = 2) -> list[Value]:
    step = scope.maker(value, "stablehlo.multiply") if depth else None
    return [value] if step is None else [f for v in step.operands for f in _factors(v, scope, depth - 1)]


def normalised_times(step: Step, scope: Scope) -> Step | None:
    """exp(x - max(x)) * (q / sum(exp(x - max(x)))), q one number a row: what the gradients of log_softmax and logsumexp end in."""
    for quotient, exponential in (step.operands, step.operands[::-1]):
        made = scope.maker(exponential, "stablehlo.exponential")
        x = made and (_shifted(made.operands[0], scope) or _finitely_shifted(made.operands[0], scope))
        if not x:
            continue
        row = row_origin_rounded(quotient, x.shape[:-1], scope)
        division = row and scope.maker(_signless(row, exponential, scope), "stablehlo.divide")
        if not division:
            continue
        magnitude = scope.maker(division.operands[1], "stablehlo.abs")
        if _is_total(magnitude.operands[0] if magnitude else division.operands[1], exponential, scope):
            return fuse("jax_mps.softmax_times", step, (x, division.operands[0]), scope, shared=True)
    return None


def _signless(row: Value, exponential: Value, scope: Scope) -> Value:
    """q, of select(sum(e) >= 0, q, 0) - select(sum(e) >= 0, 0, q): the gradient of |sum(e)|, which is never negative."""
    both = scope.maker(row, "stablehlo.add")
    for kept, negated in (both.operands, both.operands[::-1]) if both else ():
        choice, negation = scope.maker(kept, "stablehlo.select"), scope.maker(negated, "stablehlo.negate")
        other = negation and scope.maker(negation.operands[0], "stablehlo.select")
        if not choice or not other or choice.operands[1] is not other.operands[2] or not same(choice.operands[0], other.operands[0], scope):
            continue
        if splat(choice.operands[2], scope) != 0.0 or splat(other.operands[1], scope) != 0.0:
            continue
        test = scope.maker(choice.operands[0], "stablehlo.compare")
        if test and test.comparison_direction == "GE" and splat(test.operands[1], scope) == 0.0 and _is_total(test.operands[0], exponential, scope):
            return choice.operands[1]
    return row


# ---- parts ---------------------------------------------------------------------------------------------------------------------------


def _shifted_exponential(value: Value, scope: Scope) -> Value | None:
    """x, of exp(x - max(x))."""
    step = scope.maker(value, "stablehlo.exponential")
    return _shifted(step.operands[0], scope) if step else None


def _shifted(value: Value, scope: Scope) -> Value | None:
    """x, of x - max(x) along the last axis."""
    step = scope.maker(value, "stablehlo.subtract")
    if step is None or not step.operand.is_floating or not step.operand.rank or step.operand.size == 0:
        return None
    x, shift = step.operands
    top = row_origin(shift, x.shape[:-1], scope)
    return x if top is not None and _is_maximum(top, x, scope) else None


def _finitely_shifted(value: Value, scope: Scope) -> Value | None:
    """x, of x - m with m the maximum along the last axis where that is finite, else 0."""
    step = scope.maker(value, "stablehlo.subtract")
    if step is None or not step.operand.is_floating or not step.operand.rank or step.operand.size == 0:
        return None
    m = _shift_of(value, scope)
    return step.operands[0] if m is not None and _is_finite_maximum(m, step.operands[0], scope) else None


def _shift_of(value: Value, scope: Scope) -> Value | None:
    step = scope.maker(value, "stablehlo.subtract")
    return row_origin(step.operands[1], step.operand.shape[:-1], scope) if step else None


def _is_maximum(value: Value, x: Value, scope: Scope) -> bool:
    """Whether it is the maximum along the rows of x; JAX takes the maximum with -inf once more, and `vmap` may turn both around."""
    turned, whole_turned = scope.maker(value, "stablehlo.transpose"), scope.maker(x, "stablehlo.transpose")
    if turned and whole_turned:
        rows = tuple(turned.permutation)
        return tuple(whole_turned.permutation) == (*rows, len(rows)) and _is_maximum(turned.operands[0], whole_turned.operands[0], scope)
    step = scope.maker(value, "stablehlo.maximum")
    if step is not None:
        bounded = [v for v in step.operands if splat(v, scope) != -np.inf]
        inner = bounded[0] if len(bounded) == 1 else None
        source = inner and row_origin(inner, x.shape[:-1], scope)
        return bool(source and _is_maximum(source, x, scope))
    whole = row_reduction(value, "maximum", scope)
    return whole is not None and same(whole, x, scope)


def _is_finite_maximum(value: Value, x: Value, scope: Scope) -> bool:
    """Whether it is select(is_finite(m), m, 0), m the maximum along the rows of x."""
    choice = scope.maker(value, "stablehlo.select")
    if choice is None or splat(choice.operands[2], scope) != 0.0:
        return False
    test = scope.maker(choice.operands[0], "stablehlo.is_finite")
    m = choice.operands[1]
    return bool(test and test.operands[0] is m and (top := row_origin(m, x.shape[:-1], scope)) and _is_maximum(top, x, scope))


def _is_total(value: Value, exponential: Value, scope: Scope) -> bool:
    """Whether it is the row's sum of exponentials, spread over the row."""
    row = row_origin(value, exponential.shape[:-1], scope)
    return row is not None and (terms := _summed(row, scope)) is not None and same(terms, exponential, scope)


def _is_total_of_exponentials(value: Value, shifted: Value, scope: Scope) -> bool:
    exponential = _summed(value, scope)
    maker = exponential and scope.maker(exponential, "stablehlo.exponential")
    return bool(maker and maker.operands[0] is shifted)


def _summed(value: Value, scope: Scope) -> Value | None:
    """What a row sum adds up, half types in float32. Entries that the mask of the row excludes may be set to 0, as their exponential is."""
    row = row_origin_rounded(value, value.shape[:-1] if value.shape[-1:] == (1,) else value.shape, scope)
    terms = row and row_reduction(row, "add", scope)
    if not terms:
        return None
    wider = scope.maker(terms, "stablehlo.convert")
    if wider is not None and wider.operand.is_floating:
        terms = wider.operands[0]
    return _unmasked(terms, scope)


def _unmasked(terms: Value, scope: Scope) -> Value:
    """e, of select(mask, e, 0) where e = exp(select(mask, x, -inf) - ...)."""
    choice = scope.maker(terms, "stablehlo.select")
    if choice is None or splat(choice.operands[2], scope) != 0.0:
        return terms
    x = _shifted_exponential(choice.operands[1], scope)
    masked = x and scope.maker(x, "stablehlo.select")
    if not masked or splat(masked.operands[2], scope) != -np.inf or not same(masked.operands[0], choice.operands[0], scope):
        return terms
    return choice.operands[1]
