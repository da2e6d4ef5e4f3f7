"""An LSTM over 256 steps, and an epoch of an MLP's training in one scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jax import lax

from benchmarks.harness import Row, Work, jax_calls, jax_steps

R = np.random.default_rng(2)
RATE = 0.05


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return R.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def lstm(xs: jax.Array, wx: jax.Array, wh: jax.Array, bias: jax.Array) -> jax.Array:
    """xs: [steps, batch, features]; gates in mlx.nn's order i, f, g, o."""

    def step(carry: tuple[jax.Array, jax.Array], x: jax.Array):
        h, c = carry
        i, f, g, o = jnp.split(x @ wx.T + bias + h @ wh.T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((xs.shape[1], wh.shape[1]))
    return lax.scan(step, (zeros, zeros), xs)[1]


def lstm_mlx(xs: np.ndarray, wx: np.ndarray, wh: np.ndarray, bias: np.ndarray):
    def make() -> Work:
        model = nn.LSTM(wx.shape[1], wh.shape[1])
        model.Wx, model.Wh, model.bias = mx.array(wx), mx.array(wh), mx.array(bias)
        x = mx.array(xs.swapaxes(0, 1))
        mx.eval(model.parameters(), x)

        def run(units: int) -> None:
            for _ in range(units):
                mx.async_eval(h := model(x)[0])
            mx.eval(h)

        return Work(run, lambda: [np.array(model(x)[0]).swapaxes(0, 1)])

    return make


def loss_jax(params, x, y):
    (w1, b1), (w2, b2) = params
    logits = jax.nn.relu(x @ w1 + b1) @ w2 + b2
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=-1).mean()


def epoch_jax(params, xs, ys):
    def step(params, batch):
        loss, gradients = jax.value_and_grad(loss_jax)(params, *batch)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), loss

    return lax.scan(step, params, (xs, ys))


def epoch_mlx(params, xs: np.ndarray, ys: np.ndarray):
    def loss_of(params, x, y):
        (w1, b1), (w2, b2) = params
        return nn.losses.cross_entropy(nn.relu(x @ w1 + b1) @ w2 + b2, y, reduction="mean")

    gradient = mx.value_and_grad(loss_of)

    @mx.compile
    def step(params, x, y):
        loss, gradients = gradient(params, x, y)
        return [[p - RATE * g for p, g in zip(*pair, strict=True)] for pair in zip(params, gradients, strict=True)], loss

    def make() -> Work:
        held = [[[mx.array(p) for p in layer] for layer in params]]
        x, y = mx.array(xs), mx.array(ys)
        kept: list[np.ndarray] = []

        def run(units: int) -> None:
            for _ in range(units):
                losses = []
                for i in range(len(xs)):
                    held[0], loss = step(held[0], x[i], y[i])
                    losses.append(loss)
                    mx.async_eval(held[0], loss)
                if len(kept) < 4:
                    kept.append(np.array(mx.stack(losses)))
            mx.eval(held[0])

        return Work(run, lambda: kept)

    return make


def rows(small: bool) -> list[Row]:
    batch, width, steps = (8, 64, 64) if small else (32, 256, 256)
    weights = normal(4 * width, width, scale=0.08), normal(4 * width, width, scale=0.08), normal(4 * width, scale=0.1)
    xs = normal(steps, batch, width)
    count, hidden = (20, 64) if small else (468, 512)
    images, labels = normal(count, 128, 784), R.integers(0, 10, (count, 128)).astype(np.int32)
    params = [[normal(784, hidden, scale=0.05), np.zeros(hidden, np.float32)], [normal(hidden, 10, scale=0.05), np.zeros(10, np.float32)]]
    return [
        Row(f"lstm, {steps} steps", jax_calls(lstm, xs, *weights), lstm_mlx(xs, *weights), rtol=5e-3),
        Row(
            f"mlp epoch in a scan, {count} batches",
            jax_steps(epoch_jax, params, images, labels),
            epoch_mlx(params, images, labels),
            rtol=2e-2,
            unit="epoch",
        ),
    ]
