"""Several strided copies in one kernel of our own on CUDA: of views that products want dense, or of the parts of a concatenation.

MLX copies each by a kernel of its own, which takes the host longer than the GPU. Ours reads views as they are, by their strides, in runs of 16 bytes where
they have such, and writes each to an array of its own or to its place in one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step, numpy_dtype

MOST = 8  # views that one kernel copies
_DTYPES = frozenset(MX) - {"token", "complex64"}
_WORDS = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
_MOST_RANK = 8
_LARGEST = 2**31 - 2**20  # elements; their places are 32 bits wide, and quotients are right for 31
_THREADS, _DEEP = 256, 4  # and units that a thread reads at once

# sizes = for each view (its first block, its units, elements of a unit, what lies between lines in the result, where it begins there, the dimension that
# lines have in common with other views, and for each dimension its units, and the factor and the shift that divide by them). A unit is a run of 16 bytes,
# if lines are made of whole ones on both sides, or one element.
_SOURCE = """
constexpr uint32_t RUN = 16 / sizeof(T);
uint32_t member = 0;
for (int k = 1; k < COUNT; k++) member += blockIdx.x >= sizes[k * FIELDS];
const uint32_t* own = sizes + member * FIELDS;
const T* __restrict__ from;
T* __restrict__ to;
int64_t stride[RANK];
switch (member) {
CASES
}
uint32_t run = own[2];
bool runs = run > 1 && stride[RANK - 1] == 1 && (size_t)from % 16 == 0 && (size_t)to % 16 == 0;
#pragma unroll
for (int i = 0; i < RANK - 1; i++) runs = runs && (own[6 + 3 * i] == 1 || stride[i] % RUN == 0);
uint32_t first = (blockIdx.x - own[0]) * DEEP * THREADS + threadIdx.x;
int64_t source[DEEP];
uint32_t place[DEEP];
uint4 held[DEEP];
#pragma unroll
for (int d = 0; d < DEEP; d++) {
  uint32_t unit = first + d * THREADS, rest = unit, line = 0;
  if (unit >= own[1]) break;
  source[d] = 0;
#pragma unroll
  for (uint32_t i = RANK - 1; i > 0; i--) {
    if (i + 1 == own[5]) line = rest;
    uint32_t before = ((uint32_t)((uint64_t)own[7 + 3 * i] * rest >> 32) + rest) >> own[8 + 3 * i];
    source[d] += (rest - before * own[6 + 3 * i]) * (i == RANK - 1 ? run * stride[i] : stride[i]);
    rest = before;
  }
  if (1 == own[5]) line = rest;
  source[d] += rest * (RANK == 1 ? run * stride[0] : stride[0]);
  place[d] = unit * run + line * own[3] + own[4];
  if (runs) held[d] = *(const uint4*)&from[source[d]];
}
#pragma unroll
for (int d = 0; d < DEEP; d++) {
  if (first + d * THREADS >= own[1]) break;
  if (runs) {
    *(uint4*)&to[place[d]] = held[d];
  } else {
    for (uint32_t i = 0; i < run; i++) to[place[d] + i] = from[source[d] + i * stride[RANK - 1]];
  }
}
"""


def fits(dtype: str, shapes: Sequence[Sequence[int]]) -> bool:
    """Whether the kernel is for copies of such views."""
    ranks = [len(shape) for shape in shapes]
    sizes = [math.prod(shape) for shape in shapes]
    few = 0 < len(ranks) <= MOST and min(ranks) > 0 and max(ranks) <= _MOST_RANK
    return device_kind() == "cuda" and dtype in _DTYPES and few and min(sizes) > 0 and sum(sizes) <= _LARGEST


def source(itemsize: int, ranks: Sequence[int], *, together: bool) -> str:
    """The kernel's body, for views of so many dimensions; together: whether they go to one array."""
    rank = max(ranks)
    cases = []
    for k, own in enumerate(ranks):
        strides = [f"stride[{i}] = {f'x_{k}_strides[{i - rank + own}]' if i >= rank - own else '0'};" for i in range(rank)]
        parts = [f"case {k}:" if k + 1 < len(ranks) else "default:", f"from = (const T*)x_{k};", f"to = (T*)y_{0 if together else k};", *strides, "break;"]
        cases.append("  ".join(parts))
    text = f"typedef {_WORDS[itemsize]} T;\n" + _SOURCE
    named = {"CASES": "\n".join(cases), "COUNT": len(ranks), "FIELDS": 6 + 3 * rank, "RANK": rank, "DEEP": _DEEP, "THREADS": _THREADS}
    for name, value in named.items():
        text = text.replace(name, str(value))
    return text


