"""Which engine the graph being built will run on."""

from __future__ import annotations

import re

from jax_mps.runtime import device, device_kind, tf32

__all__ = ["device_kind", "multiplies_along_rows"]


def multiplies_along_rows() -> bool:
    """Whether float32 products go through Hopper's tensor cores, which read TF32 operands along the summed dimension alone: where that is not an
    operand's last in memory, cuBLAS's kernels turn it round on their way (half types, they read either way)."""
    return device_kind() == "cuda" and re.match(r"(sm_)?90a?$", device().architecture) is not None and tf32() == "1"
