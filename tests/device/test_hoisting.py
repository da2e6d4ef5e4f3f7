"""Loops whose products of rows are computed before them: against the same loops as they were, and against XLA's CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_mps
from jax_mps.pjrt.client import Client
from jax_mps.plan import loops, partition, translate
from tests.plan import test_sinking
from tests.plan.test_hoisting import ARGS, BIAS, FIRES, NEAR, XS, B, H, N, T, V, W, gru, normal, rnn
from tests.plan.test_sinking import gradient

pytestmark = pytest.mark.device

W_ = W[:, :N]


def mixed(xs, ys, w, h):
    """Rows from both ends of two arrays."""
    return lax.fori_loop(0, T, lambda i, h: jnp.tanh((xs[i] * ys[T - 1 - i]) @ w + h), h)


def outputs_only(xs, w):
    """No carry, and each result a row of what was computed before."""
    return lax.scan(lambda c, x: (c, (x @ w, jnp.exp(x @ w))), None, xs)[1]


ROWS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{name: row[:2] for name, row in FIRES.items()},
    **{f"near: {name}": (f, args) for name, (f, args) in NEAR.items()},
    **{f"after: {name}": row[:2] for name, row in test_sinking.FIRES.items()},
    **{f"not after: {name}": row for name, row in test_sinking.NEAR.items()},
    "after: gru": (gradient(gru), ARGS),
    "after: long, in chunks": (gradient(rnn(lambda x, w, b: x @ w[:, :N] + b[:N])), (normal(701, B, N), W * 0.5, V * 0.5, BIAS, H)),
    "after: weights first": (gradient(rnn(lambda x, w, b: (w[:, :N].T @ x.T).T)), ARGS),
    "after: of the carry's first value, and the rows": (gradient(rnn(lambda x, w, b: x @ w[:, :N]), 0, 4), ARGS),
    "after: weights in parts": (
        gradient(lambda xs, w, a, b, h: lax.scan(lambda h, x: (jnp.tanh(x @ w + h @ jnp.concatenate([a, b], 1)), h), h, xs)[1], 1, 2, 3),
        (normal(200, B, N), W_, V[:, :3] * 0.2, V[:, 3:N] * 0.2, H),
    ),
    "after: complex": (
        test_sinking.summing(lambda h, x, w: (x.T + 1j * x.T) @ (h * (2 - 1j))), (test_sinking.XS, W, H)
    ),
    "after: in a scan": (
        lambda xs, w, v, h: lax.scan(
            lambda w, x: (w - 0.01 * jax.grad(lambda w: jnp.sum(rnn(lambda x, w, b: x @ w[:, :N])(x, w, v, None, h)[1] ** 2))(w), None), w, xs
        )[0],
        (normal(5, 60, B, N), W, V * 0.2, H),
    ),
    "short: unrolled": (rnn(lambda x, w, b: x @ w[:, :N] + b[:N]), (XS[:3], W, V, BIAS, H)),
    "long": (rnn(lambda x, w, b: x @ w[:, :N] + b[:N], reverse=True), (normal(701, B, N), W, V, BIAS, H)),
    "rows from both ends": (mixed, (XS, normal(T, B, N), W_, H)),
    "no carry": (outputs_only, (XS, W_)),
    "scalars": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.sin(h + x @ w), x @ w), h, xs), (XS[:, 0], W[:, 0], np.float32(0))),
    "of size 1": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(h + x @ w), h), h, xs), (normal(T, 1, 1), normal(1, 1), normal(1, 1))),
    "bfloat16": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(h + (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)), h), h, xs),
        (XS, W_, H),
    ),
    "complex": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(h + (x @ w) * 1j), h), h + 0j, xs + 1j * xs[::-1]),
        (XS * 0.1, W_ * 0.1, H * 0.1),
    ),
    "bool": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.where((x > 0) @ (w > 0), h, -h + x), h), h, xs), (XS, W_, H)),
    "int8": (
        lambda xs, w, h: lax.scan(lambda h, x: (h + x @ w, h), h, xs),
        tuple(R.integers(-128, 127, s).astype(np.int8) for R in [np.random.default_rng(1)] for s in ((T, B, N), (N, N), (B, N))),
    ),
    "highest precision": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(h + jnp.matmul(x, w, precision="highest")), h), h, xs),
        (XS, W_, H),
    ),
    "selected, concatenated, reversed": (
        lambda xs, w, h: lax.scan(
            lambda h, x: (jnp.tanh(h + jnp.concatenate([jnp.where(x[0, 0] > 0, x[:, ::-1], 0.5), jnp.clip(x, h0 := -0.3, -h0)], 1) @ jnp.tile(w, (2, 1))), h),
            h,
            xs,
        ),
        (XS, W_, H),
    ),
    "a loop in a loop": (
        lambda xs, w, h: lax.scan(lambda h, rows: (lax.scan(lambda h, x: (jnp.tanh(x @ w + h), None), h, rows)[0], h), h, xs),
        (normal(30, 20, B, N), W_, H),
    ),
    "a loop over what the outer one carries": (
        lambda xs, w, h: lax.scan(lambda h, x: (lax.scan(lambda g, r: (jnp.tanh(g * 0.5 + r @ w), None), h[0], h + x)[0] + h, h), h, xs),
        (normal(60, 20, N), W_, normal(20, N)),
    ),
    "second counters": (
        lambda xs, w, h: lax.while_loop(
            lambda c: c[0] < T, lambda c: (c[0] + 1, c[1] + 1, c[2] + 1, jnp.tanh(c[3] + xs[c[1] - 7] @ w), c[1]), (0, 7, jnp.uint8(250), h, 0)
        ),
        (XS, W_, H),
    ),
    "NaN and infinities": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.where(jnp.isnan(x @ w), h, jnp.tanh(h + x @ w)), h), h, xs),
        (np.where(np.random.default_rng(3).random(XS.shape) < 0.02, np.inf, XS), W_, H),
    ),
}  # fmt: skip


def on_the_device(how: str, patch: pytest.MonkeyPatch) -> None:
    """No loop goes to the host for its speed; another way, another program."""
    environment = Client.environment
    patch.setattr(Client, "environment", lambda self, chosen: (*environment(self, chosen), ("hoisting", how)))
    patch.setattr(partition._Cutter, "lendable", lambda self, step: False)


def results(f: Callable[..., Any], args: tuple[Any, ...], how: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What mps makes of it."""
    with monkeypatch.context() as patch:
        on_the_device(how, patch)
        if how == "none":
            patch.setattr(translate, "apart", lambda loop, constants, where: loops.Apart([], loop, [], {}))
        return jax.tree.leaves(jax.jit(lambda *args: f(*args))(*args))


