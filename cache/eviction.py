"""Keeping the cache under its cap, least recently used first, at a cost that does not grow with every put.

Two ideas carry it. The size in use is believed, not measured: `Tally` is a number kept as the length of a file, which
any process can raise with one atomic append. And when that number passes the cap, one pass looks at every file and
frees a fifth of the cap, so that the next pass is at least a fifth of the cap away.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jax_mps.cache.files import remove

BLOCK = 4096  # bytes; what a small file really takes on the file systems in use
LOW_WATER = 0.8
KINDS = ("entries", "aliases", "constants")


class Tally(NamedTuple):
    """A number that processes raise together: the length of a file in blocks. Lost or wrong, it costs one scan."""

    path: str

    def add(self, amount: int) -> int | None:
        """Raise it; the new value, or None if the file is missing."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            os.write(handle, bytes(amount))
            return os.fstat(handle).st_size
        finally:
            os.close(handle)

    def set(self, value: int) -> None:
        """Set it; the file is sparse and takes no room."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(handle, value)
        finally:
            os.close(handle)

    def get(self) -> int | None:
        """Its value, or None if the file is missing."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return None


class Usage(NamedTuple):
    """Files and blocks of one kind."""

    files: int = 0
    blocks: int = 0


def blocks(size: int) -> int:
    """How many blocks a file of `size` bytes takes."""
    return -(-size // BLOCK)


def shards(folder: str) -> Iterator[str]:
    """The two-digit folders below `folder` that exist."""
    try:
        with os.scandir(folder) as found:
            names = sorted(e.name for e in found if len(e.name) == 2 and e.is_dir(follow_symlinks=False))
    except OSError:
        return
    yield from (f"{folder}/{name}" for name in names)


def scan(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Path and status of every file in the fan-out below `folder`; files that vanish meanwhile are left out."""
    for shard in shards(folder):
        try:
            with os.scandir(shard) as found:
                names = [e.path for e in found]
        except OSError:
            continue
        for path in names:
            try:
                yield path, os.lstat(path)
            except OSError:
                continue


def usage(folder: str) -> dict[str, Usage]:
    """What each kind of file below `folder` takes, measured."""
    result = {}
    for kind in KINDS:
        files = total = 0
        for _, info in scan(f"{folder}/{kind}"):
            files, total = files + 1, total + blocks(info.st_size)
        result[kind] = Usage(files, total)
    return result


def shrink(folder: str, limit: int) -> tuple[int, int]:
    """Remove the least recently used files until at most `limit` blocks are left; (files removed, blocks left).

    Two passes, so that a hundred thousand entries need no list in memory. A constant is as recent as the latest use of
    any of its entries, so it goes no earlier than they do, and not much later.
    """
    now = int(time.time())
    ages = _ages(folder, now)
    excess = sum(ages.values()) - limit
    left = sum(ages.values())
    if excess <= 0:
        return 0, left
    removed, cutoff = 0, _cutoff(ages, excess)
    for path, info in _everything(folder):
        second = _second(info, now)
        if (second < cutoff or (second == cutoff and left > limit)) and remove(path):
            removed, left = removed + 1, left - blocks(info.st_size)
    return removed, left


@contextmanager
def try_lock(path: str) -> Iterator[bool]:
    """Hold `path` as a lock if nobody else does; whether it is held. It ends with the process, whatever happens.

    Where the file system knows no locks the answer is yes: two evictions at once are wasteful, not wrong.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _everything(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for kind in KINDS:
        yield from scan(f"{folder}/{kind}")


def _ages(folder: str, now: int) -> Counter[int]:
    ages: Counter[int] = Counter()
    for _, info in _everything(folder):
        ages[_second(info, now)] += blocks(info.st_size)
    return ages


def _second(info: os.stat_result, now: int) -> int:
    return min(int(info.st_mtime), now)  # a time in the future, after a clock jump, counts as just now


def _cutoff(ages: Counter[int], excess: int) -> int:
    for second in sorted(ages):
        excess -= ages[second]
        if excess <= 0:
            return second
    return max(ages)
