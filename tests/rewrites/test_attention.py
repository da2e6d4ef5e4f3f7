"""Attention as jax.nn, flax and people write it, in the form for a GPU (MLX composes it on CPU)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, plan_of
from rewrites.proof import fused, prove

from jax_mps.ops import decoding
from jax_mps.rewrites import attention, rewrite

R = np.random.default_rng(0)
Q, K, V = R.normal(size=(3, 2, 3, 5, 8)).astype(np.float32)  # batch, heads, positions, width
TQ, TK, TV = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (Q, K, V))  # batch, positions, heads, width
MANY = R.normal(size=(2, 5, 6, 8)).astype(np.float32)  # twice as many heads as there are of keys
LONG = R.normal(size=(2, 3, 9, 8)).astype(np.float32)
MASK = R.random((2, 1, 5, 5)) < 0.6
MASK[0, 0, 2] = False  # a row that sees nothing
BIAS = R.normal(size=(2, 3, 5, 5)).astype(np.float32)
BIAS[1, 2, 3], BIAS[0, 1, 0, 2:], BIAS[0, 0, 0] = -np.inf, -1e9, -1e9
HALVES = tuple(x.astype(jnp.bfloat16) for x in (Q, K, V))
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def metal(monkeypatch) -> None:
    monkeypatch.setattr(attention, "device_kind", lambda: "metal")


def attend(q, k, v, visible):
    """As in examples/gpt."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    return (jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1) @ v).swapaxes(-2, -3)


def flax_attention(q, k, v, mask):
    """batch, positions, heads, width."""
    scores = jnp.einsum("...qhd,...khd->...hqk", q / jnp.sqrt(q.shape[-1]), k)
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def grouped(q, k, v):
    """Llama's: keys of each head are shared by a group of queries."""
    b, t, h, d = q.shape
    q = q.reshape(b, t, k.shape[2], -1, d)
    weights = jax.nn.softmax(jnp.einsum("btkgd,bskd->bkgts", q, k) * d**-0.5)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(b, t, h, d)


def biased(q, k, v, bias):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) * 0.3 + bias) @ v


def causal(q, k, v):
    return attend(q, k, v, jnp.tril(jnp.ones((q.shape[-2], k.shape[-2]), bool), k.shape[-2] - q.shape[-2]))


def kind(case: Case) -> list[tuple[str, bool]]:
    steps = [s for s in rewrite(plan_of(case)).body.walk() if s.name == "jax_mps.attention"]
    return [(s.mask, s.attributes.get("guarded", False)) for s in steps]


