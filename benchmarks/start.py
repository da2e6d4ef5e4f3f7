"""One process of the start rows: import, build and run one training step; prints the seconds since the process was started.

Run by `python -m benchmarks`; alone: python -m benchmarks.start mps|mlx|xla SMALL START, where START is time.time() before the process.
"""

from __future__ import annotations

import os
import sys
import time


def main(backend: str, small: bool, start: float) -> None:
    if backend != "mlx":
        os.environ["JAX_PLATFORMS"] = "mps,cpu" if backend == "mps" else os.environ.get("BENCH_XLA", "cpu") + ",cpu"
    import mlx.core as mx  # creates no stream

    if mx.default_device().type == mx.cpu:
        mx.disable_compile()
    from benchmarks.rows import resnet

    (row,) = resnet.rows(small)
    if backend == "mlx":
        work = row.mlx()
    else:
        import jax

        work = row.jax(jax.devices()[0])
    work.run(1)
    sys.stdout.write(f"SECONDS {time.time() - start}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1", float(sys.argv[3]))
