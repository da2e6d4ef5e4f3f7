"""MLX as this process uses it: the device, its one thread-unsafe stream, and the lock around everything that evaluates or reads.

Imported before any other MLX work of ours: an imported function binds to the first stream ever made on its device (MLX.md, D).
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from jax_mps import allocator
from jax_mps._shim import lib
from jax_mps.cache import paths
from jax_mps.config import settings
from jax_mps.errors import OutOfMemory

log = logging.getLogger(__name__)

MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]  # its stub forgets it


class Device(NamedTuple):
    """MLX's device and the streams that all our work runs on.

    beside: on a GPU, our CPU stream, where an imported function reads its constants (on a thread's own one, no other thread could use them).
    first: whether ours are the first streams of the process; if the user's own MLX work came before, imported functions would bind to
    the user's stream, so programs are translated anew in this process.
    """

    mlx: mx.Device
    kind: str  # "cpu", "cuda" or "metal"
    architecture: str
    stream: Any
    beside: Any
    first: bool


# How many Mi elements the kernels of one CUDA graph read, at most (MLX's own: 1000). MLX builds a graph anew, and waits for its end, where one of its
# products or convolutions runs in clusters of blocks; what is in a graph without one is only updated. Small graphs free what they read sooner, too.
_GRAPH_MILLIONS = "15"


def has_clusters(architecture: str) -> bool:
    """Whether an NVIDIA GPU ("sm_90a") runs blocks in clusters: from Hopper on."""
    found = re.search(r"\d+", architecture)
    return found is not None and int(found[0]) >= 90


@functools.cache
def device() -> Device:
    """The process's device, made at first use."""
    chosen = settings().device
    mlx = mx.default_device() if chosen == "auto" else mx.Device(mx.cpu if chosen == "cpu" else mx.gpu)
    kind = "cpu" if mlx.type == mx.cpu else ("metal" if mx.metal.is_available() else "cuda")
    architecture = _architecture(mlx, kind)
    # MLX reads these once, at its first product and its first compilation. On CUDA, JAX's default precision means TF32; elsewhere float32.
    os.environ.setdefault("MLX_ENABLE_TF32", "1" if kind == "cuda" else "0")
    if kind == "cuda":
        os.environ.setdefault("MLX_PTX_CACHE_DIR", _kernel_folder(architecture))
        if has_clusters(architecture):
            os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", _GRAPH_MILLIONS)
    if kind != "metal":
        allocator.keep_blocks(one_heap=kind == "cpu")
    stream = mx.new_thread_unsafe_stream(mlx)
    beside = None if kind == "cpu" else mx.new_thread_unsafe_stream(mx.Device(mx.cpu))
    return Device(mlx, kind, architecture, stream, beside, first=_index(stream) == 0)


def _kernel_folder(architecture: str) -> str:
    """Where MLX keeps the CUDA kernels that it compiles: private, since it runs what it finds; its files do not name the architecture."""
    folder = None if paths.turned_off() else paths.cache_folder()
    if folder is not None and paths.prepare(folder) is None:
        kernels = folder / f"{paths.KERNELS}{MLX_VERSION}-{architecture.replace('/', '-')}"
        try:
            kernels.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            log.info("CUDA kernels are not kept on disk: %s", error)
        else:
            return str(kernels)
    temporary = tempfile.mkdtemp(prefix="jax-mps-kernels-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _index(stream: Any) -> int:
    return int(repr(stream).rsplit(", ", 1)[1].rstrip(")"))  # MLX 0.32 shows the index nowhere else: Stream(Device(cpu, 0), 3)


def _architecture(mlx: mx.Device, kind: str) -> str:
    if kind == "cpu":
        import platform

        return platform.machine()
    return str(mx.device_info(mlx).get("architecture", "unknown"))


def device_kind() -> str:
    """ "cpu", "cuda" or "metal"."""
    return device().kind


class our_streams:  # a context manager; a generator would cost 2 us more, in every small copy
    """Our streams as MLX's defaults on this thread."""

    __slots__ = ("_scopes",)

    def __enter__(self) -> None:
        where = device()
        self._scopes = [mx.stream(s) for s in (where.beside, where.stream) if s is not None]
        for scope in self._scopes:
            scope.__enter__()

    def __exit__(self, *failure: Any) -> None:
        for scope in reversed(self._scopes):
            scope.__exit__(*failure)


class locked(our_streams):
    """Hold the process-wide lock, with our streams as MLX's defaults."""

    __slots__ = ()

    def __enter__(self) -> None:
        lib.shim_lock()
        try:
            super().__enter__()
        except BaseException:
            lib.shim_unlock()
            raise

    def __exit__(self, *failure: Any) -> None:
        try:
            super().__exit__(*failure)
        finally:
            lib.shim_unlock()


@contextmanager
def released() -> Iterator[None]:
    """Let go of the lock around a user's code, whatever its depth: it may dispatch, compile and wait (PJRT.md, 3)."""
    depth = lib.shim_release_all()
    try:
        yield
    finally:
        lib.shim_reacquire(depth)


def waits() -> dict[str, Any]:
    """What C evaluates and waits with: MLX's own functions, since no Python code must run there (cshim/README.md).

    On a GPU the wait is for an array of its own that is evaluated with the values: those, others may use meanwhile.
    """
    where = device()
    started = {"evaluate_now": mx.eval, "start": mx.async_eval}
    if where.kind == "cpu":
        return {**started, "synchronize": functools.partial(mx.synchronize, where.stream)}
    scope = functools.partial(mx.stream, where.stream)
    gpu = {"synchronize": mx.eval, "scope": scope, "sentinel": functools.partial(mx.depends, _nothing())}
    return {**started, **gpu, "first_to_the_end": reads_beside()}


def reads_beside() -> bool:
    """Whether an imported function's first results must be evaluated to the end: where it reads its constants on another stream, and MLX may
    have the GPU wait for that in the next evaluation, if the first was only started. Such a wait can last for ever (CUDA, MLX 0.32.4)."""
    return device().kind == "cuda"


@functools.cache
def _nothing() -> mx.array:
    with locked():
        nothing = mx.zeros((1,), mx.uint8)
        mx.eval(nothing)
    return nothing


def evaluate(values: Sequence[mx.array]) -> None:
    """Block until the arrays are evaluated; the lock is held while evaluation is scheduled, not while it runs.

    Raises:
        RuntimeError: what MLX says of a primitive that failed. The arrays must not be read after that.
    """
    if lib.shim_evaluates_at_once():  # little is under way: a trip to MLX's thread would take longer
        lib.shim_lock()
        try:
            mx.eval(*values)
        finally:
            lib.shim_unlock()
        return
    if device().kind == "cpu":
        start(values)
        wait()
        return
    with locked():
        last = sentinel()
        start([*values, last])
    mx.eval(last)


def sentinel() -> mx.array:
    """An array of its own to wait for, on a GPU: what is evaluated with it is there when it is."""
    with locked():
        made: mx.array = mx.depends(_nothing(), [])
    return made


def wait() -> None:
    """Block until what was started is evaluated, without the lock; on a GPU, whose stream only one thread may touch, return at once."""
    where = device()
    if where.kind == "cpu":
        mx.synchronize(where.stream)


def start(values: Sequence[mx.array]) -> None:
    """Start evaluating the arrays."""
    lib.shim_lock()
    try:
        (mx.eval if lib.shim_evaluation_must_end() else mx.async_eval)(*values)
    finally:
        lib.shim_unlock()


def require_memory(nbytes: int) -> None:
    """Refuse what cannot fit: MLX's CPU allocator does not check, and the process would die.

    Raises:
        OutOfMemory: fewer bytes are available than the program holds at once.
    """
    if nbytes < (256 << 20):
        return
    available = available_memory()
    if available is not None and nbytes > available:
        raise OutOfMemory(f"the program needs {nbytes / 2**30:.1f} GiB at once, {available / 2**30:.1f} GiB are available on {device_kind()}")


def available_memory() -> int | None:
    """Bytes that can be allocated now; None where nothing tells."""
    if device_kind() == "cpu":
        try:
            with open("/proc/meminfo") as file:
                for line in file:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return None
        return None
    size = memory_limit()
    return size - mx.get_active_memory() if size else None


def memory_limit() -> int:
    """Bytes that the device has for us; 0 if nothing tells."""
    if device_kind() == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = mx.device_info(device().mlx)
    return int(info.get("total_memory") or info.get("memory_size") or info.get("max_recommended_working_set_size") or 0)


def tf32() -> str:
    """Whether MLX may use TF32 for float32 products, as a key's part."""
    return os.environ.get("MLX_ENABLE_TF32", "1")


def finish() -> None:
    """Wait for all that was started: MLX on CUDA ends a process badly that leaves while its GPU still works."""
    if device.cache_info().currsize and device().beside is not None:
        with locked():
            mx.synchronize(device().stream)
            mx.synchronize(device().beside)
