"""What runs: a tree of segments behind one interface, and those that compute. `control` has those that choose what runs next.

Values inside a program are `mx.array`s, or NumPy arrays for what a host segment made; each segment converts what it reads.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps._shim import lib
from jax_mps.counters import count
from jax_mps.ops.dtypes import mx_array
from jax_mps.plan import fusion
from jax_mps.plan.record import Record
from jax_mps.plan.tensors import TensorType, numpy_dtype

if TYPE_CHECKING:
    from jax_mps.host.xla import HostFunction
    from jax_mps.plan.trial import Shapes, Trial

log = logging.getLogger(__name__)

Manifest = dict[str, Any]


class Files(Protocol):
    """Where segments find their parts: a cache entry, or what this process just exported."""

    def function(self, name: str) -> Callable[..., Any]:
        """Import an MLX function file."""

    def content(self, name: str) -> bytes | None:
        """The bytes of a function file; None for a function without one."""

    def artifact(self, name: str) -> bytes:
        """A host region's StableHLO."""

    def constant(self, digest: str, kind: TensorType) -> mx.array:
        """A large constant on the device, one per process."""


class Segment(Record, ABC):
    """One node of a program. `run` takes the values it reads and returns those it writes."""

    @abstractmethod
    def run(self, values: list[Any]) -> Sequence[Any]:
        """Compute. Takes no lock: callers hold none, so that users' callbacks and other threads go on."""

    @abstractmethod
    def to_manifest(self) -> Manifest:
        """Plain JSON values that `from_manifest` reads."""

    def walk(self) -> Sequence[Segment]:
        """This segment and those inside."""
        return [self]

    def bind(self, markers: Mapping[str, str]) -> Segment:
        """This segment with the callbacks inside named anew; parts without callbacks are shared, imported functions among them.

        Raises:
            KeyError: a callback that `markers` does not name.
        """
        return self


def type_to_json(kind: TensorType) -> list[Any]:
    return [kind.dtype, list(kind.shape)]


def type_from_json(value: Sequence[Any]) -> TensorType:
    dtype, shape = value
    numpy_dtype(dtype)
    return TensorType(tuple(int(d) for d in shape), str(dtype))


def to_device(value: Any, dtype: str) -> mx.array:
    """A value as MLX has it; host segments leave NumPy arrays."""
    return value if isinstance(value, mx.array) else mx_array(np.asarray(value), dtype)


