"""Loops and branches as segments, against XLA's CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mps.pjrt.client import Client
from jax_mps.plan import control, interrupts, partition
from jax_mps.plan.boundary import Judge

X = np.arange(6, dtype=np.float32)
ROWS_OF = np.random.default_rng(0).standard_normal((701, 5)).astype(np.float32)


def cell(c, x):
    c = jnp.tanh(c + x)
    return c, c * 2


def norm_below(limit):
    """A condition and a body on (values, their largest, a counter)."""
    return lambda c: c[1] > limit, lambda c: (c[0] * 0.9, jnp.max(jnp.abs(c[0])), c[2] + 1)


ROWS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "counted": (lambda x: lax.fori_loop(0, 1000, lambda i, c: c * 0.999 + i, x), (X,)),
    "counted, bound given": (lambda x, n: lax.fori_loop(0, n, lambda i, c: c * 0.999 + i, x), (X, np.int32(77))),
    "counted, from a given start": (lambda x, a, b: lax.fori_loop(a, b, lambda i, c: c + i, x), (X, np.int32(-5), np.int32(900))),
    "counted, never": (lambda x, n: lax.fori_loop(0, n, lambda i, c: c + i, x), (X, np.int32(-3))),
    "counted, unrolled": (lambda x: lax.fori_loop(0, 7, lambda i, c: jnp.sin(c) + i, x), (X,)),
    "counting down by two": (lambda x: lax.while_loop(lambda c: c[0] > 3, lambda c: (c[0] - 2, c[1] + c[0]), (1001, x)), (X,)),
    "counter at most": (lambda x: lax.while_loop(lambda c: c[0] <= 600, lambda c: (c[0] + 7, c[1] + c[0]), (0, x)), (X,)),
    "bound on the left": (lambda x: lax.while_loop(lambda c: c[0] < 600, lambda c: (c[0] + 7, c[1] + c[0]), (0, x)), (X,)),
    "counter of 8 bits that wraps": (
        lambda x: lax.while_loop(lambda c: (c[0] < 100) & (c[1].sum() < 1e5), lambda c: (c[0] + jnp.int8(7), c[1] + 1), (jnp.int8(0), x)),
        (X,),
    ),
    "data-dependent": (lambda x: lax.while_loop(lambda c: c.sum() < 1e4, lambda c: c * 1.1 + 1, x), (X,)),
    "data-dependent, never": (lambda x: lax.while_loop(lambda c: c.sum() < 0, lambda c: c * 1.1 + 1, x), (X,)),
    "scan": (lambda x: lax.scan(lambda c, a: (c * 0.9 + a * x.sum(), jnp.tanh(c)), x[0], jnp.arange(300.0)), (X,)),
    "scan, reversed, no carry": (lambda x: lax.scan(lambda c, a: (c, a * x), None, jnp.arange(100.0), reverse=True), (X,)),
    "scan of length 0": (lambda x: lax.scan(lambda c, a: (c + a, c), x[0], jnp.zeros((0,))), (X,)),
    "swapped carries": (lambda x: lax.fori_loop(0, 1001, lambda i, c: (c[1], c[0]), (x, x + 1)), (X,)),
    "carry of no size": (lambda x: lax.fori_loop(0, 600, lambda i, c: (c[0], c[1] + 1), (jnp.zeros((0, 3)), x)), (X,)),
    "cond": (lambda x: lax.cond(x.sum() > 3, lambda v: jnp.sin(v) @ jnp.cos(v) * x, lambda v: v * 2, x), (X,)),
    "cond, small": (lambda x: lax.cond(x.sum() < 3, lambda v: v + 1, lambda v: v * 2, x), (X,)),
    "switch past the end": (
        lambda x, i: lax.switch(i, [lambda v: v + 1, lambda v: v * jnp.arange(6.0), lambda v: jnp.tanh(v) @ v * v + jnp.sin(v) - v.mean()], x),
        (X, np.int32(9)),
    ),
    "branch that returns its argument": (
        lambda x, i: lax.switch(i, [lambda v: (v, x), lambda v: (jnp.cumsum(v) @ v + v * jnp.sort(v) - v.max(), v)], x),
        (X, np.int32(0)),
    ),
    "loop in a branch in a loop": (
        lambda x: lax.fori_loop(
            0, 50, lambda i, c: lax.cond(i % 2 == 0, lambda v: lax.fori_loop(0, 40, lambda j, w: w * 0.99 + j * x, v), lambda v: v - i, c), x
        ),
        (X,),
    ),
    "captures across two levels": (
        lambda x: lax.scan(lambda c, a: (lax.while_loop(lambda s: s.sum() < a * 30, lambda s: s + x + a, c), c), x, jnp.arange(1.0, 9.0)),
        (X,),
    ),
    "gradient of a scan": (jax.grad(lambda x: lax.scan(lambda c, a: (jnp.sin(c) * a + x, c.sum()), x, jnp.arange(60.0))[1].sum()), (X,)),
    "vmap of a while": (jax.vmap(lambda v: lax.while_loop(lambda c: c < 50, lambda c: c * 1.5 + 1, v)), (X,)),
    "associative scan": (lambda x: lax.associative_scan(jnp.multiply, x + 0.5), (X,)),
    "rows taken and stacked": (lambda x: lax.scan(cell, jnp.zeros(5), x), (ROWS_OF,)),
    "rows taken and stacked, reversed": (lambda x: lax.scan(cell, jnp.zeros(5), x, reverse=True), (ROWS_OF,)),
    "rows, gradient": (jax.grad(lambda x: lax.scan(cell, jnp.zeros(5), x, reverse=True)[1].sum()), (ROWS_OF,)),
    "rows of 180 kB": (lambda x: lax.scan(lambda c, r: (c + r, r[:, None] * jnp.ones((5, 9000))), jnp.zeros(5), x), (ROWS_OF[:150],)),
    "rows that are the carry": (lambda x: lax.scan(lambda c, r: (r, c), jnp.zeros(5), x), (ROWS_OF,)),
    "rows as they came": (lambda x: lax.scan(lambda c, r: (r, r), jnp.zeros(5), x), (ROWS_OF,)),
    "rows from the counter": (lambda x: lax.fori_loop(0, 700, lambda i, c: c + x[i] * i, jnp.zeros(5)), (ROWS_OF,)),
    "rows of a part": (lambda x: lax.fori_loop(3, 601, lambda i, c: c.at[i + 2].set(x[650 - i]), jnp.ones((701, 5))), (ROWS_OF,)),
    "every other row": (lambda x: lax.fori_loop(0, 300, lambda i, c: c.at[2 * i].set(x[i]), jnp.ones((701, 5))), (ROWS_OF,)),
    "rows that are read again": (lambda x: lax.fori_loop(1, 700, lambda i, c: c.at[i].set(c[i - 1] * 0.5 + x[i]), jnp.zeros((700, 5))), (ROWS_OF,)),
    "rows past the end": (
        lambda x: lax.fori_loop(0, 700, lambda i, c: lax.dynamic_update_slice(c, lax.dynamic_slice(x, (i, 0), (1, 5)), (i, 0)), jnp.ones((650, 5))),
        (ROWS_OF,),
    ),
    "columns": (
        lambda x: lax.fori_loop(0, 600, lambda i, c: lax.dynamic_update_slice(c, lax.dynamic_slice(x, (0, i), (5, 1)) + 1, (0, i)), jnp.ones((5, 650))),
        (np.ascontiguousarray(ROWS_OF.T),),
    ),
    "integers": (lambda: lax.scan(lambda c, i: (c + i, (c, i)), jnp.int32(0), jnp.arange(1500)), ()),
    "bfloat16": (lambda x: lax.scan(lambda c, r: (r, c), jnp.zeros(5, jnp.bfloat16), x.astype(jnp.bfloat16)), (ROWS_OF,)),
    "a scan in a scan": (
        lambda x: lax.scan(lambda c, r: (lax.scan(lambda a, b: (a * 0.9 + b, a), c, jnp.stack([r] * 600))[0], c), jnp.zeros(5), x),
        (ROWS_OF[:20],),
    ),
    "until the host says so": (lambda x: lax.while_loop(*norm_below(1e-3), (x, jnp.float32(1), 0)), (X,)),
    "until one of two": (
        lambda x: lax.while_loop(lambda c: (c[2] < 17) & ~(c[1] <= 1e-4), norm_below(0)[1], (x, jnp.float32(1), np.uint8(250))),
        (X,),
    ),
    "until a given limit": (lambda x, limit: lax.while_loop(*norm_below(limit), (x, jnp.float32(1), 3)), (X, np.float32(0.1))),
    "until, never": (lambda x: lax.while_loop(*norm_below(2), (x, jnp.float32(1), 3)), (X,)),
    "until a bool": (lambda x: lax.while_loop(lambda c: c[1], lambda c: (c[0] * 0.9, jnp.max(c[0]) > 0.1, c[2] - 1), (x, True, 5)), (X,)),
    "until NaN": (lambda x: lax.while_loop(lambda c: c[1] > 0.1, lambda c: (c[0] * 0.9, c[1] * jnp.where(c[0][5] < 1, jnp.nan, 1.0)), (x, 1.0)), (X,)),
    "until infinity": (lambda x: lax.while_loop(lambda c: c[1] < jnp.inf, lambda c: (c[0] * 9, jnp.max(c[0])), (x, jnp.float32(1))), (X,)),
    "constants as results": (lambda x: lax.fori_loop(0, 600, lambda i, c: (jnp.float32(3), c[0] + x), (jnp.float32(1), x)), (X,)),
}


# Where a loop runs: on the device; on the host as it is; there from the beginning or from the fourth iteration on, a slice at a time.
PLACES: dict[str, dict[str, Callable[..., Any]]] = {
    "device": {"lendable": lambda self, step: False},
    "host": {"is_far_faster": lambda self, loop: True},
    "host, at once": {"is_far_faster": lambda self, loop: False, "patience": lambda self, loop: 0},
    "host, later": {"is_far_faster": lambda self, loop: False, "patience": lambda self, loop: 3},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ROWS)
def test_control_flow(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = Client.environment
    monkeypatch.setattr(Client, "environment", lambda self, chosen: (*environment(self, chosen), ("place", place)))
    monkeypatch.setattr(interrupts, "SHORT", -1)  # every loop there looks, in each iteration or every few
    monkeypatch.setattr(interrupts, "MOST", 1 if place == "host" else 7)
    for method, answer in PLACES[place].items():
        monkeypatch.setattr(Judge if hasattr(Judge, method) else partition._Cutter, method, answer)
    f, args = ROWS[name]
    got = jax.tree.leaves(jax.jit(lambda *args: f(*args))(*args))
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.tree.leaves(jax.jit(f)(*args))
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.devices() == {jax.devices("mps")[0]}
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        # a thousand steps of float32: each rounds as it likes
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("early", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_what_runs_ahead_counts_for_nothing(kind: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops of 0 to 40 iterations, whose end is found before, in and after their chunks; the condition is the host's or the device's."""
    if early:
        monkeypatch.setattr(control.runtime, "device_kind", lambda: "metal")

    @jax.jit
    def f(limit: jax.Array) -> tuple[jax.Array, jax.Array]:
        ended = (lambda c: c[0] < limit) if kind == "host" else (lambda c: jnp.sum(c[1]) < 3 * limit)
        return lax.while_loop(ended, lambda c: (c[0] + 0.5, c[1] + 0.5), (jnp.float32(0.25), jnp.full(3, 0.25)))

    for trips in range(41):
        count, values = f(np.float32(trips / 2))
        assert (float(count), values.tolist()) == (trips / 2 + 0.25, [trips / 2 + 0.25] * 3)
