"""Translation cost by program size: a deep chain, a wide graph, many slices of one array.

python -m benchmarks.translate [sizes...]     us of processor time per op, and what memory the process grew by
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import jax_mps.plan.translate as translation
from jax_mps.plan import build

_TYPE = "tensor<4xf32>"


def deep(ops: int) -> str:
    """One chain."""
    lines = [f"%{i + 1} = stablehlo.{'add' if i % 2 else 'multiply'} %{i}, %{i} : {_TYPE}" for i in range(ops)]
    return _module(f"%0: {_TYPE}", _TYPE, [*lines, f"return %{ops} : {_TYPE}"])


def wide(ops: int) -> str:
    """Independent pairs, summed by a tree."""
    leaves = (ops + 1) // 2
    lines = [f"%{i + 1} = stablehlo.tanh %0 : {_TYPE}" for i in range(leaves)]
    level, last = list(range(1, leaves + 1)), leaves
    while len(level) > 1:
        pairs = [(a, b) for a, b in zip(level[::2], level[1::2], strict=False)]
        lines += [f"%{last + 1 + i} = stablehlo.add %{a}, %{b} : {_TYPE}" for i, (a, b) in enumerate(pairs)]
        level = [last + 1 + i for i in range(len(pairs))] + level[2 * len(pairs) :]
        last += len(pairs)
    return _module(f"%0: {_TYPE}", _TYPE, [*lines, f"return %{level[0]} : {_TYPE}"])


def slices(ops: int) -> str:
    """Rows of one array, taken one by one and added up."""
    rows = ops // 2
    lines = [f"%{i + 1} = stablehlo.slice %0 [{i}:{i + 1}, 0:4] : (tensor<{rows}x4xf32>) -> tensor<1x4xf32>" for i in range(rows)]
    lines += [f"%{rows + i + 1} = stablehlo.add %{rows + i if i else 1}, %{i + 1} : tensor<1x4xf32>" for i in range(rows)]
    return _module(f"%0: tensor<{rows}x4xf32>", "tensor<1x4xf32>", [*lines, f"return %{2 * rows} : tensor<1x4xf32>"])


def _module(arguments: str, result: str, lines: list[str]) -> str:
    return f"module @m {{\nfunc.func public @main({arguments}) -> {result} {{\n" + "\n".join(lines) + "\n}\n}\n"


def measure(make: Callable[[int], str], ops: int) -> str:
    """One line: us per op, stage by stage."""
    module = build.parse(make(ops).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    build.build(module, translation.claims)
    built = time.process_time()
    translation.translate(module)
    ended = time.process_time()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    build_us, all_us = ((b - a) / ops * 1e6 for a, b in ((started, built), (built, ended)))
    return f"{make.__name__:8} {ops:6} ops: {all_us:6.1f} us/op, of which build {build_us:6.1f}   +{grown:.0f} MiB"


def main() -> None:
    translation.load_all()
    for ops in [int(a) for a in sys.argv[1:]] or [100, 1000, 5000, 20000]:
        for make in (deep, wide, slices):
            print(measure(make, ops), flush=True)


if __name__ == "__main__":
    main()
