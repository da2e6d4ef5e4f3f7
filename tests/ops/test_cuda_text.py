"""CUDA's text of elementwise steps, compiled for the CPU: what it gives against the lowering to MLX, and against float64 where that is exact."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, plan_of
from ops.kernels import NUMBERS, library, needs_compiler

from jax_mps.ops import cuda_text
from jax_mps.ops.dtypes import mx_array
from jax_mps.ops.registry import lower_steps
from jax_mps.plan.types import Step, numpy_dtype

FLOATS = np.array(
    [
        0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        1,
        -1,
        3.7,
        -3.7,
        1e-3,
        100.25,
        -77,
        300,
        -300,
        70000,
        2**31,
        -(2.0**31),
        3e9,
        1e30,
        -1e30,
        1e-30,
        np.inf,
        -np.inf,
        np.nan,
    ],
    np.float32,
)
WORDS = np.array([0, 1, 2, 3, 5, 100, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)

UNARY = {
    "abs": jnp.abs, "sign": jnp.sign, "negate": jnp.negative, "floor": jnp.floor, "ceil": jnp.ceil, "even": lambda x: lax.round(x, lax.RoundingMethod(1)),
    "away": lambda x: lax.round(x, lax.RoundingMethod(0)), "finite": jnp.isfinite, "sqrt": jnp.sqrt, "rsqrt": lax.rsqrt, "cbrt": jnp.cbrt, "exp": jnp.exp,
    "expm1": jnp.expm1, "log": jnp.log, "log1p": jnp.log1p, "sin": jnp.sin, "cos": jnp.cos, "tanh": jnp.tanh, "logistic": lax.logistic, "erf": lax.erf,
    "square": jnp.square, "reduced": lambda x: lax.reduce_precision(x, 8, 7),
}  # fmt: skip
BINARY = {
    "add": jnp.add, "subtract": jnp.subtract, "multiply": jnp.multiply, "divide": lax.div, "maximum": jnp.maximum, "minimum": jnp.minimum, "power": lax.pow,
    "atan2": lax.atan2, "remainder": lax.rem, "select": lambda x, y: jnp.where(x < y, x, y), "clamp": lambda x, y: lax.clamp(x, y, lax.full_like(x, 2)),
    "eq": lax.eq, "ne": lax.ne, "lt": lax.lt, "le": lax.le, "gt": lax.gt, "ge": lax.ge,
}  # fmt: skip
BITWISE = {"and": lax.bitwise_and, "or": lax.bitwise_or, "xor": lax.bitwise_xor}
INTEGER = {k: BINARY[k] for k in ("add", "subtract", "multiply", "maximum", "minimum", "select", "clamp", "eq", "ne", "lt", "le", "gt", "ge")} | BITWISE
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def arrays(dtype: str, count: int):
    if dtype == "bool":
        values = np.array([False, True] * 8)
    elif dtype.startswith(("int", "uint")):
        values = WORDS.astype(dtype)
    else:
        with np.errstate(over="ignore"):
            values = FLOATS.astype(numpy_dtype(dtype))
    return np.meshgrid(*[values] * count, indexing="ij") if count > 1 else [values]


def cases():
    for dtype in ("float32", "float16", "bfloat16"):
        yield from ((f"{name} {dtype}", f, arrays(dtype, 1)) for name, f in UNARY.items() if name != "reduced" or dtype == "float32")
        yield from ((f"{name} {dtype}", f, arrays(dtype, 2)) for name, f in BINARY.items())
    for dtype in INTEGERS:
        yield from ((f"{name} {dtype}", f, arrays(dtype, 2)) for name, f in INTEGER.items())
        yield from ((f"{name} {dtype}", f, arrays(dtype, 1)) for name, f in {"negate": jnp.negative, "not": lax.bitwise_not}.items())
    yield from ((f"{name} bool", f, arrays("bool", 2)) for name, f in BITWISE.items())
    yield "not bool", lax.bitwise_not, arrays("bool", 1)
    for source in ("bool", "float32", "float16", "bfloat16", *INTEGERS):
        for target in ("bool", "float32", "float16", "bfloat16", *INTEGERS):
            if source != target:
                yield f"{source} to {target}", functools.partial(lambda t, x: lax.convert_element_type(x, numpy_dtype(t)), target), arrays(source, 1)


WITHOUT = {f"{a} to {b}" for a in ("int32", "uint32", "int64", "uint64") for b in ("float16", "bfloat16")}


def text_of(steps: tuple[Step, ...], results, function: str, arguments) -> str | None:
    """A C++ function that applies a plan's steps to every element of its arguments."""
    names = {v: f"a{i}" for i, v in enumerate(arguments)}
    lines = []
    for step in steps:
        result = step.results[0]
        if step.name == "stablehlo.constant":
            text = cuda_text.constant(result.dtype, step.value.reshape(-1)[0])
        elif step.name == "stablehlo.broadcast_in_dim":
            text = names[step.operands[0]]
        else:
            text = cuda_text.expression(step, [names[v] for v in step.operands])
        if text is None:
            return None
        names[result] = f"t{result.number}"
        lines.append(f"{cuda_text.REGISTER[result.dtype]} t{result.number} = {text};")
    (out,) = results
    reads = [f"{cuda_text.REGISTER[v.dtype]} a{i} = {cuda_text.load(v.dtype, f'p{i}[i]')};" for i, v in enumerate(arguments)]
    parameters = [f"const {cuda_text.MEMORY[v.dtype]}* p{i}" for i, v in enumerate(arguments)] + [f"{cuda_text.MEMORY[out.dtype]}* out"]
    body = " ".join([*reads, *lines, f"out[i] = {cuda_text.store(out.dtype, names[out])};"])
    return f'extern "C" void {function}(size_t n, {", ".join(parameters)}) {{ for (size_t i = 0; i < n; i++) {{ {body} }} }}'


