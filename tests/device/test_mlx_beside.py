"""MLX used by the user before, beside and after JAX in one process; and arrays that pass between them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from device.programs import run

import jax_mps

BESIDE = """
import threading
import mlx.core as mx

def mlx_work():
    return float(mx.sum(mx.arange(10) * 2))

{before}
f = jax.jit(lambda x: jnp.sin(x) @ x)
def jax_work():
    return float(f(np.arange(4, dtype="float32")))

first = [jax_work(), mlx_work()]
found = []
threads = [threading.Thread(target=lambda: found.append((jax_work(), mlx_work()))) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
report(first=first, found=found, last=[jax_work(), mlx_work()])
"""


@pytest.mark.parametrize("before", ["", "mlx_work()"], ids=["MLX after JAX", "MLX before JAX"])
def test_mlx_beside_jax(tmp_path: Path, before: str) -> None:
    """Both work in every thread, whoever came first."""
    ran = run(BESIDE.format(before=before), tmp_path)
    x = np.arange(4, dtype=np.float32)
    want = [pytest.approx(float(np.sin(x) @ x), rel=1e-6), 90.0]
    assert ran.report["first"] == want
    assert ran.report["last"] == want
    assert [list(f) for f in ran.report["found"]] == [want] * 3


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 2)], ids=str)
def test_arrays_pass_over(dtype: str, shape: tuple[int, ...]) -> None:
    """`from_mlx` and `to_mlx` keep values, shapes and dtypes; large arrays keep their memory."""
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    ours = mx.array(value.view(np.uint16)).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(value)
    there = jax_mps.from_mlx(ours)
    assert there.devices() == {jax.devices("mps")[0]}
    assert (there.shape, there.dtype) == (shape, value.dtype)
    np.testing.assert_array_equal(np.asarray(there), value)
    back = jax_mps.to_mlx(there + 0 if dtype != "bool" else there)
    assert tuple(back.shape) == shape


def test_an_array_of_another_platform_is_refused() -> None:
    with pytest.raises(ValueError, match="no buffer of mps"):
        jax_mps.to_mlx(jax.device_put(np.ones(3), jax.devices("cpu")[0]))


def test_not_an_mlx_array() -> None:
    with pytest.raises(TypeError, match="mlx"):
        jax_mps.from_mlx(jnp.ones(3))


# ---- DLPack ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 2)], ids=str)
def test_arrays_leave_through_dlpack(dtype: str, shape: tuple[int, ...]) -> None:
    """JAX's own reader asks for a version without a flag for read-only memory, NumPy for one with it."""
    x = jnp.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype))
    readers = [jax.dlpack.from_dlpack] if dtype == "bfloat16" else [jax.dlpack.from_dlpack, np.from_dlpack]
    for reader in readers:
        there = reader(x)
        assert (there.shape, there.dtype) == (shape, x.dtype)
        np.testing.assert_array_equal(np.asarray(there), np.asarray(x))


def test_what_leaves_is_the_array_s_own_memory() -> None:
    x = jnp.arange(6.0) * 2
    there = np.from_dlpack(x)
    assert there.__array_interface__["data"][0] == x.unsafe_buffer_pointer()
    assert not there.flags.writeable
    del x  # the reader keeps it
    np.testing.assert_array_equal(there, np.arange(6.0) * 2)


def test_a_copy_is_a_copy() -> None:
    x = jnp.arange(6.0)
    there = np.from_dlpack(x, copy=True)
    assert there.__array_interface__["data"][0] != x.unsafe_buffer_pointer()
    there[:] = 0
    assert float(x.sum()) == 15


def test_what_dlpack_cannot_do() -> None:
    x = jnp.arange(6.0)
    assert x.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError, match="kDLCPU"):
        x.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError, match="bfloat16"):
        x.astype(jnp.bfloat16).__dlpack__(copy=False)
    x.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        x.__dlpack__()
    on_cpu = jax.device_put(np.ones(3, np.float32), jax.devices("cpu")[0])
    np.testing.assert_array_equal(np.from_dlpack(on_cpu), np.ones(3))
