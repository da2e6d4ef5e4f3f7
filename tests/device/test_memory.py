"""Memory: a training loop's does not grow, donated arrays' is used again, a loop works in place."""

import gc

import jax
import jax.numpy as jnp
import pytest

from .programs import run

LOOP = """
import jax, jax.numpy as jnp, numpy as np
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096
def loss(p, x, y): return jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2)
@jax.jit
def step(p, m, x, y):
    g = jax.grad(loss)(p, x, y)
    m = jax.tree.map(lambda m, g: 0.9 * m + g, m, g)
    return jax.tree.map(lambda p, m: p - 0.01 * m, p, m), m
p = {"a": jnp.full((64, 64), 0.01), "b": jnp.full((64, 8), 0.01)}
m = jax.tree.map(jnp.zeros_like, p)
x, y = np.ones((16, 64), np.float32), np.ones((16, 8), np.float32)
seen = []
for i in range(1500):
    p, m = step(p, m, x, y)
    if i % 100 == 99:
        jax.block_until_ready(p)
        seen.append(rss())
slope = np.polyfit(np.arange(10) * 100, seen[-10:], 1)[0]
print(round(slope), seen)
assert slope < 1024, "bytes per step"
"""

DONATED = """
import jax, jax.numpy as jnp, mlx.core as mx
step = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
x = jax.block_until_ready(step(jnp.arange(1 << 22, dtype=jnp.float32)))
mx.reset_peak_memory()
before = mx.get_active_memory()
for _ in range(5):
    x = jax.block_until_ready(step(x))
print(before, mx.get_peak_memory())
assert mx.get_peak_memory() < before + (1 << 20)
assert jax.devices()[0].memory_stats()["bytes_in_use"] >= 1 << 24
"""

IN_PLACE = """
import jax, mlx.core as mx, jax.numpy as jnp
f = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c * 0.5, c), x, None, length=1000))
x = jnp.ones((1024,))
jax.block_until_ready(f(x))
mx.reset_peak_memory()
before = mx.get_active_memory()
jax.block_until_ready(f(x))
print(mx.get_peak_memory() - before)
assert mx.get_peak_memory() - before < 3 * 1000 * 4096  # two copies: the zeros that it starts from, and the result
"""


@pytest.mark.parametrize("program", [LOOP, DONATED, IN_PLACE], ids=["training", "donated", "loop"])
def test_memory(program, tmp_path):
    run(program, tmp_path)


def test_compiling_leaves_no_cycles() -> None:
    """What a translation made goes when it is done: the garbage collector finds nothing of ours, and no array of MLX's tracing."""

    def f(x: jax.Array) -> jax.Array:
        y = jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x)
        return jax.lax.fori_loop(0, 9, lambda i, v: jnp.linalg.cholesky(v @ v.T + jnp.eye(3)), y).sum()

    x = jnp.eye(3)
    jax.block_until_ready(jax.jit(f)(x))  # whatever is imported or made once
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        jax.block_until_ready(jax.jit(lambda x: f(x) + 1)(x))
        gc.collect()
        found = {type(o).__module__ for o in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert not [name for name in found if name.startswith(("jax_mps", "mlx"))]
