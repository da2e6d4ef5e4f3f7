"""StableHLO to plans: attributes with their defaults, constants of every kind, calls, composites, tuples, canonical form."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_mps.errors import InvalidProgram
from jax_mps.plan import build
from jax_mps.plan.types import Plan, TensorType


def plan_of(body: str, signature: str = "(%a: tensor<4xf32>) -> tensor<4xf32>", rest: str = "") -> Plan:
    return build.build(build.parse(f"module @m {{ func.func public @main{signature} {{ {body} }} {rest} }}".encode()))


def constant(text: str) -> np.ndarray[Any, Any]:
    kind = text.rsplit(" : ", 1)[1]
    plan = plan_of(f"%0 = stablehlo.constant {text} return %0 : {kind}", f"() -> {kind}")
    return plan.steps[0].value


CONSTANTS: dict[str, tuple[str, np.ndarray[Any, Any]]] = {
    "bool": ("dense<[true, false, true]> : tensor<3xi1>", np.array([True, False, True])),
    "bool splat": ("dense<true> : tensor<3xi1>", np.array([True] * 3)),
    "nine bools": ("dense<[true, false, true, true, false, false, false, true, true]> : tensor<9xi1>", np.array([1, 0, 1, 1, 0, 0, 0, 1, 1], bool)),
    "int64 limits": ("dense<[-9223372036854775808, 9223372036854775807]> : tensor<2xi64>", np.array([-(2**63), 2**63 - 1])),
    "uint64 limit": ("dense<18446744073709551615> : tensor<ui64>", np.array(2**64 - 1, np.uint64)),
    "int4": ("dense<[1, -2, 3]> : tensor<3xi4>", np.array([1, -2, 3], ml_dtypes.int4)),
    "uint2 splat": ("dense<3> : tensor<5xui2>", np.array([3] * 5, ml_dtypes.uint2)),
    "bfloat16": ("dense<[1.0, -2.5]> : tensor<2xbf16>", np.array([1, -2.5], ml_dtypes.bfloat16)),
    "bfloat16 infinity splat": ("dense<0xFF80> : tensor<2xbf16>", np.array([-np.inf] * 2, ml_dtypes.bfloat16)),
    "float16": ("dense<[1.0, 65504.0]> : tensor<2xf16>", np.array([1, 65504], np.float16)),
    "float32 infinity": ("dense<[0x7F800000, 1.0]> : tensor<2xf32>", np.array([np.inf, 1], np.float32)),
    "small float32": ("dense<1.40129846E-45> : tensor<f32>", np.array(1.40129846e-45, np.float32)),
    "float8": ("dense<[1.0, -2.0, 3.0]> : tensor<3xf8E4M3FN>", np.array([1, -2, 3], ml_dtypes.float8_e4m3fn)),
    "complex64": ("dense<[(1.0, 2.0), (3.0, -4.0)]> : tensor<2xcomplex<f32>>", np.array([1 + 2j, 3 - 4j], np.complex64)),
    "complex128 splat": ("dense<(1.0, 2.0)> : tensor<3x2xcomplex<f64>>", np.full((3, 2), 1 + 2j)),
    "empty": ("dense<> : tensor<0x3xf32>", np.zeros((0, 3), np.float32)),
    "hex": ('dense<"0x01000180"> : tensor<4xi8>', np.array([1, 0, 1, -128], np.int8)),
    "nested": ("dense<[[1, 2], [3, 4]]> : tensor<2x2xui8>", np.array([[1, 2], [3, 4]], np.uint8)),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name: str) -> None:
    text, want = CONSTANTS[name]
    got = constant(text)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got.astype(want.dtype), want)


def test_a_large_splat_is_one_element() -> None:
    """A splat costs no memory of its size."""
    assert constant("dense<0.0> : tensor<1000000xf32>").strides == (0,)


@pytest.mark.parametrize("dtype", ["bf16", "complex<f32>", "i1", "i4", "f8E5M2", "f32", "ui16"])
def test_large_constants_round_trip(dtype: str) -> None:
    """More than 100 elements: MLIR prints them as hex."""
    values = [i % 2 for i in range(300)]
    forms = {"i1": ("false", "true"), "complex<f32>": ("(0.0, 0.0)", "(1.0, 0.0)"), "i4": ("0", "1"), "ui16": ("0", "1")}
    listed = ", ".join(forms.get(dtype, ("0.0", "1.0"))[v] for v in values)
    np.testing.assert_array_equal(constant(f"dense<[{listed}]> : tensor<300x{dtype}>").astype(np.complex64), np.array(values, np.complex64))


def test_defaults_are_filled_in() -> None:
    """An attribute that the module leaves out has the spec's default."""
    plan = plan_of(
        "%0 = stablehlo.convolution(%a, %k) dim_numbers = [b, 0, f]x[0, i, o]->[b, 0, f], window = {}"
        " {batch_group_count = 1 : i64, feature_group_count = 1 : i64} : (tensor<1x8x2xf32>, tensor<3x2x5xf32>) -> tensor<1x6x5xf32>"
        " return %0 : tensor<1x6x5xf32>",
        "(%a: tensor<1x8x2xf32>, %k: tensor<3x2x5xf32>) -> tensor<1x6x5xf32>",
    )
    (step,) = plan.steps
    assert (step.window_strides, step.lhs_dilation, step.rhs_dilation, step.window_reversal) == ((1,), (1,), (1,), (False,))
    np.testing.assert_array_equal(step.padding, [[0, 0]])
    assert (step.input_spatial_dimensions, step.kernel_output_feature_dimension) == ((1,), 2)


