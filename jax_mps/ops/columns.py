"""Sums over rows on CUDA, a bias's gradient or a batch's moments: a kernel of our own, each block of threads with a part of the rows.

MLX (0.32) gives 32 columns to a block, one of 132 processors, unless there are more than 32 rows for each column; and sums a product or a square
of two arrays from an array that holds it. What the parts of the rows leave, the last block of some columns sums up (ops/arrivals.py), or MLX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.ops import arrivals
from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.target import device_kind

_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
_THREADS, _BLOCKS = 256, 1024
_DEEP = 4  # rows that a thread reads at once
_MOST_PARTS = 128  # of which one block sums up what they leave: with 256 (131,072 x 64, H100) a call took 94 us, with MLX's sum 62
_FEWEST, _MOST_COLUMNS = 1 << 18, 1 << 13  # elements; columns, of which MLX has enough for all processors from here on

# sizes = (rows, columns, parts of the rows, threads side by side, its first word of `arrived`). A thread has as many neighbouring columns as 16 bytes
# hold, if that divides them.
_SOURCE = """
constexpr int RUN = WIDTH, DEEP = ROWS, SUMS = COUNT, BLOCK = SIZE;
__shared__ float sums[SUMS * RUN * BLOCK];
uint32_t rows = sizes[0], columns = sizes[1], parts = sizes[2], lanes = sizes[3];
uint32_t lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes;
uint32_t tiles = (columns + lanes * RUN - 1) / (lanes * RUN), part = blockIdx.x / tiles;
uint32_t first = (blockIdx.x % tiles * lanes + lane) * RUN, each = (rows + parts - 1) / parts;
uint32_t row = part * each + team, end = (part + 1) * each < rows ? (part + 1) * each : rows;
bool runs = RUN > 1 && (size_t)x % 16 == 0ALIGNED;
float sum[SUMS * RUN], middle[RUN];
for (int i = 0; i < SUMS * RUN; i++) sum[i] = 0;
for (int i = 0; i < RUN; i++) middle[i] = MIDDLE;
if (first < columns) {
  for (; row < end; row += DEEP * teams) {
    alignas(16) T xs[DEEP * RUN]DECLARED;
    for (int d = 0; d < DEEP; d++) {
      size_t at = (size_t)(row + d * teams) * columns + first;
      if (row + d * teams >= end) break;
      if (runs) {
        *(uint4*)&xs[d * RUN] = *(const uint4*)&x[at];
        LOADED
      } else {
        for (int i = 0; i < RUN; i++) xs[d * RUN + i] = x[at + i]READ;
      }
    }
    for (int d = 0; d < DEEP; d++) {
      if (row + d * teams >= end) break;
      for (int i = 0; i < RUN; i++) {
        float a = (float)xs[d * RUN + i]LESS, b = SECOND;
        ADDED
      }
    }
  }
}
auto together = [&]() {
  for (int i = 0; i < SUMS * RUN; i++) sums[i * BLOCK + threadIdx.x] = sum[i];
  __syncthreads();
  for (uint32_t half = teams / 2; half > 0; half /= 2) {
    if (team < half)
      for (int i = 0; i < SUMS * RUN; i++) sums[i * BLOCK + threadIdx.x] += sums[i * BLOCK + threadIdx.x + half * lanes];
    __syncthreads();
  }
};
together();
if (team == 0 && first < columns)
  for (int i = 0; i < SUMS * RUN; i++) total[PLACE] = sums[i * BLOCK + threadIdx.x];
FINISHED
"""

_FINISHED = """
if (!arrive(blockIdx.x % tiles, parts)) return;
for (int i = 0; i < SUMS * RUN; i++) sum[i] = 0;
#pragma unroll 4
for (part = team; first < columns && part < parts; part += teams)
  for (int i = 0; i < SUMS * RUN; i++) sum[i] += __ldcg(&total[PLACE]);
together();
if (team == 0 && first < columns)
  for (int i = 0; i < SUMS * RUN; i++) done[(i / RUN) * columns + first + i % RUN] = sums[i * BLOCK + threadIdx.x];
