"""Random bits, bit for bit those of XLA's CPU backend, and jax.random on top of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mps.errors import Unsupported

from .harness import Case, check, check_exported, reference, run_exported, run_on_mlx
from .test_elementwise import text

TYPES = {
    "ui8": np.uint8,
    "i8": np.int8,
    "ui16": np.uint16,
    "i16": np.int16,
    "ui32": np.uint32,
    "i32": np.int32,
    "ui64": np.uint64,
    "i64": np.int64,
}
SHAPES = [(), (1,), (5,), (3, 5), (3, 4, 2), (0,), (3, 0), (33, 7)]
STATES = [[1, 2], [2**64 - 1, 2**64 - 2], [12345678901234567890, 2**32 - 2]]
LONG_STATES = [[7, 2**64 - 2, 2**64 - 1], [7, 2**32 - 1, 9]]


def generator(algorithm, state, shape, kind):
    n = len(state)
    of = "x".join(map(str, (*shape, kind)))
    op = f"stablehlo.rng_bit_generator %x, algorithm = {algorithm} : (tensor<{n}xui64>) -> (tensor<{n}xui64>, tensor<{of}>)"
    module = (f"func.func @main(%x: tensor<{n}xui64>) -> (tensor<{n}xui64>, tensor<{of}>) {{\n %0, %1 = {op}\n"
              f" return %0, %1 : tensor<{n}xui64>, tensor<{of}>\n}}")  # fmt: skip
    return Case(f"{algorithm}_{kind}_{shape}", module, (np.array(state, np.uint64),))


BITS = [generator(a, STATES[i % 3], SHAPES[(i + j) % 8], k)
        for j, a in enumerate(["THREE_FRY", "PHILOX", "DEFAULT"]) for i, k in enumerate(list(TYPES)[j::2])]  # fmt: skip
BITS += [generator("THREE_FRY", STATES[1], s, k) for s, k in zip(SHAPES, ["ui32", "ui64"] * 4, strict=True)]
BITS += [generator("PHILOX", s, (3, 5), k) for s in [*STATES, *LONG_STATES] for k in ("ui32", "ui64")]


@pytest.mark.parametrize("case", BITS, ids=str)
def test_bits_are_those_of_xla(case):
    with jax.enable_x64(True):
        got, want = run_exported(case), reference(case)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))  # XLA's buffers of signed bits are unsigned


def key(implementation="threefry2x32"):
    return np.arange(1, 3 if implementation == "threefry2x32" else 5, dtype=np.uint32)


def drawn(f, implementation="threefry2x32"):
    return lambda bits: f(jax.random.wrap_key_data(bits, impl=implementation))


R = jax.random
SAMPLERS = {
    "split": lambda k: R.key_data(R.split(k, 5)),
    "fold_in": lambda k: R.key_data(R.fold_in(k, 7)),
    "bits": lambda k: (R.bits(k, (7,)), R.bits(k, (3, 3), "uint8"), R.bits(k, (), "uint16")),
    "uniform": lambda k: (R.uniform(k, (5, 3)), R.uniform(k, (4,), jnp.bfloat16), R.uniform(k, (4,), jnp.float16)),
    "randint": lambda k: (R.randint(k, (9,), -3, 17), R.randint(k, (9,), 0, 200, "uint8")),
    "normal": lambda k: (R.normal(k, (50,)), R.normal(k, (9,), jnp.bfloat16)),
    "truncated": lambda k: R.truncated_normal(k, -1.0, 2.0, (20,)),
    "exponential": lambda k: (R.exponential(k, (20,)), R.laplace(k, (20,)), R.gumbel(k, (20,)), R.logistic(k, (20,)), R.cauchy(k, (20,))),
    "bernoulli": lambda k: R.bernoulli(k, 0.3, (50,)),
    "complex_normal": lambda k: R.normal(k, (9,), jnp.complex64),
    "rademacher": lambda k: R.rademacher(k, (9,)),
}
SAMPLES = [Case(name, drawn(f), (key(),), rtol=2e-5, atol=1e-6) for name, f in SAMPLERS.items()]  # 1 ulp near 0 or 1 grows in log and erf_inv
SAMPLES += [Case(f"rbg_{n}", drawn(SAMPLERS[n], "rbg"), (key("rbg"),), rtol=2e-5, atol=1e-6) for n in ("split", "bits", "uniform", "normal")]
SAMPLES += [Case("unsafe_rbg_split", drawn(SAMPLERS["split"], "unsafe_rbg"), (key("rbg"),))]


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_jax_random(case):
    check(case)


@pytest.mark.parametrize("case", SAMPLES[:4], ids=str)
def test_survives_export(case):
    check_exported(case)


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        ("%s = stablehlo.constant dense<3> : tensor<1xi64>\n %a = stablehlo.constant dense<0.0> : tensor<f32>\n"
         " %b = stablehlo.constant dense<1.0> : tensor<f32>\n"
         " %r = stablehlo.rng %a, %b, %s, distribution = UNIFORM : (tensor<f32>, tensor<f32>, tensor<1xi64>) -> tensor<3xf32>", "hidden state"),
        ("%s = stablehlo.constant dense<3> : tensor<3xui64>\n"
         " %0, %r = stablehlo.rng_bit_generator %s, algorithm = THREE_FRY : (tensor<3xui64>) -> (tensor<3xui64>, tensor<3xf32>)", "3 64-bit words"),
    ],
)  # fmt: skip
def test_refuses(body, fact):
    with pytest.raises(Unsupported, match=fact):
        run_on_mlx(Case("refused", text(body, result="3xf32")))
