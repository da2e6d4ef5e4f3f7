"""Rows of a table at clamped indices on CUDA: one kernel of our own. MLX's gather leaves the clamp to another, and its window at a computed place is two."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.target import device_kind

_WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # what elements are copied as, but for the commonest
_NAMES = {"uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t", "uint64": "uint64_t", "float32": "float"}
_INDICES = {"int32": "int32_t", "uint32": "uint32_t", "int64": "int64_t"}
_THREADS = 256
_MOST = 2**31 - 2**20  # elements; their places are 32 bits wide

# sizes = (elements in all, of one window, of one row, the last place of a window, what is added to a negative index). What is made of whole runs of
# 16 bytes, at aligned places, is copied by runs.
_SOURCE = """
constexpr uint32_t RUN = 16 / sizeof(WORD);
bool runs = sizes[1] % RUN == 0 && sizes[2] % RUN == 0 && (size_t)table % 16 == 0 && (size_t)out % 16 == 0;
uint32_t step = runs ? RUN : 1;
for (uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * step; at < sizes[0]; at += gridDim.x * blockDim.x * step) {
  uint32_t window = at / sizes[1];
  INDEX place = index[window];
  if (place < 0) place += sizes[4];
  if (place < 0) place = 0;
  uint32_t row = place < sizes[3] ? (uint32_t)place : sizes[3];
  const WORD* from = table + (size_t)row * sizes[2] + (at - window * sizes[1]);
  if (runs) *(uint4*)&out[at] = *(const uint4*)from;
  else out[at] = *from;
}
"""


def fits(index: str, itemsize: int, count: int, shape: tuple[int, ...], window: int = 1) -> bool:
    """Whether the kernel is for it: `count` windows of so many rows of a table."""
    small = 0 < count * window * math.prod(shape[1:]) <= _MOST and window <= shape[0] < _MOST
    return device_kind() == "cuda" and index in _INDICES and itemsize in _WORDS and small


def source(word: str, index: str) -> str:
    """The kernel's body, for elements and indices of these types."""
    return _SOURCE.replace("WORD", _NAMES[word]).replace("INDEX", _INDICES[index])


@functools.cache
def _kernel(word: str, index: str) -> Callable[..., list[mx.array]]:
    return cuda_kernel(f"jax_lookup_{word}_{index}", ["sizes", "table", "index"], ["out"], source(word, index))


def rows_at(table: mx.array, index: mx.array, window: int = 1, *, wrapped: bool = False) -> mx.array:
    """So many rows of the table from each of a line of indices on: (indices, window, *row). wrapped: negative indices count from the end."""
    rows, row = table.shape[0], math.prod(table.shape[1:])
    word = mx.float32 if table.dtype == mx.float32 else _WORDS[table.itemsize]
    count = index.size * window * row
    runs = count // (16 // table.itemsize) if row * table.itemsize % 16 == 0 else count
    (taken,) = _kernel(*(str(dtype).rsplit(".", 1)[-1] for dtype in (word, index.dtype)))(
        inputs=[mx.array([count, window * row, row, rows - window, rows if wrapped else 0], mx.uint32), _as(table, word), index],
        output_shapes=[(index.size, window, *table.shape[1:])],
        output_dtypes=[word],
        grid=(-(-runs // _THREADS) * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    return _as(taken, table.dtype)


def _as(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x if x.dtype == dtype else x.view(dtype)
