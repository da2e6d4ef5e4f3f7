"""gather: the general form against the spec's own words, and the shapes that JAX makes."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from .harness import Case, check, check_both, run_on_mlx

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"]
R = np.random.default_rng(0)
X = R.normal(size=(6, 7)).astype(np.float32)
Y = R.normal(size=(4, 5, 6, 3)).astype(np.float32)
I = np.array([1, -2, 7, 3, 1, -9, 0], np.int32)
PLAIN = lax.GatherScatterMode.PROMISE_IN_BOUNDS  # the op and nothing around it; the spec clamps


def cast(x, dtype):
    return (x * 5).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def windows(sizes):
    """A window at each start along the first axes: what vmap makes of dynamic_slice."""
    return jax.vmap(lambda x, start: lax.dynamic_slice(x, start, sizes))


def numbers(offset, collapsed, index_map, batching=((), ())):
    return lax.GatherDimensionNumbers(
        offset_dims=offset, collapsed_slice_dims=collapsed, start_index_map=index_map,
        operand_batching_dims=batching[0], start_indices_batching_dims=batching[1],
    )  # fmt: skip


def raw(dimension_numbers, sizes):
    return lambda x, i: lax.gather(x, i, dimension_numbers, sizes, mode=PLAIN)


def text(index_vector_dim, indices, result, kind="i32"):
    """Row gather with any index type and place of the index vector."""
    types = f"(tensor<6x7xf32>, tensor<{indices}x{kind}>)"
    return f"""func.func @main(%x: tensor<6x7xf32>, %i: tensor<{indices}x{kind}>) -> tensor<{result}xf32> {{
      %0 = "stablehlo.gather"(%x, %i) <{{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0],
        index_vector_dim = {index_vector_dim}>, indices_are_sorted = false, slice_sizes = array<i64: 1, 7>}}> : {types} -> tensor<{result}xf32>
      return %0 : tensor<{result}xf32>
    }}"""


DYNAMIC = """func.func @main(%x: tensor<6x7xf32>, %i: tensor<3x1xi32>, %s: tensor<2xi32>) -> tensor<3x7xf32> {
  %0 = "stablehlo.dynamic_gather"(%x, %i, %s) <{dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0],
    start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false}> : (tensor<6x7xf32>, tensor<3x1xi32>, tensor<2xi32>) -> tensor<3x7xf32>
  return %0 : tensor<3x7xf32>
}"""

CASES = [
    Case("rows", lambda x, i: x[i], (X, I)),
    Case("rows_of_long", lambda x, i: x[i], (R.normal(size=(5, 3, 40)).astype(np.float32), I)),
    Case("columns", lambda x, i: x[:, i], (X, I)),
    Case("middle", lambda x, i: x[:, :, i], (Y, I)),
    Case("middle_long_row", lambda x, i: x[:, i], (R.normal(size=(3, 8, 20)).astype(np.float32), I)),
    Case("pairs", lambda x, i: x[i, i[::-1]], (X, I)),
    Case("apart", lambda x, i: x[i, :, i[::-1]], (Y, I)),
    Case("apart_outer", lambda x, i: x[i[:, None], :, i[None, :3]], (Y, I)),
    Case("three_apart", lambda x, i: x[i, :, i[::-1], i % 2], (Y, I)),
    Case("outer", lambda x, i: x[i[:, None], i[None]], (X, I)),
    Case("index_matrix", lambda x, i: x[i], (X, I[:6].reshape(2, 3))),
    Case("one_index", lambda x, i: x[i[:1]], (X, I)),
    Case("fill", lambda x, i: jnp.take(x, i, axis=0, mode="fill"), (X, I)),
    Case("clip", lambda x, i: jnp.take(x, i, axis=1, mode="clip"), (X, I)),
    Case("wrap", lambda x, i: jnp.take(x, i, axis=1, mode="wrap"), (X, I)),
    Case("along_last", lambda x, i: jnp.take_along_axis(x, i[:6, None], 1), (X, I)),
    Case("along_first", lambda x, i: jnp.take_along_axis(x, i[None], 0), (X, I)),
    Case("along_middle", lambda x, i: jnp.take_along_axis(x, i, 2), (Y, R.integers(-6, 6, (4, 5, 2, 3)).astype(np.int32))),
    Case("pick", lambda x, i: x[jnp.arange(6), i[:6]], (X, I)),
    Case("vmap_window", windows((2, 3)), (Y[..., 0], R.integers(-3, 9, (4, 2)).astype(np.int32))),
    Case("vmap_crop", windows((2, 3, 3)), (Y, R.integers(-3, 9, (4, 3)).astype(np.int32))),
    Case("vmap_starts", lambda x, s: jax.vmap(lambda i: lax.dynamic_slice(x, (i, 0), (2, 7)))(s), (X, I)),
    Case("vmap_vmap", lambda x, i: jax.vmap(jax.vmap(lambda x, i: x[i]))(x, i), (Y, R.integers(-7, 7, (4, 5, 2)).astype(np.int32))),
    Case("batching_apart", jax.vmap(lambda x, i: x[:, i], in_axes=(2, 1), out_axes=1), (Y, R.integers(0, 5, (3, 6)).astype(np.int32))),
    Case("no_index", raw(numbers((1, 2), (), ()), (2, 3)), (X, np.zeros((4, 0), np.int32))),
    Case("index_vector_of_whole_windows", raw(numbers((1, 2), (), (0, 1)), (6, 7)), (X, np.ones((3, 2), np.int32))),
    Case("offset_first", raw(numbers((0,), (0,), (0,)), (1, 5)), (X, I[:, None])),
    Case("offset_between", raw(numbers((0, 2), (), (1, 0)), (2, 3)), (X, R.integers(-2, 9, (5, 2)).astype(np.int32))),
    Case("static_part", raw(numbers((1, 2, 3), (2,), (1,)), (3, 2, 1, 2)), (Y, I[:, None])),
    Case("collapsed_not_indexed", raw(numbers((1,), (0,), (1,)), (1, 3)), (X, I[:, None])),
    Case("one_window", raw(numbers((0, 1, 2), (2,), (1, 2, 3)), (4, 2, 1, 2)), (Y, np.array([2, 9, 1], np.int32))),
    Case("one_window_still", raw(numbers((0,), (1,), ()), (3, 1)), (X, np.zeros(0, np.int32))),
    Case("spec_example", raw(numbers((3, 4), (1,), (2, 1), ((0,), (1,))), (1, 1, 2, 2)),
         (np.arange(1, 49, dtype=np.int32).reshape(2, 3, 4, 2), R.integers(-1, 5, (2, 2, 3, 2)).astype(np.int32))),
    Case("empty_operand", lambda x, i: x[:, i], (X[:0], I)),
    Case("empty_indices", lambda x, i: x[i], (X, I[:0])),
    Case("empty_window", raw(numbers((1, 2), (), (0,)), (0, 7)), (X, I[:, None])),
    Case("scalar_operand", raw(numbers((), (), ()), ()), (np.float32(3), np.zeros((2, 0), np.int32))),
    Case("rank_20", lambda x, i: x[(0,) * 10 + (i,)], (R.normal(size=[1, 2] * 4 + [1, 1, 3] + [1] * 9).astype(np.float32), I)),
    Case("transposed", lambda x, i: x.T[i], (X, I)),
    Case("vector_dim_rank", text(1, "7", "7x7"), (X, I)),
    Case("vector_dim_first", text(0, "1x7", "7x7"), (X, I[None])),
    Case("uint8_indices", text(1, "3", "3x7", "ui8"), (X, np.array([0, 5, 255], np.uint8))),
    Case("int8_indices", text(1, "3", "3x7", "i8"), (X, np.array([0, -128, 127], np.int8))),
    Case("grad_rows", jax.grad(lambda x, i: (x[i] ** 2).sum()), (X, I)),
    Case("grad_window", jax.grad(lambda x, s: (windows((2, 3, 3))(x, s) ** 2).sum()), (Y, R.integers(-3, 9, (4, 3)).astype(np.int32))),
    Case("grad_along", jax.grad(lambda x, i: (jnp.take_along_axis(x, i[:6, None], 1) ** 2).sum()), (X, I)),
    *[Case(f"rows_{d}", lambda x, i: (x[i], x[:, i], x[i, i]), (cast(X, d), np.clip(I, -6, 5))) for d in DTYPES],
]  # fmt: skip

FAR = np.array([2**32 + 1, -(2**40), 2**63 - 1, 3], np.int64)
WIDE = [
    Case("int64_indices", text(1, "4", "4x7", "i64"), (X, FAR)),
    Case("uint64_indices", text(1, "4", "4x7", "ui64"), (X, FAR.astype(np.uint64))),
    Case("uint32_indices", text(1, "2", "2x7", "ui32"), (X, np.array([2, 2**32 - 1], np.uint32))),
    *[Case(f"elements_{d}", lambda x, i: (x[i], x[:, i]), ((X * 9 + 2.0**60).astype(d), np.clip(I, -6, 5))) for d in ("int64", "uint64")],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather(case):
    """Same result as XLA, before and after export."""
    check_both(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_64_bits(case):
    """Indices beyond int32 are clamped before they are narrowed; 64-bit elements are exact."""
    with jax.enable_x64(True):
        check(case)


def test_dynamic_gather():
    """Sizes at run time, a static result type."""
    i = np.array([[4], [0], [9]], np.int32)
    (got,) = run_on_mlx(Case("dynamic", DYNAMIC, (X, i, np.array([1, 7], np.int32))))
    np.testing.assert_array_equal(got, X[[4, 0, 5]])


def by_the_spec(x, indices, offset_dims, collapsed, index_map, sizes, batching):
    """The spec's formulas, element by element; the index vector is the last axis of `indices`."""
    kept = [d for d in range(x.ndim) if d not in collapsed and d not in batching[0]]
    rank = indices.ndim - 1 + len(kept)
    batch_dims = [d for d in range(rank) if d not in offset_dims]
    shape = [0] * rank
    for d, s in zip(batch_dims, indices.shape[:-1], strict=True):
        shape[d] = s
    for d, k in zip(offset_dims, kept, strict=True):
        shape[d] = sizes[k]
    result = np.zeros(shape, x.dtype)
    for at in itertools.product(*map(range, shape)):
        batch = tuple(at[d] for d in batch_dims)
        place = [0] * x.ndim
        for k, d in enumerate(index_map):
            place[d] = int(np.clip(indices[batch][k], 0, x.shape[d] - sizes[d]))
        for d, i in zip(*batching, strict=True):
            place[d] = batch[i]
        for d, k in zip(offset_dims, kept, strict=True):
            place[k] += at[d]
        result[at] = x[tuple(place)]
    return result


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gather_property(data):
    """Any dimension numbers that the spec allows."""
    rank = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    roles = data.draw(st.lists(st.sampled_from("bcw"), min_size=rank, max_size=rank))  # batching, collapsed, window
    batching_dims = [d for d in range(rank) if roles[d] == "b"]
    extra = data.draw(st.lists(st.integers(1, 3), max_size=2))
    batch = data.draw(st.permutations([shape[d] for d in batching_dims] + extra))
    free = list(range(len(batch)))
    start_dims = []
    for d in batching_dims:
        start_dims.append(next(i for i in free if batch[i] == shape[d]))
        free.remove(start_dims[-1])
    sizes = [data.draw(st.integers(1, shape[d])) if roles[d] == "w" else 1 for d in range(rank)]
    others = [d for d in range(rank) if roles[d] != "b"]
    index_map = data.draw(st.permutations(others))[: data.draw(st.integers(0, len(others)))]
    kept = [d for d in range(rank) if roles[d] == "w"]
    offset = sorted(data.draw(st.permutations(range(len(kept) + len(batch))))[: len(kept)])
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    indices = np.random.default_rng(data.draw(st.integers(0, 99))).integers(-3, 7, (*batch, len(index_map))).astype(np.int32)
    dims = numbers(tuple(offset), tuple(d for d in range(rank) if roles[d] == "c"), tuple(index_map), (tuple(batching_dims), tuple(start_dims)))
    (got,) = run_on_mlx(Case("gather", raw(dims, tuple(sizes)), (x, indices)))
    want = by_the_spec(x, indices, offset, dims.collapsed_slice_dims, index_map, sizes, (batching_dims, start_dims))
    np.testing.assert_array_equal(got, want)
