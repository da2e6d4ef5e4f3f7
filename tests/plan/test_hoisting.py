"""What leaves the body of a loop, and what does not: on plans alone."""

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
from jax_mps.plan import dependence, hoisting, loops
from jax_mps.plan.batching import VIEWS
from jax_mps.plan.partition import Target
from jax_mps.plan.types import Region, Step

T, B, N = 40, 4, 8
R = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return R.standard_normal(shape, dtype=np.float32)


XS, W, V, BIAS, H = normal(T, B, N), normal(N, 3 * N), normal(N, 3 * N), normal(3 * N), normal(B, N)


def hoisted(f: Callable[..., Any] | str, *args: Any, target: Target | None = None) -> Region:
    """The program after what leaves loops has left them."""
    where = target or Target(lambda step: None, lambda step: None)
    plan = plan_of(Case("hoisting", f, args))
    return loops.unroll_short(plan.body, {}, lambda step: False, frozenset(), lambda loop, constants: alone(*hoisting.hoisted(loop, constants, where)))


def alone(before: list[Step], loop: Step) -> loops.Apart:
    return loops.Apart(before, loop, [], {})


def counted(body: Region) -> tuple[list[str], list[list[str]]]:
    """Ops that compute something: of the program, and of each loop's body in it."""
    names = [s.name.removeprefix("stablehlo.") for s in body.steps if dependence.is_costly(s) and s.name != "stablehlo.while"]
    inner = [[s.name.removeprefix("stablehlo.") for s in loop.regions[1].steps if dependence.is_costly(s)] for loop in loops_of(body)]
    return names, inner


def loops_of(body: Region) -> list[Step]:
    return [s for s in body.steps if s.name == "stablehlo.while"]


def products(body: Region) -> list[tuple[int, ...]]:
    """Shapes of the program's products outside of loops."""
    return [s.result.shape for s in body.steps if s.name == "stablehlo.dot_general"]


def lstm(xs, w, v, b, h):
    w, v, b = (jnp.concatenate([a, a[..., :N]], axis=-1) for a in (w, v, b))

    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ w + b + h @ v, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return lax.scan(step, (h, h), xs)[1]


def gru(xs, w, v, b, h):
    """As flax has it: a product for each gate, and the reset gate inside."""

    def step(h, x):
        r = jax.nn.sigmoid(x @ w[:, :N] + b[:N] + h @ v[:, :N])
        z = jax.nn.sigmoid(x @ w[:, N : 2 * N] + b[N : 2 * N] + h @ v[:, N : 2 * N])
        n = jnp.tanh(x @ w[:, 2 * N :] + b[2 * N :] + r * (h @ v[:, 2 * N :]))
        h = (1 - z) * n + z * h
        return h, h

    return lax.scan(step, h, xs)[1]


