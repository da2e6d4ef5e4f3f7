"""Linux: let the C library keep and reuse large blocks. MLX's CPU engine allocates every result afresh and has no cache; on a GPU, jaxlib
allocates what it reads results into.

By default glibc maps each block above 32 MiB anew and unmaps it when freed, so every large result costs a page fault per 4 KiB: 64 MiB
of `x + 1` took 184 ms, and 24 ms with blocks reused; beside an H100, 37 of the 45 ms that it took to read 64 MiB went there. The price: memory
that was used once stays with the process. `JAX_MPS_MALLOC=0` opts out.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@functools.cache
def keep_blocks(one_heap: bool = True) -> str | None:
    """Ask glibc to serve large blocks from its heap and to keep them; returns why not, if not. one_heap: for all threads, as MLX's CPU engine
    frees on one what another allocates."""
    if sys.platform != "linux":
        return "not Linux"
    if os.environ.get("JAX_MPS_MALLOC") == "0":
        return "JAX_MPS_MALLOC=0"
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "the C library has no mallopt"
    wanted = [(_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)] + [(_M_ARENA_MAX, 1)] * one_heap
    return None if all(mallopt(name, value) == 1 for name, value in wanted) else "mallopt refused"
