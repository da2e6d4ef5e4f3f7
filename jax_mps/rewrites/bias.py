"""A product and the row that is added to it, where nothing follows that the sum would be fused with: on CUDA the product's kernel adds it.

Where a residual or an activation follows, `mx.compile` makes one kernel of that and the sum; unless the sum is in memory anyway, since its gradient
reads it much later.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax_mps.ops.dot import is_precise
from jax_mps.ops.products import TINY
from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites.match import fuse, origin
from jax_mps.rewrites.recompute import LATE, note_stage
from jax_mps.rewrites.table import Scope

ROOTS = frozenset(["stablehlo.dot_general"])
_FLOATS = ("float32", "float16", "bfloat16")


def biased_products(steps: Sequence[Step], scope: Scope) -> list[Step]:
    if device_kind() != "cuda":
        return []
    fused = {value for step in steps if is_elementwise(step.name) for value in step.operands}
    stages: dict[Value, int] = {}
    for step in steps:
        note_stage(step, stages)
        if step.results:
            fused -= {value for value in step.operands if stages[step.results[0]] - stages.get(value, 0) >= LATE}
    sums = [step for step in steps if step.name == "stablehlo.add" and step.results[0] not in fused]
    found = (_biased(step, step.operands[i], step.operands[1 - i], scope) for step in sums for i in (0, 1))
    return [step for step in found if step is not None]


def _biased(step: Step, total: Value, row: Value, scope: Scope) -> Step | None:
    product = scope.maker(total, "stablehlo.dot_general")
    if product is None or step.result.dtype not in _FLOATS or is_precise(product) or product.lhs_batching_dimensions:
        return None
    (lhs, rhs), inner = product.operands, product.rhs_contracting_dimensions
    bias, dims = origin(row, scope)
    if any(v.dtype != step.result.dtype for v in (lhs, rhs, bias)) or rhs.type.rank != len(inner) + 1 or 0 in (lhs.type.size, rhs.type.size):
        return None
    if lhs.type.size + rhs.type.size < TINY:  # counts in full
        return None
    last, width = step.result.rank - 1, step.result.shape[-1]
    if bias.type.size != width or None in dims[last:] or dims[:last] != [None] * last or rhs.type.size == width:  # contracts nothing: no product for MLX
        return None
    if step.result.size == width and tuple(inner) != (0,):  # a row and a transposed matrix: MLX's kernel for these adds nothing
        return None
    return fuse("jax_mps.biased_product", step, (lhs, rhs, bias), scope, product.attributes)