@pytest.mark.parametrize(
    ("f", "args", "mask", "guarded"),
    [
        (lambda q, k, v: attend(q, k, v, True), (Q, K, V), "none", False),
        (attend, (Q, K, V, MASK), "array", True),
        (lambda q, k, v, p: attend(q, k, v, jnp.arange(5) <= p), (Q[0, :, :1], K[0], V[0], np.int32(3)), "array", True),  # decoding
        (lambda q, k, v: attend(q, k, v, jnp.arange(5) < 3), (Q, K, V), "array", False),
        (lambda q, k, v: attend(q, k, v, (jnp.arange(5) > 0)[:, None]), (Q, K, V), "array", True),  # the first sees nothing
        (causal, (Q, K, V), "causal", False),
        (causal, (Q, LONG, LONG), "causal", False),
        (lambda q, k, v: attend(q, k, v, jnp.tri(5, dtype=bool).T), (Q, K, V), "array", False),
        (flax_attention, (TQ, TK, TV, MASK), "array", True),
        (flax_attention, (TQ, TK, TV, np.tri(5, dtype=bool)), "array", True),  # given at run time
        (lambda q, k, v: flax_attention(q, k, v, jnp.arange(5)[:, None] >= jnp.arange(5)), (TQ, TK, TV), "causal", False),
        (grouped, (MANY, TK, TV), "none", False),
        (causal, (Q[:1], K[:1], V[:1]), "causal", False),  # `jnp.matmul` takes out dimensions of size 1
        (causal, (Q[:1, :, -1:], K[:1], V[:1]), "none", False),
        (causal, (Q[:1, :1], K[:1, :1], V[:1, :1]), "causal", False),
        (attend, (Q[:1], K[:1], V[:1], MASK[:1]), "array", True),
        (lambda q, k, v, p: attend(q, k, v, jnp.arange(5) <= p), (Q[:1, :, :1], K[:1], V[:1], np.int32(3)), "array", True),
        (biased, (Q[:1], K[:1], V[:1], BIAS[:1]), "array", True),
        (grouped, (MANY[:1], TK[:1], TV[:1]), "none", False),
        (jax.nn.dot_product_attention, (TQ[:1], TK[:1], TV[:1]), "none", False),
        (lambda q, k, v: flax_attention(q, k, v, jnp.tri(5, dtype=bool)), (TQ[:1], TK[:1], TV[:1]), "causal", False),
        (biased, (Q, K, V, BIAS), "array", True),
        (biased, (Q, K, V, BIAS[:, :1, :1]), "array", True),
        (lambda q, k, v: biased(q, k, v, jnp.where(jnp.tri(5, dtype=bool), 0, jnp.finfo(jnp.float32).min)), (Q, K, V), "causal", False),
        (lambda q, k, v, m: biased(q, k, v, jnp.where(m, 0.0, -jnp.inf)), (Q, K, V, MASK), "array", True),
        (lambda q, k, v, b: jax.nn.dot_product_attention(q, k, v, b), (TQ, TK, TV, BIAS), "array", True),
        (jax.nn.dot_product_attention, (TQ, TK, TV), "none", False),
        (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), (TQ, TK, TV), "causal", False),
        (lambda q, k, v, m: jax.nn.dot_product_attention(q, k, v, mask=m), (MANY, TK, TV, MASK), "array", True),
        (lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, scale=0.3), (MANY, TK, TV), "causal", False),
        (jax.vmap(lambda q, k, v: jax.nn.softmax(q @ k.T) @ v), (Q[0], K[0], V[0]), "none", False),
        (lambda q, k, v: jax.nn.softmax(q @ k.T) @ v, (Q[0, 0], K[0, 0], V[0, 0]), "none", False),
        (lambda q, k, v: jnp.einsum("hs,shd->hd", jax.nn.softmax(jnp.einsum("hd,shd->hs", q, k)), v), (Q[0, :, 0], TK[0], TV[0]), "none", False),
    ],
)
def test_fires(f, args, mask, guarded) -> None:
    case = Case("attention", f, args, **TOLERANCE)
    assert kind(case) == [(mask, guarded)]
    prove(case, "attention", **TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_types(dtype) -> None:
    """MLX rounds once where the steps round the scores and the weights."""
    close = {"rtol": 3e-2, "atol": 2e-2}
    prove(Case("half", causal, tuple(x.astype(dtype) for x in (Q, K, V)), **close), "attention", **close)
    if dtype is jnp.bfloat16:  # XLA's CPU backend has no product of half types with float32 sums
        args = tuple(x.astype(dtype) for x in (TQ, TK, TV))
        prove(Case("half", lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), args, **close), "attention", **close)


def weights_are_read(q, k, v):
    weights = jax.nn.softmax(q @ k.swapaxes(-1, -2))
    return weights @ v, weights


@pytest.mark.parametrize(
    ("f", "args", "names"),
    [
        (weights_are_read, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jax.vjp(causal, q, k, v)[1](q.swapaxes(-2, -3)), (Q, K, V), None),
        (lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2)).swapaxes(-1, -2) @ v, (Q, K, V), ["softmax"]),  # of the keys
        (lambda q, k, v: jax.nn.softmax(jnp.where(q @ k.swapaxes(-1, -2) > 0, -5.0, -9.0)) @ v, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jax.nn.softmax(jnp.where(MASK, q @ k.swapaxes(-1, -2), -9.0)) @ v, (Q, K, V), ["softmax"]),  # seen a little
        (lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2) * -1.0) @ v, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jax.nn.softmax((q @ k.swapaxes(-1, -2) + BIAS) * 2) @ v, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jax.nn.softmax(jnp.where(MASK, q @ k.swapaxes(-1, -2) + BIAS, -jnp.inf)) @ v, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jax.nn.softmax((q @ k.swapaxes(-1, -2)).astype(jnp.float32) + BIAS).astype(q.dtype) @ v, HALVES, ["softmax"]),
        (lambda q, k, v: jax.nn.softmax(jnp.matmul(q, k.swapaxes(-1, -2), precision="highest")) @ v, (Q, K, V), ["softmax"]),
        (lambda q, k, v: jnp.einsum("bhqk,bhkd->hqd", jax.nn.softmax(q @ k.swapaxes(-1, -2)), v), (Q, K, V), ["softmax"]),
        (lambda q, k, v: jnp.einsum("bhqk,chkd->bhcqd", jax.nn.softmax(q @ k.swapaxes(-1, -2)), v), (Q, K, V), ["softmax"]),
        (lambda q, k, v: lax.dot_general(jax.nn.softmax(q @ k.T), v, (((0,), (0,)), ((), ()))), (Q[0, 0], K[0, 0], V[0, 0]), ["softmax"]),
    ],
)
def test_near_misses(f, args, names) -> None:
    found = fused(rewrite(plan_of(Case("near", f, args))))
    assert found == names if names is not None else "attention" not in found


