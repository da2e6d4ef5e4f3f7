"""The few fields of XLA's CompileOptionsProto that matter to one device, read without protobuf.

The option bytes are not deterministic between processes (a map inside is in random order), so they are never hashed: `text` is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from jax_mps.errors import InvalidProgram

_MAGIC = b"jax-mps program 2\n"  # then a sha256 of the rest, since MLIR's reader may crash on damaged bytes


@dataclass(frozen=True, slots=True)
class CompileOptions:
    """num_replicas, num_partitions; overrides: what the user gave to `jax.jit(..., compiler_options={...})`, sorted by name."""

    num_replicas: int = 1
    num_partitions: int = 1
    overrides: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """The overrides, for a key."""
        return ";".join(f"{name}={value}" for name, value in self.overrides)


def read(options: bytes) -> CompileOptions:
    """Read a serialized CompileOptionsProto (fields 3 = executable_build_options {4, 5}, 7 = map of overrides).

    Raises:
        InvalidProgram: the bytes are no protobuf message.
        InvalidOption: the user gave an option that XLA does not know, or a value that it cannot have.
    """
    try:
        replicas = partitions = 1
        overrides: list[tuple[str, str]] = []
        for number, value in _fields(options):
            if number == 3 and isinstance(value, bytes):
                build = dict(_fields(value))
                replicas, partitions = (int(build.get(n, 1) or 1) for n in (4, 5))
            elif number == 7 and isinstance(value, bytes):
                entry = dict(_fields(value))
                overrides.append((_text(entry.get(1, b"")), repr(_override(entry.get(2, b"")))))
    except (IndexError, ValueError, struct.error) as error:
        raise InvalidProgram(f"the compile options are no CompileOptionsProto: {error}") from error
    if overrides:
        from jax_mps.host.xla import check_options

        check_options(options)
    return CompileOptions(replicas, partitions, tuple(sorted(overrides)))


def _text(value: int | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _override(value: int | bytes) -> list[tuple[int, int | bytes]]:
    return list(_fields(value)) if isinstance(value, bytes) else []


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield tag >> 3, value
        elif kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("a field runs past the end")
            yield tag >> 3, data[position : position + length]
            position += length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            yield tag >> 3, data[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def pack(code: bytes, options: bytes) -> bytes:
    """A serialized executable: the program and its options. Loading it compiles, which the disk cache makes a read."""
    rest = struct.pack("<QQ", len(code), len(options)) + code + options
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def unpack(data: bytes) -> tuple[bytes, bytes]:
    """What `pack` packed.

    Raises:
        InvalidProgram: the bytes are not one of ours, cut short or damaged.
    """
    head = len(_MAGIC) + 32
    if not data.startswith(_MAGIC) or len(data) < head + 16:
        raise InvalidProgram("the serialized executable was not made by this version of jax-mps, or is cut short")
    digest, rest = data[len(_MAGIC) : head], data[head:]
    if hashlib.sha256(rest).digest() != digest:
        raise InvalidProgram("the serialized executable is damaged or cut short: its checksum is wrong")
    size, _ = struct.unpack("<QQ", rest[:16])
    return rest[16 : 16 + size], rest[16 + size :]
