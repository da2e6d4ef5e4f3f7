"""Element types that MLX lacks, and the collectives of one device: the numbers of JAX's cpu backend, bit for bit, through the plugin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Function = Callable[..., Any]

MPS, CPU = jax.devices("mps")[0], jax.devices("cpu")[0]


def on(device: jax.Device, f: Function, *arguments: Any) -> list[np.ndarray[Any, Any]]:
    with jax.default_device(device):
        results = jax.jit(f)(*(jax.device_put(a, device) for a in arguments))
        return [np.asarray(r) for r in jax.tree.leaves(results)]


def check(f: Function, *arguments: Any) -> None:
    """Equal dtypes, shapes and bits on both."""
    for index, (got, want) in enumerate(zip(on(MPS, f, *arguments), on(CPU, f, *arguments), strict=True)):
        assert (got.dtype, got.shape) == (want.dtype, want.shape), index
        assert got.tobytes() == want.tobytes(), f"result {index}: {got}, expected {want}"


# ---- element types -------------------------------------------------------------------------------------------------------------

INTEGERS = ["int2", "int4", "uint2", "uint4"]
FLOATS = [
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float4_e2m1fn",
]
WIDE = ["float64", "complex128"]
DTYPES = [*INTEGERS, *FLOATS, "float8_e8m0fnu", *WIDE]

FUNCTIONS: dict[str, Function] = {
    "arithmetic": lambda x: (x + x, x * x, x - x[::-1], -x),
    "same": lambda x: x,
    "to others": lambda x: [x.astype(d) for d in ("float32", "int32", "bfloat16", "bool", "uint8")],
    "from float32": lambda x: jnp.linspace(-1.0, 3.0, 9, dtype="float32").astype(x.dtype),
    "from int32": lambda x: jnp.arange(1, 9, dtype="int32").astype(x.dtype),
    "maximum": lambda x: (jnp.max(x), jnp.min(x)),
    "product of matrices": lambda x: (x @ x, jnp.outer(x, x)),
    "selection": lambda x: jnp.where(x != x[::-1], x, x[::-1]),
    "order": lambda x: jnp.sort(x),
    "indices": lambda x: (x[jnp.array([2, 0, 1])], x[1:3], jnp.tile(x, 2)),
    "joined": lambda x: jnp.concatenate([x, x]),
    "update": lambda x: x.at[1].set(x[4]),
    "loop": lambda x: lax.fori_loop(0, 3, lambda i, c: c + x, x),
    "mixed": lambda x: jnp.sin(x.astype("float32")) * 2 + x.astype("float32"),
}
SUM = {"sum": lambda x: (jnp.sum(x), jnp.cumsum(x))}  # JAX has no sum of a type narrower than a byte
LEFT_OUT = {
    "complex128": {"to others"},  # discards imaginary parts
    "int2": {"joined", "order"},  # XLA's CPU backend itself ends the process over the one, and sorts garbage (jaxlib 0.10.2)
    "uint2": {"joined", "order"},
}


def values(dtype: str) -> np.ndarray[Any, Any]:
    low = [1, 1, 2, 1, 1] if "e8m0" in dtype else [1, 0, 1, 2, 1] if dtype.startswith("uint") else [1, 0, 1, -1, 1]
    return np.array(low).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(dtype: str) -> None:
    table = {**FUNCTIONS, **({} if dtype in INTEGERS else SUM)}
    kept = [f for name, f in table.items() if name not in LEFT_OUT.get(dtype, ())]
    with jax.enable_x64(dtype in WIDE):
        check(lambda x: [f(x) for f in kept], values(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(dtype: str) -> None:
    """NumPy to device to NumPy keeps the bits: all values of a narrow type, an empty array, a scalar."""
    count = {"int2": 4, "uint2": 4, "int4": 16, "uint4": 16, "float4_e2m1fn": 16}.get(dtype, 256)
    every = np.arange(count, dtype=np.uint8).view(jnp.dtype(dtype)) if dtype not in WIDE else np.linspace(-3, 1e300, 256).astype(dtype)
    with jax.enable_x64(dtype in WIDE):
        for array in (every, every.reshape(2, -1).T, every[:0], every[3]):
            back = np.asarray(jax.device_put(array, MPS))
            assert (back.dtype, back.shape) == (array.dtype, array.shape)
            assert back.tobytes() == np.asarray(array).tobytes()


def test_x64() -> None:
    """Numbers that float32 and int32 cannot hold, alone and beside device types."""
    with jax.enable_x64(True):
        x = np.linspace(0.1, 2, 24).reshape(4, 6)
        table: list[Function] = [
            lambda x: jnp.sum(x * 1e200),
            lambda x: jnp.sin(x) @ jnp.cos(x).T,
            lambda x: x.astype("float32") + x.astype("complex128").imag.astype("float32"),
            lambda x: (x * 1e12).astype("int64") * 3,
            lambda x: jnp.argmax(x, axis=1),
            lambda x: jnp.fft.fft(x),
            lambda x: lax.while_loop(lambda c: c[0] < 1.5, lambda c: (c[0] * 1.1, c[1] + c[0]), (x[0, 0] + 1, x))[1],
            jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)),
            lambda x: jax.random.normal(jax.random.key(0), (3,), "float64") + x[0, :3],
        ]
        for f in table:
            for got, want in zip(on(MPS, f, x), on(CPU, f, x), strict=True):
                assert got.dtype == want.dtype
                np.testing.assert_allclose(got, want, rtol=1e-6 if got.dtype == np.float32 else 1e-13)


def test_a_concatenation_of_two_bit_integers_is_refused() -> None:
    """XLA's CPU compiler ends the process over it."""
    with pytest.raises(Exception, match=r"stablehlo.concatenate.*MLX has no int2"):
        on(MPS, lambda x: jnp.concatenate([x, x]), values("int2"))


