"""XLA's compiled host code, kept on this machine between processes: a store of its own beside the cache, never exported or shared.

XLA loads such code whatever the processor and checks no version, so the key names both. It is native code: only the folder's owner and
permissions, which `jax_mps.cache` checks, say that it may be run.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from jax_mps.cache import Key, Store, Writer, key
from jax_mps.cache.paths import cache_folder, prepare, turned_off

log = logging.getLogger(__name__)

MAX_BYTES = 512 << 20
_FILE = "executable"


def load(artifact: bytes, deserialize: Callable[[bytes], Any]) -> Any | None:
    """The executable that an artifact was compiled to on this machine, or None."""
    store = _store()
    entry = store.get(_key(artifact)) if store is not None else None
    if entry is None:
        return None
    try:
        return deserialize(entry.read(_FILE))
    except Exception as error:  # whatever is wrong with it is a miss
        log.info("kept host code cannot be used and is made anew: %s", error)
        return None


def keep(artifact: bytes, serialize: Callable[[], bytes]) -> None:
    """Store an executable, off the critical path."""
    store = _store()
    if store is not None:
        _writer().submit(lambda: _put(store, artifact, serialize))


def _put(store: Store, artifact: bytes, serialize: Callable[[], bytes]) -> None:
    try:
        code = serialize()
    except Exception as error:  # XLA cannot serialise some (a sort's comparator, in 0.10 to 0.12)
        log.debug("host code that cannot be kept: %s", error)
        return
    store.put(_key(artifact), {"jaxlib": metadata.version("jaxlib")}, {_FILE: code}, {})


@functools.cache
def _store() -> Store | None:
    folder = None if turned_off() else cache_folder()
    if folder is None or prepare(folder) is not None:  # the cache itself says why
        return None
    return Store(folder / "host", max_bytes=MAX_BYTES)


@functools.cache
def _writer() -> Writer:
    return Writer()


def _key(artifact: bytes) -> Key:
    return key(("artifact", artifact), *_machine())


@functools.cache
def _machine() -> tuple[tuple[str, str], ...]:
    """What compiled code depends on beside the program."""
    return (
        ("jaxlib", metadata.version("jaxlib")),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("processor", _processor()),
        ("xla_flags", os.environ.get("XLA_FLAGS", "")),
    )


def _processor() -> str:
    """The processor's model and features, as the system names them."""
    if sys.platform == "darwin":
        import ctypes

        text = ctypes.create_string_buffer(256)
        size = ctypes.c_size_t(len(text))
        ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, 0)
        return text.value.decode()
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        return platform.processor()
    return "\n".join(sorted(set(lines)))