def to_host(values: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """Values as NumPy arrays over evaluated memory (views where MLX's memory can be read in place)."""
    lazy = [v for v in values if isinstance(v, mx.array)]
    if not lazy:
        return list(values)
    runtime.evaluate(lazy)
    with runtime.locked():
        return [_view(v) if isinstance(v, mx.array) else v for v in values]


def host_array(value: mx.array) -> np.ndarray[Any, Any]:
    """An array as NumPy reads it, evaluated now if it was not."""
    with runtime.locked():
        return _view(value)


def _view(value: mx.array) -> np.ndarray[Any, Any]:
    """An array as NumPy reads it, locked; on CUDA from a copy, since reading moves an array to managed memory for good."""
    if runtime.device_kind() == "cuda":
        value = mx.array(value)
    mx.eval(value)
    if value.dtype == mx.bfloat16:
        return np.asarray(value.view(mx.uint16)).view(numpy_dtype("bfloat16"))
    return np.asarray(value)


# ---- blocks ----------------------------------------------------------------------------------------------------------------------


class Node(Record):
    """A segment and its slots in the block's table of values; `last` are the slots that nobody reads after it."""

    segment: Segment
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    last: tuple[int, ...] = ()


class Block(Record):
    """Nodes in order over a table of values: inputs first, then what nodes write."""

    inputs: int
    slots: int
    nodes: list[Node]
    outputs: tuple[int, ...]

    def _made(self) -> None:
        seen: set[int] = set(self.outputs)
        for node in reversed(self.nodes):
            node.last = tuple(s for s in dict.fromkeys(node.reads) if s not in seen)
            seen.update(node.reads)

    def run(self, values: list[Any]) -> list[Any]:
        """Run the nodes. `values` is emptied, so that inputs die as soon as nothing reads them."""
        table: list[Any] = values + [None] * (self.slots - len(values))
        values.clear()
        for node in self.nodes:
            arguments = [table[s] for s in node.reads]
            for slot in node.last:  # before it runs: a loop works in place on what only it holds
                table[slot] = None
            results = node.segment.run(arguments)
            for slot, value in zip(node.writes, results, strict=True):
                table[slot] = value
        return [table[s] for s in self.outputs]

    @property
    def function(self) -> Device | None:
        """The one device segment whose results are the block's outputs, if the block is no more than that."""
        if len(self.nodes) == 1 and isinstance(segment := self.nodes[0].segment, Device):
            node = self.nodes[0]
            if node.reads == tuple(range(self.inputs)) and node.writes == self.outputs:
                return segment
        return None

    def walk(self) -> list[Segment]:
        """Every segment, nested ones included."""
        return [inner for node in self.nodes for inner in node.segment.walk()]

    def bind(self, markers: Mapping[str, str]) -> Block:
        """This block with its callbacks named anew (`Segment.bind`)."""
        nodes = [Node(n.segment.bind(markers), n.reads, n.writes) for n in self.nodes]
        return Block(self.inputs, self.slots, nodes, self.outputs)

    def to_manifest(self) -> Manifest:
        nodes = [{"segment": n.segment.to_manifest(), "reads": list(n.reads), "writes": list(n.writes)} for n in self.nodes]
        return {"inputs": self.inputs, "slots": self.slots, "nodes": nodes, "outputs": list(self.outputs)}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Block:
        slots = int(manifest["slots"])
        nodes = [Node(segment_from_manifest(n["segment"], files), _slots(n["reads"], slots), _slots(n["writes"], slots)) for n in manifest["nodes"]]
        return cls(int(manifest["inputs"]), slots, nodes, _slots(manifest["outputs"], slots))


def _slots(values: Sequence[Any], limit: int) -> tuple[int, ...]:
    found = tuple(int(v) for v in values)
    if any(not 0 <= s < limit for s in found):
        raise ValueError("a slot outside the block's table")
    return found


# ---- device ----------------------------------------------------------------------------------------------------------------------


class Device(Segment):
    """A straight line of MLX ops: one imported function. `constants` are (digest, type) of its leading inputs.

    cost: elements computed, roughly; it decides how eagerly results are evaluated. peak: bytes live at once, at most. kernels: how many run on
    a GPU, roughly, once it is compiled.
    """

    name: str
    constants: tuple[tuple[str, TensorType], ...]
    dtypes: tuple[str, ...]
    ops: int
    cost: int
    peak: int
    files: Files
    kernels: int = 0
    _function: Callable[..., Any] | None = None
    _leading: tuple[mx.array, ...] = ()
    _runs: int = 0
    _chosen: Callable[..., Any] | None = None  # for the runs before `_look`
    _look: int = 0
    _fused: Callable[..., Any] | None = None
    _trial: Trial | None = None

    def load(self) -> tuple[Callable[..., Any], tuple[mx.array, ...]]:
        """The function and its leading inputs, imported at the first call."""
        if self._function is None:
            runtime.require_memory(self.peak)
            self._leading = tuple(self.files.constant(digest, kind) for digest, kind in self.constants)
            self._function = self.files.function(self.name)
        return self._function, self._leading

    def run(self, values: list[Any]) -> Sequence[Any]:
        settled = self._chosen
        if settled is not None and not 0 < self._look <= self._runs and all(isinstance(v, mx.array) for v in values):
            self._runs += 1
            lib.shim_lock()  # an imported function has its stream: setting ours would cost as much as the call
            try:
                return settled(*self._leading, *values)  # type: ignore[no-any-return]
            finally:
                lib.shim_unlock()
        with runtime.locked():
            function, leading = self.load()
            inputs = [to_device(v, d) for v, d in zip(values, self.dtypes, strict=True)]
            results = (self._chosen or function)(*leading, *inputs)
            if self._runs == 0 and runtime.reads_beside():
                mx.eval(*results)
            self._runs += 1
            if self._chosen is None or 0 < self._look <= self._runs:
                self._chosen, self._look = self.choose(self._runs, [(v.shape, d) for v, d in zip(inputs, self.dtypes, strict=True)])
                if self._chosen is self._fused:
                    mx.async_eval(results)  # its constants are real then
            return results  # type: ignore[no-any-return]

    def choose(self, run: int, inputs: Shapes) -> tuple[Callable[..., Any], int]:
        """The function as it is or fused, for the runs from `run` on, and the run before which to ask again (0: never). Locked; where it
        comes out fused, its constants must be real before the next call."""
        function, _ = self.load()
        look = fusion.first_look(self.ops, self.cost)
        if not look or run < look:
            return function, look
        if self._fused is None and fusion.is_tried_first():
            repays = self._repays(inputs)
            if not repays:
                return function, 0 if repays is False else fusion.later_look(run, self.ops, self.cost)
        if self._fused is None:
            count("compiles")
            self._fused = fusion.compiled(function)
        return self._fused, 0

    def _repays(self, inputs: Shapes) -> bool | None:
        """Whether the function is faster fused; None: not known yet."""
        from jax_mps.plan import trial  # for a function that has run for seconds

        if self._trial is None:
            content = self.files.content(self.name) if self.peak <= trial.MOST_BYTES and trial.possible() else None
            if content is None:
                return False
            self._trial = trial.Trial(content, [*((t.shape, t.dtype) for _, t in self.constants), *inputs])
        return self._trial.repays()

    @property
    def width(self) -> int:
        """How many arrays a run makes, about: a fused kernel is several ops."""
        return self.ops if self._fused is None else self.kernels or 1 + self.ops // 4

    def to_manifest(self) -> Manifest:
        constants = [[digest, *type_to_json(kind)] for digest, kind in self.constants]
        numbers = {n: getattr(self, n) for n in ("ops", "cost", "peak", "kernels")}
        return {"kind": "device", "constants": constants, "name": self.name, "dtypes": list(self.dtypes), **numbers}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Device:
        constants = tuple((str(digest), type_from_json(kind)) for digest, *kind in manifest["constants"])
        ops, cost, peak, kernels = (int(manifest[n]) for n in ("ops", "cost", "peak", "kernels"))
        return cls(str(manifest["name"]), constants, tuple(manifest["dtypes"]), ops, cost, peak, files, kernels)


# ---- host ------------------------------------------------------------------------------------------------------------------------


class Host(Segment):
    """A StableHLO region on the XLA CPU client. `reasons` say why it is not on the device; `joined` of its ops are there only since they
    are small (`boundary`). work: microseconds that it takes, roughly; None if nothing bounds them. watched: its loops look for interrupts."""

    name: str
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    reasons: tuple[str, ...]
    joined: int
    work: int | None
    watched: bool
    files: Files
    _function: HostFunction | None = None

    def run(self, values: list[Any]) -> Sequence[Any]:
        from jax_mps.host.xla import INTERRUPTS, HostFunction, interruptible

        count("host_calls")
        if self._function is None:
            inputs = (*self.inputs, INTERRUPTS) if self.watched else self.inputs
            self._function = HostFunction(self.files.artifact(self.name), inputs, self.outputs)
        arrays = to_host(values)
        started = lib.shim_profile_now()
        results = interruptible(self._function, arrays) if self.watched else self._function(arrays)
        if started:
            lib.shim_profile_event("; ".join(self.reasons).encode(), started)
        return results

    def to_manifest(self) -> Manifest:
        inputs, outputs = [type_to_json(t) for t in self.inputs], [type_to_json(t) for t in self.outputs]
        fields = {"name": self.name, "reasons": list(self.reasons), "joined": self.joined, "work": self.work, "watched": self.watched}
        return {"kind": "host", **fields, "inputs": inputs, "outputs": outputs}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Host:
        inputs, outputs = (tuple(type_from_json(t) for t in manifest[n]) for n in ("inputs", "outputs"))
        joined, work = int(manifest["joined"]), manifest["work"] and int(manifest["work"])
        return cls(str(manifest["name"]), inputs, outputs, tuple(manifest["reasons"]), joined, work, bool(manifest["watched"]), files)


class Callback(Segment):
    """A custom call that runs a user's Python (calls/callbacks.py) on NumPy arrays."""

    target: str
    config: Any
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    def run(self, values: list[Any]) -> Sequence[Any]:
        from jax_mps.calls import callbacks

        return callbacks.call(self.target, self.config, to_host(values), self.inputs, self.outputs)

    @property
    def is_python(self) -> bool:
        """Whether `config` is the marker of a function of this process; else the target is found by its name (`calls.ffi`)."""
        from jax_mps.calls import callbacks

        return self.target == callbacks.TARGET

    def bind(self, markers: Mapping[str, str]) -> Callback:
        return self.replaced(config=markers[self.config]) if self.is_python else self

    def to_manifest(self) -> Manifest:
        inputs, outputs = [type_to_json(t) for t in self.inputs], [type_to_json(t) for t in self.outputs]
        return {"kind": "callback", "target": self.target, "config": self.config, "inputs": inputs, "outputs": outputs}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Files) -> Callback:
        inputs, outputs = (tuple(type_from_json(t) for t in manifest[n]) for n in ("inputs", "outputs"))
        return cls(str(manifest["target"]), _tuples(manifest["config"]), inputs, outputs)


