"""The Host segment's engine: StableHLO on a private XLA CPU client of the user's jaxlib, NumPy arrays in and out.

The client is our own, not JAX's cpu backend: it needs no backend to be initialised (a segment may run while JAX makes its own), it
outlives `clear_backends`, and JAX's options for cpu devices do not reach it. Custom calls registered with XLA are process-wide, so LAPACK
and the user's `jax.ffi` targets for cpu work here too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_mps import compat
from jax_mps._shim import lib
from jax_mps.errors import INTERNAL, INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, UNIMPLEMENTED, Interrupted, InvalidOption, JaxMpsError
from jax_mps.host import kept
from jax_mps.plan.text import module_text
from jax_mps.plan.types import Step, TensorType, Value, numpy_dtype

Array = np.ndarray[Any, Any]

# A custom call of ours (cshim/calls.c) that fails when there are more interrupts than it is given, which is one more input of a region then.
LOOK, INTERRUPTS = "jax_mps_look", TensorType((), "int64")

_CODES = {
    "CANCELLED": Interrupted.code,
    "INVALID_ARGUMENT": INVALID_ARGUMENT,
    "NOT_FOUND": NOT_FOUND,
    "RESOURCE_EXHAUSTED": RESOURCE_EXHAUSTED,
    "UNIMPLEMENTED": UNIMPLEMENTED,
}


class HostError(JaxMpsError):
    """XLA's CPU compiler or run time refused a Host segment; `code` is the one it gave."""

    def __init__(self, doing: str, error: Exception) -> None:
        name, colon, message = str(error).partition(": ")
        self.code = _CODES.get(name, INTERNAL)
        super().__init__(f"{doing} on the host: {message if colon and name in _CODES else error}")


def host_function(inputs: Sequence[Value], steps: Sequence[Step], outputs: Sequence[Value]) -> HostFunction:
    """The steps as a function on the host. Nothing is compiled by XLA before the first call.

    Raises:
        ValueError: the steps cannot be printed (`module_text`).
        HostError: what was printed is no valid module.
    """
    text = module_text(inputs, steps, outputs)
    try:
        artifact = compat.portable_artifact(text)
    except Exception as error:  # the bindings raise RuntimeError, ValueError and MLIRError alike
        raise HostError("serialising a segment", error) from error
    return HostFunction(artifact, tuple(v.type for v in inputs), tuple(v.type for v in outputs))


class HostFunction:
    """A StableHLO portable artifact with the types of its segment, tokens included; call it with one array for each input.

    Thread-safe; equal artifacts share one executable for as long as some function uses it.
    """

    __slots__ = ("_executable", "artifact", "input_types", "output_types")

    def __init__(self, artifact: bytes, input_types: Sequence[TensorType], output_types: Sequence[TensorType]) -> None:
        self.artifact = artifact
        self.input_types = tuple(input_types)
        self.output_types = tuple(output_types)
        self._executable: _Executable | None = None

    def compile(self) -> None:
        """Compile now rather than at the first call.

        Raises:
            HostError: XLA refuses the program.
        """
        if self._executable is None:
            inputs = [t for t in self.input_types if t.dtype != "token"]
            self._executable = _compiled(self.artifact, inputs)

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """Run, and return when XLA is done with the inputs: they may be views of memory that is used again after.

        Arrays returned alias XLA's memory where the dtype allows it; they are read-only and keep it alive.

        Raises:
            HostError: XLA refuses the program, or the run fails.
        """
        self.compile()
        assert self._executable is not None
        data = iter(self._executable([a for a, t in zip(arrays, self.input_types, strict=True) if t.dtype != "token"]))
        return [_TOKEN if t.dtype == "token" else next(data) for t in self.output_types]


def interruptible(function: HostFunction, arrays: Sequence[Array]) -> list[Array]:
    """Run a function whose last input says how many interrupts there were.

    Raises:
        HostError: as ever.
        Interrupted: one of its loops saw that there are more, or that the process is ending.
    """
    lib.shim_watch_interrupts(1)
    try:
        return function([*arrays, np.asarray(lib.shim_interrupts(), INTERRUPTS.dtype)])
    except HostError as error:
        if error.code == Interrupted.code:
            raise Interrupted("a loop was interrupted") from error
        raise
    finally:
        lib.shim_watch_interrupts(0)


