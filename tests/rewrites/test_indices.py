"""Indexing as JAX writes it: from the end below 0, clamped, filled or dropped outside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops import test_gather, test_scatter
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from rewrites.proof import fused as fused_steps

from jax_mps.ops import fused, gather, rows, scatter
from jax_mps.rewrites import rewrite

R = np.random.default_rng(0)
X = R.normal(size=(6, 7)).astype(np.float32)
WIDE = R.normal(size=(6, 3, 40)).astype(np.float32)
I = np.array([1, -2, 7, 3, 1, -9, 0, -6, -7, 5, 2**31 - 1, -(2**31)], np.int32)
K = R.integers(-9, 9, (6, 4)).astype(np.int32)
U = R.normal(size=(12, 7)).astype(np.float32)


def wrapped(case: Case) -> int:
    return sum(bool(s.attributes.get("wrapped")) for s in rewrite(plan_of(case)).steps)


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch):
    """The forms that the lowerings choose for a GPU, run on the CPU."""
    if request.param == "gpu":
        for module in (gather, scatter, rows, fused):
            if hasattr(module, "device_kind"):
                monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    return request.param


def check(case: Case) -> None:
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)


CASES = [
    (Case("rows", lambda x, i: x[i], (X, I)), 1, []),
    (Case("rows of long", lambda x, i: x[i], (WIDE, I)), 1, []),
    (Case("columns", lambda x, i: x[:, i], (X, I)), 1, []),
    (Case("middle", lambda x, i: x[:, i], (WIDE, I)), 1, []),
    (Case("matrix of indices", lambda x, i: x[i.reshape(3, 4)], (X, I)), 1, []),
    (Case("int8", lambda x, i: x[i], (X, I[:8].astype(np.int8))), 0, []),  # converted after it was wrapped
    (Case("take", lambda x, i: jnp.take(x, i, axis=0), (X, I)), 1, ["in_bounds"]),
    (Case("take along the last", lambda x, i: jnp.take_along_axis(x, i, 1), (X, K)), 1, ["in_bounds"]),
    (Case("take along the first", lambda x, i: jnp.take_along_axis(x, i, 0), (X, K.T[:, :1].repeat(7, 1))), 1, ["in_bounds"]),
    (Case("clip", lambda x, i: jnp.take(x, i, axis=0, mode="clip"), (X, I)), 0, []),
    (Case("fill without wrapping", lambda x, i: x.at[i].get(mode="fill", wrap_negative_indices=False), (X, I)), 0, []),
    (Case("add", lambda x, i, u: x.at[i].add(u), (X, I, U), atol=1e-6), 1, []),
    (Case("set", lambda x, i, u: x.at[i].set(u), (X, I[:4], U[:4])), 1, []),
    (Case("max", lambda x, i, u: x.at[i].max(u), (X, I, U)), 1, []),
    (Case("gradient", lambda x, i, u: jax.vjp(lambda x: x[i], x)[1](u), (X, I, U), atol=1e-6), 1, []),
    (Case("gradient of take", lambda x, i, u: jax.vjp(lambda x: jnp.take(x, i, axis=0), x)[1](u), (X, I, U), atol=1e-6), 1, []),
    (Case("one a row", lambda x, i, u: jax.vjp(lambda x: jnp.take_along_axis(x, i, 1), x)[1](u), (X, I[:6, None], U[:6, :1])), 1, []),
    (Case("one a column", lambda x, i, u: jax.vjp(lambda x: jnp.take_along_axis(x, i, 0), x)[1](u), (X, I[None, :7], U[:1])), 1, []),
    (Case("two a row", lambda x, i, u: jax.vjp(lambda x: jnp.take_along_axis(x, i, 1), x)[1](u), (X, K[:, :2], U[:6, :2]), atol=1e-6), 1, []),
    (Case("segment_sum", lambda i, u: jax.ops.segment_sum(u, i, 5), (I, U), atol=1e-6), 0, []),
    (Case("segment_sum of scalars", lambda i, u: jax.ops.segment_sum(u[:, 0], i, 5), (I, U), atol=1e-6), 0, []),
    (Case("segment_sum of int32", lambda i, u: jax.ops.segment_sum(u.astype(int), i, 5), (I, U)), 0, []),
    (Case("segment_sum of uint8 indices", lambda i, u: jax.ops.segment_sum(u, i, 5), (I.astype(np.uint8), U), atol=1e-6), 0, []),
    (Case("segment_max", lambda i, u: jax.ops.segment_max(u, i, 5), (I, U)), 0, []),
    (Case("two dimensions", lambda x, i: x[i, i[::-1]], (X, I)), 0, []),
]


@pytest.mark.parametrize(("case", "count", "names"), CASES, ids=str)
def test_fires_or_not(case, count, names, device) -> None:
    assert wrapped(case) == count
    assert fused_steps(rewrite(plan_of(case))) == names
    check(case)


@pytest.mark.parametrize(("f", "args", "left"), [
    (lambda x: x[..., 0], (X[..., None],), 0),
    (lambda x, g: jax.vjp(lambda x: x[..., 0], x)[1](g), (X[..., None], X), 0),
    (lambda x, g: x.at[..., 0].add(g), (X[..., None], X), 1),  # not into zeros
    (lambda x, i: x[..., i], (WIDE, I[1]), 1),
])  # fmt: skip
def test_of_all(f, args, left, device) -> None:
    """A dimension of size 1 that an index takes away, and the gradient of that: reshapes."""
    case = Case("all", f, args)
    check(case)
    names = ("gather", "scatter", "dynamic_slice", "dynamic_update_slice")
    assert sum(step.name.removeprefix("stablehlo.") in names for step in rewrite(plan_of(case)).steps) == left


def test_of_converted(device) -> None:
    """Some of a half type's numbers are taken before they are all converted, many afterwards."""
    half = X.astype(np.float16)
    for f, left in ((lambda x, i: jnp.take_along_axis(x.astype(np.float32), i, 1), "float16"), (lambda x, i: x.astype(np.float32)[i], "float32")):
        case = Case("converted", f, (half, K if left == "float16" else I))
        check(case)
        assert [step.operand.dtype for step in rewrite(plan_of(case)).steps if step.name == "stablehlo.gather"] == [left]


