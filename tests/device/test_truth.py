"""What JAX is told is true: events, errors, donation, deleted buffers, identities."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device.programs import run
from jax import lax
from jax.experimental import io_callback
from jax_mps._shim import ffi, lib


def long_loop(x: jax.Array, n: int = 3000) -> jax.Array:
    return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1.0, jnp.sin(c[1]) @ c[1]), (0.0, x))[1]


@pytest.mark.alone  # the caller and the loop have a core each
def test_dispatch_returns_before_a_loop_ends_and_block_waits() -> None:
    """A loop runs on the executor's thread; `is_ready` says no while it does, `block_until_ready` waits for it."""
    f = jax.jit(long_loop)
    x = jnp.eye(32) * 0.5
    jax.block_until_ready(f(x))
    start = time.perf_counter()
    y = f(x)
    dispatched = time.perf_counter() - start
    ready_at_once = y.is_ready()
    jax.block_until_ready(y)
    took = time.perf_counter() - start
    assert y.is_ready()
    assert not ready_at_once
    assert dispatched < took / 4


def test_a_chain_on_a_pending_value() -> None:
    """A program whose argument is not there yet waits for it, in order."""
    y = jax.jit(long_loop)(jnp.eye(8) * 0.5)
    z = jnp.sin(y) + 1
    with jax.default_device(jax.devices("cpu")[0]):
        want = np.sin(jax.jit(long_loop)(jnp.eye(8) * 0.5)) + 1
    np.testing.assert_allclose(np.asarray(z), np.asarray(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_callback_raises_from_the_call(ordered: bool) -> None:
    """One with effects, too, and nothing is left for a barrier to tell of."""

    def fail(x: np.ndarray) -> np.ndarray:
        raise ValueError("the user's own words")

    @jax.jit
    def f(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = io_callback(fail, jax.ShapeDtypeStruct((3,), jnp.float32), jax.jit(long_loop)(x), ordered=ordered)
        return y + 1, x * 2

    with pytest.raises(Exception, match="the user's own words"):
        f(jnp.eye(3))
    jax.effects_barrier()
    assert float(jnp.sum(jnp.ones(3))) == 3


def test_callbacks_ran_when_the_call_returns() -> None:
    """What a loop prints stands before what is printed after the call; its condition is asked although the trips could be counted."""
    seen: list[int] = []

    def noted(i: jax.Array) -> jax.Array:
        jax.debug.callback(lambda v: seen.append(int(v)), i)
        return i

    jax.jit(lambda i: lax.while_loop(lambda i: noted(i) < 9, lambda i: noted(i + 100) - 99, i))(jnp.int32(5))
    assert sorted(seen) == [5, 6, 7, 8, 9, 105, 106, 107, 108]


def test_donation_invalidates_and_frees() -> None:
    """A donated argument is deleted; using it is a clear error."""
    f = jax.jit(lambda x: x + 1, donate_argnums=0)
    a = jnp.arange(8.0)
    b = f(a)
    assert a.is_deleted()
    np.testing.assert_array_equal(np.asarray(b), np.arange(8.0) + 1)
    with pytest.raises(RuntimeError, match="deleted"):
        a + 1


def test_donating_twice_is_refused() -> None:
    f = jax.jit(lambda x, y: (x + 1, y + 2), donate_argnums=(0, 1))
    a = jnp.arange(8.0)
    with pytest.raises(Exception, match="donate"):
        f(a, a)


def test_an_output_that_is_an_input_is_its_own_buffer() -> None:
    """Deleting the argument leaves the result."""
    a = jnp.sin(jnp.arange(8.0))
    same, twice = jax.jit(lambda x: (x, x))(a)
    assert same.unsafe_buffer_pointer() != a.unsafe_buffer_pointer()
    a.delete()
    np.testing.assert_allclose(np.asarray(same), np.sin(np.arange(8.0)), rtol=1e-6)
    same.delete()
    np.testing.assert_allclose(np.asarray(twice), np.sin(np.arange(8.0)), rtol=1e-6)


def test_numpy_view_outlives_its_array() -> None:
    """`np.asarray` does not copy, and keeps the memory."""
    a = jnp.sin(jnp.arange(1000.0))
    view = np.asarray(a)
    assert not view.flags.writeable
    assert view.__array_interface__["data"][0] == a.unsafe_buffer_pointer()
    want = view.copy()
    del a
    gc.collect()
    np.testing.assert_array_equal(view, want)


@pytest.mark.parametrize(
    "view",
    [lambda a: a.T, lambda a: a[::2], lambda a: a[:, ::-1], lambda a: a[1:, 2:], lambda a: np.broadcast_to(a[:1], (5, 7)), lambda a: a[:0]],
    ids=["transposed", "strided", "reversed", "offset", "broadcast", "empty"],
)
@pytest.mark.parametrize("dtype", ["float32", "int8", "complex64", "bool"])
def test_host_to_device_from_any_strides(view, dtype) -> None:
    array = view(np.arange(35).reshape(5, 7).astype(dtype))
    np.testing.assert_array_equal(np.asarray(jax.device_put(array, jax.devices("mps")[0])), array)


def test_results_that_are_views_read_right() -> None:
    """Transposes and broadcasts are made dense before a pointer leaves."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    f = jax.jit(lambda x: (x.T, jnp.broadcast_to(x[0], (5, 4)), x[::2, 1::2], jnp.flip(x, 1), lax.slice(x, (1, 1), (3, 3))))
    for got, want in zip(f(x), (x.T, np.broadcast_to(x[0], (5, 4)), x[::2, 1::2], x[:, ::-1], x[1:3, 1:3]), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_buffers_and_executables_are_freed() -> None:
    """What Python drops, the shim drops."""

    def counts() -> list[int]:
        gc.collect()
        values = ffi.new("int64_t[8]")
        lib.shim_counts(values)
        return list(values)[:2]

    jax.clear_caches()
    before = counts()
    for n in range(5):
        f = jax.jit(lambda x, n=n: jnp.sin(x) * n)
        kept = [f(jnp.ones(100 + n)) for _ in range(10)]
    del kept, f
    jax.clear_caches()
    after = counts()
    assert after[0] <= before[0]
    assert after[1] <= before[1]


def test_clear_caches_and_backends(tmp_path: Path) -> None:
    """Both leave a working platform; the second makes a new client."""
    ran = run(
        """
        from jax.extend.backend import clear_backends
        a = float(jnp.sum(jnp.sin(jnp.arange(4.0))))
        jax.clear_caches()
        b = float(jnp.sum(jnp.sin(jnp.arange(4.0))))
        clear_backends()
        c = float(jnp.sum(jnp.sin(jnp.arange(4.0))))
        report(values=[a, b, c], devices=str(jax.devices()))
        """,
        tmp_path,
    )
    assert len(set(ran.report["values"])) == 1
    assert "mps" in ran.report["devices"]


def test_ctrl_c_ends_a_long_loop(tmp_path: Path) -> None:
    """SIGINT during a loop raises KeyboardInterrupt, and the platform goes on working."""
    ran = run(
        """
        import os, signal, threading, time
        f = jax.jit(lambda x: lax.while_loop(lambda c: c[0] < 1e9, lambda c: (c[0] + 1, c[1] * 0.999), (0.0, x)))
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        interrupted = False
        start = time.time()
        try:
            try:
                jax.block_until_ready(f(jnp.ones(3)))
            except jax.errors.JaxRuntimeError:  # the loop's own end, just before Python sees the signal
                time.sleep(1)
        except KeyboardInterrupt:
            interrupted = True
        report(interrupted=interrupted, seconds=time.time() - start, after=float(jnp.sum(jnp.ones(3))))
        """,
        tmp_path,
    )
    assert ran.report["interrupted"]
    assert ran.report["seconds"] < 10
    assert ran.report["after"] == 3


def test_exit_with_work_in_flight(tmp_path: Path) -> None:
    """A process may end with a loop running, lazy results alive and threads blocked: it ends, and well."""
    ran = run(
        """
        f = jax.jit(lambda x: lax.while_loop(lambda c: c[0] < 1e9, lambda c: (c[0] + 1, c[1] * 0.999), (0.0, x)))
        keep = f(jnp.ones(3)), jnp.sin(jnp.arange(10.0)), [jnp.ones(3) + i for i in range(50)]
        report()
        """,
        tmp_path,
        timeout=60,
    )
    assert "Traceback" not in ran.output


def test_a_forked_child_gets_an_error(tmp_path: Path) -> None:
    """After fork, a call returns an error instead of hanging. (A new compilation hangs in JAX 0.10 itself: its pool of threads is gone.)"""
    ran = run(
        """
        import os
        f = jax.jit(lambda x: x + 5)
        x = jnp.ones(3); jax.block_until_ready(f(x))
        r, w = os.pipe()
        if os.fork() == 0:
            try:
                np.asarray(f(x)); said = "nothing"
            except BaseException as error:
                said = str(error)
            os.write(w, said[:300].encode()); os._exit(0)
        os.wait()
        report(said=os.read(r, 400).decode())
        """,
        tmp_path,
        timeout=60,
    )
    assert "fork" in ran.report["said"]


def test_what_cannot_fit_is_refused() -> None:
    """MLX's CPU allocator does not check; a terabyte would be the end of the process."""
    with pytest.raises(Exception, match="GiB"):
        jax.block_until_ready(jax.jit(lambda: jnp.sin(jnp.arange(1 << 19, dtype=jnp.float32)[:, None] + jnp.arange(1 << 19, dtype=jnp.float32)) * 2)())


def test_exit_after_ordered_effects(tmp_path: Path) -> None:
    """JAX waits for its tokens at exit, when the plugin's own end is past: no error, nothing said."""
    ran = run(
        """
        from jax.experimental import io_callback
        f = jax.jit(lambda x: io_callback(lambda v: v, jax.ShapeDtypeStruct((), np.float32), x, ordered=True))
        report(value=float(f(np.float32(2))))
        """,
        tmp_path,
    )
    assert ran.report["value"] == 2
    assert "Exception" not in ran.output
