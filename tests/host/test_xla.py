"""Host segments: every dtype and shape in and out of the private XLA CPU client, whatever JAX's flags are."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_mps.errors import INTERNAL, INVALID_ARGUMENT, NOT_FOUND
from jax_mps.host import xla
from jax_mps.host.xla import HostError, HostFunction, host_function
from jax_mps.pjrt.buffer import HOST, from_host
from jax_mps.pjrt.types import NUMBERS
from jax_mps.plan.types import MLIR_NAMES, Step, TensorType, Value, numpy_dtype

Array = np.ndarray[Any, Any]


def elementwise(name: str, *operands: TensorType) -> HostFunction:
    """A function of one op whose result has the first operand's type."""
    values = [Value(t) for t in operands]
    result = Value(operands[0])
    return host_function(values, [Step(name, tuple(values), (result,), text=())], [result])


def identity(kind: TensorType) -> HostFunction:
    value = Value(kind)
    return host_function([value], [], [value])


# XLA's CPU compiler has no such elements in 0.10 to 0.12.
REFUSED = {"float6_e2m3fn", "float6_e3m2fn"}
DTYPES = sorted(set(MLIR_NAMES) - {"token"} - REFUSED)


@pytest.mark.parametrize("shape", [(5,), (), (0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(dtype: str, shape: tuple[int, ...]) -> None:
    """64-bit elements too, though JAX's x64 flag is off."""
    flat = np.arange(int(np.prod(shape)) or 1) % 3
    value = np.resize(flat.astype(np.float32).astype(numpy_dtype(dtype)), shape)
    [result] = identity(TensorType(shape, dtype))([value])
    assert (result.dtype, result.shape, result.tobytes()) == (value.dtype, value.shape, value.tobytes())


@pytest.mark.parametrize("dtype", ["float64", "complex128", "int64", "bfloat16", "float8_e5m2", "int4"])
def test_it_computes(dtype: str) -> None:
    """1 + 1 in dtypes that MLX lacks."""
    one = np.ones(3, numpy_dtype(dtype))
    kind = TensorType((3,), dtype)
    [result] = elementwise("stablehlo.add", kind, kind)([one, one])
    np.testing.assert_array_equal(result.astype(np.complex128), 2)


@pytest.mark.parametrize(
    "value",
    [np.arange(12.0).reshape(3, 4).T, np.arange(24.0)[::2], np.arange(12.0)[::-1], np.broadcast_to(1.5, (3, 2))],
    ids=["transposed", "strided", "reversed", "broadcast"],
)  # fmt: skip
def test_any_strides(value: Array) -> None:
    """Inputs need not be contiguous."""
    [result] = identity(TensorType(value.shape, "float64"))([value])
    np.testing.assert_array_equal(result, value)


def test_a_result_does_not_share_memory_with_an_input() -> None:
    """Inputs may be MLX's memory, which is used again."""
    raw = np.zeros(4096 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    value = raw[start : start + 4096].view(np.float32)  # aligned: XLA reads it in place
    [result] = identity(TensorType(value.shape, "float32"))([value])
    value[:] = 7
    np.testing.assert_array_equal(result, 0)


def test_tokens_are_taken_and_given() -> None:
    """They hold nothing, and have their places all the same."""
    token, x = Value(TensorType((), "token")), Value(TensorType((2,), "float32"))
    after = Value(TensorType((), "token"))
    function = host_function([token, x], [Step("stablehlo.after_all", (token,), (after,), text=())], [after, x, token])
    results = function([np.zeros((), bool), np.float32([1, 2])])
    assert [r.dtype.name for r in results] == ["bool", "float32", "bool"]


def test_no_results() -> None:
    """A function that returns nothing runs all the same."""
    assert host_function([Value(TensorType((2,), "float32"))], [], [])([np.zeros(2, np.float32)]) == []


def test_threads() -> None:
    """One function, compiled and called by eight threads at once."""
    kind = TensorType((1000,), "float64")
    function = elementwise("stablehlo.add", kind, kind)
    start = threading.Barrier(8)

    def work(number: int) -> bool:
        start.wait()
        return all(bool((function([np.full(1000, number), np.full(1000, i)])[0] == number + i).all()) for i in map(float, range(30)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, map(float, range(8))))


def test_equal_programs_share_one_executable() -> None:
    """Until the last function that uses it is gone."""
    kind = TensorType((3,), "uint16")
    first, second = (elementwise("stablehlo.multiply", kind, kind) for _ in range(2))
    assert first.artifact == second.artifact
    gc.collect()
    before = len(xla._executables)
    first.compile()
    second.compile()
    assert len(xla._executables) == before + 1
    del first, second
    gc.collect()
    assert len(xla._executables) == before


@pytest.mark.parametrize(
    ("artifact", "code"),
    [(b"", INVALID_ARGUMENT), (b"ML\xefRgarbage", INVALID_ARGUMENT), (identity(TensorType((), "int8")).artifact[:100], INVALID_ARGUMENT)],
    ids=["empty", "garbage", "truncated"],
)  # fmt: skip
def test_damaged_artifacts_are_errors(artifact: bytes, code: int) -> None:
    """Never a crash."""
    with pytest.raises(HostError) as caught:
        HostFunction(artifact, [], []).compile()
    assert caught.value.code in (code, INTERNAL)


def test_an_unknown_custom_call() -> None:
    """XLA's own words and code."""
    x, y = Value(TensorType((2,), "float32")), Value(TensorType((2,), "float32"))
    step = Step("stablehlo.custom_call", (x,), (y,), {"call_target_name": "nosuch"}, text=(("call_target_name", '"nosuch"'),))
    with pytest.raises(HostError, match="nosuch") as caught:
        host_function([x], [step], [y]).compile()
    assert caught.value.code == NOT_FOUND


def test_a_step_that_does_not_verify() -> None:
    """The error comes at translation, not at the first run."""
    x, y = Value(TensorType((2,), "float32")), Value(TensorType((3,), "int32"))
    with pytest.raises(HostError, match="serialising"):
        host_function([x], [Step("stablehlo.sine", (x,), (y,), text=())], [y])


_FRESH = """
import numpy as np
from jax_mps.host.xla import HostFunction
from jax_mps.plan.types import TensorType
f = HostFunction(bytes.fromhex({artifact!r}), [TensorType((2, 2), "float64")], [TensorType((2, 2), "float64"), TensorType((), "int32")])
print(f([np.array([[4.0, 0], [2.0, 5.0]])])[0].tolist())
"""


def test_lapack_in_a_process_that_never_used_it() -> None:
    """Without LAPACK's initialisation, the run would be a segmentation fault."""
    x = Value(TensorType((2, 2), "float64"))
    y, info = Value(x.type), Value(TensorType((), "int32"))
    column_major = "[dense<[0, 1]> : tensor<2xindex>"
    text = (
        ("call_target_name", '"lapack_dpotrf_ffi"'), ("mhlo.backend_config", "{uplo = 76 : ui8}"),
        ("operand_layouts", column_major + "]"), ("result_layouts", column_major + ", dense<> : tensor<0xindex>]"),
    )  # fmt: skip
    function = host_function([x], [Step("stablehlo.custom_call", (x,), (y, info), {"call_target_name": "lapack_dpotrf_ffi"}, text=text)], [y, info])
    done = subprocess.run([sys.executable, "-c", _FRESH.format(artifact=function.artifact.hex())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[2.0, ")


def test_ml_dtypes_are_theirs() -> None:
    """A bfloat16 result is ml_dtypes', not bytes."""
    [result] = identity(TensorType((2,), "bfloat16"))([np.ones(2, ml_dtypes.bfloat16)])
    assert result.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(("dtype", "dims"), [("float64", (5,)), ("complex128", ()), ("float64", (0, 3)), ("int4", (2, 3)), ("float8_e4m3fn", (7,))])
def test_values_from_the_host_lie_where_xla_reads_them(dtype: str, dims: tuple[int, ...]) -> None:
    """Host dtypes are kept at addresses that XLA takes as they are, not those that it copies from at each run."""
    array = np.arange(np.prod(dims), dtype=np.float32).reshape(dims).astype(numpy_dtype(dtype))
    value, state = from_host(memoryview(array.tobytes()), NUMBERS[dtype], dims)
    assert state == HOST
    assert value.size == 0 or value.ctypes.data % 64 == 0
    assert value.dtype == array.dtype
    np.testing.assert_array_equal(value.astype(np.complex128), array.astype(np.complex128))
