"""Give MLX's Linux CPU wheel a fast BLAS: point libmlx's imports at the OpenBLAS that scipy's wheel carries.

The wheel links netlib's reference BLAS (3-4 GFLOP/s). Nothing is preloaded and nothing enters the global symbol scope: the
24 entries of libmlx's own import table are rewritten, once, after the library was checked. macOS (Accelerate) is left alone.
It waits for the first function that calls it: loading OpenBLAS takes longer than running a small program.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_mps._shim import ffi, lib

__all__ = ["Report", "install", "is_called_by", "report"]

_REAL = ("geev", "geqrf", "gesdd", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")
SYMBOLS = (
    "cblas_sgemm", "cblas_dgemm", "cblas_cgemm",
    *(f"{kind}{name}_" for name in _REAL for kind in "sd"),
    "cgeev_", "cgesdd_", "cheevd_",
)  # fmt: skip

_LIBRARY = b"libmlx.so"
_MOST = 256  # cells of the symbols above; libmlx has one for each
_FAST = ("openblas", "mkl", "blis", "nvpl", "armpl", "accelerate")


# MLX's primitives that call BLAS or LAPACK, as a function file names them.
_CALLERS = (
    b"MM", b"Matmul", b"Convolution", b"Cholesky", b"Eig", b"Inverse", b"LUF", b"QRF", b"SVD",
)  # fmt: skip

# OpenBLAS's threads look for work for so many ticks (a power of two; 25 us) before they sleep. Its default is 2^26: a core is burnt for 25 ms after
# every product, and once when the library is loaded. Asleep, they cost a product some 10 us.
_TIMEOUT = "16"


class Report(NamedTuple):
    """What `install` did: the library in use, the symbols that point to it, and the reason where there are none."""

    library: str | None
    symbols: tuple[str, ...]
    reason: str | None


class _Refused(Exception):
    """Why the BLAS stays as it is."""


_lock = threading.Lock()


def install() -> Report:
    """Patch libmlx once; later calls return the first one's report. Never raises: MLX's own BLAS works, slowly."""
    with _lock:
        return _install()


def report() -> Report:
    """The report of `install`, which is not run by asking."""
    return _install() if _install.cache_info().currsize else Report(None, (), "not installed yet")


def is_called_by(function: bytes) -> bool:
    """Whether a function file may hold a primitive that calls BLAS or LAPACK."""
    return any(name in function for name in _CALLERS)


@functools.cache
def _install() -> Report:
    try:
        if os.environ.get("JAX_MPS_BLAS", "1") == "0":
            raise _Refused("switched off by JAX_MPS_BLAS=0")
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64") or sys.maxsize < 2**32:
            raise _Refused(f"MLX brings its own BLAS on {sys.platform} {platform.machine()}")
        cells, found = _cells()
        library, prefix = _find_library()
        for cell in range(found):
            failure = lib.shim_write_cell(ffi.addressof(cells, cell), _address(library[prefix + SYMBOLS[cells[cell].name]]))
            if failure:
                raise OSError(failure, "libmlx's import table cannot be written")
        return Report(library._name, tuple(sorted({SYMBOLS[cells[cell].name] for cell in range(found)})), None)
    except (_Refused, OSError) as reason:
        return Report(None, (), str(reason))


# The libraries ------------------------------------------------------------------------------------------------------------


def _find_library() -> tuple[ctypes.CDLL, str]:
    """The first usable OpenBLAS and the prefix of its names: scipy's own, then conda's or the distribution's."""
    problems = []
    for path, prefix in _candidates():
        try:
            with _short_waits():
                library = ctypes.CDLL(path)
            _check(library, prefix)
            return library, prefix
        except (_Refused, OSError, AttributeError) as problem:  # AttributeError: a name is missing
            problems.append(f"{os.path.basename(path)}: {problem}")
    raise _Refused("; ".join(problems) or "no OpenBLAS found")


@contextmanager
def _short_waits() -> Iterator[None]:
    """OpenBLAS reads its environment when it is loaded; what the user has set stays."""
    name = "OPENBLAS_THREAD_TIMEOUT"
    if name in os.environ:
        yield
        return
    os.environ[name] = _TIMEOUT
    try:
        yield
    finally:
        del os.environ[name]


