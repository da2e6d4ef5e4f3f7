"""`dot_general` and `dot`, every dtype and layout."""

import io
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from jax import lax

from jax_mps.errors import Unsupported
from jax_mps.ops import dot, products, target
from jax_mps.ops.registry import lower_steps

from .harness import Case, check, check_both, check_exported, lowered, plan_of, run_on_mlx

R = np.random.default_rng(0)
FLOATS = [np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16), np.dtype("complex64")]
INTS = [np.dtype(f"{u}int{b}") for u in ("", "u") for b in (8, 16, 32)]


def normal(*shape: int, dtype="float32"):
    x = R.standard_normal(shape)
    return (x + 1j * R.standard_normal(shape)).astype(dtype) if np.dtype(dtype).kind == "c" else x.astype(dtype)


def whole(*shape: int, dtype):
    """Integers over the whole range of a dtype, so that products wrap around."""
    limits = np.iinfo(dtype)
    return R.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


def dims(contracting, batching=((), ()), **kw):
    return lambda a, b: lax.dot_general(a, b, (contracting, batching), **kw)


MATMUL = dims(((1,), (0,)))
TOLERANCE = dict(rtol=1e-5, atol=1e-4)  # sums of signed terms: the order of adding shows
HALF = {"float16": dict(rtol=2e-3, atol=2e-3), "bfloat16": dict(rtol=1.6e-2, atol=1.6e-2)}

LAYOUTS = [
    ("matmul", MATMUL, (5, 7), (7, 3)),
    ("matmul_tn", dims(((0,), (0,))), (7, 5), (7, 3)),
    ("matmul_nt", dims(((1,), (1,))), (5, 7), (3, 7)),
    ("matrix_vector", dims(((1,), (0,))), (5, 7), (7,)),
    ("vector_matrix", dims(((0,), (0,))), (7,), (7, 3)),
    ("vectors", dims(((0,), (0,))), (7,), (7,)),
    ("outer", dims(((), ())), (5,), (3,)),
    ("outer_2d", dims(((), ())), (5, 2), (3,)),
    ("scalars", dims(((), ())), (), ()),
    ("scalar_by_vector", dims(((), ())), (), (4,)),
    ("batch", dims(((2,), (1,)), ((0,), (0,))), (4, 5, 7), (4, 7, 3)),
    ("batch_last", dims(((0,), (1,)), ((2,), (2,))), (7, 5, 4), (3, 7, 4)),
    ("attention", dims(((3,), (3,)), ((0, 2), (0, 2))), (2, 5, 3, 8), (2, 6, 3, 8)),
    ("batch_swapped", dims(((2,), (2,)), ((0, 1), (1, 0))), (2, 3, 7), (3, 2, 7)),
    ("batch_vectors", dims(((1,), (1,)), ((0,), (0,))), (9, 7), (9, 7)),
    ("batch_only", dims(((), ()), ((0,), (0,))), (4, 5), (4, 3)),
    ("elementwise", dims(((), ()), ((0, 1), (0, 1))), (4, 5), (4, 5)),
    ("two_contracting", dims(((0, 1), (0, 1))), (3, 4, 5), (3, 4, 6)),
    ("two_contracting_swapped", dims(((0, 2), (1, 0))), (3, 5, 4), (4, 3, 6)),
    ("all_contracting", dims(((0, 1), (1, 0))), (3, 4), (4, 3)),
    ("high_rank", dims(((1, 4), (3, 0)), ((2,), (2,))), (2, 3, 2, 2, 4, 2), (4, 5, 2, 3)),
    ("empty_rows", MATMUL, (0, 7), (7, 3)),
    ("empty_sum", MATMUL, (5, 0), (0, 3)),
    ("empty_batch", dims(((2,), (1,)), ((0,), (0,))), (0, 5, 7), (0, 7, 3)),
    ("empty_vectors", dims(((0,), (0,))), (0,), (0,)),
    ("one_by_one", MATMUL, (1, 1), (1, 1)),
    ("dense_3d", dims(((2,), (0,))), (2, 5, 7), (7, 3)),
]

