"""The package's own functions: stats, explain, features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_mps


def test_stats_counts_what_ran() -> None:
    before = jax_mps.stats()
    jax.jit(lambda x: jnp.sin(x) * 3.25 + 17)(np.ones(5, np.float32))
    after = jax_mps.stats()
    wanted = {"translations", "exports", "memory_hits", "disk_hits", "disk_misses", "host_segments"}
    assert wanted <= after.keys()
    assert after["translations"] + after["disk_hits"] > before["translations"] + before["disk_hits"]


def test_stats_counts_runs_on_the_host() -> None:
    before = jax_mps.stats()["host_calls"]
    f = jax.jit(lambda x: jnp.linalg.cholesky(x) + 1)
    for _ in range(3):
        jax.block_until_ready(f(np.eye(4, dtype=np.float32)))
    assert jax_mps.stats()["host_calls"] == before + 3


def test_explain_shows_segments_and_reasons() -> None:
    """A factorisation is on the host, and says why; work around it is on the device, unless it is less than a boundary's."""
    function = jax.jit(lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(len(x))) * 2)
    assert "device:" not in jax_mps.explain(function.lower(jnp.eye(3)).compile())
    text = jax_mps.explain(function.lower(jnp.eye(999)).compile())
    assert "device:" in text
    assert "host (XLA CPU)" in text
    assert "because custom_call:lapack_spotrf_ffi" in text


def test_explain_shows_loops_and_branches() -> None:
    def f(x: jax.Array) -> jax.Array:
        y = jax.lax.while_loop(lambda c: c.sum() < 100, lambda c: c * 1.5 + 1, x)
        return jax.lax.cond(y[0] > 3, lambda v: jnp.sin(v) @ v * jnp.cumsum(v) + v.max() - v.mean() * jnp.cos(v), lambda v: v, y)

    text = jax_mps.explain(jax.jit(f).lower(jnp.ones(4)).compile())
    assert "loop, until its condition fails" in text
    assert "branch of 2" in text


def test_explain_wants_a_compiled_program() -> None:
    with pytest.raises(TypeError, match="compile"):
        jax_mps.explain(jax.jit(jnp.sin))


def test_every_feature_is_on() -> None:
    """On each supported jax: a renamed private name would show here."""
    jnp.ones(1).block_until_ready()
    features = jax_mps.features()
    assert features
    assert {name: state for name, state in features.items() if state != "on"} == {}