def _candidates() -> Iterator[tuple[str, str]]:
    scipy = importlib.util.find_spec("scipy")
    if scipy is not None and scipy.origin is not None:
        bundled = Path(scipy.origin).parent.parent / "scipy.libs"
        yield from ((str(path), "scipy_") for path in sorted(bundled.glob("libscipy_openblas-*.so*")))
    yield os.path.join(sys.prefix, "lib", "libopenblas.so.0"), ""
    yield "libopenblas.so.0", ""


def _check(library: ctypes.CDLL, prefix: str) -> None:
    """Refuse a library that lacks a name, counts in 64-bit integers, or multiplies or factors a 4x4 matrix wrongly."""
    for name in SYMBOLS:
        library[prefix + name]
    a = np.arange(16, dtype=np.float32).reshape(4, 4) % 7 + np.eye(4, dtype=np.float32)
    if not np.allclose(_svdvals(library[prefix + "sgesdd_"], a), np.linalg.svd(a, compute_uv=False), rtol=1e-4):
        raise _Refused("wrong singular values")
    if not np.allclose(_product(library[prefix + "cblas_sgemm"], a, a.T), a @ a.T, rtol=1e-5):
        raise _Refused("wrong product")


def _product(gemm: "ctypes._NamedFuncPointer", a: np.ndarray, b: np.ndarray) -> np.ndarray:
    n = len(a)
    out = np.zeros((n, n), np.float32)
    row_major, no_transpose, size = 101, 111, ctypes.c_int(n)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    gemm.restype = None
    gemm(row_major, no_transpose, no_transpose, size, size, size, one, _pointer(a), size, _pointer(b), size, zero, _pointer(out), size)
    return out


def _svdvals(gesdd: "ctypes._NamedFuncPointer", a: np.ndarray) -> np.ndarray:
    n = len(a)
    a = np.asfortranarray(a)
    values, work, iwork = np.zeros(n, np.float32), np.zeros(1024, np.float32), np.zeros(16 * n, np.int64)
    # Each integer has 8 bytes, so that a 64-bit library reads nothing wild; it shows by what it writes to `info`.
    size, length, info = ctypes.c_int64(n), ctypes.c_int64(work.size), ctypes.c_int64(-1)
    n_ = ctypes.byref(size)
    gesdd.restype = None
    gesdd(b"N", n_, n_, _pointer(a), n_, _pointer(values), _pointer(a), n_, _pointer(a), n_,
          _pointer(work), ctypes.byref(length), _pointer(iwork), ctypes.byref(info), ctypes.c_size_t(1))  # fmt: skip
    if info.value != -(2**32):
        raise _Refused("64-bit integers (ILP64)" if info.value == 0 else "the singular value decomposition failed")
    return values


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _address(function: "ctypes._NamedFuncPointer") -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


# The import table of the loaded libmlx ------------------------------------------------------------------------------------


def _cells() -> tuple[Any, int]:
    """The cells that libmlx calls the symbols through, and how many they are. Refuses when MLX was linked to a fast BLAS already."""
    import mlx.core  # noqa: F401  (loads libmlx)

    names = [ffi.new("char[]", name.encode()) for name in SYMBOLS]
    cells = ffi.new("shim_cell[]", _MOST)
    found = lib.shim_imports(_LIBRARY, ffi.new("char*[]", names), len(names), cells, _MOST)
    if found < 0:
        raise _Refused("libmlx.so is not among the loaded libraries")
    if found == 0:
        raise _Refused("libmlx.so imports no BLAS")
    present = _file_of(ctypes.c_uint64.from_address(cells[0].address).value)
    if any(word in present.lower() for word in _FAST):
        raise _Refused(f"MLX already uses {present}")
    return cells, found


def _file_of(address: int) -> str:
    """The library that a function lies in."""
    path = ffi.new("char[]", 4096)
    return os.path.realpath(os.fsdecode(ffi.string(path))) if lib.shim_file_of(address, path, len(path)) == 0 else ""