def rnn(step: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """A scan whose body adds a product with the carry to `step(x, w, b)`."""
    return lambda xs, w, v, b, h: lax.scan(lambda h, x: (jnp.tanh(step(x, w, b) + h @ v[:, :N]), h), h, xs, **how)


ARGS = (XS, W, V, BIAS, H)
FIRES: dict[str, tuple[Callable[..., Any], tuple[Any, ...], list[tuple[int, ...]]]] = {
    "lstm": (lstm, ARGS, [(T, B, 4 * N)]),
    "gradient of an lstm": (jax.grad(lambda *a: lstm(*a).sum(), argnums=(0, 1, 2, 3)), ARGS, [(T, B, 4 * N)]),
    "gru, three products": (gru, ARGS, [(T, B, N)] * 3),
    "reversed": (rnn(lambda x, w, b: x @ w[:, :N], reverse=True), ARGS, [(T, B, N)]),
    "weights first": (rnn(lambda x, w, b: (w[:, :N] @ x.T).T), ARGS, [(T, B, N)]),
    "vectors": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(w[:, :N].T @ x + h @ w[:, :N]), h), h[0], xs[:, 0]), (XS, W, H), [(T, N)]),
    "each its own weights": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(jax.vmap(jnp.matmul)(x, w) + h), h), h, xs),
        (XS, normal(B, N, N), H),
        [(B, T, N)],
    ),
    "what feeds it": (rnn(lambda x, w, b: jnp.tanh(x * b[:N]) @ w[:, :N]), ARGS, [(T, B, N)]),
    "a layer norm before": (rnn(lambda x, w, b: ((x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) @ w[:, :N]), ARGS, [(T, B, N)]),
    "two layers": (rnn(lambda x, w, b: jax.nn.relu(x @ w[:, :N] + b[:N]) @ w[:, N : 2 * N]), ARGS, [(T, B, N)] * 2),
    "two sources": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh((x[0] + x[1]) @ w[:, :N] + h), h), h, (xs, xs * 2)),
        (XS, W, H),
        [(T, B, N)],
    ),
    "integers": (
        lambda xs, w, h: lax.scan(lambda h, x: (h + x @ w, h), h, xs),
        tuple(a.astype(np.int32) for a in (XS, normal(N, N), H)),
        [(T, B, N)],
    ),
    "a part of the rows": (
        lambda xs, w, h: lax.fori_loop(3, 33, lambda i, h: jnp.tanh(xs[i + 2] @ w[:, :N] + h), h),
        (XS, W, H),
        [(30, B, N)],
    ),
    "columns": (
        lambda xs, w, h: lax.fori_loop(0, T, lambda i, h: jnp.tanh(xs[:, i] @ w[:, :N] + h), h),
        (XS.swapaxes(0, 1), W, H),
        [(T, B, N)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_products_of_rows_leave(name: str) -> None:
    """They are computed before, for all iterations; and the loop does not."""
    f, args, shapes = FIRES[name]
    body = hoisted(f, *args)
    assert products(body) == shapes
    plain = plan_of(Case(name, f, args)).body
    before, after = (sum(s.name == "stablehlo.dot_general" for s in r.walk()) for r in (plain, body))
    assert after == before  # moved, not doubled


def test_what_follows_leaves_too() -> None:
    """The bias is added before; one row is read."""
    outside, (inside,) = counted(hoisted(rnn(lambda x, w, b: x @ w[:, :N] + b[:N]), *ARGS))
    assert outside == ["dot_general", "add"]
    assert inside == ["dynamic_slice", "dot_general", "add", "tanh", "dynamic_update_slice", "add"]


def carried(i, h):
    """A row at an index that depends on the carry."""
    return (i + (h[0, 0] > 0).astype(jnp.int32)) % T


NEAR: dict[str, tuple[Callable[..., Any] | str, tuple[Any, ...]]] = {
    "the carry": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(h @ w[:, :N] + x), h), h, xs), (XS, W, H)),
    "rows and the carry": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh((h + x) @ w[:, :N]), h), h, xs), (XS, W, H)),
    "rows by rows": (lambda xs, h: lax.scan(lambda h, x: (jnp.tanh(x @ x.T @ h), h), h, xs), (XS, H)),
    "weights that change": (
        lambda xs, w, h: lax.scan(lambda c, x: ((jnp.tanh(x @ c[1] + c[0]), c[1] * 0.9), c[0]), (h, w[:, :N]), xs), (XS, W, H),
    ),
    "rows at twice the counter": (lambda xs, w, h: lax.fori_loop(0, T // 2, lambda i, h: jnp.tanh(xs[2 * i] @ w[:, :N] + h), h), (XS, W, H)),
    "rows at an index that is carried": (lambda xs, w, h: lax.fori_loop(0, T, lambda i, h: jnp.tanh(xs[carried(i, h)] @ w[:, :N] + h), h), (XS, W, H)),
    "rows of what changes": (
        lambda xs, w: lax.fori_loop(0, T - 1, lambda i, xs: xs.at[i + 1].set(jnp.tanh(xs[i] @ w[:, :N])), xs), (XS, W),
    ),
    "until its values say so": (
        lambda xs, w, h: lax.while_loop(lambda c: (c[0] < T) & (c[1].sum() < 9), lambda c: (c[0] + 1, jnp.tanh(xs[c[0]] @ w[:, :N] + c[1])), (0, h)),
        (XS, W, H),
    ),
    "a bound that is given": (lambda xs, w, h, n: lax.fori_loop(0, n, lambda i, h: jnp.tanh(xs[i] @ w[:, :N] + h), h), (XS, W, H, np.int32(5))),
    "once": (lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(x @ w[:, :N] + h), h), h, xs), (XS[:1], W, H)),
    "never": (lambda xs, w, h: lax.fori_loop(5, 5, lambda i, h: jnp.tanh(xs[i] @ w[:, :N] + h), h), (XS, W, H)),
    "no product": (lambda xs, h: lax.scan(lambda h, x: (jnp.tanh(jnp.exp(x) + h), h), h, xs), (XS, H)),
    "behind a barrier": (
        lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(lax.optimization_barrier((x, h))[0] @ w[:, :N] + h), h), h, xs), (XS, W, H),
    ),
    "no rows": (lambda xs, w, h: lax.scan(lambda h, x: (h + (x @ w[:, :N]).sum(), h), h, xs), (XS[:, :0], W, H)),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    f, args = NEAR[name]
    plain = plan_of(Case(name, f, args)).body
    body = hoisted(f, *args)
    assert all("ahead" not in loop.attributes for loop in loops_of(body))
    assert [s.name for s in body.steps if dependence.is_costly(s)] == [s.name for s in plain.steps if hoisting.is_costly(s)]


