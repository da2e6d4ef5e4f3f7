"""Every touch of JAX's and jaxlib's private names, each guarded by itself: a renamed name costs one feature, said in one log line."""

from __future__ import annotations

import functools
import logging
from typing import Any

log = logging.getLogger(__name__)


def xla_client() -> Any:
    """jaxlib's XLA client module; JAX is imported first, since `batched_device_put` reads its configuration."""
    import jax  # noqa: F401
    from jaxlib import xla_client

    return xla_client


def shaped_array(shape: tuple[int, ...], dtype: Any) -> Any:
    """JAX's abstract value of an array."""
    from jax._src.core import ShapedArray

    return ShapedArray(shape, dtype)


def portable_artifact(text: str) -> bytes:
    """StableHLO text (CHLO ops allowed) as a portable artifact of this jaxlib's version."""
    from jaxlib import _jax
    from jaxlib.mlir.dialects import stablehlo

    artifact: bytes = _jax.mlir.serialize_portable_artifact(text, stablehlo.get_current_version())
    return artifact


@functools.cache
def initialize_lapack() -> None:
    """Register the lapack_*_ffi targets with XLA and load scipy's LAPACK; without the second, a run is a segmentation fault."""
    import jax._src.lax.linalg  # noqa: F401
    from jaxlib import lapack

    lapack._lapack.initialize()


def stablehlo_versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """This jaxlib's current and minimum StableHLO versions, each as three numbers."""
    from jaxlib.mlir.dialects import stablehlo

    current, minimum = stablehlo.get_current_version(), stablehlo.get_minimum_version()
    return tuple(int(n) for n in current.split(".")), tuple(int(n) for n in minimum.split("."))
