"""JAX's random numbers: bit for bit those of XLA, from one step for each draw."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from rewrites.proof import fused, prove, refuse

from jax_mps.ops import threefry
from jax_mps.rewrites import rewrite

KEY = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
KEYS = np.arange(8, dtype=np.uint32).reshape(4, 2) * np.uint32(0x01234567)
BITS = ["threefry_bits"]


def draws(f, keys=KEY):
    return lambda k: f(jax.random.wrap_key_data(k, impl="threefry2x32")), (keys,)


@pytest.mark.parametrize(
    ("f", "names"),
    [
        (lambda k: jax.random.bits(k), BITS),
        (lambda k: jax.random.bits(k, (1,)), BITS),
        (lambda k: jax.random.bits(k, (3, 1, 5)), BITS),
        (lambda k: jax.random.bits(k, (7,), "uint8"), BITS),
        (lambda k: jax.random.bits(k, (7, 2), "uint16"), BITS),
        (lambda k: jax.random.uniform(k, (3, 5)), [*BITS, "unit"]),
        (lambda k: jax.random.uniform(k, (64,), jnp.bfloat16), [*BITS, "unit"]),
        (lambda k: jax.random.uniform(k, (64,), jnp.float16), [*BITS, "unit"]),
        (lambda k: jax.random.uniform(k, (33,), minval=-3, maxval=5), [*BITS, "unit"]),
        (lambda k: jax.random.bernoulli(k, 0.3, (33,)), [*BITS, "unit"]),
        (lambda k: jax.random.key_data(jax.random.split(k)), ["threefry_counted"]),
        (lambda k: jax.random.key_data(jax.random.split(k, (2, 3))), ["threefry_counted"]),
        (lambda k: jax.random.key_data(jax.random.fold_in(k, 3)), ["threefry2x32"]),
        (lambda k: jax.random.randint(k, (33,), -5, 7), ["threefry_counted", *BITS, *BITS]),
    ],
)  # fmt: skip
def test_draws(f, names) -> None:
    """Exactly equal to the unfused steps, and to XLA."""
    f, args = draws(f)
    prove(Case("draw", f, args, rtol=0.0), *names, rtol=0.0)


@pytest.mark.parametrize(("f", "names"), [
    (lambda k: jax.random.bits(k, (3, 5)), BITS),
    (lambda k: jax.random.key_data(jax.random.split(k)), ["threefry_counted"]),
    (lambda k: jax.random.key_data(jax.random.fold_in(k, 7)), ["threefry2x32"]),
])  # fmt: skip
def test_many_keys(f, names) -> None:
    one, args = draws(f, KEYS)
    prove(Case("keys", lambda k: jax.vmap(one)(k), args), *names)
    prove(Case("keys", lambda k: jax.vmap(jax.vmap(one))(k.reshape(2, 2, 2)), args), *names)


def test_large() -> None:
    """Made in blocks on CPU, the last one shorter."""
    f, args = draws(lambda k: (jax.random.bits(k, (5, 70_001)), jax.random.key_data(jax.random.split(k, 270_000))))
    prove(Case("large", f, args), *BITS, "threefry_counted")


def test_normal() -> None:
    """From a quarter of the ops; the inverse error function is nearer to the truth than XLA's."""
    f, args = draws(lambda k: jax.random.normal(k, (50, 20)))
    prove(Case("normal", f, args, rtol=2e-5, atol=1e-6), *BITS, "unit", "erf_inv", rtol=2e-5, atol=1e-6)


def test_erf_inv() -> None:
    x = np.concatenate([np.linspace(-1, 1, 2001), [1 - 1e-7, 1e-30, -0.0, 2, -2, np.nan, np.inf]]).astype(np.float32)
    prove(Case("erf_inv", jax.lax.erf_inv, (x,), rtol=1e-5), "erf_inv", rtol=1e-5)
    prove(Case("half", jax.lax.erf_inv, (x.astype(np.float16),), rtol=2e-3), "erf_inv", rtol=2e-3)


def program(f) -> str:
    return str(jax.jit(f).trace(KEY).lower(lowering_platforms=("tpu",)).compiler_ir("stablehlo"))


