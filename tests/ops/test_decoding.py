"""The kernel for attention of few queries, compiled for the CPU: a thread for each of its threads, a barrier for each of its exchanges."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from ops.kernels import SHUFFLE, library, needs_compiler

from jax_mps.ops import decoding

CPP = """
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#define __shared__ static
struct Index {{ int x; }};
struct alignas(16) uint4 {{ unsigned x[4]; }};
static Index blockDim;
static thread_local Index blockIdx, threadIdx;
static std::barrier<>* together;
static void __syncthreads() {{ together->arrive_and_wait(); }}
static float __int_as_float(uint32_t bits) {{ float x; memcpy(&x, &bits, 4); return x; }}
{shuffle}
static void body(const float* numbers, const float* q, const float* k, const float* v, const {mask}* mask, float* out, const int* q_shape,
                 const int* k_shape, const int64_t* q_strides, const int64_t* k_strides, const int64_t* v_strides, const int64_t* mask_strides) {{
{body}
}}
extern "C" void run(int blocks, int threads, const float* numbers, const float* q, const float* k, const float* v, const {mask}* mask, float* out,
                    const int* q_shape, const int* k_shape, const int64_t* qs, const int64_t* ks, const int64_t* vs, const int64_t* ms) {{
  blockDim.x = threads;
  for (int block = 0; block < blocks; block++) {{
    std::barrier<> all(threads);
    together = &all;
    std::vector<std::thread> running;
    for (int t = 0; t < threads; t++) running.emplace_back([=] {{
      blockIdx.x = block;
      threadIdx.x = t;
      body(numbers, q, k, v, mask, out, q_shape, k_shape, qs, ks, vs, ms);
    }});
    for (auto& thread : running) thread.join();
  }}
}}
"""
R = np.random.default_rng(0)
HIDDEN = {"bool": "bool", "float32": "float", None: "float"}


def run_kernel(q, k, v, mask, *, scale: float, causal: bool, mean: bool, threads: int) -> np.ndarray:
    kind = None if mask is None else str(mask.dtype)
    body = decoding.source("float32", q.shape[-1], v.shape[-1], kind)
    run = library(CPP.format(body=body, mask=HIDDEN[kind], shuffle=SHUFFLE), "-O1", "-pthread").run
    numbers = np.array([scale, causal, mean], np.float32)
    out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, np.float32)
    arrays = [numbers, q, k, v, q if mask is None else np.broadcast_to(mask, (*q.shape[:-1], k.shape[2])), out]
    shapes = [np.array(x.shape, np.int32) for x in (q, k)]
    strides = [np.array(x.strides, np.int64) // x.itemsize for x in (q, k, v, arrays[4])]
    given = [ctypes.c_void_p(x.ctypes.data) for x in (*arrays, *shapes, *strides)]
    run(int(np.prod(q.shape[:-1])), threads, *given)
    return out


def by_the_steps(q, k, v, mask, *, scale: float, causal: bool, mean: bool) -> np.ndarray:
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
    scores = scale * q.astype(np.float64) @ k.swapaxes(-1, -2)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], scores.shape[-1] - scores.shape[-2], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -1e300 if mean else -np.inf) if mask.dtype == bool else scores + mask
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v


MASK = R.random((2, 1, 3, 37)) < 0.5
MASK[1, 0, 1] = False
BIAS = R.normal(size=(1, 4, 1, 37)).astype(np.float32)
BIAS[0, 2, 0, :30] = -np.inf


@pytest.mark.parametrize(("widths", "mask", "causal", "mean", "order", "threads"), [
    ((64, 64), None, False, False, "bhtd", 64), ((8, 24), None, True, False, "bhtd", 32), ((6, 5), MASK, False, False, "bhtd", 32),
    ((64, 64), MASK, False, True, "bthd", 64), ((40, 8), BIAS, False, False, "bthd", 64), ((8, 8), MASK[:1, :, :1], True, False, "btdh", 32),
])  # fmt: skip
def test_the_kernel(widths, mask, causal, mean, order, threads) -> None:
    """Against the steps in float64; whole runs of a row and single elements, groups that share keys, queries that see nothing."""
    needs_compiler()
    width, values = widths
    permutation = ["bhtd".index(axis) for axis in order]
    inverse = np.argsort(permutation)
    q = R.normal(size=(2, 4, 3, width)).astype(np.float32)
    k, v = (np.ascontiguousarray(R.normal(size=(2, 2, 37, n)).astype(np.float32).transpose(permutation)).transpose(inverse) for n in (width, values))
    how = {"scale": 0.3, "causal": causal, "mean": mean}
    got = run_kernel(q, k, v, mask, **how, threads=threads)
    np.testing.assert_allclose(got, by_the_steps(q, k, v, mask, **how), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "queries", "width", "values", "fits"), [
    ("float32", (), 64, 64, True), ("bfloat16", (8, 8), 256, 128, True), ("float32", (9,), 64, 64, False), ("float32", (16, 8), 64, 64, False),
    ("float32", (1,), 264, 64, False), ("complex64", (1,), 64, 64, False),
])  # fmt: skip
def test_what_it_is_for(dtype, queries, width, values, fits, monkeypatch) -> None:
    assert not decoding.fits(dtype, queries, width, values)
    monkeypatch.setattr(decoding, "device_kind", lambda: "cuda")
    assert decoding.fits(dtype, queries, width, values) is fits
