"""Many processes, killed ones and corrupt files: no crash, no wrong bytes, nothing lost that was complete."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import cached_programs as programs
import pytest

from jax_mps.cache import Damaged, Store

HERE = Path(__file__).parent
ROOT = Path(sys.modules["jax_mps.cache"].__file__ or "").parents[2]


def run(*arguments: object) -> dict[str, Any]:
    """Run faults.py in its own process; its report."""
    path = os.pathsep.join([str(ROOT), str(HERE.parent)])
    command = [sys.executable, str(HERE / "faults.py"), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report | {"said": done.stderr.count("Error")} | ({"stderr": done.stderr[-500:]} if report.get("failed") else {})


def check_kills(folder: Path, kills: int) -> None:
    """Kill that many writers."""
    report = run("killed", folder, kills, 0)
    assert report["complete"] > min(kills, 30) // 3, report  # that enough was written to be lost; a busy machine writes less before it is killed
    wrong = {name: report[name] for name in ("lost", "wrong", "problems", "unstored", "said")}
    assert set(wrong.values()) == {0}, report


@pytest.mark.alone  # a busy machine writes too little before it is killed
def test_killed_writers(folder: Path) -> None:
    """SIGKILL leaves at most a temporary file."""
    check_kills(folder, 60)


@pytest.mark.campaign
def test_thousand_killed_writers(folder: Path) -> None:
    """The same, a thousand times."""
    check_kills(folder, 1000)


CROWDS = {
    "same keys": ["write"] * 4,
    "a small cap": ["use"] * 4,
    "eviction": ["use", "use", "evict"],
    "clear": ["use", "use", "clear"],
    "two clears": ["write", "clear", "clear", "evict"],
}


@pytest.mark.parametrize("roles", CROWDS.values(), ids=CROWDS)
def test_crowds(folder: Path, roles: list[str]) -> None:
    """Processes that write, read, evict and clear one folder at once."""
    allowed_to_fail = "clear" in roles and "write" in roles  # a put that is cleared twice in its middle is dropped
    report = run("crowd", folder, 1.5, *roles)
    assert (report["problems"], report["unstored"]) == (0, 0), report
    assert report["failed"] == 0 or allowed_to_fail, report


@pytest.mark.campaign
def test_a_great_crowd(folder: Path) -> None:
    """Sixteen processes on the same keys, with eviction and clear among them."""
    report = run("crowd", folder, 60, *["use"] * 14, "evict", "clear")
    assert set(report.values()) == {0}, report


def corrupt(path: Path, others: list[Path], chance: random.Random) -> None:
    """One random fault: bits, bytes, a cut, a swap with another file, or its disappearance."""
    data = bytearray(path.read_bytes())
    place = chance.randrange(len(data) + 1)
    match chance.randrange(6):
        case 0 if place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        case 1:
            data[place : place + 8] = chance.randbytes(8)
        case 2:
            del data[place:]
        case 3:
            data[place:place] = chance.randbytes(chance.randrange(1, 100))
        case 4:
            data = bytearray(chance.choice(others).read_bytes())
        case _:
            path.unlink()
            return
    path.write_bytes(data)


def check_corruptions(folder: Path, rounds: int, seed: int) -> None:
    """Corrupt random files; every program is right or missing, and can be stored again."""
    chance, count = random.Random(seed), 12
    for _ in range(rounds):
        store = Store(folder)
        for number in range(count):
            assert programs.put(store, number)
        paths = sorted(path for path in (folder / "1").rglob("*") if path.is_file() and len(path.name) == 64)
        for path in chance.sample(paths, 4):
            corrupt(path, [p for p in paths if p.exists()], chance)
        for number in range(count):
            check_right_or_missing(Store(folder), number)


def check_right_or_missing(store: Store, number: int) -> None:
    """Nothing between the two."""
    entry = programs.get(store, number)
    try:
        assert entry is None or programs.is_right(entry, number)
    except Damaged:
        assert programs.constants(number)


def test_corruptions(folder: Path) -> None:
    """100 faults."""
    check_corruptions(folder, 25, seed=0)


@pytest.mark.campaign
def test_a_thousand_corruptions(folder: Path) -> None:
    """1,000 faults."""
    check_corruptions(folder, 250, seed=1)
