"""Custom calls by name: what the device, XLA's CPU client or Python can do with a target."""

from __future__ import annotations

from jax_mps.calls.kinds import host_kind

__all__ = ["host_kind"]
