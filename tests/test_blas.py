"""MLX's products and factorisations after libmlx was pointed at scipy's OpenBLAS, against numpy in float64."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
from jax_mps import blas  # noqa: E402  (needs MLX)

linux = pytest.mark.skipif(sys.platform != "linux", reason="MLX uses Accelerate on macOS")
cpu = mx.Device(mx.cpu)

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12, np.complex64: 2e-5}
DTYPES = sorted(TOLERANCE, key=lambda dtype: dtype.__name__)
FACTORED = [np.float32, np.float64]
WIDE = {np.float32: np.float64, np.float64: np.float64, np.complex64: np.complex128}


@pytest.fixture(autouse=True, scope="module")
def patched():
    blas.install()
    with mx.stream(mx.new_thread_unsafe_stream(cpu)):
        yield


def random(dtype, *shape):
    rng = np.random.default_rng(sum(shape))
    values = rng.normal(size=shape)
    return (values + 1j * rng.normal(size=shape) if dtype is np.complex64 else values).astype(dtype)


def device(x):
    return mx.array(x, dtype=mx.float64) if x.dtype == np.float64 else mx.array(x)


def assert_close(got, want, dtype):
    np.testing.assert_allclose(np.array(got), want, atol=TOLERANCE[dtype] * max(1.0, np.abs(want).max()))


def symmetric(dtype, n):
    a = random(dtype, n, n)
    return a @ a.T + n * np.eye(n, dtype=dtype)


@linux
def test_every_symbol_is_patched():
    """All that libmlx imports is patched, from scipy's own wheel here; asking again patches nothing."""
    report = blas.install()
    assert report.reason is None or "already uses" in report.reason, report
    if report.reason is None:
        assert report.symbols == tuple(sorted(blas.SYMBOLS))
        assert Path(report.library or "").exists()
    assert blas.install() is report is blas.report()


