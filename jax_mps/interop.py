"""Bridges between JAX arrays on mps and MLX, and a look into compiled programs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import blas, compat, runtime
from jax_mps._shim import lib
from jax_mps.ops.dtypes import MX
from jax_mps.pjrt import buffer
from jax_mps.plan.segments import host_array
from jax_mps.plan.show import describe
from jax_mps.plan.tensors import numpy_dtype

_NAMES = {dtype: name for name, dtype in MX.items() if name != "token"}


def to_mlx(array: Any) -> Any:
    """See `jax_mps.to_mlx`."""
    blas.install()  # what MLX is asked for from here on is not ours to see
    if array.size == 0:  # no memory to find it by
        return mx.zeros(array.shape, MX[array.dtype.name])
    array = _row_major(array)
    found: list[Any] = []
    if lib.shim_value_at(array.unsafe_buffer_pointer(), id(found)) == 0:
        raise ValueError(f"no buffer of mps holds this array; it is on {array.devices()}")
    return found[0]


def _row_major(array: Any) -> Any:
    """The array without a layout of its own, with which it would have no address."""
    import jax
    from jax.experimental.layout import Format, Layout

    plain = tuple(range(array.ndim))
    layout = array.format.layout
    return array if layout is None or layout.major_to_minor == plain else jax.device_put(array, Format(Layout(plain), array.sharding))


def from_mlx(array: Any) -> Any:
    """See `jax_mps.from_mlx`."""
    if not isinstance(array, mx.array) or array.dtype not in _NAMES:
        raise TypeError(f"expected an mlx.core.array of a dtype that MLX has on every device, got {getattr(array, 'dtype', type(array))}")
    runtime.evaluate([array])  # its stream may belong to this thread alone
    if array.size < 2:  # a broadcast stand-in needs two elements to be told from data
        return compat.put_on_mps(host_array(array).copy())
    stand_in = np.zeros((), numpy_dtype(_NAMES[array.dtype]))
    address = stand_in.__array_interface__["data"][0]
    buffer.announce(address, array)
    return compat.put_on_mps(np.broadcast_to(stand_in, tuple(array.shape)))


class _Writable:
    """An array's memory, without the flag that it is only to be read: before its version 1.0, DLPack has no way to say so."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.__array_interface__["data"][0], False)}


def to_dlpack(array: Any, max_version: tuple[int, int] | None, device: tuple[Any, int] | None, copy: bool | None) -> Any:
    """A capsule of an array's memory, as NumPy sees it: shared where NumPy shares it, which is not on CUDA.

    Raises:
        BufferError: another device than the host is asked for, or a copy forbidden that is needed.
    """
    import jax

    if device is not None and (int(device[0]), device[1]) != (1, 0):
        raise BufferError(f"arrays of mps are host memory to DLPack, kDLCPU (1, 0); asked for was {device}")
    copied = runtime.device_kind() == "cuda"
    if copied and copy is False:
        raise BufferError("an array on a GPU cannot be read from the host without a copy")
    values = np.asarray(array)
    if values.dtype.isbuiltin != 1:  # of JAX's own dtypes, DLPack knows some, and NumPy none
        if copy is False:
            raise BufferError(f"NumPy has no DLPack type for {values.dtype}, so that it takes a copy on JAX's cpu device")
        return jax.device_put(array, jax.devices("cpu")[0]).__dlpack__()
    if copy and not copied:
        values = values.copy()
    if max_version is not None and max_version >= (1, 0):
        with suppress(TypeError):  # NumPy before 2.1
            return values.__dlpack__(max_version=max_version)
    return np.asarray(_Writable(values)).__dlpack__()


def explain(compiled: Any) -> str:
    """See `jax_mps.explain`."""
    from jax_mps.pjrt.entry import client

    fingerprint = compat.fingerprint(compiled)
    devices = len(compiled.runtime_executable().local_devices())
    if devices > 1:
        return f"a program for {devices} devices\n  host (XLA CPU)\n    the whole of it: XLA partitions it and runs its collectives"
    return describe(client().program(fingerprint))
