"""Small linear algebra, single and batched: jax on mps beside jax on cpu, in turn, in one process.

python -m benchmarks.linalg [names...]     minima in microseconds
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax

FUNCTIONS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "cholesky": lambda a, b: jnp.linalg.cholesky(a),
    "cho_solve": lambda a, b: jsl.cho_solve((jnp.linalg.cholesky(a), True), b),
    "triangular_solve": lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
    "lu": lambda a, b: lax.linalg.lu(a)[0],
    "solve": lambda a, b: jnp.linalg.solve(a, b),
    "qr": lambda a, b: jnp.linalg.qr(a),
    "svd": lambda a, b: jnp.linalg.svd(a, full_matrices=False),
    "eigh": lambda a, b: jnp.linalg.eigh(a),
}
SHAPES = ((16, 16), (64, 64), (256, 256), (32, 16, 16), (16, 64, 64))
_ROUNDS = 4


def inputs(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A positive definite matrix, or a stack of them, and four right-hand sides."""
    random = np.random.default_rng(0)
    a = random.normal(size=shape).astype(np.float32)
    a = a @ np.swapaxes(a, -1, -2) / shape[-1] + np.eye(shape[-1], dtype=np.float32)
    return a, random.normal(size=(*shape[:-1], 4)).astype(np.float32)


def once(function: Callable[..., Any], arguments: tuple[jax.Array, ...]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started


def measure(name: str, shape: tuple[int, ...]) -> str:
    function = jax.jit(FUNCTIONS[name])
    sides = [jax.device_put(inputs(shape), jax.devices(platform)[0]) for platform in ("mps", "cpu")]
    for side in sides:
        once(function, side)
    repeats = 4 if shape[-1] == 256 else 12
    best = [min(times) for times in zip(*([min(once(function, s) for _ in range(repeats)) for s in sides] for _ in range(_ROUNDS)), strict=True)]
    return f"{best[0] * 1e6:,.0f} / {best[1] * 1e6:,.0f}"


def main() -> None:
    print("| mps / cpu, us |", *(f"{'x'.join(map(str, s))} |" for s in SHAPES))
    for name in sys.argv[1:] or FUNCTIONS:
        print(f"| {name} |", *(f"{measure(name, s)} |" for s in SHAPES), flush=True)


if __name__ == "__main__":
    main()