CASES = [Case(f"{name}_f32", f, (normal(*a), normal(*b)), **TOLERANCE) for name, f, a, b in LAYOUTS]
CASES += [
    Case(f"{name}_{dtype.name}", f, (normal(*a, dtype=dtype), normal(*b, dtype=dtype)), **HALF.get(dtype.name, TOLERANCE))
    for name, f, a, b in LAYOUTS
    if name in ("matmul", "batch", "outer", "empty_sum", "batch_vectors", "attention")
    for dtype in FLOATS[1:]
]
CASES += [
    Case(f"{name}_{dtype.name}", f, (whole(*a, dtype=dtype), whole(*b, dtype=dtype)))
    for name, f, a, b in LAYOUTS
    if name in ("matmul", "batch_last", "outer", "empty_sum", "vectors", "scalars")
    for dtype in INTS
]
CASES += [Case(f"long_{dtype.name}", MATMUL, (whole(40, 1500, dtype=dtype), whole(1500, 3, dtype=dtype))) for dtype in INTS]
CASES += [Case(f"{name}_bool", f, (R.random(a) > 0.7, R.random(b) > 0.7)) for name, f, a, b in LAYOUTS if name in ("matmul", "outer", "empty_sum", "batch")]
CASES += [
    Case("i8_to_i32", dims(((1,), (0,)), preferred_element_type=np.int32), (whole(5, 7, dtype=np.int8), whole(7, 3, dtype=np.int8))),
    Case(
        "i8_to_i32_long",
        dims(((1,), (0,)), preferred_element_type=np.int32),
        (np.full((33, 3000), -128, np.int8), np.full((3000, 33), -128, np.int8)),
    ),
    Case("u8_to_i32", dims(((1,), (0,)), preferred_element_type=np.int32), (whole(5, 7, dtype=np.uint8), whole(7, 3, dtype=np.uint8))),
    Case(
        "bf16_to_f32",
        dims(((1,), (0,)), preferred_element_type=np.float32),
        tuple(normal(7, 7, dtype=ml_dtypes.bfloat16) for _ in range(2)),
        **TOLERANCE,
    ),
    Case(
        "f16_to_f32",
        dims(((1,), (0,)), preferred_element_type=np.float32),
        tuple(normal(7, 7, dtype=np.float16) for _ in range(2)),
        **TOLERANCE,
    ),
    Case("int_min", MATMUL, (np.full((64, 64), -(2**31), np.int32), np.full((64, 64), -1, np.int32))),
    Case("highest", dims(((1,), (0,)), precision="highest"), (normal(9, 9), normal(9, 9)), **TOLERANCE),
    Case("high", dims(((1,), (0,)), precision="high"), (normal(9, 9), normal(9, 9)), **TOLERANCE),
    Case("nan_and_inf", MATMUL, (np.array([[1, np.inf], [np.nan, 1], [0, 1]], np.float32), np.array([[1, 0], [2, 3]], np.float32))),
    Case(
        "dot",
        "func.func @main(%a: tensor<4x6xf32>, %b: tensor<6x3xf32>) -> tensor<4x3xf32> "
        "{ %0 = stablehlo.dot %a, %b : (tensor<4x6xf32>, tensor<6x3xf32>) -> tensor<4x3xf32>\n return %0 : tensor<4x3xf32> }",
        (normal(4, 6), normal(6, 3)),
        **TOLERANCE,
    ),
    Case(
        "dot_vectors",
        "func.func @main(%a: tensor<6xi32>, %b: tensor<6xi32>) -> tensor<i32> "
        "{ %0 = stablehlo.dot %a, %b : (tensor<6xi32>, tensor<6xi32>) -> tensor<i32>\n return %0 : tensor<i32> }",
        (whole(6, dtype=np.int32), whole(6, dtype=np.int32)),
    ),
    Case("grad", jax.grad(lambda a, b: jnp.tanh(a @ b).sum(), (0, 1)), (normal(5, 7), normal(7, 3)), **TOLERANCE),
    Case(
        "grad_einsum",
        jax.grad(lambda q, k: jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)).std(), (0, 1)),
        (normal(2, 5, 3, 8), normal(2, 6, 3, 8)),
        rtol=1e-4,
        atol=1e-6,
    ),
    Case(
        "bf16_dense_grad",
        jax.grad(lambda a, b: (a @ b).astype(np.float32).sum(), (0, 1)),
        (normal(5, 7, dtype=ml_dtypes.bfloat16), normal(7, 3, dtype=ml_dtypes.bfloat16)),
        **HALF["bfloat16"],
    ),
]
CASES += [
    Case(f"algorithm_{name}", dims(((1,), (0,)), precision=lax.DotAlgorithmPreset[name]), (normal(9, 9), normal(9, 9)), **TOLERANCE)
    for name in ("F32_F32_F32",)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dot(case):
    """Equal to XLA's: integers exactly, wrapped around."""
    check(case)


X64 = [
    Case(f"{name}_{dtype}", f, (whole(*a, dtype=dtype), whole(*b, dtype=dtype)))
    for name, f, a, b in [*LAYOUTS[:1], ("long", MATMUL, (20, 2100), (2100, 3)), ("vectors", dims(((0,), (0,))), (9,), (9,))]
    for dtype in ("int64", "uint64")
]


@pytest.mark.parametrize("case", X64, ids=str)
def test_dot_x64(case):
    """64-bit integers wrap around too."""
    with jax.enable_x64(True):
        check(case)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("attention_f32", "matmul_int32", "long_int8", "matmul_bool", "batch_complex64", "matmul_bfloat16")],
    ids=str,
)
def test_dot_exported(case):
    """The same after export and import: the integers' limbs go through float64 there too."""
    check_exported(case)


