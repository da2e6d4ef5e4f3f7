"""`jax.ffi` targets written in Python: functions of NumPy arrays, by name.

    jax_mps.register_ffi_target("rms", lambda x, eps: x / np.sqrt(np.mean(x * x) + eps))
    jax.ffi.ffi_call("rms", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, eps=np.float32(1e-6))

`jax.ffi.register_ffi_target(name, function, platform="mps")` does the same. A target that is compiled for cpu (a capsule registered with
platform="cpu") needs neither: it runs on the host through XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax_mps.errors import InvalidOption

_targets: dict[str, Callable[..., Any]] = {}


def register_ffi_target(name: str, function: Callable[..., Any]) -> None:
    """Let `function` answer for the custom call `name`. A later function replaces an earlier one.

    function: takes the operands as NumPy arrays and the call's attributes as keywords, returns the result or a sequence of results,
    whose shapes and dtypes must be those that the call announces.

    Raises:
        InvalidOption: the function is not callable.
    """
    if not callable(function):
        raise InvalidOption(f"the ffi target {name!r} for mps must be a Python function of NumPy arrays, not {type(function).__name__}")
    _targets[name] = function


def find(name: str) -> Callable[..., Any]:
    """The function registered under a name; KeyError if there is none."""
    return _targets[name]


def is_registered(name: str) -> bool:
    """Whether some function answers for the name."""
    return name in _targets


def named_in(program: bytes) -> tuple[str, ...]:
    """The registered names that a program's bytes hold, sorted. All that it calls are among them, unless a name is escaped in its text."""
    return tuple(sorted(name for name in _targets if name.encode() in program))


def attributes(config: Any) -> dict[str, Any]:
    """A call's attributes as keywords: the dictionary of the typed API, or the opaque string of the old one if it holds anything."""
    if isinstance(config, Mapping):
        return dict(config)
    return {"backend_config": config} if config else {}
