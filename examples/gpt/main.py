"""Train a small character-level transformer on a text, then let it write, one token at a time, with a KV cache.

    JAX_PLATFORMS=mps python examples/gpt/main.py --steps 200
    JAX_PLATFORMS=mps python examples/gpt/main.py --steps 0 --load weights.npz --greedy 64

The text beside this file is the beginning of Jane Austen's "Pride and Prejudice" (1813, public domain).
"""

import argparse
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import trange

TEXT = Path(__file__).with_name("pride_and_prejudice.txt")
PROMPT = "It is a truth universally acknowledged, that "

Params = dict[str, Any]


class Config(NamedTuple):
    """Sizes of the model; hashable, so that it can be a static argument."""

    vocabulary: int
    layers: int = 4
    width: int = 128
    heads: int = 4

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Cache(NamedTuple):
    """Keys and values of the positions so far: [layers, heads, positions, head_width]."""

    keys: jax.Array
    values: jax.Array


# The model ----------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=1)
def init(key: jax.Array, config: Config) -> Params:
    def dense(key: jax.Array, rows: int, columns: int, gain: float = 1.0) -> jax.Array:
        return jax.random.normal(key, (rows, columns)) * (gain / math.sqrt(rows))

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key, 4)
        gain = 1 / math.sqrt(2 * config.layers)
        return {
            "norm1": norm_params(config.width),
            "qkv": dense(k[0], config.width, 3 * config.width),
            "proj": dense(k[1], config.width, config.width, gain),
            "norm2": norm_params(config.width),
            "up": dense(k[2], config.width, 4 * config.width),
            "down": dense(k[3], 4 * config.width, config.width, gain),
        }

    keys = jax.random.split(key, config.layers + 1)
    return {
        "embedding": jax.random.normal(keys[-1], (config.vocabulary, config.width)) * 0.1,
        "layers": [layer(k) for k in keys[:-1]],
        "norm": norm_params(config.width),
    }


def norm_params(width: int) -> Params:
    return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}


