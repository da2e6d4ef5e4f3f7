"""Train a full-width ResNet18 (11 million parameters) with flax and optax on CIFAR-shaped images.

    JAX_PLATFORMS=mps python examples/resnet/main.py --steps 30

By default the images are scikit-learn's handwritten digits, scaled up to 32x32x3, so that nothing is downloaded; `--data`
names a folder with CIFAR-10's binary files (https://www.cs.toronto.edu/~kriz/cifar.html, "binary version").
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

CLASSES = 10
Images = tuple[np.ndarray, np.ndarray]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, features=self.features, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm()(conv(kernel_size=(3, 3), strides=self.stride)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(kernel_size=(3, 3))(y))  # each block starts as its shortcut
        if x.shape != y.shape:
            x = norm()(conv(kernel_size=(1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """The CIFAR form: a 3x3 stem without pooling, four stages of two blocks, 64 to 512 features."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(64, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for features, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            x = Block(features, stride)(x, train)
            x = Block(features, 1)(x, train)
        return nn.Dense(CLASSES)(x.mean(axis=(1, 2)))


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


model = ResNet18()


def gradients(params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any, Any]:
    """The mean cross entropy of a batch, the new batch statistics, and the gradients."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return loss, batch_stats, grads


@partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def train_step(state: State, images: jax.Array, labels: jax.Array, *, optimizer: Any) -> tuple[State, jax.Array]:
    loss, batch_stats, grads = gradients(state.params, state.batch_stats, images, labels)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


@jax.jit
def create(key: jax.Array) -> tuple[Any, Any]:
    variables = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)
    return variables["params"], variables["batch_stats"]


def digits() -> Images:
    """scikit-learn's 1,797 digits: 8x8 grey levels from 0 to 16, each pixel made a 4x4 block of three channels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.repeat(np.repeat(data.images, 4, axis=1), 4, axis=2)[..., None] / 16
    return np.broadcast_to(images, (*images.shape[:3], 3)).astype(np.float32), data.target.astype(np.int32)


def cifar10(folder: Path) -> Images:
    """The training images of CIFAR-10's binary version: records of one label byte and 3x32x32 colour bytes."""
    record = 1 + 3 * 32 * 32
    files = sorted(folder.glob("data_batch_*.bin")) or sorted(folder.glob("*/data_batch_*.bin"))
    if not files:
        raise SystemExit(f"{folder}: no data_batch_*.bin here; --data needs the folder of CIFAR-10's binary version")
    for file in files:
        if not file.stat().st_size or file.stat().st_size % record:
            raise SystemExit(f"{file}: {file.stat().st_size} bytes is not a whole number of {record}-byte records; is it complete?")
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, record) for file in files])
    if rows[:, 0].max() >= CLASSES:
        raise SystemExit(f"{folder}: label {rows[:, 0].max()} found where CIFAR-10 has 0 to 9; is this CIFAR-100?")
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(np.float32) / 255
    return images, rows[:, 0].astype(np.int32)


def batches(data: Images, size: int, seed: int) -> Iterator[Images]:
    """Shuffled batches without end."""
    images, labels = data
    if size > len(labels):
        raise SystemExit(f"--batch {size} is more than the {len(labels)} images there are")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield images[chosen], labels[chosen]


def dump(path: Path, losses: list[float], grads: Any) -> None:
    """Losses and the first step's gradients, for comparing one backend with another."""
    leaves = {f"grad{jax.tree_util.keystr(name)}": leaf for name, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    np.savez(path, losses=np.array(losses), **leaves)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of CIFAR-10's binary files (default: digits)")
    parser.add_argument("--dump", type=Path, metavar="FILE.npz", help="write the losses and the first step's gradients")
    options = parser.parse_args()
    if options.steps < 1 or options.batch < 1:
        parser.error("--steps and --batch must be at least 1")
    return options


def main() -> None:
    options = arguments()
    stream = batches(cifar10(options.data) if options.data else digits(), options.batch, options.seed)
    optimizer = optax.sgd(options.learning_rate, momentum=0.9)

    start = time.perf_counter()
    params, batch_stats = create(jax.random.key(options.seed))
    state = State(params, batch_stats, jax.jit(optimizer.init)(params))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"ResNet18, {size:,} parameters, batch {options.batch}, on {jax.devices()[0]}")

    images, labels = next(stream)
    first_grads = jax.jit(gradients)(params, batch_stats, images, labels)[2] if options.dump else None
    losses, ends = [], []
    with tqdm(total=options.steps, unit="step") as bar:
        for _ in range(options.steps):
            state, loss = train_step(state, images, labels, optimizer=optimizer)
            images, labels = next(stream)
            losses.append(float(loss))
            ends.append(time.perf_counter())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
            bar.update()

    half = len(ends) // 2
    per_step = (ends[-1] - ends[half - 1]) / (len(ends) - half) if half else ends[-1] - start
    print(f"Final training loss: {losses[-1]:.4f}")
    print(f"Time per step (second half): {per_step:.3f} s")
    print(f"Time to first step: {ends[0] - start:.2f} s")
    if options.dump:
        dump(options.dump, losses, first_grads)


if __name__ == "__main__":
    main()