_TOKEN = np.zeros((), bool)
_executables: weakref.WeakValueDictionary[bytes, _Executable] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@functools.lru_cache(maxsize=64)
def check_options(options: bytes) -> None:
    """Let XLA's CPU backend read the user's overrides in a serialized CompileOptionsProto: what it refuses is refused on this platform.

    Raises:
        InvalidOption: an option that XLA does not know, or a value that it cannot have.
    """
    xla = compat.xla_client()
    trial = xla.CompileOptions()
    trial.env_option_overrides = xla.CompileOptions.ParseFromString(options).env_option_overrides
    try:
        cpu().compile("func.func @main() { return }", trial)
    except Exception as error:  # jaxlib's error classes differ between versions
        raise InvalidOption(str(error).removeprefix("INVALID_ARGUMENT: ")) from error


def _compiled(artifact: bytes, inputs: Sequence[TensorType]) -> _Executable:
    key = hashlib.sha256(artifact).digest()
    with _lock:
        executable = _executables.get(key)
    if executable is None:  # two threads may compile the same program once each; the first one's is kept
        executable = _Executable(artifact, inputs)
        with _lock:
            executable = _executables.setdefault(key, executable)
    return executable


class _Executable:
    """XLA's loaded executable, with what its parameters are put by."""

    __slots__ = ("__weakref__", "_avals", "_dtypes", "_loaded")

    def __init__(self, artifact: bytes, inputs: Sequence[TensorType]) -> None:
        if b"lapack_" in artifact:
            compat.initialize_lapack()
        if LOOK.encode() in artifact:
            _register_look()
        self._dtypes = [numpy_dtype(t.dtype) for t in inputs]
        self._avals = [compat.shaped_array(t.shape, d) for t, d in zip(inputs, self._dtypes, strict=True)]
        try:
            self._loaded = cpu().load(artifact)
        except Exception as error:  # jaxlib's error classes differ between versions
            raise HostError("compiling", error) from error

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        engine = cpu()
        try:
            puts = [engine.put(aval, a) for aval, a in zip(self._avals, arrays, strict=True)]
            results = self._loaded.execute_sharded(puts).disassemble_into_single_device_arrays()
            outputs = [to_numpy(shards[0]) for shards in results]
            for put in puts:  # an input that the program does not read may still be in copy
                put.block_until_ready()
        except Exception as error:
            raise HostError("running", error) from error
        return outputs


@functools.cache
def _register_look() -> None:
    """Tell XLA where our custom call is."""
    import jax.ffi  # with the first loop that needs it

    function = ctypes.c_void_p(lib.shim_look_call())
    jax.ffi.register_ffi_target(LOOK, jax.ffi.pycapsule(function), platform="cpu")  # type: ignore[no-untyped-call]


def to_numpy(result: Any) -> Array:
    """XLA's array as a NumPy view; waits for it."""
    if result.dtype.isbuiltin == 1:
        return np.asarray(memoryview(result))
    return np.asarray(result)  # ml_dtypes have no buffer format


class Cpu:
    """A private client with so many devices."""

    __slots__ = ("_all", "_array", "_client", "_compile_options", "_list", "_put", "_shardings", "devices")

    def __init__(self, count: int) -> None:
        xla = compat.xla_client()
        self._client = xla.make_cpu_client(asynchronous=False, num_devices=count)
        self.devices = list(self._client.local_devices())
        self._list = xla.DeviceList(tuple(self.devices))
        self._shardings = [xla.SingleDeviceSharding(device) for device in self.devices]
        self._compile_options = xla.CompileOptions()
        self._put, self._array = xla._xla.batched_device_put, xla.ArrayImpl
        # of an array on all: says nothing about its parts, of which a program looks at each device's own only
        self._all = xla._xla.GSPMDSharding(self._list, xla.HloSharding.replicate()) if count > 1 else None

    def load(self, artifact: bytes) -> Any:
        """The artifact's executable: kept from an earlier process, or compiled."""
        found = kept.load(artifact, lambda code: self._client.deserialize_executable(code, self._list, None))
        if found is None:
            found = self.compile(artifact, self._compile_options)
            kept.keep(artifact, found.serialize)
        return found

    def compile(self, program: Any, options: Any, *callbacks: Any) -> Any:
        return self._client.compile_and_load(program, self._list, options, *callbacks)

    def put(self, aval: Any, *parts: Array) -> Any:
        """One array, with a part of the same abstract value on each device."""
        placed = zip(self._shardings, parts, self.devices, strict=True)
        # without enable_x64, 64-bit elements are silently narrowed when JAX's flag is off
        arrays = [self._put(aval, sharding, [part], [device], enable_x64=True) for sharding, part, device in placed]
        return arrays[0] if self._all is None else self._array(aval, self._all, arrays, committed=True, _skip_checks=True)


_cpu_lock = threading.Lock()


@functools.cache
def _made_cpu(count: int) -> Cpu:
    return Cpu(count)


def cpu(count: int = 1) -> Cpu:
    """The process's private client with so many devices."""
    with _cpu_lock:  # functools.cache alone may make two
        return _made_cpu(count)