"""


def fits(dtype: str, rows: int, columns: int) -> bool:
    """Whether the kernel is for sums over that many rows."""
    return device_kind() == "cuda" and dtype in _TYPES and rows * columns >= _FEWEST and rows < 1 << 31 and columns < _MOST_COLUMNS


def source(dtype: str, width: int, kind: str, counted: bool) -> str:
    """The kernel's body. width: neighbouring columns of a thread; kind: the sums, of `x`, of `xx`, of `xy`, of `xc` (x times y less a row), of
    `cc` (the square of x less a row), or of `x` and one of the first three with a comma; counted: whether it finishes them."""
    two, kinds = _is_of_two(kind), kind.split(",")
    parts = {
        "FINISHED": arrivals.TEXT.replace("FIRST", "sizes[4]") + _FINISHED if counted else "",
        "ALIGNED": " && (size_t)y % 16 == 0" if two else "",
        "DECLARED": ", ys[DEEP * RUN]" if two else "",
        "LOADED": "*(uint4*)&ys[d * RUN] = *(const uint4*)&y[at];" if two else "",
        "READ": ", ys[d * RUN + i] = y[at + i]" if two else "",
        "MIDDLE": "first + i < columns ? (float)less[first + i] : 0.0f" if "c" in kind else "0",
        "SECOND": "(float)ys[d * RUN + i] - middle[i]" if two else "a",
        "PLACE": "((size_t)part * SUMS + i / RUN) * columns + first + i % RUN" if counted else "((size_t)(i / RUN) * columns + first + i % RUN) * parts + part",
        "LESS": " - middle[i]" if kind == "cc" else "",
        "ADDED": " ".join(f"sum[{n} * RUN + i] += {'a' if k == 'x' else 'a * b'};" for n, k in enumerate(kinds)),
        "WIDTH": str(width),
        "ROWS": str(_DEEP),
        "SIZE": str(_THREADS),
        "COUNT": str(len(kinds)),
    }
    text = f"typedef {_TYPES[dtype]} T;\n" + _SOURCE
    for part, code in parts.items():
        text = text.replace(part, code)
    return text


def _is_of_two(kind: str) -> bool:
    return "xy" in kind or "xc" in kind


@functools.cache
def _kernel(dtype: str, width: int, kind: str, counted: bool) -> Callable[..., list[mx.array]]:
    inputs = ["sizes", "x", *(["y"] if _is_of_two(kind) else []), *(["less"] if "c" in kind else []), *(["arrived"] if counted else [])]
    name = f"jax_columns_{dtype}_{width}_{kind.replace(',', '_')}{'_counted' if counted else ''}"
    return cuda_kernel(name, inputs, ["total", *(["done"] if counted else [])], source(dtype, width, kind, counted))


def sums(kind: str, *arrays: mx.array, words: tuple[mx.array, int] | None = None) -> list[mx.array]:
    """The sums over the rows of one or two arrays (rows, columns), each (columns,) in float32; kind: as in `source`, whose row comes last; words: to count
    blocks in, and where its own begin."""
    rows, columns = arrays[0].shape
    dtype, count = str(arrays[0].dtype).rsplit(".", 1)[-1], kind.count(",") + 1
    width = _width(arrays[0].itemsize, columns)
    lanes, tiles, parts = _divided(rows, columns, width)
    counted = words is not None and finishes(arrays[0].itemsize, rows, columns)
    arrived, first = words if counted and words else (None, 0)
    total, *done = _kernel(dtype, width, kind, counted)(
        inputs=[mx.array([rows, columns, parts, lanes, first], mx.uint32), *arrays, *([] if arrived is None else [arrived])],
        output_shapes=[(count, columns, parts), *([(count, columns)] if counted else [])],
        output_dtypes=[mx.float32] * (1 + counted),
        grid=(_THREADS * tiles * parts, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    whole = done[0] if counted else mx.sum(total, axis=2) if parts > 1 else total
    return [mx.reshape(part, (columns,)) for part in mx.split(whole, count)]  # views, where an index would be a gather


def finishes(itemsize: int, rows: int, columns: int) -> bool:
    """Whether the kernel can finish its sums."""
    _, tiles, parts = _divided(rows, columns, _width(itemsize, columns))
    return 1 < parts <= _MOST_PARTS and tiles <= arrivals.WORDS


def _width(itemsize: int, columns: int) -> int:
    """Neighbouring columns of a thread."""
    return 16 // itemsize if columns % (16 // itemsize) == 0 else 1


def _divided(rows: int, columns: int, width: int) -> tuple[int, int, int]:
    """Threads side by side, blocks side by side, and parts of the rows: enough for all processors, each of some rows for every thread."""
    across = -(-columns // width)
    lanes = min(32, 1 << (across - 1).bit_length())
    tiles = -(-across // lanes)
    most = max(1, rows // (_THREADS // lanes * _DEEP))
    parts = 1 << max(0, min(_BLOCKS // tiles, most, 1024).bit_length() - 1)
    return lanes, tiles, parts


def of_rows(x: mx.array, axes: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns if the axes are whole leading dimensions that the kernel is for."""
    if tuple(axes) != tuple(range(len(axes))):
        return None
    rows, columns = math.prod(x.shape[: len(axes)]), math.prod(x.shape[len(axes) :])
    return (rows, columns) if fits(str(x.dtype).rsplit(".", 1)[-1], rows, columns) else None
