"""The k largest or smallest: chlo.top_k and the custom calls that JAX makes for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.bodies import constant_of
from jax_mps.ops.comparator import Key, ascending
from jax_mps.ops.dtypes import BITS, MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.shapes import empty
from jax_mps.ops.sort import along, counts_along
from jax_mps.plan.types import Step, TensorType


@lowers("chlo.top_k")
def top_k(op: Step) -> Run:
    largest = bool(op.attributes.get("largest", True))
    key = Key(op.operands[0], largest, "TOTALORDER" if op.operand.is_floating else "SIGNED")
    axis = op.operand.rank - 1
    if op.operand.is_complex:
        raise Unsupported(op, "an order of complex numbers")
    if op.result.size == 0:
        return lambda x: [empty(v.type) for v in op.results]
    return _selection(key, op.operand, axis, op.result.shape[axis], op.results[1].dtype)


def _selection(key: Key, operand: TensorType, axis: int, k: int, index_dtype: str) -> Callable[[mx.array], list[mx.array]]:
    size = operand.shape[axis]
    find = _positions if BITS[operand.dtype] <= 32 and 4 * k < size < 2**31 else _first_of_all

    def run(x: mx.array) -> list[mx.array]:
        order = mx.moveaxis(ascending(x, key), axis, -1)
        index = mx.moveaxis(find(order, k), -1, axis)
        return [mx.take_along_axis(x, index, axis=axis), index.astype(MX[index_dtype])]

    return run


def _first_of_all(order: mx.array, k: int) -> mx.array:
    return along(mx.argsort, order, -1)[..., :k]


def _positions(order: mx.array, k: int) -> mx.array:
    """Positions of the k smallest, in order, the first of equal ones first. CPU: 6 to 20 times faster than an argsort.

    The k smallest lie in those k blocks whose own smallest come first, so that only these blocks are looked at closely.
    """
    order = _signed_words(order)
    size, block = order.shape[-1], _block(order.shape[-1], k)
    if not block:
        return _smallest(order, mx.arange(size, dtype=mx.int64), k)
    count = -(-size // block)
    if count * block > size:
        order = mx.pad(order, [(0, 0)] * (order.ndim - 1) + [(0, count * block - size)], constant_values=mx.array(2**31 - 1, mx.int32))
    blocks = mx.reshape(order, (*order.shape[:-1], count, block))
    chosen = _smallest(mx.min(blocks, axis=-1), mx.arange(count, dtype=mx.int64), k)[..., None]
    near = mx.take_along_axis(blocks, chosen, axis=-2)
    place = chosen * mx.array(block, mx.int64) + mx.arange(block, dtype=mx.int64)
    flat = (*order.shape[:-1], k * block)
    return _smallest(mx.reshape(near, flat), mx.reshape(place, flat), k)


def _block(size: int, k: int) -> int:
    """Elements in a block, 0 where blocks do not pay: about as many blocks as elements in k of them."""
    block = 1 << max(3, math.isqrt(size // k).bit_length())
    return block if size > 1024 and 8 * k * block < size else 0


def _smallest(order: mx.array, place: mx.array, k: int) -> mx.array:
    """The `place` of the k smallest: key and place in one integer, no two equal, so that a partition breaks ties as the spec wants."""
    packed = (order.astype(mx.int64) << mx.array(32, mx.int64)) | place
    if k < packed.shape[-1]:
        packed = along(functools.partial(mx.partition, kth=k), packed, -1)[..., :k]
    best = along(mx.sort, packed, -1)
    return best & mx.array(0xFFFFFFFF, mx.int64)


def _signed_words(order: mx.array) -> mx.array:
    if order.dtype == mx.uint32:
        return (order ^ mx.array(1 << 31, mx.uint32)).view(mx.int32)
    return order.astype(mx.int32)


@lowers("custom_call:mhlo.topk")
def mhlo_topk(op: Step) -> Run:
    attributes = op.attributes.get("mhlo.attributes", {})
    if "k" not in attributes:
        raise Unsupported(op, "no mhlo.attributes with k")
    return top_k(Step("chlo.top_k", op.operands, op.results, {"k": attributes["k"], "largest": attributes.get("largest", True)}, location=op.location))


@lowers("custom_call:ApproxTopK")
def approx_top_k(op: Step) -> Run:
    """Exact, so every recall target is met; with `aggregate_to_topk` off, more of the best than were asked for, as many as the type says."""
    config = op.attributes.get("mhlo.backend_config", {})
    descending = _approx_direction(op)
    if len(op.operands) != 4 or "reduction_dim" not in config:
        raise Unsupported(op, "more than one operand beside the keys, or no reduction_dim")
    axis = config["reduction_dim"]
    k = op.result.shape[axis]
    if op.result.size == 0 or k > op.operand.shape[axis]:
        raise Unsupported(op, "more results than elements")
    select = _selection(Key(op.operands[0], descending, "FLOAT"), op.operand, axis, k, "int64")
    counts = counts_along(op.operands[1], axis)

    def run(x: mx.array, other: mx.array, init: mx.array, init_other: mx.array) -> list[mx.array]:
        best, index = select(x)
        return [best, index.astype(other.dtype) if counts else mx.take_along_axis(other, index, axis=axis)]

    return run


def _approx_direction(op: Step) -> bool:
    """Whether the largest are wanted: JAX names the comparator, and the init value, where it is known, must agree."""
    (name,) = op.attributes.get("called_computations", ("",))
    limit = constant_of(op.operands[2])
    for prefix, descending in (("top_k_gt_", True), ("top_k_lt_", False)):
        if name.startswith(prefix) and limit in (None, _worst(op.operand.dtype, lowest=descending)):
            return descending
    raise Unsupported(op, f"the comparator @{name} with the initial value {limit}")


def _worst(dtype: str, *, lowest: bool) -> Any:
    if dtype.startswith(("float", "bfloat")):
        return -np.inf if lowest else np.inf
    limits = np.iinfo(dtype)
    return limits.min if lowest else limits.max
