"""softmax(scale q k^T, masked) v as one op, for what one kernel computes: half types on CUDA, float32 there for few positions (decoding), floats on Metal.

Both products may have their dimensions in any order. In training the gradients read the weights, and the steps stay (MLX's own gradient cannot be
exported, and on Metal it has none).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jax_mps.ops.dot import is_precise
from jax_mps.ops.fused import takes_few
from jax_mps.ops.indexing import evaluated
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, origin, splat
from jax_mps.rewrites.table import Scope

# Names a dimension, from the product of queries and keys on: ("batch", i), ("query", i), the keys' own, the values' own; ("one", i): a size of 1.
Label = tuple[str, int]
_KEY: Label = ("key", 0)
_VALUE: Label = ("value", 0)

_FEWEST = -1e30  # a finite fill at least so low leaves a weight of 0, unless it is all that a row holds
_LARGEST_MASK = 1 << 22  # elements that are computed to see what a mask is
_SIDES = ("lhs", "rhs")


@dataclass(frozen=True, slots=True)
class _Scores:
    """What leads from queries and keys to the softmax. keys: the product's operand that they are. labels: of the scores' dimensions.

    mask: says what is seen, or floats that are added. mask_labels: of the mask's own dimensions, None for one of size 1. fill: what is where it
    says no.
    """

    product: Step
    keys: int
    labels: tuple[Label, ...]
    scale: float
    mask: Value | None
    mask_labels: tuple[Label | None, ...]
    fill: float


def attention(step: Step, scope: Scope) -> Step | None:
    if device_kind() == "cpu" or not step.result.is_floating or is_precise(step):
        return None
    for side in (0, 1):
        weights, places = _weights(step.operands[side], scope)
        softmax = scope.maker(weights, "jax_mps.softmax")
        scores = _scores(softmax.operands[0], scope) if softmax else None
        given = _layout(step, side, scores, places) if scores else None
        if not softmax or not scores or given is None:
            continue
        operands = [scores.product.operands[1 - scores.keys], scores.product.operands[scores.keys], step.operands[1 - side]]
        added = scores.mask is not None and scores.mask.dtype != "bool"
        if any(v.dtype != step.result.dtype for v in (*operands, *([scores.mask] if added and scores.mask else []))):
            continue
        widths = operands[0].shape[given["queries_order"][-1]], operands[2].shape[given["values_order"][-1]]
        masking = _masking(scores, given["order"], scope)
        queries = [operands[0].shape[d] for (kind, _), d in zip(given["order"], given["queries_order"], strict=False) if kind == "query"]
        if not _has_kernel(step.result.dtype, queries, widths, masking["mask"]):
            continue
        if masking["mask"] == "array" and scores.mask is not None:
            operands.append(scores.mask)
        return fuse("jax_mps.attention", step, operands, scope, {**given, **masking, "scale": scores.scale})
    return None


def _has_kernel(dtype: str, queries: Sequence[int], widths: tuple[int, int], mask: str) -> bool:
    """queries: how many share a key, by dimension."""
    return device_kind() == "metal" or dtype in ("float16", "bfloat16") or takes_few(dtype, queries, *widths, mask)


def _weights(value: Value, scope: Scope) -> tuple[Value, list[int | None]]:
    """What a product's operand is before conversions between floats and dimensions of size 1 that come and go; and for each dimension of
    `value`, the one of that."""
    places: list[int | None] = list(range(value.type.rank))
    while (step := scope.maker(value, "stablehlo.convert", *_UNITS)) is not None:
        back = _units(step)
        if back is None or not step.operand.is_floating:
            break
        places = [None if p is None else back[p] for p in places]
        value = step.operands[0]
    return value, places


_UNITS = ("stablehlo.broadcast_in_dim", "stablehlo.reshape")  # `jnp.matmul` takes dimensions of size 1 out, and puts them back


def _units(step: Step) -> list[int | None] | None:
    """For each dimension of a result that differs from the operand in dimensions of size 1 alone, the operand's; None if it differs otherwise."""
    source, result = step.operand.shape, step.result.shape
    if step.name == "stablehlo.broadcast_in_dim":
        at = {d: i for i, d in enumerate(step.broadcast_dimensions)}
        back = [at.get(d) for d in range(len(result))]
        return back if all((1 if i is None else source[i]) == n for i, n in zip(back, result, strict=True)) else None
    back, i = [], len(source) - 1
    for n in reversed(result):
        while i >= 0 and source[i] == 1 != n:
            i -= 1
        same = i >= 0 and source[i] == n
        if not same and n != 1:
            return None
        back.append(i if same else None)
        i -= same
    return back[::-1] if all(n == 1 for n in source[: i + 1]) else None


