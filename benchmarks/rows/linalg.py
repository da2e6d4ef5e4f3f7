"""A spectral step of a partial differential equation, and batched linear algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np

from benchmarks.harness import Row, Work, jax_calls, jax_steps

R = np.random.default_rng(4)
TIME = 1e-4


def heat(lib, u, wave):
    """One step of reaction and diffusion, diffusion in Fourier space."""
    reacted = u + TIME * (u - u * u * u)
    return lib.fft.irfft2(lib.fft.rfft2(reacted) * lib.exp(-TIME * wave))


def heat_mlx(u: np.ndarray, wave: np.ndarray):
    def make() -> Work:
        step = mx.compile(lambda u, wave: heat(mx, u, wave))
        held, w = [mx.array(u)], mx.array(wave)
        kept: list[np.ndarray] = []

        def run(units: int) -> None:
            for _ in range(units):
                held[0] = step(held[0], w)
                mx.async_eval(held[0])
                if len(kept) < 4:
                    kept.append(np.array(held[0][0]))
            mx.eval(held[0])

        return Work(run, lambda: kept)

    return make


def solve_jax(a, b):
    factor = jnp.linalg.cholesky(a)
    return jax.scipy.linalg.cho_solve((factor, True), b)


def solve_mlx(a: np.ndarray, b: np.ndarray):
    def make() -> Work:
        x, y = mx.array(a), mx.array(b)

        def f() -> mx.array:
            factor = mx.linalg.cholesky(x, stream=mx.cpu)
            return mx.linalg.solve_triangular(factor.swapaxes(-1, -2), mx.linalg.solve_triangular(factor, y, stream=mx.cpu), upper=True, stream=mx.cpu)

        def run(units: int) -> None:
            for _ in range(units):
                mx.eval(f())

        return Work(run, lambda: [np.array(f())])

    return make


def rows(small: bool) -> list[Row]:
    n = 64 if small else 1024
    frequencies = np.fft.fftfreq(n)[:, None] ** 2 + np.fft.rfftfreq(n)[None] ** 2
    wave = (4 * np.pi**2 * n**2 * frequencies).astype(np.float32)
    u = R.standard_normal((n, n), dtype=np.float32)

    def step(u: jax.Array, wave: jax.Array) -> tuple[jax.Array, jax.Array]:
        u = heat(jnp, u, wave)
        return u, u[0]

    batch, m = (4, 32) if small else (64, 128)
    half = R.standard_normal((batch, m, m), dtype=np.float32)
    a, b = half @ half.swapaxes(-1, -2) + m * np.eye(m, dtype=np.float32), R.standard_normal((batch, m, 4), dtype=np.float32)
    return [
        Row(f"fft step, {n} x {n}", jax_steps(step, u, wave), heat_mlx(u, wave), rtol=1e-3, unit="step"),
        Row(f"cholesky and solve, {batch} x {m}", jax_calls(solve_jax, a, b), solve_mlx(a, b), rtol=1e-3),
    ]
