"""JAX's entry point: register the platform `mps`, or say in one sentence why not and leave JAX as it is.

With JAX_PLATFORMS unset, mps is the default backend (priority 400; cpu has 0, cuda 500) wherever MLX is usable. With JAX_PLATFORMS set to
others only, nothing is imported and nothing registered.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import sys
from contextlib import suppress
from typing import Any

from jax_mps.errors import JaxMpsError

log = logging.getLogger(__name__)

PRIORITY = 400
_OWN = "jax_mps.plugin"
_MINIMUM_MLX = (0, 32, 4)


class _Unusable(Exception):
    """Why the platform is not registered, in a sentence for the user."""


def initialize() -> None:
    """Register the platform, once. Called by JAX before it makes its first backend."""
    from jax_mps import compat

    chosen = compat.jax_config().jax_platforms
    if chosen and compat.PLATFORM not in chosen.split(","):
        log.debug("jax_platforms is %r: mps is not registered", chosen)
        return
    collects = gc.isenabled()
    gc.disable()  # imports leave no garbage, but enough objects to set off a pass over all of JAX's (50 ms), now or soon after
    try:
        _register()
    finally:
        if not gc.get_freeze_count():  # what there is counts as old from here on, JAX's modules among them; user code may have frozen its own
            gc.freeze()
            gc.unfreeze()
        if collects:
            gc.enable()


def _register() -> None:
    from jax_mps import compat

    try:
        _refuse_another_plugin()
        _require_mlx()
        capsule = _capsule()
    except _Unusable as error:
        log.warning("The mps platform is not available: %s", error)
        return
    compat.install_before()
    compat.register_plugin(capsule, priority=PRIORITY)
    compat.install()


def _refuse_another_plugin() -> None:
    """JAX would make a platform of the name twice, the two in any order."""
    others: list[str] = []
    if _packages_with_plugins() > 1:
        from importlib.metadata import entry_points

        others = [f"{e.dist.name} ({e.value})" if e.dist else e.value for e in entry_points(group="jax_plugins", name="mps") if e.value != _OWN]
    if not others and "jax_plugins" in sys.modules and importlib.util.find_spec("jax_plugins.mps") is not None:
        others = ["the module jax_plugins.mps"]
    if others:
        raise _Unusable(f"another plugin for it is installed, {', '.join(others)}; uninstall that one or jax-mps-mlx.")


def _packages_with_plugins() -> int:
    """How many installed packages announce plugins for JAX: what `importlib.metadata` reads, in a third of its time."""
    found = 0
    for folder in sys.path:
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if name.endswith((".dist-info", ".egg-info")):
                with suppress(OSError), open(f"{folder or '.'}/{name}/entry_points.txt", "rb", buffering=0) as file:
                    found += b"[jax_plugins]" in file.read()
    return found


def _require_mlx() -> None:
    try:
        mx: Any = importlib.import_module("mlx.core")
    except ImportError as error:
        extra = "; on Linux, install jax-mps-mlx[cpu] or jax-mps-mlx[cuda], which bring MLX's library" if sys.platform == "linux" else ""
        raise _Unusable(f"MLX cannot be imported ({error}){extra}.") from error
    found = tuple(int(n) for n in mx.__version__.split(".")[:3] if n.isdigit())
    if found < _MINIMUM_MLX:
        raise _Unusable(f"MLX {mx.__version__} is installed, {'.'.join(map(str, _MINIMUM_MLX))} or later is needed.")


def _capsule() -> object:
    """The PJRT table, its hooks installed."""
    try:
        from jax_mps.pjrt import entry

        return entry.install()
    except ImportError as error:
        raise _Unusable(f"this installation of jax-mps-mlx is incomplete ({error}).") from error
    except (JaxMpsError, RuntimeError, OSError) as error:
        raise _Unusable(f"MLX's device cannot be used ({error}).") from error
