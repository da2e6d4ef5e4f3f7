"""A cache in one tar file, to ship to another machine or to colleagues.

What is imported is verified as if it were read from the cache, and never unpacked by name. That keeps damage out, not
malice: an archive is as trusted as its sender.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jax_mps.cache.entry import Damaged
from jax_mps.cache.paths import FORMAT
from jax_mps.cache.store import Store

_ORDER = ("constants", "entries", "aliases")  # so that a broken off import leaves nothing that leads nowhere
_PREFIX = f"jax-mps-cache/{FORMAT}/"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Moved:
    """Files that were written, by kind, and the members that were refused, with the reason."""

    files: dict[str, int]
    refused: tuple[tuple[str, str], ...]


def export_tar(store: Store, target: Path) -> Moved:
    """Write everything stored to a new tar file (compressed if its name ends in gz, bz2 or xz). Raises OSError."""
    files = dict.fromkeys(_ORDER, 0)
    compression = target.suffix.removeprefix(".")
    mode = f"x:{compression}" if compression in {"gz", "bz2", "xz"} else "x:"
    with tarfile.open(target, mode) as tar:  # type: ignore[call-overload]
        for kind in _ORDER:
            for digest, data in store.raw(kind):
                tar.addfile(_member(f"{_PREFIX}{kind}/{digest}", len(data)), io.BytesIO(data))
                files[kind] += 1
    return Moved(files, ())


def import_tar(store: Store, source: Path) -> Moved:
    """Store what a tar file of ours holds. Raises OSError or tarfile.TarError if it cannot be read at all."""
    files = dict.fromkeys(_ORDER, 0)
    refused: list[tuple[str, str]] = []
    with tarfile.open(source, "r:*") as tar:
        for member, kind, digest in _members(tar):
            try:
                store.adopt(kind, digest, _content(tar, member))
                files[kind] += 1
            except (Damaged, KeyError) as error:
                refused.append((member.name, str(error)))
    return Moved(files, tuple(refused))


def _members(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    for member in tar:
        kind, _, digest = member.name.removeprefix(_PREFIX).partition("/")
        yield member, kind, digest


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if not member.isreg() or not member.name.startswith(_PREFIX):
        raise Damaged("it is not a file of a jax-mps cache of this format")
    with suppress(tarfile.TarError), tar.extractfile(member) or io.BytesIO() as file:
        return file.read()
    raise Damaged("it cannot be read")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member
