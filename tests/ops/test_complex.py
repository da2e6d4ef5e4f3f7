"""Functions of complex64 against XLA's CPU backend.

Where one part is infinite and the other infinite or NaN, MLX follows C's annex G and XLA does not: those are left out of the tables.
"""

import itertools

import jax
import mlx.core as mx
import numpy as np
import pytest
from jax import lax

from jax_mps.errors import Unsupported
from jax_mps.ops import complex as complex_

from .harness import Case, check, check_exported, run_on_mlx
from .test_elementwise import each, text

PARTS = np.float32([0, 1, -1, 0.5, -2.5, 1e-3, 30, -30, 1e4, 1e10, 1e-10])
PLANE = np.array([complex(a, b) for a, b in itertools.product(PARTS, PARTS)], np.complex64)
MODERATE = PLANE[np.abs(PLANE) < 100]
rng = np.random.default_rng(0)
ANY = (rng.normal(size=200) * 3 + 1j * rng.normal(size=200) * 3).astype(np.complex64)
OTHER = (rng.normal(size=200) + 1j * rng.normal(size=200)).astype(np.complex64)

_UNARY = [lax.abs, lax.sign, lax.exp, lax.expm1, lax.log, lax.log1p, lax.logistic, lax.tanh, lax.tan, lax.sin, lax.cos, lax.rsqrt, lax.sqrt]
UNARY = {f.__name__: f for f in _UNARY}
COMPOSED = {f.__name__: f for f in [lax.asin, lax.acos, lax.atan, lax.sinh, lax.cosh, lax.asinh, lax.acosh, lax.atanh, lax.square]}

# stablehlo's own ops, which JAX expands into real arithmetic for most functions before a backend sees them
DIRECT = [
    "abs",
    "sign",
    "exponential",
    "exponential_minus_one",
    "log",
    "log_plus_one",
    "logistic",
    "tanh",
    "tan",
    "sine",
    "cosine",
    "rsqrt",
    "sqrt",
    "negate",
]


def direct(name, n):
    to = "f32" if name == "abs" else "complex<f32>"
    return text(f"%r = stablehlo.{name} %x : (tensor<{n}xcomplex<f32>>) -> tensor<{n}x{to}>", f"{n}xcomplex<f32>", result=f"{n}x{to}")


ATAN2 = "%r = stablehlo.atan2 %x, %y : tensor<200xcomplex<f32>>"
TO_BOOL = "%r = stablehlo.convert %x : (tensor<121xcomplex<f32>>) -> tensor<121xi1>"

CASES = [
    *(Case(f"{name}_plane", f, (MODERATE,), rtol=2e-5, atol=2e-7) for name, f in {**UNARY, **COMPOSED}.items() if name not in ("asin", "rsqrt")),
    *(Case(f"{name}_any", f, (ANY,), rtol=1e-5) for name, f in {**UNARY, **COMPOSED}.items()),
    *(Case(f"direct_{name}", direct(name, len(ANY)), (ANY,), rtol=1e-5) for name in DIRECT),
    Case("arithmetic", each(lax.add, lax.sub, lax.mul, lax.div, lax.eq, lax.ne), (ANY, OTHER)),
    Case("division_wide", lax.div, tuple(np.meshgrid(PLANE, PLANE[np.abs(PLANE) > 0][::7])), rtol=1e-5),
    Case("power", lax.pow, (ANY, OTHER), rtol=1e-5),
    Case("atan2", text(ATAN2, "200xcomplex<f32>", "200xcomplex<f32>", result="200xcomplex<f32>"), (ANY, OTHER), rtol=1e-4),  # by a logarithm
    Case("to_bool", text(TO_BOOL, "121xcomplex<f32>", result="121xi1"), (PLANE,)),
    Case("power_of_zero", lax.pow, (np.complex64([0, 0, 0, 1, -1]), np.complex64([0, 1, 2.5, 0, 2])), atol=1e-6),
    Case("parts", each(lax.real, lax.imag, lax.conj, lambda x: lax.complex(lax.imag(x), lax.real(x))), (PLANE,)),
    Case("infinite_parts", lambda a, b: lax.complex(a, b), (np.float32([np.inf, -np.inf, np.nan, 1]), np.float32([1, np.inf, 2, np.nan]))),
    Case("scalar", each(*UNARY.values()), (np.complex64(1 + 2j),), rtol=1e-5),
    Case("empty", each(*UNARY.values()), (np.zeros((0, 2), np.complex64),)),
    Case(
        "gradients",
        jax.grad(lambda x: lax.abs(lax.exp(x) * lax.tanh(x) / (x + 2)), holomorphic=False),
        (np.complex64(0.3 + 0.4j),),
        rtol=1e-5,
    ),
    Case("gradient_holomorphic", jax.grad(lambda x: lax.log(x) * lax.sqrt(x) ** 3, holomorphic=True), (np.complex64(0.3 + 0.4j),), rtol=1e-5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_xla(case):
    check(case)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_survives_export(case):
    check_exported(case)


SPECIAL = [(0, 0), (-0.0, 0), (1, -0.0), (np.inf, 2), (3, -np.inf), (np.nan, 1), (2e30, -3e30), (1e-30, 0)]
SPECIAL = np.array([complex(a, b) for a, b in SPECIAL], np.complex64)


def test_scaled_division_and_magnitude():
    """What Metal is given instead of kernels that square their operands."""
    a, b = (x.ravel() for x in np.meshgrid(np.concatenate([ANY[:20], SPECIAL]), np.concatenate([OTHER[:20], SPECIAL])))
    with np.errstate(all="ignore"):
        want = np.asarray(jax.jit(lax.div)(a, b))
        known = np.isfinite(want) | np.isfinite(a) & (b != 0) & np.isfinite(b)
        np.testing.assert_allclose(np.array(complex_._divide_scaled(mx.array(a), mx.array(b)))[known], want[known], rtol=4e-6)
        np.testing.assert_allclose(np.array(complex_._abs_scaled(mx.array(SPECIAL))), np.asarray(jax.jit(lax.abs)(SPECIAL)), rtol=1e-6)


def test_tanh_as_on_a_gpu():
    """Against NumPy in twice the precision: both parts to a few ulps, and what C says of zeros, infinities and NaN."""
    parts = np.float32([0, 1e-30, 1e-4, 0.3, 1, np.pi / 2, 5, 9.9, 10.1, 40, 100, 1e10, 3e38, np.inf])
    parts = np.concatenate([parts, -parts, [np.nan]]).astype(np.float32)
    x = np.stack(np.meshgrid(parts, parts), -1).view(np.complex64).ravel()
    for function, exact in ((complex_.tanh, np.tanh), (complex_.tan, np.tan)):
        with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
            patch.setattr(complex_, "device_kind", lambda: "metal")
            got = np.array(function(mx.array(x)))
            want = exact(x.astype(np.complex128))
            small = np.abs(want) < 1e-37  # MLX's exp flushes what is smaller to zero
            for ours, theirs in ((got.real, want.real), (got.imag, want.imag)):
                np.testing.assert_allclose(np.where(small, 0, ours), np.where(small, 0, theirs), rtol=3e-6, atol=1e-37)


def test_order_is_refused():
    body = "%r = stablehlo.compare LT, %x, %x : (tensor<complex<f32>>, tensor<complex<f32>>) -> tensor<i1>"
    with pytest.raises(Unsupported, match="no order"):
        run_on_mlx(Case("lt", text(body, "complex<f32>", result="i1"), (np.complex64(1),)))
