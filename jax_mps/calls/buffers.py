"""The run-time half of `jax.experimental.buffer_callback`: results are buffers that the user's function writes into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Buffer:
    """What JAX's `Buffer` is on cpu: an array's memory through `__array__` and `__dlpack__`."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.array.shape
        return shape

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.array.dtype
        return dtype

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def writeable(self) -> bool:
        return self.array.flags.writeable

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class Context:
    """What JAX's `ExecutionContext` is on cpu."""

    @property
    def stage(self) -> Any:
        from jax.experimental.buffer_callback import ExecutionStage

        return ExecutionStage.EXECUTE

    @property
    def stream(self) -> int:
        from jax.errors import JaxRuntimeError

        raise JaxRuntimeError("UNIMPLEMENTED: XLA FFI GPU context is not available on mps: a callback's buffers are in host memory")


def writer(
    function: Callable[..., Any], in_tree: Any, out_tree: Any, outputs: Sequence[tuple[tuple[int, ...], Any]], aliases: Mapping[int, int]
) -> Callable[..., list[Array]]:
    """The user's function as one that returns its results.

    aliases: an output's position to that of the input whose memory and values it starts with.
    """

    def run(*arrays: Any) -> list[Array]:
        inputs = [np.asarray(a) for a in arrays]
        results = [np.empty(shape, dtype) if o not in aliases else np.array(inputs[aliases[o]]) for o, (shape, dtype) in enumerate(outputs)]
        for output, position in aliases.items():
            inputs[position] = results[output].view()
        for array in inputs:
            array.flags.writeable = False
        positional, keywords = in_tree.unflatten([Buffer(a) for a in inputs])
        if function(Context(), out_tree.unflatten([Buffer(r) for r in results]), *positional, **keywords) is not None:
            raise ValueError("buffer_callback callback must not return any values.")
        return results

    return run
