"""Values behind PJRT buffers: `mx.array`s, or NumPy arrays for the dtypes that MLX lacks. Copies in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps.errors import InvalidProgram
from jax_mps.ops.dtypes import mx_array
from jax_mps.pjrt.types import DTYPES
from jax_mps.plan.tensors import DEVICE_DTYPES, numpy_dtype

# Arrays that `from_mlx` hands over by the address of a stand-in (JAX.md, 2a).
_adopted: dict[int, Any] = {}


# What C takes a value for (cshim/README.md).
LAZY, HOST, READY = 0, 1, 2


def from_host(view: memoryview, dtype: int, dims: tuple[int, ...]) -> tuple[Any, int]:
    """A value of dense row-major bytes that are only valid during the call, and its state."""
    name = DTYPES.get(dtype)
    if name is None:
        raise InvalidProgram(f"buffers of PJRT element type {dtype} are unknown to this plugin")
    array = np.frombuffer(view, numpy_dtype(name)).reshape(dims)
    if name not in DEVICE_DTYPES:
        return _aligned_copy(array), HOST
    runtime.require_memory(array.nbytes)
    with runtime.locked():
        return mx_array(array, name), LAZY if name == "bfloat16" or runtime.device_kind() == "metal" else READY


_XLA_ALIGNMENT = 64  # XLA on CPU reads memory in place where it starts at a multiple of this, and copies it at each run elsewhere


def _aligned_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    memory = np.empty(array.nbytes + _XLA_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _XLA_ALIGNMENT
    copy: np.ndarray[Any, Any] = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def adopt(address: int) -> tuple[Any, int] | None:
    """The value that `from_mlx` announced under the address of its stand-in."""
    value = _adopted.pop(address, None)
    return None if value is None else (value, LAZY if isinstance(value, mx.array) else HOST)


def announce(address: int, value: Any) -> None:
    """Let the next buffer made from this host address be `value` itself."""
    _adopted[address] = value


def host_view(value: Any) -> tuple[Any, Any]:
    """The value with its data row-major and evaluated, and an object that exports it through the buffer protocol."""
    if not isinstance(value, mx.array):
        array = np.ascontiguousarray(value).reshape(value.shape)
        return array, array.view(np.uint8) if array.dtype.kind not in "biufc" and array.ndim and array.size else _exportable(array)
    exporter: Any  # an mx.array has the buffer protocol; its stub does not say so
    with runtime.locked():
        dense = mx.contiguous(value)
        if runtime.device_kind() == "cuda":
            exporter = mx.array(dense)  # reading moves an array to managed memory for good: read a copy
            mx.eval(exporter)
            return value, memoryview(exporter)
    runtime.evaluate([dense])
    exporter = dense
    with runtime.locked():
        return dense, memoryview(exporter)


def _exportable(array: np.ndarray[Any, Any]) -> Any:
    """ml_dtypes have no buffer format: their bytes have."""
    return array if array.dtype.isbuiltin == 1 else np.frombuffer(array.tobytes(), np.uint8)


def evaluate(values: Sequence[Any]) -> None:
    """Block until the values are evaluated; raises what MLX raised."""
    arrays = [v for v in values if isinstance(v, mx.array)]
    if arrays:
        runtime.evaluate(arrays)


def schedule(values: Sequence[Any]) -> None:
    """Start evaluating arrays."""
    runtime.start(values)
