"""sgemm 1024^3 through MLX: the stock wheel, after `jax_mps.blas.install`, and scipy's own BLAS, in one process.

Run: python benchmarks/blas.py [--size N] [--repeats N]. Prints medians and the two ratios the project promises:
at least 8 times the stock wheel and at least 0.8 of scipy.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from scipy.linalg.blas import sgemm

from jax_mps import blas


def median(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    n = options.size
    a, b = np.random.default_rng(0).normal(size=(2, n, n)).astype(np.float32)
    with mx.stream(mx.new_stream(mx.cpu)):
        x, y = mx.array(a), mx.array(b)
        stock = median(lambda: mx.eval(x @ y), 3)
        report = blas.install()
        print(f"library: {report.library or report.reason}")
        fortran = np.asfortranarray(a), np.asfortranarray(b)
        own, patched = [], []
        for _ in range(3):  # interleaved: the machine is shared
            own.append(median(lambda: sgemm(1.0, *fortran), options.repeats))
            patched.append(median(lambda: mx.eval(x @ y), options.repeats))
    own_time, patched_time = min(own), min(patched)
    for name, seconds in (("stock wheel", stock), ("patched", patched_time), ("scipy sgemm", own_time)):
        print(f"{name:12} {seconds * 1e3:8.2f} ms  {2 * n**3 / seconds / 1e9:7.1f} GFLOP/s")
    print(f"patched / stock: {stock / patched_time:.1f} x   patched / scipy: {own_time / patched_time:.2f} x")


if __name__ == "__main__":
    main()