@pytest.fixture(scope="module")
def compiled():
    """One library for all cases: by name its function and the plan."""
    needs_compiler()
    functions, plans = [], {}
    for i, (name, f, args) in enumerate(cases()):
        with jax.enable_x64(True):
            plan = plan_of(Case(name, f, args))
        text = text_of(plan.steps, plan.results, f"f{i}", plan.arguments)
        assert (text is None) == (name in WITHOUT), name
        if text is not None:
            functions.append(text)
            plans[name] = (f"f{i}", plan, args)
    loaded = library("\n".join([NUMBERS, cuda_text.HEADER, *functions]), "-O1", "-ffp-contract=off")
    return {name: (getattr(loaded, function), plan, args) for name, (function, plan, args) in plans.items()}


def ran(function, plan, args):
    result = plan.results[0]
    out = np.empty(args[0].shape, numpy_dtype(result.dtype))
    held = [np.ascontiguousarray(a) for a in args]
    function(ctypes.c_size_t(out.size), *(ctypes.c_void_p(a.ctypes.data) for a in (*held, out)))
    return out


def by_mlx(plan, args):
    env = dict(zip(plan.arguments, (mx_array(a, v.dtype) for a, v in zip(args, plan.arguments, strict=True)), strict=True))
    for step in lower_steps(plan.steps):
        step(env)
    result = env[plan.results[0]]
    if result.dtype == mx.bfloat16:
        return np.array(result.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(result)


def test_all_agree_with_the_lowering(compiled):
    """To a few ulps of the functions, exactly for everything else; float16's subnormals and what overflows in it are rounded in one step here."""
    exact = {
        "abs",
        "sign",
        "negate",
        "floor",
        "ceil",
        "even",
        "away",
        "finite",
        "square",
        "reduced",
        "add",
        "subtract",
        "multiply",
        "maximum",
        "minimum",
        "select",
        "clamp",
    }
    bad = []
    for name, (function, plan, args) in compiled.items():
        with np.errstate(all="ignore"):
            got, want = ran(function, plan, args), by_mlx(plan, args)
        kind = name.split()[0]
        if got.dtype.kind in "biu" or kind in exact or " to " in name:
            same = np.array_equal(got.astype(np.float64), want.astype(np.float64), equal_nan=True) if got.dtype.kind not in "iu" else np.array_equal(got, want)
        else:
            eps = float(ml_dtypes.finfo(got.dtype).eps)
            limit = 16 * eps if got.dtype == np.float32 else 2 * eps
            with np.errstate(all="ignore"):
                same = np.allclose(got.astype(np.float64), want.astype(np.float64), rtol=limit, atol=1e-37, equal_nan=True)
        if not same:
            bad.append((name, got.ravel(), want.ravel()))
    for name, got, want in bad:
        differs = ~((got == want) | ((got != got) & (want != want)))
        print(name, got[differs][:6], want[differs][:6])
    assert not [name for name, *_ in bad]


def test_literals():
    assert cuda_text.constant("float32", 0.1) == "(0x1.99999a0000000p-4f)"
    assert cuda_text.constant("float32", -0.0) == "(-0x0.0p+0f)"
    assert cuda_text.constant("float16", -np.inf) == "__int_as_float(0xff800000)"
    assert cuda_text.constant("int64", -(2**63)) == "(-9223372036854775807ll - 1)"
    assert cuda_text.constant("uint8", 255) == "((uint8_t)255ull)"
