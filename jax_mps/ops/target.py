"""Which engine the graph being built will run on."""

from __future__ import annotations

from jax_mps.runtime import device_kind

__all__ = ["device_kind"]