@pytest.mark.parametrize("right", ["plain", "transposed"])
@pytest.mark.parametrize("left", ["plain", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_product(dtype, left, right):
    """Both operands as they lie or transposed, without a copy."""
    a, b = random(dtype, 37, 53), random(dtype, 53, 29)
    x = device(a) if left == "plain" else device(np.ascontiguousarray(a.T)).T
    y = device(b) if right == "plain" else device(np.ascontiguousarray(b.T)).T
    assert_close(x @ y, a.astype(WIDE[dtype]) @ b, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_product(dtype):
    """A batch on one side, a transposed batch on the other, and a broadcast one."""
    a, b = random(dtype, 5, 1, 16, 24), random(dtype, 3, 8, 24)
    want = a.astype(WIDE[dtype]) @ b.swapaxes(-1, -2)
    assert_close(device(a) @ device(b).swapaxes(-1, -2), want, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 4, 3), (4, 0, 3), (1, 300, 1), (300, 1, 300)])
def test_product_of_odd_shapes(shape):
    """Empty and thin operands."""
    m, k, n = shape
    a, b = random(np.float32, m, k), random(np.float32, k, n)
    got = device(a) @ device(b)
    assert got.shape == (m, n)
    np.testing.assert_allclose(np.array(got), a.astype(np.float64) @ b, atol=1e-3)


@pytest.mark.parametrize("dtype", FACTORED)
def test_svd(dtype):
    a = random(dtype, 40, 24)
    u, s, vt = mx.linalg.svd(device(a), stream=mx.default_stream(cpu))
    assert_close(s, np.linalg.svd(a.astype(np.float64), compute_uv=False), dtype)
    assert_close(u[:, :24] @ mx.diag(s) @ vt, a, dtype)


@pytest.mark.parametrize("dtype", FACTORED)
def test_cholesky(dtype):
    a = symmetric(dtype, 48)
    assert_close(mx.linalg.cholesky(device(a), stream=mx.default_stream(cpu)), np.linalg.cholesky(a.astype(np.float64)), dtype)


@pytest.mark.parametrize("dtype", FACTORED)
def test_qr(dtype):
    a = random(dtype, 40, 24)
    q, r = mx.linalg.qr(device(a), stream=mx.default_stream(cpu))
    assert_close(q @ r, a, dtype)
    assert_close(q.T @ q, np.eye(24), dtype)


@pytest.mark.parametrize("dtype", FACTORED)
def test_eigh(dtype):
    a = symmetric(dtype, 32)
    values, vectors = mx.linalg.eigh(device(a), stream=mx.default_stream(cpu))
    assert_close(values, np.linalg.eigvalsh(a.astype(np.float64)), dtype)
    assert_close(device(a) @ vectors, np.array(vectors) * np.array(values), dtype)


@pytest.mark.parametrize("dtype", FACTORED)
def test_inverse_and_lu(dtype):
    """getrf, getri and trtri."""
    a = symmetric(dtype, 32)
    stream = mx.default_stream(cpu)
    assert_close(mx.linalg.inv(device(a), stream=stream) @ device(a), np.eye(32), dtype)
    rows, lower, upper = mx.linalg.lu(device(a), stream=stream)
    assert_close((lower @ upper)[rows], a, dtype)
    low = np.tril(a)
    assert_close(mx.linalg.tri_inv(device(low), stream=stream) @ device(low), np.eye(32), dtype)


def test_complex_factorisations():
    """cheevd, cgesdd and cgeev."""
    a = random(np.complex64, 20, 20)
    hermitian = a @ a.conj().T
    stream = mx.default_stream(cpu)
    values, _ = mx.linalg.eigh(mx.array(hermitian), stream=stream)
    assert_close(values, np.linalg.eigvalsh(hermitian.astype(np.complex128)), np.complex64)
    _, s, _ = mx.linalg.svd(mx.array(a), stream=stream)
    assert_close(s, np.linalg.svd(a.astype(np.complex128), compute_uv=False), np.complex64)
    values, _ = mx.linalg.eig(mx.array(a), stream=stream)  # MLX 0.32.4 conjugates the vectors, with any BLAS
    want = np.linalg.eigvals(a.astype(np.complex128))
    assert_close(np.sort_complex(np.array(values)), np.sort_complex(want), np.complex64)


def test_products_on_threads():
    """Four threads at once get right numbers (OpenBLAS has one pool for all)."""
    script = """
import threading, numpy as np, mlx.core as mx
from jax_mps import blas
blas.install()
a = np.random.default_rng(0).normal(size=(200, 200)).astype("f")
bad = []
def run():
    with mx.stream(mx.new_stream(mx.cpu)):
        x = mx.array(a)
        for _ in range(20):
            if abs(np.array(x @ x) - a @ a).max() > 1e-3: bad.append(1)
threads = [threading.Thread(target=run) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
print("bad", len(bad))
"""
    assert run(script) == "bad 0"


@linux
def test_opt_out():
    """JAX_MPS_BLAS=0 leaves libmlx alone and says so."""
    script = "from jax_mps import blas; print(blas.install().symbols, blas.report().reason)"
    assert run(script, JAX_MPS_BLAS="0") == "() switched off by JAX_MPS_BLAS=0"


@linux
def test_a_bad_library_is_refused():
    """A library that multiplies wrongly or counts in 64 bits is passed over, and the reason is kept."""
    script = """
from jax_mps import blas
blas._candidates = lambda: iter([("libc.so.6", ""), ("/nonexistent.so", "")])
report = blas.install()
assert not report.symbols, report
assert "cblas_sgemm" in report.reason and "nonexistent" in report.reason, report
import mlx.core as mx
x = mx.ones((4, 4))
print((x @ x).sum().item())
"""
    assert run(script) == "64.0"


@linux
def test_a_64_bit_library_is_refused():
    """numpy's wheel carries an ILP64 OpenBLAS: it is told from an LP64 one by what it writes, not by its name."""
    script = """
import ctypes, pathlib, numpy as np
from jax_mps import blas
found = sorted((pathlib.Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas64_*"))
if not found:
    print("absent")
else:
    library = ctypes.CDLL(str(found[0]))
    try:
        blas._svdvals(library["scipy_sgesdd_64_"], np.eye(4, dtype="f"))
    except blas._Refused as reason:
        print(reason)
"""
    assert run(script) in ("64-bit integers (ILP64)", "absent")


def run(script, **environment):
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
