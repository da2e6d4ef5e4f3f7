"""The background writer: everything gets written, nothing raises, the end is bounded."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jax_mps.cache import Writer

ROOT = Path(sys.modules["jax_mps.cache"].__file__ or "").parents[2]


@pytest.fixture
def writer() -> Writer:
    """A writer that the tests flush themselves."""
    return Writer(at_exit=None)


def test_everything_is_written_in_order(writer: Writer) -> None:
    """Also what is submitted from several threads, and again after a flush."""
    done: list[int] = []
    for number in range(100):
        assert writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert writer.flush(10)
    assert done == list(range(100))
    threads = [threading.Thread(target=lambda: writer.submit(lambda: done.append(-1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush(10)
    assert len(done) == 108


@pytest.mark.alone
def test_submitting_does_not_wait(writer: Writer) -> None:
    """The first write starts after the program's own first run."""
    started = time.perf_counter()
    writer.submit(lambda: time.sleep(0.2))
    assert time.perf_counter() - started < 0.1
    assert writer.flush(10)


def test_a_failing_write_is_logged_once_and_the_next_is_done(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing reaches the caller."""
    done: list[int] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            writer.submit(lambda: 1 // 0)
        writer.submit(lambda: done.append(1))
        assert writer.flush(10)
    assert done == [1]
    assert len(caplog.records) == 1


def test_a_long_queue_drops(caplog: pytest.LogCaptureFixture) -> None:
    """And says so once."""
    gate, writer = threading.Event(), Writer(longest=5, at_exit=None)
    with caplog.at_level(logging.WARNING):
        accepted = [writer.submit(gate.wait) for _ in range(20)]
    assert accepted.count(True) in {5, 6}
    assert writer.dropped == accepted.count(False)
    assert len(caplog.records) == 1
    gate.set()
    assert writer.flush(10)


def test_flush_is_bounded(writer: Writer) -> None:
    """A disk that hangs does not hang the program's end."""
    gate = threading.Event()
    writer.submit(gate.wait)
    started = time.perf_counter()
    assert not writer.flush(0.2)
    assert time.perf_counter() - started < 2
    gate.set()
    assert writer.flush(10)


def test_flush_of_nothing_is_free(writer: Writer) -> None:
    """No thread is made for it."""
    assert writer.flush(0)
    assert writer._thread is None


def run(code: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python code in another process."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, timeout=60)


EXITS = {
    "end": ("", b"written\n"),
    "sys.exit": ("sys.exit(0)", b"written\n"),
    "exception": ("raise SystemExit(0)", b"written\n"),
    "os._exit": ("os._exit(0)", b""),
    "slow disk": ("w.submit(lambda: time.sleep(60))", b"written\n"),
    "forked child": ("os.fork() or sys.exit(0); os.wait()", b"written\n"),
}


@pytest.mark.parametrize(("end", "output"), EXITS.values(), ids=EXITS)
def test_the_end_of_the_process(end: str, output: bytes) -> None:
    """What was submitted is written when Python ends, in a bounded time, and once."""
    started = time.perf_counter()
    result = run(f"import os, sys, time; from jax_mps.cache import Writer; w = Writer(at_exit=1.0); w.submit(lambda: os.write(1, b'written\\n')); {end}")
    assert (result.returncode, result.stdout, result.stderr) == (0, output, b"")
    assert time.perf_counter() - started < 20


def test_a_fork_has_no_writer(writer: Writer) -> None:
    """The child drops what it is given and does not wait for a thread that it lacks."""
    code = """
import os, time
from jax_mps.cache import Writer
w = Writer(at_exit=30.0)
w.submit(lambda: None)
pid = os.fork()
if not pid:
    assert not w.submit(lambda: os.write(1, b"child"))
    raise SystemExit(0 if w.flush(30) else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    started = time.perf_counter()
    result = run(code)
    assert (result.returncode, result.stdout) == (0, b""), result
    assert time.perf_counter() - started < 20
