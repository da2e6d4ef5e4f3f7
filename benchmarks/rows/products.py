"""Single ops that fill the chip: products, a convolution, elementwise chains, softmax, random numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np

from benchmarks.harness import Row, Work, jax_calls, mlx_calls, mlx_leaves

R = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return R.standard_normal(shape, dtype=np.float32)


def chain_jax(x):
    return jnp.tanh(x * 2 + 1) * x - jnp.exp(-x * x)


def chain_mlx(x):
    return mx.tanh(x * 2 + 1) * x - mx.exp(-x * x)


def conv_jax(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "OHWI", "NHWC"))


def conv_mlx(x, w):
    return mx.conv2d(x, w, padding=1)


def half_jax(a, b):
    return (a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)).astype(jnp.float32)


def half_mlx(a, b):
    return (a.astype(mx.bfloat16) @ b.astype(mx.bfloat16)).astype(mx.float32)


def rows(small: bool) -> list[Row]:
    n = 256 if small else 4096
    square = normal(n, n), normal(n, n)
    image = normal(4 if small else 64, 32 if small else 56, 32 if small else 56, 64)
    kernel = normal(64, 3, 3, 64) / 24
    chain = normal(1 << (18 if small else 26))
    return [
        Row(f"matmul {n}, float32", jax_calls(jnp.matmul, *square), mlx_calls(mx.matmul, *square), rtol=2e-3),
        Row(f"matmul {n}, bfloat16", jax_calls(half_jax, *square), mlx_calls(half_mlx, *square), rtol=1e-2),
        Row("conv 3x3, 64 channels", jax_calls(conv_jax, image, kernel), mlx_calls(conv_mlx, image, kernel), rtol=2e-3),
        Row(f"elementwise, {chain.nbytes >> 20} MiB", jax_calls(chain_jax, chain), mlx_calls(chain_mlx, chain)),
        Row(
            "softmax",
            jax_calls(lambda x: jax.nn.softmax(x), square[0]),
            mlx_calls(lambda x: mx.softmax(x, axis=-1, precise=True), square[0]),
        ),
        Row(f"random normal, {n * n >> 10} Ki", random_jax(n * n), random_mlx(n * n), rtol=10),
    ]


def random_jax(n: int):
    return jax_calls(lambda k: jax.random.normal(jax.random.wrap_key_data(k), (n,)), np.array([0, 1], np.uint32))


def random_mlx(n: int):
    """Other numbers, of the same distribution."""

    def make() -> Work:
        key = mx.random.key(1)

        def run(units: int) -> None:
            for _ in range(units):
                x = mx.random.normal((n,), key=key)
                mx.async_eval(x)
            mx.eval(x)

        return Work(run, lambda: mlx_leaves(mx.random.normal((n,), key=key)))

    return make
