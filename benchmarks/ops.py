"""Where the time of ResNet18's training step goes, op by op: jax on mps beside jax on cpu, in turn, in one process.

python -m benchmarks.ops [--batch 16] [--rounds 5]     milliseconds, minima

Each op of the step that is not elementwise is compiled by itself, on either platform, and timed with inputs of its shapes; one that occurs
several times counts as often. The rest is the whole step less their sum: elementwise ops and views, which XLA fuses.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core

from benchmarks.rows import resnet

PLATFORMS = ("mps", "cpu")
# jaxprs' names. Of a convolution's gradients, that of the input dilates the output's gradient or turns the kernel, that of the kernel contracts the batch.
HEAVY = ("conv_general_dilated", "dot_general", "reduce_sum", "reduce_max", "argmax", "gather", "scatter-add")


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those of called functions included."""
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if isinstance(v, (core.Jaxpr, core.ClosedJaxpr))]
        if not inner:
            yield equation
        for called in inner:
            yield from equations(getattr(called, "jaxpr", called))


def name(equation: Any) -> str:
    if equation.primitive.name != "conv_general_dilated":
        return equation.primitive.name.replace("_", " ")
    specs = equation.params["dimension_numbers"]
    if specs.lhs_spec[0] != 0:
        return "convolution: gradient of the kernel"
    return "convolution: gradient of the input" if specs.rhs_spec[0] != 3 else "convolution"


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start)


def placed(values: Any, platform: str) -> Any:
    return jax.device_put(values, jax.devices(platform)[0])


def example(aval: Any) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.random(aval.shape, np.float32).astype(aval.dtype)


def in_turns(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The least milliseconds of each; the first call compiles."""
    for run in runs:
        timed(run)
    return [min(times) for times in zip(*([timed(run) for run in runs] for _ in range(rounds)), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    step, state = resnet.training()
    batch = random.standard_normal((options.batch, 32, 32, 3), np.float32), random.integers(0, 10, options.batch).astype(np.int32)
    jaxpr = jax.make_jaxpr(step)(state, *batch).jaxpr

    found: dict[str, Any] = {}
    times = Counter[str]()
    for equation in equations(jaxpr):
        if equation.primitive.name in HEAVY:
            key = f"{name(equation)} {[v.aval.str_short() for v in equation.invars]} {equation.params}"
            times[key] += 1
            found.setdefault(key, equation)
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for key, equation in found.items():
        values = [example(v.aval) for v in equation.invars]
        function = jax.jit(partial(equation.primitive.bind, **equation.params))
        took = in_turns([partial(function, *placed(values, platform)) for platform in PLATFORMS], options.rounds)
        row = total[name(equation)]
        row[0] += times[key]
        for i, milliseconds in enumerate(took):
            row[1 + i] += times[key] * milliseconds
    whole = in_turns([partial(jax.jit(step), *placed((state, *batch), platform)) for platform in PLATFORMS], options.rounds)
    for i, milliseconds in enumerate(whole):
        total["the rest"][1 + i] = milliseconds - sum(row[1 + i] for row in total.values())
    total["the whole step"][1:] = whole

    print("| op | times | mps, ms | XLA, ms | mps / XLA | of the difference, ms |\n|---|---|---|---|---|---|")
    for row_name, (count, ours, theirs) in total.items():
        print(f"| {row_name} | {count:.0f} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {ours - theirs:+.1f} |")


if __name__ == "__main__":
    main()
