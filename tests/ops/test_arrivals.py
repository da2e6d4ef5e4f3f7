"""Kernels that finish their sums by themselves: their own source, compiled for the CPU, block by block from either end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops import test_columns, test_norm_rows
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from ops.kernels import needs_compiler
from rewrites.proof import fused
from rewrites.test_norms import gpt, llama

import jax_mps.ops.fused as fused_ops
from jax_mps.ops import arrivals, columns, norm_rows
from jax_mps.plan.text import module_text
from jax_mps.rewrites import arrivals as counted_sums
from jax_mps.rewrites import columns as sums_of_columns
from jax_mps.rewrites import norm_ends, rewrite


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def cuda(request, monkeypatch):
    """Kernels as on CUDA, of arrays of any size; those that were used, and whether they finish their sums."""
    needs_compiler()
    used = []
    for module in (arrivals, columns, norm_rows, fused_ops, counted_sums, sums_of_columns, norm_ends):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    for module in (columns, norm_rows):
        monkeypatch.setattr(module, "_FEWEST", 64)
    monkeypatch.setattr(norm_rows, "_THREADS", 64)
    monkeypatch.setattr(columns, "_BLOCKS", 4)
    monkeypatch.setattr(columns, "_kernel", lambda *key: used.append(("columns", key[-1])) or test_columns.compiled(*key, request.param))
    monkeypatch.setattr(norm_rows, "_kernel", lambda how: used.append(("norm", how.counted)) or test_norm_rows.compiled(how, norm_rows._THREADS, request.param))
    monkeypatch.setattr(arrivals, "_kernel", lambda: lambda *, output_shapes, **how: [mx.array(np.zeros(output_shapes[0], np.uint32))])
    return used


R = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return R.normal(0.5, 1, shape).astype(np.float32)


def words(first: int) -> tuple[mx.array, int]:
    """Words of memory with other kernels' numbers before and after its own."""
    array = np.full(first + 2 * arrivals.WORDS, 7, np.uint32)
    array[first : first + arrivals.WORDS] = 0
    return mx.array(array), first


@pytest.mark.parametrize("shape", [(4100, 8), (3000, 12), (301, 3), (1000, 7), (2048, 1), (700, 130), (64, 1030), (900, 300)])
@pytest.mark.parametrize("kind", ["x", "x,xy"])
def test_column_sums(kind, shape, cuda, monkeypatch) -> None:
    monkeypatch.setattr(columns, "_BLOCKS", 64)
    arrays = [normal(*shape) for _ in range(1 + ("y" in kind))]
    got = columns.sums(kind, *map(mx.array, arrays), words=words(128))
    wide = [a.astype(np.float64) for a in arrays]
    for a, b in zip(got, [wide[0], wide[0] * wide[-1]], strict=False):
        np.testing.assert_allclose(np.array(a), b.sum(0), rtol=2e-6, atol=2e-4)
    assert cuda == [("columns", columns._divided(*shape, 1 if shape[1] % 4 else 4)[2] > 1)]


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 33, 256])
@pytest.mark.parametrize("count", [8, 33])
def test_norms(count, blocks, cuda, monkeypatch) -> None:
    """Blocks in groups of sixteen, one of which may be smaller."""
    monkeypatch.setattr(norm_rows, "_BLOCKS", blocks)
    x, g, s, a = (normal(600, count), normal(600, count), normal(count), normal(600, count))
    how = {"centred": True, "sums": norm_rows.EVERY}
    got = norm_rows.gradient(*map(mx.array, (x, g, s, a)), 1e-5, mx.float32, **how, words=words(64))
    for ours, theirs in zip(got, test_norm_rows.exact(x, g, s, a, 1e-5, **how), strict=True):
        np.testing.assert_allclose(np.array(ours), theirs, rtol=1e-5, atol=np.abs(theirs).max() * 3e-6)
    assert cuda == [("norm", True)]


def test_either_order_gives_the_same(monkeypatch) -> None:
    """Whichever block is last, to the last bit."""
    needs_compiler()
    x, g = mx.array(normal(600, 40)), mx.array(normal(600, 40))
    found = []
    for backwards in (False, True):
        monkeypatch.setattr(norm_rows, "_kernel", lambda how, backwards=backwards: test_norm_rows.compiled(how, norm_rows._THREADS, backwards))
        monkeypatch.setattr(columns, "_kernel", lambda *key, backwards=backwards: test_columns.compiled(*key, backwards))
        sums = norm_rows.gradient(x, g, None, None, 1e-5, mx.float32, centred=True, sums=norm_rows.EVERY, words=words(0))[1:]
        found.append([np.array(v).tobytes() for v in (*sums, *columns.sums("x", x, words=words(0)))])
    assert found[0] == found[1]


