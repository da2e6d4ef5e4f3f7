"""A fused step still prints as the StableHLO steps that it stands for: the host may have to run it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.harness import Case, assert_same, plan_of, reference

from jax_mps.plan.loops import inline
from jax_mps.plan.text import module_text
from jax_mps.plan.types import Step, Value
from jax_mps.rewrites import bias, join, recompute, rewrite

X = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)
KEY = np.array([1, 2], np.uint32)


def norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


# In the loop, a row is taken at an index to which a constant of the program is added where it is negative; the program returns that constant, too.
SHARED = """func.func @main(%x: tensor<4x6xf32>, %i: tensor<2xi32>) -> (tensor<2x6xf32>, tensor<2xi32>) {
  %zero = stablehlo.constant dense<0> : tensor<2xi32>
  %four = stablehlo.constant dense<4> : tensor<2xi32>
  %rows = stablehlo.constant dense<0.0> : tensor<2x6xf32>
  %r:2 = stablehlo.while(%c = %i, %y = %rows) : tensor<2xi32>, tensor<2x6xf32>
  cond {
    %b = stablehlo.constant dense<2> : tensor<i32>
    %h = stablehlo.slice %c [0:1] : (tensor<2xi32>) -> tensor<1xi32>
    %s = stablehlo.reshape %h : (tensor<1xi32>) -> tensor<i32>
    %p = stablehlo.compare LT, %s, %b : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %p : tensor<i1>
  } do {
    %one = stablehlo.constant dense<1> : tensor<2xi32>
    %neg = stablehlo.compare LT, %c, %zero : (tensor<2xi32>, tensor<2xi32>) -> tensor<2xi1>
    %up = stablehlo.add %c, %four : tensor<2xi32>
    %w = stablehlo.select %neg, %up, %c : tensor<2xi1>, tensor<2xi32>
    %at = stablehlo.reshape %w : (tensor<2xi32>) -> tensor<2x1xi32>
    %g = "stablehlo.gather"(%x, %at) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0],
      index_vector_dim = 1>, slice_sizes = array<i64: 1, 6>}> : (tensor<4x6xf32>, tensor<2x1xi32>) -> tensor<2x6xf32>
    %n = stablehlo.add %c, %one : tensor<2xi32>
    %z = stablehlo.add %y, %g : tensor<2x6xf32>
    stablehlo.return %n, %z : tensor<2xi32>, tensor<2x6xf32>
  }
  return %r#1, %four : tensor<2x6xf32>, tensor<2xi32>
}"""


PROGRAMS = pytest.mark.parametrize(
    ("f", "args"),
    [
        (lambda x: jax.vjp(jax.nn.softmax, x)[1](x)[0] + jax.nn.log_softmax(norm(x)), (X,)),
        (jax.grad(lambda x, s: (jnp.sin(x) + norm(x) * s)[1:].sum(), (0, 1)), (X, X[0])),
        (lambda x, i: jnp.take(x, i, axis=0), (X, np.array([-1, 2, 9], np.int32))),
        (lambda k: jax.random.normal(jax.random.split(jax.random.wrap_key_data(k))[1], (5,)), (KEY,)),
        (SHARED, (X, np.array([-4, 2], np.int32))),
    ],
)


@PROGRAMS
def test_prints_as_it_was(f, args) -> None:
    case = Case("host", f, args)
    plan = rewrite(plan_of(case))
    assert any("original" in s.attributes for s in plan.body.walk())
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert_same(reference(Case("text", text, args)), reference(case), case)


@PROGRAMS
def test_copies_print_as_it_was(f, args) -> None:
    """As when a loop's body is repeated: the copy's values are others."""
    case = Case("host", f, args)
    plan = rewrite(plan_of(case))
    arguments = tuple(Value(v.type) for v in plan.arguments)
    steps: list[Step] = []
    results = inline(plan.body, arguments, steps)
    assert_same(reference(Case("text", module_text(arguments, steps, results), args)), reference(case), case)


def test_what_only_a_gpu_has_prints(monkeypatch) -> None:
    """Barriers, products with a bias, views."""
    monkeypatch.setattr(recompute, "device_kind", lambda: "cuda")
    monkeypatch.setattr(recompute, "LEAST", 64)
    monkeypatch.setattr(bias, "device_kind", lambda: "cuda")

    def loss(w, x):
        for i in range(3):
            q, k = jnp.split(x @ w[i] + w[i, 0], 2, -1)
            x = x + jax.nn.gelu(x @ w[i]) @ w[i] + jnp.concatenate([q @ k.T @ k, q], -1).reshape(1, 8, 8).swapaxes(0, 1).reshape(8, 8)
        return (x**2).sum()

    case = Case("host", jax.value_and_grad(loss), ((np.arange(192, dtype=np.float32).reshape(3, 8, 8) % 7 - 3) / 30, np.eye(8, dtype=np.float32)))
    plan = rewrite(plan_of(case))
    assert {"stablehlo.optimization_barrier", "jax_mps.biased_product"} <= {s.name for s in plan.steps}
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert_same(reference(Case("text", text, case.args)), reference(case), Case("close", case.f, case.args, rtol=1e-5, atol=1e-6))


def test_joined_updates_print(monkeypatch) -> None:
    """In a loop's body, too, with numbers from outside of it."""
    monkeypatch.setattr(join, "device_kind", lambda: "cuda")

    def f(xs, rate):
        def step(_, xs):
            return [x - rate * jnp.cumsum(x) * 0.1 for x in xs]

        return [x * rate + 1 for x in jax.lax.fori_loop(0, 3, step, xs)]

    case = Case("host", f, ([np.arange(n, dtype=np.float32) for n in (2, 3, 4, 5)], np.float32(0.3)))
    plan = rewrite(plan_of(case))
    assert sum(s.name == "jax_mps.joined" for s in plan.body.walk()) == 2
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert_same(reference(Case("text", text, jax.tree.leaves(case.args))), reference(case), case)
