"""The latest misses, so that `jax-mps cache explain` can say why a program was translated again. Losing them loses nothing."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import NamedTuple

from jax_mps.cache.entry import key_of
from jax_mps.cache.files import read_whole
from jax_mps.cache.fingerprint import Key

_LIMIT = 1 << 18  # bytes; then a new file is begun, and the one before the last goes
_LONGEST = 200  # characters of a name or a reason


class Miss(NamedTuple):
    """A program that was asked for and translated. when: seconds since the epoch."""

    when: float
    name: str
    key: Key
    why: str


def note(path: str, miss: Miss) -> int:
    """Append a miss to the file; 0, the blocks that eviction has to know of. Raises OSError."""
    row = [miss.when, miss.name[:_LONGEST], miss.why[:_LONGEST], miss.key.parts]
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.write(handle, json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n")  # one write: lines of two processes do not mix
        size = os.fstat(handle).st_size
    finally:
        os.close(handle)
    if size > _LIMIT:
        os.replace(path, f"{path}.old")
    return 0


def read(path: str) -> list[Miss]:
    """The misses in the file and the one before it, latest first; lines that make no sense are left out."""
    found = []
    for name in (f"{path}.old", path):
        with suppress(OSError):
            found += [miss for line in read_whole(name, limit=4 * _LIMIT)[0].splitlines() if (miss := _miss(line)) is not None]
    return sorted(found, key=lambda miss: -miss.when)


def _miss(line: bytes) -> Miss | None:
    try:
        when, name, why, parts = json.loads(line)
        return Miss(float(when), str(name), key_of(parts), str(why))
    except (ValueError, TypeError, RecursionError):
        return None
