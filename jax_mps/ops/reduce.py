"""`reduce` and the batch-norm ops: folds and arg-reductions that MLX has, every other elementwise body as a tree over halves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops import columns
from jax_mps.ops.bodies import argument_of, constant_of, folds, identity, is_identity
from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import LoweredRegion, Run, defining_step, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

# Sums on CPU accumulate at most this many terms in one variable: MLX adds in order, XLA in a tree (MLX.md, G).
_RUN = 256


@lowers("stablehlo.reduce")
def reduce(op: Step, body: LoweredRegion) -> Run:
    count = len(op.results)
    axes = tuple(sorted(op.dimensions))
    if op.operand.size == 0:
        return lambda *arrays: [mx.broadcast_to(init, op.result.shape) for init in arrays[count:]]
    if 0 in op.result.shape:  # MLX's argmax takes no empty array
        return lambda *arrays: [mx.zeros(v.shape, MX[v.dtype]) for v in op.results]
    names = folds(body.region)
    if names is not None and all(_is_direct(n, v.dtype) for n, v in zip(names, op.operands[:count], strict=True)):
        neutral = [is_identity(n, v) for n, v in zip(names, op.operands[count:], strict=True)]
        return lambda *arrays: [
            fold(name, x, axes) if skip else combine(name, fold(name, x, axes), init)
            for name, skip, x, init in zip(names, neutral, arrays[:count], arrays[count:], strict=True)
        ]
    extreme = argument_of(body.region)
    if extreme is not None and len(axes) == 1:
        return _arg_reduce(op, extreme, axes[0], body)
    if not body.is_elementwise:
        raise Unsupported(op, "the body is not elementwise")
    return lambda *arrays: tree(body, arrays[:count], arrays[count:], axes)


# ---- folds -----------------------------------------------------------------------------------------------------------------------


def _is_direct(name: str, dtype: str) -> bool:
    if dtype == "bool":
        return True
    if name in ("add", "multiply"):
        return True
    return name in ("maximum", "minimum") and dtype != "complex64"


def fold(name: str, x: mx.array, axes: Sequence[int]) -> mx.array:
    """Combine the elements along `axes` (none of size 0) in the array's dtype; half types are rounded once."""
    return _FOLDS[_boolean(name) if x.dtype == mx.bool_ else name](x, axes).astype(x.dtype)


def combine(name: str, x: mx.array, y: mx.array) -> mx.array:
    """One step of a fold, in the arrays' dtype."""
    return _COMBINE[_boolean(name) if x.dtype == mx.bool_ else name](x, y)


def _boolean(name: str) -> str:
    return {"add": "any", "or": "any", "maximum": "any", "multiply": "all", "and": "all", "minimum": "all", "xor": "odd"}[name]


def sum_of(x: mx.array, axes: Sequence[int]) -> mx.array:
    if (found := columns.of_rows(x, axes)) is not None:
        return mx.reshape(columns.sums("x", mx.reshape(x, found))[0], x.shape[len(axes) :])
    if x.dtype in (mx.float16, mx.bfloat16):
        x = x.astype(mx.float32)
    if device_kind() != "cpu" or x.dtype not in (mx.float32, mx.complex64) or math.prod(x.shape[d] for d in axes) <= _RUN:
        return mx.sum(x, axis=axes)
    for axis in reversed(axes):
        x = _sum_long(x, axis)
    return x


