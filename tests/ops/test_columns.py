"""Sums over rows: the kernel's own source, compiled for the CPU, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, reference, results_of
from ops.kernels import in_turns, library, needs_compiler
from rewrites.proof import fused

from jax_mps.ops import columns
from jax_mps.rewrites import columns as sums_of_columns


@functools.cache
def compiled(dtype: str, width: int, kind: str, counted: bool, backwards: bool = False):
    """As `columns._kernel`; backwards: the last block first."""
    name = columns._TYPES[dtype]
    two, less = "xy" in kind or "xc" in kind, "c" in kind
    read = {"sizes": "uint32_t", "x": name} | ({"y": name} if two else {}) | ({"less": "float"} if less else {}) | ({"arrived": "uint32_t"} if counted else {})
    parameters = {name: f"const {kind}" for name, kind in read.items()} | {"total": "float"} | ({"done": "float"} if counted else {})
    loaded = library(in_turns(columns.source(dtype, width, kind, counted), parameters), "-O1")

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        assert threadgroup == (256, 1, 1) and {*output_dtypes} == {mx.float32}
        arrays = [np.array(x) for x in inputs] + [np.full(shape, np.nan, np.float32) for shape in output_shapes]
        ctypes.c_bool.in_dll(loaded, "backwards").value = backwards
        loaded.run(grid[0] // 256, 256, (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)))
        assert all(np.array_equal(np.array(x), a) for x, a in zip(inputs, arrays, strict=False)), "wrote what it reads"
        return [mx.array(a) for a in arrays[len(inputs) :]]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """The plan and its lowering for CUDA, of arrays of any size; the kernels that were used."""
    needs_compiler()
    used = []
    for module in (columns, sums_of_columns):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(columns, "_FEWEST", 64)
    monkeypatch.setattr(columns, "_BLOCKS", 4)
    monkeypatch.setattr(columns, "_kernel", lambda *key: used.append(key) or compiled(*key))
    return used


R = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return R.normal(1.0, 1.0, shape).astype(dtype)


def run(f, *args, names=()):
    """The results on the plan for CUDA, checked against JAX on the CPU; names: the rewritten steps."""
    case = Case("columns", f, args, rtol=2e-6, atol=1e-4)
    plan, program, arguments = lowered(case, rewritten=True)
    assert names is None or fused(plan) == list(names)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)


@pytest.mark.parametrize("shape", [(4100, 8), (37, 4), (5, 64, 12), (9, 130), (301, 3), (2048, 1), (1000, 7), (64, 1030)])
def test_sums_of_rows(shape, cuda) -> None:
    run(lambda x: lax.reduce(x, 0.0, lax.add, tuple(range(len(shape) - 1))), normal(*shape), names=["column_sums"])
    assert [kind for *_, kind, _ in cuda] == ["x"]


def test_other_dimensions(cuda) -> None:
    """What is summed besides rows, and what is too small or no float."""
    run(lambda x: (x.sum(1), x.sum((0, 2)), x[:2, :2].sum(0), x.astype(np.int32).sum(0), x.max(0)), normal(8, 9, 10))
    assert not cuda


def test_halves(cuda) -> None:
    """Read as they are, summed in float32."""
    x = normal(200, 16, dtype="float16")
    run(lambda x: x.astype(np.float32).sum(0), x, names=["column_sums"])
    assert cuda == [("float16", 8, "x", False)]


def batch_norm(x):
    mean, square = x.mean((0, 1)), (x * x).mean((0, 1))
    return mean, square - mean * mean


def two_passes(x):
    mean = x.mean(0)
    return mean, jnp.square(x - mean).mean(0)


def gradients(x, g, mean):
    """As of batch norm's scale and bias."""
    return g.sum((0, 1)), (g * (x - mean)).sum((0, 1))


