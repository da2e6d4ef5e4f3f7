"""Each rewrite three ways: it fires, it does not on the near miss, and the program gives what it gave."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, plan_of, reference, run_on_mlx

from jax_mps.plan import loops
from jax_mps.plan.types import Plan
from jax_mps.rewrites import rewrite

X = np.arange(12, dtype=np.uint32)
EMPTY = np.zeros((2, 4, 0), np.float32)


def names(plan: Plan) -> list[str]:
    return [s.name.removeprefix("stablehlo.") for s in plan.steps]


@pytest.mark.parametrize(
    ("function", "operand"),
    [
        (lax.linalg.lu, EMPTY),
        (lambda x: jnp.linalg.slogdet(x)[1], EMPTY[:, :0]),
        (jnp.linalg.svd, EMPTY),
        (lambda x: jnp.sort(x, 1) + 1, EMPTY),
        (lambda x: (jnp.sum(x, -1), lax.argmax(x, 1, jnp.int32)), EMPTY),
    ],
    ids=["lu", "slogdet", "svd", "sort", "reduce"],
)
def test_what_computes_nothing_is_a_constant(function, operand) -> None:
    """LAPACK's functions divide by zero over empty matrices; what has elements is computed as ever."""
    case = Case("empty", function, (operand,))
    assert not [s for s in rewrite(plan_of(case)).steps if len(s.results) == 1 and 0 in s.result.shape and s.name != "stablehlo.constant"]
    for got, want in zip(jax.tree.leaves(jax.jit(function)(operand)), jax.tree.leaves(function(jax.device_put(operand, jax.devices("cpu")[0]))), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shift", [lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic])
@pytest.mark.parametrize(("amount", "fires"), [(0, True), (31, True), (32, False), (200, False)])
def test_shift_in_range(shift, amount, fires) -> None:
    plan = rewrite(plan_of(Case("shift", lambda x: shift(x, jnp.uint32(amount)), (X,))))
    (step,) = [s for s in plan.steps if "shift" in s.name]
    assert bool(step.attributes.get("in_range")) == fires


def test_shift_by_an_argument_is_left_alone() -> None:
    plan = rewrite(plan_of(Case("shift", lambda x, n: lax.shift_left(x, n), (X, X))))
    assert not plan.steps[-1].attributes.get("in_range")


@pytest.mark.parametrize("start", [-3, 0, 5, 11, 40])
def test_dynamic_slice_at_a_constant(start: int) -> None:
    """Clamped as at run time."""
    case = Case("slice", lambda x: lax.dynamic_slice(x, (jnp.int32(start),), (4,)), (X,))
    plan = rewrite(plan_of(case))
    assert "dynamic_slice" not in names(plan)
    assert plan.steps[-1].start_indices == (min(max(start + 12 * (start < 0), 0), 8),)  # JAX counts from the end, the spec clamps
    assert_same(run_on_mlx(case), reference(case), case)


def test_dynamic_slice_at_an_argument_is_left_alone() -> None:
    plan = rewrite(plan_of(Case("slice", lambda x, i: lax.dynamic_slice(x, (i,), (4,)), (X, np.int32(2)))))
    assert "dynamic_slice" in names(plan)


def test_an_unrolled_scan_slices_statically() -> None:
    """The counter of each copy of the body is a constant, so the slices of `xs` are static."""
    plan = plan_of(Case("scan", lambda x: lax.scan(lambda c, a: (c + a, c), x[0], x), (np.arange(6, dtype=np.float32),)))
    unrolled = rewrite(Plan("scan", loops.unroll_short(plan.body, {}, lambda step: True)))
    assert "while" not in names(unrolled)
    assert jax.devices()[0].platform == "mps"
