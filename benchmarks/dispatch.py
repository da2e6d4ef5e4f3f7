"""What one call costs through mps and through JAX's own cpu backend, in one process, the two interleaved.

Run: python benchmarks/dispatch.py [--repeats N]. Each row: the medians over the repeats of one call's time on either backend, and the ratio
mps / cpu. Promised: at most 1.5 for `x + 1` on 4 floats, and `np.asarray` of 64 MiB in at most 1 ms on CPU.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable

os.environ.setdefault("JAX_PLATFORMS", "mps,cpu")

import jax
import jax.numpy as jnp
import numpy as np

MIB = 2**20
FOUR = np.zeros(4, np.float32)

Measure = Callable[[int], float]  # seconds of one call, from that many calls


def seconds(calls: Iterable[Callable[[], object]]) -> float:
    """Mean time of the calls; what is still running after the last one is awaited outside the time."""
    listed = list(calls)
    start = time.perf_counter()
    for call in listed:
        result = call()
    elapsed = time.perf_counter() - start
    jax.block_until_ready(result)
    return elapsed / len(listed)


def jitted(device: jax.Device, f: Callable[..., object], *arguments: np.ndarray) -> Callable[[], object]:
    placed = jax.device_put(arguments, device)
    compiled = jax.jit(f)
    jax.block_until_ready(compiled(*placed))
    return lambda: compiled(*placed)


def dispatch(device: jax.Device, f: Callable[..., object], *arguments: np.ndarray) -> Measure:
    """Calls one after another; nothing is awaited."""
    call = jitted(device, f, *arguments)
    return lambda calls: seconds([call] * calls)


def blocking(device: jax.Device, f: Callable[..., object], *arguments: np.ndarray) -> Measure:
    """Each result is awaited."""
    call = jitted(device, f, *arguments)
    return lambda calls: seconds([lambda: jax.block_until_ready(call())] * calls)


def chain(device: jax.Device) -> Measure:
    """Each call takes the one before; the last is awaited, inside the time."""
    step = jax.jit(lambda x: x + 1)
    start = jax.block_until_ready(step(jax.device_put(FOUR, device)))

    def run(calls: int) -> float:
        def whole() -> object:
            x = start
            for _ in range(calls):
                x = step(x)
            return jax.block_until_ready(x)

        return seconds([whole]) / calls

    return run


def to_host(device: jax.Device, nbytes: int) -> Measure:
    """`np.asarray` of evaluated arrays, each read for the first time (JAX keeps what it has read)."""
    base = jax.device_put(np.zeros(nbytes // 4, np.float32), device)
    step = jax.jit(lambda x, i: x + i)

    def run(calls: int) -> float:
        fresh = [jax.block_until_ready(step(base, np.float32(i))) for i in range(calls)]
        return seconds([lambda array=array: np.asarray(array) for array in fresh])

    return run


def from_host(device: jax.Device, nbytes: int) -> Measure:
    source = np.ones(nbytes // 4, np.float32)
    return lambda calls: seconds([lambda: jax.block_until_ready(jax.device_put(source, device))] * calls)


def mlp(x: jax.Array, *weights: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return x.sum()


def four_in_two_out(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    return a + b, c * d


def rows(device: jax.Device) -> dict[str, tuple[Measure, int]]:
    """Name → how it is measured, and how many calls make one measurement."""
    weights = [np.full((64, 64), 0.1, np.float32)] * 4
    x = np.ones((32, 64), np.float32)
    return {
        "x + 1, 4 floats": (dispatch(device, lambda x: x + 1, FOUR), 1000),
        "4 in, 2 out": (dispatch(device, four_in_two_out, FOUR, FOUR, FOUR, FOUR), 1000),
        "x + 1, each awaited": (blocking(device, lambda x: x + 1, FOUR), 200),
        "x + 1, chained": (chain(device), 500),
        "mlp gradient": (dispatch(device, jax.grad(mlp, argnums=(1, 2, 3, 4)), x, *weights), 50),
        "mlp gradient, each awaited": (blocking(device, jax.grad(mlp, argnums=(1, 2, 3, 4)), x, *weights), 50),
        "np.asarray, 4 floats": (to_host(device, 16), 100),
        "np.asarray, 64 MiB": (to_host(device, 64 * MIB), 3),
        "device_put, 4 floats": (from_host(device, 16), 100),
        "device_put, 64 MiB": (from_host(device, 64 * MIB), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name contains this")
    options = parser.parse_args()

    tables = {name: rows(jax.devices(name)[0]) for name in ("mps", "cpu")}
    print(f"jax {jax.__version__}, {jax.devices('mps')[0]} against {jax.devices('cpu')[0]}; microseconds, medians of {options.repeats}")
    print(f"{'':28} {'mps':>10} {'cpu':>10} {'mps / cpu':>10}")
    for name in tables["mps"]:
        if options.only not in name:
            continue
        times: dict[str, list[float]] = {"mps": [], "cpu": []}
        for repeat in range(options.repeats + 1):
            for backend in ("mps", "cpu"):
                measure, calls = tables[backend][name]
                if (taken := measure(calls)) and repeat:  # the first round warms up
                    times[backend].append(taken)
        mps, cpu = (statistics.median(times[backend]) * 1e6 for backend in ("mps", "cpu"))
        print(f"{name:28} {mps:10.1f} {cpu:10.1f} {mps / cpu:10.2f}", flush=True)


if __name__ == "__main__":
    main()
