"""`dot_general` and `dot`: any batching and contracting dimensions, as one batched matrix product on views where MLX has them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.products import product
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.shapes import arranged
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import DEVICE_DTYPES, Step


@lowers("stablehlo.dot_general")
def dot_general(op: Step) -> Run:
    _check(op)
    dtype, precise = op.result.dtype, is_precise(op)
    return _multiplied(op, lambda a, b: product(a, b, dtype, precise=precise))


@lowers("jax_mps.biased_product")
def biased_product(op: Step) -> Run:
    """Operands: the product's two, and the row that is added to each of its own."""
    return _multiplied(op, lambda a, b, bias: mx.addmm(mx.reshape(bias, (-1,)), a, b))


def _multiplied(op: Step, multiply: Callable[..., mx.array]) -> Run:
    """What `multiply` makes of a matrix (batches, m, k), one (batches, k, n) and further operands, in the step's shape."""
    lhs, rhs = (v.type for v in op.operands[:2])
    lb, rb = op.lhs_batching_dimensions, op.rhs_batching_dimensions
    lc, rc = _by_position(op.lhs_contracting_dimensions, op.rhs_contracting_dimensions, rhs_leads=rhs.size > lhs.size)
    left = [d for d in range(lhs.rank) if d not in lb and d not in lc]
    right = [d for d in range(rhs.rank) if d not in rb and d not in rc]
    first, second = _matrix(lhs.shape, lb, left, lc), _matrix(rhs.shape, rb, rc, right)
    shape = op.result.shape
    return lambda a, b, *rest: multiply(first(a), second(b), *rest).reshape(shape)


def _matrix(shape: Sequence[int], batching: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Callable[[mx.array], mx.array]:
    """How an operand of that shape becomes a matrix for each batch.

    On CUDA, MLX copies one whose rows are not side by side in memory (attention's, where heads stand between) in each product that reads it. So it is
    copied before, in an order that does not depend on which side of a product it is on: `mx.compile` makes one copy for all of them.
    """
    batch, m, n = [shape[d] for d in batching], math.prod(shape[d] for d in rows), math.prod(shape[d] for d in columns)
    inside = [d for d in (*rows, *columns) if shape[d] > 1]
    if device_kind() == "cuda" and math.prod(batch) > 1 and m > 1 and n > 1:
        turned = max(inside) in rows
        leading, trailing = (columns, rows) if turned else (rows, columns)
        if [d for d in (*leading, *trailing) if shape[d] > 1] != [d for d, size in enumerate(shape) if size > 1][-len(inside) :]:
            dims, width = (*batching, *leading, *trailing), m if turned else n
            size = (*batch, n, m) if turned else (*batch, m, n)

            def copied(x: mx.array) -> mx.array:
                x = mx.reshape(arranged(x, dims, (-1, width)), size)  # rows that are not side by side make one dimension only in a copy
                return mx.swapaxes(x, -1, -2) if turned else x

            return copied
    return lambda x: arranged(x, (*batching, *rows, *columns), (*batch, m, n))


@lowers("stablehlo.dot")
def dot(op: Step) -> Run:
    _check(op)
    lhs, rhs = (v.type for v in op.operands)
    dtype, shape, precise = op.result.dtype, op.result.shape, is_precise(op)

    def run(a: mx.array, b: mx.array) -> mx.array:
        a = a if lhs.rank == 2 else a[None, :]
        b = b if rhs.rank == 2 else b[:, None]
        return product(a, b, dtype, precise=precise).reshape(shape)

    return run


def _by_position(lc: Sequence[int], rc: Sequence[int], *, rhs_leads: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Contracting pairs in the order of the larger operand's dimensions, where they merge without a copy."""
    pairs = sorted(zip(lc, rc, strict=True), key=lambda pair: pair[rhs_leads])
    return tuple(l for l, _ in pairs), tuple(r for _, r in pairs)


def is_precise(op: Step) -> bool:
    """Whether float32 operands must count in full, by the precision or the algorithm that the step asks for."""
    algorithm = _algorithm(op)
    if algorithm is not None:
        return _FULL[algorithm["lhs_precision_type"]] or int(algorithm["num_primitive_operations"]) > 1
    return any(p in ("HIGH", "HIGHEST") for p in op.precision_config)


# The precision types of an algorithm that our products satisfy, and whether TF32 does not.
_FULL = {"f16": False, "bf16": False, "tf32": False, "f32": True}
_FIELD = re.compile(r"(\w+) = (\w+)")


def _algorithm(op: Step) -> dict[str, str] | None:
    text = op.attributes.get("algorithm")
    return None if text is None else dict(_FIELD.findall(text))


def _check(op: Step) -> None:
    for value in (*op.operands, *op.results):
        if value.dtype not in DEVICE_DTYPES:
            raise Unsupported(op, f"a product with {value.dtype}")
    algorithm = _algorithm(op)
    if algorithm is not None:
        for name in ("lhs_precision_type", "rhs_precision_type", "accumulation_type"):
            if algorithm[name] not in _FULL:
                raise Unsupported(op, f"the algorithm's {name} is {algorithm[name]}")