@pytest.mark.parametrize(("f", "args", "kinds"), [
    (batch_norm, (normal(40, 6, 8),), ["x,xx"]),
    (two_passes, (normal(300, 5),), ["x", "cc"]),
    (gradients, (normal(9, 40, 12), normal(9, 40, 12), normal(12)), ["x,xc"]),
    (gradients, (normal(9, 40, 12), normal(9, 40, 12), normal(1, 1, 12)), ["x,xc"]),
    (lambda x, g, mean, r, s: (g.sum((0, 1)), (g * ((x - mean) / r * s)).sum((0, 1))), (normal(9, 40, 12), normal(9, 40, 12), *[normal(12) + 9] * 3), ["x,xc"]),
    (lambda x, y: (x * y).sum(0), (normal(77, 6), normal(77, 6)), ["xy"]),
    (lambda x, y: ((x * y).sum(0), y.sum(0)), (normal(77, 6), normal(77, 6)), ["x,xy"]),
    (lambda x, y: ((x * y).sum(0), y.sum(0), (y * y).sum(0)), (normal(77, 6), normal(77, 6)), ["x,xy", "xx"]),
    (lambda x, y, m: (x * (y - m)).sum(0), (normal(33, 10), normal(33, 10), normal(10)), ["xc"]),
    (lambda x, y, m, r: (lambda c: ((c / r) * (x * m)).sum(0) + m)(y - m), (normal(33, 10), normal(33, 10), normal(10), np.full(10, 3, np.float32)), ["xc"]),
    (lambda x, y, r: ((x * r) * (y * r)).sum(0), (normal(77, 6), normal(77, 6), normal(6)), ["xy"]),
    (lambda x, y, m: ((y - m) * x).sum(0), (normal(33, 2, 5), normal(33, 2, 5), normal(2, 5)), ["xc"]),
])  # fmt: skip
def test_sums_of_products(f, args, kinds, cuda) -> None:
    run(f, *args, names=["column_sums"] * len(kinds))
    assert sorted(kind for *_, kind, _ in cuda) == sorted(kinds)


@pytest.mark.parametrize("f", [
    lambda x, y, m: (jnp.exp(x) * y).sum(0),  # what a kernel makes on its way
    lambda x, y, m: (x * m).sum(0),  # a row, repeated
    lambda x, y, m: (x * (y - m[:, None])).sum(0)[:5],  # less along another dimension
    lambda x, y, m: (lambda p: (p.sum(0), lax.sort(p)))(x * y),  # the product itself is read
    lambda x, y, m: (x * y).sum(1),
    lambda x, y, m: lax.reduce(x * y, np.float32(1), lax.add, (0,)),
    lambda x, y, m: (x.T * y.T).T.sum(0)[:1],
])  # fmt: skip
def test_near_misses(f, cuda) -> None:
    run(f, normal(10, 10), normal(10, 10), normal(10), names=None)
    assert all(kind == "x" for *_, kind, _ in cuda)


def test_gradient_of_batch_norm(cuda) -> None:
    """As flax writes it: forward, and the sums that the gradients of scale, bias and input are made of."""

    def norm(x, scale, bias):
        mean, variance = batch_norm(x)
        return jax.nn.relu((x - mean) * (lax.rsqrt(variance + 1e-5) * scale) + bias)

    def f(x, scale, bias, weights):
        return jax.grad(lambda *p: jnp.sum(jnp.square(norm(*p) @ weights)), (0, 1, 2))(x, scale, bias)

    case = Case("norm", f, (normal(16, 5, 8), normal(8), normal(8), normal(8, 3)), rtol=1e-4, atol=1e-2)  # products, and gradients of what nearly cancels
    plan, program, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)
    assert [kind for *_, kind, _ in cuda] == ["x,xx", "x,xc"]


def test_on_no_other_device(monkeypatch) -> None:
    for device in ("cpu", "metal"):
        monkeypatch.setattr(columns, "device_kind", lambda device=device: device)
        assert not columns.fits("float32", 4096, 768)
    monkeypatch.setattr(columns, "device_kind", lambda: "cuda")
    assert columns.fits("float32", 4096, 768) and not columns.fits("int32", 4096, 768) and not columns.fits("float32", 8, 8)


@pytest.mark.parametrize(("rows", "count", "width"), [(4096, 768, 4), (131072, 64, 4), (4096, 771, 1), (512, 256, 8), (1 << 20, 1, 1), (20, 8000, 4)])
def test_division(rows, count, width) -> None:
    """Whole, and into powers of two."""
    lanes, tiles, parts = columns._divided(rows, count, width)
    assert lanes & (lanes - 1) == 0 and parts & (parts - 1) == 0 and 1 <= lanes <= 32 and 1 <= parts <= 1024
    assert (tiles - 1) * lanes * width < count <= tiles * lanes * width and tiles * parts <= max(columns._BLOCKS, tiles)
