"""Importing a function file: its fields from memory where the system allows it, its constants from the file."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
from jax_mps import blas, runtime  # noqa: E402  (needs MLX)
from jax_mps.plan.program import _serves, import_function  # noqa: E402

pytestmark = pytest.mark.device

X = np.linspace(-1, 1, 300, dtype=np.float32)
TABLE = np.arange(300, dtype=np.float32)  # longer than what is read at once, so it stays in the file until the first run


def exported(folder: Path) -> Path:
    with runtime.locked():
        weights = mx.array(TABLE)
        mx.eval(weights)
        path = folder / "f.mlxfn"
        mx.export_function(str(path), lambda x: [mx.sin(x) * 2 + weights], mx.zeros(300))
    return path


def check(function: object) -> None:
    with runtime.locked():
        (result,) = function(mx.array(X))  # type: ignore[operator]
    runtime.evaluate([result])
    np.testing.assert_allclose(np.array(result), np.sin(X) * 2 + TABLE, rtol=1e-5)


def test_import(tmp_path: Path) -> None:
    """The function is right, its constant included, whose file has lost its name by then; and so is one from four threads at once."""
    path = exported(tmp_path)
    functions = [import_function(path, path.read_bytes())]
    threads = [threading.Thread(target=lambda: functions.append(import_function(path, path.read_bytes()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path.unlink()
    for function in functions:
        check(function)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only ELF has import tables that can be written")
def test_fields_are_read_from_memory(tmp_path: Path) -> None:
    """On Linux: a file of noise is never looked at, and after the import MLX reads files as ever, also where nothing is served."""
    path = exported(tmp_path)
    content = path.read_bytes()
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(len(content)))
    assert _serves()
    import_function(noise, content)
    with runtime.locked():
        check(mx.import_function(os.fspath(path)))


def test_damage_is_raised(tmp_path: Path) -> None:
    """A function that ends too early, though it says otherwise."""
    path = exported(tmp_path)
    content = path.read_bytes()
    with pytest.raises((RuntimeError, ValueError, MemoryError)):
        import_function(path, content[:50])
    check(import_function(path, content))


@pytest.mark.parametrize(("name", "called"), [("sin", False), ("matmul", True), ("conv1d", True), ("addmm", True)])
def test_who_calls_blas(tmp_path: Path, name: str, called: bool) -> None:
    """Products and convolutions do, and are known by their functions' files."""
    square, long = mx.zeros((4, 4)), mx.zeros((1, 8, 4))
    arguments = {"sin": (square,), "matmul": (square, square), "conv1d": (long, mx.zeros((2, 3, 4))), "addmm": (square,) * 3}[name]
    path = tmp_path / "f.mlxfn"
    with runtime.locked():
        mx.export_function(str(path), lambda *a: [getattr(mx, name)(*a)], *arguments)
    assert blas.is_called_by(path.read_bytes()) == called


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere MLX brings its own BLAS")
def test_blas_waits_for_a_product() -> None:
    """A program without one leaves OpenBLAS alone; the first with one loads it, and what is left of the environment is the user's."""
    code = """
import os, jax, numpy as np
from jax_mps import blas
x = np.ones((4, 4), "float32")
jax.block_until_ready(jax.jit(lambda a: a + 1)(x))
print(blas.report().reason)
jax.block_until_ready(jax.jit(lambda a: a @ a)(x))
print(blas.report().reason, os.environ.get("OPENBLAS_THREAD_TIMEOUT"))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "mps", "JAX_MPS_CACHE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["not installed yet", "None None"]
