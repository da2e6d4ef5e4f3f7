"""The run-time half of JAX's callbacks: a table of live Python functions, called on NumPy arrays.

`compat` lowers a callback to a custom call whose `backend_config` names the function by a marker of fixed length. The function lives as long
as JAX keeps the lowered module's keepalives; the table itself holds it weakly. A marker means something in its own process only, so
`renumber` replaces the markers of a program by ordinals: that form may be hashed and stored, and is bound to functions again at load.
"""

from __future__ import annotations

import itertools
import re
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_mps.errors import FAILED_PRECONDITION, INTERNAL, JaxMpsError
from jax_mps.plan.tensors import TensorType, numpy_dtype

TARGET = "mps_python_callback"
PARTITIONED = "mps.partitioned"  # an attribute of the call

Array = np.ndarray[Any, Any]

_MARKER = rb"mps_callback:([0-9a-f]{16})"
_NARROW = {"float64": "float32", "int64": "int32", "uint64": "uint32", "complex128": "complex64"}


class CallbackError(JaxMpsError):
    """A user's function raised, or returned what it had not announced; the text holds its traceback."""

    code = INTERNAL


class CallbackGone(JaxMpsError):
    """A marker whose function is dead, or was made by another process."""

    code = FAILED_PRECONDITION


class Callback:
    """A user's function and what it announced to return.

    narrow: 64-bit results become 32-bit ones, as JAX's x64 flag had it when the callback was lowered.
    """

    __slots__ = ("__weakref__", "function", "narrow", "number", "results")

    def __init__(self, function: Callable[..., Any], results: Sequence[TensorType], *, narrow: bool) -> None:
        self.function = function
        self.results = tuple(results)
        self.narrow = narrow
        self.number = next(_numbers)

    @property
    def marker(self) -> str:
        """What the program calls it by."""
        return f"mps_callback:{self.number:016x}"


_numbers = itertools.count()
_table: weakref.WeakValueDictionary[str, Callback] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def register(function: Callable[..., Any], results: Sequence[TensorType], *, narrow: bool) -> Callback:
    """Enter a function in the table; whoever needs it to live holds what is returned."""
    callback = Callback(function, results, narrow=narrow)
    with _lock:
        _table[callback.marker] = callback
    return callback


def find(marker: str) -> Callback:
    """The function that a marker names.

    Raises:
        CallbackGone: there is none.
    """
    with _lock:
        callback = _table.get(marker)
    if callback is None:
        raise CallbackGone(f"the Python function behind {marker!r} is gone: the program was lowered in another process, or JAX dropped its module")
    return callback


def renumber(program: bytes) -> tuple[bytes, tuple[str, ...]]:
    """A program's bytes (artifact or text) with each marker replaced by its ordinal, and the markers in that order.

    Markers have one length, so the form is otherwise the same. Ordinals follow the first appearance in these bytes: what is stored under
    the canonical text's ordinals is bound by that text's markers.
    """
    if b"mps_callback:" not in program:  # the usual case, at memory's speed
        return program, ()
    found: dict[bytes, int] = {}

    def ordinal(match: re.Match[bytes]) -> bytes:
        return b"mps_callback:%016x" % found.setdefault(match[0], len(found))

    renumbered = re.sub(_MARKER, ordinal, program)
    return renumbered, tuple(m.decode() for m in found)


def ordinals(markers: Sequence[str]) -> dict[str, str]:
    """Each marker's name in the form that `renumber` gives."""
    return {marker: f"mps_callback:{number:016x}" for number, marker in enumerate(markers)}


def call(target: str, config: Any, arrays: Sequence[Array], inputs: Sequence[TensorType], outputs: Sequence[TensorType]) -> list[Array]:
    """Run a custom call in Python: a callback of JAX, or a target of `calls.ffi`. Tokens order effects and reach no user code.

    The arrays must stay as they are for as long as anything refers to them: JAX may hand them to the user without a copy.

    Raises:
        CallbackGone: the function is dead.
        CallbackError: it raised, or its results are not what it announced.
    """
    from jax_mps.calls import ffi

    data = [a for a, t in zip(arrays, inputs, strict=True) if t.dtype != "token"]
    results = [t for t in outputs if t.dtype != "token"]
    if target == TARGET:
        callback = find(str(config))
        raw = run_user_code("callback", callback.function, data, {})
        narrow = callback.narrow
    else:
        raw = run_user_code(f"ffi target {target!r}", ffi.find(target), data, ffi.attributes(config))
        raw, narrow = as_tuple(raw, len(results)), True
    found = iter(check(raw, results, narrow=narrow))
    return [np.zeros((), bool) if t.dtype == "token" else next(found) for t in outputs]


def as_tuple(raw: Any, count: int) -> Any:
    """Results as a sequence, where one may have come bare and none as None."""
    if count == 0 and raw is None:
        return ()
    return raw if isinstance(raw, (list, tuple)) else (raw,)


def run_user_code(what: str, function: Callable[..., Any], arrays: Sequence[Array], keywords: dict[str, Any]) -> Any:
    """Call a user's function with the plugin's lock released, since it may dispatch, compile and wait."""
    from jax_mps.runtime import released

    with released():
        try:
            return function(*arrays, **keywords)
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            raise CallbackError(f"the Python {what} raised {type(error).__name__}: {error}\n{text}") from error


def check(raw: Any, results: Sequence[TensorType], *, narrow: bool) -> list[Array]:
    """The results as arrays of the announced types; JAX's own words where they are not."""
    if len(raw) != len(results):
        raise CallbackError(f"Mismatched number of outputs from callback. Expected: {len(results)}, Actual: {len(raw)}")
    return [_checked(i, np.asarray(value), kind, narrow) for i, (value, kind) in enumerate(zip(raw, results, strict=True))]


def _checked(index: int, value: Array, kind: TensorType, narrow: bool) -> Array:
    dtype = numpy_dtype(kind.dtype)
    if narrow and value.dtype != dtype and _NARROW.get(value.dtype.name) == dtype.name:
        value = value.astype(dtype)
    if value.shape != kind.shape:
        raise CallbackError(f"Incorrect output shape for return value #{index}: Expected: {kind.shape}, Actual: {value.shape}")
    if value.dtype != dtype:
        raise CallbackError(f"Incorrect output dtype for return value #{index}: Expected: {dtype}, Actual: {value.dtype}")
    return value