def check(f: Callable[..., Any], args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tight: float = 2e-6, rough: float = 1e-4) -> None:
    ours, plain = (results(f, args, how, monkeypatch) for how in ("all", "none"))
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.tree.leaves(jax.jit(f)(*args))
    for a, b, c in zip(ours, plain, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape) == (c.dtype, c.shape)
        a, b, c = (np.asarray(v) for v in (a, b, c))
        if a.dtype.kind in "iub":
            assert a.tolist() == b.tolist() == c.tolist()
            continue
        # a sum of eight or more products, in an order that depends on the number of rows; carried through dozens of steps that do not enlarge it
        np.testing.assert_allclose(a, b, rtol=tight, atol=tight * np.abs(b[np.isfinite(b)]).max(initial=0))
        np.testing.assert_allclose(a, c, rtol=rough, atol=rough)


@pytest.mark.parametrize("name", ROWS)
def test_hoisted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, args = ROWS[name]
    if name == "bfloat16":  # another order of a sum may round to the next bfloat16
        check(f, args, monkeypatch, 8e-3, 2e-2)
    else:
        check(f, args, monkeypatch)


# Smooth ones: a gradient where two operands of a maximum are nearly equal is either of two.
UNARY = (jnp.tanh, jnp.sin, jax.nn.silu, lambda v: v[:, ::-1], lambda v: v.T.reshape(v.shape), lambda v: v - v.mean(1, keepdims=True))
BINARY = (jnp.add, jnp.multiply, jnp.subtract, lambda a, b: jnp.concatenate([a[:, : N // 2], b[:, N // 2 :]], 1))
PRODUCTS = (
    lambda a, w: a @ w,
    lambda a, w: (w.T @ a.T).T,
    lambda a, w: jnp.einsum("bn,nm->bm", a, w.T),
    lambda a, w: lax.dot_general(a, w, (((1,), (1,)), ((), ()))),
)


def random_scan(seed: int) -> Callable[..., Any]:
    """A scan over a body of random steps: of rows, of the carry, and of what neither changes."""

    def step(h, rows, w):
        r = np.random.default_rng(seed)
        values = [*rows, h, w[:B]]
        for _ in range(r.integers(4, 16)):
            a, b = (values[r.integers(len(values))] for _ in range(2))
            match r.integers(3):
                case 0:
                    value = UNARY[r.integers(len(UNARY))](a)
                case 1:
                    value = BINARY[r.integers(len(BINARY))](a, b)
                case _:
                    value = PRODUCTS[r.integers(len(PRODUCTS))](a, w * 0.2) * 0.5
            values.append(value)
        kept = [values[i] for i in r.integers(len(values), size=2)]
        return jnp.tanh(values[-1] + 0.1 * h), kept

    def f(xs, ys, w, h):
        return lax.scan(lambda h, rows: step(h, rows, w), h, (xs, ys), reverse=bool(seed % 2))

    return f


@pytest.mark.parametrize("seed", range(12))
def test_random_bodies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, and every third one's gradient."""
    f, args = random_scan(seed), (XS, normal(T, B, N), W_, H)
    if seed % 3 == 0:
        g = f
        f = jax.grad(lambda *args: sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(g(*args))), argnums=(0, 1, 2, 3))
    check(f, args, monkeypatch)


def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    f, args = ROWS["long"]
    on_the_device("all", monkeypatch)
    said = jax_mps.explain(jax.jit(f).lower(*args).compile())
    assert "  2 ops of its body computed before it, for all iterations at once" in said
    f, args = ROWS["after: long, in chunks"]
    said = jax_mps.explain(jax.jit(f).lower(*args).compile())
    assert "  4 sums or rows of all iterations computed after it" in said
