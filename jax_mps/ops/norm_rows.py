"""The gradient of layer and RMS norm on CUDA, with the sums over all rows that go with it: one kernel of our own, which reads rows and cotangent once.

MLX (0.32) writes the terms of the scale's gradient to memory, and sums them up with 32 columns to a block. Here a team of threads holds a row in
registers, and keeps the sums of its columns there from row to row. What each block leaves of these, the last of sixteen blocks sums up, and the last of
all of them (ops/arrivals.py), or MLX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.ops import arrivals
from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.target import device_kind

_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
_THREADS = 256  # of a block; each may have 255 registers
_MOST = 12  # elements of a row that a thread holds, so that 128 registers are enough, and a processor has two blocks; but for the longest rows
_BLOCKS = 256  # where there are sums, of which each block writes its part: nearly two for each of 132 processors
_FEWEST, _MOST_COLUMNS = 1 << 18, 1 << 13  # elements; of which a row has at most
_GROUP = 16  # blocks whose sums one of them sums up; the square of it are all
_MOST_SUMS = 1 << 13  # numbers that a block leaves for another one: of more, many blocks are faster, a kernel of their own

# sizes = (rows, columns, 1 if there is something to be added, its first word of `arrived`). A row's elements go to the threads of its team in runs, one
# after the other; past its end, and past the last row, there are zeros.
_SOURCE = """
constexpr int RUN = WIDTH, RUNS = COUNT, HELD = RUN * RUNS, TEAM = SIDE, BLOCK = THREADS, TEAMS = BLOCK / TEAM, WARPS = TEAM > 32 ? TEAM / 32 : 1;
constexpr bool CENTRED = LAYER;
const bool adds = sizes[2];
const float epsilon = eps[0];
__shared__ float parts[2][3][BLOCK / 32];
uint32_t rows = sizes[0], columns = sizes[1], lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM, warp = threadIdx.x / 32;
bool runs = RUN > 1 && (size_t)x % 16 == 0 && (size_t)g % 16 == 0 && (size_t)y % 16 == 0 && (size_t)added % 16 == 0ALIGNED;
auto load = [&](const auto* from, auto* to) {
  if (runs) {
    for (int j = 0; j < (int)sizeof(*from) * RUN / 16; j++) ((uint4*)to)[j] = ((const uint4*)from)[j];
  } else {
    for (int i = 0; i < RUN; i++) to[i] = from[i];
  }
};
auto add_up = [&](auto& terms, auto& shared) {
  constexpr int N = sizeof(terms) / sizeof(float);
  for (int n = 0; n < N; n++)
    for (int o = 1; o < TEAM && o < 32; o *= 2) terms[n] += __shfl_xor_sync(0xffffffffu, terms[n], o);
  if (WARPS > 1) {
    if (lane % 32 == 0)
      for (int n = 0; n < N; n++) shared[n][warp] = terms[n];
    BARRIER
    for (int n = 0; n < N; n++) {
      terms[n] = 0;
      for (int w = 0; w < WARPS; w++) terms[n] += shared[n][team * WARPS + w];
    }
    if (!CENTRED) {
      BARRIER
    }
  }
};
SCALES
SUMMED
for (uint32_t first = blockIdx.x * TEAMS; first < rows; first += gridDim.x * TEAMS) {
  uint32_t row = first + team;
  size_t start = (size_t)row * columns;
  float c[HELD], gs[HELD], mean[1] = {0}, means[3] = {0, 0, 0};
  alignas(16) X xs[HELD];
  alignas(16) G own[HELD];
  alignas(16) Y more[HELD];
#pragma unroll
  for (int n = 0; n < RUNS; n++) {
    uint32_t at = (n * TEAM + lane) * RUN;
    if (row < rows && at < columns) {
      load(x + start + at, xs + n * RUN);
      load(g + start + at, own + n * RUN);
    }
  }
#pragma unroll
  for (int k = 0; k < HELD; k++) {
    bool here = row < rows && (k / RUN * TEAM + lane) * RUN < columns;
    c[k] = here ? (float)xs[k] : 0.0f;
    gs[k] = here ? (float)own[k] : 0.0f;
    mean[0] += c[k];
  }
  if (CENTRED) {
    add_up(mean, parts[0]);
    mean[0] /= columns;
  }
#pragma unroll
  for (int n = 0; n < RUNS; n++) {
    uint32_t at = (n * TEAM + lane) * RUN;
    bool here = row < rows && at < columns;
    if (here && adds) load(added + start + at, more + n * RUN);
    for (int k = n * RUN; k < (n + 1) * RUN; k++) {
      if (CENTRED && here) c[k] -= mean[0];
      means[0] += SCALED;
      means[1] += SCALED * c[k];
      means[2] += c[k] * c[k];
    }
  }
  add_up(means, parts[1]);
  float r = 1 / sqrtf(means[2] / columns + epsilon), level = CENTRED ? means[0] / columns : 0.0f, slope = means[1] / columns * r;
#pragma unroll
  for (int n = 0; n < RUNS; n++) {
    uint32_t at = (n * TEAM + lane) * RUN;
    bool here = row < rows && at < columns;
    alignas(16) Y ys[RUN];
    for (int i = 0; i < RUN; i++) {
      int k = n * RUN + i;
      float normalised = c[k] * r, result = r * (SCALED - level - normalised * slope) + (adds && here ? (float)more[k] : 0.0f);
      ys[i] = (Y)result;
      TERMS
    }
    if (here) {
      if (runs) {
        for (int j = 0; j < (int)sizeof(Y) * RUN / 16; j++) ((uint4*)(y + start + at))[j] = ((uint4*)ys)[j];
      } else {
        for (int i = 0; i < RUN; i++) y[start + at + i] = ys[i];
      }
    }
  }
}
TOTALS
"""

# Each team waits for itself alone: one may read while another computes.
BARRIER = 'asm volatile("bar.sync %0, %1;" : : "r"(team + 1), "n"(TEAM) : "memory");'

_SCALES = """
alignas(16) float ws[HELD];
#pragma unroll
for (int n = 0; n < RUNS; n++) {
  uint32_t at = (n * TEAM + lane) * RUN;
  if (at < columns) {
    load(scale + at, ws + n * RUN);
  } else {
    for (int i = 0; i < RUN; i++) ws[n * RUN + i] = 0;
  }
}
"""

# Each thread's sums of its columns, over rows; then over the block's teams.
_SUMMED = "constexpr int SUMS = KINDS;\nfloat sum[SUMS * HELD];\nfor (int k = 0; k < SUMS * HELD; k++) sum[k] = 0;"
_TOTALS = """
__shared__ float together[RUN * BLOCK];
#pragma unroll
for (int n = 0; n < SUMS * RUNS; n++) {
  __syncthreads();
  for (int i = 0; i < RUN; i++) together[i * BLOCK + threadIdx.x] = sum[n * RUN + i];
  __syncthreads();
  for (int k = threadIdx.x; k < RUN * TEAM; k += BLOCK) {
    uint32_t at = (n % RUNS * TEAM + k % TEAM) * RUN + k / TEAM;
    float all = 0;
    for (int t = 0; t < TEAMS; t++) all += together[k / TEAM * BLOCK + t * TEAM + k % TEAM];
    if (at < columns) total[PLACE] = all;
  }
}
"""
_FINISHED = """
auto sum_up = [&](uint32_t first, uint32_t step, uint32_t count, float* to) {  // so many blocks' sums
  constexpr int N = RUN > 1 ? 4 : 1;
  for (uint32_t k = threadIdx.x * N; k < SUMS * columns; k += BLOCK * N) {
    float all[N] = {};
#pragma unroll
    for (int b = 0; b < GROUP; b++) {
      alignas(16) float one[N];
      const float* from = total + (size_t)(first + (b < count ? b * step : 0)) * SUMS * columns + k;
      if (N > 1) {
        *(float4*)one = __ldcg((const float4*)from);
      } else {
        one[0] = __ldcg(from);
      }
      for (int i = 0; i < N; i++) all[i] += b < count ? one[i] : 0.0f;
    }
    for (int i = 0; i < N; i++) to[k + i] = all[i];
  }
};
const uint32_t group = blockIdx.x / GROUP, groups = (gridDim.x + GROUP - 1) / GROUP;
const uint32_t members = group + 1 < groups ? GROUP : gridDim.x - group * GROUP;
if (!arrive(1 + group, members)) return;
sum_up(group * GROUP, 1, members, groups > 1 ? total + (size_t)group * GROUP * SUMS * columns : done);
if (groups == 1 || !arrive(0, groups)) return;
sum_up(0, GROUP, groups, done);
"""
_TERMS = {"scale": "gs[k] * normalised", "cotangent": "gs[k]", "rows": "result"}
EVERY = tuple(_TERMS)


@dataclass(frozen=True, slots=True)
class Form:
    """What one kernel is for. types: of the rows, the cotangent and the result; width: neighbouring elements that a thread reads at once, runs: how often;
    team: threads of a row; sums: over all rows, of the terms of the scale's gradient, of the cotangent, of the resulting rows; counted: whether it
    finishes them."""

    types: tuple[str, str, str]
    width: int
    runs: int
    team: int
    centred: bool
    scaled: bool
    sums: tuple[str, ...]
    counted: bool

    @property
    def inputs(self) -> list[str]:
        return ["sizes", "eps", "x", "g", "added", *(["scale"] if self.scaled else []), *(["arrived"] if self.counted else [])]

    @property
    def outputs(self) -> list[str]:
        return ["y", *(["total"] if self.sums else []), *(["done"] if self.counted else [])]


def fits(types: Sequence[str], rows: int, columns: int) -> bool:
    """Whether the kernel is for such rows. types: of the rows, the cotangent and the result."""
    large = rows * columns >= _FEWEST and rows < 1 << 31 and columns <= _MOST_COLUMNS
    return device_kind() == "cuda" and all(t in _TYPES for t in types) and large


def finishes(sums: Sequence[str], columns: int) -> bool:
    """Whether the kernel can finish its sums."""
    return 0 < len(_at_once(sums)) * columns <= _MOST_SUMS


def _at_once(sums: Sequence[str]) -> tuple[str, ...]:
    """More than are wanted, where that saves a kernel that would have to be compiled."""
    return tuple(sums) if set(sums) <= {"scale"} else EVERY


def form(types: tuple[str, str, str], columns: int, *, centred: bool, scaled: bool, sums: tuple[str, ...], counted: bool = False) -> Form:
    """How rows of so many elements are divided: among 32 threads or fewer, unless each would hold too much."""
    run = 4 if set(types) == {"float32"} else 8
    width = run if columns % run == 0 else 1
    across = -(-columns // width)
    team = min(32, 1 << (across - 1).bit_length())
    while -(-across // team) * width > _MOST and team < _THREADS:
        team *= 2
    return Form(types, width, -(-across // team), team, centred, scaled, _at_once(sums), counted)


def source(how: Form) -> str:
    """The kernel's body."""
    parts = {
        "WIDTH": str(how.width),
        "COUNT": str(how.runs),
        "SIDE": str(how.team),
        "THREADS": str(_THREADS),
        "BARRIER": BARRIER,
        "LAYER": str(how.centred).lower(),
        "ALIGNED": " && (size_t)scale % 16 == 0" if how.scaled else "",
        "SUMMED": _SUMMED.replace("KINDS", str(len(how.sums))) if how.sums else "",
        "SCALES": _SCALES if how.scaled else "",
        "SCALED": "gs[k] * ws[k]" if how.scaled else "gs[k]",
        "TERMS": " ".join(f"sum[{s} * HELD + k] += {_TERMS[name]};" for s, name in enumerate(how.sums)),
        "TOTALS": _TOTALS + (arrivals.TEXT.replace("FIRST", "sizes[3]") + _FINISHED if how.counted else "") if how.sums else "",
        "PLACE": "((size_t)blockIdx.x * SUMS + n / RUNS) * columns + at" if how.counted else "((size_t)(n / RUNS) * columns + at) * gridDim.x + blockIdx.x",
        "GROUP": str(_GROUP),
    }
    text = "".join(f"typedef {_TYPES[dtype]} {name};\n" for name, dtype in zip("XGY", how.types, strict=True)) + _SOURCE
    for part, code in parts.items():
        text = text.replace(part, code)
    return text


