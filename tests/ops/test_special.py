"""CHLO's functions, kept whole or decomposed, against XLA's CPU backend and against their mathematical values."""

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from jax import lax

from jax_mps.errors import Unsupported
from jax_mps.ops.registry import has_lowering

from .harness import Case, check, check_exported, plan_of, run_on_mlx
from .test_elementwise import FLOATS, each, edges, kind

rng = np.random.default_rng(0)
UNIT = np.concatenate([rng.uniform(-1, 1, 500), 10 ** rng.uniform(-30, 0, 200), [0, 1, -1]])
LINE = np.concatenate([rng.uniform(-10, 10, 500), 10 ** rng.uniform(-30, 1, 200), -(10 ** rng.uniform(-30, 1, 200))])
WIDE = np.concatenate([LINE, rng.uniform(-85, 85, 500)])

INVERSES = each(lax.asin, lax.acos, lax.atan, lax.asinh, lax.acosh, lax.atanh)
HYPERBOLIC = each(lax.sinh, lax.cosh, lax.square)
ERRORS = each(lax.erf, lax.erfc, lax.erf_inv)
GAMMAS = each(lax.lgamma, lax.digamma)
BESSELS = each(lax.bessel_i0e, lax.bessel_i1e)

CASES = [
    *(Case(f"{name}_edges_{d}", f, (edges(d)[np.abs(edges(d).astype(np.float64)) < 80],), rtol=rtol)
      for name, f, rtol in [("inverses", INVERSES, None), ("hyperbolic", HYPERBOLIC, 4e-6), ("errors", ERRORS, 1e-5)]  # XLA's sinh and erf
      for d in ["float32", "bfloat16"]),
    Case("float16", each(INVERSES, HYPERBOLIC, ERRORS), (UNIT[(np.abs(UNIT) > 1e-4) | (UNIT == 0)].astype(np.float16),)),
    *(Case(f"infinities_{d}", each(INVERSES, HYPERBOLIC, ERRORS), (np.array([np.inf, -np.inf, np.nan]).astype(kind(d)),)) for d in FLOATS),
    Case("gammas", GAMMAS, (rng.uniform(0.5, 50, 300).astype(np.float32),), rtol=3e-5, atol=1e-5),  # both cancel near their zeros
    Case("bessels", BESSELS, (LINE.astype(np.float32),), rtol=4e-6),
    Case("zeta", lax.zeta, (rng.uniform(1.5, 5, 50).astype(np.float32), rng.uniform(0.5, 9, 50).astype(np.float32)), rtol=2e-5),
    Case("igamma", lax.igamma, (rng.uniform(0.5, 5, 50).astype(np.float32), rng.uniform(0.5, 9, 50).astype(np.float32)), rtol=2e-5),
    Case("scalar", each(INVERSES, HYPERBOLIC, ERRORS), (np.float32(0.5),), rtol=4e-6),
    Case("empty", each(INVERSES, HYPERBOLIC, ERRORS), (np.zeros((0, 2), np.float32),)),
    Case("gradients", each(*(jax.vmap(jax.grad(f)) for f in [lax.erf, lax.erfc, lax.erf_inv, lax.asin, lax.atanh, lax.sinh, lax.lgamma])),
         (np.float32([0.1, 0.5, 0.8]),), rtol=1e-5),
    Case("gelu", lambda x: (jax.nn.gelu(x, approximate=False), jax.nn.softplus(x), jax.nn.silu(x)), (LINE.astype(np.float32),), rtol=1e-5, atol=1e-7),
]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "igamma"], ids=str)
def test_matches_xla(case):
    check(case)


@pytest.mark.parametrize("case", [c for c in CASES[::3] if c.name != "igamma"], ids=str)
def test_survives_export(case):
    check_exported(case)


# the largest error in units in the last place, against float64
ULP = [
    (lax.exp, np.exp, WIDE, 2.5), (lax.expm1, np.expm1, LINE, 1.5), (lax.log, np.log, np.abs(LINE), 1.5), (lax.log1p, np.log1p, np.abs(LINE), 1.5),
    (lax.tanh, np.tanh, LINE, 2.5), (lax.logistic, scipy.special.expit, WIDE, 3), (lax.sqrt, np.sqrt, np.abs(LINE), 0.6),
    (lax.rsqrt, lambda x: 1 / np.sqrt(x), np.abs(LINE), 2), (lax.cbrt, np.cbrt, LINE, 1.5), (lax.sin, np.sin, LINE, 2), (lax.cos, np.cos, LINE, 2),
    (lax.tan, np.tan, LINE, 1.5), (lax.erf, scipy.special.erf, LINE, 7), (lax.sinh, np.sinh, WIDE, 2), (lax.cosh, np.cosh, WIDE, 2),
    (lax.asin, np.arcsin, UNIT, 1.5), (lax.acos, np.arccos, UNIT, 1.5), (lax.atan, np.arctan, WIDE, 1.5), (lax.asinh, np.arcsinh, WIDE, 2),
    (lax.acosh, np.arccosh, 1 + np.abs(LINE), 2), (lax.atanh, np.arctanh, UNIT[np.abs(UNIT) < 1], 2),
]  # fmt: skip


@pytest.mark.parametrize(("f", "exact", "x", "bound"), ULP, ids=lambda v: getattr(v, "__name__", ""))
def test_accuracy(f, exact, x, bound):
    x = x.astype(np.float32)
    got = run_on_mlx(Case(f.__name__, f, (x,)))[0]
    want = exact(x.astype(np.float64))
    normal = np.abs(want) > 1.2e-38
    error = np.abs(got - want)[normal] / np.spacing(np.abs(want[normal]).astype(np.float32))
    assert error.max() <= bound, f"at {x[normal][error.argmax()]}"


def test_composites_are_kept_whole():
    names = {s.name for s in plan_of(Case("erf", lambda x: lax.sinh(lax.erf(x)), (np.float32(1),))).steps}
    assert {"chlo.erf", "chlo.sinh"} <= names


def test_complex_numbers_are_left_to_the_decomposition():
    assert has_lowering("chlo.asin")
    with pytest.raises(Unsupported, match="decomposition"):
        from jax_mps.ops import special
        from jax_mps.plan.types import Step, TensorType, Value

        value = Value(TensorType((2,), "complex64"))
        special.native(Step("chlo.asin", (value,), (value,)))


def test_half_types_are_computed_in_float32():
    x = np.array([0.1, 1e-3, 2.0], ml_dtypes.bfloat16)
    want = scipy.special.erf(x.astype(np.float64)).astype(ml_dtypes.bfloat16)
    assert (run_on_mlx(Case("erf", lax.erf, (x,)))[0] == want).all()
