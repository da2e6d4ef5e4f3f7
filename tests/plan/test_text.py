"""What is printed is read back as the same steps, and means the same to XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxlib import _jax
from jaxlib.mlir.dialects import stablehlo

from jax_mps.host.xla import host_function
from jax_mps.plan import build
from jax_mps.plan.text import _DROPPED, constant_text, module_text
from jax_mps.plan.types import Plan, Region, Step, TensorType, Value, numpy_dtype


def plan_of(f: Any, *args: Any) -> Plan:
    """The plan of a JAX function's program for cpu, or of a module's text."""
    text = f if isinstance(f, str) else str(jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).compiler_ir("stablehlo"))
    return build.build(build.parse(_jax.mlir.serialize_portable_artifact(text, stablehlo.get_current_version())))


def text_of(plan: Plan) -> str:
    return module_text(plan.arguments, plan.steps, plan.results)


def assert_same_value(ours: Any, theirs: Any) -> None:
    if isinstance(ours, np.ndarray):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())
    elif isinstance(ours, tuple):
        for a, b in zip(ours, theirs, strict=True):
            assert_same_value(a, b)
    else:
        assert ours == theirs


def assert_same_region(ours: Region, theirs: Region, names: dict[Value, Value]) -> None:
    """Both regions are the same up to the identity of values."""
    assert [v.type for v in ours.arguments] == [v.type for v in theirs.arguments]
    names.update(zip(ours.arguments, theirs.arguments, strict=True))
    for a, b in zip(ours.steps, theirs.steps, strict=True):
        assert (a.name, [names[v] for v in a.operands], [v.type for v in a.results]) == (
            b.name,
            list(b.operands),
            [v.type for v in b.results],
        )
        kept = {n for n in a.attributes if not _DROPPED.match(n)}
        assert kept == b.attributes.keys()
        for name in kept:
            assert_same_value(a.attributes[name], b.attributes[name])
        for mine, other in zip(a.regions, b.regions, strict=True):
            assert_same_region(mine, other, names)
        names.update(zip(a.results, b.results, strict=True))
    assert [names[v] for v in ours.results] == list(theirs.results)


def scan_with_captures(x: Any, y: Any) -> Any:
    return jax.lax.scan(lambda c, a: (c * y[0] + a, jax.lax.cond(c > 0, lambda: a, lambda: y[1])), x[0], x)


F32 = np.float32([1, -2, 3, 0.5])
PROGRAMS: dict[str, tuple[Any, ...]] = {
    "elementwise": (lambda x: jnp.sin(x) + 1, F32),
    "dot": (lambda x: jnp.einsum("ij,kj->ik", x, x), F32.reshape(2, 2)),
    "convolution": (
        lambda x: jax.lax.conv_general_dilated(x.reshape(1, 1, 2, 2), jnp.ones((1, 1, 2, 1)), (2, 1), "SAME", rhs_dilation=(1, 2)),
        F32,
    ),
    "gather and scatter": (lambda x, i: (x[i], x.at[i].add(1.0), x.at[i].set(2.0, mode="drop")), F32, np.int32([3, 9])),
    "nested control flow with captures": (scan_with_captures, F32, F32),
    "sort, reduce, windows": (lambda x: (jnp.sort(x), jnp.argmax(x), jnp.cumsum(x), jax.lax.top_k(x, 2)), F32),
    "random bits": (lambda: jax.random.normal(jax.random.key(3), (5,)),),
    "rng_bit_generator": (lambda: jax.lax.rng_bit_generator(np.arange(4, dtype=np.uint32), (3,)),),
    "fft": (lambda x: jnp.fft.fft(x), F32),
    "lapack": (lambda x: jnp.linalg.eigh(x @ x.T), F32.reshape(2, 2)),
    "ordered effects": (lambda x: jax.lax.optimization_barrier((x, x + 1)), F32),
    "nothing": (lambda x: x, F32),
    "no results": (lambda x: (), F32),
    "empty": (lambda x: jnp.concatenate([x, x], 1), np.zeros((0, 3), np.float32)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_read_back(name: str) -> None:
    """print → parse → build gives the same plan, whose text is the same again."""
    plan = plan_of(*PROGRAMS[name])
    text = text_of(plan)
    again = build.build(build.parse(text.encode()))
    assert_same_region(plan.body, again.body, {})
    assert text_of(again) == text


BITS = {
    "bool": [0, 1, 1], "int8": [0, 255, 128], "uint8": [0, 255, 128], "int4": [15, 8, 7], "uint4": [15, 8, 7], "int2": [3, 2, 1], "uint2": [3, 2, 1],
    "float16": [0x7E01, 0x8000, 0xFC00], "bfloat16": [0x7FC1, 0x8000, 0xFF80], "float32": [0x7FC00001, 0x80000000, 1],
    "float64": [0x7FF8000000000001, 1 << 63, 1], "int64": [1 << 63, 2, 3], "uint64": [1 << 63, 2, 3], "int32": [1 << 31, 2, 3],
    "uint32": [1 << 31, 2, 3], "int16": [1 << 15, 2, 3], "uint16": [1 << 15, 2, 3],
    "float4_e2m1fn": [15, 8, 7], "float6_e2m3fn": [63, 32, 1], "float6_e3m2fn": [63, 32, 1],
    **{n: [0x7F, 0x80, 0xFF] for n in dir(ml_dtypes) if n.startswith("float8_")},
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1), (1,), (), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [*BITS, "complex64", "complex128"])
def test_constants_keep_every_bit(dtype: str, shape: tuple[int, ...]) -> None:
    """NaN payloads, signs of zero and denormals included."""
    if dtype.startswith("complex"):
        half = {"complex64": "float32", "complex128": "float64"}[dtype]
        flat = np.array([BITS[half], BITS[half][::-1]], f"uint{4 * numpy_dtype(dtype).itemsize}").T.copy().view(dtype).reshape(-1)
    else:
        flat = np.array(BITS[dtype], f"uint{8 * numpy_dtype(dtype).itemsize}").view(numpy_dtype(dtype))
    value = np.resize(flat, shape) if shape else flat[0].reshape(())
    assert_read_back(value, dtype)


@pytest.mark.parametrize("dtype", ["bool", "float32", "bfloat16", "int4", "complex64"])
def test_splats_stay_splats(dtype: str) -> None:
    """A broadcast view of one element is printed as that element, and read as such a view."""
    value = np.broadcast_to(np.ones((), numpy_dtype(dtype)), (1000, 1, 1000))
    assert len(constant_text(value, dtype)) < 80
    assert assert_read_back(value, dtype).strides == (0, 0, 0)


def test_a_transposed_constant_is_printed_row_major() -> None:
    """Strides other than a splat's do not reach the text."""
    assert_read_back(np.arange(6, dtype=np.int32).reshape(2, 3).T, "int32")


