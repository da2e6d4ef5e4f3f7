"""Entries and aliases as bytes: whole and right, or Damaged; nothing in between."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable

import pytest

from jax_mps.cache import Alias, Damaged, key
from jax_mps.cache import entry as module
from jax_mps.cache.entry import decode_alias, decode_entry, decode_header, encode_alias, encode_entry

KEY = key(("module", "m"), ("mlx", "0.32.4"))
RAW = key(("raw", "r"))
MANIFEST = {"name": "jit_f", "tree": [1, 2.5, None, {"é": "ü\udc80"}]}
FILES = {"0.mlxfn": b"function zero", "1.mlxfn": b"", "region.bc": bytes(range(256))}
CONSTANT = "ab" * 32


def no_constants(digest: str, size: int) -> bytes:
    """A loader that must not be called."""
    raise AssertionError(digest)


def encoded() -> bytes:
    """A small entry."""
    return b"".join(map(bytes, encode_entry(KEY, MANIFEST, FILES, {CONSTANT: 7})))


def test_round_trip() -> None:
    """Everything that went in comes out."""
    entry = decode_entry(encoded(), no_constants)
    assert (entry.key, entry.manifest, entry.constants) == (KEY, MANIFEST, {CONSTANT: 7})
    assert {name: entry.read(name) for name in entry.names} == FILES


@pytest.mark.parametrize("memory", [True, False], ids=["in memory", "temporary file"])
def test_path_holds_the_bytes_and_goes_away(memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open file goes on reading after the block, as MLX's lazy constants do."""
    if not memory:
        monkeypatch.setattr(module, "_has_memory_files", lambda: False)
    entry = decode_entry(encoded(), no_constants)
    with entry.path("region.bc") as path:
        reader = path.open("rb")
        assert path.read_bytes() == FILES["region.bc"]
    assert not path.exists()
    with reader:
        assert reader.read() == FILES["region.bc"]


def test_unknown_names_are_key_errors() -> None:
    """The caller's mistake, told from damage."""
    entry = decode_entry(encoded(), no_constants)
    with pytest.raises(KeyError):
        entry.read("2.mlxfn")
    with pytest.raises(KeyError):
        entry.constant("cd" * 32)


def test_every_byte_counts() -> None:
    """A flipped bit anywhere is noticed."""
    data = encoded()
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 1 << (place % 8)
        with pytest.raises(Damaged):
            decode_entry(bytes(bad), no_constants)


def test_every_length_counts() -> None:
    """So is a cut anywhere, and anything appended."""
    data = encoded()
    for bad in [data[:end] for end in range(len(data))] + [data + b"\0", data + data]:
        with pytest.raises(Damaged):
            decode_entry(bad, no_constants)


def test_random_damage_is_only_ever_damaged() -> None:
    """No other exception, whatever the bytes are."""
    data, chance = encoded(), random.Random(0)
    for _ in range(2000):
        bad = bytearray(data)
        start = chance.randrange(len(bad))
        bad[start : start + chance.randrange(40)] = chance.randbytes(chance.randrange(40))
        if bytes(bad) != data:
            with pytest.raises(Damaged):
                decode_entry(bytes(bad), no_constants)


def forged(change: Callable[[dict[str, object]], object]) -> bytes:
    """An entry whose header was changed and whose checksums were made right again."""
    data = encoded()
    header = decode_header(data)
    fields = json.loads(data[module._PREFIX.size : header.body])
    changed = change(fields)
    text = json.dumps(fields if changed is None else changed).encode()
    prefix = module._PREFIX.pack(module._MAGIC, len(text), module._PREFIX.size + len(text) + len(data) - header.body, hashlib.sha256(text).digest())
    return prefix + text + data[header.body :]


def set_field(name: str, value: object) -> Callable[[dict[str, object]], object]:
    """A change of one field."""
    return lambda fields: fields.update({name: value})


def set_file(column: int, value: object) -> Callable[[dict[str, object]], object]:
    """A change of one column of the first file."""
    return lambda fields: fields["files"][0].__setitem__(column, value)  # type: ignore[index]


FORGERIES = {
    "another format": set_field("format", 2),
    "no manifest": lambda fields: fields.pop("manifest") and None,
    "manifest is a list": set_field("manifest", []),
    "header is a list": lambda fields: [1],
    "key is text": set_field("key", "ab"),
    "key with numbers": set_field("key", [["a", 1]]),
    "key part twice": set_field("key", [["a", "1"], ["a", "1"]]),
    "key is null": set_field("key", None),
    "files is null": set_field("files", None),
    "path upwards": set_file(0, "../../x"),
    "absolute path": set_file(0, "/etc/passwd"),
    "hidden name": set_file(0, ".x"),
    "name with NUL": set_file(0, "a\0b"),
    "name is a number": set_file(0, 7),
    "name twice": set_file(0, "1.mlxfn"),
    "overlap": set_file(1, 1),
    "negative offset": set_file(1, -1),
    "negative size": set_file(2, -5),
    "huge size": set_file(2, 1 << 70),
    "size is text": set_file(2, "13"),
    "wrong checksum": set_file(3, "00" * 32),
    "checksum is null": set_file(3, None),
    "last file dropped": lambda fields: fields["files"].pop() and None,
    "constant upwards": set_field("constants", {"../x": 1}),
    "constant of negative size": set_field("constants", {CONSTANT: -1}),
    "constants is a list": set_field("constants", []),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_right_checksums_do_not_excuse_a_wrong_header(change: Callable[[dict[str, object]], object]) -> None:
    """The manifest is validated for itself: formats, types, and names that cannot leave the entry."""
    assert decode_entry(forged(lambda fields: None), no_constants).manifest == MANIFEST
    with pytest.raises(Damaged):
        decode_entry(forged(change), no_constants)


def test_deep_nesting_is_damage_not_a_crash() -> None:
    """JSON can be nested deeper than Python's stack."""
    text = b"[" * 100_000
    data = module._PREFIX.pack(module._MAGIC, len(text), module._PREFIX.size + len(text), hashlib.sha256(text).digest())
    with pytest.raises(Damaged):
        decode_entry(data + text, no_constants)


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a" * 101, "a\n"])
def test_bad_names_are_refused_when_written(name: str) -> None:
    """The writer hears of it, not the reader."""
    with pytest.raises(ValueError, match="cannot name"):
        encode_entry(KEY, {}, {name: b""}, {})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes"], ids=["nan", "set", "bytes"])
def test_manifests_are_json(value: object) -> None:
    """Nothing that would not come back equal."""
    with pytest.raises((TypeError, ValueError)):
        encode_entry(KEY, {"x": value}, {}, {})


def test_alias_round_trip_and_damage() -> None:
    """An alias leads where it was told to, or is Damaged; another program's alias is noticed."""
    alias = Alias(KEY, "jit_f", {"donated": [0]})
    data = encode_alias(RAW, alias)
    assert decode_alias(data, RAW.digest) == alias
    assert alias.digest == KEY.digest
    with pytest.raises(Damaged, match="another program"):
        decode_alias(data, KEY.digest)
    for place in range(len(data)):
        bad = bytearray(data)
        bad[place] ^= 1 << (place % 8)
        for wrong in (bytes(bad), data[:place]):
            with pytest.raises(Damaged):
                decode_alias(wrong, RAW.digest)
