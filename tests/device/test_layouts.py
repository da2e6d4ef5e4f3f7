"""Layouts (`jax.experimental.layout`): JAX is told what it asked for, and values, donation and errors are those of its cpu backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device.programs import run
from jax.experimental.layout import Format, Layout, with_layout_constraint

import jax_mps

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
ORDER = (1, 2, 0)


def sharding(platform: str = "mps") -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(jax.devices(platform)[0])


def put(value: Any, order: tuple[int, ...] = ORDER) -> jax.Array:
    return jax.device_put(value, Format(Layout(order), sharding()))


def order(array: jax.Array) -> tuple[int, ...]:
    return array.format.layout.major_to_minor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "int4", "bool"])
def test_an_array_in_a_layout(dtype: str) -> None:
    """Its values are those that were put, whoever reads them."""
    value = X.astype(jnp.dtype(dtype))
    array = put(value)
    assert order(array) == ORDER
    np.testing.assert_array_equal(np.asarray(array), value)
    np.testing.assert_array_equal(np.asarray(array[1]), value[1])
    np.testing.assert_array_equal(np.asarray(jax.device_put(array, jax.devices("cpu")[0])), value)
    assert order(jax.device_put(array, sharding().with_memory_kind("pinned_host"))) == ORDER


def test_memory_is_row_major() -> None:
    """An address would show memory in another order, so there is none; `to_mlx` gives the value."""
    array = put(X)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"the memory of an array with the layout \{0,2,1\}"):
        array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(np.asarray(jax_mps.to_mlx(array)), X)


def compiled(f: Any, into: Any, out: Any) -> Any:
    return jax.jit(f, in_shardings=into, out_shardings=out).lower(X).compile()


def test_the_layouts_of_a_compiled_function() -> None:
    """What was asked for, and row-major where nothing was."""
    asked = Format(Layout(ORDER), sharding())
    plain = compiled(lambda x: (x * 2, x.sum()), None, None)
    assert [f.layout.major_to_minor for f in plain.input_formats[0]] == [(0, 1, 2)]
    assert [f.layout.major_to_minor for f in plain.output_formats] == [(0, 1, 2), ()]
    program = compiled(lambda x: x * 2, asked, asked)
    assert program.input_formats[0][0].layout.major_to_minor == program.output_formats.layout.major_to_minor == ORDER
    assert order(program(put(X))) == ORDER
    np.testing.assert_array_equal(np.asarray(program(put(X))), X * 2)
    with pytest.raises(ValueError, match="layouts that disagree"):
        program(jax.device_put(X, sharding()))


AUTOMATIC = {
    "elementwise": (lambda x: 2 - jnp.sin(x), ORDER),
    "transposed": (lambda x: x.T, (1, 0, 2)),
    "of one operand": (lambda x: jnp.broadcast_to(x.sum((1, 2), keepdims=True), x.shape) * x, ORDER),
    "constrained": (lambda x: with_layout_constraint(x + 1, Layout((2, 0, 1))), (2, 0, 1)),
    "another shape": (lambda x: x.reshape(4, 6), (0, 1)),
    "a called function": (lambda x: jax.jit(lambda y: jnp.where(y > 0, y, 0))(x), ORDER),
}


@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_layouts(name: str) -> None:
    """A result keeps the order of what it is made from where it has the same shape, or is its transpose; any other is row-major."""
    f, expected = AUTOMATIC[name]
    program = compiled(f, Format(Layout(ORDER), sharding()), Format(Layout.AUTO))
    result = program(put(X))
    assert order(result) == program.output_formats.layout.major_to_minor == expected
    np.testing.assert_array_equal(np.asarray(result), np.asarray(jax.jit(f)(jax.device_put(X, jax.devices("cpu")[0]))))


def test_donation() -> None:
    array = put(X)
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    assert array.is_deleted()
    np.testing.assert_array_equal(np.asarray(result), X + 1)


def test_tiles_are_refused() -> None:
    """A layout that is more than an order of dimensions."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="only an order of dimensions"):
        jax.device_put(X, Format(Layout(ORDER, tiling=((8, 128),)), sharding()))


def test_layouts_come_back_from_the_cache(tmp_path: Path) -> None:
    source = """
        from jax.experimental.layout import Format, Layout
        there = Format(Layout((1, 0)), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        value = jax.jit(lambda x: x @ x.T, out_shardings=there)(jnp.arange(6.0).reshape(2, 3))
        report(order=value.format.layout.major_to_minor, value=np.asarray(value).tolist())
    """
    first, second = (run(source, tmp_path, JAX_PLATFORMS="mps") for _ in range(2))
    assert first.report["order"] == second.report["order"] == [1, 0]
    assert first.report["value"] == second.report["value"]
    assert second.stats["disk_hits"] > 0


def test_sharded_programs(tmp_path: Path) -> None:
    """A program for several devices tells layouts as one for a single device does."""
    source = """
        from jax.experimental.layout import Format, Layout
        from jax.sharding import NamedSharding, PartitionSpec as P
        mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        there = Format(Layout((1, 0)), NamedSharding(mesh, P("x")))
        a = np.arange(32, dtype=np.float32).reshape(8, 4)
        put = jax.device_put(a, there)
        f = jax.jit(lambda x: x.T * 2, in_shardings=there, out_shardings=Format(Layout.AUTO)).lower(a).compile()
        result = f(put)
        report(put=put.format.layout.major_to_minor, result=result.format.layout.major_to_minor, value=np.asarray(result).tolist())
    """
    ran = run(source, tmp_path, JAX_PLATFORMS="mps", JAX_NUM_CPU_DEVICES="8")
    assert (ran.report["put"], ran.report["result"]) == ([1, 0], [0, 1])
    np.testing.assert_array_equal(ran.report["value"], np.arange(32).reshape(8, 4).T * 2)
