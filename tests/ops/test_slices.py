"""Windows: static, clamped, and written back."""

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
X = np.arange(42, dtype=np.float32).reshape(6, 7)


def cast(x, dtype):
    return x.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))


def window(x, *starts):
    return lax.dynamic_slice(x, starts, (2, 3))


def write(x, *starts):
    return lax.dynamic_update_slice(x, -x[:2, :3], starts)


def text(kind):
    """Starts in an integer type that JAX would convert first."""
    return f"""func.func @main(%x: tensor<6x7xf32>, %i: tensor<{kind}>, %j: tensor<{kind}>) -> (tensor<2x3xf32>, tensor<6x7xf32>) {{
      %0 = stablehlo.dynamic_slice %x, %i, %j, sizes = [2, 3] : (tensor<6x7xf32>, tensor<{kind}>, tensor<{kind}>) -> tensor<2x3xf32>
      %1 = stablehlo.dynamic_update_slice %x, %0, %j, %i : (tensor<6x7xf32>, tensor<2x3xf32>, tensor<{kind}>, tensor<{kind}>) -> tensor<6x7xf32>
      return %0, %1 : tensor<2x3xf32>, tensor<6x7xf32>
    }}"""


STARTS = [(0, 0), (3, 4), (4, 5), (99, -99), (-1, 2), (2**31 - 1, -(2**31))]
START_DTYPES = [("i8", "int8"), ("ui8", "uint8"), ("i16", "int16"), ("ui16", "uint16"), ("ui32", "uint32"), ("i64", "int64"), ("ui64", "uint64")]
REAL = """func.func @main(%x: tensor<6x7xf32>, %a: tensor<2xi64>, %b: tensor<2xi64>, %c: tensor<2xi64>) -> tensor<2x3xf32> {
  %0 = stablehlo.real_dynamic_slice %x, %a, %b, %c : (tensor<6x7xf32>, tensor<2xi64>, tensor<2xi64>, tensor<2xi64>) -> tensor<2x3xf32>
  return %0 : tensor<2x3xf32>
}"""

CASES = [
    Case("slice", lambda x: lax.slice(x, (1, 2), (5, 7)), (X,)),
    Case("slice_strided", lambda x: lax.slice(x, (1, 0), (6, 7), (2, 3)), (X,)),
    Case("slice_last", lambda x: lax.slice(x, (5, 6), (6, 7), (9, 9)), (X,)),
    Case("slice_empty", lambda x: lax.slice(x, (2, 2), (2, 5)), (X,)),
    Case("slice_of_empty", lambda x: lax.slice(x, (0, 0), (0, 2)), (X[:0],)),
    Case("slice_rank_0", lambda x: lax.slice(x, (), ()), (np.float32(1),)),
    Case("slice_grad", jax.grad(lambda x: (x[1:5:2, ::3] ** 2).sum()), (X,)),
    *[Case(f"dynamic_slice_{i}_{j}", window, (X, np.int32(i), np.int32(j))) for i, j in STARTS],
    *[Case(f"dynamic_update_slice_{i}_{j}", write, (X, np.int32(i), np.int32(j))) for i, j in STARTS],
    Case("dynamic_slice_whole", lambda x, i: lax.dynamic_slice(x, (i, i), (6, 7)), (X, np.int32(3))),
    Case("dynamic_slice_one_axis", lambda x, i: lax.dynamic_slice(x, (i, 0), (1, 7)), (X, np.int32(3))),
    Case("dynamic_slice_empty", lambda x, i: lax.dynamic_slice(x, (i, i), (0, 2)), (X, np.int32(3))),
    Case("dynamic_slice_of_empty", lambda x, i: lax.dynamic_slice(x, (i, i), (0, 2)), (X[:0], np.int32(3))),
    Case("dynamic_slice_of_transpose", lambda x, i: lax.dynamic_slice(x.T, (i, i), (3, 2)), (X, np.int32(2))),
    Case("dynamic_update_whole", lambda x, i: lax.dynamic_update_slice(x, -x, (i, i)), (X, np.int32(3))),
    Case("dynamic_update_empty", lambda x, i: lax.dynamic_update_slice(x, x[:0], (i, i)), (X, np.int32(3))),
    Case("dynamic_update_rank_0", lambda x: lax.dynamic_update_slice(x, -x, ()), (np.float32(1),)),
    Case("dynamic_update_of_transpose", lambda x, i: lax.dynamic_update_slice(x.T, -x[:2, :3], (i, i)), (X, np.int32(2))),
    Case("dynamic_slice_grad", jax.grad(lambda x, i: (window(x, i, i) ** 2).sum()), (X, np.int32(5))),
    Case("dynamic_update_grad", jax.grad(lambda x, i: (write(x, i, i) ** 2).sum()), (X, np.int32(5))),
    Case("x[i]", lambda x, i: x[i], (X, np.int32(-2))),
    *[Case(f"dynamic_slice_{d}", window, (cast(X, d), np.int32(3), np.int32(9))) for d in DTYPES],
    *[Case(f"dynamic_update_slice_{d}", lambda x, i: lax.dynamic_update_slice(x, x[:2, :3], (i, i)), (cast(X, d), np.int32(3))) for d in DTYPES],
    Case("uint8_starts", lambda x, i: lax.dynamic_slice(x, (i,), (100,)), (np.arange(1000), np.uint8(250))),
]

WIDE = [
    *[Case(f"starts_{kind}", text(kind), (X, np.array(4, d), np.array(2, d))) for kind, d in START_DTYPES],
    *[Case(f"starts_{kind}_max", text(kind), (X, np.array(np.iinfo(d).max, d), np.array(np.iinfo(d).min, d))) for kind, d in START_DTYPES],
    Case("starts_2**32", text("i64"), (X, np.int64(2**32 + 1), np.int64(-(2**32) + 1))),
    Case("starts_2**63", text("ui64"), (X, np.uint64(2**63 + 1), np.uint64(1))),
    *[
        Case(f"{d}_elements", lambda x, i: (window(x, i, i), lax.dynamic_update_slice(x, x[:2, :3], (i, i))), ((X + 2.0**53).astype(d), np.int32(1)))
        for d in ("int64", "uint64")
    ],
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_slices(case):
    """Same result as XLA, before and after export."""
    check_both(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_64_bits(case):
    """Starts beyond int32 are clamped before they are narrowed; 64-bit elements are exact."""
    with jax.enable_x64(True):
        check(case)


def test_real_dynamic_slice():
    """Bounds at run time, a static result type."""
    bounds = [np.array(v, np.int64) for v in ([1, 0], [5, 7], [3, 3])]
    (got,) = run_on_mlx(Case("real", REAL, (X, *bounds)))
    np.testing.assert_array_equal(got, X[1:5:3, 0:7:3])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_window_property(data):
    """Read and write at any start, of any window that fits."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes = [data.draw(st.integers(0, d)) for d in shape]
    starts = [data.draw(st.integers(-6, 6)) for _ in shape]
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    place = tuple(slice(min(max(i, 0), d - s), min(max(i, 0), d - s) + s) for i, d, s in zip(starts, shape, sizes, strict=True))

    def f(x, starts):
        index = [starts[k] for k in range(len(shape))]
        read = lax.dynamic_slice(x, index, sizes, allow_negative_indices=False)
        return read, lax.dynamic_update_slice(x, jnp.negative(read), index, allow_negative_indices=False)

    read, written = run_on_mlx(Case("window", f, (x, np.array(starts, np.int32))))
    want = x.copy()
    want[place] *= -1
    np.testing.assert_array_equal(read, x[place])
    np.testing.assert_array_equal(written, want)
