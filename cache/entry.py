"""What is stored, as bytes: an entry (one translated program) and an alias (one raw program's way to its entry).

An entry is one file: a fixed prefix, a JSON header (key, manifest, and the place and checksum of every blob), then
the blobs. All of it is verified when it is decoded, because MLX checks nothing and a corrupt function can kill the
process; so an Entry that exists is whole. Data only: no pickles, no code, no paths.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jax_mps.cache.files import Buffer, remove
from jax_mps.cache.fingerprint import Key
from jax_mps.cache.paths import FORMAT

_PREFIX = struct.Struct("<8sQQ32s")  # magic, bytes of the header, bytes of the file, sha256 of the header
_MAGIC = b"jaxmps%02d" % FORMAT
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_HEX = frozenset("0123456789abcdef")
_DESCRIPTORS = "/proc/self/fd"

Json = dict[str, Any]


class Damaged(ValueError):
    """A stored file is not what its checksums, its key or its format say it should be."""


class Header(NamedTuple):
    """The verified head of an entry: its key, the caller's manifest, and where each blob lies."""

    key: Key
    manifest: Json
    files: Mapping[str, tuple[int, int, str]]  # name -> offset from the start of the file, bytes, sha256
    constants: Mapping[str, int]  # sha256 -> bytes
    body: int  # where the blobs begin
    size: int  # of the whole file


class Entry:
    """A stored program, verified whole. It stays good after the file behind it is evicted, constants excepted."""

    __slots__ = ("_data", "_load", "header")

    def __init__(self, header: Header, data: memoryview, load: Callable[[str, int], bytes]) -> None:
        self.header = header
        self._data = data
        self._load = load

    @property
    def key(self) -> Key:
        """The key it was stored under."""
        return self.header.key

    @property
    def manifest(self) -> Json:
        """The manifest as it was given to `put` (after a round trip through JSON). Do not change it."""
        return self.header.manifest

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its files."""
        return tuple(self.header.files)

    @property
    def constants(self) -> Mapping[str, int]:
        """The constants it uses: digest -> bytes."""
        return self.header.constants

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises KeyError for a name that the entry lacks."""
        return bytes(self._view(name))

    @contextmanager
    def path(self, name: str) -> Iterator[Path]:
        """A private file that holds exactly the verified bytes of `name`, for the length of a `with` block.

        In memory where the system can (Linux), else in the temporary folder. A reader that has opened it may go on
        reading afterwards, as MLX does with constants.
        """
        with _memory_file(self._view(name)) if _has_memory_files() else _temporary_file(self._view(name)) as path:
            yield path

    def constant(self, digest: str) -> bytes:
        """The bytes of one constant. Raises KeyError for one that is not listed, Damaged if it is lost or corrupt."""
        return self._load(digest, self.header.constants[digest])

    def _view(self, name: str) -> memoryview:
        offset, size, _ = self.header.files[name]
        return self._data[offset : offset + size]


class Alias(NamedTuple):
    """Where one raw program (its bytes as JAX sent them) leads: the canonical key, and what is its own."""

    key: Key
    name: str
    extra: Json = {}  # noqa: RUF012  (nobody changes it)

    @property
    def digest(self) -> str:
        """The digest of the entry it leads to."""
        return self.key.digest


def encode_entry(key: Key, manifest: Json, files: Mapping[str, Buffer], constants: Mapping[str, int]) -> list[Buffer]:
    """The bytes of an entry, in pieces. Raises ValueError or TypeError for names or manifests that cannot be stored."""
    table, offset = [], 0
    for name, data in files.items():
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"{name!r} cannot name a file of an entry")
        size = memoryview(data).nbytes
        table.append([name, offset, size, hashlib.sha256(data).hexdigest()])
        offset += size
    fields = {
        "format": FORMAT,
        "key": key.parts,
        "manifest": manifest,
        "files": table,
        "constants": dict(constants),
    }
    header = _dump(fields)
    total = _PREFIX.size + len(header) + offset
    prefix = _PREFIX.pack(_MAGIC, len(header), total, hashlib.sha256(header).digest())
    return [prefix + header, *files.values()]


def decode_entry(data: bytes, load: Callable[[str, int], bytes]) -> Entry:
    """The entry that `data` holds, every checksum verified. Raises Damaged for anything else."""
    header = decode_header(data)
    if header.size != len(data):
        raise Damaged(f"holds {len(data)} bytes instead of {header.size}")
    view = memoryview(data)
    for name, (offset, size, digest) in header.files.items():
        if hashlib.sha256(view[offset : offset + size]).hexdigest() != digest:
            raise Damaged(f"{name} does not match its checksum")
    return Entry(header, view, load)


def header_bytes(prefix: bytes) -> int:
    """How many bytes from the start of a file decode_header needs. Raises Damaged if it is no entry."""
    return _PREFIX.size + _unpack(prefix)[0]


