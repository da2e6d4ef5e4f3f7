"""jax-mps: run JAX programs on MLX, on Metal (Apple silicon), CUDA and CPU.

`JAX_PLATFORMS=mps python program.py` is all that a program needs. This module is for looking inside: `stats`, `explain`, and the
zero-copy bridges `to_mlx` and `from_mlx`.
"""

from __future__ import annotations

from typing import Any

from jax_mps.counters import stats

__version__: str

__all__ = ["__version__", "explain", "features", "from_mlx", "register_ffi_target", "stats", "to_mlx"]


def __getattr__(name: str) -> Any:
    """`__version__`, read from the installation's metadata when it is asked for (2 ms)."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version("jax-mps-mlx")
    except metadata.PackageNotFoundError:  # a checkout that was never installed
        return "0+checkout"


def to_mlx(array: Any) -> Any:
    """The `mlx.core.array` behind a JAX array on mps, without a copy (NumPy's array for a dtype that MLX lacks).

    Raises:
        ValueError: the array is not on mps, or was deleted or donated.
    """
    from jax_mps import interop

    return interop.to_mlx(array)


def from_mlx(array: Any) -> Any:
    """A JAX array on mps that is the given `mlx.core.array`, without a copy.

    Raises:
        TypeError: not an MLX array, or one of a dtype that JAX on mps keeps on the host.
    """
    from jax_mps import interop

    return interop.from_mlx(array)


def features() -> dict[str, str]:
    """What the plugin adds to the running JAX, each "on" or "off: " with the reason; empty before JAX made its first backend."""
    from jax_mps import compat

    return compat.features()


def register_ffi_target(name: str, function: Any) -> None:
    """Let `jax.ffi.ffi_call(name, ...)` on mps run a Python function.

    Args:
        name: the target's name.
        function: called with one NumPy array for each operand and the call's attributes as keywords; returns one array, or a sequence of them.
    """
    from jax_mps.calls import ffi

    ffi.register_ffi_target(name, function)


def explain(compiled: Any) -> str:
    """The segments of a program that was compiled for mps, and why each host segment is on the host.

    Args:
        compiled: what `jax.jit(f).lower(...).compile()` returned.
    """
    from jax_mps import interop

    return interop.explain(compiled)
