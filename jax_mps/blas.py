"""Give MLX's Linux CPU wheel a fast BLAS: point libmlx's imports at the OpenBLAS that scipy's wheel carries.

The wheel links netlib's reference BLAS (3-4 GFLOP/s). Nothing is preloaded and nothing enters the global symbol scope: the
24 entries of libmlx's own import table are rewritten, once, after the library was checked. macOS (Accelerate) is left alone.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["Report", "install", "report"]

_REAL = ("geev", "geqrf", "gesdd", "getrf", "getri", "orgqr", "potrf", "syevd", "trtri")
SYMBOLS = (
    "cblas_sgemm", "cblas_dgemm", "cblas_cgemm",
    *(f"{kind}{name}_" for name in _REAL for kind in "sd"),
    "cgeev_", "cgesdd_", "cheevd_",
)  # fmt: skip

# R_*_GLOB_DAT and R_*_JUMP_SLOT of the ELF supplements.
_SLOT_RELOCATIONS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}
_FAST = ("openblas", "mkl", "blis", "nvpl", "armpl", "accelerate")


@dataclass(frozen=True, slots=True)
class Report:
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


@functools.cache
def _install() -> Report:
    try:
        if os.environ.get("JAX_MPS_BLAS", "1") == "0":
            raise _Refused("switched off by JAX_MPS_BLAS=0")
        if sys.platform != "linux" or platform.machine() not in _SLOT_RELOCATIONS or sys.maxsize < 2**32:
            raise _Refused(f"MLX brings its own BLAS on {sys.platform} {platform.machine()}")
        slots = _slots(_loaded_mlx())
        library, prefix = _find_library()
        _write(slots, {name: _address(library[prefix + name]) for name in slots})
        return Report(library._name, tuple(sorted(slots)), None)
    except (_Refused, OSError) as reason:
        return Report(None, (), str(reason))


# The libraries ------------------------------------------------------------------------------------------------------------


def _find_library() -> tuple[ctypes.CDLL, str]:
    """The first usable OpenBLAS and the prefix of its names: scipy's own, then conda's or the distribution's."""
    problems = []
    for path, prefix in _candidates():
        try:
            library = ctypes.CDLL(path)
            _check(library, prefix)
            return library, prefix
        except (_Refused, OSError, AttributeError) as problem:  # AttributeError: a name is missing
            problems.append(f"{os.path.basename(path)}: {problem}")
    raise _Refused("; ".join(problems) or "no OpenBLAS found")


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


class _Header(ctypes.Structure):  # Elf64_Phdr
    _fields_ = [
        ("type", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("offset", ctypes.c_uint64), ("vaddr", ctypes.c_uint64),
        ("paddr", ctypes.c_uint64), ("filesz", ctypes.c_uint64), ("memsz", ctypes.c_uint64), ("align", ctypes.c_uint64),
    ]  # fmt: skip


class _Object(ctypes.Structure):  # dl_phdr_info, its first fields
    _fields_ = [("base", ctypes.c_uint64), ("name", ctypes.c_char_p), ("headers", ctypes.POINTER(_Header)), ("count", ctypes.c_uint16)]


_VISITOR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Object), ctypes.c_size_t, ctypes.c_void_p)


class _Dynamic(ctypes.Structure):  # Elf64_Dyn
    _fields_ = [("tag", ctypes.c_int64), ("value", ctypes.c_uint64)]


class _Relocation(ctypes.Structure):  # Elf64_Rela
    _fields_ = [("offset", ctypes.c_uint64), ("type", ctypes.c_uint32), ("symbol", ctypes.c_uint32), ("addend", ctypes.c_int64)]


class _Symbol(ctypes.Structure):  # Elf64_Sym
    _fields_ = [
        ("name", ctypes.c_uint32), ("info", ctypes.c_uint8), ("other", ctypes.c_uint8), ("section", ctypes.c_uint16),
        ("value", ctypes.c_uint64), ("size", ctypes.c_uint64),
    ]  # fmt: skip


class _Place(ctypes.Structure):  # Dl_info
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("name", ctypes.c_char_p), ("address", ctypes.c_void_p)]


_PT_DYNAMIC, _PT_GNU_RELRO = 2, 0x6474E552
_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23


