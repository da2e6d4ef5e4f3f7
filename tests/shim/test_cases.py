"""The shim's behaviour: the cases of each module, run in a process of their own."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CASES = {path.stem: re.findall(r"^def case_(\w+)", path.read_text(), re.M) for path in sorted(HERE.glob("cases_*.py"))}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in CASES.items() for name in names])
def test_case(module, name, results):
    results.check(module, name, CASES[module])