GATHER = """func.func @main(%x: tensor<6x7xf32>, %i: tensor<4xi32>) -> tensor<4x7xf32> {{
  %zero = stablehlo.constant dense<{zero}> : tensor<4xi32>
  %size = stablehlo.constant dense<{size}> : tensor<4xi32>
  %below = stablehlo.compare {direction}, %i, %zero : (tensor<4xi32>, tensor<4xi32>) -> tensor<4xi1>
  %more = stablehlo.add %i, %size : tensor<4xi32>
  %j = stablehlo.select %below, %more, %i : tensor<4xi1>, tensor<4xi32>
  %k = stablehlo.reshape %j : (tensor<4xi32>) -> tensor<4x1xi32>
  %0 = "stablehlo.gather"(%x, %k) <{{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0],
    index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 7>}}> : (tensor<6x7xf32>, tensor<4x1xi32>) -> tensor<4x7xf32>
  return %0 : tensor<4x7xf32>
}}"""


@pytest.mark.parametrize(("zero", "size", "direction", "count"), [(0, 6, "LT", 1), (0, 5, "LT", 0), (1, 6, "LT", 0), (0, 6, "LE", 0), (0, 7, "LT", 0)])
def test_near_misses(zero, size, direction, count, device) -> None:
    case = Case("near", GATHER.format(zero=zero, size=size, direction=direction), (X, np.array([-6, -7, 2, 9], np.int32)))
    assert wrapped(case) == count
    check(case)


@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.parametrize("case", [*test_gather.CASES, *test_scatter.CASES], ids=str)
def test_the_tables_rewritten(case, device) -> None:
    """Every row of the op tables in a GPU's forms."""
    check(case)
