"""GPT-2: a training step with AdamW, and decoding with a cache of keys and values; plain JAX against mlx.nn and mx.fast, from the same weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import optax
from jax import lax

from benchmarks.harness import Row, Work, jax_steps

Params = dict[str, Any]
RATE = 1e-4


@dataclass(frozen=True)
class Config:
    vocabulary: int
    context: int
    layers: int
    width: int
    heads: int


SMALL, GPT2 = Config(512, 64, 2, 128, 4), Config(50304, 1024, 12, 768, 12)


def initial(config: Config) -> Params:
    """GPT-2's own distribution, as NumPy arrays; matrices are (in, out)."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def affine(rows: int, columns: int) -> Params:
        return {"weight": normal(rows, columns), "bias": np.zeros(columns, np.float32)}

    def norm() -> Params:
        return {"weight": np.ones(config.width, np.float32), "bias": np.zeros(config.width, np.float32)}

    w = config.width
    layers = [
        {"norm1": norm(), "qkv": affine(w, 3 * w), "proj": affine(w, w), "norm2": norm(), "up": affine(w, 4 * w), "down": affine(4 * w, w)}
        for _ in range(config.layers)
    ]
    return {
        "tokens": {"weight": normal(config.vocabulary, w)},
        "positions": {"weight": normal(config.context, w)},
        "layers": layers,
        "norm": norm(),
    }


# ---- JAX -----------------------------------------------------------------------------------------------------------------------------


def layer_norm(p: Params, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p["weight"] + p["bias"]


def linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["weight"] + p["bias"]


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1).swapaxes(-2, -3)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    mixed = (jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v).swapaxes(-2, -3)
    return mixed.reshape(*mixed.shape[:-2], -1)


def mlp(p: Params, x: jax.Array) -> jax.Array:
    return linear(p["down"], jax.nn.gelu(linear(p["up"], layer_norm(p["norm2"], x))))


def logits_of(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    length = tokens.shape[-1]
    visible = jnp.tril(jnp.ones((length, length), bool))
    x = params["tokens"]["weight"][tokens] + params["positions"]["weight"][:length]
    for p in params["layers"]:
        q, k, v = (split_heads(y, config.heads) for y in jnp.split(linear(p["qkv"], layer_norm(p["norm1"], x)), 3, axis=-1))
        x = x + linear(p["proj"], attend(q, k, v, visible))
        x = x + mlp(p, x)
    return layer_norm(params["norm"], x) @ params["tokens"]["weight"].T


def train_in_jax(config: Config, inputs: np.ndarray, targets: np.ndarray):
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.99, weight_decay=0.01)

    def step(state: Any, inputs: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state

        def loss_of(params: Params) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, inputs, config), targets).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def make(device: jax.Device) -> Work:
        params = initial(config)
        with jax.default_device(device):
            moments = optimizer.init(jax.device_put(params, device))
        return jax_steps(step, (params, moments), inputs, targets)(device)

    return make


def decode_in_jax(config: Config, start: int):
    def step(state: Any, params: Params) -> tuple[Any, jax.Array]:
        token, position, keys, values = state
        visible = jnp.arange(config.context) <= position
        x = params["tokens"]["weight"][token] + lax.dynamic_index_in_dim(params["positions"]["weight"], position)
        new_keys, new_values = [], []
        for p, k, v in zip(params["layers"], keys, values, strict=True):
            q, k_now, v_now = (split_heads(y, config.heads) for y in jnp.split(linear(p["qkv"], layer_norm(p["norm1"], x)), 3, axis=-1))
            new_keys.append(lax.dynamic_update_slice(k, k_now, (0, position, 0)))
            new_values.append(lax.dynamic_update_slice(v, v_now, (0, position, 0)))
            x = x + linear(p["proj"], attend(q, new_keys[-1], new_values[-1], visible))
            x = x + mlp(p, x)
        logits = (layer_norm(params["norm"], x) @ params["tokens"]["weight"].T)[-1]
        token = jnp.argmax(logits)[None].astype(jnp.int32)
        position = jnp.where(position + 1 == config.context, start, position + 1)
        return (token, position, new_keys, new_values), logits

    def make(device: jax.Device) -> Work:
        cache = empty_cache(config)
        state = (np.array([1], np.int32), np.int32(start), cache, cache)
        return jax_steps(step, state, initial(config))(device)

    return make


