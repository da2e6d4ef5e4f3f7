"""Run a program in a process of its own, with a cache folder that the test chose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELUDE = """
import json, os, sys
import numpy as np
import jax, jax.numpy as jnp
from jax import lax
import jax_mps

if os.environ.get("NO_TRANSLATION"):  # on lines that are always there: a program's raw bytes name its source lines
    import jax_mps.pjrt.client as _client
    def _refuse(*a, **k): raise AssertionError("translated, where the program should have been found on disk")
    _client.Client.translate = _refuse
    if os.environ["NO_TRANSLATION"] == "nor MLIR": _client.Client.load_or_translate = _refuse

def report(**values):
    print("REPORT " + json.dumps({"stats": jax_mps.stats(), **values}))
"""


@dataclass(frozen=True)
class Ran:
    """What a program printed through `report`, and how it ended."""

    code: int
    report: dict[str, Any]
    output: str

    @property
    def stats(self) -> dict[str, int]:
        return self.report["stats"]


def start(source: str, cache: Path, prelude: str = PRELUDE, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start a program; it sees only mps unless `JAX_PLATFORMS` is given."""
    env = {**os.environ, "JAX_PLATFORMS": "mps", "JAX_MPS_CACHE_DIR": str(cache), **environment}
    text = prelude + textwrap.dedent(source)
    return subprocess.Popen([sys.executable, "-c", text], env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 120, check: bool = True) -> Ran:
    """Wait for a program; with `check`, it must have ended well."""
    output, _ = process.communicate(timeout=timeout)
    lines = [line for line in output.splitlines() if line.startswith("REPORT ")]
    ran = Ran(process.returncode, json.loads(lines[-1].removeprefix("REPORT ")) if lines else {}, output)
    assert not check or ran.code == 0, output
    return ran


def run(source: str, cache: Path, check: bool = True, timeout: float = 120, **environment: str) -> Ran:
    """Run a program to its end."""
    return finish(start(source, cache, **environment), timeout, check)
