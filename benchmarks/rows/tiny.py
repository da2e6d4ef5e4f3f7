"""Programs that cost nothing but the call."""

from __future__ import annotations

import jax
import mlx.core as mx
import numpy as np

from benchmarks.harness import Row, Work, jax_calls, jax_steps, mlx_calls

FOUR = np.arange(4, dtype=np.float32)
HUNDRED = [np.full(4, i, np.float32) for i in range(100)]


def hundred(*xs):
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


def chain() -> Work:
    """Each call takes the one before; evaluation starts at every call, as MLX users do."""
    step = mx.compile(lambda x: x + 1)
    held = [mx.array(FOUR)]
    first = [FOUR + i + 1 for i in range(4)]

    def run(units: int) -> None:
        for _ in range(units):
            held[0] = step(held[0])
            mx.async_eval(held[0])
        mx.eval(held[0])

    return Work(run, lambda: first)


def awaited(device: jax.Device) -> Work:
    x = jax.device_put(FOUR, device)
    f = jax.jit(lambda x: x + 1)

    def run(units: int) -> None:
        for _ in range(units):
            jax.block_until_ready(f(x))

    return Work(run, lambda: [f(x)])


def awaited_mlx() -> Work:
    x = mx.array(FOUR)
    f = mx.compile(lambda x: x + 1)

    def run(units: int) -> None:
        for _ in range(units):
            mx.eval(f(x))

    return Work(run, lambda: [np.array(f(x))])


def rows(small: bool) -> list[Row]:
    plus_one, pair = (lambda x: x + 1), (lambda a, b, c, d: (a + b, c * d))
    return [
        Row("x + 1", jax_calls(plus_one, FOUR), mlx_calls(plus_one, FOUR)),
        Row("x + 1, each awaited", awaited, awaited_mlx),
        Row("x + 1, chained", jax_steps(lambda x: (x + 1, x + 1), FOUR, donate=False), chain),
        Row("4 in, 2 out", jax_calls(pair, *[FOUR] * 4), mlx_calls(pair, *[FOUR] * 4)),
        Row("100 inputs", jax_calls(hundred, *HUNDRED), mlx_calls(hundred, *HUNDRED)),
    ]
