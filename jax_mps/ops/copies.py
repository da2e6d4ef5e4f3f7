"""`jax_mps.copy`: a value in memory of its own. XLA's contract: an output that is an input, or another output, is its own buffer."""

from __future__ import annotations

import mlx.core as mx

from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step


@lowers("jax_mps.copy")
def copy(op: Step) -> Run:
    """MLX's own copies cannot be exported. Arithmetic would lose bits: Metal takes subnormal numbers for zero."""
    return lambda x: mx.logical_or(x, x) if x.dtype == mx.bool_ else mx.maximum(x, x)