def test_what_is_the_same_in_all_iterations_leaves() -> None:
    """Weights that each iteration converts; not what is larger than what it is made of."""

    def f(xs, w, h):
        def step(h, x):
            larger = jnp.exp(w[:, 0])[:, None] * jnp.exp(w[0])
            return jnp.tanh((h.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32) + h @ larger)[:, :N] + x, None

        return lax.scan(step, h, xs)[0]

    outside, (inside,) = counted(hoisted(f, XS, W, H))
    assert sorted(outside) == ["convert", "exponential", "exponential"]
    assert inside.count("convert") == 2
    assert "exponential" not in inside
    assert "multiply" in inside


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """First what follows stays, then the product."""
    f = rnn(lambda x, w, b: x @ w[:, :N] + b[:N])
    monkeypatch.setattr(dependence, "MOST_BYTES", T * B * N * 4)
    assert counted(hoisted(f, *ARGS))[0] == ["dot_general"]
    monkeypatch.setattr(dependence, "MOST_BYTES", T * B * N * 4 - 1)
    assert counted(hoisted(f, *ARGS))[0] == []


def test_loops_that_the_host_runs_stay_whole() -> None:
    """All of its steps, or one: then its parts are the host's."""
    f = rnn(lambda x, w, b: x @ w[:, :N] + b[:N])
    refusing = Target(lambda step: "no" if step.name == "stablehlo.tanh" else None, lambda step: "xla")
    assert products(hoisted(f, *ARGS, target=refusing)) == []
    long = np.zeros((20000, 1, 2), np.float32)
    lending = Target(lambda step: None, lambda step: "xla", lend_loops=True)
    f = lambda xs, w, h: lax.scan(lambda h, x: (jnp.tanh(x @ w + h), h), h, xs)  # noqa: E731
    small = np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32)
    assert products(hoisted(f, long, *small, target=lending)) == []
    assert products(hoisted(f, long, *small)) == [(20000, 1, 2)]


def test_inner_loops_give_to_outer_ones() -> None:
    """What leaves the inner one leaves the outer one, too, if it may."""

    def f(xs, w, h):
        def outer(h, rows):
            return lax.scan(lambda h, x: (jnp.tanh(x @ w[:, :N] + h), None), h, rows)[0], h

        return lax.scan(outer, h, xs)

    body = hoisted(f, normal(5, T, B, N), W, H)
    assert products(body) == [(5, T, B, N)]
    (loop,) = loops_of(body)
    assert [s.name for s in loop.regions[1].walk() if s.name == "stablehlo.dot_general"] == []


@pytest.mark.parametrize("name", FIRES)
def test_the_host_can_read_it(name: str) -> None:
    """All that is made has a form in StableHLO that verifies."""
    f, args, _ = FIRES[name]
    plan = plan_of(Case(name, f, args))
    body = hoisted(f, *args)
    assert host_function(body.arguments, body.steps, body.results).artifact
    assert [v.type for v in body.results] == [v.type for v in plan.body.results]


def test_views_alone_are_no_work() -> None:
    assert "stablehlo.slice" in VIEWS
