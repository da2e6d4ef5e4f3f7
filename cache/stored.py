"""Single stored files, read with care: nothing is believed before it is checked, and nothing large is read before it must be."""

from __future__ import annotations

import os
from typing import NamedTuple

from jax_mps.cache.entry import Alias, Damaged, Header, decode_alias, decode_entry, decode_header, file_bytes, header_bytes, is_digest
from jax_mps.cache.files import read_whole
from jax_mps.cache.fingerprint import constant_digest

_HEAD = 1 << 14  # bytes read to list an entry; nearly every header fits
FIRST = 1 << 18  # bytes read before a file's own statement of its size is believed; an alias is smaller
MOST = 1 << 31  # bytes of an entry; more is no translated program


class Listing(NamedTuple):
    """One stored entry as the command line sees it: its verified head, without its blobs."""

    digest: str
    header: Header
    used: float  # seconds since the epoch, exact to an hour
    bytes: int


class Problem(NamedTuple):
    """Something in the folder that `verify` found wrong."""

    path: str
    what: str


def read_entry_file(path: str) -> tuple[bytes, os.stat_result]:
    """The bytes of an entry, not read in full unless the file has the size that it says. Raises Damaged, OSError."""
    data, info = read_whole(path, limit=FIRST)
    if info.st_size > len(data):
        if info.st_size > MOST or file_bytes(data) != info.st_size:
            raise Damaged(f"it has {info.st_size} bytes, which is not what it says")
        data, info = read_whole(path, limit=MOST)
    return data, info


def read_header(path: str) -> Header:
    """The verified head of an entry, without reading the rest. Raises Damaged, OSError."""
    head, info = read_whole(path, limit=_HEAD)
    wanted = header_bytes(head)
    if wanted > len(head):
        head, info = read_whole(path, limit=wanted)
    header = decode_header(head)
    if header.size != info.st_size:
        raise Damaged(f"holds {info.st_size} bytes instead of {header.size}")
    return header


def read_alias(path: str) -> Alias:
    """The alias in a file. Raises Damaged, OSError."""
    return decode_alias(read_whole(path, limit=FIRST)[0], os.path.basename(path))


def check(kind: str, digest: str, data: bytes) -> None:
    """Raise Damaged unless `data` is a good file of that kind and that name."""
    if not is_digest(digest):
        raise Damaged("it has a name that we do not give")
    if kind == "aliases":
        decode_alias(data, digest)
    elif kind == "constants" and constant_digest(data) != digest:
        raise Damaged("it does not match its checksum")
    elif kind == "entries":
        found = decode_entry(data, _no_constant).key.digest
        if found != digest:
            raise Damaged(f"it is the entry {found}, in the wrong place")


def _no_constant(digest: str, size: int) -> bytes:
    raise Damaged(f"constant {digest} was not asked for")