def file_bytes(prefix: bytes) -> int:
    """How many bytes the file says it has. Raises Damaged if it is no entry."""
    return _unpack(prefix)[1]


def decode_header(data: bytes) -> Header:
    """The head of an entry, verified on its own; the blobs need not be there. Raises Damaged."""
    length, total, digest = _unpack(data)
    body = _PREFIX.size + length
    text = memoryview(data)[_PREFIX.size : body]
    if len(text) != length or hashlib.sha256(text).digest() != digest:
        raise Damaged("the header does not match its checksum")
    try:
        return _header(_parse(text), body, total)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"the header is malformed: {error}") from None


def encode_alias(raw: Key, alias: Alias) -> bytes:
    """The bytes of the alias file of `raw`. Raises ValueError or TypeError if `extra` is not JSON."""
    fields = {
        "format": FORMAT,
        "raw": raw.digest,
        "key": alias.key.parts,
        "name": alias.name,
        "extra": alias.extra,
    }
    text = _dump(fields)
    return hashlib.sha256(text).hexdigest().encode() + b"\n" + text


def decode_alias(data: bytes, raw: str) -> Alias:
    """The alias in `data`, which must be the one of the raw key with digest `raw`. Raises Damaged."""
    digest, text = data[:64], data[65:]
    if data[64:65] != b"\n" or hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damaged("the alias does not match its checksum")
    try:
        fields = _parse(text)
        _require(fields["format"] == FORMAT, "it has another format")
        _require(fields["raw"] == raw, "it belongs to another program")
        _require(
            isinstance(fields["name"], str) and isinstance(fields["extra"], dict),
            "a field has the wrong type",
        )
        return Alias(key_of(fields["key"]), fields["name"], fields["extra"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"the alias is malformed: {error}") from None


def is_digest(text: str) -> bool:
    """Whether `text` is a digest as we write them, and so a safe file name."""
    return len(text) == 64 and _HEX.issuperset(text)


def _dump(fields: Json) -> bytes:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode("ascii")


def _parse(text: bytes | memoryview) -> Json:
    try:
        fields = json.loads(bytes(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _require(isinstance(fields, dict), "it is not an object")
    return dict(fields)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _unpack(data: bytes) -> tuple[int, int, bytes]:
    if len(data) < _PREFIX.size:
        raise Damaged("it is too short")
    magic, length, total, digest = _PREFIX.unpack_from(data)
    if magic != _MAGIC or _PREFIX.size + length > total:
        raise Damaged("it is not an entry of this format")
    return length, total, digest


def key_of(parts: list[list[str]]) -> Key:
    """A key from its parts as JSON has them. Raises ValueError or TypeError."""
    for name, value in parts:
        _require(
            isinstance(name, str) and isinstance(value, str),
            "a part of the key is not text",
        )
    return Key(tuple((name, value) for name, value in parts))


def _header(fields: Json, body: int, total: int) -> Header:
    _require(fields["format"] == FORMAT, "it has another format")
    manifest, constants = fields["manifest"], fields["constants"]
    _require(
        isinstance(manifest, dict) and isinstance(constants, dict),
        "a field has the wrong type",
    )
    for digest, size in constants.items():
        _require(
            is_digest(digest) and isinstance(size, int) and size >= 0,
            "a constant is not named by a digest",
        )
    return Header(
        key_of(fields["key"]),
        manifest,
        _table(fields["files"], body, total),
        constants,
        body,
        total,
    )


def _table(rows: list[list[Any]], body: int, total: int) -> dict[str, tuple[int, int, str]]:
    table, end = {}, body
    for name, offset, size, digest in rows:
        _require(
            isinstance(size, int) and size >= 0 and body + offset == end,
            "the files do not follow each other",
        )
        _require(
            re.fullmatch(_NAME, name) is not None and name not in table,
            "a file has a name it cannot have",
        )
        table[name] = (end, size, digest)
        end += size
    _require(end == total, "the files do not fill the entry")
    return table


def _has_memory_files() -> bool:
    return hasattr(os, "memfd_create") and os.path.isdir(_DESCRIPTORS)


@contextmanager
def _memory_file(data: memoryview) -> Iterator[Path]:
    handle = os.memfd_create("jax-mps", os.MFD_CLOEXEC)  # 17 us for 10 KB; a temporary file costs 10 times that
    try:
        with open(handle, "wb", buffering=0, closefd=False) as file:
            while len(data):
                data = data[file.write(data) :]
        yield Path(f"{_DESCRIPTORS}/{handle}")
    finally:
        os.close(handle)


@contextmanager
def _temporary_file(data: memoryview) -> Iterator[Path]:
    import tempfile  # here: it brings half of the standard library, and Linux never needs it

    handle, name = tempfile.mkstemp(prefix="jax-mps-", suffix=".mlxfn")  # 0600, a name nobody can foresee
    try:
        with open(handle, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        remove(name)
