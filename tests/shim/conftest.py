"""Cases run in processes of their own: there is one shim in a process, and the toy must not meet the real plugin.

A module cases_NAME.py has functions case_NAME(); they share one process, and a crash fails the case in which it happened.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RUNNER = HERE / "run_cases.py"


def run_process(args, timeout=120, **options):
    """The finished process of this Python, with its output."""
    env = os.environ | {"JAX_PLATFORMS": "", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env, cwd=HERE.parent, **options)


class Results:
    """Runs a module's cases once, when the first of them is asked for."""

    def __init__(self):
        self.modules = {}

    def check(self, module, name, names):
        if module not in self.modules:
            done = run_process([RUNNER, module, *names], timeout=250)
            rows = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("@ ")]
            self.modules[module] = dict(rows), done
        outcomes, done = self.modules[module]
        ended = f"the process ended with {done.returncode}\n{done.stderr[-4000:]}"
        outcome = outcomes.get(name, "it was not reached")
        if outcome != "ok":
            pytest.fail(outcome if outcome.startswith("Traceback") else f"{outcome}; {ended}", pytrace=False)
        assert done.returncode == 0, ended


@pytest.fixture(scope="session")
def results():
    return Results()


@pytest.fixture
def python():
    return run_process
