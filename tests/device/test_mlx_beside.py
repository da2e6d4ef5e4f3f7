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
