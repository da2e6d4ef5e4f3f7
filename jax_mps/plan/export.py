"""A device segment's steps as an MLX function file: lowered, traced and written by `mx.export_function`."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from jax_mps import blas, runtime
from jax_mps.counters import count
from jax_mps.ops.dtypes import MX, mx_array
from jax_mps.ops.registry import LoweredStep, Lowerer
from jax_mps.plan.fanout import in_blocks
from jax_mps.plan.types import Step, Value

# A constant of more bytes than this is an input of the function, stored by content and shared (MLX inlines captured ones, unmapped).
MAX_INLINE_CONSTANT = 2048
# Deeper graphs than this are traced on a thread with a big stack: MLX's export recurses per op.
DEEP = 800
_STACK = 512 << 20

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Constant:
    """A large constant: row-major bytes, shape, dtype; `digest` addresses it in the cache."""

    digest: str
    value: np.ndarray[Any, Any]
    dtype: str


@dataclass(frozen=True, slots=True)
class Traceable:
    """A device segment before export: `function(*constants, *reads)` builds its graph; with `apart`, one in which no two steps have an array in common."""

    function: Callable[..., list[mx.array]]
    constants: tuple[Constant, ...]
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    size: int


def digest_of(value: np.ndarray[Any, Any]) -> str:
    """The content address of a constant's bytes."""
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def traceable(steps: Sequence[Step], reads: tuple[Value, ...], writes: tuple[Value, ...], lowerer: Lowerer) -> Traceable:
    """Lower the steps; large constants among them become leading inputs."""
    large = [s for s in steps if _is_large(s)]
    lowered = [lowerer.lower(s) for s in in_blocks([s for s in steps if not _is_large(s)])]
    leading = [s.results[0] for s in large]
    constants = tuple(Constant(digest_of(s.value), s.value, s.result.dtype) for s in large)
    last = _last_use(lowered, writes)

    def function(*arrays: mx.array, apart: bool = False) -> list[mx.array]:
        env = dict(zip((*leading, *reads), arrays, strict=True))
        for index, step in enumerate(lowered):
            shared = {v: env[v] for v in step.step.reads() if v in env} if apart else {}
            if shared:
                env.update(zip(shared, mx.depends([*shared.values()], [next(iter(shared.values()))]), strict=True))
            step(env)
            env.update(shared)
            for value in last.get(index, ()):
                env.pop(value, None)
        return [env[v] for v in writes]

    return Traceable(function, constants, reads, writes, len(lowered))


def _is_large(step: Step) -> bool:
    if step.name != "stablehlo.constant" or step.result.nbytes <= MAX_INLINE_CONSTANT:
        return False
    return any(stride != 0 for stride, dim in zip(step.value.strides, step.value.shape, strict=True) if dim > 1)


def _last_use(lowered: Sequence[LoweredStep], writes: Sequence[Value]) -> dict[int, list[Value]]:
    """Values that are dead after each step."""
    last: dict[Value, int] = {}
    for index, step in enumerate(lowered):
        for value in step.step.reads():
            last[value] = index
    for value in writes:
        last.pop(value, None)
    dead: dict[int, list[Value]] = {}
    for value, index in last.items():
        dead.setdefault(index, []).append(value)
    return dead


def export(segment: Traceable, folder: Path) -> Path:
    """Write the segment's function to a new file in `folder`.

    Raises:
        ValueError: a primitive that MLX cannot serialise (a lowering's fault).
    """
    samples = [mx.zeros(c.value.shape, MX[c.dtype]) for c in segment.constants]
    samples += [mx.zeros(v.shape, MX[v.dtype]) for v in segment.reads]
    handle, name = tempfile.mkstemp(".mlxfn", dir=folder)
    os.close(handle)
    path = Path(name)
    with runtime.locked():
        with_big_stack(lambda: mx.export_function(name, segment.function, *samples), segment.size > DEEP)
        if not _is_whole(path, samples):
            count("exports_apart")
            log.debug("%s: exported again, with no array that two steps share", name)
            apart = functools.partial(segment.function, apart=True)
            with_big_stack(lambda: mx.export_function(name, apart, *samples), segment.size > DEEP)
    return path


def _is_whole(path: Path, samples: Sequence[mx.array]) -> bool:
    """Whether a function has all its arrays: where MLX merges equal ones (three of them, and more), it may drop the one that it keeps (0.32)."""
    from jax_mps.plan.program import read_function  # which a warm start needs, and not this module

    try:
        read_function(path, path.read_bytes())(*samples)  # builds a graph, evaluates nothing
    except IndexError:
        return False
    return True


def interpreted(segment: Traceable) -> Callable[..., list[mx.array]]:
    """The segment as a function that builds its graph op by op at each call: slow, for a process whose first MLX stream is not ours,
    where an imported function would bind to that stream."""
    stream = runtime.device().stream
    blas.install()

    def call(*arrays: mx.array) -> list[mx.array]:
        with mx.stream(stream):
            return segment.function(*arrays)

    return call


_stack_size = threading.Lock()


def with_big_stack(work: Callable[[], T], deep: bool) -> T:
    """Run `work`, on a thread with a 512 MiB stack if it is deep. The caller's lock covers it: the caller only waits."""
    if not deep:
        return work()
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with runtime.our_streams():
                result.append(work())
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    with _stack_size:
        previous = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run, name="jax-mps export")
            thread.start()
        finally:
            threading.stack_size(previous)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def device_array(constant: np.ndarray[Any, Any], dtype: str) -> mx.array:
    """A constant on the device."""
    return mx_array(constant, dtype)