@functools.cache
def _kernel(dtype: str, ranks: tuple[int, ...], together: bool) -> Callable[..., list[mx.array]]:
    name = f"jax_{'concatenated' if together else 'dense'}_{dtype}_{'_'.join(map(str, ranks))}"
    outputs = [f"y_{k}" for k in range(1 if together else len(ranks))]
    text = source(numpy_dtype(dtype).itemsize, ranks, together=together)
    return cuda_kernel(name, ["sizes", *(f"x_{k}" for k in range(len(ranks)))], outputs, text, contiguous=False)


def table(itemsize: int, shapes: Sequence[Sequence[int]], axis: int | None) -> tuple[list[int], int]:
    """The kernel's `sizes` for views of such shapes, which go to one array along an axis, or to one each (None); and how many blocks it has."""
    rank, run = max(map(len, shapes)), 16 // itemsize
    lines = [math.prod(shape[axis or 0 :]) for shape in shapes]
    starts = [0, *itertools.accumulate(lines)]
    gaps = [starts[-1] - line if axis else 0 for line in lines]
    offsets = [0] * len(lines) if axis is None else starts[:-1]
    numbers: list[int] = []
    blocks = 0
    for shape, gap, offset in zip(shapes, gaps, offsets, strict=True):
        unit = run if all(n % run == 0 for n in (shape[-1], gap, offset)) else 1
        units = math.prod(shape) // unit
        dims = [*[1] * (rank - len(shape)), *shape[:-1], shape[-1] // unit]
        numbers += [blocks, units, unit, gap, offset, axis + rank - len(shape) if axis else 0, *(n for d in dims for n in (d, *_divisor(d)))]
        blocks += -(-units // (_THREADS * _DEEP))
    return numbers, blocks


def _divisor(d: int) -> tuple[int, int]:
    """The factor f and the shift s with n // d == ((n * f >> 32) + n) >> s for n < 2^31 (Granlund and Montgomery, 1994)."""
    shift = (d - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - d)) // d + 1, shift


def dense(views: Sequence[mx.array]) -> list[mx.array]:
    """Row-contiguous copies."""
    return _copied(views, [v.shape for v in views], None)


def concatenated(parts: Sequence[mx.array], axis: int, shape: Sequence[int]) -> mx.array:
    """All parts along an axis, in that shape; from the axis on, each may have dimensions of its own."""
    if fits(str(parts[0].dtype).rsplit(".", 1)[-1], [part.shape for part in parts]):
        return _copied(parts, [tuple(shape)], axis)[0]
    if len({(part.ndim, part.shape[axis + 1 :]) for part in parts}) > 1:
        parts = [mx.reshape(part, (*part.shape[:axis], -1)) for part in parts]
    return mx.reshape(mx.concatenate(list(parts), axis=axis), shape)


def _copied(views: Sequence[mx.array], shapes: Sequence[tuple[int, ...]], axis: int | None) -> list[mx.array]:
    dtype = str(views[0].dtype).rsplit(".", 1)[-1]
    numbers, blocks = table(views[0].itemsize, [v.shape for v in views], axis)
    return _kernel(dtype, tuple(v.ndim for v in views), axis is not None)(
        inputs=[mx.array(numbers, mx.uint32), *views],
        output_shapes=list(shapes),
        output_dtypes=[MX[dtype]] * len(shapes),
        grid=(_THREADS * blocks, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )


@lowers("jax_mps.dense")
def dense_copies(op: Step) -> Run:
    """Operands: arrays; sources: which of them each result is a copy of, transposed by its own of the `permutations`."""
    views = list(zip(op.sources, op.permutations, strict=True))
    return lambda *arrays: dense([mx.transpose(arrays[i], order) for i, order in views])