def is_json(config: Any) -> bool:
    """Whether a call's attributes come back from JSON as they are (tuples excepted, which `from_manifest` restores)."""
    if isinstance(config, dict):
        return all(isinstance(name, str) and is_json(value) for name, value in config.items())
    if isinstance(config, tuple):
        return all(is_json(value) for value in config)
    return config is None or type(config) in (bool, int, str) or (type(config) is float and math.isfinite(config))


def _tuples(config: Any) -> Any:
    """Attributes as they were before JSON made lists of their tuples."""
    if isinstance(config, dict):
        return {name: _tuples(value) for name, value in config.items()}
    return tuple(_tuples(value) for value in config) if isinstance(config, list) else config


# ---- manifests -------------------------------------------------------------------------------------------------------------------


def segment_from_manifest(manifest: Manifest, files: Files) -> Segment:
    """Read any segment.

    Raises:
        KeyError, ValueError, TypeError: the manifest is not one of ours (the caller takes it as a miss).
    """
    kinds: Mapping[str, Any] = {"device": Device, "host": Host, "callback": Callback}
    if manifest["kind"] not in kinds:
        from jax_mps.plan.control import Branch, Loop, Scan, Until  # which are made of blocks, and which few programs have

        kinds = {"loop": Loop, "scan": Scan, "until": Until, "branch": Branch}
    return kinds[manifest["kind"]].from_manifest(manifest, files)  # type: ignore[no-any-return]