@pytest.mark.parametrize("name", ["TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32", "BF16_BF16_F32_X9"])
def test_algorithm_met_by_more(name):
    """An algorithm of less accuracy than float32's is met by float32 (XLA's CPU backend refuses these)."""
    a, b = normal(9, 9), normal(9, 9)
    [got] = run_on_mlx(Case(name, dims(((1,), (0,)), precision=lax.DotAlgorithmPreset[name]), (a, b)))
    np.testing.assert_allclose(got, a @ b, **TOLERANCE)


def test_algorithm_refused():
    """One that asks for float64 is not."""
    with pytest.raises(Unsupported, match=r"f64|float64"):
        run_on_mlx(Case("f64", dims(((1,), (0,)), precision=lax.DotAlgorithmPreset.F64_F64_F64), (normal(3, 3), normal(3, 3))))


ON_CUDA = {  # name: shapes, precision, the largest error that is allowed of what TF32 would make (its rounding is imitated)
    "tiny": ((4, 3), (3, 6), None, 1e-6),
    "tiny batches": ((50, 4, 3), (50, 3, 6), None, 1e-6),
    "large": ((40, 30), (30, 50), None, 1e-2),
    "small and precise": ((20, 30), (30, 25), "highest", 1e-6),
    "large and precise": ((40, 50), (50, 60), "highest", 1e-5),
}


@pytest.mark.parametrize("name", ON_CUDA)
def test_dot_on_cuda(name, monkeypatch):
    """Where float32 products are TF32's, tiny ones are float32 all the same, as XLA's; so are those that ask for it."""
    *shapes, precision, limit = ON_CUDA[name]
    matmul = mx.matmul

    def tf32(x):
        return (x.view(mx.uint32) & mx.array(0xFFFFE000, mx.uint32)).view(mx.float32)

    monkeypatch.setattr(products, "device_kind", lambda: "cuda")
    monkeypatch.setattr(mx, "matmul", lambda a, b: matmul(tf32(a), tf32(b)))
    a, b = (normal(*shape) for shape in shapes)
    [got] = run_on_mlx(Case(name, lambda a, b: jnp.matmul(a, b, precision=precision), (a, b)))
    wide = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64))
    error = np.max(np.abs(got - a.astype(np.float64) @ b.astype(np.float64)) / wide)
    assert error < limit
    assert (error > 1e-5) == (name == "large")


@pytest.mark.parametrize("case", [c for c in CASES if c.name.endswith("_f32")], ids=str)
def test_matrices_that_are_copied_on_cuda(case, monkeypatch):
    """The same products, of copies that lie as MLX wants them."""
    monkeypatch.setattr(dot, "device_kind", lambda: "cuda")
    check_both(case)


def test_one_copy_for_all_products(monkeypatch):
    """Attention and its gradients: heads stand between positions and features in the three arrays and in the gradient, and two products read each;
    and the result is merged."""
    monkeypatch.setattr(dot, "device_kind", lambda: "cuda")

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return ((jnp.tanh(q @ k.swapaxes(-1, -2)) @ v).transpose(0, 2, 1, 3).reshape(2, 9, -1) ** 2).sum()

    case = Case("attention", jax.grad(attend, (0, 1, 2)), [normal(2, 9, 4, 8)] * 3, rtol=1e-4, atol=1e-4)  # products of sums of products
    _, run, arguments = lowered(case, rewritten=True)
    text = io.StringIO()
    mx.export_to_dot(text, *mx.compile(run)(*arguments))
    nodes = dict(re.findall(r'(\d+) \[label ="(\w+)"', text.getvalue()))
    makers, readers = (dict(re.findall(pattern, text.getvalue())) for pattern in (r'(\d+) -> "(\w+)"', r'"(\w+)" -> (\d+)'))
    copies = [n for n, label in nodes.items() if label == "Transpose" and nodes.get(readers.get(makers[n], "")) == "Reshape"]
    assert len(copies) == 5
    check_both(case)


# ---- operands turned for Hopper's tensor cores ---------------------------------------------------------------------------------------