def test_an_unknown_attribute_is_an_error() -> None:
    plan = plan_of("%0 = stablehlo.sine %a : tensor<4xf32> return %0 : tensor<4xf32>")
    with pytest.raises(AttributeError, match=r"stablehlo\.sine has no attribute 'axis'"):
        _ = plan.steps[0].axis


def test_calls_are_inlined_each_time() -> None:
    plan = plan_of(
        "%0 = call @f(%a) : (tensor<4xf32>) -> tensor<4xf32> %1 = call @f(%0) : (tensor<4xf32>) -> tensor<4xf32> return %1 : tensor<4xf32>",
        rest="func.func private @f(%x: tensor<4xf32>) -> tensor<4xf32> { %0 = stablehlo.sine %x : tensor<4xf32> return %0 : tensor<4xf32> }",
    )
    assert [s.name for s in plan.steps] == ["stablehlo.sine"] * 2
    assert plan.steps[1].operands == plan.steps[0].results


def test_captures_of_a_region() -> None:
    plan = plan_of(
        """%n = stablehlo.constant dense<3> : tensor<i32>
        %i = stablehlo.constant dense<0> : tensor<i32>
        %r:2 = stablehlo.while(%c = %i, %x = %a) : tensor<i32>, tensor<4xf32>
        cond { %p = stablehlo.compare LT, %c, %n : (tensor<i32>, tensor<i32>) -> tensor<i1> stablehlo.return %p : tensor<i1> }
        do { %y = stablehlo.add %x, %a : tensor<4xf32> stablehlo.return %c, %y : tensor<i32>, tensor<4xf32> }
        return %r#1 : tensor<4xf32>"""
    )
    loop = plan.steps[-1]
    assert loop.regions[0].captures() == plan.steps[0].results
    assert loop.regions[1].captures() == plan.arguments


def test_tuples_are_spread() -> None:
    plan = plan_of(
        "%t = stablehlo.tuple %a, %a : tuple<tensor<4xf32>, tensor<4xf32>>"
        " %0 = stablehlo.get_tuple_element %t[1] : (tuple<tensor<4xf32>, tensor<4xf32>>) -> tensor<4xf32> return %0 : tensor<4xf32>"
    )
    assert plan.steps == ()
    assert plan.results == plan.arguments


def test_donated_arguments() -> None:
    plan = plan_of(
        "return %a, %b : tensor<4xf32>, tensor<4xf32>",
        "(%a: tensor<4xf32>, %b: tensor<4xf32> {tf.aliasing_output = 0 : i32}) -> (tensor<4xf32>, tensor<4xf32>)",
    )
    assert plan.donated == (1,)


SINE = 'module @{name} {{ func.func public @main(%a: tensor<4xf32>) -> (tensor<4xf32> {{jax.result_info = "{info}"}}) {{\n'
SINE += "%0 = call @{inner}(%a) : (tensor<4xf32>) -> tensor<4xf32> return %0 : tensor<4xf32> }}\n"
SINE += "func.func private @{inner}(%x: tensor<4xf32>) -> tensor<4xf32> {{ %0 = stablehlo.sine %x : tensor<4xf32> return %0 : tensor<4xf32> }} }}"


