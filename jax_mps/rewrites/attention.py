"""softmax(scale q k^T, masked) v as MLX's own op, for what that computes in one kernel: half types on CUDA, floats on Metal.

Both products may have their dimensions in any order. Training reads the weights again, and keeps its steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_mps.ops.dot import is_precise
from jax_mps.ops.indexing import evaluated
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, origin, splat
from jax_mps.rewrites.table import Scope

# Names a dimension, from the product of queries and keys on: ("batch", i), ("query", i), the keys' own, the values' own.
Label = tuple[str, int]
_KEY: Label = ("key", 0)
_VALUE: Label = ("value", 0)

_FEWEST = -1e30  # a finite fill at least so low leaves a weight of 0, unless it is all that a row holds
_LARGEST_MASK = 1 << 22  # elements that are computed to see what a mask is
_SIDES = ("lhs", "rhs")


@dataclass(frozen=True, slots=True)
class _Scores:
    """What leads from queries and keys to the softmax. keys: the product's operand that they are. labels: of the scores' dimensions.

    mask_labels: of the mask's own dimensions, None for one of size 1. fill: what is where the mask says no.
    """

    product: Step
    keys: int
    labels: tuple[Label, ...]
    scale: float
    mask: Value | None
    mask_labels: tuple[Label | None, ...]
    fill: float


def attention(step: Step, scope: Scope) -> Step | None:
    if not _has_kernel(step) or is_precise(step):
        return None
    for side in (0, 1):
        softmax = scope.maker(_unrounded(step.operands[side], scope), "jax_mps.softmax")
        scores = _scores(softmax.operands[0], scope) if softmax else None
        given = _layout(step, side, scores) if scores else None
        if not scores or given is None:
            continue
        operands = [scores.product.operands[1 - scores.keys], scores.product.operands[scores.keys], step.operands[1 - side]]
        if any(v.dtype != step.result.dtype for v in operands):
            continue
        masking = _masking(scores, given["order"], scope)
        if masking["mask"] == "array" and scores.mask is not None:
            operands.append(scores.mask)
        return fuse("jax_mps.attention", step, operands, scope, {**given, **masking, "scale": scores.scale})
    return None


def _has_kernel(step: Step) -> bool:
    kind = device_kind()
    return (kind == "metal" and step.result.is_floating) or (kind == "cuda" and step.result.dtype in ("float16", "bfloat16"))


def _unrounded(value: Value, scope: Scope) -> Value:
    """Before a conversion between floats."""
    step = scope.maker(value, "stablehlo.convert")
    return step.operands[0] if step and step.operand.is_floating and step.result.is_floating else value


# ---- from the softmax back to the first product --------------------------------------------------------------------------------------


def _scores(value: Value, scope: Scope) -> _Scores | None:
    places = list(range(value.type.rank))  # for each dimension of the softmax's operand, the one of `value`
    scale, fill, mask = 1.0, -math.inf, None
    mask_axes: list[int | None] = []  # for each of the mask's dimensions, the one of the softmax's operand
    while (step := scope.maker(value, *_WAYS)) is not None:
        number = splat(step.operands[1], scope) if step.name in _SCALES else None
        if step.name == "stablehlo.transpose":
            places = [step.permutation[d] for d in places]
        elif step.name in _SCALES and isinstance(number, float) and number > 0:
            scale = scale * number if step.name == "stablehlo.multiply" else scale / number
        elif step.name == "stablehlo.select" and mask is None and _is_fill(splat(step.operands[2], scope)):
            fill = splat(step.operands[2], scope)
            mask, dims = _source(step.operands[0], scope)
            axis_of = {dims[place]: axis for axis, place in enumerate(places)} if dims else {}  # a scalar says the same everywhere
            mask_axes = [axis_of.get(m) if mask.shape[m] > 1 else None for m in range(mask.type.rank)]
        elif step.name != "stablehlo.convert" or not step.operand.is_floating:
            return None
        value = step.operands[1 if step.name == "stablehlo.select" else 0]
    product = scope.maker(value, "stablehlo.dot_general")
    if product is None or is_precise(product) or len(product.lhs_contracting_dimensions) != 1:
        return None
    batch, free = len(product.lhs_batching_dimensions), [_free(product, side) for side in (0, 1)]
    keys = 0 if places[-1] < batch + len(free[0]) else 1
    if places[-1] < batch or len(free[keys]) != 1:
        return None
    queries: list[Label] = [("query", i) for i in range(len(free[1 - keys]))]
    own = [*(("batch", i) for i in range(batch)), *([_KEY, *queries] if keys == 0 else [*queries, _KEY])]
    labels = tuple(own[d] for d in places)
    return _Scores(product, keys, labels, scale, mask, tuple(None if a is None else labels[a] for a in mask_axes), fill)


_SCALES = ("stablehlo.multiply", "stablehlo.divide")
_WAYS = (*_SCALES, "stablehlo.transpose", "stablehlo.select", "stablehlo.convert")


def _is_fill(value: Any) -> bool:
    return isinstance(value, float) and value <= _FEWEST


def _source(mask: Value, scope: Scope) -> tuple[Value, list[int | None]]:
    """What the mask is spread from, without what is true everywhere; and for each of the mask's dimensions, the source's."""
    source, dims = origin(mask, scope)
    while (step := scope.maker(source, "stablehlo.and")) is not None:
        other = next((b for a, b in (step.operands, step.operands[::-1]) if splat(a, scope) is True), None)
        if other is None:
            break
        source, inner = origin(other, scope)
        dims = [None if d is None else inner[d] for d in dims]
    return source, dims


def _free(product: Step, side: int) -> list[int]:
    taken = (*_dimensions(product, side, "batching"), *_dimensions(product, side, "contracting"))
    return [d for d in range(product.operands[side].type.rank) if d not in taken]


def _dimensions(product: Step, side: int, kind: str) -> tuple[int, ...]:
    return tuple(product.attributes[f"{_SIDES[side]}_{kind}_dimensions"])


# ---- layouts -------------------------------------------------------------------------------------------------------------------------


def _layout(step: Step, side: int, scores: _Scores) -> dict[str, Any] | None:
    """How to order the operands' dimensions for MLX, and its result's for the step's; None if the products don't fit together.

    order: the labels of batches, groups of queries that share keys, positions. The last batch is the heads.
    """
    labels, product = scores.labels, scores.product
    batch_dims, values = _dimensions(step, side, "batching"), 1 - side
    batches = sorted(label for label in labels if label[0] == "batch")
    queries = [label for label in labels if label[0] == "query"]
    if labels[-1] != _KEY or _dimensions(step, side, "contracting") != (len(labels) - 1,) or len(_free(step, values)) != 1:
        return None
    if {labels[d] for d in batch_dims} != set(batches) or len(batch_dims) != len(batches) or len(queries) > 2:
        return None
    side_q, side_k = 1 - scores.keys, scores.keys
    at_q = {("batch", i): d for i, d in enumerate(_dimensions(product, side_q, "batching"))}
    at_q |= {("query", i): d for i, d in enumerate(_free(product, side_q))}
    at_v = {labels[d]: v for d, v in zip(batch_dims, _dimensions(step, values, "batching"), strict=True)}
    own = [labels[d] for d in batch_dims], [labels[d] for d in _free(step, side)]
    result = [*own[0], *own[1], _VALUE] if side == 0 else [*own[0], _VALUE, *own[1]]
    order = (*batches, *queries)
    return {
        "order": order,
        "queries_order": (*(at_q[label] for label in order), *_dimensions(product, side_q, "contracting")),
        "keys_order": (*_dimensions(product, side_k, "batching"), *_free(product, side_k), *_dimensions(product, side_k, "contracting")),
        "values_order": (*(at_v[label] for label in batches), *_dimensions(step, values, "contracting"), *_free(step, values)),
        "result_order": tuple([*order, _VALUE].index(label) for label in result),
    }


# ---- masks ---------------------------------------------------------------------------------------------------------------------------


def _masking(scores: _Scores, order: tuple[Label, ...], scope: Scope) -> Mapping[str, Any]:
    """mask: "none", "causal" or "array"; guarded: a row may have nothing that it sees. mask_order: for each label of the scores, in MLX's order,
    the mask's dimension."""
    if scores.mask is None:
        return {"mask": "none"}
    mask = evaluated(scores.mask, scope.producers.get, _LARGEST_MASK)
    at = {label: d for d, label in enumerate(scores.mask_labels) if label is not None}
    given = {"mask": "array", "guarded": True, "fill": scores.fill, "mask_order": tuple(at.get(label) for label in (*order, _KEY))}
    if mask is None:
        return given
    if mask.all():
        return {"mask": "none"}
    seen = mask.any(axis=at[_KEY]) if _KEY in at else mask
    position = next((label for label in reversed(order) if label[0] == "query"), None)
    if position is not None and at.keys() == {position, _KEY} and _is_causal(np.squeeze(mask), transposed=at[_KEY] < at[position]):
        return {"mask": "causal"}
    return {**given, "guarded": not seen.all()}


def _is_causal(mask: np.ndarray[Any, Any], *, transposed: bool) -> bool:
    """Whether the last position sees all keys, and each one before it one less."""
    mask = mask.T if transposed else mask
    positions, keys = mask.shape
    return positions <= keys and np.array_equal(mask, np.tri(positions, keys, keys - positions, dtype=bool))