def test_arrays_that_pjrt_has_no_number_for() -> None:
    """Said so, and not a KeyError. (JAX's cpu backend, which is no plugin, has arrays of it from 0.11 on.)"""
    with pytest.raises(Exception, match="float6_e2m3fn"):
        on(MPS, lambda x: x.astype("float6_e2m3fn"), np.ones(3, np.float32))


@pytest.mark.parametrize("source", ["float32", "bfloat16", "int32"])
def test_zero_in_a_type_without_one(source: str) -> None:
    """float8_e8m0fnu has powers of two only, no sign and no zero."""
    x = np.array([0, 1, 2, 3, 5, 127, -1]) if source == "int32" else np.array([0, -0.0, 1, 0.75, 3, 1e-38, 3e38, np.inf, np.nan, -1])
    check(lambda x: (x.astype(jnp.float8_e8m0fnu), x.astype(jnp.float8_e8m0fnu).astype(jnp.float32)), jnp.asarray(x, source))


# ---- collectives of one device ---------------------------------------------------------------------------------------------------

COLLECTIVES: dict[str, Function] = {
    "psum": lambda x: lax.psum(x, "i"),
    "pmean": lambda x: lax.pmean(x, "i"),
    "pmax": lambda x: lax.pmax(x, "i"),
    "pmin": lambda x: lax.pmin(x, "i"),
    "all_gather": lambda x: lax.all_gather(x, "i"),
    "all_gather tiled": lambda x: lax.all_gather(x, "i", tiled=True),
    "psum_scatter": lambda x: lax.psum_scatter(x, "i", tiled=True),
    "all_to_all": lambda x: lax.all_to_all(x, "i", 0, 0, tiled=True),
    "ppermute": lambda x: lax.ppermute(x, "i", [(0, 0)]),
    "ppermute to nobody": lambda x: lax.ppermute(x, "i", []),
    "pshuffle": lambda x: lax.pshuffle(x, "i", [0]),
    "axis_index": lambda x: x * 0 + lax.axis_index("i").astype(x.dtype),
    "axis_size": lambda x: x * lax.axis_size("i"),
    "gradient": lambda x: jax.grad(lambda y: jnp.sum(lax.psum(jnp.sin(y), "i")))(x),
}
X = np.arange(6, dtype=np.float32).reshape(2, 3) + 1


@pytest.mark.parametrize("name", COLLECTIVES)
def test_shard_map(name: str) -> None:
    f = COLLECTIVES[name]

    def run(device: jax.Device) -> np.ndarray[Any, Any]:
        mesh = Mesh(np.array([device]), ("i",))
        x = jax.device_put(X, NamedSharding(mesh, P("i")))
        return np.asarray(jax.jit(partial(jax.shard_map, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)(f))(x))

    np.testing.assert_allclose(run(MPS), run(CPU), rtol=1e-6)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_pmap(name: str) -> None:
    f = COLLECTIVES[name]
    got, want = (np.asarray(jax.pmap(f, "i", devices=[d])(X[None])) for d in (MPS, CPU))
    np.testing.assert_allclose(got, want, rtol=1e-6)
