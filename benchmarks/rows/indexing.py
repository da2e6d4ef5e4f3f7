"""sort, top_k, segment_sum, and rows taken from a table."""

from __future__ import annotations

import jax
import mlx.core as mx
import numpy as np

from benchmarks.harness import Row, jax_calls, mlx_calls

R = np.random.default_rng(3)


def top_k_mlx(k: int):
    def f(x: mx.array):
        chosen = mx.argpartition(-x, k - 1, axis=-1)[..., :k]
        values = mx.take_along_axis(x, chosen, axis=-1)
        order = mx.argsort(-values, axis=-1)
        return mx.take_along_axis(values, order, axis=-1)

    return f


def rows(small: bool) -> list[Row]:
    n = 1 << (14 if small else 20)
    values = R.standard_normal(n, dtype=np.float32)
    table = values[: n // 1024 * 1024].reshape(-1, 1024)
    segments, bins = R.integers(0, 1000, n).astype(np.int32), 1000
    embedding, chosen = R.standard_normal((5000 if small else 50000, 256), dtype=np.float32), R.integers(0, 5000, 8192).astype(np.int32)
    return [
        Row(f"sort, {n >> 10} Ki", jax_calls(jax.numpy.sort, values), mlx_calls(mx.sort, values)),
        Row("top_k, 64 of 1024", jax_calls(lambda x: jax.lax.top_k(x, 64)[0], table), mlx_calls(top_k_mlx(64), table)),
        Row(
            f"segment_sum, {n >> 10} Ki",
            jax_calls(lambda x, i: jax.ops.segment_sum(x, i, bins), values, segments),
            mlx_calls(lambda x, i: mx.zeros((bins,)).at[i].add(x), values, segments),
        ),
        Row("take rows, 8192 x 256", jax_calls(lambda x, i: x[i], embedding, chosen), mlx_calls(lambda x, i: x[i], embedding, chosen)),
    ]