def layer_norm(p: Params, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p["scale"] + p["bias"]


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of [..., positions, head_width]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def heads_of(p: Params, x: jax.Array, config: Config) -> tuple[jax.Array, ...]:
    """Queries, keys and values, each [..., heads, positions, head_width]."""
    qkv = (x @ p["qkv"]).reshape(*x.shape[:-1], 3, config.heads, config.head_width)
    return tuple(jnp.moveaxis(qkv[..., i, :, :], -2, -3) for i in range(3))


def attend(p: Params, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    mixed = jnp.moveaxis(weights @ v, -3, -2)
    return mixed.reshape(*mixed.shape[:-2], -1) @ p["proj"]


def feed_forward(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(layer_norm(p["norm2"], x) @ p["up"]) @ p["down"]


def logits_of(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    """Next-token logits at every position of [batch, positions]."""
    positions = jnp.arange(tokens.shape[-1])
    causal = positions[:, None] >= positions
    x = params["embedding"][tokens]
    for p in params["layers"]:
        q, k, v = heads_of(p, layer_norm(p["norm1"], x), config)
        x = x + attend(p, rotate(q, positions), rotate(k, positions), v, causal)
        x = x + feed_forward(p, x)
    return layer_norm(params["norm"], x) @ params["embedding"].T


# Training -----------------------------------------------------------------------------------------------------------------


def loss_of(params: Params, tokens: jax.Array, config: Config) -> jax.Array:
    logits = logits_of(params, tokens[:, :-1], config)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def train_step(params: Params, opt_state: optax.OptState, tokens: jax.Array, *, config: Config, optimizer: Any) -> tuple[Params, optax.OptState, jax.Array]:
    loss, grads = jax.value_and_grad(loss_of)(params, tokens, config)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def batches(tokens: np.ndarray, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Random windows of `context + 1` tokens, without end."""
    rng = np.random.default_rng(seed)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, context + 1)
    while True:
        yield windows[rng.integers(len(windows), size=batch)]


def train(params: Params, tokens: np.ndarray, options: argparse.Namespace, config: Config) -> tuple[Params, list[float]]:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(options.learning_rate, b2=0.99))
    opt_state = jax.jit(optimizer.init)(params)
    stream = batches(tokens, options.batch, options.context, options.seed)
    losses, start, ends = [], time.perf_counter(), []
    with trange(options.steps, unit="step") as bar:
        for _ in bar:
            params, opt_state, loss = train_step(params, opt_state, next(stream), config=config, optimizer=optimizer)
            losses.append(float(loss))
            ends.append(time.perf_counter())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    half = len(ends) // 2
    per_step = (ends[-1] - ends[half - 1]) / (len(ends) - half) if half else ends[-1] - start
    print(f"Final training loss: {losses[-1]:.4f}")
    print(f"Time per step (second half): {per_step * 1e3:.1f} ms")
    print(f"Time to first step: {ends[0] - start:.2f} s")
    return params, losses


# Writing ------------------------------------------------------------------------------------------------------------------


def decode(params: Params, cache: Cache, token: jax.Array, position: jax.Array, config: Config) -> tuple[Cache, jax.Array]:
    """One token in, the logits of the next one out; the cache grows by one position."""
    visible = jnp.arange(cache.keys.shape[-2]) <= position
    x = params["embedding"][token][None]
    keys, values = cache
    for i, p in enumerate(params["layers"]):
        q, k, v = heads_of(p, layer_norm(p["norm1"], x), config)
        keys = lax.dynamic_update_slice(keys, rotate(k, position[None])[None], (i, 0, position, 0))
        values = lax.dynamic_update_slice(values, v[None], (i, 0, position, 0))
        x = x + attend(p, rotate(q, position[None]), keys[i], values[i], visible)
        x = x + feed_forward(p, x)
    return Cache(keys, values), (layer_norm(params["norm"], x) @ params["embedding"].T)[0]


@partial(jax.jit, static_argnames=("count", "config"))
def write(params: Params, prompt: jax.Array, key: jax.Array, temperature: jax.Array, *, count: int, config: Config) -> tuple[jax.Array, jax.Array]:
    """`count` tokens after the prompt, and how far the best logit led the second best at each. Temperature 0 is greedy."""
    positions = len(prompt) + count
    empty = jnp.zeros((config.layers, config.heads, positions, config.head_width))

    def read(cache: Cache, item: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        return decode(params, cache, *item, config)

    cache, read_logits = lax.scan(read, Cache(empty, empty), (prompt, jnp.arange(len(prompt))))

    def step(carry: tuple[Cache, jax.Array, jax.Array], position: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        cache, logits, key = carry
        key, now = jax.random.split(key)
        drawn = jax.random.categorical(now, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
        best, second = lax.top_k(logits, 2)[0]
        cache, logits = decode(params, cache, token, position, config)
        return (cache, logits, key), (token, best - second)

    _, (tokens, margins) = lax.scan(step, (cache, read_logits[-1], key), jnp.arange(len(prompt), positions))
    return tokens, margins


# Files and the command line -----------------------------------------------------------------------------------------------


def named(params: Params) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def load(path: Path, like: Params) -> Params:
    with np.load(path) as file:
        want = {name: leaf.shape for name, leaf in named(like).items()}
        if {name: file[name].shape for name in file} != want:
            raise SystemExit(f"{path}: these weights belong to another model or another text")
        return jax.tree_util.tree_map_with_path(lambda name, _: jnp.asarray(file[jax.tree_util.keystr(name)]), like)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--load", type=Path, metavar="FILE.npz", help="start from these weights")
    parser.add_argument("--save", type=Path, metavar="FILE.npz", help="write the weights after training")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="characters to write at --temperature")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--greedy", type=int, default=0, metavar="N", help="also print N greedy tokens and their margins")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    text = options.text.read_text(encoding="utf-8")
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    if unknown := set(options.prompt) - set(alphabet):
        raise SystemExit(f"--prompt has characters that the text lacks: {sorted(unknown)}")
    if not options.prompt or len(text) <= options.context:
        raise SystemExit("the prompt must not be empty, and the text must be longer than --context")
    tokens = np.array([index[character] for character in text], np.int32)
    prompt = jnp.array([index[character] for character in options.prompt], jnp.int32)

    config = Config(vocabulary=len(alphabet))
    params = init(jax.random.key(options.seed), config)
    if options.load:
        params = load(options.load, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"GPT, {size:,} parameters, {len(text):,} characters of text, on {jax.devices()[0]}")
    if options.steps:
        params, _ = train(params, tokens, options, config)
    if options.save:
        np.savez(options.save, **{name: np.asarray(leaf) for name, leaf in named(params).items()})

    key = jax.random.key(options.seed + 1)
    if options.sample:
        start = time.perf_counter()
        drawn = np.asarray(write(params, prompt, key, jnp.float32(options.temperature), count=options.sample, config=config)[0])
        print(f"--- {options.sample} characters in {time.perf_counter() - start:.2f} s, compilation included")
        print(options.prompt + "".join(alphabet[token] for token in drawn))
    if options.greedy:
        best, margins = write(params, prompt, key, jnp.float32(0), count=options.greedy, config=config)
        print("Greedy tokens:", *np.asarray(best).tolist())
        print("Top-two margins:", *(f"{margin:.6f}" for margin in np.asarray(margins)))


if __name__ == "__main__":
    main()
