"""Made-up programs, a function of their number, so that every process knows what a right answer is."""

from __future__ import annotations

import random
from collections.abc import Mapping

from jax_mps.cache import Alias, Entry, Key, Store, constant_digest, key


def program_key(number: int) -> Key:
    """The canonical key of a program."""
    return key(("module", f"program {number}"), ("mlx", "0.32.4"), ("device", "cpu"))


def raw_key(number: int) -> Key:
    """A raw key that leads to it."""
    return key(("raw", f"program {number}, with locations"), ("mlx", "0.32.4"))


def files(number: int) -> dict[str, bytes]:
    """Its files: one to three, of some kilobytes."""
    chance = random.Random(number)
    return {f"{i}.mlxfn": chance.randbytes(chance.randrange(5000)) for i in range(1 + number % 3)}


def constants(number: int) -> Mapping[str, bytes]:
    """Its constants: every other program has one, shared by ten."""
    data = random.Random(number // 10).randbytes(9000)
    return {constant_digest(data): data} if number % 2 else {}


def manifest(number: int) -> dict[str, object]:
    """Its manifest."""
    name = f"jit_f{number}"
    return {"number": number, "summary": {"name": name, "ops": number, "segments": 1, "host_segments": 0}}


def put(store: Store, number: int) -> bool:
    """Store it, with its alias."""
    stored = store.put(program_key(number), manifest(number), files(number), constants(number))
    return stored and store.put_alias(raw_key(number), Alias(program_key(number), f"jit_f{number}"))


def get(store: Store, number: int) -> Entry | None:
    """Fetch it by its alias."""
    alias = store.get_alias(raw_key(number))
    return store.get(alias.key) if alias is not None else None


def is_right(entry: Entry, number: int) -> bool:
    """Whether an entry is that program, byte by byte."""
    return (
        entry.manifest == manifest(number)
        and {name: entry.read(name) for name in entry.names} == files(number)
        and all(entry.constant(digest) == data for digest, data in constants(number).items())
        and set(entry.constants) == set(constants(number))
    )
