"""`reduce_window` (pooling, cumulative scans, any elementwise body) and `select_and_scatter`."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from .harness import Case, check, check_exported, run_on_mlx

R = np.random.default_rng(0)
BF16 = np.dtype(ml_dtypes.bfloat16)
INTS = [np.dtype(f"{u}int{b}") for u in ("", "u") for b in (8, 16, 32)]
SUMS = dict(rtol=3e-6, atol=1e-5)
HALF = {"float16": dict(rtol=4e-3, atol=4e-3), "bfloat16": dict(rtol=3e-2, atol=3e-2)}


def normal(*shape, dtype="float32"):
    x = R.standard_normal(shape)
    return (x + 1j * R.standard_normal(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


def ties(*shape, dtype="float32"):
    """Small whole numbers, so that windows hold equal elements."""
    return R.integers(0, 4, shape).astype(dtype)


def whole(*shape, dtype):
    limits = np.iinfo(dtype)
    return R.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def window(f, init, size, strides=None, padding="VALID", base=None, dilation=None):
    strides = strides or (1,) * len(size)
    return lambda x: lax.reduce_window(x, np.asarray(init, x.dtype), f, size, strides, padding, base, dilation)


IMAGE = (2, 9, 8, 3)
CASES = [
    Case("max_pool", window(lax.max, -np.inf, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"), (normal(*IMAGE),)),
    Case("max_pool_valid", window(lax.max, -np.inf, (1, 2, 2, 1), (1, 2, 2, 1)), (normal(*IMAGE),)),
    Case("min_pool", window(lax.min, np.inf, (1, 2, 3, 1), (1, 3, 1, 1), "SAME"), (normal(*IMAGE),)),
    Case("sum_pool", window(lax.add, 0, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"), (normal(*IMAGE),), **SUMS),
    Case("product", window(lax.mul, 1, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"), (normal(*IMAGE),), rtol=1e-5, atol=1e-7),
    Case("nchw", window(lax.max, -np.inf, (1, 1, 3, 3), (1, 1, 2, 2), "SAME"), (normal(2, 3, 9, 8),)),
    Case("padding", window(lax.add, 0, (2, 3), (1, 2), [(3, 0), (1, 4)]), (normal(6, 7),), **SUMS),
    Case("negative_padding", window(lax.add, 0, (2, 3), (1, 2), [(-2, 1), (2, -3)]), (normal(6, 7),), **SUMS),
    Case("base_dilation", window(lax.add, 0, (2, 3), (1, 2), [(1, 0), (2, 2)], (2, 3)), (normal(6, 7),), **SUMS),
    Case("base_dilation_negative", window(lax.add, 0, (2, 3), (1, 2), [(-1, 0), (2, -4)], (2, 3)), (normal(6, 7),), **SUMS),
    Case("window_dilation", window(lax.max, -np.inf, (3, 2), (1, 1), [(2, 2), (0, 3)], None, (2, 3)), (normal(6, 7),)),
    Case("everything", window(lax.add, 0, (3, 2), (2, 3), [(2, -1), (0, 3)], (2, 2), (1, 3)), (normal(6, 7),), **SUMS),
    Case("all_dims", window(lax.add, 0, (2, 3, 2), (2, 1, 1), "SAME"), (normal(4, 5, 3),), **SUMS),
    Case("long_window", window(lax.add, 0, (40,)), (normal(100),), rtol=1e-5, atol=1e-4),
    Case("long_window_stride", window(lax.max, -np.inf, (37,), (5,), "SAME"), (normal(100),)),
    Case("long_window_dilated", window(lax.min, np.inf, (21,), (2,), [(30, 3)], None, (3,)), (normal(100),)),
    Case("short_scan_of_halves", window(lax.add, 0, (12, 1), None, [(11, 0), (0, 0)]), (normal(12, 7, dtype=BF16),), rtol=0, atol=0),
    Case("whole", window(lax.add, 0, (9, 8)), (normal(9, 8),), **SUMS),
    Case("no_window", window(lax.add, 0, (3, 3)), (normal(2, 5),)),
    Case("empty_batch", window(lax.max, -np.inf, (1, 2)), (np.zeros((0, 5), np.float32),)),
    Case("nan", window(lax.max, -np.inf, (3,), (1,), "SAME"), (np.array([1, np.nan, 3, 4, np.nan, 0, 1, 2], np.float32),)),
    Case(
        "avg_pool",
        lambda x: window(lax.add, 0, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")(x) / window(lax.add, 0, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")(jnp.ones_like(x)),
        (normal(*IMAGE),),
        **SUMS,
    ),
    Case("complex", window(lax.add, 0, (2, 3), (1, 2), "SAME"), (normal(6, 7, dtype="complex64"),), rtol=1e-5, atol=1e-5),
    Case("logaddexp", window(jnp.logaddexp, -np.inf, (3, 2), (2, 1), "SAME"), (normal(6, 7),), rtol=2e-5, atol=1e-6),
    Case(
        "keeps_order",
        window(lambda a, b: lax.select(b != 0, b, a), 0, (3, 3), (2, 1), "SAME"),
        (ties(7, 8, dtype="int32") * np.arange(56, dtype=np.int32).reshape(7, 8),),
    ),
    Case(
        "two_operands",
        lambda x, y: lax.reduce_window((x, y), (np.float32(0), np.float32(-np.inf)), lambda a, b: (a[0] + b[0], lax.max(a[1], b[1])), (2, 2), (1, 2), "SAME"),
        (normal(5, 6), normal(5, 6)),
        **SUMS,
    ),
    Case(
        "arg_window",
        lambda x, i: lax.reduce_window(
            (x, i),
            (np.float32(-np.inf), np.int32(-1)),
            lambda a, b: (lax.select(a[0] >= b[0], a[0], b[0]), lax.select(a[0] >= b[0], a[1], b[1])),
            (3, 3),
            (2, 2),
            "SAME",
        ),
        (normal(9, 8), np.arange(72, dtype=np.int32).reshape(9, 8)),
    ),
]
CASES += [
    Case(f"{name}_{dtype.name}", window(f, init(np.iinfo(dtype)), (2, 3), (1, 2), "SAME"), (whole(6, 7, dtype=dtype),))
    for dtype in INTS
    for name, f, init in [
        ("add", lax.add, lambda i: 0),
        ("mul", lax.mul, lambda i: 1),
        ("max", lax.max, lambda i: i.min),
        ("min", lax.min, lambda i: i.max),
        ("xor", lax.bitwise_xor, lambda i: 0),
    ]
]
CASES += [
    Case(f"{name}_{dtype.name}", window(f, init, (2, 3), (1, 2), "SAME"), (normal(6, 7, dtype=dtype),), **HALF[dtype.name])
    for dtype in (np.dtype("float16"), BF16)
    for name, f, init in [("add", lax.add, 0), ("max", lax.max, -np.inf), ("mul", lax.mul, 1)]
]
CASES += [
    Case(f"{name}_bool", window(f, init, (2, 3), (1, 2), "SAME"), (R.random((6, 7)) > 0.5,))
    for name, f, init in [
        ("or", lax.bitwise_or, False),
        ("and", lax.bitwise_and, True),
        ("xor", lax.bitwise_xor, False),
        ("max", lax.max, False),
    ]
]

# Running sums of signed terms pass near zero: an absolute tolerance
CUMULATIVE = [
    Case(
        f"{name}_{axis}{'_reverse' if reverse else ''}",
        lambda x, f=f, axis=axis, reverse=reverse: f(x, axis, reverse),
        (normal(5, 700, 2),),
        rtol=1e-5,
        atol=1e-4 if name == "cumsum" else 1e-6,
    )
    for name, f in [("cumsum", lax.cumsum), ("cummax", lax.cummax), ("cummin", lax.cummin), ("cumlogsumexp", lax.cumlogsumexp)]
    for axis in (0, 1)
    for reverse in (False, True)
]
CUMULATIVE += [
    Case("cumprod", lambda x: (lax.cumprod(x, 0), lax.cumprod(x, 1, reverse=True)), (normal(9, 8),), rtol=1e-5),
    Case("cumsum_long", lambda x: lax.cumsum(x), (R.random(200_003).astype(np.float32),), rtol=2e-6),
    Case("cumsum_long_reverse", lambda x: lax.cumsum(x, 1, reverse=True), (R.random((2, 20_001)).astype(np.float32),), rtol=2e-6),
    Case(
        "cumsum_bool",
        lambda x: (jnp.cumsum(x, 1), lax.reduce_window(x, False, lax.bitwise_or, (1, 7), (1, 1), [(0, 0), (6, 0)])),
        (R.random((4, 7)) > 0.8,),
    ),
    *(
        Case(
            f"cum_nan_{dtype}",
            lambda x: (lax.cummax(x, 0), lax.cummin(x, 0), lax.cummin(x, 0, reverse=True), lax.cumsum(x, 0)),
            (np.array([1, 2, np.nan, 5, -np.inf, np.inf], dtype),),
        )
        for dtype in ("float32", "float16", "bfloat16")
    ),
    Case(
        "cum_edges",
        lambda x: (lax.cumlogsumexp(x, 0), lax.cumprod(x, 0), lax.cummax(x, 0)),
        (np.array([-np.inf, -np.inf, 1, 0, np.inf, 2], np.float32),),
        rtol=1e-5,
    ),
    Case("cum_single", lambda x: (lax.cumsum(x, 0), lax.cummax(x, 1)), (normal(1, 3),)),
    Case("cum_empty", lambda x: lax.cumsum(x, 1), (np.zeros((3, 0), np.float32),)),
    Case("cum_complex", lambda x: (lax.cumsum(x, 1), lax.cumprod(x, 1)), (normal(3, 9, dtype="complex64"),), rtol=1e-4, atol=1e-4),
    Case("cumsum_long_complex", lambda x: lax.cumsum(x, 0), (normal(900, dtype="complex64"),), rtol=1e-4, atol=1e-4),
    Case("cumsum_grad", jax.grad(lambda x: jnp.sin(jnp.cumsum(x, 1)).sum()), (normal(3, 9),), rtol=1e-5, atol=1e-5),
    Case("cumprod_grad", jax.grad(lambda x: jnp.cumprod(x, 1).sum()), (normal(3, 5),), rtol=1e-4, atol=1e-4),
    Case("cummax_grad", jax.grad(lambda x: (lax.cummax(x, 1) ** 2).sum()), (normal(3, 9),), rtol=1e-5),
    Case("causal_longer_than_operand", lambda x: lax.reduce_window(x, np.float32(0), lax.add, (12,), (1,), [(11, 0)]), (normal(7),), **SUMS),
    Case("causal_shorter", lambda x: lax.reduce_window(x, np.float32(0), lax.add, (5,), (1,), [(4, 0)]), (normal(30),), **SUMS),
    *[
        Case(
            f"cum_{d.name}",
            lambda x: (lax.cumsum(x, 1), lax.cummax(x, 0), lax.cumprod(x, 1), lax.cummin(x, 1, reverse=True)),
            (whole(4, 300, dtype=d),),
        )
        for d in INTS
    ],
    *[
        Case(f"cum_{d.name}", lambda x: (lax.cumsum(x, 1), lax.cummax(x, 0)), (normal(4, 30, dtype=d),), rtol=2e-2, atol=5e-2)
        for d in (np.dtype("float16"), BF16)
    ],
]


def pool_grad(size, strides, padding, init=-np.inf, f=lax.max):
    def loss(x):
        y = lax.reduce_window(x, np.asarray(init, x.dtype), f, size, strides, padding)
        return (y.astype(np.float32) * jnp.arange(y.size, dtype=np.float32).reshape(y.shape)).sum()

    return jax.grad(loss)


SCATTERS = [
    Case(f"max_pool_grad_{w}_{s}_{p}".replace(" ", ""), pool_grad((1, *w, 1), (1, *s, 1), p), (ties(*IMAGE),), **SUMS)
    for w, s, p in itertools.product([(3, 3), (2, 2), (2, 3), (1, 1)], [(2, 2), (1, 1), (3, 1), (4, 5)], ["SAME", "VALID"])
]
SCATTERS += [
    Case("max_pool_grad_nchw", pool_grad((1, 1, 3, 3), (1, 1, 2, 2), "SAME"), (ties(2, 3, 9, 8),), **SUMS),
    Case("max_pool_grad_padding", pool_grad((1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (2, 1), (1, 2), (0, 0)]), (ties(*IMAGE),), **SUMS),
    Case("max_pool_grad_global", pool_grad((1, 9, 8, 1), (1, 1, 1, 1), "VALID"), (ties(*IMAGE),)),
    Case("max_pool_grad_global_wide", pool_grad((1, 30, 20, 1), (1, 30, 20, 1), "VALID"), (normal(1, 30, 20, 2),)),
    Case("max_pool_grad_3d", pool_grad((1, 2, 2, 2, 1), (1, 2, 1, 2, 1), "SAME"), (ties(1, 5, 4, 5, 2),), **SUMS),
    Case("min_pool_grad", pool_grad((1, 3, 3, 1), (1, 2, 2, 1), "SAME", np.inf, lax.min), (ties(*IMAGE),), **SUMS),
    Case("avg_pool_grad", pool_grad((1, 3, 3, 1), (1, 2, 2, 1), "SAME", 0, lax.add), (normal(*IMAGE),), **SUMS),
    # XLA rounds every addition of overlapping windows to bfloat16
    Case("max_pool_grad_bf16", pool_grad((1, 3, 3, 1), (1, 2, 2, 1), "SAME"), (ties(1, 7, 6, 2, dtype=BF16),), rtol=2e-2),
    Case("max_pool_grad_empty", pool_grad((1, 2), (1, 2), "VALID"), (np.zeros((0, 4), np.float32),)),
    Case("max_pool_grad_no_windows", jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (3,), (1,), "VALID").sum()), (normal(2),)),
]

SELECT = """func.func @main(%x: tensor<7x6x{t}>, %s: tensor<{source}x{t}>, %i: tensor<{t}>) -> tensor<7x6x{t}> {{
  %0 = "stablehlo.select_and_scatter"(%x, %s, %i) ({{
    ^bb0(%a: tensor<{t}>, %b: tensor<{t}>):
      %1 = stablehlo.compare {order} : (tensor<{t}>, tensor<{t}>) -> tensor<i1>
      stablehlo.return %1 : tensor<i1>
  }}, {{
    ^bb0(%a: tensor<{t}>, %b: tensor<{t}>):
      %1 = stablehlo.{scatter} %a, %b : tensor<{t}>
      stablehlo.return %1 : tensor<{t}>
  }}) {{window_dimensions = array<i64: {w}>, window_strides = array<i64: {s}>, padding = dense<{p}> : tensor<2x2xi64>}}
    : (tensor<7x6x{t}>, tensor<{source}x{t}>, tensor<{t}>) -> tensor<7x6x{t}>
  return %0 : tensor<7x6x{t}> }}"""
PLAIN = dict(t="f32", source="3x3", order="GE, %a, %b", scatter="add", w="3, 2", s="2, 2", p="[[0, 0], [0, 0]]")


def selected(name, init=0, operand=None, **kw):
    kw = {**PLAIN, **kw}
    dtype = {"f32": "float32", "i32": "int32", "i8": "int8"}[kw["t"]]
    source = tuple(map(int, kw["source"].split("x")))
    operand = ties(7, 6) if operand is None else operand
    return Case(f"select_{name}", SELECT.format(**kw), (operand.astype(dtype), whole(*source, dtype=np.int8).astype(dtype), np.asarray(init, dtype)))


# XLA may take padding for an element of the init value, and in padded windows another than the first of equals.
DISTINCT = R.permutation(42).reshape(7, 6) + 1

SCATTERS += [
    selected("ge"),
    selected("gt", order="GT, %a, %b"),
    selected("le", order="LE, %a, %b"),
    selected("swapped", order="GE, %b, %a"),
    selected("equal", order="EQ, %a, %b"),
    selected("init", init=5),
    selected("int", t="i32", init=3, order="LT, %a, %b, SIGNED"),
    selected("int8_wraps", t="i8", source="5x5", s="1, 1"),
    selected("overlap_max", source="5x5", s="1, 1", scatter="maximum", init=-3),
    selected("multiply", source="5x5", s="1, 1", scatter="multiply", init=1),
    selected("padded", source="4x4", p="[[1, 2], [2, 1]]", operand=DISTINCT),
    selected("gaps", source="2x2", w="2, 1", s="4, 4", init=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce_window(case):
    """Equal to XLA's."""
    check(case)


