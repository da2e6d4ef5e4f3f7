"""`jax_mps.copy`: a value in memory of its own. XLA's contract: an output that is an input, or another output, is its own buffer."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.dtypes import scalar
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step


@lowers("jax_mps.copy")
def copy(op: Step) -> Run:
    kind = op.operand
    if kind.dtype in ("bool", "token"):
        return lambda x: mx.logical_or(x, scalar(False, "bool"))
    # x + -0.0 is x for every x, -0.0 too; MLX's own copies cannot be exported
    nothing = scalar(0 if kind.is_integer else -0.0 if kind.is_floating else complex(-0.0, -0.0), kind.dtype)
    return lambda x: mx.add(x, nothing)
