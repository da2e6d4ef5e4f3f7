"""Elementwise steps that MLX would cut: the plan, and the kernel's own source, compiled for the CPU, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import io
import re

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import optax
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from ops.kernels import needs_compiler
from ops.test_row_kernels import kernel_on_cpu, normal
from rewrites.proof import fused

from jax_mps.ops import row_kernels
from jax_mps.rewrites import deep, rewrite


@pytest.fixture
def cuda(monkeypatch):
    """As on CUDA, of arrays of any size."""
    needs_compiler()
    for module in (row_kernels, deep):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(deep, "LEAST", 1)
    monkeypatch.setattr(deep, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(row_kernels, "_kernel", kernel_on_cpu)


def kernels(plan):
    return [step for step in plan.body.walk() if step.name == "jax_mps.row_kernel"]


def prove(f, *args, operands, outputs=1, count=1, rtol=2e-6):
    """So many kernels, each with so many operands and outputs; the results are those of the steps, and those of XLA."""
    case = Case("deep", f, args, rtol=8 * rtol, atol=1e-6)
    plan, run, arguments = lowered(case, rewritten=True)
    found = kernels(plan)
    assert [(len(k.operands), len(k.results)) for k in found] == [(operands, outputs)] * count
    ours = results_of(plan, run(*arguments), case)
    plain_plan, plain, _ = lowered(case)
    assert_same(ours, results_of(plain_plan, plain(*arguments), case), Case("deep, cut", f, args, rtol, 1e-7))
    assert_same(ours, reference(case), case)
    return found


def chain(x, steps):
    for i in range(steps):
        x = x * x - 0.5 if i % 2 else jnp.tanh(x)
    return x


def test_a_long_chain(cuda) -> None:
    prove(lambda x: chain(x, 10), normal(6, 40), operands=1)


def row(x, steps):
    for _ in range(steps):
        x = jnp.tanh(x)
    return x


def test_what_mlx_fuses_stays(cuda) -> None:
    """As many steps as MLX makes one kernel of."""

    def compiled(steps):
        def f(x):
            for _ in range(steps):
                x = mx.tanh(x)
            return x

        text = io.StringIO()
        mx.export_to_dot(text, mx.compile(f)(mx.zeros((4, 4))))
        return re.findall(r'label ="(Compiled\w+|Tanh)"', text.getvalue())

    assert compiled(deep.DEEPEST) == ["Compiled" + "Tanh" * deep.DEEPEST]
    assert len(compiled(deep.DEEPEST + 1)) == 2
    for steps in (deep.DEEPEST, deep.DEEPEST + 1):
        plan = rewrite(plan_of(Case("row", lambda x, steps=steps: row(x, steps), (normal(6, 40),))))
        assert len(kernels(plan)) == (steps > deep.DEEPEST)


def test_an_update_of_large_parameters_stays(cuda) -> None:
    """MLX writes it over what it replaces."""
    optimizer = optax.adamw(1e-3, weight_decay=0.01)

    def update(p, g, state):
        updates, state = optimizer.update(g, state, p)
        return optax.apply_updates(p, updates), state

    p = normal(64, 64)
    assert kernels(rewrite(plan_of(Case("adamw", update, (p, p, jax.tree.map(np.asarray, optimizer.init(p))))))) == []


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (130, 4096), (3, 5000)])
def test_shapes(shape, cuda) -> None:
    prove(lambda x, y: chain(x, 8) * y + chain(y, 3), normal(*shape), normal(*shape), operands=2)


def test_gelu_s_gradient(cuda) -> None:
    """Three kernels of MLX's."""
    prove(lambda x, g: jax.vjp(jax.nn.gelu, x)[1](g)[0], normal(8, 96), normal(8, 96), operands=2)


def test_broadcasts(cuda) -> None:
    """A line, a number for each row, a scalar and a mask are read where they are needed."""

    def f(x, line, row, scalar, mask):
        return jnp.where(mask, chain((x + line) * row[:, None] + scalar, 8), 0)

    prove(f, normal(40, 64), normal(64), normal(40), np.float32(0.3), normal(40, 64) > 0, operands=5)


def test_what_others_read_later_is_written(cuda) -> None:
    def f(x, w):
        y = jnp.tanh(x) * 0.5
        z = chain(y, 10)
        return z, (z @ w) @ w.T + (y @ w) @ w.T

    prove(f, normal(8, 64), 0.1 * normal(64, 64), operands=1, outputs=2)


def test_what_others_read_before_is_read(cuda) -> None:
    """A product lies between: the chain's end needs what the product makes of its beginning."""

    def f(x, w):
        y = jnp.tanh(x)
        return chain(y, 10) * (y @ w)

    (kernel,) = prove(f, normal(8, 64), normal(64, 64), operands=2)
    assert len(kernel.original.steps) > 10


def test_chains_that_read_each_other(cuda) -> None:
    """The first is read by a product, which the second begins with."""
    prove(lambda x, w: chain(chain(x, 10) @ w, 10), normal(8, 64), 0.1 * normal(64, 64), operands=1, count=2, rtol=2e-5)


def test_half_types(cuda) -> None:
    """Rounded after each step, as the steps are."""
    prove(lambda x: chain(x, 8), normal(6, 40, dtype="bfloat16"), operands=1, rtol=1e-2)
    prove(lambda x: chain(x.astype(np.float32), 8).astype(jnp.float16), normal(6, 40, dtype="float16"), operands=1, rtol=2e-3)


def test_in_a_loop(cuda) -> None:
    def f(x):
        return lax.fori_loop(0, 1000, lambda i, x: chain(x, 10), x)

    plan = rewrite(plan_of(Case("loop", f, (normal(6, 40),))))
    assert len(kernels(plan)) == 1


@pytest.mark.parametrize("f", [
    lambda x: jnp.cumsum(chain(x, 4), 1),  # too short
    lambda x: jnp.sort(x) + 1,
    lambda x: jnp.sort(chain(jnp.sort(chain(x, 6)), 6)),  # too short either side of a sort
    lambda x: row(lax.complex(x, x), 12),  # no text in CUDA's C++
])  # fmt: skip
def test_near_misses(f, cuda) -> None:
    assert kernels(rewrite(plan_of(Case("near", f, (normal(6, 40),))))) == []


def test_small_arrays_and_narrow_rows_stay(monkeypatch) -> None:
    monkeypatch.setattr(deep, "device_kind", lambda: "cuda")
    for shape in ((512, 512), (1 << 20, 3), (16, 1 << 16)):
        plan = rewrite(plan_of(Case("small", lambda x: chain(x, 10), (np.zeros(shape, np.float32),))))
        assert kernels(plan) == [], shape


def test_other_devices_have_none() -> None:
    plan = rewrite(plan_of(Case("cpu", lambda x: chain(x, 10), (np.zeros((1024, 1024), np.float32),))))
    assert fused(plan) == []