def assert_read_back(value: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    result = Value(TensorType(value.shape, dtype))
    text = module_text([], [Step("stablehlo.constant", (), (result,), {"value": value}, text=())], [result])
    [step] = build.build(build.parse(text.encode())).steps
    assert_same_value(step.value, value)
    read: np.ndarray[Any, Any] = step.value
    return read


def test_tokens_stay_inside() -> None:
    """A token among the inputs is made inside, one among the outputs is left out: jaxlib 0.10 takes none."""
    text = """func.func public @main(%t: !stablehlo.token, %x: tensor<2xf32>) -> (!stablehlo.token, tensor<2xf32>) {
      %u = "stablehlo.after_all"(%t, %t) : (!stablehlo.token, !stablehlo.token) -> !stablehlo.token
      func.return %u, %x : !stablehlo.token, tensor<2xf32> }"""
    plan = plan_of(text)
    again = build.build(build.parse(text_of(plan).encode()))
    assert [v.dtype for v in again.arguments] == ["float32"]
    assert [v.dtype for v in again.results] == ["float32"]
    assert [s.name for s in again.steps] == ["stablehlo.create_token", "stablehlo.after_all"]


def test_custom_calls_are_verbatim() -> None:
    """Layouts, aliases, dictionaries and discardable attributes of a custom call come through as they were written."""
    text = """func.func public @main(%x: tensor<2x3xf32>) -> tensor<2x3xf32> {
      %0 = "stablehlo.custom_call"(%x) {api_version = 4 : i32, call_target_name = "foo", has_side_effect = true,
        backend_config = {mode = 78 : ui8, text = "a\\22b"}, operand_layouts = [dense<[0, 1]> : tensor<2xindex>],
        result_layouts = [dense<[0, 1]> : tensor<2xindex>],
        output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []>],
        mhlo.attributes = {k = 2 : i64}, "odd name" = unit} : (tensor<2x3xf32>) -> tensor<2x3xf32>
      func.return %0 : tensor<2x3xf32> }"""
    plan = build.build(build.parse(text.encode()))
    again = build.build(build.parse(text_of(plan).encode()))
    assert sorted(again.steps[0].text or ()) == sorted(plan.steps[0].text or ())


def test_a_claimed_composite_is_printed_as_its_op() -> None:
    """What a lowering claimed whole can still go to the host."""
    lowered = jax.jit(lambda x: jax.lax.top_k(x, 2)).trace(F32).lower(lowering_platforms=("cpu",))
    plan = build.build(build.parse(str(lowered.compiler_ir("stablehlo")).encode()), claims=lambda step: True)
    assert [s.name for s in plan.steps] == ["chlo.top_k"]
    assert '"chlo.top_k"(%0) {' in text_of(plan)


X = Value(TensorType((2,), "float32"))
Y = Value(TensorType((2,), "float32"))


@pytest.mark.parametrize(
    ("step", "fact"),
    [
        (Step("stablehlo.add", (X, X), (Y,)), "made by a rewrite"),
        (Step("stablehlo.add", (X, Y), (Value(X.type),), text=()), "neither an input nor computed"),
        (
            Step("stablehlo.custom_call", (X,), (Y,), {"call_target_name": "f"}, text=(("called_computations", "[@g]"),)),
            "functions of its module",
        ),
    ],
    ids=["rewrite", "unknown value", "called computation"],
)
def test_what_cannot_be_printed(step: Step, fact: str) -> None:
    """A refusal says which step it is."""
    with pytest.raises(ValueError, match=fact):
        module_text([X], [step], [])


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_the_same_on_xla(name: str) -> None:
    """What is printed computes what JAX's cpu backend computes."""
    f, *args = PROGRAMS[name]
    plan = plan_of(f, *args)
    got = host_function(plan.arguments, plan.steps, plan.results)(args[: len(plan.arguments)])  # JAX drops what is not read
    with jax.default_device(jax.devices("cpu")[0]):
        want = [np.asarray(a) for a in jax.tree.leaves(jax.jit(f)(*args))]
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


SHARDED = """module { sdy.mesh @mesh = <["a"=1]>
  func.func public @main(%x: tensor<2xf32>) -> tensor<2xf32> {
    %0 = "stablehlo.custom_call"(%x) {call_target_name = "xla.sdy.FuncResultSharding", mhlo.sharding = "{replicated}"} : (tensor<2xf32>) -> tensor<2xf32>
    %1 = "stablehlo.sine"(%0) {sdy.sharding = #sdy.sharding_per_value<[<@mesh, [{"a"}]>]>,
      mhlo.frontend_attributes = {a = "b"}} : (tensor<2xf32>) -> tensor<2xf32>
    func.return %1 : tensor<2xf32> } }"""


def test_shardings_are_left_out() -> None:
    """They name a mesh that a part of the module does not hold, and XLA aborts the process on a stray one."""
    plan = build.build(build.parse(SHARDED.encode()))
    again = build.build(build.parse(text_of(plan).encode()))
    assert [(s.name, s.text) for s in again.steps] == [("stablehlo.sine", ())]
