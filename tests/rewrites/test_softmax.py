"""softmax and its relatives, forward and backward, as JAX, flax and optax emit them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ops.harness import Case
from rewrites.proof import prove, refuse

R = np.random.default_rng(0)
X = (R.normal(size=(5, 4, 33)) * 4).astype(np.float32)
G = R.normal(size=X.shape).astype(np.float32)
MASK = R.random(X.shape) < 0.7
LABELS = R.integers(0, 33, (5, 4)).astype(np.int32)
ODD = np.array([[-np.inf] * 4, [np.nan, 1, 2, 3], [np.inf, 1, 2, 3], [np.inf, np.inf, 0, 0], [-np.inf, 1, 2, -np.inf], [3e38, -3e38, 0, 1]], np.float32)
ABS = 1e-6  # of numbers of the order of 1: MLX's exp on CPU is off by |x| * 6e-8, as x - max(x) itself is
HALF = {"bfloat16": 2e-2, "float16": 2e-3}  # the steps round to a half type after each, MLX's kernel once


def vjp(f):
    """Forward and backward in one program, as a training step has them."""
    return lambda x, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(f, x))


def row_grad(f):
    return lambda x, g: jax.vjp(f, x)[1](g[..., 0])


def hand_written(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention_weights(x, mask):
    """As flax has it: a large negative number where the mask says no."""
    return jax.nn.softmax(jnp.where(mask, x, jnp.finfo(x.dtype).min))


def integer_labels(x, labels):
    """As optax has it."""
    return (jax.nn.logsumexp(x, axis=-1) - jnp.take_along_axis(x, labels[..., None], -1)[..., 0]).mean()


def one_hot_labels(x, labels):
    return -(jax.nn.one_hot(labels, 33) * jax.nn.log_softmax(x)).sum(-1).mean()


def log_softmax(x):
    return jax.nn.log_softmax(x)


def logsumexp(x):
    return jax.nn.logsumexp(x, axis=-1)


@pytest.mark.parametrize(
    ("f", "args", "names"),
    [
        (jax.nn.softmax, (X,), ["softmax"]),
        (lambda x: jax.nn.softmax(x, where=x > 0), (X,), ["softmax"]),
        (lambda x, m: jax.nn.softmax(x, where=m), (X, MASK), ["softmax"]),
        (lambda x, m: jax.nn.softmax(x, where=m), (X, np.zeros_like(MASK)), ["softmax"]),
        (hand_written, (X,), ["softmax"]),
        (attention_weights, (X, MASK), ["softmax"]),
        (lambda x: jax.nn.softmax(x[0, 0]), (X,), ["softmax"]),
        (lambda x: jax.nn.softmax(x[:, :1]), (X,), ["softmax"]),
        (jax.vmap(jax.nn.softmax), (X,), ["softmax"]),
        (jax.vmap(jax.nn.softmax, in_axes=1), (X,), ["softmax"]),
        (log_softmax, (X,), ["log_softmax"]),
        (log_softmax, (X + 1e4,), ["log_softmax"]),
        (logsumexp, (X,), ["logsumexp"]),
        (lambda x: jax.nn.logsumexp(x, axis=-1, keepdims=True), (X,), ["logsumexp"]),
        (vjp(jax.nn.softmax), (X, G), ["softmax", "softmax_gradient"]),
        (vjp(log_softmax), (X, G), ["log_softmax", "softmax_times"]),
        (row_grad(logsumexp), (X, G), ["softmax_times"]),
        (jax.value_and_grad(integer_labels), (X, LABELS), ["logsumexp", "in_bounds", "softmax_times"]),
        (jax.value_and_grad(one_hot_labels), (X, LABELS), ["log_softmax", "softmax_times"]),
    ],
)  # fmt: skip
def test_fires(f, args, names) -> None:
    prove(Case("softmax", f, args, rtol=2e-5, atol=ABS), *names, rtol=2e-5, atol=ABS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("f", "names"),
    [(jax.nn.softmax, ["softmax"]), (log_softmax, ["log_softmax"]), (vjp(jax.nn.softmax), ["softmax", "softmax_gradient"])],
)
def test_half_types(f, names, dtype) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    args = (X.astype(kind), G.astype(kind))[: f.__code__.co_argcount if f.__name__ == "<lambda>" else 1]
    prove(Case("half", f, args, rtol=HALF[dtype], atol=HALF[dtype]), *names, rtol=HALF[dtype], atol=HALF[dtype])


@pytest.mark.parametrize(("f", "name"), [(jax.nn.softmax, "softmax"), (log_softmax, "log_softmax"), (logsumexp, "logsumexp")])
def test_infinities_and_nan(f, name) -> None:
    """Rows that hold them, and rows of nothing but -inf, give what the steps give."""
    prove(Case("odd", f, (ODD,), rtol=1e-6), name)


LARGE = np.concatenate([np.pad(ODD, ((0, 0), (0, 296)), constant_values=-np.inf), (R.normal(size=(34, 300)) * 9)]).astype(np.float32)


@pytest.mark.parametrize(("f", "name"), [(jax.nn.softmax, "softmax"), (log_softmax, "log_softmax"), (logsumexp, "logsumexp")])
def test_large(f, name) -> None:
    """On CPU composed, not MLX's kernel."""
    prove(Case("large", f, (LARGE,), rtol=2e-5, atol=ABS), name, rtol=2e-5, atol=ABS)


@pytest.mark.parametrize(("f", "g", "names"), [
    (jax.nn.softmax, np.ones_like(ODD), ["softmax", "softmax_gradient"]),
    (log_softmax, np.ones_like(ODD), ["log_softmax", "softmax_times"]),
])  # fmt: skip
def test_gradients_of_odd_rows(f, g, names) -> None:
    prove(Case("odd", vjp(f), (ODD, g), rtol=1e-6, atol=ABS), *names, atol=ABS)


def below_the_maximum(x):
    e = jnp.exp(x - x.min(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def of_another_row(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e[::-1].sum(-1, keepdims=True)


def along_both(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum()


def wrong_maximum(x):
    e = jnp.exp(x - (2 * x).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def transposed_rows(x):
    square = x[:, :, :4][:4]
    e = jnp.exp(square - square.max(-1, keepdims=True))
    return e / jnp.broadcast_to(e.sum(-1).T[:, :, None], e.shape)


def turned_otherwise(x):
    square = x[:4, :, :4]
    turned = square.transpose(1, 0, 2)
    e = jnp.exp(turned - square.max(-1)[..., None])
    return e / e.sum(-1, keepdims=True)


def parts_are_read(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True), e


@pytest.mark.parametrize(
    "f",
    [
        lambda x: jax.nn.softmax(x, axis=1), below_the_maximum, of_another_row, along_both, wrong_maximum, transposed_rows, turned_otherwise,
        parts_are_read,
        lambda x: jnp.log(jnp.exp(x).sum(-1)),
    ],
)  # fmt: skip
def test_near_misses(f) -> None:
    refuse(Case("near", f, (X,)))