@dataclass(frozen=True, slots=True)
class _Image:
    """A loaded library: where it lies, its dynamic section, and the address range the loader made read-only."""

    base: int
    dynamic: dict[int, int]
    relro: range

    def at(self, tag: int) -> int:
        """The address in an entry; glibc has made it absolute, other loaders leave it relative."""
        value = self.dynamic.get(tag, 0)
        return value if value >= self.base else self.base + value


def _loaded_mlx() -> _Image:
    import mlx.core  # noqa: F401  (loads libmlx)

    found: list[_Image] = []

    def visit(pointer: "ctypes._Pointer[_Object]", _size: int, _data: int | None) -> int:
        loaded = pointer.contents
        if os.path.basename(loaded.name or b"") == b"libmlx.so":
            found.append(_image(loaded))
        return len(found)

    ctypes.CDLL(None).dl_iterate_phdr(_VISITOR(visit), None)
    if not found:
        raise _Refused("libmlx.so is not among the loaded libraries")
    return found[0]


def _image(loaded: _Object) -> _Image:
    headers = {header.type: header for header in loaded.headers[: loaded.count]}
    entry, dynamic = loaded.base + headers[_PT_DYNAMIC].vaddr, {}
    while (item := _Dynamic.from_address(entry)).tag:
        dynamic[item.tag] = item.value
        entry += ctypes.sizeof(_Dynamic)
    relro = headers.get(_PT_GNU_RELRO)
    start = loaded.base + relro.vaddr if relro else 0
    return _Image(loaded.base, dynamic, range(_page(start), _page(start + relro.memsz)) if relro else range(0))


def _page(address: int) -> int:
    return address & -os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True, slots=True)
class _Slot:
    """An eight-byte cell that libmlx calls a function through."""

    address: int
    read_only: bool


def _slots(image: _Image) -> dict[str, list[_Slot]]:
    """The cells of each BLAS symbol. Refuses when MLX was linked to a fast BLAS already."""
    slots: dict[str, list[_Slot]] = {}
    for relocation in _relocations(image):
        name = _symbol_name(image, relocation.symbol)
        if name in SYMBOLS:
            address = image.base + relocation.offset
            slots.setdefault(name, []).append(_Slot(address, address in image.relro))
    if not slots:
        raise _Refused("libmlx.so imports no BLAS")
    present = _file_of(ctypes.c_uint64.from_address(next(iter(slots.values()))[0].address).value)
    if any(word in present.lower() for word in _FAST):
        raise _Refused(f"MLX already uses {present}")
    return slots


def _relocations(image: _Image) -> Iterator[_Relocation]:
    wanted = _SLOT_RELOCATIONS[platform.machine()]
    for table, size in ((_DT_JMPREL, _DT_PLTRELSZ), (_DT_RELA, _DT_RELASZ)):
        count = image.dynamic.get(size, 0) // ctypes.sizeof(_Relocation)
        entries = (_Relocation * count).from_address(image.at(table)) if count else ()
        yield from (entry for entry in entries if entry.type in wanted)


def _symbol_name(image: _Image, index: int) -> str:
    symbol = _Symbol.from_address(image.at(_DT_SYMTAB) + index * ctypes.sizeof(_Symbol))
    return ctypes.string_at(image.at(_DT_STRTAB) + symbol.name).decode()


def _file_of(address: int) -> str:
    place = _Place()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(place))
    return os.path.realpath(os.fsdecode(place.file or b""))


def _write(slots: dict[str, list[_Slot]], addresses: dict[str, int]) -> None:
    """Store the new addresses; pages the loader made read-only after relocation are opened for the store only."""
    for name, cells in slots.items():
        for cell in cells:
            if cell.read_only:
                _protect(cell.address, writable=True)
            ctypes.c_uint64.from_address(cell.address).value = addresses[name]  # aligned: other threads see old or new
            if cell.read_only:
                _protect(cell.address, writable=False)


def _protect(address: int, *, writable: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    read, write = 1, 2
    size = ctypes.c_size_t(os.sysconf("SC_PAGESIZE"))
    if libc.mprotect(ctypes.c_void_p(_page(address)), size, read | write if writable else read):
        raise OSError(ctypes.get_errno(), "mprotect refused to open libmlx's import table")
