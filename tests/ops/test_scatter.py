"""scatter: the general form against the spec, windows that do not fit, and the shapes that JAX makes."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mps.errors import Unsupported
from jax_mps.ops import bins as bins_of

from .harness import Case, check, check_both, run_on_mlx

INTS = ["int8", "uint8", "int16", "uint16", "int32", "uint32"]
FLOATS = ["float16", "bfloat16", "float32"]
R = np.random.default_rng(0)
X = R.normal(size=(6, 7)).astype(np.float32)
Y = R.normal(size=(4, 5, 6, 3)).astype(np.float32)
I = np.array([1, -2, 7, 3, 1, -9, 0], np.int32)
U = R.normal(size=(7, 7)).astype(np.float32)
NAN = np.where(np.arange(42).reshape(6, 7) % 5 == 0, np.nan, X)
NAN_UPDATES = np.where(np.arange(49).reshape(7, 7) % 6 == 0, -np.nan, U).astype(np.float32)
SUM = dict(rtol=1e-5, atol=1e-6)  # the order of adding shows


def cast(x, dtype):
    return (x * 5).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def dims(window, inserted, to_operand, batching=((), ())):
    return lax.ScatterDimensionNumbers(
        update_window_dims=window, inserted_window_dims=inserted, scatter_dims_to_operand_dims=to_operand,
        operand_batching_dims=batching[0], scatter_indices_batching_dims=batching[1],
    )  # fmt: skip


def raw(dimension_numbers, op=lax.scatter):
    return lambda x, i, u: op(x, i, u, dimension_numbers, mode="drop")


def updating(x, start, update):
    return lax.dynamic_update_slice(x, update, start)


def text(body, operands="%x", kind="f32", index="i32", unique="false"):
    """Rows of 6x7 updated by a body that JAX does not make."""
    count = operands.count("%")
    names = [f"%{side}{n}: tensor<{kind}>" for side in "ab" for n in range(count)]
    inputs = ", ".join(f"%x{n}: tensor<6x7x{kind}>" for n in range(count))
    updates = ", ".join(f"%u{n}: tensor<3x7x{kind}>" for n in range(count))
    xs, us = ", ".join(f"%x{n}" for n in range(count)), ", ".join(f"%u{n}" for n in range(count))
    tx, tu = ", ".join([f"tensor<6x7x{kind}>"] * count), ", ".join([f"tensor<3x7x{kind}>"] * count)
    out = "%0" if count == 1 else ", ".join(f"%0#{n}" for n in range(count))
    return f"""func.func @main({inputs}, %i: tensor<3x1x{index}>, {updates}) -> ({tx}) {{
      %0{"" if count == 1 else f":{count}"} = "stablehlo.scatter"({xs}, %i, {us}) <{{scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1],
        inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>, unique_indices = {unique}, indices_are_sorted = false}}> ({{
        ^bb0({", ".join(names)}):
          {body}
      }}) : ({tx}, tensor<3x1x{index}>, {tu}) -> ({tx})
      return {out} : {tx}
    }}"""


def binary(op, kind="f32"):
    return f"%r = stablehlo.{op} %a0, %b0 : tensor<{kind}>\n stablehlo.return %r : tensor<{kind}>"


TWICE = "%s = stablehlo.multiply %a0, %b0 : tensor<f32>\n %r = stablehlo.add %s, %b0 : tensor<f32>\n stablehlo.return %r : tensor<f32>"
TWO = "%r = stablehlo.add %a0, %b0 : tensor<f32>\n %s = stablehlo.maximum %a1, %b1 : tensor<f32>\n stablehlo.return %r, %s : tensor<f32>, tensor<f32>"
CROSSED = "%r = stablehlo.add %a0, %b1 : tensor<f32>\n %s = stablehlo.maximum %a1, %b0 : tensor<f32>\n stablehlo.return %r, %s : tensor<f32>, tensor<f32>"
# the last op is a maximum, the body is not
LOGADDEXP = """%m = stablehlo.maximum %a0, %b0 : tensor<f32>
  %d = stablehlo.subtract %a0, %b0 : tensor<f32>
  %r = stablehlo.maximum %m, %d : tensor<f32>
  stablehlo.return %r : tensor<f32>"""
SPARSE = np.array([3, 9999, 3, -1, 5, 5, -9999], np.int32)
ROWS = np.array([[4], [1], [-1]], np.int32)
REPEATED = np.array([[4], [9], [4]], np.int32)

CASES = [
    Case("set", lambda x, i, u: x.at[i].set(u), (X, I, U)),
    Case("set_scalar", lambda x, i: x.at[i].set(7.0), (X, I)),
    Case("set_columns", lambda x, i, u: x.at[:, i].set(u[:6]), (X, I, U)),
    Case("set_elements", lambda x, i, u: x.at[i, i[::-1]].set(u[0]), (X, I, U)),
    Case("set_apart", lambda x, i, u: x.at[i, :, i[::-1]].set(u[:, :5, None]), (Y, I, U)),
    Case("set_middle", lambda x, i: x.at[:, :, i].set(2.0), (Y, I)),
    Case("set_mask", lambda x: x.at[jnp.arange(3)].set(jnp.where(x[:3] > 0, 0, x[:3])), (X,)),
    Case("set_strided", lambda x: x.at[::2, 1::3].set(5.0), (X,)),
    Case("set_constant_row", lambda x: x.at[3].set(5.0).at[-1].add(2.0).at[2:4, 1:].multiply(3.0), (X,)),
    Case("set_one", lambda x, i, u: x.at[i[0]].set(u[0]), (X, I, U)),
    Case("set_one_out", lambda x, i, u: x.at[i[2]].set(u[0]), (X, I, U)),
    Case("set_one_element", lambda x, i: x.at[i[0], i[3]].set(2.0), (X, I)),
    Case("add", lambda x, i, u: x.at[i].add(u), (X, I, U)),
    Case("add_columns", lambda x, i, u: x.at[:, i].add(u[:6]), (X, I, U), **SUM),
    Case("add_elements", lambda x, i: x.at[i, i].add(1.0), (X, I)),
    Case("add_one", lambda x, i, u: x.at[i[0]].add(u[0]), (X, I, U)),
    Case("add_one_out", lambda x, i, u: x.at[i[2]].add(u[0]), (X, I, U)),
    Case("add_complex", lambda x, i, u: x.at[i].add(u), (X + 1j, I, U * 1j), **SUM),
    Case("multiply_complex", lambda x, i, u: x.at[i].multiply(u), (X + 1j, I, U * 1j), **SUM),
    Case("set_complex", lambda x, i, u: x.at[i].set(u), (X + 1j, I, U * 1j)),
    Case("multiply", lambda x, i, u: x.at[i].multiply(u), (X, I, U)),
    Case("min_nan", lambda x, i, u: x.at[i].min(u), (NAN, I, NAN_UPDATES)),
    Case("max_nan", lambda x, i, u: x.at[i].max(u), (NAN, I, NAN_UPDATES)),
    Case("max_infinities", lambda x, i: x.at[i].max(-np.inf).at[i].min(np.inf), (X, I)),
    Case("max_one_nan", lambda x, i, u: x.at[i[0]].max(u[0]), (X, I, NAN_UPDATES)),
    Case("clip", lambda x, i, u: x.at[i].add(u, mode="clip"), (X, I, U), **SUM),
    Case("unique", lambda x, i, u: x.at[i].add(u, unique_indices=True), (X, np.array([5, 9, 2, 3, 1, -9, 0], np.int32), U)),
    Case("apply_unique", lambda x, i: x.at[i].apply(jnp.sin), (X, np.array([5], np.int32))),
    Case("segment_sum", lambda x, i: jax.ops.segment_sum(x, i, 4), (X, np.array([0, 3, 3, 1, 9, -1], np.int32))),
    Case("segment_max", lambda x, i: jax.ops.segment_max(x, i, 4), (X, np.array([0, 3, 3, 1, 9, -1], np.int32))),
    Case("segment_prod", lambda x, i: jax.ops.segment_prod(x, i, 4), (X, np.array([0, 3, 3, 1, 9, -1], np.int32))),
    Case("bincount", lambda i: jnp.bincount(i, length=5), (np.array([1, 1, 4, 0, 9], np.int32),)),
    Case("vmap_add", jax.vmap(lambda x, i: x.at[i].add(1.0)), (X, R.integers(-8, 9, (6, 4)).astype(np.int32))),
    Case("vmap_update_window", jax.vmap(updating), (Y[..., 0], R.integers(-3, 9, (4, 2)).astype(np.int32), R.normal(size=(4, 2, 3)).astype(np.float32))),
    Case("window_add", raw(dims((1, 2), (), (0, 1)), lax.scatter_add), (X, R.integers(-1, 6, (5, 2)).astype(np.int32), np.ones((5, 2, 3), np.float32)), **SUM),
    Case("window_short_column", raw(dims((1,), (0,), (0,))), (X, I[:, None], U[:, :3])),
    Case("window_whole", raw(dims((1, 2), (), (0, 1)), lax.scatter_add), (X, np.array([[0, 0], [1, 0], [0, 0]]), np.ones((3, 6, 7), np.float32)), **SUM),
    Case("window_row_past_the_end", raw(dims((1, 2), (), (0,))), (X, np.array([[5], [3]], np.int32), np.ones((2, 2, 7), np.float32))),
    Case("inserted_not_indexed", raw(dims((1,), (0,), (1,))), (X, I[:, None], U[:, :2])),
    Case("no_index", raw(dims((1, 2), (), ())), (X, np.zeros((2, 0), np.int32), U[None, :2, :3] + np.zeros((2, 1, 1), np.float32))),
    Case("no_index_one", raw(dims((0, 1), (), ())), (X, np.zeros(0, np.int32), U[:2, :3])),
    Case("update_dims_first", raw(dims((0,), (0,), (0,)), lax.scatter_add), (X, I[:, None], U.T.copy()), **SUM),
    Case("batching_apart", jax.vmap(lambda x, i: x.at[:, i].add(1.0), in_axes=(2, 1), out_axes=1), (Y, R.integers(0, 5, (3, 6)).astype(np.int32))),
    Case("empty_operand", lambda x, i: x.at[:, i].set(1.0), (X[:0], I)),
    Case("empty_indices", lambda x, i: x.at[i].set(1.0), (X, I[:0])),
    Case("transposed", lambda x, i, u: x.T.at[i].add(u[:, :6]), (X, I, U), **SUM),
    Case("uint8_indices", text("stablehlo.return %b0 : tensor<f32>", index="ui8"), (X, np.array([[4], [255], [0]], np.uint8), U[:3])),
    Case("int8_indices", text("stablehlo.return %b0 : tensor<f32>", index="i8"), (X, np.array([[4], [-128], [127]], np.int8), U[:3])),
    Case("keep", text("stablehlo.return %a0 : tensor<f32>"), (X, ROWS, U[:3])),
    Case("flipped", text("%r = stablehlo.add %b0, %a0 : tensor<f32>\n stablehlo.return %r : tensor<f32>"), (X, REPEATED, U[:3]), **SUM),
    Case("unique_any_body", text(TWICE, unique="true"), (X, ROWS, U[:3])),
    Case("two_operands", text(TWO, "%%"), (X, -X, REPEATED, U[:3], -U[:3]), **SUM),
    Case("two_operands_crossed", text(CROSSED, "%%", unique="true"), (X, -X, ROWS, U[:3], -U[:3])),
    *[Case(f"{op}_{k}", text(binary(op, k), kind=k), ((X * 50).astype(d), REPEATED, (U[:3] * 50).astype(d)))
      for op in ("and", "or", "xor") for k, d in (("i32", "int32"), ("ui8", "uint8"), ("i1", "bool"))],
    *[Case(f"{op}_bool", text(binary(op, "i1"), kind="i1"), (X > 0, REPEATED, U[:3] > 0)) for op in ("add", "multiply", "minimum", "maximum")],
    *[Case(f"set_{d}", lambda x, i, u: x.at[i].set(u), (cast(X, d), I, cast(U, d))) for d in ["bool", *INTS, *FLOATS]],
    *[Case(f"combine_{d}", lambda x, i, u: (x.at[i].add(u), x.at[i].multiply(u), x.at[i].min(u), x.at[i].max(u)), (cast(X, d), I, cast(U, d))) for d in INTS],
    *[Case(f"min_max_{d}", lambda x, i, u: (x.at[i].min(u), x.at[i].max(u)), (cast(NAN, d), I, cast(NAN_UPDATES, d))) for d in FLOATS],
    # one more rounding: MLX adds the updates up before it adds the operand
    *[Case(f"add_{d}", lambda x, i, u: x.at[i].add(u), (cast(X, d), I, cast(U, d)), rtol=t, atol=t) for d, t in (("float16", 1e-2), ("bfloat16", 1e-1))],
    Case("large_operand_set", lambda x, i, u: x.at[i].set(u), (np.zeros((4000, 7), np.float32), SPARSE, U)),
    Case("large_operand_set_none_fits", lambda x, i, u: x.at[i].set(u), (np.ones((4000, 7), np.float32), np.full(7, 9999, np.int32), U)),
    Case("large_operand_add", lambda x, i, u: x.at[i].add(u), (np.zeros((4000, 7), np.float32), SPARSE, U), **SUM),
    Case("large_operand_max", lambda x, i, u: x.at[i].max(u), (np.zeros((4000, 7), np.float32), SPARSE, NAN_UPDATES)),
    Case("big_windows", lambda x, i, u: x.at[i].set(u), (np.zeros((5, 4100), np.float32), I[[0, 2, 0]], np.full((3, 4100), 2, np.float32))),
    Case("big_windows_add", jax.vmap(lambda x, i, u: x.at[i].add(u)), (np.zeros((2, 5, 4100)), I[:6].reshape(2, 3), np.ones((2, 3, 4100)))),
    Case("big_windows_vmap", jax.vmap(updating), (np.zeros((3, 90, 70)), I[:6].reshape(3, 2), np.ones((3, 80, 60)))),
    Case("grad_set", jax.grad(lambda x, i, u: (x.at[i].set(u) ** 2).sum(), (0, 2)), (X, np.array([5, 9, 2, 3, 1, -9, 0], np.int32), U)),
    Case("grad_add", jax.grad(lambda x, i, u: (x.at[i].add(u) ** 2).sum(), (0, 2)), (X, I, U), **SUM),
    Case("grad_max", jax.grad(lambda x, i: (jax.ops.segment_max(x, i, 3) ** 2).sum()), (X, np.array([0, 1, 2, 1, 2, 2], np.int32))),
    Case("grad_embedding", jax.grad(lambda x, i: (x[i] ** 3).sum()), (X, R.integers(0, 6, (4, 5)).astype(np.int32)), **SUM),
]  # fmt: skip

FAR = np.array([[2**32 + 1], [-(2**40)], [3]], np.int64)
BIG = (X * 9 + 2.0**60).astype(np.int64)
WIDE = [
    Case("int64_indices", text("stablehlo.return %b0 : tensor<f32>", index="i64"), (X, FAR, U[:3])),
    Case("uint64_indices", text("stablehlo.return %b0 : tensor<f32>", index="ui64"), (X, FAR.astype(np.uint64), U[:3])),
    Case("uint32_indices", text("stablehlo.return %b0 : tensor<f32>", index="ui32"), (X, np.array([[2], [2**32 - 1], [1]], np.uint32), U[:3])),
    *[Case(f"{op}_{d}", lambda x, i, u, op=op: getattr(x.at[i], op)(u), (BIG.astype(d), I, BIG[I % 6].astype(d) + 3))
      for op in ("set", "add", "multiply", "min", "max") for d in ("int64", "uint64")],
]  # fmt: skip

GPU_WAYS = ("int64", "complex", "add", "elements", "apart", "large", "embedding", "and_", "unique")

ODD_BODIES = [
    Case("two_ops", text(TWICE), (X, REPEATED, U[:3])),
    Case("last_op_is_maximum", text(LOGADDEXP), (X, REPEATED, U[:3])),
    Case("apply_may_repeat", lambda x, i: x.at[i].apply(jnp.sin), (X, I)),
    Case("same_argument_twice", text("%r = stablehlo.add %b0, %b0 : tensor<f32>\n stablehlo.return %r : tensor<f32>"), (X, REPEATED, U[:3])),
    Case("crossed", text(CROSSED, "%%"), (X, -X, REPEATED, U[:3], -U[:3])),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scatter(case):
    """Same result as XLA, before and after export."""
    check_both(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_64_bits(case):
    """Indices beyond int32 are out of bounds, not somewhere else; 64-bit elements are exact."""
    with jax.enable_x64(True):
        check(case)


@pytest.mark.parametrize("case", [c for c in (*CASES, *WIDE) if any(way in c.name for way in GPU_WAYS)], ids=str)
def test_as_on_a_gpu(case, monkeypatch):
    """The ways that a GPU needs (rows, pairs of words, no 64-bit combiners) mean the same."""
    monkeypatch.setattr("jax_mps.ops.rows.device_kind", lambda: "cuda")
    with jax.enable_x64(case in WIDE):
        check(case)


@pytest.mark.parametrize("case", ODD_BODIES, ids=str)
def test_few_windows(case):
    """A few windows are written one after the other, by any body."""
    check_both(case)


@pytest.mark.parametrize("case", ODD_BODIES, ids=str)
def test_refused(case, monkeypatch):
    """With more of them, a body that cannot be applied in any order is left to the host."""
    monkeypatch.setattr("jax_mps.ops.scatter._FEW", 1)
    with pytest.raises(Unsupported, match="indices that may repeat"):
        run_on_mlx(case)


def by_the_spec(x, indices, updates, window_dims, inserted, to_operand, batching, sizes):
    """The spec's formulas, update by update, with XLA's rule that a window that does not fit is dropped whole."""
    x = x.copy()
    kept = [d for d in range(x.ndim) if d not in inserted and d not in batching[0]]
    scatter_dims = [d for d in range(updates.ndim) if d not in window_dims]
    for at in itertools.product(*map(range, updates.shape)):
        batch = tuple(at[d] for d in scatter_dims)
        place = [0] * x.ndim
        for k, d in enumerate(to_operand):
            place[d] = int(indices[batch][k])
        if any(not 0 <= place[d] <= x.shape[d] - sizes[d] for d in to_operand):
            continue
        for d, i in zip(*batching, strict=True):
            place[d] = batch[i]
        for d, k in zip(window_dims, kept, strict=True):
            place[k] += at[d]
        x[tuple(place)] += updates[at]
    return x


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scatter_property(data):
    """Any dimension numbers that the spec allows."""
    rank = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    roles = data.draw(st.lists(st.sampled_from("biw"), min_size=rank, max_size=rank))  # batching, inserted, window
    batching_dims = [d for d in range(rank) if roles[d] == "b"]
    batch = data.draw(st.permutations([shape[d] for d in batching_dims] + data.draw(st.lists(st.integers(1, 3), max_size=2))))
    free = list(range(len(batch)))
    start_dims = []
    for d in batching_dims:
        start_dims.append(next(i for i in free if batch[i] == shape[d]))
        free.remove(start_dims[-1])
    sizes = [data.draw(st.integers(1, shape[d])) if roles[d] == "w" else 1 for d in range(rank)]
    others = [d for d in range(rank) if roles[d] != "b"]
    to_operand = data.draw(st.permutations(others))[: data.draw(st.integers(0, len(others)))]
    kept = [d for d in range(rank) if roles[d] == "w"]
    window_dims = sorted(data.draw(st.permutations(range(len(kept) + len(batch))))[: len(kept)])
    update_shape = [0] * (len(kept) + len(batch))
    for d, k in zip(window_dims, kept, strict=True):
        update_shape[d] = sizes[k]
    for d, s in zip([d for d in range(len(update_shape)) if d not in window_dims], batch, strict=True):
        update_shape[d] = s
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    indices = generator.integers(-2, 5, (*batch, len(to_operand))).astype(np.int32)
    updates = generator.integers(-9, 9, update_shape).astype(np.int32)
    inserted = tuple(d for d in range(rank) if roles[d] == "i")
    numbers = dims(tuple(window_dims), inserted, tuple(to_operand), (tuple(batching_dims), tuple(start_dims)))
    (got,) = run_on_mlx(Case("scatter", raw(numbers, lax.scatter_add), (x, indices, updates)))
    want = by_the_spec(x, indices, updates, window_dims, inserted, to_operand, (batching_dims, start_dims), sizes)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("dtype", "index", "numbers", "bins", "fits"), [
    ("float32", "int32", 1 << 15, 8192, True), ("int32", "int32", 1 << 20, 1, True), ("float32", "int32", 1000, 10, False),
    ("float32", "int32", 1 << 20, 8193, False), ("float16", "int32", 1 << 20, 10, False), ("float32", "int64", 1 << 20, 10, False),
])  # fmt: skip
def test_what_a_kernel_of_bins_is_for(dtype, index, numbers, bins, fits, monkeypatch):
    assert not bins_of.fits(dtype, index, numbers, bins)
    monkeypatch.setattr(bins_of, "device_kind", lambda: "cuda")
    assert bins_of.fits(dtype, index, numbers, bins) is fits
