"""The cap: least recently used first, at a cost that does not grow with every put."""

from __future__ import annotations

import os
import time
from pathlib import Path

import cached_programs as programs
import pytest

from jax_mps.cache import Store, constant_digest, eviction, key


def fill(store: Store, count: int, size: int) -> None:
    """Entries of `size` bytes and one block for the header."""
    for number in range(count):
        assert store.put(key(("number", str(number))), {}, {"f": bytes(size)}, {})


def in_use(store: Store) -> int:
    """Bytes, measured."""
    return sum(use.blocks for use in store.usage().values()) * eviction.BLOCK


def age(folder: Path, digest: str, seconds: float) -> None:
    """Make every file of that digest older."""
    for path in (folder / "1").rglob(digest):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_the_cap_holds(folder: Path) -> None:
    """After any number of puts."""
    store = Store(folder, max_bytes=1 << 20)
    for batch in range(4):
        fill(store, 100 * (batch + 1), 8000)
        assert in_use(store) <= 1 << 20
    assert in_use(store) > 1 << 18


def test_the_cap_holds_over_processes(folder: Path) -> None:
    """Each store adds to the same tally."""
    for number in range(200):
        Store(folder, max_bytes=1 << 20).put(key(("number", str(number))), {}, {"f": bytes(16000)}, {})
    assert in_use(Store(folder)) <= 1 << 20


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 0)], ids=["gone", "zero"])
def test_a_lost_tally_is_measured_again(folder: Path, spoil: object) -> None:
    """Or the cap is passed by at most what it had counted, once."""
    store = Store(folder, max_bytes=1 << 20)
    fill(store, 50, 16000)
    spoil(folder / "1" / "blocks")  # type: ignore[operator]
    for _ in range(3):
        fill(store, 60, 16000)
    assert in_use(store) <= 1 << 20


def test_least_recently_used_goes_first(store: Store, folder: Path) -> None:
    """Using an old entry saves it."""
    for number in range(0, 20, 2):
        programs.put(store, number)
        for digest in (programs.program_key(number).digest, programs.raw_key(number).digest):
            age(folder, digest, 7200 + 3600 * number)
    saved = 18
    assert programs.get(store, saved) is not None
    store.evict(in_use(store) // 2)
    left = [number for number in range(0, 20, 2) if programs.get(store, number)]
    assert saved in left
    assert 0 in left
    assert 16 not in left


def test_a_shared_constant_is_as_recent_as_its_latest_use(store: Store, folder: Path) -> None:
    """The old entry goes, the constant stays for the new one."""
    programs.put(store, 1)
    (digest,) = programs.constants(1)
    for name in (programs.program_key(1).digest, programs.raw_key(1).digest, digest):
        age(folder, name, 90000)
    programs.put(store, 3)
    store.evict(in_use(store) - 1)
    assert programs.get(store, 1) is None
    entry = programs.get(store, 3)
    assert entry is not None
    assert programs.is_right(entry, 3)


def test_reading_keeps_constants_as_young_as_their_entry(store: Store, folder: Path) -> None:
    """Or eviction would take the constant from under a program in daily use."""
    programs.put(store, 1)
    (digest,) = programs.constants(1)
    for name in (programs.program_key(1).digest, digest):
        age(folder, name, 90000)
    programs.get(store, 1)
    (path,) = (folder / "1" / "constants").rglob(digest)
    assert time.time() - path.stat().st_mtime < 60


def test_what_would_fill_half_the_cache_is_not_stored(folder: Path) -> None:
    """It would push out everything else."""
    store = Store(folder, max_bytes=1 << 20)
    data = bytes(600_000)
    store.put(key(("a", "")), {}, {"f": data}, {})
    store.put(key(("b", "")), {}, {}, {constant_digest(data): data})
    assert list(store.entries()) == []


def test_passes_are_amortised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With N entries in a full cache, N / 5 puts pay for one pass, and a put that triggers none looks at no other file."""
    store = Store(folder, max_bytes=4096 * 500)
    passes = []
    shrink = eviction.shrink
    monkeypatch.setattr(eviction, "shrink", lambda *args: passes.append(args) or shrink(*args))
    fill(store, 500, 100)
    passes.clear()
    for number in range(1000):
        store.put(key(("more", str(number))), {}, {"f": bytes(100)}, {})
    assert 1 <= len(passes) <= 1000 / (500 * 0.2) + 1


def test_only_one_process_evicts(folder: Path) -> None:
    """The others go on without waiting."""
    store = Store(folder, max_bytes=1 << 20)
    fill(store, 10, 100)
    with eviction.try_lock(str(folder / "1" / "lock")) as mine:
        assert mine
        fill(store, 200, 8000)
        assert in_use(store) > 1 << 20
    fill(store, 1, 8001)
    assert in_use(store) <= 1 << 20
