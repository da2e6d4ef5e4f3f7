"""What gradients compute anew instead of keeping it, in the form for a GPU."""

from __future__ import annotations

import io
import tempfile

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of, through_a_file

from jax_mps.rewrites import recompute, rewrite

R = np.random.default_rng(0)
W = (R.normal(size=(3, 2, 16, 16)) / 12).astype(np.float32)
X = R.normal(size=(8, 16)).astype(np.float32)


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> None:
    monkeypatch.setattr(recompute, "device_kind", lambda: "cuda")
    monkeypatch.setattr(recompute, "LEAST", 256)


def layers(activation):
    """As in a transformer: what is added to the rows is a product of an activation of another product."""

    def loss(w, x):
        for i in range(w.shape[0]):
            x = x + activation(x @ w[i, 0]) @ w[i, 1]
        return (x**2).sum()

    return jax.grad(loss)


def anew(plan) -> list[str]:
    """The elementwise steps behind barriers."""
    behind, found = set(), []
    for step in plan.body.walk():
        if step.name == "stablehlo.optimization_barrier":
            behind.add(step.results[0])
        elif behind & {*step.operands} and step.name in recompute._CHEAP:
            found.append(step.name.removeprefix("stablehlo."))
    return found


def kept(plan) -> int:
    """Bytes of elementwise results that late steps read."""
    writer = recompute._Writer(plan.body)
    fixed, loose = writer._kept()
    return sum(v.type.nbytes for v in fixed | loose if v in writer.made and writer.made[v].name in recompute._CHEAP and v.shape == X.shape)


@pytest.mark.parametrize("activation", [
    jax.nn.gelu, jax.nn.silu, lambda x: x * jnp.tanh(x), lambda x: jnp.where(x > 0, x, 0.1 * x) * x, lambda x: jnp.sin(x) * jnp.exp(-(x * x)),
], ids=["gelu", "silu", "tanh", "where", "sine"])  # fmt: skip
def test_fires(activation, monkeypatch) -> None:
    case = Case("anew", layers(activation), (W, X), rtol=2e-5, atol=1e-5)
    plan, run, arguments = lowered(case, rewritten=True)
    assert anew(plan)
    ours = results_of(plan, run(*arguments), case)
    loaded = results_of(plan, through_a_file(run, arguments), case)
    assert_same(ours, reference(case), case)
    monkeypatch.setattr(recompute, "device_kind", lambda: "cpu")
    plain, run, arguments = lowered(case, rewritten=True)
    assert not anew(plain)
    assert kept(plan) < kept(plain)
    assert len(plan.steps) < 2 * len(plain.steps)
    for a, b, c in zip(ours, results_of(plain, run(*arguments), case), loaded, strict=True):
        np.testing.assert_array_equal(a, b)  # the same steps
        np.testing.assert_array_equal(a, c)


def shared(w, x):
    y = jnp.tanh(x @ w[0, 0])  # its gradient reads the result alone
    return ((y @ w[0, 1]) ** 2).sum()


@pytest.mark.parametrize("f", [
    jax.grad(shared),
    layers(jax.nn.relu),  # reads what it compared and nothing that is kept for anything else
    lambda w, x: jnp.tanh(x @ w[0, 0]) * 2 + jnp.tanh(x @ w[0, 1]),
    lambda w, x: x * 0.9 + ((x @ w[0, 0]) @ w[0, 1]) @ w[1, 0],  # read late alone, and so computed late
    lambda w, x: (lambda y: jnp.exp(y) @ w[0, 1] + jnp.exp(y))(lax.sort(x @ w[0, 0])),  # not late
], ids=["tanh", "relu", "no gradient", "late alone", "one product"])  # fmt: skip
def test_near_misses(f) -> None:
    assert not anew(rewrite(plan_of(Case("near", f, (W, X)))))


def test_small_values_and_the_cpu_are_left_alone(monkeypatch) -> None:
    case = Case("small", layers(jax.nn.gelu), (W, X))
    monkeypatch.setattr(recompute, "LEAST", X.nbytes + 1)
    assert not anew(rewrite(plan_of(case)))
    monkeypatch.setattr(recompute, "LEAST", 256)
    monkeypatch.setattr(recompute, "device_kind", lambda: "cpu")
    assert not anew(rewrite(plan_of(case)))


def test_inside_a_loop() -> None:
    def body(w, x):
        return lax.scan(lambda w, _: (w - 0.1 * layers(jax.nn.gelu)(w, x), None), w, length=40)[0]

    assert anew(rewrite(plan_of(Case("loop", body, (W, X)))))


def test_peak_memory(monkeypatch) -> None:
    """Of a deep stack, uncompiled; three arrays of a layer are no longer kept."""
    monkeypatch.setattr(recompute, "LEAST", 1 << 18)
    w, x = jnp.ones((8, 2, 16, 16), jnp.float32) / 16, jnp.ones((1 << 12, 16), jnp.float32)
    peaks = []
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(recompute, "device_kind", lambda device=device: device)
        _, run, arguments = lowered(Case("deep", layers(jax.nn.gelu), (np.asarray(w), np.asarray(x))), rewritten=True)
        f = imported(run, arguments)
        mx.eval(f(*arguments))
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(1)  # MLX waits for each step: the peak depends on how far it is ahead of them
        mx.eval(f(*arguments))
        mx.set_memory_limit(limit)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] <= peaks[0] - 13 * x.nbytes  # two arrays for each of seven layers; now and then MLX is ahead by one


def imported(run, arguments):
    with tempfile.TemporaryDirectory() as folder:
        mx.export_function(f"{folder}/f.mlxfn", run, *arguments)
        return mx.import_function(f"{folder}/f.mlxfn")


def test_a_checkpoint_computes_anew() -> None:
    """MLX would find that both computations of a `jax.checkpoint` are one, but for its barrier."""
    f = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))

    def loss(w, x):
        for i in range(3):
            x = f(x, w[i, 0])
        return (x**2).sum()

    case = Case("checkpoint", jax.grad(loss), (W, X), rtol=2e-5, atol=1e-5)
    plan, run, arguments = lowered(case)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)
    text = io.StringIO()
    mx.export_to_dot(text, *imported(run, arguments)(*arguments))
    assert text.getvalue().count('label ="Tanh"') == 6
