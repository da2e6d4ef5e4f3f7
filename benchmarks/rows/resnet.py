"""A training step of ResNet18 in its CIFAR form, SGD with momentum; flax and optax against mlx.nn, from the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as fnn
import jax
import jax.numpy as jnp
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import optax
from mlx.utils import tree_unflatten

from benchmarks.harness import Row, Work, jax_steps

STAGES = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))
RATE, MOMENTUM = 0.01, 0.9


class Block(fnn.Module):
    features: int
    stride: int

    @fnn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(fnn.BatchNorm, use_running_average=False, momentum=0.9)
        y = fnn.relu(norm()(fnn.Conv(self.features, (3, 3), self.stride, padding=1, use_bias=False)(x)))
        y = norm()(fnn.Conv(self.features, (3, 3), padding=1, use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(fnn.Conv(self.features, (1, 1), self.stride, padding=0, use_bias=False)(x))
        return fnn.relu(x + y)


class ResNet18(fnn.Module):
    @fnn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = fnn.Conv(64, (3, 3), padding=1, use_bias=False)(x)
        x = fnn.relu(fnn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        for features, stride in STAGES:
            x = Block(features, stride)(x)
        return fnn.Dense(10)(x.mean(axis=(1, 2)))


class MlxBlock(nn.Module):
    def __init__(self, before: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, features, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm(features)
        if stride != 1 or before != features:
            self.conv3 = nn.Conv2d(before, features, 1, stride, bias=False)
            self.norm3 = nn.BatchNorm(features)

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if "conv3" in self:
            x = self.norm3(self.conv3(x))
        return nn.relu(x + y)


class MlxResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm(64)
        self.blocks = []
        before = 64
        for features, stride in STAGES:
            self.blocks.append(MlxBlock(before, features, stride))
            before = features
        self.dense = nn.Linear(512, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.dense(x.mean(axis=(1, 2)))


def converted(params: dict[str, Any]) -> list[tuple[str, mx.array]]:
    """Flax's parameters under mlx.nn's names and in its layouts."""
    out = []

    def conv(name: str, p: dict[str, Any]) -> None:
        out.append((f"{name}.weight", mx.array(np.asarray(p["kernel"]).transpose(3, 0, 1, 2))))

    def norm(name: str, p: dict[str, Any]) -> None:
        out.extend([(f"{name}.weight", mx.array(np.asarray(p["scale"]))), (f"{name}.bias", mx.array(np.asarray(p["bias"])))])

    conv("conv", params["Conv_0"])
    norm("norm", params["BatchNorm_0"])
    for i in range(len(STAGES)):
        block = params[f"Block_{i}"]
        for j in range(len(block) // 2):
            conv(f"blocks.{i}.conv{j + 1}", block[f"Conv_{j}"])
            norm(f"blocks.{i}.norm{j + 1}", block[f"BatchNorm_{j}"])
    dense = params["Dense_0"]
    out += [("dense.weight", mx.array(np.asarray(dense["kernel"]).T)), ("dense.bias", mx.array(np.asarray(dense["bias"])))]
    return out


def rows(small: bool) -> list[Row]:
    batch = 16 if small else 128
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, 32, 32, 3), dtype=np.float32)
    labels = random.integers(0, 10, batch).astype(np.int32)
    return [Row(f"resnet18 train step, batch {batch}", in_jax(images, labels), in_mlx(images, labels), rtol=1e-2, peak=True, unit="step")]


def initial() -> Any:
    with jax.default_device(jax.devices("cpu")[0]):
        variables = jax.jit(ResNet18().init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        return jax.tree.map(np.asarray, variables)


def training() -> tuple[Callable[..., Any], Any]:
    """A step of training, from a state, images and labels to the next state and the loss; and the first state."""
    model, optimizer = ResNet18(), optax.sgd(RATE, momentum=MOMENTUM)

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, momentum = state

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = model.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        (loss, new_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, momentum = optimizer.update(gradients, momentum)
        return (optax.apply_updates(params, updates), new_stats, momentum), loss

    variables = initial()
    return step, (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))


def in_jax(images: np.ndarray, labels: np.ndarray):
    def make(device: jax.Device) -> Work:
        return jax_steps(*training(), images, labels)(device)

    return make


def in_mlx(images: np.ndarray, labels: np.ndarray):
    def make() -> Work:
        model, optimizer = MlxResNet18(), mlx.optimizers.SGD(RATE, momentum=MOMENTUM)
        model.update(tree_unflatten(converted(initial()["params"])))
        model.train()
        x, y = mx.array(images), mx.array(labels)
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
