"""`jax-mps info`: versions, the device, the BLAS, the cache, and what is degraded. A part that fails is shown, not raised."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

from jax_mps.cli import OK, WRONG, Answer, Table, add_command

PACKAGES = {
    "jax_mps": "jax-mps-mlx",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "mlx": "mlx",
    "mlx-cpu": "mlx-cpu",
    "mlx-cuda": "mlx-cuda-13",
    "mlx-metal": "mlx-metal",
    "scipy": "scipy",
}
NEEDED = ("jax", "jaxlib", "mlx")


def add_commands(commands: Any) -> None:
    """Add `info`."""
    add_command(commands, "info", info, "show versions, the device, the BLAS in use, the cache, and what is degraded")


def info(options: argparse.Namespace) -> Answer:
    """Ask each part; the exit code is 1 if the plugin cannot run here."""
    data: dict[str, Any] = {
        "versions": versions(),
        "device": asked(device),
        "blas": asked(blas),
        "cache": asked(cache),
        "degraded": asked(degraded),
    }
    works = all(data["versions"][name] for name in NEEDED) and "error" not in data["device"]
    return Answer(data | {"works": works}, table=Table(("", ""), rows(data, works)), code=OK if works else WRONG)


def versions() -> dict[str, str | None]:
    """Versions of what matters, None for what is not installed."""
    found: dict[str, str | None] = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def asked(question: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer to a question, or the sentence with which it failed."""
    try:
        return question()
    except Exception as error:  # a diagnosis must show every part that can be shown
        logging.getLogger(__name__).debug("asking %s", question.__name__, exc_info=True)
        return {"error": f"{type(error).__name__}: {error}"}


def device() -> dict[str, Any]:
    """MLX's device, as the plugin would use it."""
    from jax_mps.runtime import device as made

    found = made()
    return {"kind": found.kind, "architecture": found.architecture, "mlx": str(found.mlx)}


def blas() -> dict[str, Any]:
    """The BLAS that products on the CPU use, installed here as the plugin would."""
    from jax_mps.blas import install

    report = install()
    return {"library": report.library, "symbols": len(report.symbols), "reason": report.reason}


def cache() -> dict[str, Any]:
    """The state of the disk cache, cheaply."""
    from jax_mps.cache import Store

    store = Store()
    return {"folder": str(store.root), "unusable": store.unusable, "max_bytes": store.max_bytes, **store.saved_counts()}


def degraded() -> dict[str, Any]:
    """What mps goes without in this JAX: feature -> why. JAX makes its backends for it."""
    import jax

    from jax_mps import compat

    jax.devices(compat.PLATFORM)
    compat.cpu_call_targets()
    return {name: state.removeprefix("off: ") for name, state in compat.features().items() if state != "on"}


def rows(data: dict[str, Any], works: bool) -> list[tuple[str, ...]]:
    """The same for people."""
    lines = [(name, version) for name, version in data["versions"].items() if version]
    lines += [(name, "not installed") for name in NEEDED if not data["versions"][name]]
    for part in ("device", "blas", "cache"):
        lines.append((part, describe(data[part])))
    lines += [("degraded", f"{name}: {why}") for name, why in data["degraded"].items()] or [("degraded", "nothing")]
    return [*lines, ("works", "yes" if works else "no")]


def describe(part: dict[str, Any]) -> str:
    """One line."""
    return ", ".join(f"{name} {value}" for name, value in part.items() if value not in (None, ""))
