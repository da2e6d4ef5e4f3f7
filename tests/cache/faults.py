"""The processes of the fault tests: `python faults.py killed|crowd FOLDER SECONDS-OR-COUNT ...` prints a JSON report.

One light process forks the others, so that a thousand of them cost seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cached_programs as programs

from jax_mps.cache import Damaged, Refused, Store

PROGRAMS = 40


def child(run: Callable[[], None]) -> int:
    """Fork; 1 is the exit code of an exception."""
    pid = os.fork()
    if pid:
        return pid
    try:
        run()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def killed(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill writers at random points; each complete put that a writer reported must be there afterwards."""
    chance = random.Random(seed)
    complete: set[int] = set()
    for _ in range(kills):
        complete |= one_kill(folder, chance.random() * 0.02)
    store = Store(folder)
    found = {number: programs.get(store, number) for number in range(PROGRAMS)}
    return {
        "complete": len(complete),
        "lost": sum(found[number] is None for number in complete),
        "wrong": sum(entry is not None and not programs.is_right(entry, number) for number, entry in found.items()),
        "problems": len(store.verify()),
        "unstored": sum(not programs.put(store, number) for number in range(PROGRAMS)),
        "leftovers": len(list((folder / "1" / "tmp").iterdir())),
    }


def one_kill(folder: Path, delay: float) -> set[int]:
    """The programs that one writer reported as stored before it was killed."""
    reader, report = os.pipe()
    pid = child(lambda: write_for_ever(folder, report))
    os.close(report)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as lines:
        return set(lines.read())


def write_for_ever(folder: Path, report: int) -> None:
    """Store random programs, and say which after each."""
    store, chance = Store(folder), random.Random()
    while True:
        number = chance.randrange(PROGRAMS)
        if programs.put(store, number):
            os.write(report, bytes([number]))


def crowd(folder: Path, seconds: float, *roles: str) -> dict[str, int]:
    """Run processes in these roles at once; how many of them failed."""
    until = time.time() + seconds
    pids = [child(lambda role=role: ROLES[role](folder, until)) for role in roles]  # type: ignore[misc]
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    store = Store(folder)
    return {"failed": sum(map(bool, statuses)), "problems": len(store.verify()), "unstored": int(not programs.put(store, 1))}


def read_and_write(folder: Path, until: float) -> None:
    """What a process with the plugin does: a hit must be right, a miss is stored."""
    store, chance = Store(folder, max_bytes=1 << 20), random.Random()
    while time.time() < until:
        number = chance.randrange(PROGRAMS)
        entry = programs.get(store, number)
        try:
            if entry is None:
                programs.put(store, number)
            elif not programs.is_right(entry, number):
                raise AssertionError(f"program {number} is wrong")
        except Damaged:
            pass  # a constant was evicted after the entry was read: a miss, too


def write_only(folder: Path, until: float) -> None:
    """All write the same keys."""
    store = Store(folder, max_bytes=1 << 20)
    while time.time() < until:
        for number in range(4):
            if not programs.put(store, number):
                raise AssertionError("not stored")


def evict_all(folder: Path, until: float) -> None:
    """Evict everything, again and again."""
    store = Store(folder)
    while time.time() < until:
        store.evict(0)
        time.sleep(0.01)


def clear_all(folder: Path, until: float) -> None:
    """Clear, again and again."""
    store = Store(folder)
    while time.time() < until:
        with suppress(Refused):  # the folder is not there yet, or has no tag yet
            store.clear()
        time.sleep(0.01)


ROLES = {"use": read_and_write, "write": write_only, "evict": evict_all, "clear": clear_all}


if __name__ == "__main__":
    what, folder, *rest = sys.argv[1:]
    report = killed(Path(folder), int(rest[0]), int(rest[1])) if what == "killed" else crowd(Path(folder), float(rest[0]), *rest[1:])
    print(json.dumps(report))
