"""JAX itself on the shim, with the toy in place of the Python half."""

import gc
import threading
import time

import numpy as np
from shim import toy
from shim.toy import counts, log

jax = toy.start()
jnp = jax.numpy


def fails(call, *words):
    try:
        call()
    except Exception as error:
        assert all(word in str(error) for word in words), str(error)
        return
    raise AssertionError("no error")


def case_device():
    device = jax.devices()[0]
    assert (device.platform, device.device_kind, str(device)) == ("mps", "toy", "ToyDevice(id=0)")
    assert device.memory_stats()["bytes_limit"] == 9
    assert device.default_memory().kind == "device"
    assert device.toy == 1


def case_arithmetic():
    """Programs with several inputs and outputs give the numbers of numpy."""
    x = jax.device_put(np.arange(12, dtype=np.float32).reshape(3, 4))
    y, z = jax.jit(lambda x: (jnp.sin(x) * 2 + 1, -x))(x)
    np.testing.assert_allclose(y, np.sin(np.asarray(x)) * 2 + 1, rtol=1e-6)
    np.testing.assert_array_equal(z, -np.asarray(x))


def case_numpy_aliases():
    """np.asarray does not copy, and its memory outlives the array."""
    x = jax.jit(lambda x: x + 1)(jax.device_put(np.arange(4, dtype=np.float32)))
    host = np.asarray(x)
    assert host.ctypes.data == x.unsafe_buffer_pointer()
    x.delete()
    del x
    gc.collect()
    np.testing.assert_array_equal(host, [1, 2, 3, 4])


def case_donation():
    """JAX sees that a donated argument is gone."""
    x = jax.device_put(np.arange(4, dtype=np.float32))

    def donate(x):
        return x * 2

    y = jax.jit(donate, donate_argnums=0)(x)
    assert x.is_deleted()
    np.testing.assert_array_equal(y, [0, 2, 4, 6])


def case_block_until_ready():
    """block_until_ready waits for a job, and is_ready does not."""

    def wait_job(x):
        return x + 1

    f = jax.jit(wait_job)
    x = jax.device_put(np.zeros(4, np.float32))
    f(x).block_until_ready()
    toy.gate.clear()
    y = f(x)
    z = y * 2
    assert not z.is_ready()
    threading.Timer(0.1, toy.gate.set).start()
    start = time.monotonic()
    z.block_until_ready()
    assert time.monotonic() - start > 0.05
    assert z.is_ready()
    while not y.is_ready():  # asking starts its own evaluation
        time.sleep(0.001)
    np.testing.assert_array_equal(z, 2 * np.ones(4))


def case_errors():
    """A failed evaluation is raised where JAX waits, with the exception's text; a failed call where it is called."""
    x = jax.device_put(np.full(4, 666, np.float32))
    y = jax.jit(jnp.sin)(x)
    fails(y.block_until_ready, "ArithmeticError", "sine of 666")
    fails(lambda: np.asarray(y), "sine of 666")
    fails(lambda: jax.jit(jnp.cos)(x), "cosine of 666")

    def job(x):
        return jnp.cos(x)

    z = jax.jit(job)(x)
    fails((z + 1).block_until_ready, "cosine of 666")


def case_callback_in_a_job():
    """A program that runs inside a job, on the executor, may use JAX."""
    seen = []

    def execute(exe, args):
        if exe.name == "jit_calling_job":
            inner = jax.jit(lambda x: x * 3)(jax.device_put(np.ones(4, np.float32)))
            seen.append(np.asarray(inner))
        return toy.execute(exe, args)

    def calling_job(x):
        return x + 1

    toy.install(execute=execute)
    y = jax.jit(calling_job)(jax.device_put(np.zeros(4, np.float32)))
    np.testing.assert_array_equal(y, np.ones(4))
    np.testing.assert_array_equal(seen[0], 3 * np.ones(4))
    toy.install()


def case_host_layouts():
    """Arrays arrive right from every numpy layout, and copies and the empty array too."""
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for array in (base, base.T, base[:, ::-1], base[..., ::2], base[:0], np.float32(3), np.asfortranarray(base)):
        x = jax.device_put(array)
        np.testing.assert_array_equal(x, array)
        np.testing.assert_array_equal(jax.device_put(x, jax.devices()[0], may_alias=False), array)
        np.testing.assert_array_equal(jax.device_put(x, jax.devices("cpu")[0]), array)


def case_serialization():
    """An executable goes through bytes and comes back."""
    from jax.experimental import serialize_executable

    x = jax.device_put(np.arange(4, dtype=np.float32))
    compiled = jax.jit(lambda x: x * 5).lower(x).compile()
    assert compiled.cost_analysis()["flops"] == 3.0
    assert compiled.memory_analysis().argument_size_in_bytes == 16
    assert compiled.as_text() is None
    loaded = serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
    np.testing.assert_array_equal(loaded(x), [0, 5, 10, 15])


def case_threads():
    """Eight threads compile, run and read."""
    errors = []

    def work(seed):
        try:
            for i in range(12):
                f = jax.jit(lambda x, k=seed * 100 + i: jnp.sin(x) + np.float32(k))

                def job(x, k=seed * 100 + i):
                    return x * np.float32(k)

                x = jax.device_put(np.arange(4, dtype=np.float32))
                np.testing.assert_allclose(f(x), np.sin(np.arange(4)) + seed * 100 + i, rtol=1e-5)
                np.testing.assert_allclose(jax.jit(job)(f(x) * 0 + 1), np.full(4, seed * 100 + i), rtol=1e-5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def case_nothing_is_left():
    """Dropping arrays and programs leaves no buffer, event or executable."""
    jax.clear_caches()
    gc.collect()
    toy.lib.shim_drain(1000)
    before = counts()
    f = jax.jit(lambda x: x * 7 + 1)

    def job(x):
        return -x

    g = jax.jit(job)
    for _ in range(50):
        x = jax.device_put(np.arange(4, dtype=np.float32))
        y = g(f(x))
        np.asarray(y)
        (x + y).block_until_ready()
    del x, y, f, g
    jax.clear_caches()
    gc.collect()
    toy.lib.shim_drain(1000)
    after = counts()
    for name in ("buffers", "lazy", "pending", "events", "executables"):
        assert after[name] <= before[name], (name, before, after)


def case_backends_can_be_cleared():
    """After clear_backends a new client is made, and arrays of the old one can still be let go."""
    from jax.extend import backend

    old = jax.device_put(np.arange(4, dtype=np.float32))
    log.clear()
    backend.clear_backends()
    new = jax.device_put(np.arange(4, dtype=np.float32))
    np.testing.assert_array_equal(new + 1, [1, 2, 3, 4])
    del old, new
    gc.collect()
