"""Copies between host and device. What is read was computed on the device, and each array is read once: JAX keeps what it has read."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import mlx.core as mx
import numpy as np

from benchmarks.harness import Row, Work

MIB = 1 << 20


def timed(calls: list[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def get(nbytes: int) -> Callable[[jax.Device], Work]:
    def make(device: jax.Device) -> Work:
        base = jax.device_put(np.ones(nbytes // 4, np.float32), device)
        step = jax.jit(lambda x, i: x + i)

        def sample(units: int) -> float:
            units_done = 0.0
            for i in range(units):  # one at a time: the memory of many would not fit
                fresh = jax.block_until_ready(step(base, np.float32(i)))
                units_done += timed([partial(np.asarray, fresh)])
            return units_done

        return Work(sample, lambda: [np.asarray(step(base, np.float32(1)))], sample)

    return make


def get_mlx(nbytes: int) -> Callable[[], Work]:
    def make() -> Work:
        base = mx.array(np.ones(nbytes // 4, np.float32))

        def fresh(i: int) -> mx.array:
            y = base + i
            mx.eval(y)
            return y

        def sample(units: int) -> float:
            return sum(timed([partial(np.array, fresh(i))]) for i in range(units))

        return Work(sample, lambda: [np.array(fresh(1))], sample)

    return make


def put(nbytes: int) -> Callable[[jax.Device], Work]:
    source = np.ones(nbytes // 4, np.float32)

    def make(device: jax.Device) -> Work:
        def run(units: int) -> None:
            for _ in range(units):
                jax.block_until_ready(jax.device_put(source, device))

        return Work(run, lambda: [source])

    return make


def put_mlx(nbytes: int) -> Callable[[], Work]:
    source = np.ones(nbytes // 4, np.float32)

    def make() -> Work:
        def run(units: int) -> None:
            for _ in range(units):
                mx.eval(mx.array(source))

        return Work(run, lambda: [source])

    return make


def used(nbytes: int) -> Callable[[jax.Device], Work]:
    source = np.ones(nbytes // 4, np.float32)

    def make(device: jax.Device) -> Work:
        total = jax.jit(lambda x: x[:2] + 1)

        def run(units: int) -> None:
            for _ in range(units):
                jax.block_until_ready(total(jax.device_put(source, device)))

        return Work(run, lambda: [total(jax.device_put(source, device))])

    return make


def used_mlx(nbytes: int) -> Callable[[], Work]:
    source = np.ones(nbytes // 4, np.float32)

    def make() -> Work:
        total = mx.compile(lambda x: x[:2] + 1)

        def run(units: int) -> None:
            for _ in range(units):
                mx.eval(total(mx.array(source)))

        return Work(run, lambda: [np.array(total(mx.array(source)))])

    return make


def rows(small: bool) -> list[Row]:
    large = (8 if small else 64) * MIB
    name = f"{large // MIB} MiB"
    return [
        Row("to host, 4 B", get(4), get_mlx(4)),
        Row(f"to host, {name}", get(large), get_mlx(large)),
        Row("from host, 4 B", put(4), put_mlx(4)),
        Row(f"from host, {name}", put(large), put_mlx(large)),
        Row(f"from host and used, {name}", used(large), used_mlx(large)),
    ]
