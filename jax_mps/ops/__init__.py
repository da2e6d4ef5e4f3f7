"""Lowerings from StableHLO (and CHLO composites) to MLX, one module per family of the spec."""

from __future__ import annotations

import importlib

FAMILIES = (
    "elementwise", "bits", "complex", "shapes", "slices", "gather", "scatter", "reduce", "window",
    "dot", "convolution", "sort", "topk", "fft", "random", "threefry", "control_flow", "collectives", "special",
    "arrivals", "copies", "fused", "joined", "row_kernels", "strided",
)  # fmt: skip


def load_all() -> None:
    """Import every family, which registers its lowerings. Nothing is imported on a warm start."""
    for family in FAMILIES:
        importlib.import_module(f"jax_mps.ops.{family}")
    importlib.import_module("jax_mps.calls.sharding")
