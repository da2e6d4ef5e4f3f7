"""`dot_general` and `dot`: any batching and contracting dimensions, as one batched matrix product on views where MLX has them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.products import product
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.shapes import arranged
from jax_mps.ops.target import device_kind, multiplies_along_rows
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


@dataclass(frozen=True, slots=True)
class Matrix:
    """How an operand of a product is a matrix for each batch: its shape, and which of its dimensions are batches, rows and columns."""

    shape: tuple[int, ...]
    batching: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        return math.prod(self.shape[d] for d in self.rows), math.prod(self.shape[d] for d in self.columns)

    @property
    def batches(self) -> list[int]:
        return [self.shape[d] for d in self.batching]

    @property
    def is_turned(self) -> bool:
        """Whether the rows hold the last dimension."""
        return max((d for d in (*self.rows, *self.columns) if self.shape[d] > 1), default=0) in self.rows

    @property
    def inside(self) -> tuple[int, ...]:
        """Rows and columns, those of them last that hold the last dimension: an order that does not depend on which side of a product it is on."""
        return (*self.columns, *self.rows) if self.is_turned else (*self.rows, *self.columns)

    @property
    def is_copied(self) -> bool:
        """Whether rows of a batch are not side by side in memory (attention's, where heads stand between), so that the product's lowering copies them on CUDA.
        MLX would in each product that reads them; `mx.compile` makes one copy of ours for all of them."""
        inside = [d for d in self.inside if self.shape[d] > 1]
        apart = inside != [d for d, size in enumerate(self.shape) if size > 1][-len(inside) :]
        return device_kind() == "cuda" and math.prod(self.batches) > 1 and min(self.size) > 1 and apart


def matrices(op: Step) -> tuple[Matrix, Matrix]:
    """The two operands of a product."""
    lhs, rhs = (v.type for v in op.operands[:2])
    lb, rb = op.lhs_batching_dimensions, op.rhs_batching_dimensions
    lc, rc = _by_position(op.lhs_contracting_dimensions, op.rhs_contracting_dimensions, rhs_leads=rhs.size > lhs.size)
    left = tuple(d for d in range(lhs.rank) if d not in lb and d not in lc)
    right = tuple(d for d in range(rhs.rank) if d not in rb and d not in rc)
    return Matrix(lhs.shape, tuple(lb), left, lc), Matrix(rhs.shape, tuple(rb), rc, right)


def _multiplied(op: Step, multiply: Callable[..., mx.array]) -> Run:
    """What `multiply` makes of a matrix (batches, m, k), one (batches, k, n) and further operands, in the step's shape."""
    lhs, rhs = matrices(op)
    first, second = _as_matrix(lhs), _as_matrix(rhs)
    if multiplies_along_rows() and not is_precise(op) and all(v.dtype == "float32" for v in op.operands[:2]):
        match _turned(lhs, rhs):
            case "lhs":
                view, first = first, lambda x: _copied(view(x))
            case "rhs":
                other, second = second, lambda x: mx.swapaxes(_copied(mx.swapaxes(other(x), -1, -2)), -1, -2)
    shape = op.result.shape
    return lambda a, b, *rest: multiply(first(a), second(b), *rest).reshape(shape)


def _as_matrix(it: Matrix) -> Callable[[mx.array], mx.array]:
    (m, n), turned = it.size, it.is_turned
    if not it.is_copied:
        return lambda x: arranged(x, (*it.batching, *it.rows, *it.columns), (*it.batches, m, n))

    def copied(x: mx.array) -> mx.array:
        size = (n, m) if turned else (m, n)
        x = arranged(x, (*it.batching, *it.inside), (-1, size[1]))  # rows that are not side by side make one dimension only in a copy
        x = mx.reshape(x, (*it.batches, *size))
        return mx.swapaxes(x, -1, -2) if turned else x

    return copied


# Seconds: of a copy, for each element and beside them; what each multiplication takes less then, where both operands lay across their sums.
# H100, 18:21 on 2026-11-23 (docs/performance.md): 4,096 terms by 768 x 3,072 took 108 us, 78 and 7.5 with the smaller operand copied.
_COPIED, _COPY, _GAINED = 2.5e-12, 5e-6, 3.6e-15


def _turned(lhs: Matrix, rhs: Matrix) -> str | None:
    """The operand that had better be copied so that its sums lie along its rows.

    One will do, and only where neither does (a weight's gradient): where one does, a copy of the other gains too little.
    """
    (m, terms), (_, n) = lhs.size, rhs.size
    if math.prod(lhs.batches) > 1 or not _lies_across(lhs, lhs.columns, lhs.rows) or not _lies_across(rhs, rhs.rows, rhs.columns):
        return None
    if _GAINED * terms * m * n < _COPY + _COPIED * terms * min(m, n):
        return None
    return "lhs" if m <= n else "rhs"


def _lies_across(it: Matrix, summed: Sequence[int], free: Sequence[int]) -> bool:
    """Whether the dimensions summed over are before the others, each in order: a view shows such an operand, any other is copied as it should be."""
    order = [d for d in (*summed, *free) if it.shape[d] > 1]
    return order == sorted(order) and min(it.size) > 1


def _copied(x: mx.array) -> mx.array:
    """The same values row by row: no view is flat otherwise, and `mx.contiguous` cannot be exported."""
    return mx.reshape(mx.reshape(x, (-1,)), x.shape)


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
