"""Reading and writing single files: whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

Buffer = bytes | bytearray | memoryview

SYNC_FROM = 1 << 16  # bytes; below, a file lost to a power cut is cheaper to make again than to flush (0.3-10 ms each)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class NotRegular(OSError):
    """Something other than a plain file lies where a file should."""


def read_whole(path: str | Path, *, limit: int = -1) -> tuple[bytes, os.stat_result]:
    """All bytes of a plain file (at most `limit`, if that is not negative), and its status as it was when opened."""
    handle = os.open(path, _READ)
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise NotRegular(f"{path} is not a plain file")
        return _read(handle, info.st_size if limit < 0 else min(limit, info.st_size)), info
    finally:
        os.close(handle)


def write_atomic(path: str, chunks: Iterable[Buffer], *, temporary: str) -> int:
    """Write `chunks` to `temporary` (a new name on the same file system), rename it to `path`; the bytes written.

    A reader sees the old file, none, or the new one. The temporary file is removed if anything fails.
    """
    handle = os.open(temporary, _WRITE, 0o600)
    try:
        try:
            size = sum(_write(handle, memoryview(chunk).cast("B")) for chunk in chunks)
            if size >= SYNC_FROM:
                os.fsync(handle)
        finally:
            os.close(handle)
        _rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    return size


def remove(path: str | Path) -> bool:
    """Unlink `path` if it is there; whether it was."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def touch(path: str | Path) -> None:
    """Set a file's times to now, if it is there and may be changed."""
    with suppress(OSError):  # recency is advice to eviction; a read-only cache works without it
        os.utime(path)


def _read(handle: int, size: int) -> bytes:
    first = os.read(handle, size)
    if len(first) == size:
        return first
    parts = [first]
    while parts[-1]:  # one read returns at most 2 GiB
        parts.append(os.read(handle, size - sum(map(len, parts))))
    return b"".join(parts)


def _write(handle: int, data: memoryview) -> int:
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:])
    return done


def _rename(temporary: str, path: str) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:  # the first file in its fan-out folder
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.replace(temporary, path)