@functools.cache
def _kernel(how: Form) -> Callable[..., list[mx.array]]:
    name = f"jax_norm_rows_{'_'.join(how.types)}_{how.width}_{how.runs}_{how.team}_{int(how.centred)}{int(how.scaled)}{len(how.sums)}{int(how.counted)}"
    return cuda_kernel(name, how.inputs, how.outputs, source(how))


def gradient(
    x: mx.array,
    g: mx.array,
    scale: mx.array | None,
    added: mx.array | None,
    eps: float,
    dtype: mx.Dtype,
    *,
    centred: bool,
    sums: tuple[str, ...],
    words: tuple[mx.array, int] | None = None,
) -> list[mx.array]:
    """The gradient of the rows (rows, columns), plus what is added, in the dtype; and the sums, each (columns,) in float32; as in `Form`.

    added: of the shape of the rows and of the dtype; scale: (columns,); words: to count blocks in, and where its own begin.
    """
    rows, columns = x.shape
    types = (_name(x.dtype), _name(g.dtype), _name(dtype))
    arrived, first = words if words is not None and finishes(sums, columns) else (None, 0)
    how = form(types, columns, centred=centred, scaled=scale is not None, sums=sums, counted=arrived is not None)
    blocks = min(-(-rows // (_THREADS // how.team)), _BLOCKS if sums else 1 << 16)
    more = mx.array([0], dtype) if added is None else added
    kinds = len(how.sums)
    shapes = {"y": (rows, columns), "total": (blocks, kinds, columns) if how.counted else (kinds, columns, blocks), "done": (kinds, columns)}
    y, *totals = _kernel(how)(
        inputs=[
            mx.array([rows, columns, int(added is not None), first], mx.uint32),
            mx.array([eps], mx.float32),
            *(x, g, more, *([] if scale is None else [scale.astype(mx.float32)]), *([] if arrived is None else [arrived])),
        ],
        output_shapes=[shapes[name] for name in how.outputs],
        output_dtypes=[dtype if name == "y" else mx.float32 for name in how.outputs],
        grid=(_THREADS * blocks, 1, 1),
        threadgroup=(_THREADS, 1, 1),
    )
    if not sums:
        return [y]
    whole = totals[1] if how.counted else mx.sum(totals[0], axis=2) if blocks > 1 else totals[0]
    found = dict(zip(how.sums, mx.split(whole, kinds), strict=True))  # views, where an index would be a gather
    return [y, *(mx.reshape(found[name], (columns,)) for name in sums)]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]