@pytest.mark.parametrize("case", CUMULATIVE, ids=str)
def test_cumulative(case):
    """Scans, which JAX sends as windows over a whole dimension."""
    check(case)


@pytest.mark.parametrize("case", SCATTERS, ids=str)
def test_select_and_scatter(case):
    """The first of equals is selected; padding never is."""
    check(case)


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_x64(dtype):
    """64-bit integers, in windows, scans and scatters."""
    with jax.enable_x64(True):
        check(Case("window", window(lax.add, 0, (2, 3), (1, 2), "SAME"), (whole(6, 7, dtype=dtype),)))
        check(Case("scan", lambda x: (lax.cumsum(x, 1), lax.cummax(x, 0)), (whole(6, 7, dtype=dtype),)))


# Where XLA departs from the spec: it counts an init value once or not at all, and may select padding. The results are the spec's.
SPEC = [
    (Case("padding_is_init", window(lax.add, 2, (2,), (1,), [(1, 1)]), (np.float32([1, 2, 3]),)), [5, 5, 7, 7]),
    (Case("padding_is_init_max", window(lax.max, 2, (2,), (1,), [(1, 0)]), (np.float32([1, 2, 3]),)), [2, 2, 3]),
    (Case("scan_with_init", window(lax.add, 1, (3,), (1,), [(2, 0)]), (np.float32([1, 2, 3]),)), [4, 5, 7]),
    (Case("empty_operand", window(lax.add, 7, (2,), (1,), [(1, 1)]), (np.zeros(0, np.float32),)), [21]),
    (Case("scalar", lambda x: lax.reduce_window(x, np.float32(1), lax.add, (), (), []), (np.float32(3),)), 4),
    (Case("select_infinite", pool_grad((3,), (2,), [(1, 1)]), (np.full(5, -np.inf, np.float32),)), [0, 1, 0, 2, 0]),
    (Case("select_nan", pool_grad((2,), (2,), [(0, 1)]), (np.float32([np.nan, 1, 2, 3, np.nan]),)), [0, 0, 0, 1, 2]),
]


@pytest.mark.parametrize(("case", "expected"), SPEC, ids=lambda p: p.name if isinstance(p, Case) else "")
def test_spec(case, expected):
    """What the spec says of init values and padding."""
    np.testing.assert_array_equal(run_on_mlx(case)[0], np.asarray(expected, np.float32))


EXPORTED = ("max_pool", "long_window", "base_dilation", "cumsum_long", "cum_int8", "max_pool_grad_padding", "select_init", "logaddexp")


@pytest.mark.parametrize("case", [c for c in CASES + CUMULATIVE + SCATTERS if c.name in EXPORTED], ids=str)
def test_window_exported(case):
    """The same after export and import."""
    check_exported(case)