def _sum_long(x: mx.array, axis: int) -> mx.array:
    """A sum along one axis in runs of at most `_RUN` terms; whole rows are added to rows, which MLX vectorises."""
    n = x.shape[axis]
    if n <= _RUN:
        return mx.sum(x, axis=axis)
    rows = next((r for r in range(_RUN, _RUN // 4, -1) if n % r == 0), _RUN)
    even = n - n % rows
    head = mx.slice(x, mx.array([0]), (axis,), _resized(x, axis, even)) if even < n else x
    total = _sum_long(mx.sum(head.reshape(*x.shape[:axis], rows, even // rows, *x.shape[axis + 1 :]), axis=axis), axis)
    if even == n:
        return total
    rest = mx.slice(x, mx.array([even]), (axis,), _resized(x, axis, n - even))
    return total + mx.sum(rest, axis=axis)


def _resized(x: mx.array, axis: int, size: int) -> tuple[int, ...]:
    return (*x.shape[:axis], size, *x.shape[axis + 1 :])


def _product(x: mx.array, axes: Sequence[int]) -> mx.array:
    return mx.prod(x.astype(mx.float32) if x.dtype in (mx.float16, mx.bfloat16) else x, axis=axes)


_FOLDS: dict[str, Callable[[mx.array, Sequence[int]], mx.array]] = {
    "add": sum_of,
    "multiply": _product,
    "maximum": lambda x, axes: mx.max(x, axis=axes),
    "minimum": lambda x, axes: mx.min(x, axis=axes),
    "any": lambda x, axes: mx.any(x, axis=axes),
    "all": lambda x, axes: mx.all(x, axis=axes),
    "odd": lambda x, axes: mx.sum(x, axis=axes) % 2,
}

_COMBINE: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "add": mx.add,
    "multiply": mx.multiply,
    "maximum": mx.maximum,
    "minimum": mx.minimum,
    "and": mx.bitwise_and,
    "or": mx.bitwise_or,
    "xor": mx.bitwise_xor,
    "any": mx.logical_or,
    "all": mx.logical_and,
    "odd": mx.not_equal,
}


# ---- argmax and argmin -----------------------------------------------------------------------------------------------------------


def _arg_reduce(op: Step, name: str, axis: int, body: LoweredRegion) -> Run:
    x, index, x_init, index_init = op.operands
    dtype = MX[index.dtype]
    counted = _counts_up(defining_step(index), axis)
    neutral = counted and constant_of(x_init) == identity(f"{name[3:]}imum", x.dtype) and constant_of(index_init) == 0

    def run(x: mx.array, index: mx.array, *inits: mx.array) -> Sequence[mx.array]:
        value, place = _arg_of_positions(name, x, axis) if counted else _arg_of_indices(name, x, index, axis)
        place = place.astype(dtype)
        return (value, place) if neutral else body(*(mx.broadcast_to(i, value.shape) for i in inits), value, place)

    return run


def _counts_up(index: Step | None, axis: int) -> bool:
    return index is not None and index.name == "stablehlo.iota" and index.iota_dimension == axis


def _arg_of_positions(name: str, x: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    find = mx.argmax if name == "argmax" else mx.argmin
    x = x.astype(mx.uint8) if x.dtype == mx.bool_ else x
    return (mx.max if name == "argmax" else mx.min)(x, axis=axis), find(x, axis=axis)


def _arg_of_indices(name: str, x: mx.array, index: mx.array, axis: int) -> tuple[mx.array, mx.array]:
    """The least index among the equals of the extreme value, as the body has it for any second operand."""
    value = (mx.max if name == "argmax" else mx.min)(x, axis=axis, keepdims=True)
    is_extreme = x == value
    if mx.issubdtype(x.dtype, mx.floating):
        is_extreme = mx.logical_or(is_extreme, mx.isnan(x))
    last = mx.array(identity("minimum", str(index.dtype).removeprefix("mlx.core.")), index.dtype)
    return mx.squeeze(value, axis), mx.min(mx.where(is_extreme, index, last), axis=axis)


# ---- any associative body --------------------------------------------------------------------------------------------------------


def tree(body: LoweredRegion, xs: Sequence[mx.array], inits: Sequence[mx.array], axes: Sequence[int]) -> tuple[mx.array, ...]:
    """Fold with the region itself, neighbours first, so that the order of elements is kept: about 2 log2(n) calls on whole arrays."""
    kept = [d for d in range(xs[0].ndim) if d not in axes]
    shape = [xs[0].shape[d] for d in kept]
    rows = [mx.transpose(x, (*axes, *kept)).reshape(-1, *shape) for x in xs]
    tail: tuple[mx.array, ...] | None = None
    while (n := rows[0].shape[0]) > 1:
        if n % 2:
            last = tuple(r[-1] for r in rows)
            tail = last if tail is None else body(*last, *tail)
        rows = list(body(*(r[0 : n - 1 : 2] for r in rows), *(r[1:n:2] for r in rows)))
    whole = tuple(r[0] for r in rows)
    if tail is not None:
        whole = body(*whole, *tail)
    return body(*(mx.broadcast_to(init, shape) for init in inits), *whole)


# ---- batch normalisation: the spec's formulas ------------------------------------------------------------------------------------


def _wide(*arrays: mx.array) -> list[mx.array]:
    return [a.astype(mx.float32) if a.dtype in (mx.float16, mx.bfloat16) else a for a in arrays]


def _layout(op: Step) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The reduced axes, the shape that spreads a feature vector over the operand, and the number of elements a feature."""
    rank, feature = op.operand.rank, op.feature_index
    axes = tuple(d for d in range(rank) if d != feature)
    return axes, tuple(-1 if d == feature else 1 for d in range(rank)), math.prod(op.operand.shape[d] for d in axes)


def _scaled(arrays: Sequence[mx.array], spread: Sequence[int], epsilon: float) -> mx.array:
    x, scale, offset, mean, variance = arrays
    factor = scale * mx.rsqrt(variance + epsilon)
    return (x - mean.reshape(spread)) * factor.reshape(spread) + offset.reshape(spread)


@lowers("stablehlo.batch_norm_inference")
def batch_norm_inference(op: Step) -> Run:
    _, spread, _ = _layout(op)
    epsilon, dtype = float(op.epsilon), MX[op.result.dtype]
    return lambda x, scale, offset, mean, variance: _scaled(_wide(x, scale, offset, mean, variance), spread, epsilon).astype(dtype)


@lowers("stablehlo.batch_norm_training")
def batch_norm_training(op: Step) -> Run:
    axes, spread, count = _layout(op)
    epsilon, dtype = float(op.epsilon), MX[op.result.dtype]

    def run(x: mx.array, scale: mx.array, offset: mx.array) -> Sequence[mx.array]:
        x, scale, offset = _wide(x, scale, offset)
        mean = sum_of(x, axes) / count
        variance = sum_of(mx.square(x - mean.reshape(spread)), axes) / count
        outputs = (_scaled((x, scale, offset, mean, variance), spread, epsilon), mean, variance)
        return [a.astype(dtype) for a in outputs]

    return run


@lowers("stablehlo.batch_norm_grad")
def batch_norm_grad(op: Step) -> Run:
    axes, spread, count = _layout(op)
    epsilon, dtype = float(op.epsilon), MX[op.result.dtype]

    def run(x: mx.array, scale: mx.array, mean: mx.array, variance: mx.array, grad: mx.array) -> Sequence[mx.array]:
        x, scale, mean, variance, grad = _wide(x, scale, mean, variance, grad)
        inverse = mx.rsqrt(variance + epsilon)
        normal = (x - mean.reshape(spread)) * inverse.reshape(spread)
        grad_offset = sum_of(grad, axes)
        grad_scale = sum_of(grad * normal, axes)
        inner = grad - (grad_offset / count).reshape(spread) - normal * (grad_scale / count).reshape(spread)
        outputs = ((scale * inverse).reshape(spread) * inner, grad_scale, grad_offset)
        return [a.astype(dtype) for a in outputs]

    return run
