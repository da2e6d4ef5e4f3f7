"""Indices as JAX hands them over: `x[i]` adds the size to negative ones, and makes vectors of one component of them.

MLX's own indices count from the end below 0, so that one clamp to [-n, n) is all that is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jax_mps.ops.bodies import folds
from jax_mps.ops.indexing import evaluated
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, splat
from jax_mps.rewrites.table import Scope


def gather(step: Step, scope: Scope) -> Step | None:
    return _wrapped(step, 1, step.start_index_map, scope)


def gather_converted(step: Step, scope: Scope) -> Step | None:
    """A gather of some of what was converted between floats (a label's logit): converted afterwards."""
    made = scope.maker(step.operands[0], "stablehlo.convert")
    if made is None or not made.operand.is_floating or not made.result.is_floating or step.result.size >= made.result.size:
        return None
    operands = (made.operands[0], step.operands[1])
    group = fuse(step.name, step, operands, scope, shared=True)
    return replace(step, operands=operands, attributes={**step.attributes, "original": group.original}) if group else None


def scatter(step: Step, scope: Scope) -> Step | None:
    return _wrapped(step, len(step.results), step.scatter_dims_to_operand_dims, scope)


def gather_all(step: Step, scope: Scope) -> Step | None:
    """A gather of one window that is the whole operand, as `x[..., 0]` of a dimension of size 1: a reshape."""
    whole = tuple(step.slice_sizes) == step.operand.shape and step.operands[1].type.rank == 1 and step.index_vector_dim == 0
    return Step("stablehlo.reshape", step.operands[:1], step.results, location=step.location, text=()) if whole else None


def scatter_all(step: Step, scope: Scope) -> Step | None:
    """The gradient of that: zeros, to all of which something is added at once."""
    if len(step.results) != 1 or step.result != step.operand or len(step.update_window_dims) != step.operands[2].type.rank:
        return None
    if step.operands[2].type.size != step.operand.size or folds(step.regions[0]) != ("add",) or splat(step.operands[0], scope) != 0:
        return None
    start = evaluated(step.operands[1], scope.producers.get, step.operand.rank)
    if start is None or start.any():
        return None
    return Step("stablehlo.reshape", step.operands[2:], step.results, location=step.location, text=())


def in_bounds(step: Step, scope: Scope) -> Step | None:
    """all(0 <= v <= size - 1) over vectors v of one component, which was wrapped by the same size: `jnp.take` fills where this is false."""
    values = step.operands[0]
    if len(step.results) != 1 or folds(step.regions[0]) != ("and",) or tuple(step.dimensions) != (values.type.rank - 1,) or values.shape[-1] != 1:
        return None
    both = scope.maker(values, "stablehlo.and") if splat(step.operands[1], scope) is True else None
    tests = [scope.maker(v, "stablehlo.compare") for v in both.operands] if both else []
    found = {t.comparison_direction: t for t in tests if t is not None}
    if found.keys() != {"GE", "LE"} or found["GE"].operands[0] is not found["LE"].operands[0] or splat(found["GE"].operands[1], scope) != 0:
        return None
    line, last = _line(found["GE"].operands[0], scope), splat(found["LE"].operands[1], scope)
    raw = _before_wrap(line, last + 1, scope) if line is not None and last is not None else None
    return fuse("jax_mps.in_bounds", step, (raw,), scope, {"size": last + 1}, shared=True) if raw is not None else None


def _wrapped(step: Step, position: int, columns: Sequence[int], scope: Scope) -> Step | None:
    """The step on the indices before the size was added to those below 0, which the attribute `wrapped` says."""
    indices = step.operands[position]
    rank = indices.type.rank - 1
    if len(columns) != 1 or rank < 0 or step.index_vector_dim != rank or indices.shape[-1] != 1 or "wrapped" in step.attributes:
        return None
    line = _line(indices, scope)
    raw = _before_wrap(line, step.operand.shape[columns[0]], scope) if line is not None else None
    if raw is None:
        return None
    operands = (*step.operands[:position], raw, *step.operands[position + 1 :])
    group = fuse(step.name, step, operands, scope, shared=True)
    if group is None:
        return None
    return replace(step, operands=operands, attributes={**step.attributes, "index_vector_dim": rank, "wrapped": True, "original": group.original})


def _line(indices: Value, scope: Scope) -> Value | None:
    """The indices without the last dimension of size 1 that was added to them."""
    step = scope.maker(indices, "stablehlo.broadcast_in_dim", "stablehlo.reshape")
    if not step or step.operand.shape != indices.shape[:-1]:
        return None
    if step.name == "stablehlo.broadcast_in_dim" and list(step.broadcast_dimensions) != list(range(step.operand.rank)):
        return None
    return step.operands[0]


def _before_wrap(value: Value, size: int, scope: Scope) -> Value | None:
    """i, of select(i < 0, i + size, i)."""
    choice = scope.maker(value, "stablehlo.select")
    if choice is None:
        return None
    test, total, i = scope.maker(choice.operands[0], "stablehlo.compare"), scope.maker(choice.operands[1], "stablehlo.add"), choice.operands[2]
    if not test or not total or not i.type.is_signed or test.comparison_direction != "LT" or test.operands[0] is not i:
        return None
    if splat(test.operands[1], scope) != 0 or total.operands[0] is not i or splat(total.operands[1], scope) != size:
        return None
    return i
