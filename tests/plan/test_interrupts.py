"""Loops on the host can be interrupted wherever they are, and compute the same for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_mps._shim import lib

from jax_mps.host.xla import LOOK, HostError, host_function
from jax_mps.plan import build
from jax_mps.plan.interrupts import watched
from jax_mps.plan.types import Region, Step
from tests.device.programs import run

Body = Callable[[jax.Array], jax.Array]


def times(n: jax.Array | int, body: Body, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, n, lambda i, c: body(c) + i.astype(c.dtype), x)


# A program of an array and a bound; how many of its loops look, and how deep loops and choices are within each other then.
PROGRAMS: dict[str, tuple[Callable[[jax.Array, jax.Array], jax.Array], int, int]] = {
    "short": (lambda x, n: times(5, jnp.sin, x), 0, 1),
    "tiny steps, so many that asking costs less than one of them": (lambda x, n: times(n, jnp.sin, x), 1, 2),
    "known to be long": (lambda x, n: times(10**9, jnp.sin, x), 1, 2),
    "a loop of unknown length inside": (lambda x, n: times(n, lambda c: times(n, jnp.sin, c), x), 2, 3),
    "a short loop inside": (lambda x, n: times(n, lambda c: times(3, jnp.sin, c), x), 1, 3),
    "in a choice": (lambda x, n: lax.cond(n > 2, lambda x: times(n, jnp.sin, x), jnp.cos, x), 1, 3),
    "nothing but a choice": (lambda x, n: lax.cond(n > 2, jnp.sin, jnp.cos, x), 0, 1),
    "by values": (lambda x, n: lax.while_loop(lambda c: c.sum() < n, lambda c: c + 1, x), 1, 2),
}


def depth(steps: Sequence[Step]) -> int:
    return max((1 + depth([s for r in step.regions for s in r.steps]) for step in steps if step.name in ("stablehlo.while", "stablehlo.case")), default=0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_looks_whether_to_end(name: str) -> None:
    """Run to the end with the same result, or interrupted from the beginning."""
    program, looking, deep = PROGRAMS[name]
    x, n = np.arange(6, dtype=np.float32), np.int32(3000 if looking < 2 else 30)
    region = build.build(build.parse(jax.jit(program, keep_unused=True).lower(x, n).as_text().encode())).body
    steps, seen = watched(region.steps)
    calls = [s for s in Region((), steps, ()).walk() if s.attributes.get("call_target_name") == LOOK]
    assert (len(calls), depth(steps)) == (looking, deep)
    if seen is None:
        assert steps == tuple(region.steps)
        return
    function = host_function((*region.arguments, seen), steps, region.results)
    with pytest.raises(HostError, match="a loop was interrupted"):
        function([x, n, np.asarray(lib.shim_interrupts() + 1, np.int64)])
    if name != "known to be long":
        [plain] = host_function(region.arguments, region.steps, region.results)([x, n])
        [ended] = function([x, n, np.asarray(lib.shim_interrupts(), np.int64)])
        np.testing.assert_array_equal(ended, plain)


LONG: dict[str, str] = {
    "lent": "lambda x, n: times(2_000_000_000, jnp.sin, x)",
    "lent later": "lambda x, n: times(n, jnp.sin, x)",
    "beside LAPACK": "lambda x, n: jnp.linalg.cholesky(A + times(n, jnp.cos, times(n, jnp.sin, jnp.linalg.cholesky(A + x))))",
    "of LAPACK": "lambda x, n: lax.while_loop(lambda c: c[1] < n, lambda c: (jnp.linalg.cholesky(A + 1e-3 * c[0]), c[1] + 1), (x, 0))",
    "in a choice": "lambda x, n: lax.cond(x[0, 0] < 5, lambda x: times(n, lambda c: jnp.linalg.cholesky(A + 1e-3 * c), x), jnp.sin, x)",
    "inside another": "lambda x, n: times(3, lambda c: times(n, lambda c: jnp.linalg.cholesky(A + 1e-3 * c), c), x)",
}


@pytest.mark.parametrize("name", LONG)
def test_ctrl_c_ends_a_loop_on_the_host(name: str, tmp_path: Path) -> None:
    """And nothing is left of it: the next program runs."""
    ran = run(
        f"""
        import os, signal, threading, time, jax_mps
        A = 3 * jnp.eye(6) + 0.1
        def times(n, body, x):
            return lax.fori_loop(0, n, lambda i, c: body(c) + i.astype(c.dtype) * 1e-9, x)
        f = jax.jit({LONG[name]})
        short = jax.jit(lambda x: jnp.linalg.cholesky(A + x))
        def interrupt():
            while jax_mps.stats()["host_calls"] < 2:
                time.sleep(0.1)
            time.sleep(0.5)
            interrupted.append(time.time())
            os.kill(os.getpid(), signal.SIGINT)
        interrupted = []
        x = jnp.zeros((6, 6))
        before = np.asarray(short(x))
        threading.Thread(target=interrupt).start()
        try:
            try:
                jax.block_until_ready(f(x, jnp.int32(2_000_000_000)))
            except jax.errors.JaxRuntimeError:  # the loop's own end, just before Python sees the signal
                time.sleep(1)
            how = "ended"
        except KeyboardInterrupt:
            how = "interrupted"
        after = np.asarray(short(x))
        report(how=how, seconds=time.time() - interrupted[0], same=bool((before == after).all()))
        """,
        tmp_path,
    )
    assert ran.report["how"] == "interrupted"
    assert ran.report["seconds"] < 10  # alone, 0.1
    assert ran.report["same"]
