"""Counters that say which path ran, for tests and users (`jax_mps.stats()`)."""

from __future__ import annotations

import threading

_NAMES = (
    "translations", "exports", "imports", "memory_hits", "disk_hits", "disk_misses", "alias_hits", "host_segments", "host_calls",
    "compiles", "compiles_refused", "exports_apart", "exports_refused", "kernels_not_kept", "cache_errors",
)  # fmt: skip
_counts = dict.fromkeys(_NAMES, 0)
_lock = threading.Lock()


def count(name: str, by: int = 1) -> None:
    """Add to a counter."""
    with _lock:
        _counts[name] += by


def stats() -> dict[str, int]:
    """A copy of the process's counters.

    translations: programs translated from StableHLO. exports: device segments exported. imports: function files imported.
    memory_hits, disk_hits, disk_misses: where compiled programs came from; alias_hits: disk hits by the raw bytes, without reading MLIR.
    host_segments: host segments in programs that were compiled or loaded. host_calls: their runs. compiles: `mx.compile`d functions;
    compiles_refused: those among them that run op by op after all, since MLX cannot fuse them or their kernels would need too many buffers.
    exports_apart: segments exported a second time with no array shared between steps, which MLX had lost (a few more copies of small ones).
    exports_refused: segments that MLX could not export, and that build their graph at each call.
    kernels_not_kept: CUDA kernels of our own that could not be compiled beforehand, so that MLX compiles them in each process.
    cache_errors: entries that were unusable.
    """
    with _lock:
        return dict(_counts)
