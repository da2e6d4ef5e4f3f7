"""What JAX has here, found without importing it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def platforms() -> str:
    """All that JAX has here: mps first."""
    cuda = any(d.metadata["Name"].startswith("jax-cuda") for d in importlib.metadata.distributions() if d.metadata["Name"])
    return "mps,cuda,cpu" if cuda and Path("/dev/nvidia0").exists() else "mps,cpu"
