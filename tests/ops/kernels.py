"""Kernels that only a GPU has, as C++ that a CPU runs."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from jax_mps.ops import load_all

# What CUDA has and C++ has not: half types, and functions of numbers.
NUMBERS = """
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#define __device__
struct __half {
  _Float16 v;
  __half() = default;
  explicit __half(float x) : v((_Float16)x) {}
  operator float() const { return v; }
};
struct __nv_bfloat16 {
  uint16_t v;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t u = std::bit_cast<uint32_t>(x);
    v = x != x ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return std::bit_cast<float>((uint32_t)v << 16); }
};
static float __int_as_float(uint32_t x) { return std::bit_cast<float>(x); }
static float rsqrtf(float x) { return (float)(1 / std::sqrt((double)x)); }
"""

# Once there are `threadIdx` and `__syncthreads`.
SHUFFLE = """
static float slots[1024];
static float __shfl_xor_sync(unsigned, float v, int o) {
  slots[threadIdx.x] = v;
  __syncthreads();
  float other = slots[threadIdx.x ^ o];
  __syncthreads();
  return other;
}
"""

# A block's threads take turns, each until its next exchange with others.
_TURNS = """
#include <ucontext.h>
#include <vector>
#define __shared__ static
struct Index { uint32_t x; };
struct alignas(16) uint4 { uint32_t x[4]; };
struct alignas(16) float4 { float x[4]; };
static Index gridDim, blockDim, blockIdx, threadIdx;
static ucontext_t turn, threads[1024];
static void __syncthreads() { swapcontext(&threads[threadIdx.x], &turn); }
static void __threadfence() {}
template <typename T> static T __ldcg(const T* from) { return *from; }
static uint32_t atomicAdd(uint32_t* to, uint32_t more) {
  const uint32_t old = *to;
  *to += more;
  return old;
}
"""
_RUN = """
static void** given;
static bool ended[1024];
static void thread() {
  body(ARGUMENTS);
  ended[threadIdx.x] = true;
}
extern "C" { bool backwards = false; }
extern "C" void run(uint32_t blocks, uint32_t count, void** pointers) {
  gridDim.x = blocks;
  blockDim.x = count;
  given = pointers;
  std::vector<char> stacks((size_t)count << 16);
  for (uint32_t b = 0; b < blocks; b++) {
    blockIdx.x = backwards ? blocks - 1 - b : b;
    for (uint32_t t = 0; t < count; t++) {
      getcontext(&threads[t]);
      threads[t].uc_stack.ss_sp = &stacks[(size_t)t << 16];
      threads[t].uc_stack.ss_size = 1 << 16;
      threads[t].uc_link = &turn;
      makecontext(&threads[t], thread, 0);
      ended[t] = false;
    }
    for (bool any = true; any;) {
      any = false;
      for (uint32_t t = 0; t < count; t++) {
        if (ended[t]) continue;
        threadIdx.x = t;
        swapcontext(&turn, &threads[t]);
        any |= !ended[t];
      }
    }
  }
}
"""


def in_turns(body: str, parameters: dict[str, str], header: str = "") -> str:
    """C++ whose `run(blocks, threads of a block, pointers)` is a kernel, block by block (from the last one on if `backwards`); parameters: what the pointers
    are to, by name."""
    named = ", ".join(f"{kind}* {name}" for name, kind in parameters.items())
    arguments = ", ".join(f"({kind}*)given[{i}]" for i, kind in enumerate(parameters.values()))
    return f"{NUMBERS}{_TURNS}{SHUFFLE}{header}static void body({named}) {{\n{body}\n}}\n{_RUN.replace('ARGUMENTS', arguments)}"


def lower_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every module lower for another device."""
    load_all()  # what is imported later would keep the patched name
    for name, module in list(sys.modules.items()):
        if name.startswith("jax_mps.") and hasattr(module, "device_kind"):
            monkeypatch.setattr(module, "device_kind", lambda: kind)


def needs_compiler() -> None:
    """Skip where there is no g++: these tests compile what they test."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")


def library(text: str, *flags: str) -> ctypes.CDLL:
    """The C++20 text, compiled and loaded. JAX_MPS_TEST_KERNELS: a folder where it is kept for other runs with the same compiler."""
    command = ["g++", "-std=c++20", *flags, "-shared", "-fPIC", "-o"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cpp")
        source.write_text(text)
        kept = Path(os.environ.get("JAX_MPS_TEST_KERNELS", folder), hashlib.sha256(repr((command, text)).encode()).hexdigest())
        if not kept.exists():
            made = kept.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, made, source], check=True)
            made.replace(kept)
        return ctypes.CDLL(str(kept))