# ---- from the softmax back to the first product --------------------------------------------------------------------------------------


def _scores(value: Value, scope: Scope) -> _Scores | None:
    places: list[int | None] = list(range(value.type.rank))  # for each dimension of the softmax's operand, the one of `value`
    scale, fill, mask = 1.0, -math.inf, None
    mask_axes: list[int | None] = []  # for each of the mask's dimensions, the one of the softmax's operand
    while (step := scope.maker(value, *_WAYS)) is not None:
        number = splat(step.operands[1], scope) if step.name in _SCALES else None
        back = step.permutation if step.name == "stablehlo.transpose" else _units(step) if step.name in _UNITS else None
        if back is not None:
            places = [None if d is None else back[d] for d in places]
        elif step.name in _SCALES and isinstance(number, float) and number > 0:
            scale = scale * number if step.name == "stablehlo.multiply" else scale / number
        elif mask is None and (found := _mask_of(step, scale, scope)) is not None:
            mask, dims, fill = found
            axis_of = {dims[place]: axis for axis, place in enumerate(places) if place is not None} if dims else {}  # a scalar says the same everywhere
            mask_axes = [axis_of.get(m) if mask.shape[m] > 1 else None for m in range(mask.type.rank)]
        elif step.name != "stablehlo.convert" or not step.operand.is_floating:
            return None
        value = step.operands[1 if step.name == "stablehlo.select" else 0]
    product = scope.maker(value, "stablehlo.dot_general")
    if product is None or is_precise(product) or len(product.lhs_contracting_dimensions) != 1:
        return None
    batch, free = len(product.lhs_batching_dimensions), [_free(product, side) for side in (0, 1)]
    last = places[-1]
    keys = 0 if last is not None and last < batch + len(free[0]) else 1
    if last is None or last < batch or len(free[keys]) != 1:
        return None
    queries: list[Label] = [("query", i) for i in range(len(free[1 - keys]))]
    own = [*(("batch", i) for i in range(batch)), *([_KEY, *queries] if keys == 0 else [*queries, _KEY])]
    labels = tuple(("one", axis) if d is None else own[d] for axis, d in enumerate(places))
    return _Scores(product, keys, labels, scale, mask, tuple(None if a is None else labels[a] for a in mask_axes), fill)


_SCALES = ("stablehlo.multiply", "stablehlo.divide")
_WAYS = (*_SCALES, *_UNITS, "stablehlo.transpose", "stablehlo.select", "stablehlo.add", "stablehlo.convert")


def _mask_of(step: Step, scale: float, scope: Scope) -> tuple[Value, list[int | None], float] | None:
    """What a step hides scores by: its source, for each of the mask's dimensions the source's, and what is in place of hidden ones."""
    if step.name == "stablehlo.select":
        fill = splat(step.operands[2], scope)
        return (*_source(step.operands[0], scope), fill) if isinstance(fill, float) and fill <= _FEWEST else None
    if step.name != "stablehlo.add" or scale != 1.0:  # what is added must not be scaled
        return None
    source, dims = origin(step.operands[1], scope)
    choice = scope.maker(source, "stablehlo.select")
    hidden = splat(choice.operands[2], scope) if choice and splat(choice.operands[1], scope) == 0.0 else None
    if choice and isinstance(hidden, float) and hidden <= _FEWEST:  # where(mask, 0, -inf)
        source, inner = _source(choice.operands[0], scope)
        return source, [None if d is None else inner[d] for d in dims], hidden
    narrow = scope.maker(source, "stablehlo.convert")
    if narrow is not None and narrow.operand.is_floating:  # widened for this sum
        source, inner = origin(narrow.operands[0], scope)
        dims = [None if d is None else inner[d] for d in dims]
    return source, dims, -math.inf


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


def _layout(step: Step, side: int, scores: _Scores, places: Sequence[int | None]) -> dict[str, Any] | None:
    """How to order the operands' dimensions for MLX, and its result's for the step's; None if the products don't fit together.

    places: for each dimension of the step's operand, the weights' own. order: the labels of batches, groups of queries that share keys, positions;
    the last batch is the heads.
    """
    labels, product = [("one", -1) if d is None else scores.labels[d] for d in places], scores.product
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
    if set(labels) != {*at_q, _KEY}:
        return None
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
