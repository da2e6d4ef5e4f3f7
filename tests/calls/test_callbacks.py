"""The table of Python functions, and what becomes of their results."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from jax_mps.calls import callbacks, ffi
from jax_mps.calls.callbacks import TARGET, CallbackError, CallbackGone
from jax_mps.errors import InvalidOption
from jax_mps.plan.types import TensorType

F32 = TensorType((2,), "float32")
TOKEN = TensorType((), "token")
X = np.float32([1, 2])


def run(function: Any, *results: TensorType, narrow: bool = True) -> list[np.ndarray[Any, Any]]:
    callback = callbacks.register(function, results, narrow=narrow)
    return callbacks.call(TARGET, callback.marker, [X], [F32], results)


@pytest.mark.parametrize(
    ("returned", "result"),
    [((X,), F32), ([[1.0, 2.0]], F32), ((7,), TensorType((), "int32")), ((True,), TensorType((), "bool")), ((np.ones((0,)),), TensorType((0,), "float32"))],
    ids=["array", "list of floats", "int", "bool", "empty"],
)  # fmt: skip
def test_results_become_arrays(returned: Any, result: TensorType) -> None:
    """Python's literals are 32-bit where JAX's x64 flag is off."""
    [got] = run(lambda x: returned, result)
    assert (got.shape, got.dtype.name) == (result.shape, result.dtype)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((X, X), "Mismatched number of outputs from callback. Expected: 1, Actual: 2"),
        ((X[:1],), "Incorrect output shape for return value #0"),
        ((np.int32([1, 2]),), "Incorrect output dtype for return value #0"),
    ],
    ids=["number", "shape", "dtype"],
)
def test_results_are_checked(returned: Any, words: str) -> None:
    """In JAX's words."""
    with pytest.raises(CallbackError, match=words):
        run(lambda x: returned, F32)


def test_nothing_is_narrowed_with_x64() -> None:
    """As JAX has it on cpu."""
    with pytest.raises(CallbackError, match="dtype"):
        run(lambda x: ([1.0, 2.0],), F32, narrow=False)


def test_an_exception_keeps_its_text_and_traceback() -> None:
    """The user sees the line that raised."""

    def careless(x: Any) -> None:
        raise KeyError("the user's words")

    with pytest.raises(CallbackError, match="the user's words") as caught:
        run(careless)
    assert "in careless" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_tokens_reach_no_user_code() -> None:
    """They have their places among operands and results."""
    callback = callbacks.register(lambda x: (x + 1,), [F32], narrow=True)
    token, y = callbacks.call(TARGET, callback.marker, [np.zeros((), bool), X], [TOKEN, F32], [TOKEN, F32])
    assert token.shape == ()
    np.testing.assert_array_equal(y, X + 1)


def test_a_dead_function_is_an_error() -> None:
    """The table keeps nothing alive."""
    marker = callbacks.register(lambda: (), [], narrow=True).marker
    gc.collect()
    with pytest.raises(CallbackGone, match="gone"):
        callbacks.find(marker)


def test_renumbering() -> None:
    """Two processes' programs become one form; the markers come in the order of the ordinals."""

    def program(first: str, second: str) -> bytes:
        return f'"{second}" ... "{first}" ... "{second}"'.encode()

    ours = [callbacks.register(print, [], narrow=True).marker for _ in range(2)]
    theirs = ["mps_callback:00000000deadbeef", "mps_callback:0000000000000000"]
    form, markers = callbacks.renumber(program(*ours))
    again, others = callbacks.renumber(program(*theirs))
    assert form == again == program("mps_callback:0000000000000001", "mps_callback:0000000000000000")
    assert (list(markers), list(others)) == (ours[::-1], theirs[::-1])


def test_a_program_without_callbacks_is_as_it_was() -> None:
    """Renumbering is free for the rest."""
    assert callbacks.renumber(b"ML\xefR") == (b"ML\xefR", ())


@pytest.mark.parametrize(
    ("function", "config", "result"),
    [
        (lambda x, scale: x * scale, {"scale": 3}, X * 3),
        (lambda x: [x + 1], "", X + 1),
        (lambda x, backend_config: x * len(backend_config), "ab", X * 2),
        (lambda x: x.astype(np.float64), {}, X),
    ],
    ids=["attributes", "a list", "opaque string", "narrowed"],
)
def test_ffi_targets(function: Any, config: Any, result: Any) -> None:
    """A Python function answers for a custom call; the call's attributes are its keywords."""
    ffi.register_ffi_target("test_target", function)
    [got] = callbacks.call("test_target", config, [X], [F32], [F32])
    np.testing.assert_array_equal(got, result)
    assert got.dtype == np.float32


def test_an_ffi_target_must_be_callable() -> None:
    """A capsule belongs to platform cpu."""
    with pytest.raises(InvalidOption, match="Python function"):
        ffi.register_ffi_target("test_capsule", object())
