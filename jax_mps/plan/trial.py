"""Whether `mx.compile` repays a hot function on the CPU, found out in a process of its own and never in the program's way.

There MLX runs a C++ compiler for 1-2 s a fused kernel. So a function that has been running for a while is imported by a process of low
priority, which has its kernels made and times it fused and plain. Only where fused wins does this process fuse it: MLX then finds the
kernels on disk.

Run as a program (`python -m jax_mps.plan.trial FOLDER`), this module is that process.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

GAIN = 0.9  # of the plain time, fused must not take more
MOST_BYTES = 1 << 30  # alive at once in a function that is tried
SECONDS = 300  # after which a trial ends without a result
_ROUNDS, _ROUND_SECONDS = 7, 2.0
_SPEC, _FUNCTION, _FOUND = "spec.json", "function.mlxfn", "found.json"

Shapes = Sequence[tuple[tuple[int, ...], str]]

_running: subprocess.Popen[bytes] | None = None  # one at a time; GIL


class Trial:
    """One function's trial: waits for its turn, runs, and has a result."""

    def __init__(self, content: bytes, inputs: Shapes) -> None:
        self._content: bytes | None = content
        self._inputs = [(list(shape), dtype) for shape, dtype in inputs]
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._repays: bool | None = None

    def repays(self) -> bool | None:
        """Whether fused is faster; None: not known yet. Asking moves the trial on."""
        if self._repays is None:
            try:
                self._advance()
            except OSError as error:
                log.info("a function was not tried fused: %s", error)
                self._end(False)
        return self._repays

    def _advance(self) -> None:
        if self._process is None:
            self._start()
        elif self._process.poll() is not None:
            self._end(self._found())

    def _start(self) -> None:
        global _running
        if _running is not None and _running.poll() is None:
            return
        assert self._content is not None
        self._folder = Path(tempfile.mkdtemp(prefix="jax-mps-trial-"))
        (self._folder / _FUNCTION).write_bytes(self._content)
        (self._folder / _SPEC).write_text(json.dumps(self._inputs))
        self._content = None
        code = [sys.executable, "-m", __name__, str(self._folder)]
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = _running = subprocess.Popen(
            code, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        atexit.register(self._end, None)

    def _found(self) -> bool:
        assert self._folder is not None and self._process is not None
        try:
            plain, fused = json.loads((self._folder / _FOUND).read_text())
        except (OSError, ValueError):
            log.info("a function was not tried fused: its process ended with %d", self._process.returncode)
            return False
        log.info("a hot function takes %.3f ms, fused %.3f ms", 1e3 * plain, 1e3 * fused)
        return bool(fused <= GAIN * plain)

    def _end(self, repays: bool | None) -> None:
        self._repays, self._content = repays, None
        atexit.unregister(self._end)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def possible() -> bool:
    """Whether trials make sense: a Python to run them, the compiler that MLX runs, and a folder for its kernels that nobody else can write to."""
    is_python = not getattr(sys, "frozen", False) and "python" in os.path.basename(sys.executable or "")
    return sys.platform == "linux" and is_python and shutil.which("g++") is not None and _is_private(Path(_temporary_folder(), "mlx"))


def _temporary_folder() -> str:
    """The folder for temporary files as C++ finds it."""
    return next((os.environ[name] for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ), "/tmp")


def _is_private(folder: Path) -> bool:
    """Whether a folder is the user's alone to write to, with all that MLX made in it; or is not there yet."""
    try:
        for path in (folder, *folder.glob("*"), *folder.glob("*/*")):
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
                return False
            if found.st_uid != os.getuid() or found.st_mode & 0o022:
                return False
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


# ---- in the process of its own -----------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    """Time the function of a folder plain and fused, in turns; write the least of each, in seconds."""
    import mlx.core as mx
    import numpy as np

    from jax_mps import blas
    from jax_mps.ops.dtypes import MX

    content = (folder / _FUNCTION).read_bytes()
    if blas.is_called_by(content):
        blas.install()
    spec = json.loads((folder / _SPEC).read_text())
    inputs = [mx.array(np.full(shape, _value(dtype), "float32")).astype(MX[dtype]) for shape, dtype in spec]
    mx.eval(inputs)
    function: Any = mx.import_function(str(folder / _FUNCTION))
    mx.eval(function(*inputs))  # its constants are real from here on, as they are in the program
    fused = mx.compile(function)
    least = [float("inf"), float("inf")]
    mx.eval(fused(*inputs))
    end = time.monotonic() + _ROUND_SECONDS
    for _ in range(_ROUNDS):
        for i, call in enumerate((function, fused)):
            start = time.perf_counter()
            mx.eval(call(*inputs))
            least[i] = min(least[i], time.perf_counter() - start)
        if time.monotonic() > end:
            break
    (folder / _FOUND).write_text(json.dumps(least))


def _value(dtype: str) -> float:
    """What an input is full of: no special case of any function, and an index that is in bounds."""
    return 0.5 if dtype.startswith(("float", "bfloat", "complex")) else 0


if __name__ == "__main__":
    os.nice(19)
    signal.alarm(SECONDS)
    main(Path(sys.argv[1]))
