"""What is computed with the gradient of a norm on CUDA, by the kernel that has its rows at hand (ops/norm_rows.py): the gradients of the biases around
the norm, which are sums over rows of its cotangent and of its result, and what becomes of that result: a half type's numbers, with others added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jax_mps.ops import norm_rows
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, Value
from jax_mps.rewrites import norms
from jax_mps.rewrites.table import Scope

ROOTS = frozenset(["jax_mps.norm_gradient"])

_HALF = ("float16", "bfloat16")


def norm_ends(steps: Sequence[Step], scope: Scope) -> list[Step]:
    """The gradients of norms with all that their kernel computes besides."""
    if device_kind() != "cuda":
        return []
    place = {v: i for i, step in enumerate(steps) for v in step.results}
    readers = {v: step for step in steps for v in step.operands}
    sums = _sums_over_rows(steps, scope)
    groups: list[Step] = []
    for step in steps:
        if step.name not in ROOTS or not fits(step):
            continue
        whole = step
        while (longer := _with_reader(whole, readers.get(whole.results[0]), scope, place)) is not None:
            whole = longer
        for name, value in (("cotangent", whole.operands[1]), ("rows", whole.results[0])):
            if value in sums and (wider := norms.with_sum(whole, name, sums[value], (value,), scope, place)) is not None:
                whole = wider
                del sums[value]
        if whole is not step:
            groups.append(whole)
    return groups


def fits(step: Step) -> bool:
    """Whether a gradient is for the kernel."""
    columns = step.operand.shape[-1]
    return norm_rows.fits((step.operand.dtype, step.operands[1].dtype, step.result.dtype), step.operand.size // columns, columns)


def _sums_over_rows(steps: Sequence[Step], scope: Scope) -> dict[Value, Step]:
    """Sums along all dimensions but the last, by what they sum up."""
    sums = [s for s in steps if s.name == "stablehlo.reduce" and len(s.results) == 1 and list(s.dimensions) == list(range(s.operand.rank - 1))]
    return {norms.wide_origin(s.operands[0], scope): s for s in sums if s.operand.rank > 1 and s.operand.is_floating and norms.is_sum(s, scope)}


def _with_reader(whole: Step, reader: Step | None, scope: Scope, place: Mapping[Value, int]) -> Step | None:
    """The gradient of the rows as the one step that reads it makes it: converted to a half type, or with one more array added."""
    rows, others = whole.results[0], whole.results[1:]
    if reader is None or scope.reads(rows) != 1:
        return None
    end = 2 + whole.scaled + whole.added
    added, results = whole.operands[2 + whole.scaled : end], (*reader.results, *others)
    more = [v for v in reader.operands if v is not rows]
    if reader.name == "stablehlo.convert":
        if rows.dtype != "float32" or reader.result.dtype not in _HALF or any(v.dtype != reader.result.dtype for v in added):
            return None
    elif reader.name != "stablehlo.add" or any(scope.maker(v, "stablehlo.broadcast_in_dim") for v in more):
        return None
    first = min(place[v] for v in results)
    if any(place.get(v, -1) >= first for v in more):
        return None
    read = (*whole.operands[:end], *more, *whole.operands[end:])
    given = {**whole.attributes, "added": whole.added + len(more), "original": Region(read, (*whole.original.steps, reader), results)}
    return replace(whole, operands=read, results=results, attributes=given)