def test_how_many_words() -> None:
    assert 1 + norm_rows._BLOCKS / norm_rows._GROUP <= arrivals.WORDS and norm_rows._BLOCKS <= norm_rows._GROUP**2


def test_long_rows_are_left_to_mlx(cuda) -> None:
    """As many blocks as there are processors sum up what would be too much for one."""
    for count, finishes in ((2730, True), (2731, False)):
        assert norm_rows.finishes(norm_rows.EVERY, count) is finishes
    norm_rows.gradient(mx.array(normal(3, 4000)), mx.array(normal(3, 4000)), None, None, 1e-5, mx.float32, centred=True, sums=("rows",), words=words(0))
    assert cuda == [("norm", False)]


# ---- programs ------------------------------------------------------------------------------------------------------------------------


def run(f, *args, **close) -> list[str]:
    """Compare with JAX on the CPU; the rewritten steps."""
    case = Case("counted", f, args, **close)
    plan, program, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)
    text = Case("host", module_text(plan.arguments, plan.steps, plan.results), args, **close)
    assert_same(reference(text), reference(case), text)
    return fused(plan)


CLOSE = {"rtol": 2e-5, "atol": 1e-4}  # sums of 600 terms, in another order


def layers(norm):
    def loss(w, s, b, x, p):
        for _ in range(2):
            x = x + jnp.tanh(norm(x, s, b) @ w + p)
        return jnp.sin(norm(x, s, b) @ w).sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))


@pytest.mark.parametrize("norm", [gpt, lambda x, s, b: llama(x, s)])
def test_layers(norm, cuda) -> None:
    """All of them count in one array, each at a place of its own."""
    args = normal(24, 24) / 5, normal(24), normal(24), normal(20, 30, 24), normal(24)
    names = run(layers(norm), *args, rtol=2e-5, atol=1e-3)  # of up to 2,600, in sums of 600 terms in another order
    assert names.count("zeros") == 1 and names.count("norm_gradient") == 3 and set(cuda) <= {("norm", True), ("columns", True)}
    plan = rewrite(plan_of(Case("layers", layers(norm), args)))
    steps = [step for step in plan.steps if "first_word" in step.attributes]
    assert [step.first_word for step in steps] == list(range(0, 64 * len(steps), 64))
    assert {step.operands[-1].shape for step in steps} == {(64 * len(steps),)}


def test_one_sum_is_left_to_mlx(cuda) -> None:
    """Which takes a second kernel, as the zeros would."""
    assert run(lambda x: x.sum(0), normal(600, 6), **CLOSE) == ["column_sums"]
    assert cuda == [("columns", False)]


def test_many_parts_are_left_to_mlx(cuda, monkeypatch) -> None:
    monkeypatch.setattr(columns, "_MOST_PARTS", 2)
    assert run(lambda x: (x.sum(0), jnp.cos(x).sum(0)), normal(600, 6), **CLOSE) == ["column_sums"] * 2
    assert cuda == [("columns", False)] * 2


def test_sums_with_factors(cuda) -> None:
    f = lambda x, y, r: ((x * (y * r)).sum(0), y.sum(0), (x * x).sum(0))  # noqa: E731
    assert run(f, normal(600, 6), normal(600, 6), normal(6), **CLOSE).count("zeros") == 1
    assert cuda == [("columns", True)] * 2


def test_loops(cuda) -> None:
    """Each iteration has zeros of its own."""

    def f(x):
        return lax.fori_loop(0, 100, lambda i, c: (c[0] * 0.5 + jnp.cos(c[0]).sum(0) * 1e-3, jnp.tanh(c[0]).sum(0) + lax.sort(c[0]).sum(0)), (x, x[0]))

    plan = rewrite(plan_of(Case("loop", f, (normal(600, 6),))))
    (loop,) = (step for step in plan.steps if step.regions)
    inside = [step.name for step in loop.regions[1].steps]
    assert inside.count("jax_mps.zeros") == 1 and "jax_mps.zeros" not in [step.name for step in plan.steps]


def test_on_no_other_device(monkeypatch) -> None:
    plan = plan_of(Case("plain", lambda x: (x.sum(0), jnp.cos(x).sum(0)), (normal(600, 1000),)))
    for device in ("cpu", "metal"):
        for module in (columns, sums_of_columns, counted_sums):
            monkeypatch.setattr(module, "device_kind", lambda device=device: device)
        assert fused(rewrite(plan)) == []
