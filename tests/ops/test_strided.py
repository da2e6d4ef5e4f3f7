"""Strided copies in one kernel: its own source, compiled for the CPU, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import ctypes
import functools
import random

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from ops.harness import Case, assert_same, lowered, reference, results_of
from ops.kernels import in_turns, library, needs_compiler

from jax_mps.ops import shapes, strided
from jax_mps.ops.dtypes import MX

WORDS = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}


@functools.cache
def compiled(itemsize: int, ranks: tuple[int, ...], together: bool):
    """As `strided._kernel`, of arrays of words."""
    names = [f"x_{k}" for k in range(len(ranks))]
    outputs = ["y_0"] if together else [f"y_{k}" for k in range(len(ranks))]
    parameters = {"sizes": "uint32_t", **dict.fromkeys((*names, *outputs), WORDS[itemsize]), **dict.fromkeys((f"{n}_strides" for n in names), "int64_t")}
    run = library(in_turns(strided.source(itemsize, ranks, together=together), parameters), "-O1").run

    def kernel(sizes, views, written, blocks, threads):
        strides = [np.array(v.strides, np.int64) // itemsize for v in views]
        run(blocks, threads, (ctypes.c_void_p * len(parameters))(*(x.ctypes.data for x in (sizes, *views, *written, *strides))))

    return kernel


def in_place_of_cuda(dtype: str, ranks: tuple[int, ...], together: bool):
    """As `strided._kernel`."""

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[inputs[1].itemsize]
        sizes, *views = (np.asarray(x if x.dtype == bits or i == 0 else x.view(bits)) for i, x in enumerate(inputs))
        written = [np.full(shape, 0xA5, views[0].dtype) for shape in output_shapes]
        assert grid[0] % threadgroup[0] == 0 and tuple(v.ndim for v in views) == ranks
        compiled(views[0].itemsize, ranks, together)(sizes, views, written, grid[0] // threadgroup[0], threadgroup[0])
        return [mx.array(y).view(to) for y, to in zip(written, output_dtypes, strict=True)]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """Lowering for CUDA, with the kernel compiled for the CPU; the kernels that were used."""
    needs_compiler()
    used = []
    for module in (strided, shapes):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(strided, "_kernel", lambda *key: used.append(key) or in_place_of_cuda(*key))
    return used


R = np.random.default_rng(0)


def numbers(*shape: int, dtype: str = "float32") -> mx.array:
    return mx.array(R.integers(0, 2 if dtype == "bool" else 128, shape)).astype(MX[dtype])


def same(a: mx.array, b: mx.array) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype and mx.array_equal(a, b).item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
@pytest.mark.parametrize("width", [64, 3])
def test_heads(dtype, width, cuda) -> None:
    """Queries, keys and values out of one array, fewer heads of the latter; each block has a part of one of them."""
    x = numbers(2, 37, 8 * width, dtype=dtype)
    heads = [x[..., a * width : b * width].reshape(2, 37, b - a, width).swapaxes(1, 2) for a, b in ((0, 4), (4, 6), (6, 8))]
    for view, copy in zip(heads, strided.dense(heads), strict=True):
        same(copy, view)
    assert cuda == [(dtype, (4, 4, 4), False)]


@pytest.mark.parametrize("view", [
    lambda x: x, lambda x: x.T, lambda x: x[::-1], lambda x: x[:, ::2], lambda x: x[1:, 4:], lambda x: x[1:, 1:], lambda x: x[:, :1], lambda x: x[0],
    lambda x: x[:, 0], lambda x: mx.broadcast_to(x[:, :1], (24, 9)), lambda x: mx.broadcast_to(x[:4, None], (4, 5, 16)),
    lambda x: x.reshape(2, 3, 4, 2, 2, 2, 2).transpose(6, 3, 5, 0, 1, 2, 4),
])  # fmt: skip
def test_views(view, cuda) -> None:
    """Of any strides, beside one of another rank."""
    x = numbers(24, 16)
    v = view(x)
    mx.eval(v)
    for copy, of in zip(strided.dense([v, x[2:4].T[None]]), (v, x[2:4].T[None]), strict=True):
        same(copy, of)
    assert cuda


@pytest.mark.parametrize(("parts", "axis"), [
    ([(2, 5, 3, 8), (2, 5, 4, 8)], 2), ([(2, 5, 3, 8), (2, 5, 3, 4)], 3), ([(2, 5, 3, 8), (2, 5, 3, 3)], 3), ([(4, 6), (5, 6), (1, 6)], 0),
    ([(7,), (2100,)], 0), ([(8,), (2100,), (4,)], 0), ([(3, 1)] * 8, 1), ([(3, 2, 5), (3, 1, 5)], 1), ([(1, 400, 16), (1, 100, 16)], 1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_concatenations(parts, axis, dtype, cuda) -> None:
    """Each part transposed before."""
    views = [numbers(*shape[::-1], dtype=dtype).T for shape in parts]
    plain = [mx.array(v) for v in views]
    expected = mx.concatenate(plain, axis=axis)
    same(strided.concatenated(views, axis, expected.shape), expected)
    same(strided.concatenated(plain, axis, expected.shape), expected)
    assert cuda == [(dtype, tuple(map(len, parts)), True)] * 2


@pytest.mark.parametrize("width", [8, 5])
def test_lines_of_any_dimensions(width, cuda, monkeypatch) -> None:
    """From the axis on, each part has its own; by the kernel, and by MLX."""
    x, y, z = numbers(2, 3, 2, 7, width).transpose(0, 3, 2, 1, 4), numbers(2, 7, 4), numbers(7, 2, 1, 3).swapaxes(0, 1)
    expected = mx.concatenate([mx.reshape(v, (2, 7, -1)) for v in (x, y, z)], axis=2)
    same(strided.concatenated([x, y, z], 2, expected.shape), expected)
    same(strided.concatenated([x, x], 2, (2, 7, 4, 3, width)), mx.concatenate([x, x], axis=2))
    assert cuda == [("float32", (5, 3, 4), True), ("float32", (5, 5), True)]
    monkeypatch.setattr(strided, "MOST", 1)
    same(strided.concatenated([x, y, z], 2, expected.shape), expected)
    assert len(cuda) == 2


def test_divisors() -> None:
    """Quotients of all 31 bits, by any number."""
    for d in [1, 2, 3, 5, 7, 12, 64, 641, 50304, 2**16 + 1, 2**30, 2**31 - 1, *(random.Random(d).randrange(1, 2**31) for d in range(200))]:
        factor, shift = strided._divisor(d)
        assert 0 < factor < 2**32
        for n in (0, 1, d - 1, d, d + 1, 7 * d - 1, 7 * d, 2**31 - 1, 2**31 // d * d - 1, 2**31 // d * d, 123456789):
            n %= 2**31
            assert (n * factor >> 32) + n < 2**32 and ((n * factor >> 32) + n) >> shift == n // d


def test_fits(monkeypatch) -> None:
    many = [(2, 3)] * strided.MOST
    assert not strided.fits("float32", many)
    monkeypatch.setattr(strided, "device_kind", lambda: "cuda")
    assert strided.fits("float32", many) and strided.fits("float16", [(2**30,), (3, 2**28)])
    assert not strided.fits("float32", [*many, (2,)])
    assert not strided.fits("complex64", many) and not strided.fits("float32", [(2,), ()]) and not strided.fits("float32", [(1,) * 9])
    assert not strided.fits("float32", [(2**30,), (2**30,)]) and not strided.fits("float32", [(2,), (0, 3)]) and not strided.fits("float32", [])


def test_in_programs(cuda) -> None:
    """Concatenations that JAX writes."""
    x, y = R.normal(size=(2, 8, 300)).astype(np.float32)
    case = Case("concatenation", lambda x, y: jnp.concatenate([x.T, jnp.sin(y).T, x.T[:, :0], y[:3].T], 1), (x, y))
    plan, program, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)
    assert cuda == [("float32", (2, 2, 2), True)]
