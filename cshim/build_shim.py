"""The cffi recipe of jax_mps._shim.

setup.py names it: setup(cffi_modules=["cshim/build_shim.py:ffibuilder"]). During work:

    python cshim/build_shim.py          # builds jax_mps/_shim.abi3.so in this checkout
"""

import os
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = (
    "api", "bridge", "buffers", "calls", "cells", "client", "errors", "evaluation", "events", "executables", "execute", "imports", "layouts",
    "process", "profiler", "threads",
)  # fmt: skip

# cffi's setuptools hook runs this file as "__cffi__", at the project's root, and setuptools wants
# relative paths; ffibuilder.compile() changes directory and needs absolute ones.
FOLDER = os.path.relpath(HERE).replace(os.sep, "/") if __name__ == "__cffi__" else str(HERE)

CDEF = """
int shim_install(uintptr_t hooks);
int shim_append_capsule(uintptr_t list);
uintptr_t shim_api(void);
int shim_layout(const char* name, int64_t* value);
int shim_value_at(uintptr_t pointer, uintptr_t list);
void shim_counts(int64_t counts[8]);
void shim_lock(void);
void shim_unlock(void);
int shim_release_all(void);
void shim_reacquire(int depth);
void shim_finalize(void);
void shim_forked(void);
int shim_stopping(void);
int shim_evaluates_at_once(void);
int shim_evaluation_must_end(void);
int shim_drain(int milliseconds);
unsigned long shim_interrupts(void);
uintptr_t shim_look_call(void);
int64_t shim_profile_now(void);
void shim_profile_event(const char* name, int64_t start);
void shim_watch_interrupts(int on);
void shim_guard_reads(int everywhere, int guard);
typedef struct { uintptr_t address; int name; int read_only; } shim_cell;
int shim_imports(const char* library, const char* const* names, int count, shim_cell* cells, int most);
int shim_write_cell(const shim_cell* cell, uintptr_t value);
int shim_file_of(uintptr_t address, char* path, int size);
int shim_serve_reads(const char* library);
void shim_serve(const char* data, size_t size);
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source(
    "jax_mps._shim",
    '#include "bridge.h"',
    sources=[f"{FOLDER}/{name}.c" for name in SOURCES],
    depends=[f"{FOLDER}/{name}" for name in ("shim.h", "bridge.h", "pjrt_abi.h", "layout.inc")],
    include_dirs=[FOLDER],
    define_macros=[("Py_LIMITED_API", "0x030B0000")],
    py_limited_api=True,
    extra_compile_args=["-std=gnu11", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
)


def build() -> str:
    """Builds the extension next to the package's sources; returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        built = ffibuilder.compile(tmpdir=folder)
        target = HERE.parent / "jax_mps" / Path(built).name
        partial = target.with_suffix(".partial")
        partial.write_bytes(Path(built).read_bytes())
        partial.chmod(0o755)
        partial.replace(target)  # a process that has the old one mapped keeps it
    return str(target)


if __name__ == "__main__":
    print(build())
