"""What the cache's own operations cost, without JAX or MLX: python benchmarks/cache.py [ENTRIES]

Prints medians in microseconds, then the same beside a cache that is full with ENTRIES entries (default 5,000; 100,000 takes a minute).
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jax_mps.cache import Alias, Store, key, translator_digest

PROGRAM = key(("module", b"a program of 121 ops"), ("mlx", "0.32.4"))
RAW = key(("code", b"its bytes"), ("mlx", "0.32.4"))
FUNCTION = os.urandom(13_000)  # what MLX writes for 121 ops


def median(run: Callable[[int], object], repeats: int = 500) -> str:
    """The median time of a call."""
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - start)
    return f"{statistics.median(times) * 1e6:8.1f} us"


def fetch(store: Store) -> None:
    """All that a warm program asks of the cache."""
    alias = store.get_alias(RAW)
    entry = store.get(alias.key) if alias else None
    assert entry is not None
    with entry.path("0.mlxfn"):
        pass


def put(store: Store, number: int) -> None:
    """Store another small program."""
    store.put(key(("number", str(number))), {"summary": {"name": "f"}}, {"0.mlxfn": FUNCTION[:2000]}, {})


def report(store: Store) -> None:
    """Measure one store."""
    store.put(PROGRAM, {"summary": {"name": "f"}}, {"0.mlxfn": FUNCTION}, {})
    store.put_alias(RAW, Alias(PROGRAM, "jit_f"))
    rows = {
        "alias": lambda _: store.get_alias(RAW),
        "entry of 13 KB, verified": lambda _: store.get(PROGRAM),
        "alias + entry + file for MLX": lambda _: fetch(store),
        "miss": lambda number: store.get(key(("absent", str(number)))),
        "put of 2 KB (background)": lambda number: put(store, -number),
    }
    for name, run in rows.items():
        sys.stdout.write(f"{name:32}{median(run)}\n")


def main(entries: int) -> None:
    """An empty cache, then a full one."""
    package = Path(sys.modules["jax_mps.cache"].__file__ or "").parents[1]
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(f"{'translator digest, first':32}{median(lambda _: translator_digest(package), 1)}\n")
        sys.stdout.write(f"{'translator digest, again':32}{median(lambda _: translator_digest(package), 50)}\n")
        report(Store(Path(folder) / "empty"))
        store = Store(Path(folder) / "full", max_bytes=entries * 4096)
        start = time.perf_counter()
        for number in range(2 * entries):
            put(store, number)
        mean = (time.perf_counter() - start) / (2 * entries) * 1e6
        kept = store.usage()["entries"].files
        sys.stdout.write(f"\n{2 * entries} puts into a cache for {entries}: mean {mean:.0f} us each, passes included; {kept} kept\n")
        report(store)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
