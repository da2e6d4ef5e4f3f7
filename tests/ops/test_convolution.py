"""`convolution`: layouts, strides, padding, dilations, groups, dtypes and gradients."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from .harness import Case, check, check_exported

R = np.random.default_rng(0)
TOLERANCE = dict(rtol=1e-5, atol=2e-4)  # sums of up to a few hundred signed terms: the order of adding shows


def normal(*shape: int, dtype="float32"):
    x = R.standard_normal(shape)
    return (x + 1j * R.standard_normal(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


def whole(*shape: int, dtype):
    limits = np.iinfo(dtype)
    return R.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def conv(numbers=("NHWC", "HWIO", "NHWC"), strides=(1, 1), padding="SAME", **kw):
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **kw)


IMAGE, KERNEL = (2, 8, 9, 4), (3, 3, 4, 6)


def row(name, f, x=IMAGE, w=KERNEL, **kw):
    return Case(name, f, (normal(*x), normal(*w)), **{**TOLERANCE, **kw})


CASES = [
    row("same", conv()),
    row("valid", conv(padding="VALID")),
    row("stride", conv(strides=(2, 3))),
    row("one_by_one", conv(), w=(1, 1, 4, 6)),
    row("one_by_one_stride", conv(strides=(2, 2)), w=(1, 1, 4, 6)),
    row("one_by_one_padded", conv(padding=[(1, 2), (0, 1)]), w=(1, 1, 4, 6)),
    row("even_kernel", conv(), w=(2, 4, 4, 6)),
    row("padding", conv(padding=[(3, 0), (1, 4)])),
    row("negative_padding", conv(padding=[(-1, 2), (0, -2)])),
    row("dilated_kernel", conv(rhs_dilation=(2, 3), padding=[(2, 2), (3, 3)])),
    row("dilated_input", conv(lhs_dilation=(2, 3), padding=[(1, 1), (2, 0)])),
    row("dilated_input_stride", conv(lhs_dilation=(3, 2), strides=(2, 2), padding=[(2, 1), (1, 2)])),
    row("dilated_input_negative_padding", conv(lhs_dilation=(2, 3), padding=[(-1, 1), (2, -3)])),
    row("dilated_both", conv(lhs_dilation=(2, 2), rhs_dilation=(2, 1), strides=(1, 2), padding=[(-1, 3), (1, -2)])),
    row("groups", conv(feature_group_count=2), w=(3, 3, 2, 6)),
    row("groups_stride", conv(feature_group_count=2, strides=(2, 1)), w=(3, 3, 2, 6)),
    row("depthwise", conv(feature_group_count=4), w=(3, 3, 1, 4)),
    row("depthwise_two", conv(feature_group_count=4, strides=(2, 2)), w=(3, 3, 1, 8)),
    row("groups_dilated", conv(feature_group_count=2, lhs_dilation=(2, 2), rhs_dilation=(1, 2), padding=[(2, 2), (1, 1)]), w=(3, 3, 2, 6)),
    row("batch_groups", conv(batch_group_count=2), x=(4, 8, 9, 3), w=(3, 3, 3, 6)),
    row("batch_groups_depthwise", conv(batch_group_count=4), x=(4, 8, 9, 1), w=(3, 3, 1, 4)),
    row("nchw", conv(("NCHW", "OIHW", "NCHW")), x=(2, 4, 8, 9), w=(6, 4, 3, 3)),
    row("nchw_one_by_one", conv(("NCHW", "OIHW", "NCHW")), x=(2, 4, 8, 9), w=(6, 4, 1, 1)),
    row("odd_layout", conv(("HNCW", "WOIH", "WNHC"), strides=(2, 1)), x=(8, 2, 4, 9), w=(3, 6, 4, 2)),
    row("whole_image", conv(padding="VALID"), w=(8, 9, 4, 6)),
    row("large_kernel", conv(padding=[(1, 1), (1, 1)]), w=(8, 9, 4, 6)),
    row("spatial_0", conv(("NC", "IO", "NC"), strides=(), padding=[]), x=(5, 4), w=(4, 6)),
    row("spatial_0_groups", conv(("NC", "IO", "NC"), strides=(), padding=[], feature_group_count=2), x=(5, 4), w=(2, 6)),
    row("spatial_1", conv(("NWC", "WIO", "NWC"), strides=(2,)), x=(2, 11, 4), w=(3, 4, 6)),
    row("spatial_1_causal", conv(("NCW", "OIW", "NCW"), strides=(1,), padding=[(4, 0)], rhs_dilation=(2,)), x=(2, 4, 11), w=(6, 4, 3)),
    row("spatial_3", conv(("NDHWC", "DHWIO", "NDHWC"), strides=(1, 2, 1)), x=(2, 5, 6, 4, 3), w=(3, 2, 3, 3, 4)),
    row(
        "spatial_3_groups",
        conv(("NCDHW", "OIDHW", "NCDHW"), strides=(2, 1, 1), feature_group_count=2),
        x=(2, 4, 5, 6, 4),
        w=(6, 2, 3, 2, 3),
    ),
    row(
        "spatial_3_dilated",
        conv(("NDHWC", "DHWIO", "NDHWC"), strides=(1, 1, 1), padding=[(1, 1), (0, 1), (2, 0)], lhs_dilation=(2, 1, 2)),
        x=(1, 3, 4, 3, 3),
        w=(3, 2, 3, 3, 4),
    ),
    row(
        "spatial_4",
        conv(lax.ConvDimensionNumbers((0, 5, 1, 2, 3, 4), (5, 4, 0, 1, 2, 3), (0, 5, 1, 2, 3, 4)), strides=(1, 1, 2, 1)),
        x=(2, 3, 4, 5, 3, 2),
        w=(2, 2, 3, 1, 2, 3),
    ),
    row("empty_batch", conv(), x=(0, 8, 9, 4)),
    row("empty_features", conv(), x=(2, 8, 9, 0), w=(3, 3, 0, 6)),
    row("empty_outputs", conv(), w=(3, 3, 4, 0)),
    row("empty_image", conv(padding=[(2, 2), (1, 1)]), x=(2, 0, 9, 4)),
    row("window_too_large", conv(padding="VALID"), w=(9, 3, 4, 6)),
    row("single", conv(padding="VALID"), x=(1, 1, 1, 1), w=(1, 1, 1, 1)),
    row("highest", conv(precision="highest")),
    row("transposed", lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME")),
    row("transposed_kernel", lambda x, w: lax.conv_transpose(x, w, (2, 3), "VALID", transpose_kernel=True), w=(3, 3, 6, 4)),
    row(
        "local_1",
        lambda x, w: lax.conv_general_dilated_local(x, w, (1,), "VALID", (3,), dimension_numbers=("NWC", "WIO", "NWC")),
        x=(2, 6, 3),
        w=(4, 9, 5),
    ),
    row("patches", lambda x: lax.conv_general_dilated_patches(x, (3, 3), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), w=()),
]
CASES[-1] = Case("patches", CASES[-1].f, CASES[-1].args[:1])

REVERSED = """func.func @main(%x: tensor<2x7x6x3xf32>, %w: tensor<3x2x3x4xf32>) -> tensor<2x5x6x4xf32> {{
  %0 = stablehlo.convolution(%x, %w) dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f],
    window = {{stride = [1, 1], pad = [[0, 0], [0, 1]], reverse = [{}]}} {{batch_group_count = 1 : i64, feature_group_count = 1 : i64}}
    : (tensor<2x7x6x3xf32>, tensor<3x2x3x4xf32>) -> tensor<2x5x6x4xf32>
  return %0 : tensor<2x5x6x4xf32>
}}"""
CASES += [
    Case(f"reversed_{name}", REVERSED.format(text), (normal(2, 7, 6, 3), normal(3, 2, 3, 4)), **TOLERANCE)
    for name, text in [("both", "true, true"), ("first", "true, false"), ("second", "false, true")]
]

HALF = {"float16": dict(rtol=2e-3, atol=1e-2), "bfloat16": dict(rtol=1.6e-2, atol=8e-2), "complex64": TOLERANCE}
VARIANTS = [
    ("same", {}, KERNEL),
    ("stride", dict(strides=(2, 1), padding=[(-1, 1), (2, 0)]), KERNEL),
    ("groups", dict(feature_group_count=2), (3, 3, 2, 6)),
]
CASES += [
    Case(f"{name}_{dtype}", conv(**kw), (normal(*IMAGE, dtype=dtype_), normal(*w, dtype=dtype_)), **HALF[dtype])
    for dtype, dtype_ in [("float16", "float16"), ("bfloat16", ml_dtypes.bfloat16), ("complex64", "complex64")]
    for name, kw, w in VARIANTS
]
CASES += [
    Case(f"{name}_{dtype}", conv(**kw), (whole(*IMAGE, dtype=dtype), whole(*w, dtype=dtype)))
    for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32")
    for name, kw, w in VARIANTS
]
CASES += [
    Case("i8_to_i32", conv(preferred_element_type=np.int32), (whole(*IMAGE, dtype=np.int8), whole(*KERNEL, dtype=np.int8))),
    Case(
        "bf16_to_f32",
        conv(preferred_element_type=np.float32),
        (normal(*IMAGE, dtype=ml_dtypes.bfloat16), normal(*KERNEL, dtype=ml_dtypes.bfloat16)),
        **TOLERANCE,
    ),
]


def grads(f):
    return jax.grad(lambda x, w: jnp.sum(jnp.sin(f(x, w))), (0, 1))


# XLA's own gradients sum in another order; sin's derivative is bounded by one
CASES += [
    row(f"grad_{name}", grads(f), x, w, rtol=1e-4, atol=2e-3)
    for name, f, x, w in [
        ("same", conv(), IMAGE, KERNEL),
        ("stride", conv(strides=(2, 2)), IMAGE, KERNEL),
        ("stem", conv(strides=(2, 2), padding=[(3, 3), (3, 3)]), (2, 16, 16, 3), (7, 7, 3, 4)),
        ("stride_valid", conv(strides=(3, 2), padding="VALID"), IMAGE, KERNEL),
        ("one_by_one", conv(), IMAGE, (1, 1, 4, 6)),
        ("one_by_one_stride", conv(strides=(2, 2)), IMAGE, (1, 1, 4, 6)),
        ("dilated", conv(rhs_dilation=(2, 2)), IMAGE, KERNEL),
        ("groups", conv(feature_group_count=2), IMAGE, (3, 3, 2, 6)),
        ("depthwise", conv(feature_group_count=4, strides=(2, 2)), IMAGE, (3, 3, 1, 8)),
        ("nchw", conv(("NCHW", "OIHW", "NCHW"), strides=(2, 2)), (2, 4, 8, 9), (6, 4, 3, 3)),
        ("transposed", lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME"), IMAGE, KERNEL),
        ("spatial_1", conv(("NWC", "WIO", "NWC"), strides=(2,)), (2, 11, 4), (3, 4, 6)),
        ("spatial_3", conv(("NDHWC", "DHWIO", "NDHWC"), strides=(1, 2, 1)), (2, 5, 6, 4, 3), (3, 2, 3, 3, 4)),
    ]
]


def convnet(params, x):
    w1, w2, b, dense = params
    x = jax.nn.relu(conv(strides=(2, 2))(x, w1) + b)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jnp.mean(jax.nn.relu(conv()(x, w2)), (1, 2))
    return jnp.mean(jax.nn.logsumexp(x @ dense, -1))


CASES.append(
    Case(
        "grad_convnet",
        jax.grad(convnet),
        ((normal(3, 3, 3, 8), normal(3, 3, 8, 8), normal(8), normal(8, 5)), normal(4, 16, 16, 3)),
        rtol=1e-4,
        atol=1e-5,
    )
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case):
    """Equal to XLA's; integers exactly."""
    check(case)


# Shapes at which the CPU's own ways are chosen, strides, paddings and dilations in all combinations.
GRID = [
    row(
        f"grid_s{s}_p{p}_l{l}_r{r}_g{g}".replace(" ", ""),
        conv(strides=(s, 1), padding=[p, (1, 0)], lhs_dilation=(l, 1), rhs_dilation=(r, 1), feature_group_count=g),
        (1, 7, 5, 4),
        (3, 2, 4 // g, 4),
    )
    for s, p, l, r, g in itertools.product((1, 2, 3), ((0, 0), (2, 1), (-2, 3)), (1, 2, 3), (1, 2), (1, 4))
]


@pytest.mark.parametrize("case", GRID, ids=str)
def test_convolution_grid(case):
    """Strides, paddings, dilations and groups together."""
    check(case)


EXPORTED = (
    "stride",
    "groups_dilated",
    "depthwise",
    "spatial_4",
    "same_int32",
    "same_complex64",
    "dilated_input_negative_padding",
    "grad_stride",
    "grad_depthwise",
)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in EXPORTED], ids=str)
def test_convolution_exported(case):
    """The same after export and import."""
    check_exported(case)
