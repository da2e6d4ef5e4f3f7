"""The executable that the shim runs: its signature as C reads it, and the two ways of running (one function, or a tree of segments)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps.errors import NoBufferType
from jax_mps.ops.dtypes import mx_array
from jax_mps.pjrt.buffer import HOST, LAZY, READY
from jax_mps.pjrt.options import Devices, unpack
from jax_mps.pjrt.types import NUMBERS
from jax_mps.plan.program import Program
from jax_mps.plan.segments import Callback, Device, Host, Segment
from jax_mps.plan.tensors import DEVICE_DTYPES, TensorType

log = logging.getLogger(__name__)

_TOKEN = np.zeros((), bool)
# Microseconds on the host that a call may take before it returns, and what it may wait for the device to compute (`Device.cost`).
PROMPT_WORK, PROMPT_COST = 500, 1 << 17


class Executable:
    """A program under the name and options that one compile call gave it. C reads the attributes once (cshim/README.md)."""

    def __init__(self, program: Program, name: str, fingerprint: bytes, source: Callable[[], bytes], devices: Devices) -> None:
        if program.host_segments:
            from jax_mps.plan.show import announce_host

            announce_host(program)
        self.program = program
        self.source = source  # what `serialize` stores
        self.name = name
        self.fingerprint = fingerprint
        self.devices = devices
        self.code_size = 0
        self.parameter_types = tuple(pjrt_type(t) for t in program.parameters)
        self.output_types = tuple(pjrt_type(t) for t in program.results)
        self.output_states = _states(program)
        self.donated = program.donated
        self.parameter_memories, self.output_memories = program.memories
        self.parameter_layouts, self.output_layouts = program.layouts
        self.effects = program.effects
        function = program.direct
        self.function: Device | None = function if function is not None and not any(self.output_states) else None
        self.direct = self.function is not None
        self.waits = _waits(program)
        self.prompt = not self.direct and is_prompt(program)
        self.cost = sum(s.cost for s in program.segments() if isinstance(s, Device)) if self.direct or self.prompt else 0
        self._tokens = [i for i, t in enumerate(program.parameters) if t.dtype == "token"]
        self.pinned = _callbacks(program.segments())

    def optimized_program(self) -> tuple[bytes, bytes]:
        """Its format and bytes: the program as it was compiled, which JAX shows as HLO by `compiled.as_text()`."""
        from jax_mps.plan import build

        code, _ = unpack(self.source())
        return b"mlir", build.bytecode(build.parse(code))

    def prepare(self, run: int) -> tuple[Callable[..., Any], tuple[mx.array, ...], int]:
        """The callable for the next runs, its leading inputs, and the run before which to ask again (0: never). Locked."""
        assert self.function is not None
        _, leading = self.function.load()
        function, look = self.function.choose(run, [(t.shape, t.dtype) for t in self.program.parameters])
        return function, leading, look

    def execute(self, arguments: list[Any]) -> Sequence[Any]:
        """Run the program, on the executor's thread unless it is prompt; `arguments` is emptied as values die. What JAX passes for a token is a
        bool of any shape."""
        for place in self._tokens:
            arguments[place] = _TOKEN
        results = self.program.block.run(arguments)
        return [result_value(v, t) for v, t in zip(results, self.program.results, strict=True)]


def _states(program: Program) -> tuple[int, ...]:
    """What each result is when the program has run (cshim/README.md): on CPU, what a host segment gave is copied into evaluated memory."""
    given = {slot for node in program.block.nodes if isinstance(node.segment, Host) for slot in node.writes}
    return tuple(_state(t, slot in given) for t, slot in zip(program.results, program.block.outputs, strict=True))


def _state(kind: TensorType, from_host: bool) -> int:
    if is_host(kind):
        return HOST
    return READY if from_host and runtime.device_kind() == "cpu" and kind.dtype != "bfloat16" else LAZY


def is_prompt(program: Program) -> bool:
    """Whether a program runs on the caller's thread: no loop, no callback, and on CPU, so little on the host that two changes of thread
    (70 us) would take longer than to wait for it."""
    segments = program.segments()
    if runtime.device_kind() != "cpu" or program.effects or not all(isinstance(s, (Device, Host)) for s in segments):
        return False
    host = [s.work for s in segments if isinstance(s, Host)]
    waits_for = sum(s.cost for s in segments if isinstance(s, Device)) if host else 0
    return None not in host and sum(w for w in host if w is not None) <= PROMPT_WORK and waits_for <= PROMPT_COST


def _callbacks(segments: Sequence[Segment]) -> tuple[Any, ...]:
    """The Python functions that a program calls: JAX may drop its own references as soon as it has dispatched a run that is still queued."""
    calls = [s for s in segments if isinstance(s, Callback)]
    if not calls:
        return ()
    from jax_mps.calls import callbacks

    return tuple(callbacks.find(s.config) for s in calls if s.target == callbacks.TARGET)


def _waits(program: Program) -> bool:
    """Whether a call waits for its end, as on JAX's cpu backend: a callback that fails raises from the call, and what callbacks print stands
    before what the program prints next."""
    return any(isinstance(s, Callback) for s in program.segments())


def pjrt_type(kind: TensorType) -> tuple[int, tuple[int, ...]]:
    number = NUMBERS.get(kind.dtype)
    if number is None:
        raise NoBufferType(f"PJRT has no arrays of {kind.dtype}")
    return number, kind.shape


def is_host(kind: TensorType) -> bool:
    """Whether buffers hold values of the type as NumPy arrays: host dtypes, and tokens, which are there as soon as a program has run."""
    return kind.dtype == "token" or kind.dtype not in DEVICE_DTYPES


def result_value(value: Any, kind: TensorType) -> Any:
    """A result as buffers hold it."""
    if kind.dtype == "token":
        return _TOKEN
    if kind.dtype in DEVICE_DTYPES and not isinstance(value, mx.array):
        with runtime.locked():
            return mx_array(value, kind.dtype)
    return value
