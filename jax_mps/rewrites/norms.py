"""Layer and RMS normalisation along the last axis, as flax, equinox and people write them.

Three rewrites, each on what the one before left: the normalised rows, their product with a scale, the sum with a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, origin, row_origin, row_reduction, same, splat
from jax_mps.rewrites.table import Scope

Shape: TypeAlias = tuple[int, ...]

NORMS = ("jax_mps.layer_norm", "jax_mps.rms_norm")


def normalised(step: Step, scope: Scope) -> Step | None:
    """(x - mean(x)) * rsqrt(variance(x) + eps), x * rsqrt(mean(x^2) + eps); either may be a division by the root."""
    rank = step.result.rank
    if not rank or not step.result.is_floating or step.result.shape[-1] < 2 or step.result.size == 0:
        return None
    for centred, factor in _pairs(step):
        eps_of = _rooted(factor, step, scope)
        if eps_of is None:
            continue
        spread, eps = eps_of
        x = _centred(centred, scope)
        if x is not None and _is_variance(spread, x, scope):
            return fuse("jax_mps.layer_norm", step, (x,), scope, {"eps": eps, "scaled": False, "shifted": False})
        x = _less_nothing(centred, scope)
        square = _mean_of(spread, x.shape[:-1], scope)
        if square is not None and _squared(square, scope) is x:
            return fuse("jax_mps.rms_norm", step, (x,), scope, {"eps": eps, "scaled": False, "shifted": False})
    return None


def scaled_first(step: Step, scope: Scope) -> Step | None:
    """flax multiplies the reciprocal root by the scale, and the centred rows by that."""
    for centred, product in _pairs(step):
        inner = scope.maker(product, "stablehlo.multiply")
        for factor, weight in _pairs(inner) if inner else ():
            scale, eps_of = _vector(weight, scope), _rooted(factor, inner, scope) if inner else None
            if scale is None or eps_of is None:
                continue
            spread, eps = eps_of
            given = {"eps": eps, "scaled": True, "shifted": False}
            x = _centred(centred, scope)
            if x is not None and _is_variance(spread, x, scope):
                return fuse("jax_mps.layer_norm", step, (x, scale), scope, given)
            x = _less_nothing(centred, scope)
            square = _mean_of(spread, x.shape[:-1], scope)
            if square is not None and _squared(square, scope) is x:
                return fuse("jax_mps.rms_norm", step, (x, scale), scope, given)
    return None


def scaled(step: Step, scope: Scope) -> Step | None:
    """Normalised rows times a vector."""
    for rows, weight in _pairs(step):
        norm, scale = scope.maker(rows, *NORMS), _vector(weight, scope)
        if norm and scale is not None and not norm.scaled and not norm.shifted:
            return fuse(norm.name, step, (norm.operands[0], scale), scope, {"eps": norm.eps, "scaled": True, "shifted": False})
    return None


def shifted(step: Step, scope: Scope) -> Step | None:
    """Scaled layer-normalised rows and a vector."""
    for rows, offset in _pairs(step):
        norm, bias = scope.maker(rows, "jax_mps.layer_norm"), _vector(offset, scope)
        if norm and bias is not None and norm.scaled and not norm.shifted:
            return fuse(norm.name, step, (*norm.operands[:2], bias), scope, {"eps": norm.eps, "scaled": True, "shifted": True})
    return None


# ---- parts ---------------------------------------------------------------------------------------------------------------------------


def _pairs(step: Step) -> Iterator[tuple[Value, Value]]:
    """The two operands, in both orders where the op is commutative."""
    yield step.operands[0], step.operands[1]
    if step.name in ("stablehlo.multiply", "stablehlo.add"):
        yield step.operands[1], step.operands[0]


def _rooted(factor: Value, step: Step, scope: Scope) -> tuple[Value, float] | None:
    """(v, eps) where the rows are multiplied by rsqrt(v + eps) or divided by sqrt(v + eps)."""
    row = row_origin(factor, factor.shape[:-1], scope)
    root = row and scope.maker(row, "stablehlo.sqrt" if step.name == "stablehlo.divide" else "stablehlo.rsqrt")
    total = root and scope.maker(root.operands[0], "stablehlo.add")
    for spread, constant in _pairs(total) if total else ():
        eps = splat(constant, scope)
        if eps is not None and eps > 0:
            return spread, float(eps)
    return None


def _centred(value: Value, scope: Scope) -> Value | None:
    """x, of x - mean(x)."""
    step = scope.maker(value, "stablehlo.subtract")
    if step is None:
        return None
    x, shift = step.operands
    lead = x.shape[:-1]
    row = row_origin(shift, lead, scope)
    return x if row is not None and (whole := _mean_of(row, lead, scope)) is not None and same(whole, x, scope) else None


def _less_nothing(value: Value, scope: Scope) -> Value:
    """x, of x - 0, which flax computes."""
    step = scope.maker(value, "stablehlo.subtract")
    return step.operands[0] if step and splat(step.operands[1], scope) == 0.0 else value


def _mean_of(value: Value, lead: Shape, scope: Scope) -> Value | None:
    """What `value` is the mean of along the last axis."""
    row = row_origin(value, lead, scope)
    step = row and scope.maker(row, "stablehlo.divide")
    source = step and row_origin(step.operands[0], lead, scope)
    terms = source and row_reduction(source, "add", scope)
    return terms if step and terms and terms.shape[:-1] == lead and splat(step.operands[1], scope) == terms.shape[-1] else None


def _squared(value: Value, scope: Scope) -> Value | None:
    step = scope.maker(value, "stablehlo.multiply", "chlo.square")
    return step.operands[0] if step and step.operands[0] is step.operands[-1] else None


def _is_variance(value: Value, x: Value, scope: Scope) -> bool:
    """Whether it is mean((x - mean(x))^2) or mean(x^2) - mean(x)^2, perhaps not less than 0; `jnp.var` asks whether there are elements."""
    lead = x.shape[:-1]
    row = row_origin(value, lead, scope)
    if row is None:
        return False
    step = scope.maker(row, "stablehlo.maximum", "stablehlo.select", "stablehlo.subtract")
    if step is None:
        square = _mean_of(row, lead, scope)
        inner = _squared(square, scope) if square is not None else None
        return inner is not None and _centred(inner, scope) is x
    if step.name == "stablehlo.maximum":
        return any(splat(bound, scope) == 0.0 and _is_variance(v, x, scope) for v, bound in (step.operands, step.operands[::-1]))
    if step.name == "stablehlo.select":
        return splat(step.operands[0], scope) is True and _is_variance(step.operands[1], x, scope)
    square, mean_squared = _mean_of(step.operands[0], lead, scope), row_origin(step.operands[1], lead, scope)
    mean = _squared(mean_squared, scope) if mean_squared is not None else None
    return square is not None and _squared(square, scope) is x and mean is not None and _mean_of(mean, lead, scope) is x


def _vector(value: Value, scope: Scope) -> Value | None:
    """A line as long as the last axis that is repeated along all the others."""
    source, dims = origin(value, scope)
    size = value.shape[-1] if value.shape else 0
    if source.type.size != size or size < 2 or dims[:-1] != [None] * (value.type.rank - 1) or dims[-1] is None:
        return None
    return source
