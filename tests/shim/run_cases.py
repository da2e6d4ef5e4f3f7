"""python run_cases.py MODULE CASE...: runs the cases in this process, one line "@ [name, outcome]" each."""

import importlib
import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def report(name, outcome):
    print("@", json.dumps([name, outcome]), flush=True)


if __name__ == "__main__":
    module = importlib.import_module(f"shim.{sys.argv[1]}")
    for name in sys.argv[2:]:
        report(name, "it did not end")
        try:
            getattr(module, f"case_{name}")()
        except BaseException:  # reported, and the next case runs
            report(name, traceback.format_exc())
        else:
            report(name, "ok")
