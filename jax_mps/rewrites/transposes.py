"""Transpositions that the op after them can read through, or that move nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step
from jax_mps.rewrites.match import changes_nothing, fuse
from jax_mps.rewrites.table import Scope


def of_product(step: Step, scope: Scope) -> Step | None:
    """An operand of `dot_general` that is a transposition, or several: its own operand, with the dimension numbers of that. The free dimensions must stay in
    order, since the result has them in order."""
    better = step
    for position, side in enumerate(("lhs", "rhs")):
        while (made := scope.maker(better.operands[position], "stablehlo.transpose")) is not None:
            batching, contracting = (better.attributes[f"{side}_{kind}_dimensions"] for kind in ("batching", "contracting"))
            free = [made.permutation[d] for d in range(made.result.rank) if d not in (*batching, *contracting)]
            if free != sorted(free):
                break
            operands = (*better.operands[:position], made.operands[0], *better.operands[position + 1 :])
            better = replace(better, operands=operands, attributes={
                **better.attributes,
                f"{side}_batching_dimensions": _through(made.permutation, batching),
                f"{side}_contracting_dimensions": _through(made.permutation, contracting),
            })  # fmt: skip
    if better is step:
        return None
    group = fuse(step.name, step, better.operands, scope, shared=True)
    return replace(better, attributes={**better.attributes, "original": group.original}) if group else None


def product_transposed(step: Step, scope: Scope) -> Step | None:
    """A product whose left and right dimensions are exchanged afterwards, as gradients of weights are: the product of exchanged operands. What
    is updated with a transposed view, element by element, is read across its rows."""
    made = scope.maker(step.operands[0], "stablehlo.dot_general")
    if made is None or scope.reads(made.results[0]) != 1 or made.attributes.get("algorithm") is not None:
        return None
    batch = len(made.lhs_batching_dimensions)
    left = batch + made.operands[0].type.rank - batch - len(made.lhs_contracting_dimensions)
    if tuple(step.permutation) != (*range(batch), *range(left, made.result.rank), *range(batch, left)) or batch == left:
        return None
    exchanged = {
        f"{side}_{kind}_dimensions": made.attributes[f"{other}_{kind}_dimensions"]
        for side, other in (("lhs", "rhs"), ("rhs", "lhs"))
        for kind in ("batching", "contracting")
    }
    attributes = {**made.attributes, **exchanged, "precision_config": tuple(reversed(made.precision_config))}
    group = fuse(made.name, step, made.operands[::-1], scope)
    return replace(group, attributes={**attributes, "original": group.original}) if group else None


def reshaped(step: Step, scope: Scope) -> Step | None:
    """A reshape, or a transposition that moves dimensions of size 1 alone, of what other such steps made: one reshape. Each of them costs MLX 1 us."""
    if not _moves_nothing(step):
        return None
    source = step.operands[0]
    while (made := scope.maker(source, "stablehlo.reshape", "stablehlo.transpose")) is not None and _moves_nothing(made):
        source = made.operands[0]
    if step.name == "stablehlo.reshape" and source is step.operands[0]:
        return None
    return Step("stablehlo.reshape", (source,), step.results, location=step.location, text=())


def concatenated(step: Step, scope: Scope) -> Step | None:
    """A concatenation of arrays whose dimensions were merged, at least one of them transposed before (the gradients of attention's heads, put together):
    of these arrays, merged afterwards. Else each is copied twice, for its new order and to its place."""
    if device_kind() == "cuda":
        return _lines_concatenated(step, scope)
    made = [scope.maker(v, "stablehlo.reshape") for v in step.operands]
    axis, rank = step.dimension, step.result.rank
    if len(made) < 2 or not any(m is not None and scope.maker(m.operands[0], "stablehlo.transpose") for m in made):
        return None
    inner: set[tuple[int, ...]] = set()
    for m in made:
        if m is None:
            return None
        source, result = m.operand.shape, m.result.shape
        inside = len(source) - rank + 1  # dimensions that became one
        if inside < 2 or (*source[:axis], *source[axis + inside :]) != (*result[:axis], *result[axis + 1 :]) or not m.result.size:
            return None
        inner.add(tuple(source[axis + 1 : axis + inside]))
    operands = [m.operands[0] for m in made if m is not None]
    return fuse("jax_mps.concatenated", step, operands, scope, {"axis": axis, "count": len(operands), "permutation": None}) if len(inner) == 1 else None


def _lines_concatenated(step: Step, scope: Scope) -> Step | None:
    """The same for a kernel of ours, which puts together lines of any dimensions, all from the axis on."""
    axis = step.dimension
    operands = []
    for value in step.operands:
        while (made := scope.maker(value, "stablehlo.reshape")) is not None and made.operand.shape[:axis] == made.result.shape[:axis]:
            value = made.operands[0]
        operands.append(value)
    pairs = list(zip(operands, step.operands, strict=True))
    if len(pairs) < 2 or not step.result.size or not any(new is not old and scope.maker(new, "stablehlo.transpose") for new, old in pairs):
        return None
    return fuse("jax_mps.concatenated", step, operands, scope, {"axis": axis, "count": len(operands), "permutation": None})


def concatenation_transposed(step: Step, scope: Scope) -> Step | None:
    """A concatenation that is transposed, as the gradients of queries, keys and values are that were unpacked: of transposed arrays. On CUDA it reads
    them as views."""
    made = scope.maker(step.operands[0], "stablehlo.concatenate")
    if device_kind() != "cuda" or made is None or _moves_nothing(step):
        return None
    permutation, count = tuple(step.permutation), len(made.operands)
    given = {"axis": permutation.index(made.dimension), "count": count, "permutation": permutation}
    return fuse("jax_mps.concatenated", step, made.operands, scope, given)


def sum_of_one(step: Step, scope: Scope) -> Step | None:
    """A sum along dimensions of size 1, as gradients of broadcasts end: a reshape. MLX would copy."""
    if not changes_nothing(step, scope):
        return None
    view = Step("stablehlo.reshape", step.operands[:1], step.results, location=step.location, text=())
    return reshaped(view, scope) or view


def _moves_nothing(step: Step) -> bool:
    if step.name == "stablehlo.reshape":
        return True
    moved = [d for d in step.permutation if step.operand.shape[d] != 1]
    return moved == sorted(moved)


def _through(permutation: Sequence[int], dimensions: Sequence[int]) -> tuple[int, ...]:
    return tuple(permutation[d] for d in dimensions)
