"""What C calls: one Python function for each hook of the shim (cshim/README.md). Exceptions become PJRT errors in `describe_error`."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from jax_mps import runtime
from jax_mps._shim import ffi, lib
from jax_mps.errors import INTERNAL, RESOURCE_EXHAUSTED, InvalidProgram, JaxMpsError
from jax_mps.pjrt import buffer, options
from jax_mps.pjrt.client import AnyExecutable, Client
from jax_mps.pjrt.executable import Executable
from jax_mps.plan.tensors import MEMORY_KINDS

log = logging.getLogger(__name__)

_client: Client | None = None
_making = threading.Lock()

# An execution of more elements than this is evaluated at once; cheaper ones stay lazy until so many are waiting, or so many bytes. To start an
# evaluation takes 17 us on a GPU (H100), and 3 us more for each kernel in it: those that take the GPU less time are started together.
EAGER_COST = {"cpu": 1 << 17}
_EAGER_ON_GPU = 1 << 25
LAZY_LIMIT = {"cpu": 128}  # of 4 us each, which the caller then evaluates; 32 elsewhere
LAZY_BYTES = 256 << 20
_SHORT_COST = 1 << 20  # what is under way when somebody waits is waited for under the lock, up to so much
_DRAIN_MILLISECONDS = 5000


def client() -> Client:
    """The process's client."""
    global _client
    with _making:
        if _client is None:
            _client = Client()
        return _client


def plugin_attributes() -> dict[str, Any]:
    """The StableHLO versions of the jaxlib that is running, so that programs arrive in its own."""
    from jax_mps import compat

    current, minimum = compat.stablehlo_versions()
    return {"xla_version": 2, "stablehlo_current_version": current, "stablehlo_minimum_version": minimum}


# What a kind of device is called. JAX takes a platform with "cuda" in its version for XLA's own.
NAMES = {"cpu": "cpu", "cuda": "gpu", "metal": "gpu"}


def client_create(given: dict[str, Any]) -> dict[str, Any]:
    """What the client, its devices and their memories say of themselves."""
    from jax_mps import compat

    device = runtime.device()
    client()
    name = NAMES[device.kind]
    return {
        **runtime.waits(),
        "platform_name": "mps",
        "platform_version": f"jax-mps on MLX {runtime.MLX_VERSION} ({name})",
        "device_kind": f"MLX {device.kind} {device.architecture}",
        "device_strings": tuple(f"mps:{i} (MLX {name})" for i in range(compat.device_count(device.kind))),
        "memory_kinds": MEMORY_KINDS,
        "is_on_cpu": device.kind != "cuda",
        "attributes": {"mlx_device": device.kind, "architecture": device.architecture},
        "eager_cost": EAGER_COST.get(device.kind, _EAGER_ON_GPU),
        "lazy_cost": (1 << 62) if device.kind == "cpu" else _EAGER_ON_GPU,
        "lazy_limit": LAZY_LIMIT.get(device.kind, 32),
        "lazy_bytes": LAZY_BYTES,
        "short_cost": _SHORT_COST,
    }


def client_destroy() -> None:
    """Forget what only later compiles would use."""
    if _client is not None:
        _client.forget()


def compile(code: bytes, format: str, given: bytes) -> AnyExecutable:
    """Compile a program."""
    if format != "mlir":
        raise InvalidProgram(f"programs of format {format!r} are not known here; StableHLO comes as 'mlir'")
    return client().compile(code, given)


def load(serialized: bytes, given: bytes) -> AnyExecutable:
    """Load what `serialize` made."""
    code, packed = options.unpack(serialized)
    return client().compile(code, packed)


def serialize(executable: AnyExecutable) -> bytes:
    """The program and its options as bytes; a program with callbacks means nothing in another process."""
    from jax_mps.pjrt.client import has_callbacks

    if isinstance(executable, Executable) and has_callbacks(executable.program):
        raise NotSerializable("a program with callbacks into Python cannot be serialized")
    return executable.source()


def calls_back(fingerprint: bytes) -> bool:
    """Whether the program of an executable calls back into Python, by its fingerprint; False if it is not known here."""
    from jax_mps.pjrt.client import has_callbacks

    try:
        return has_callbacks(client().program(fingerprint.hex()))
    except KeyError:
        return False


class NotSerializable(JaxMpsError):
    """An executable that only means something in this process."""

    code = 12


def optimized_program(executable: AnyExecutable) -> tuple[bytes, bytes]:
    """A program's format and bytes, from which JAX reads shardings and what `compiled.as_text()` shows."""
    return executable.optimized_program()


def memory_stats() -> dict[str, int]:
    """MLX's own counts, in bytes. Several devices share one memory: each has its part to itself if all take as much."""
    from jax_mps import compat

    limit = runtime.memory_limit()
    return {
        "bytes_in_use": mx.get_active_memory(),
        "peak_bytes_in_use": mx.get_peak_memory(),
        "bytes_limit": limit,
        "bytes_reservable_limit": limit // compat.device_count(runtime.device_kind()),
    }


def cost_analysis(executable: AnyExecutable) -> dict[str, float]:
    """Nothing yet that could be vouched for."""
    return {}


def describe_error(error: BaseException) -> tuple[int, str]:
    """An exception as a PJRT error code and message."""
    if isinstance(error, JaxMpsError):
        return error.code, str(error)
    if isinstance(error, MemoryError):
        return RESOURCE_EXHAUSTED, str(error) or "out of memory"
    log.debug("an error on the way to JAX", exc_info=error)
    return INTERNAL, f"{type(error).__name__}: {error}"


def prepare(executable: Executable, run: int) -> tuple[Callable[..., Any], tuple[mx.array, ...], int]:
    return executable.prepare(run)


def execute(executable: AnyExecutable, arguments: list[Any]) -> Sequence[Any]:
    return executable.execute(arguments)


def hooks() -> dict[str, Callable[..., Any]]:
    """Every hook of the shim by name."""
    own = (
        plugin_attributes, client_create, client_destroy, compile, load, serialize, optimized_program,
        memory_stats, cost_analysis, describe_error, prepare, execute,
    )  # fmt: skip
    copies = (buffer.from_host, buffer.adopt, buffer.host_view, buffer.evaluate, buffer.schedule)
    return {f.__name__: f for f in (*own, *copies)}


def _finish() -> None:
    """At exit: what was dispatched may still print; then the shim's threads stop."""
    lib.shim_drain(_DRAIN_MILLISECONDS)
    runtime.finish()
    lib.shim_finalize()


def install() -> Any:
    """Give the shim its hooks; returns the capsule of the PJRT table. Called once."""
    table = hooks()
    if lib.shim_install(id(table)) != 0:
        raise JaxMpsError("the shim refused its hooks: jax_mps and jax_mps._shim are of different versions")
    os.register_at_fork(after_in_child=lib.shim_forked)
    atexit.register(_finish)
    capsules: list[Any] = []
    lib.shim_append_capsule(id(capsules))
    return capsules[0]


__all__ = ["client", "ffi", "hooks", "install"]
