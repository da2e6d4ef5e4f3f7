"""Loops of tiny steps: what a sampler's trajectory costs, and a loop that ends when its values say so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
from jax import lax

from benchmarks.harness import Row, Work, jax_calls

EVERY = 50  # MLX by hand: evaluated so often


def leapfrog(lib, q, p, scale):
    """One step on a funnel's density, about fifteen ops."""
    for _ in range(2):
        gradient = q / scale + 0.1 * lib.sin(q) * lib.exp(-q * q)
        p = p - 0.005 * gradient
        q = q + 0.01 * p
    return q, p


def trajectory(steps: int):
    def f(q: jax.Array, p: jax.Array, scale: jax.Array):
        def step(carry, _):
            carry = leapfrog(jnp, *carry, scale)
            return carry, jnp.sum(carry[0] * carry[0])

        return lax.scan(step, (q, p), None, length=steps)

    return f


def trajectory_mlx(steps: int, *arguments: np.ndarray):
    def make() -> Work:
        start = [mx.array(a) for a in arguments]

        @mx.compile
        def step(q, p, scale):
            q, p = leapfrog(mx, q, p, scale)
            return q, p, mx.sum(q * q)

        def once():
            q, p, scale = start
            energies = []
            for i in range(steps):
                q, p, energy = step(q, p, scale)
                energies.append(energy)
                if i % EVERY == EVERY - 1:
                    mx.async_eval(q, p, energies)
            return q, p, mx.stack(energies)

        def run(units: int) -> None:
            for _ in range(units):
                mx.eval(once())

        return Work(run, lambda: [np.array(a) for a in once()])

    return make


def newton(x: jax.Array):
    """Square roots to convergence of a slow iteration."""

    def body(carry):
        y, _, n = carry
        new = y + 0.02 * (x / y - y)
        return new, jnp.max(jnp.abs(new - y)), n + 1

    return lax.while_loop(lambda c: c[1] > 1e-4, body, (jnp.ones_like(x), jnp.float32(1), 0))


def newton_mlx(x: np.ndarray):
    def make() -> Work:
        held = mx.array(x)

        @mx.compile
        def body(y, x):
            new = y + 0.02 * (x / y - y)
            error = mx.max(mx.abs(new - y))
            return new, error

        def once():
            y, error, n = mx.ones_like(held), 1.0, 0
            while error > 1e-4:
                y, change = body(y, held)
                error, n = change.item(), n + 1
            return y, change, mx.array(n)

        def run(units: int) -> None:
            for _ in range(units):
                mx.eval(once())

        return Work(run, lambda: [np.array(a) for a in once()])

    return make


def rows(small: bool) -> list[Row]:
    steps = 200 if small else 1000
    state = np.linspace(-1, 1, 10, dtype=np.float32), np.linspace(1, -1, 10, dtype=np.float32), np.linspace(0.5, 2, 10, dtype=np.float32)
    x = np.linspace(0.5, 2, 100, dtype=np.float32)
    return [
        Row(f"scan of {steps} tiny steps", jax_calls(trajectory(steps), *state), trajectory_mlx(steps, *state), unit="scan"),
        Row("while until converged", jax_calls(newton, x), newton_mlx(x), rtol=1e-3, unit="loop"),
    ]
