"""Rows of a table: the kernel's own source, compiled for the CPU, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import ctypes
import functools

import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, reference, results_of
from ops.kernels import library, needs_compiler

from jax_mps.ops import lookup

CPP = """
#include <cstdint>
#include <cstddef>
struct alignas(16) uint4 {{ uint32_t x[4]; }};
struct Index {{ uint32_t x; }};
static Index blockIdx, threadIdx, blockDim, gridDim;
static void body(const uint32_t* sizes, const {word}* table, const {index}* index, {word}* out) {{
{body}
}}
extern "C" void run(uint32_t blocks, uint32_t threads, const uint32_t* sizes, const {word}* table, const {index}* index, {word}* out) {{
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++) body(sizes, table, index, out);
}}
"""


@functools.cache
def compiled(word: str, index: str):
    """As `lookup._kernel`."""
    names = {"word": lookup._NAMES[word], "index": lookup._INDICES[index], "body": lookup.source(word, index)}
    run = library(CPP.format(**names)).run

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        sizes, table, index = (np.array(x) for x in inputs)
        out = np.full(output_shapes[0], 77, table.dtype)
        run(grid[0] // threadgroup[0], threadgroup[0], *(ctypes.c_void_p(x.ctypes.data) for x in (sizes, table, index, out)))
        return [mx.array(out)]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """The lowering for CUDA; how often it was the kernel's."""
    needs_compiler()
    used = []
    monkeypatch.setattr(lookup, "device_kind", lambda: "cuda")
    monkeypatch.setattr(lookup, "_kernel", lambda *key: used.append(key) or compiled(*key))
    return used


R = np.random.default_rng(0)
X = R.normal(size=(6, 8)).astype(np.float32)
ODD = R.normal(size=(6, 3, 5)).astype(np.float32)
I = np.array([1, -2, 7, 3, 1, -9, 0, -6, -7, 5, 2**31 - 1, -(2**31)], np.int32)


@pytest.mark.parametrize("table", [
    X, ODD, X.astype(jnp.bfloat16), X > 0, X.astype(np.complex64), ODD.astype(np.int8), X[:, 0], (X * 99).astype(np.int64),
], ids=lambda x: f"{x.dtype}{list(x.shape)}")  # fmt: skip
@pytest.mark.parametrize(("f", "args"), [
    (lambda x, i: x[i], (I,)), (lambda x, i: jnp.take(x, i, axis=0, mode="clip"), (I,)), (lambda x, i: x[i.reshape(3, 4)], (I,)),
    (lambda x, i: x[i], (I.astype(np.uint32),)), (lambda x, i: x[i], (np.int32(-2),)), (lambda x, i: lax.dynamic_index_in_dim(x, i), (np.int32(9),)),
    (lambda x, i: lax.dynamic_slice_in_dim(x, i, 4), (np.int32(3),)), (lambda x, i: jnp.moveaxis(x[i], 0, -1), (I,)),
], ids=["wrapped", "clip", "matrix", "uint32", "one", "dynamic index", "dynamic slice", "moved"])  # fmt: skip
def test_rows(table, f, args, cuda) -> None:
    """Every bit as JAX has it, for indices outside, for elements of each size, for rows of whole runs of 16 bytes and others."""
    case = Case("rows", f, (table, *args))
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)
    assert len(cuda) == 1


def test_windows_of_several_rows(cuda) -> None:
    numbers = lax.GatherDimensionNumbers(offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,))
    case = Case("windows", lambda x, i: lax.gather(x, i[:, None], numbers, (3, 8), mode="clip"), (X, I))
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)
    assert len(cuda) == 1


@pytest.mark.parametrize("f", [
    lambda x, i: x[:, i], lambda x, i: x.T[i], lambda x, i: x[i, i], lambda x, i: jnp.take_along_axis(x, i[:8][None] % 6, 0),
    lambda x, i: lax.dynamic_slice(x, (i[0], i[1]), (2, 3)), lambda x, i: x[::2][i],
])  # fmt: skip
def test_what_is_left_to_mlx(f, cuda) -> None:
    case = Case("other", f, (X, I))
    plan, run, arguments = lowered(case, rewritten=True)
    assert_same(results_of(plan, run(*arguments), case), reference(case), case)
    assert not cuda
