"""What it costs a float32 product of MLX how its operands lie: a weight's gradient, `x.T @ y` of `terms` rows, and a layer forward, `x @ w`.

python -m benchmarks.layouts [--small] [--dtype bfloat16]     microseconds, minima

`ops/dot.py` decides by such figures (of an H100) whether an operand is copied first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

_ROUNDS, _BYTES = 5, 4 << 30  # of results that wait at once
SHAPES = [(terms, m, n) for terms in (4096, 1024, 16384) for m, n in ((768, 2304), (768, 768), (768, 3072), (3072, 768), (2048, 2048), (512, 64))]
LARGE = [(4096, 768, 50304), (4096, 50304, 768)]
SMALL = [(256, 96, 288), (256, 288, 96)]


def microseconds(function: Callable[..., mx.array], *arrays: mx.array) -> float:
    """Of one call among many, at best."""
    mx.eval(arrays)
    result = function(*arrays)
    mx.eval(result)
    count = max(2, min(100, _BYTES // max(result.nbytes, 1)))
    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        mx.eval([function(*arrays) for _ in range(count)])
        best = min(best, (time.perf_counter() - start) / count)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="two small shapes, to see that it runs")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    dtype = getattr(mx, options.dtype)

    def random(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(dtype)

    print("| terms | m | n | x.T @ y | x copied | y copied | both | copy of x.T | of y.T | x @ w | w copied | copy of w.T |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for terms, m, n in SMALL if options.small else SHAPES + LARGE:
        x, y, w = random(terms, m), random(terms, n), random(m, n)
        across = [mx.contiguous(a.T) for a in (x, y, w)]
        mx.eval(across)
        xt, yt, wt = across
        times = [
            microseconds(lambda x, y: x.T @ y, x, y),
            microseconds(lambda x, y: x @ y, xt, y),
            microseconds(lambda x, y: x.T @ y.T, x, yt),
            microseconds(lambda x, y: x @ y.T, xt, yt),
            microseconds(mx.contiguous, x.T),
            microseconds(mx.contiguous, y.T),
            microseconds(lambda x, w: x @ w, x, w),
            microseconds(lambda x, w: x @ w.T, x, wt),
            microseconds(mx.contiguous, w.T),
        ]
        print(f"| {terms} | {m} | {n} |", " | ".join(f"{t:.1f}" for t in times), "|", flush=True)


if __name__ == "__main__":
    main()
