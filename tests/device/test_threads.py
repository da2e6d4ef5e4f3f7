"""Eight threads compile and run at once."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device.programs import run

STRESS = """
import threading
THREADS, PROGRAMS = {threads}, {programs}
wrong = []

def work(t):
    x = np.linspace(0, 1, 16, dtype="float32")
    for p in range(PROGRAMS):
        n = (t * 31 + p) % 97 + 1
        f = jax.jit(lambda x, n=n, p=p: (jnp.sin(x * n) + p, (x * n).sum(), lax.fori_loop(0, 600, lambda i, c: c * 0.5 + n, x)))
        a, b, c = f(x)
        d = a + b
        want = np.sin(x * np.float32(n)) + p + (x * np.float32(n)).sum()
        if not np.allclose(np.asarray(d), want, rtol=1e-4, atol=1e-4) or not np.allclose(np.asarray(c), 2 * n, rtol=1e-4):
            wrong.append((t, p))

threads = [threading.Thread(target=work, args=(t,)) for t in range(THREADS)]
for t in threads: t.start()
for t in threads: t.join()
report(wrong=wrong)
"""


def test_threads_compile_and_run(tmp_path: Path) -> None:
    """Right numbers and no crash, cold and from disk."""
    for _ in range(2):
        assert run(STRESS.format(threads=8, programs=8), tmp_path, timeout=280).report["wrong"] == []


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_threads_at_length(tmp_path: Path) -> None:
    """The issue's figure: 8 threads, 100 programs each, 20 repeats."""
    for _ in range(20):
        assert run(STRESS.format(threads=8, programs=100), tmp_path, timeout=600).report["wrong"] == []


def test_threads_share_arrays() -> None:
    """Many threads evaluate and read the same lazy array."""
    x = jnp.arange(64.0)
    for _ in range(20):
        y = jnp.sin(x) * 2
        found: list[np.ndarray] = []
        threads = [threading.Thread(target=lambda y=y, found=found: found.append(np.asarray(y + 1))) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(found) == 8
        for f in found:
            np.testing.assert_allclose(f, np.sin(np.arange(64.0)) * 2 + 1, rtol=1e-5, atol=1e-6)
    assert jax.devices()[0].platform == "mps"
