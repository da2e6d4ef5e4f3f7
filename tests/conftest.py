"""All tests run with mps as JAX's platform and a cache folder of their own, in one process or several (pytest-xdist)."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before jax is imported by any test module: both platforms, so that XLA's CPU backend is the reference.
os.environ["JAX_PLATFORMS"] = "mps,cpu"
if "JAX_MPS_CACHE_DIR" not in os.environ:
    os.environ["JAX_MPS_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-mps-test-")
SHARED = Path(os.environ["JAX_MPS_CACHE_DIR"])
if WORKER := os.environ.get("PYTEST_XDIST_WORKER"):
    SHARED.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_MPS_CACHE_DIR"] = str(SHARED / WORKER)  # a test counts what is translated: another process would have done it
os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on CUDA, float32 products are TF32 by default: too coarse for the tables

# A shell's background job ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that is marked `alone` waits for those of the run's other processes to end, and they wait for it."""
    if not WORKER:
        return (yield)
    with (SHARED / "turn").open("w") as turn, (SHARED / "running").open("w") as running:
        fcntl.flock(turn, fcntl.LOCK_EX)  # held while waiting: nobody starts another test before this one
        fcntl.flock(running, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # closing would not do where a forked process holds it, too


@pytest.fixture(autouse=True, scope="module")
def _forget() -> Iterator[None]:
    """What JAX compiled for a module's tests goes with them: with thousands of programs kept, all that MLIR does takes half as long again."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
