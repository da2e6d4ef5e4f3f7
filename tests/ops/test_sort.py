"""sort by any comparator that JAX builds, top_k, and the order of NaNs, zeros and equal keys."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mps.errors import Unsupported
from jax_mps.ops import sort

from .harness import Case, assert_same, check, check_both, run_on_mlx

INTS = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32"]
FLOATS = ["float16", "bfloat16", "float32"]
R = np.random.default_rng(0)
X = R.normal(size=(6, 40)).astype(np.float32)
I = R.integers(-4, 5, (6, 40)).astype(np.int32)
ODD = X.copy()
for start, step, value in ((3, 7, np.nan), (5, 9, -0.0), (4, 11, 0.0), (6, 31, -np.nan), (1, 37, np.inf), (2, 41, -np.inf)):
    ODD.flat[start::step] = value
CODD = np.stack([np.round(ODD), np.round(ODD[::-1])], -1).view(np.complex64)[..., 0]


def cast(x, dtype):
    return (x * 5).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def text(comparator, operands=1, kind="f32", dimension=1):
    """A sort of 6x40 operands by any comparator over %a0, %b0, %a1, %b1, ..."""
    types = ", ".join([f"tensor<6x40x{kind}>"] * operands)
    inputs = ", ".join(f"%x{n}: tensor<6x40x{kind}>" for n in range(operands))
    names = ", ".join(f"%x{n}" for n in range(operands))
    block = ", ".join(f"%a{n}: tensor<{kind}>, %b{n}: tensor<{kind}>" for n in range(operands))
    results = "%0" if operands == 1 else ", ".join(f"%0#{n}" for n in range(operands))
    return f"""func.func @main({inputs}) -> ({types}) {{
      %0{"" if operands == 1 else f":{operands}"} = "stablehlo.sort"({names}) <{{dimension = {dimension} : i64, is_stable = true}}> ({{
        ^bb0({block}):
          {comparator}
      }}) : ({types}) -> ({types})
      return {results} : {types}
    }}"""


def compare(direction, x="%a0", y="%b0", kind="f32", how="FLOAT", result="%r"):
    return f"{result} = stablehlo.compare {direction}, {x}, {y}, {how} : (tensor<{kind}>, tensor<{kind}>) -> tensor<i1>\n"


RETURN = "stablehlo.return %r : tensor<i1>"
LT = compare("LT") + RETURN
ABS = "%x = stablehlo.abs %a0 : tensor<f32>\n %y = stablehlo.abs %b0 : tensor<f32>\n" + compare("GT", "%x", "%y") + RETURN
SUMS = "%x = stablehlo.add %a0, %a1 : tensor<f32>\n %y = stablehlo.add %b0, %b1 : tensor<f32>\n" + compare("LT", "%x", "%y") + RETURN
MIXED = (
    compare("GT", kind="i32", how="SIGNED", result="%g") + compare("EQ", "%b0", "%a0", kind="i32", how="SIGNED", result="%e")
    + compare("LT", "%a1", "%b1", kind="i32", how="SIGNED", result="%l")
)  # fmt: skip
BY_SELECT = MIXED + "%r = stablehlo.select %e, %l, %g : tensor<i1>, tensor<i1>\n" + RETURN
BY_OR = MIXED + "%n = stablehlo.and %l, %e : tensor<i1>\n %r = stablehlo.or %n, %g : tensor<i1>\n" + RETURN
WRONG_OR = MIXED + "%n = stablehlo.and %l, %g : tensor<i1>\n %r = stablehlo.or %n, %e : tensor<i1>\n" + RETURN
CROSSED = compare("LT", "%a0", "%b1") + RETURN
LESS_OR_EQUAL = compare("LE") + RETURN
NEGATED = "%x = stablehlo.negate %a0 : tensor<f32>\n" + compare("LT", "%x", "%b0") + RETURN

CASES = [
    Case("sort", jnp.sort, (ODD,)),
    Case("sort_axis_0", lambda x: jnp.sort(x, axis=0), (ODD,)),
    Case("sort_descending", lambda x: jnp.sort(x, descending=True), (X,)),
    Case("argsort", jnp.argsort, (ODD,)),
    Case("argsort_axis_0", lambda x: jnp.argsort(x, axis=0), (ODD,)),
    Case("argsort_descending", lambda x: jnp.argsort(x, descending=True), (ODD,)),
    Case("sort_complex", jnp.sort, (CODD,)),
    Case("argsort_complex", jnp.argsort, (CODD,)),
    Case("lexsort", lambda a, b, c: jnp.lexsort((a, b, c)), (ODD, I[::-1], I)),
    Case("two_keys", lambda a, b: lax.sort((a, b), num_keys=2), (I, ODD)),
    Case("two_keys_and_a_value", lambda a, b, c: lax.sort((a, b, c), num_keys=2), (I, np.round(ODD), X)),
    Case("three_keys", lambda a, b, c: lax.sort((a, b, c), num_keys=3, dimension=0), (I % 2, np.round(ODD), I[::-1])),
    Case("one_key_three_values", lambda a, b, c: lax.sort((a, b, c, a > 0), num_keys=1), (I, X, CODD)),
    Case("narrow_keys", lambda a, b, c: lax.sort((a, b, c), num_keys=3), (I.astype(np.int8), np.round(ODD).astype(np.float16), I[::-1] > 0)),
    Case("stable", lambda a, b: lax.sort((a, b), num_keys=1), (I > 0, X)),
    Case("empty", jnp.sort, (X[:, :0],)),
    Case("empty_other", lambda x: jnp.sort(x, axis=1), (X[:0],)),
    Case("one", lambda x: jnp.sort(x, axis=1), (X[:, :1],)),
    Case("long", jnp.argsort, (R.integers(0, 50, 20000).astype(np.int32),)),
    Case("unique", lambda x: jnp.unique(x, size=9), (I,)),
    Case("median", jnp.median, (X,)),
    Case("permutation", lambda x: jnp.argsort(jnp.argsort(x)), (X,)),
    Case("searchsorted", lambda x, y: jnp.searchsorted(jnp.sort(x), y, method="sort"), (X[0], X[1])),
    Case("by_lt", text(LT), (X,)),
    Case("by_gt_integers", text(compare("GT", kind="i32", how="SIGNED") + RETURN, kind="i32"), (I,)),
    Case("by_gt_unsigned", text(compare("GT", kind="ui32", how="UNSIGNED") + RETURN, kind="ui32"), (I.astype(np.uint32),)),
    Case("by_swapped_lt", text(compare("LT", "%b0", "%a0") + RETURN), (X,)),
    Case("by_total_order", text(compare("LT", how="TOTALORDER") + RETURN), (ODD,)),
    Case("by_total_order_gt", text(compare("GT", how="TOTALORDER") + RETURN, operands=2), (ODD, X)),
    Case("by_absolute_value", text(ABS, 2), (X, I.astype(np.float32))),
    Case("by_sums", text(SUMS, 2), (I.astype(np.float32), I[::-1].astype(np.float32).copy())),
    Case("by_select", text(BY_SELECT, 2, "i32"), (I, I[::-1].copy())),
    Case("by_or", text(BY_OR, 2, "i32", dimension=0), (I, I[::-1].copy())),
    Case("top_k", lambda x: lax.top_k(x, 3), (ODD,)),
    Case("top_k_many", lambda x: lax.top_k(x, 30), (ODD,)),
    Case("top_k_all", lambda x: lax.top_k(x, 40), (ODD,)),
    Case("top_k_ties", lambda x: lax.top_k(x, 5), (I,)),
    Case("top_k_vector", lambda x: lax.top_k(x, 5), (X[0],)),
    Case("top_k_none", lambda x: lax.top_k(x, 0), (X,)),
    Case("top_k_axis", lambda x: lax.top_k(x, 2, axis=0), (X,)),
    Case("top_k_long", lambda x: lax.top_k(x, 3), (R.integers(-99, 99, (2, 5003)).astype(np.float32),)),
    Case("top_k_long_nan", lambda x: lax.top_k(x, 7), (np.where(np.arange(9001) % 991 == 5, -np.nan, np.arange(9001) % 17).astype(np.float32),)),
    Case("top_k_long_end", lambda x: lax.top_k(x, 2), (np.full(4099, np.iinfo(np.int32).min),)),
    Case("top_k_long_unsigned", lambda x: lax.top_k(x, 4), (R.integers(0, 2**32, 5000).astype(np.uint32),)),
    Case("top_k_grad", jax.grad(lambda x: (lax.top_k(x, 3)[0] ** 2).sum()), (X,)),
    Case("approx_max_k", lambda x: lax.approx_max_k(x, 3), (X,)),
    Case("approx_min_k", lambda x: lax.approx_min_k(x, 3), (X,)),
    Case("approx_max_k_axis_0", lambda x: lax.approx_max_k(x, 2, reduction_dimension=0), (X,)),
    Case("approx_max_k_bf16", lambda x: lax.approx_max_k(x, 3), (np.unique(cast(X, "bfloat16"))[:64],)),
    Case("grad_sort", jax.grad(lambda x: (jnp.sort(x) * jnp.arange(40.0)).sum()), (X,)),
    Case("grad_median", jax.grad(lambda x: jnp.median(x, axis=1).sum()), (X,)),
    *[Case(f"sort_{d}", lambda x: (jnp.sort(x), jnp.argsort(x), jnp.argsort(x, descending=True)), (cast(I, d),)) for d in INTS],
    *[Case(f"sort_{d}", lambda x: (jnp.sort(x), jnp.argsort(x), jnp.argsort(x, descending=True)), (cast(ODD, d),)) for d in FLOATS],
    *[Case(f"top_k_{d}", lambda x: lax.top_k(x, 4), (cast(I, d),)) for d in INTS[1:]],
    *[Case(f"top_k_{d}", lambda x: lax.top_k(x, 4), (cast(ODD, d),)) for d in FLOATS],
]

BIG = (X * 2**40 + 2.0**60).astype(np.int64)
LIMITS = np.array([[0, -1, 2**63 - 1, -(2**63), 5, 5]], np.int64)
WIDE = [
    *[Case(f"sort_{d}", lambda x: (jnp.sort(x), jnp.argsort(x), jnp.argsort(x, descending=True)), (v.astype(d),))
      for v in (BIG, LIMITS) for d in ("int64", "uint64")],
    Case("two_wide_keys", lambda a, b: lax.sort((a, b), num_keys=2), (I.astype(np.int64), BIG)),
    Case("wide_and_narrow", lambda a, b, c: lax.sort((a, b, c), num_keys=3), (I % 2 == 0, I.astype(np.uint64), X)),
    *[Case(f"top_k_{d}", lambda x: lax.top_k(x, 3), (LIMITS.astype(d),)) for d in ("int64", "uint64")],
]  # fmt: skip

REFUSED = [
    Case("less_or_equal", text(LESS_OR_EQUAL), (X,)),
    Case("crossed_operands", text(CROSSED, 2), (X, X)),
    Case("sides_differ", text(NEGATED), (X,)),
    Case("or_of_other_things", text(WRONG_OR, 2, "i32"), (I, I)),
    Case("constant", text("%r = stablehlo.constant dense<false> : tensor<i1>\n" + RETURN), (X,)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sort(case):
    """Same result as XLA, before and after export."""
    check_both(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_64_bits(case):
    """64-bit keys are compared exactly."""
    with jax.enable_x64(True):
        check(case)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case):
    """Whatever is no lexicographic order of LT and GT is left to the host."""
    with pytest.raises(Unsupported, match="not a lexicographic order"):
        run_on_mlx(case)


def test_approx_without_aggregation():
    """Without aggregation there are more results than were asked for; the best are among them, in order."""
    values, positions = run_on_mlx(Case("approx", lambda x: lax.approx_max_k(x, 3, aggregate_to_topk=False), (X,)))
    np.testing.assert_array_equal(values, np.sort(X)[:, : -values.shape[1] - 1 : -1])
    np.testing.assert_array_equal(np.take_along_axis(X, positions, 1), values)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_keys_property(data):
    """Any number of keys of small range, any axis: NumPy's stable lexsort."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = data.draw(st.integers(0, len(shape) - 1))
    kinds = data.draw(st.lists(st.sampled_from(["bool", "int8", "uint32", "float16", "float32"]), min_size=1, max_size=4))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    keys = [generator.integers(0, 3, shape).astype(kind) for kind in kinds]
    position = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    case = Case("keys", lambda *operands: lax.sort(operands, dimension=axis, num_keys=len(kinds)), (*keys, position))
    order = np.lexsort(keys[::-1], axis=axis)
    assert_same(run_on_mlx(case), [np.take_along_axis(k, order, axis) for k in (*keys, position)], case)


def test_values_alone_are_sorted_without_an_argsort(monkeypatch):
    """Also where the program has the comparator's constants once, outside of it."""
    monkeypatch.setattr(sort, "_order", None)
    check(Case("two sorts", lambda x: [jnp.sort(x), jnp.sort(x + 1)], (ODD,)))
