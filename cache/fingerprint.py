"""Keys: ordered lists of named parts, and the digest of the translator's own sources."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

TRANSLATOR_FOLDERS = ("plan", "ops", "calls", "rewrites", "host")


class Key:
    """What a stored program depends on, part by part; two keys are equal when every part is.

    `digest` is the sha256 (hex) of the parts, each name and value preceded by its length, so that no two lists of
    parts share an encoding.
    """

    __slots__ = ("digest", "parts")

    def __init__(self, parts: tuple[tuple[str, str], ...]) -> None:
        names = [name for name, _ in parts]
        if len(set(names)) != len(names):
            raise ValueError(f"a key names each of its parts once, got {names}")
        self.parts = parts
        self.digest = hashlib.sha256(_encode(parts)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Key({self.parts!r})"

    def __getitem__(self, name: str) -> str:
        return dict(self.parts)[name]

    def differences(self, other: Key) -> tuple[tuple[str, str | None, str | None], ...]:
        """The parts that differ, as (name, here, there); None where a side lacks the part."""
        here, there = dict(self.parts), dict(other.parts)
        names = dict.fromkeys((*here, *there))
        return tuple((n, here.get(n), there.get(n)) for n in names if here.get(n) != there.get(n))


def key(*parts: tuple[str, str | bytes]) -> Key:
    """A key of named parts; a value given as bytes (a module, say) enters as `sha256:<hex>`."""
    return Key(tuple((name, _text(value)) for name, value in parts))


def constant_digest(data: bytes | bytearray | memoryview) -> str:
    """The name under which a constant is stored: the sha256 (hex) of its bytes, which must be contiguous."""
    return hashlib.sha256(data).hexdigest()


@functools.cache
def translator_digest(package_dir: Path, folders: tuple[str, ...] = TRANSLATOR_FOLDERS) -> str:
    """The digest of the Python sources (names and bytes) below `folders` of `package_dir`. Folders that do not exist count as empty.

    Taken from the files, so that an edited lowering in an editable install is another translator; and once for each process (1.6 ms),
    because a process goes on running the sources that it has imported, whatever happens to the files.
    """
    return _digest_of_sources(sorted(_sources(os.fspath(package_dir), folders), key=itemgetter(1)))


def _encode(parts: tuple[tuple[str, str], ...]) -> bytes:
    texts = [text.encode("utf-8", "surrogatepass") for part in parts for text in part]
    return b"".join(b"%d:%b" % (len(text), text) for text in texts)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else f"sha256:{hashlib.sha256(value).hexdigest()}"


def _sources(root: str, folders: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Path and name (below the package, with slashes) of every source file."""
    for folder in folders:
        try:
            found = list(os.scandir(f"{root}/{folder}"))
        except FileNotFoundError:
            continue
        yield from ((file.path, f"{folder}/{file.name}") for file in found if file.name.endswith(".py"))
        yield from _sources(root, tuple(f"{folder}/{inner.name}" for inner in found if inner.is_dir(follow_symlinks=False)))


def _digest_of_sources(sources: list[tuple[str, str]]) -> str:
    total = hashlib.sha256()
    for path, name in sources:
        with open(path, "rb", buffering=0) as file:  # unbuffered: half the time of Path.read_bytes for files of this size
            source = file.read()
        total.update(_encode(((name, hashlib.sha256(source).hexdigest()),)))
    return total.hexdigest()
