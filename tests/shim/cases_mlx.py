"""JAX on the shim with MLX as the toy's engine: what only real arrays show."""

import gc
import threading

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from shim import toy

jax = toy.start("mlx")
jnp = jax.numpy


def case_chain():
    """100,000 lazy executions in a chain evaluate and go without recursion."""
    f = jax.jit(lambda x: x + 1)
    y = jax.device_put(np.zeros(4, np.float32))
    for _ in range(100_000):
        y = f(y)
    np.testing.assert_array_equal(y, np.full(4, 100_000))


def case_dropped_chain():
    """So does one that nobody reads."""
    f = jax.jit(lambda x: x + 1)
    y = jax.device_put(np.zeros(4, np.float32))
    for _ in range(100_000):
        y = f(y)
    del y
    gc.collect()


def case_views_are_contiguous():
    """What MLX broadcasts is contiguous before a pointer to it leaves."""
    y = jax.jit(lambda x: jnp.broadcast_to(x, (3, 4)))(jax.device_put(np.arange(4, dtype=np.float32)))
    np.testing.assert_array_equal(np.asarray(y), np.broadcast_to(np.arange(4), (3, 4)))


def case_threads():
    """Eight threads execute, share, read and drop arrays."""
    errors = []
    f = jax.jit(lambda x, y: jnp.sin(x) + y)

    def job(x):
        return x * 2

    g = jax.jit(job)
    shared = jax.device_put(np.arange(256, dtype=np.float32))

    def work(seed):
        try:
            x = shared
            expected = np.arange(256, dtype=np.float32)
            for i in range(100):
                x = f(x, shared) if i % 3 else g(x)
                expected = np.sin(expected) + np.arange(256, dtype=np.float32) if i % 3 else expected * 2
                if i % 10 == seed:
                    x.block_until_ready()
            np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
