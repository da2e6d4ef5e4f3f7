"""Device segments as function files: whole, whatever MLX makes of equal arrays."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest

from jax_mps import runtime
from jax_mps.counters import stats
from jax_mps.ops import products
from jax_mps.ops.registry import Lowerer
from jax_mps.plan import export
from jax_mps.plan.program import read_function

from ..ops.harness import Case, plan_of

R = np.random.default_rng(0)
X = (R.standard_normal((40, 40)) / 6).astype(np.float32)


def segment_of(case: Case) -> export.Traceable:
    plan = plan_of(case)
    return export.traceable(plan.steps, tuple(plan.arguments), tuple(plan.results), Lowerer(plan.steps))


def powers(x: object) -> object:
    """Three products of one matrix: each takes it apart."""
    return jnp.matmul(jnp.matmul(x, x, precision="highest"), x, precision="highest")


def test_arrays_that_mlx_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX's merging of equal arrays leaves a function without one of them, the function is exported again."""
    monkeypatch.setattr(products, "device_kind", lambda: "cuda")
    before = stats()["exports_apart"]
    path = export.export(segment_of(Case("powers", powers, (X,))), tmp_path)
    assert stats()["exports_apart"] == before + 1
    (got,) = read_function(path, path.read_bytes())(mx.array(X))
    np.testing.assert_allclose(got, X @ X @ X, rtol=1e-5, atol=1e-5)


def test_steps_apart() -> None:
    """The same results, where no two steps share an array."""
    case = Case("shared", lambda x: (jnp.sin(x) + x * jnp.sin(x) + jnp.cumsum(x, 0) @ x, jnp.sum(x), x), (X,))
    function = segment_of(case).function
    with runtime.locked():
        for plain, apart in zip(function(mx.array(X)), function(mx.array(X), apart=True), strict=True):
            np.testing.assert_array_equal(np.array(plain), np.array(apart))


def test_what_mlx_cannot_export_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A lowering's fault costs the user time, and the entry on disk, but not the program."""

    def refuse(*given: object) -> Path:
        raise ValueError("[export_function] Unable to serialize primitive Contiguous")

    monkeypatch.setattr(export, "export", refuse)
    before = stats()["exports_refused"]
    f = jax.jit(lambda x: jnp.sin(x) @ x - 0.625)
    device = jax.devices("mps")[0]
    for _ in range(2):
        got = f(jax.device_put(X, device))
        np.testing.assert_allclose(got, np.sin(X) @ X - 0.625, rtol=1e-5, atol=1e-6)
    assert stats()["exports_refused"] == before + 1
    assert "not kept on disk" in caplog.text


def test_other_failures_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> Path:
        raise ValueError("something else")

    monkeypatch.setattr(export, "export", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        jax.jit(lambda x: jnp.cos(x) @ x - 0.375)(jax.device_put(X, jax.devices("mps")[0]))