@pytest.mark.parametrize(("device", "dtype", "fires"), [("cpu", "float32", 0), ("cuda", "float32", 0), ("cuda", "bfloat16", 1), ("metal", "float32", 1)])
def test_where_there_is_a_kernel(device, dtype, fires, monkeypatch) -> None:
    monkeypatch.setattr(attention, "device_kind", lambda: device)
    args = tuple(jnp.asarray(x, dtype) for x in (Q, K, V))
    assert len(kind(Case("device", causal, args))) == fires


SLOWLY = (Q[:, :, :1], LONG, LONG, np.int32(3))


@pytest.mark.parametrize(("f", "args", "masks"), [
    (lambda q, k, v, p: attend(q, k, v, jnp.arange(9) <= p), SLOWLY, ["array"]), (causal, (Q, LONG, LONG), ["causal"]),
    (lambda q, k, v, p: attend(q, k, v, jnp.arange(9) <= p), tuple(x.astype(jnp.bfloat16) for x in SLOWLY[:3]) + SLOWLY[3:], ["array"]),
    (causal, (LONG, LONG, LONG), []), (jax.grad(lambda q, k, v: causal(q, k, v).sum()), (Q, LONG, LONG), []),
])  # fmt: skip
def test_few_queries_on_cuda(f, args, masks, monkeypatch) -> None:
    """Up to eight positions have a kernel of their own there, in float32 and under any mask; training keeps the steps."""
    monkeypatch.setattr(attention, "device_kind", lambda: "cuda")
    monkeypatch.setattr(decoding, "device_kind", lambda: "cuda")
    assert [mask for mask, _ in kind(Case("few", f, args))] == masks


# ---- training ------------------------------------------------------------------------------------------------------------------------


def trained(f):
    def loss(q, k, v, *masks):
        return (f(q, k, v, *masks).astype(jnp.float32) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1, 2))


ROWS = tuple(x.astype(jnp.bfloat16) for x in (TQ, TK, TV))


@pytest.mark.parametrize(("device", "dtype"), [("metal", "bfloat16"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_training_keeps_the_weights(device, dtype, monkeypatch) -> None:
    """To compute them anew took 10 to 19 % longer on an H100."""
    monkeypatch.setattr(attention, "device_kind", lambda: device)
    args = tuple(jnp.ones((2, 3, 5, 8), dtype) for _ in range(3))
    assert fused(rewrite(plan_of(Case("kept", trained(causal), args)))) == ["softmax", "softmax_gradient"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("f", [flax_attention, jax.nn.dot_product_attention])
def test_gradients_of_the_weights(f, batch, monkeypatch) -> None:
    """Batches and groups of one are dimensions that JAX sums over on the way back."""
    monkeypatch.setattr(attention, "device_kind", lambda: "cuda")
    args = *(x[:batch] for x in (TQ, TK, TV)), MASK[:batch]
    masked = (lambda q, k, v, m: f(q, k, v, mask=m)) if f is jax.nn.dot_product_attention else f
    case = Case("one", trained(masked), args, rtol=1e-4, atol=1e-5)  # gradients of sums of 300 squares
    prove(case, "softmax", "softmax_gradient", rtol=1e-4, atol=1e-5)
