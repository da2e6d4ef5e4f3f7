"""Settings, read once from `JAX_MPS_*` environment variables. One clear error for a value that is not one of its own."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax_mps.errors import InvalidOption

_CHOICES = {
    "JAX_MPS_DEVICE": ("auto", "cpu", "gpu"),
    "JAX_MPS_HOST": ("allow", "needed", "error"),
    "JAX_MPS_COMPILE": ("auto", "0", "1"),
}
_COUNT, _MOST = "JAX_MPS_NUM_DEVICES", 1024


class Settings(NamedTuple):
    """What the user chose.

    device: MLX's device, `auto` for its default. host: `needed` sends no loop there only because it is faster there, `error` refuses what MLX
    cannot run, too. compile: `1` for `mx.compile` from the second call; `auto` for on a GPU only, large programs later (on CPU it runs g++ for
    1-2 s a kernel). num_devices: how many devices JAX sees, all of them MLX's one; None for JAX's own way of saying so (`compat.device_count`).
    """

    device: str = "auto"
    host: str = "allow"
    compile: str = "auto"
    num_devices: int | None = None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the environment.

        Raises:
            InvalidOption: a variable has a value that is not one of its choices.
        """
        chosen: dict[str, Any] = {}
        for name, choices in _CHOICES.items():
            value = environ.get(name, "") or choices[0]
            if value not in choices:
                raise InvalidOption(f"{name}={value!r}: choose one of {', '.join(choices)}")
            chosen[name.removeprefix("JAX_MPS_").lower()] = value
        count = environ.get(_COUNT, "")
        if count and not (count.isdecimal() and 1 <= int(count) <= _MOST):
            raise InvalidOption(f"{_COUNT}={count!r}: a number from 1 to {_MOST}")
        return cls(**chosen, num_devices=int(count) if count else None)


@functools.cache
def settings() -> Settings:
    """The process's settings."""
    return Settings.read(os.environ)