def empty_cache(config: Config) -> list[np.ndarray]:
    shape = (config.heads, config.context, config.width // config.heads)
    return [np.zeros(shape, np.float32)] * config.layers


# ---- MLX -----------------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        w = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.qkv, self.proj = nn.Linear(w, 3 * w), nn.Linear(w, w)
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def __call__(self, x: mx.array, mask: Any, cache: list[mx.array] | None = None, position: int = 0) -> mx.array:
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1).swapaxes(-2, -3) for y in mx.split(self.qkv(self.norm1(x)), 3, axis=-1))
        if cache is not None:
            cache[0][:, :, position : position + 1] = k
            cache[1][:, :, position : position + 1] = v
            k, v = cache[0][:, :, : position + 1], cache[1][:, :, : position + 1]
        mixed = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
        x = x + self.proj(mixed.swapaxes(-2, -3).flatten(-2))
        return x + self.down(nn.gelu_approx(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(config.vocabulary, config.width), nn.Embedding(config.context, config.width)
        self.layers = [Layer(config) for _ in range(config.layers)]
        self.norm = nn.LayerNorm(config.width)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.tokens(tokens) + self.positions(mx.arange(tokens.shape[-1]))
        for layer in self.layers:
            x = layer(x, "causal")
        return self.tokens.as_linear(self.norm(x))

    def decode(self, token: mx.array, cache: list[list[mx.array]], position: int) -> mx.array:
        x = self.tokens(token)[None] + self.positions(mx.array([position]))
        for layer, held in zip(self.layers, cache, strict=True):
            x = layer(x, None, held, position)
        return self.tokens.as_linear(self.norm(x))[0, -1]


def model_of(config: Config) -> Model:
    def converted(p: Any, name: str = "") -> Any:
        if isinstance(p, dict):
            return {k: converted(v, name if k in ("weight", "bias") else k) for k, v in p.items()}
        if isinstance(p, list):
            return [converted(v) for v in p]
        return mx.array(p.T if p.ndim == 2 and name not in ("tokens", "positions") else p)

    model = Model(config)
    model.update(converted(initial(config)))
    return model


def train_in_mlx(config: Config, inputs: np.ndarray, targets: np.ndarray):
    def make() -> Work:
        model = model_of(config)
        optimizer = mlx.optimizers.AdamW(RATE, betas=[0.9, 0.99], weight_decay=0.01, bias_correction=True)
        x, y = mx.array(inputs), mx.array(targets)
        state = [model.state, optimizer.state]
        gradient = nn.value_and_grad(model, lambda x, y: nn.losses.cross_entropy(model(x), y, reduction="mean"))

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: mx.array, y: mx.array) -> mx.array:
            loss, gradients = gradient(x, y)
            optimizer.update(model, gradients)
            return loss

        losses: list[np.ndarray] = []

        def run(units: int) -> None:
            for _ in range(units):
                loss = step(x, y)
                mx.async_eval(loss, state)
                if len(losses) < 4:
                    losses.append(np.array(loss))
            mx.eval(loss, state)

        return Work(run, lambda: losses)

    return make


def decode_in_mlx(config: Config, start: int):
    def make() -> Work:
        model = model_of(config)
        shape = (1, config.heads, config.context, config.width // config.heads)
        cache = [[mx.zeros(shape), mx.zeros(shape)] for _ in range(config.layers)]
        for held in cache:
            held[0][:, :, : start + 1] = 0.0
        token, position = mx.array([1]), start
        kept: list[np.ndarray] = []

        def run(units: int) -> None:
            nonlocal token, position
            for _ in range(units):
                logits = model.decode(token, cache, position)
                token = mx.argmax(logits)[None]
                mx.async_eval(token, logits)
                position = start if position + 1 == config.context else position + 1
                if len(kept) < 4:
                    kept.append(np.array(logits))
            mx.eval(token)

        return Work(run, lambda: kept)

    return make


def rows(small: bool) -> list[Row]:
    config, batch, length = (SMALL, 4, 64) if small else (GPT2, 8, 512)
    tokens = np.random.default_rng(1).integers(0, config.vocabulary, (batch, length + 1)).astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    name = "tiny gpt" if small else "gpt2-small"
    train = train_in_jax(config, inputs, targets), train_in_mlx(config, inputs, targets)
    start = config.context // 2
    return [
        Row(f"{name} train step, {batch} x {length}", *train, rtol=1e-2, peak=True, unit="step"),
        Row(f"{name} decode, cache of {config.context}", decode_in_jax(config, start), decode_in_mlx(config, start), rtol=2e-2, unit="token"),
    ]