@pytest.mark.parametrize(("was", "becomes"), [
    ("dense<13>", "dense<12>"), ("dense<466688986>", "dense<466688987>"), ("dense<5> : tensor<ui32>", "dense<6> : tensor<ui32>"),
    ("stablehlo.or", "stablehlo.xor"), ("return %171, %175", "return %175, %171"),
])  # fmt: skip
def test_another_function_of_the_same_name(was, becomes) -> None:
    """One constant or one op off: the steps stay, and give what XLA gives."""
    text = program(draws(lambda k: jax.random.bits(k, (10,)))[0])
    assert fused(rewrite(plan_of(Case("same", text, (KEY,))))) == BITS
    changed = text.replace(was, becomes, 1)
    assert changed != text
    case = Case("changed", changed, (KEY,))
    refuse(case)
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)


@pytest.mark.parametrize(("was", "becomes"), [("dense<32> : tensor<ui64>", "dense<31> : tensor<ui64>"), ("dense<1> : tensor<ui64>", "dense<2> : tensor<ui64>")])
def test_other_counters_are_read(was, becomes) -> None:
    text = program(draws(lambda k: jax.random.bits(k, (10,)))[0])
    case = Case("counters", text.replace(was, becomes), (KEY,))
    prove(case, "threefry2x32")


@pytest.mark.parametrize(("was", "becomes"), [
    ("dense<9> : tensor<ui32>", "dense<8> : tensor<ui32>"), ("dense<1065353216>", "dense<1073741824>"), ("subtract %", "add %"),
])  # fmt: skip
def test_other_mantissas(was, becomes) -> None:
    text = program(draws(lambda k: jax.random.uniform(k, (10,)))[0])
    assert was in text
    case = Case("mantissa", text.replace(was, becomes), (KEY,), rtol=0)
    prove(case, *BITS, rtol=0)


# ---- the GPU's kernel, as C ------------------------------------------------------------------------------------------------------------

C = """
#include <stdint.h>
void f(uint32_t t, const uint32_t* sizes, const uint32_t* key0, const uint32_t* key1, const uint32_t* high, const uint32_t* low,
       uint32_t* first, uint32_t* second, uint32_t* out) {{
{body}
}}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_kernel(device: str, tmp_path: Path) -> None:
    """Its body, compiled for the CPU and called once for each thread, against the lowering for the CPU."""
    import ctypes

    for form in ("pair", "counted", "bits"):
        body = threefry.source(form, device)
        for index in threefry._INDEX.values():
            body = body.replace(index, "t")
        path = tmp_path / f"{form}.c"
        path.write_text(C.format(body=body))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", path.with_suffix(".so"), path], check=True)
        f = ctypes.CDLL(str(path.with_suffix(".so"))).f
        keys, drawn = 3, 5
        n = keys * drawn
        arrays = {name: np.zeros(n, np.uint32) for name in ("first", "second", "out")}
        key0, key1 = np.arange(keys, dtype=np.uint32) + 7, np.arange(keys, dtype=np.uint32) * 9
        low = np.arange(drawn, dtype=np.uint32) * (3 if form == "pair" else 1)
        high = np.full(drawn, 1 if form == "pair" else 0, np.uint32)
        given = [np.array([n, drawn, drawn], np.uint32), key0, key1, high, low, *arrays.values()]
        for t in range(n + 2):
            f(ctypes.c_uint32(t), *(a.ctypes.data_as(ctypes.c_void_p) for a in given))
        words = threefry.three_fry_2x32(*([threefry.mx.array(a) for a in pair] for pair in ((key0[:, None], key1[:, None]), (high, low))))
        x, y = (np.array(w).reshape(-1) for w in words)
        wanted = {"out": x ^ y} if form == "bits" else {"first": x, "second": y}
        for name, value in wanted.items():
            np.testing.assert_array_equal(arrays[name], value)


@pytest.mark.parametrize(("shape", "repeats", "period"), [
    ((), 24, None), ((1, 1, 1), 24, 1), ((2, 1, 1), 12, None), ((2, 3, 1), 4, None), ((2, 3, 4), 1, 24), ((1, 3, 4), None, 12), ((1, 1, 4), None, 4),
    ((2, 1, 4), None, None),
])  # fmt: skip
def test_layouts(shape, repeats, period) -> None:
    shape = (1,) * (3 - len(shape)) + shape
    assert threefry._repeats(shape, (2, 3, 4)) == repeats
    assert threefry._period(shape, (2, 3, 4)) == (1 if shape == (1, 1, 1) else period)