def canonical(name: str = "jit_f", inner: str = "g", info: str = "result", text: str = SINE) -> bytes:
    return build.canonical(build.parse(text.format(name=name, inner=inner, info=info).encode()))


def test_canonical_form_ignores_names_and_places() -> None:
    """Module and function names, results' names and source lines are no part of a program."""
    assert canonical() == canonical(name="jit_other", inner="another_name", info="result['loss']")
    assert canonical() == canonical(text="\n\n\n" + SINE)


def test_canonical_form_keeps_the_meaning() -> None:
    assert canonical() != canonical(text=SINE.replace("sine", "cosine"))
    assert canonical() != canonical(text=SINE.replace("%a: tensor<4xf32>)", "%a: tensor<4xf32> {{tf.aliasing_output = 0 : i32}})"))


def test_the_module_keeps_its_own_name() -> None:
    module = build.parse(SINE.format(name="jit_f", inner="g", info="x").encode())
    build.canonical(module)
    assert build.module_name(module) == "jit_f"


@pytest.mark.parametrize("code", [b"", b"not a program", b"ML\xefR", b"ML\xefR\x0dStableHLO_v1.0.0\x00junk", b"module {"])
def test_bytes_that_are_no_program(code: bytes) -> None:
    with pytest.raises(InvalidProgram):
        build.build(build.parse(code))


def test_a_dynamic_shape_is_named() -> None:
    with pytest.raises(InvalidProgram, match=r"tensor<\?xf32>"):
        plan_of("%0 = stablehlo.sine %a : tensor<?xf32> return %0 : tensor<?xf32>", "(%a: tensor<?xf32>) -> tensor<?xf32>")


def test_types_print_as_mlir_has_them() -> None:
    assert str(TensorType((2, 3), "complex64")) == "tensor<2x3xcomplex<f32>>"
    assert str(TensorType((), "token")) == "!stablehlo.token"


@pytest.mark.parametrize(("row", "turned"), [("%i", 2), ("%r", 0)], ids=["forgotten", "kept"])
def test_reversed_scans(row: str, turned: int) -> None:
    """A decomposition of chlo.scan that forgets `is_reverse`, as jaxlib 0.10's does, is turned around; a later one's is not."""
    kinds = "tensor<i64>, tensor<4xf32>"
    scan = f"""func.func private @scan(%a: tensor<4xf32>) -> tensor<4xf32> {{
        %zero = stablehlo.constant dense<0> : tensor<i64>
        %one = stablehlo.constant dense<1> : tensor<i64>
        %last = stablehlo.constant dense<3> : tensor<i64>
        %0:2 = stablehlo.while(%i = %zero, %x = %a) : {kinds}
        cond {{
            %c = stablehlo.compare LE, %i, %last : (tensor<i64>, tensor<i64>) -> tensor<i1>
            stablehlo.return %c : tensor<i1>
        }} do {{
            %r = stablehlo.subtract %last, %i : tensor<i64>
            %v = stablehlo.dynamic_slice %a, {row}, sizes = [1] : (tensor<4xf32>, tensor<i64>) -> tensor<1xf32>
            %y = stablehlo.dynamic_update_slice %x, %v, {row} : (tensor<4xf32>, tensor<1xf32>, tensor<i64>) -> tensor<4xf32>
            %j = stablehlo.add %i, %one : tensor<i64>
            stablehlo.return %j, %y : {kinds}
        }}
        return %0#1 : tensor<4xf32>
    }}"""
    named = "dimension = 0 : i64, is_reverse = true, operandSegmentSizes = array<i32: 1, 0>, resultSegmentSizes = array<i32: 1, 0>"
    call = f'stablehlo.composite "chlo.scan" %a {{composite_attributes = {{{named}}}, decomposition = @scan}} : (tensor<4xf32>) -> tensor<4xf32>'
    plan = plan_of(f"%0 = {call} return %0 : tensor<4xf32>", rest=scan)
    assert [s.name for s in plan.steps].count("stablehlo.reverse") == turned