ACROSS = dims(((0,), (0,)))
DEEP = dims(((0, 1), (0, 1)))  # of activations (batch, position, feature)
TURNED = [
    ("the smaller, left", ACROSS, (4096, 768), (4096, 2304), "lhs"),
    ("the smaller, right", ACROSS, (4096, 2304), (4096, 768), "rhs"),
    ("two dimensions summed", DEEP, (8, 512, 768), (8, 512, 3072), "lhs"),
    ("an unembedding", DEEP, (8, 512, 50304), (8, 512, 768), "rhs"),
    ("two free dimensions", ACROSS, (4096, 24, 32), (4096, 2304), "lhs"),
    ("one of a batch of one", dims(((1,), (1,)), ((0,), (0,))), (1, 4096, 768), (1, 4096, 2304), "lhs"),
    ("too small", ACROSS, (128, 784), (128, 1024), None),
    ("a copy would take as long", ACROSS, (4096, 768), (4096, 64), None),
    ("a layer forward", MATMUL, (4096, 768), (768, 2304), None),
    ("its operand's gradient", dims(((1,), (1,))), (4096, 2304), (768, 2304), None),
    ("a left operand that lies across alone", dims(((0,), (1,))), (4096, 768), (2304, 4096), None),
    ("a batch", dims(((1,), (1,)), ((0,), (0,))), (2, 4096, 768), (2, 4096, 2304), None),
    ("a vector", ACROSS, (4096,), (4096, 2304), None),
]


@pytest.mark.parametrize(("product", "left", "right", "side"), [t[1:] for t in TURNED], ids=[t[0] for t in TURNED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_which_operand_is_turned(product, left, right, side, dtype, monkeypatch) -> None:
    """The smaller, of a large float32 product to which neither brings its sums' elements side by side."""
    chosen = [] if dtype == "float32" else [None]
    turned = dot._turned
    monkeypatch.setattr(dot, "multiplies_along_rows", lambda: True)
    monkeypatch.setattr(dot, "_turned", lambda *a: chosen.append(turned(*a)))
    lower_steps(plan_of(Case("turned", product, [jax.ShapeDtypeStruct(s, dtype) for s in (left, right)])).steps)
    assert chosen == [side if dtype == "float32" else None]


def test_precise_products_are_not_turned(monkeypatch) -> None:
    monkeypatch.setattr(dot, "multiplies_along_rows", lambda: True)
    monkeypatch.setattr(dot, "_turned", lambda *a: pytest.fail("asked"))
    lower_steps(plan_of(Case("precise", dims(((0,), (0,)), precision=lax.Precision.HIGHEST), (normal(8, 5), normal(8, 3)))).steps)


@pytest.mark.parametrize(
    ("product", "left", "right", "side"),
    [
        (ACROSS, (37, 5), (37, 9), 0),
        (ACROSS, (37, 9), (37, 5), 1),
        (DEEP, (3, 7, 5), (3, 7, 8), 0),
        (DEEP, (3, 7, 8), (3, 7, 5), 1),
        (ACROSS, (37, 2, 3), (37, 4), 1),
    ],
)
def test_turned_products(product, left, right, side, monkeypatch) -> None:
    """Right whichever is turned, exported or not; the one chosen reaches the product row by row where its sums lie along its rows."""
    monkeypatch.setattr(dot, "multiplies_along_rows", lambda: True)
    monkeypatch.setattr(dot, "_GAINED", 1.0)
    case = Case("turned", product, (normal(*left), normal(*right)), **TOLERANCE)
    check(case)
    check_both(case)
    reached = []
    monkeypatch.setattr(dot, "product", lambda a, b, *rest, **how: reached.append((a, mx.swapaxes(b, -1, -2))) or products.product(a, b, *rest, **how))
    _, run, arguments = lowered(case)
    mx.eval(run(*arguments), reached)
    assert [memoryview(x).c_contiguous for x in reached[0]] == [side == 0, side == 1]


@pytest.mark.parametrize(
    ("kind", "architecture", "tf32", "along"),
    [
        ("cuda", "sm_90a", "1", True),
        ("cuda", "sm_90", "1", True),
        ("cuda", "sm_90a", "0", False),
        ("cuda", "sm_80", "1", False),
        ("cuda", "sm_100", "1", False),
        ("cpu", "x86_64", "1", False),
        ("metal", "applegpu_g13s", "1", False),
    ],
)
def test_where_products_go_along_rows(kind, architecture, tf32, along, monkeypatch) -> None:
    monkeypatch.setattr(target, "device_kind", lambda: kind)
    monkeypatch.setattr(target, "device", lambda: SimpleNamespace(architecture=architecture))
    monkeypatch.setattr(target, "tf32", lambda: tf32)
    assert target.multiplies_along_rows() is along
