"""sort: by a stable argsort of integer keys, and by key alone where there is nothing else to carry along."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.ops.comparator import Key, ascending, keys_of, plain, puts_nan_last
from jax_mps.ops.dtypes import BITS
from jax_mps.ops.order import from_total_order, nan_at_end, total_order
from jax_mps.ops.registry import LoweredRegion, Run, defining_step, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, Value


@lowers("stablehlo.sort")
def sort(op: Step, comparator: LoweredRegion) -> Run:
    axis = op.dimension % max(op.operand.rank, 1)
    if op.operand.size <= 1 or op.operand.shape[axis] <= 1:
        return lambda *inputs: inputs
    keys = keys_of(op, comparator)
    only = plain(comparator.region, keys[0])
    if len(op.operands) == len(keys) == 1 and only is not None and not puts_nan_last(keys[0]):
        return lambda x: _sorted(x, keys[0], axis, canonical=only[1])
    order = _order(comparator, keys, axis)
    counting = [counts_along(v, axis) for v in op.operands]

    def run(*inputs: mx.array) -> list[mx.array]:
        index = order(inputs)
        return [index.astype(x.dtype) if counts else mx.take_along_axis(x, index, axis=axis) for x, counts in zip(inputs, counting, strict=True)]

    return run


def _sorted(x: mx.array, key: Key, axis: int, *, canonical: bool) -> mx.array:
    """Values alone: sort their integers and read them back, 3 times faster than MLX's sort of floats. Among equals, -0 comes first."""
    dtype = key.value.dtype
    if device_kind() == "cuda" and key.value.type.is_floating and canonical and not key.descending:
        return along(mx.sort, x, axis)  # there it puts NaN last, and is stable
    if dtype == "bool":
        order = x.astype(mx.uint8)
    elif key.value.type.is_floating:
        order = nan_at_end(x, dtype) if canonical or key.compare_type != "TOTALORDER" else total_order(x, dtype)
    else:
        order = x
    flip = mx.array(-1, mx.int64).astype(order.dtype)
    order = along(mx.sort, order ^ flip, axis) ^ flip if key.descending else along(mx.sort, order, axis)
    return from_total_order(order, dtype) if key.value.type.is_floating else order.astype(x.dtype)


def along(function: Callable[..., mx.array], x: mx.array, axis: int) -> mx.array:
    """`mx.sort` or a kin of it. Of three dimensions and more, MLX mixes up rows on a GPU where these do not lie in their order (mlx#4366)."""
    if device_kind() == "cpu" or x.ndim < 3:
        return function(x, axis=axis)
    x = mx.moveaxis(x, axis, -1)
    return mx.moveaxis(mx.reshape(function(mx.reshape(x, (-1, x.shape[-1])), axis=-1), x.shape), -1, axis)


def counts_along(value: Value, axis: int) -> bool:
    """Whether an operand is 0, 1, 2, ... along the axis, as the second operand of an argsort is: the order itself is then its result."""
    step = defining_step(value)
    return step is not None and step.name == "stablehlo.iota" and step.iota_dimension == axis and value.type.is_integer


def _order(comparator: LoweredRegion, keys: list[Key], axis: int) -> Callable[[Sequence[mx.array]], mx.array]:
    """The stable order of the elements along the axis, least significant key first."""
    read = _key_reader(comparator, keys)

    def order(inputs: Sequence[mx.array]) -> mx.array:
        words = _packed(read(inputs), [BITS[k.value.dtype] for k in keys])
        index = along(mx.argsort, words[-1], axis)
        for word in words[-2::-1]:
            index = mx.take_along_axis(index, along(mx.argsort, mx.take_along_axis(word, index, axis=axis), axis), axis=axis)
        return index

    return order


def _key_reader(comparator: LoweredRegion, keys: list[Key]) -> Callable[[Sequence[mx.array]], list[mx.array]]:
    """From the sort's operands to integer keys; what the comparator computes of an element is computed for whole arrays."""
    region = comparator.region
    known = [plain(region, key) for key in keys]
    computed = [key for key, operand in zip(keys, known, strict=True) if operand is None]
    values = LoweredRegion(Region(region.arguments, _needed(region, [k.value for k in computed]), tuple(k.value for k in computed)))

    def read(inputs: Sequence[mx.array]) -> list[mx.array]:
        values.env = comparator.env
        rest = iter(values(*(x for x in inputs for _ in range(2))))
        shape = inputs[0].shape
        found: list[mx.array] = []
        for key, operand in zip(keys, known, strict=True):
            x = inputs[operand[0]] if operand is not None else mx.broadcast_to(next(rest), shape)
            found.append(ascending(x, key, canonical=operand is not None and operand[1]))
        return found

    return read


def _needed(region: Region, values: Sequence[Value]) -> tuple[Step, ...]:
    """The region's steps that the values depend on."""
    wanted, kept = set(values), []
    for step in reversed(region.steps):
        if wanted.intersection(step.results):
            wanted.update(step.operands)
            kept.append(step)
    return tuple(reversed(kept))


def _packed(keys: list[mx.array], bits: list[int]) -> list[mx.array]:
    """Neighbouring keys that fit into 64 bits together become one: a sort costs more than the packing."""
    words: list[mx.array] = []
    width = 64
    for key, size in zip(reversed(keys), reversed([max(b, 8) for b in bits]), strict=True):
        if words and width + size <= 64:
            words[0] = words[0] | (_unsigned(key) << mx.array(width, mx.uint64))
            width += size
        else:
            words.insert(0, _unsigned(key) if size < 64 and len(keys) > 1 else key)
            width = size
    return words


def _unsigned(key: mx.array) -> mx.array:
    """Of the same order, from 0 up, in 64 bits."""
    if key.dtype in (mx.uint8, mx.uint16, mx.uint32, mx.uint64):
        return key.astype(mx.uint64)
    kind = {mx.int8: mx.uint8, mx.int16: mx.uint16, mx.int32: mx.uint32, mx.int64: mx.uint64}[key.dtype]
    top = mx.array(1 << (8 * key.itemsize - 1), kind)
    return (key.view(kind) ^ top).astype(mx.uint64)
