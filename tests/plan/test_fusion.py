"""Compiled functions: what MLX fuses is counted, and one that no kernel could hold runs as it is."""

from __future__ import annotations

import io
import math
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from jax_mps import runtime
from jax_mps.counters import stats
from jax_mps.plan import fusion


def chain(*xs: mx.array) -> list[mx.array]:
    """Results that each come from the one before: MLX fuses several into one kernel, which has all of them as outputs."""
    results, last = [], xs[0]
    for x in xs:
        last = mx.sin(last) + x
        results.append(last)
    return results


def is_fused(results: list[mx.array]) -> bool:
    text = io.StringIO()
    mx.export_to_dot(text, *results)
    return "Compiled" in text.getvalue()


with runtime.locked():  # on our streams, which have to be the first of the process
    ARRAYS = [mx.arange(4.0) + i for i in range(12)]


def test_kernels_are_counted() -> None:
    with runtime.locked():
        assert fusion.widest_kernel(mx.compile(lambda x, y: mx.sin(x) * y), ARRAYS[:2]) == 3
        assert fusion.widest_kernel(mx.compile(lambda x: [mx.sum(x)]), ARRAYS[:1]) == 0
        assert fusion.widest_kernel(mx.compile(chain), ARRAYS) > 8


@pytest.mark.parametrize(("most", "fused"), [(27, True), (8, False)])
def test_what_no_kernel_holds_is_not_fused(monkeypatch: pytest.MonkeyPatch, most: int, fused: bool) -> None:
    monkeypatch.setitem(fusion._MOST_BUFFERS, runtime.device_kind(), most)
    before = stats()["compiles_refused"]
    with runtime.locked():
        function = fusion.compiled(chain)
        function(*ARRAYS)  # which evaluates what it returns
        assert is_fused(function(*ARRAYS)) == fused
    assert stats()["compiles_refused"] == before + (not fused)


PROGRAM = """
import numpy as np, jax, jax.numpy as jnp
from jax import lax
import jax_mps
import jax_mps.plan.fusion as fusion
fusion._MOST_BUFFERS["cpu"] = 6
said = []
fusion.log.debug = lambda text, *a: said.append(text % a)

def run(xs):
    def body(i, c):
        new, last = [], c[0]
        for x in c:
            last = 0.5 * jnp.sin(last) + 0.5 * x
            new.append(last)
        return tuple(new)
    return lax.fori_loop(0, 300, body, xs)

f = jax.jit(run)
xs = tuple(np.float32(i) / 9 for i in range(8))
for _ in range(2):
    got = jax.block_until_ready(f(xs))
want = jax.jit(run, backend="cpu")(xs)
np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-4)  # 300 sines of rounding
assert any("more than 6 inputs and outputs" in text for text in said), said
assert jax_mps.stats()["compiles_refused"]
"""


def test_a_loop_of_many_carries() -> None:
    """Through the plugin, with Metal's limit made small and asked for on the CPU."""
    environment = {**os.environ, "JAX_PLATFORMS": "mps,cpu", "JAX_MPS_CACHE": "0", "JAX_MPS_COMPILE": "1", "JAX_MPS_HOST": "needed"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("held", [1 << 28, 0])
def test_kernels_that_cannot_be_made(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function runs as it is, where its inputs are small enough for that to be found out."""
    monkeypatch.setattr(fusion, "_HELD", held)
    constant = mx.array(complex(math.nan, 1))  # MLX 0.32.4 writes it into the source as no compiler reads it
    call = fusion.compiled(lambda x: mx.where(mx.isnan(x), constant, x) * 2 + x)
    x = mx.array([1, 2], mx.complex64)
    if not held and shutil.which("g++"):
        with pytest.raises(RuntimeError, match="compile"):
            mx.eval(call(x))
        return
    for _ in range(2):
        assert call(x).tolist() == [3, 6]
