"""What of a loop waits until after it, and what does not: on plans alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, plan_of

from jax_mps.host.xla import host_function
from jax_mps.plan import dependence, loops, translate
from jax_mps.plan.partition import Target
from jax_mps.plan.types import Region
from tests.plan.test_hoisting import ARGS, B, H, N, T, V, W, gru, loops_of, lstm, normal, products, rnn

LONG = 200
XS = normal(LONG, B, N)  # of few steps, none would stay a loop


def gradient(f: Callable[..., Any], *which: int) -> Callable[..., Any]:
    return jax.grad(lambda *args: sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(f(*args))), argnums=which or (0, 1, 2, 3))


def apart(f: Callable[..., Any], *args: Any) -> Region:
    """The program, its loops taken apart."""
    where = Target(lambda step: None, lambda step: None)
    return loops.unroll_short(
        plan_of(Case("sinking", f, args)).body, {}, lambda step: False, frozenset(), lambda loop, constants: translate.apart(loop, constants, where)
    )


def backward(body: Region) -> tuple[int, list[str]]:
    """Carries of the last loop, and its products and sums."""
    loop = loops_of(body)[-1]
    return len(loop.operands), [s.name.removeprefix("stablehlo.") for s in loop.regions[1].steps if s.name in ("stablehlo.dot_general", "stablehlo.reduce")]


def summing(f: Callable[..., Any]) -> Callable[..., Any]:
    """A carry that f(carry, row of xs, weights) is added to, beside one that is an RNN's."""

    def run(xs, w, h):
        def step(carry, x):
            total, h = carry
            h = jnp.tanh(0.2 * (h @ w[:, :N]) + x)  # by less than 1, or what differs in the last bit differs in all in the end
            return (total + f(h, x, w), h), None

        start = jax.eval_shape(f, h, xs[0], w)
        return lax.scan(step, (jnp.zeros(start.shape, start.dtype), h), xs)[0]

    return run


