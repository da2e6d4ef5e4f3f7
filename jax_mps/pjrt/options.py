"""The few fields of XLA's CompileOptionsProto that matter here, read without protobuf.

The option bytes are not deterministic between processes (a map inside is in random order), so they are never hashed: `text` is.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import NamedTuple

from jax_mps.errors import InvalidProgram

Devices = tuple[tuple[int, ...], ...]

_MAGIC = b"jax-mps program 2\n"  # then a sha256 of the rest, since MLIR's reader may crash on damaged bytes


class CompileOptions(NamedTuple):
    """devices: of each replica, the ids of the devices that run its partitions; overrides: what the user gave to
    `jax.jit(..., compiler_options={...})`, sorted by name."""

    devices: Devices = ((0,),)
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def participants(self) -> int:
        """How many devices."""
        return sum(map(len, self.devices))

    def text(self) -> str:
        """The overrides, for a key."""
        return ";".join(f"{name}={value}" for name, value in self.overrides)


def read(options: bytes) -> CompileOptions:
    """Read a serialized CompileOptionsProto (fields 3 = executable_build_options {4, 5, 9}, 7 = map of overrides).

    Raises:
        InvalidProgram: the bytes are no protobuf message.
        InvalidOption: the user gave an option that XLA does not know, or a value that it cannot have.
    """
    try:
        replicas = partitions = 1
        assignment = b""
        overrides: list[tuple[str, str]] = []
        for number, value in fields(options):
            if number == 3 and isinstance(value, bytes):
                build = dict(fields(value))
                replicas, partitions = (int(build.get(n, 1) or 1) for n in (4, 5))
                assignment = bytes(build.get(9, b"") or b"")
            elif number == 7 and isinstance(value, bytes):
                entry = dict(fields(value))
                overrides.append((_text(entry.get(1, b"")), repr(_override(entry.get(2, b"")))))
        devices = _devices(assignment, replicas, partitions)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise InvalidProgram(f"the compile options are no CompileOptionsProto: {error}") from error
    if overrides:
        from jax_mps.host.xla import check_options

        check_options(options)
    return CompileOptions(devices, tuple(sorted(overrides)))


def _devices(assignment: bytes, replicas: int, partitions: int) -> Devices:
    """A DeviceAssignmentProto's rows {computation_devices = 3 {replica_device_ids = 1}} by replica; by default the first devices."""
    if not assignment:
        return tuple(tuple(range(r * partitions, (r + 1) * partitions)) for r in range(replicas))
    columns = []
    for number, column in fields(assignment):
        if number == 3 and isinstance(column, bytes):
            columns.append([i for n, ids in fields(column) if n == 1 for i in ([ids] if isinstance(ids, int) else _packed(ids))])
    if len(columns) != partitions or any(len(column) != replicas for column in columns):
        raise ValueError(f"the device assignment is not of {replicas} replicas and {partitions} partitions")
    return tuple(zip(*columns, strict=True))


def _packed(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _text(value: int | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _override(value: int | bytes) -> list[tuple[int, int | bytes]]:
    return list(fields(value)) if isinstance(value, bytes) else []


def field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message that is bytes, or a message itself."""
    head = bytearray([number << 3 | 2])
    size = len(value)
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*head, size]) + value


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message by number; fixed-width ones as their bytes.

    Raises:
        ValueError, IndexError: it is none.
    """
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