FIRES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, list[str]], list[tuple[int, ...]]]] = {
    # left: the counter, the gradients of h and c, and the rows that are kept: of all four gates
    "lstm": (gradient(lstm), ARGS, (4, ["dot_general"]), [(T, B, 4 * N), (4 * N, N), (T, B, N), (4 * N, N)]),
    "rnn, reversed": (
        gradient(rnn(lambda x, w, b: x @ w[:, :N] + b[:N], reverse=True)),
        (XS, *ARGS[1:]),
        (3, ["dot_general"]),
        [(LONG, B, N), (N, N), (N, N), (LONG, B, N)],
    ),
    "rows by carries": (summing(lambda h, x, w: x.T @ h), (XS, W, H), (3, ["dot_general"]), [(N, N)]),
    "carries by rows": (summing(lambda h, x, w: h.T @ x), (XS, W, H), (3, ["dot_general"]), [(N, N)]),
    "rows by rows": (summing(lambda h, x, w: x.T @ jnp.tanh(x)), (XS, W, H), (3, ["dot_general"]), [(N, N)]),
    "carries by carries": (summing(lambda h, x, w: h.T @ h), (XS, W, H), (3, ["dot_general"]), [(N, N)]),
    "in batches": (summing(lambda h, x, w: jnp.einsum("bn,bm->bnm", h, x)), (XS, W, H), (3, ["dot_general"]), [(B, N, N)]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_sums_of_products_wait(name: str) -> None:
    f, args, left, shapes = FIRES[name]
    body = apart(f, *args)
    assert backward(body) == left
    assert sorted(products(body)) == sorted(shapes)


def test_a_gru() -> None:
    """Of four products for each gate, that of the carry is left; biases and weights are padded, and added one after the other."""
    assert backward(apart(gradient(gru), *ARGS)) == (6, ["dot_general"] * 3)


def test_one_product_for_several_weights() -> None:
    """Weights that the body puts together: their gradients are slices of one product, which waits if all of them do."""

    def f(xs, w, v, h):
        def step(h, x):
            return jnp.tanh(x @ w[:, :N] + h @ jnp.concatenate([v[:, : N // 2], v[:, N // 2 : N]], 1)), h

        return lax.scan(step, h, xs)[1]

    def halves(xs, w, a, b, h):
        return lax.scan(lambda h, x: (jnp.tanh(x @ w[:, :N] + h @ jnp.concatenate([a, b], 1)), h), h, xs)[1]

    assert backward(apart(gradient(f, 2), XS, W, V * 0.2, H))[1] == ["dot_general"]
    args = XS, W, V[:, : N // 2] * 0.2, V[:, N // 2 : N] * 0.2, H
    assert backward(apart(gradient(halves, 2, 3), *args)) == (3, ["dot_general"])


NEAR: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "read elsewhere": (
        lambda xs, w, h: lax.scan(lambda c, x: ((c[0] + x.T @ c[1], jnp.tanh(0.2 * c[1] + x + 1e-3 * c[0][:B])), None), (w[:, :N], h), xs)[0],
        (XS, W, H),
    ),
    "one of two parts is read": (
        lambda xs, a, b, h: lax.scan(lambda c, x: ((c[0] + (p := x.T @ c[2])[:, :4], c[1] * p[:, 4:], jnp.tanh(0.2 * c[2] + x)), None), (a, b, h), xs)[0],
        (XS, W[:, :4], W[:, 4:8] * 1e-3, H),
    ),
    "handed out": (lambda xs, w, h: lax.scan(lambda c, x: (c + x.T @ x, c), w[:, :N], xs), (XS, W, H)),
    "subtracted from": ((lambda xs, w: lax.scan(lambda c, x: (x.T @ x - c, None), w[:, :N], xs)[0]), (XS, W)),
    "by what is the same": (summing(lambda h, x, w: h @ w), (XS, W, H)),
    "no product": (summing(lambda h, x, w: h * x), (XS, W, H)),
    "not linear": (summing(lambda h, x, w: jnp.abs(x.T @ h)), (XS, W, H)),
    "integers": (lambda xs, w: lax.scan(lambda c, x: (c + x.T @ x, None), w[:, :N], xs)[0], (XS.astype(np.int32), W.astype(np.int32))),
    "rows that are larger": (summing(lambda h, x, w: x.T @ h), (np.zeros((LONG, 64, N), np.float32), W, np.zeros((64, N), np.float32))),
    "few steps": (summing(lambda h, x, w: x.T @ h), (XS[:9], W, H)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    f, args = NEAR[name]
    plain = plan_of(Case(name, f, args)).body
    body = apart(f, *args)
    assert all("after" not in loop.attributes for loop in loops_of(body))
    assert [v.type for v in body.results] == [v.type for v in plain.results]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    f = summing(lambda h, x, w: x.T @ h)
    monkeypatch.setattr(dependence, "MOST_BYTES", LONG * B * N * 4 - 1)
    assert backward(apart(f, XS, W, H))[1] == ["dot_general"] * 2


@pytest.mark.parametrize("name", FIRES)
def test_the_host_can_read_it(name: str) -> None:
    """All that is made has a form in StableHLO that verifies."""
    f, args, *_ = FIRES[name]
    body = apart(f, *args)
    assert host_function(body.arguments, body.steps, body.results).artifact
    assert [v.type for v in body.results] == [v.type for v in plan_of(Case(name, f, args)).body.results]


def test_weights_of_two_layers() -> None:
    """What an inner loop leaves for after may leave the outer one, too; here nothing does, since each outer iteration updates the weights."""

    def f(xs, w, h):
        def epoch(w, rows):
            return w - 0.1 * jax.grad(lambda w: jnp.sum(rnn(lambda x, w, b: x @ w[:, :N])(rows, w, V, None, h)[1]))(w), None

        return lax.scan(epoch, w, xs)[0]

    body = apart(f, np.stack([XS] * 3), W, H)
    (outer,) = loops_of(body)
    inner = [s for s in outer.regions[1].steps if s.name == "stablehlo.while"]
    assert [len([s for s in loop.regions[1].steps if s.name == "stablehlo.dot_general"]) for loop in inner] == [1, 1]
