"""Attention of few positions to many keys on CUDA, as a model's decoding does it: one kernel of our own.

MLX's is for no mask, and for three widths; with a mask it composes four kernels of the same steps. A block of threads has one query; eight threads share a
key, and keep sums of their own until the end. What a query does not see is not read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.target import device_kind

_MOST_POSITIONS, _MOST_QUERIES = 8, 64  # that share a key: a block for each of them reads all keys
_WIDEST = 256
_TYPES = {"float32": ("float", 4), "float16": ("__half", 2), "bfloat16": ("__nv_bfloat16", 2)}
_TEAM = 8
_THREADS = 512  # with 128 registers each; a thread of the widest rows needs more

# numbers = (scale, 1 where positions see no later keys, 1 where a query that sees nothing gives the mean of all values).
# Each thread of a team holds runs of 16 bytes of a row, eight runs apart.
_SOURCE = """
constexpr int W = WIDTH, E = VALUES, RUN = 16 / sizeof(T), TEAM = 8;
constexpr int NW = (W + TEAM * RUN - 1) / (TEAM * RUN), NE = (E + TEAM * RUN - 1) / (TEAM * RUN);
__shared__ float tops[32], totals[32], sums[32 * E];
const float NONE = __int_as_float(0xff800000);
int positions = q_shape[2], keys = k_shape[2], heads = q_shape[1], groups = heads / k_shape[1];
int t = blockIdx.x % positions, h = blockIdx.x / positions % heads, b = blockIdx.x / (positions * heads);
const T* query = q + b * q_strides[0] + h * q_strides[1] + t * q_strides[2];
const T* key = k + b * k_strides[0] + h / groups * k_strides[1];
const T* value = v + b * v_strides[0] + h / groups * v_strides[1];
MASK_ROW
bool runs = k_strides[3] == 1 && v_strides[3] == 1 && k_strides[2] % RUN == 0 && v_strides[2] % RUN == 0 &&
            (size_t)key % 16 == 0 && (size_t)value % 16 == 0 && W % RUN == 0 && E % RUN == 0;
int lane = threadIdx.x % TEAM, team = threadIdx.x / TEAM, teams = blockDim.x / TEAM;
float scaled[NW * RUN], sum[NE * RUN], top = NONE, total = 0;
for (int i = 0; i < NW * RUN; i++) {
  int at = (i / RUN * TEAM + lane) * RUN + i % RUN;
  scaled[i] = at < W ? (float)query[at * q_strides[3]] * numbers[0] : 0.0f;
}
for (int i = 0; i < NE * RUN; i++) sum[i] = 0;
int last = numbers[1] != 0 ? keys - positions + t + 1 : keys;
for (int first = 0; first < last; first += teams) {
  int j = first + team;
  bool seen = j < last;
  float score = 0, bias = 0;
  SEEN
  alignas(16) T keyed[NW * RUN], valued[NE * RUN];
  if (seen) {
    const T* from = key + j * k_strides[2];
    const T* to = value + j * v_strides[2];
    if (runs) {
      for (int i = 0; i < NW; i++)
        if ((i * TEAM + lane) * RUN < W) *(uint4*)&keyed[i * RUN] = *(const uint4*)&from[(i * TEAM + lane) * RUN];
      for (int i = 0; i < NE; i++)
        if ((i * TEAM + lane) * RUN < E) *(uint4*)&valued[i * RUN] = *(const uint4*)&to[(i * TEAM + lane) * RUN];
    } else {
      for (int i = 0; i < NW * RUN; i++) {
        int at = (i / RUN * TEAM + lane) * RUN + i % RUN;
        if (at < W) keyed[i] = from[at * k_strides[3]];
      }
      for (int i = 0; i < NE * RUN; i++) {
        int at = (i / RUN * TEAM + lane) * RUN + i % RUN;
        if (at < E) valued[i] = to[at * v_strides[3]];
      }
    }
    for (int i = 0; i < NW * RUN; i++)
      if ((i / RUN * TEAM + lane) * RUN + i % RUN < W) score += scaled[i] * (float)keyed[i];
  }
  for (int o = 1; o < TEAM; o *= 2) score += __shfl_xor_sync(0xffffffffu, score, o);
  score += bias;
  if (seen && score != NONE) {
    float higher = fmaxf(top, score), kept = expf(top - higher), weight = expf(score - higher);
    top = higher;
    total = total * kept + weight;
    for (int i = 0; i < NE * RUN; i++)
      if ((i / RUN * TEAM + lane) * RUN + i % RUN < E) sum[i] = sum[i] * kept + weight * (float)valued[i];
  }
}
for (int o = TEAM; o < 32; o *= 2) {
  float other = __shfl_xor_sync(0xffffffffu, top, o), higher = fmaxf(top, other);
  float kept = higher == NONE ? 1.0f : expf(top - higher), added = higher == NONE ? 1.0f : expf(other - higher);
  top = higher;
  total = total * kept + __shfl_xor_sync(0xffffffffu, total, o) * added;
  for (int i = 0; i < NE * RUN; i++) sum[i] = sum[i] * kept + __shfl_xor_sync(0xffffffffu, sum[i], o) * added;
}
int warp = threadIdx.x / 32, warps = blockDim.x / 32;
if (threadIdx.x % 32 < TEAM) {
  if (lane == 0) {
    tops[warp] = top;
    totals[warp] = total;
  }
  for (int i = 0; i < NE * RUN; i++) {
    int at = (i / RUN * TEAM + lane) * RUN + i % RUN;
    if (at < E) sums[warp * E + at] = sum[i];
  }
}
__syncthreads();
for (int e = threadIdx.x; e < E; e += blockDim.x) {
  float highest = NONE, weights = 0, result = 0;
  for (int w = 0; w < warps; w++) highest = fmaxf(highest, tops[w]);
  for (int w = 0; w < warps; w++) {
    float kept = tops[w] == NONE ? 0.0f : expf(tops[w] - highest);
    if (kept != 0 || totals[w] != totals[w]) {
      weights += totals[w] * kept;
      result += sums[w * E + e] * kept;
    }
  }
  if (highest == NONE && numbers[2] != 0) {
    for (int j = 0; j < keys; j++) result += (float)value[j * v_strides[2] + e * v_strides[3]];
    weights = keys;
  }
  out[blockIdx.x * E + e] = (T)(result / weights);
}
"""
_NO_MASK = {"MASK_ROW": "", "SEEN": ""}
_MASKS = {
    "bool": "seen = seen && hidden[j * mask_strides[3]];",
    "float": "bias = seen ? (float)hidden[j * mask_strides[3]] : 0.0f;",
}


def fits(dtype: str, queries: Sequence[int], width: int, values: int) -> bool:
    """Whether the kernel is for rows of such widths, and so many queries of each key: groups that share a head, then positions."""
    few = math.prod(queries) <= _MOST_QUERIES and math.prod(queries[-1:]) <= _MOST_POSITIONS
    return device_kind() == "cuda" and dtype in _TYPES and few and max(width, values) <= _WIDEST


def source(dtype: str, width: int, values: int, mask: str | None) -> str:
    """The kernel's body; mask: the dtype of the array that says what is seen or is added, None without one."""
    name, _ = _TYPES[dtype]
    parts = dict(_NO_MASK)
    if mask is not None:
        hidden = "bool" if mask == "bool" else _TYPES[mask][0]
        parts["MASK_ROW"] = f"const {hidden}* hidden = mask + b * mask_strides[0] + h * mask_strides[1] + t * mask_strides[2];"
        parts["SEEN"] = _MASKS["bool" if mask == "bool" else "float"]
    text = f"typedef {name} T;\n" + _SOURCE.replace("WIDTH", str(width)).replace("VALUES", str(values))
    for part, code in parts.items():
        text = text.replace(part, code)
    return text


@functools.cache
def _kernel(dtype: str, width: int, values: int, mask: str | None) -> Callable[..., list[mx.array]]:
    inputs = ["numbers", "q", "k", "v", *(["mask"] if mask else [])]
    name = f"jax_decoding_{dtype}_{width}_{values}_{mask}"
    return cuda_kernel(name, inputs, ["out"], source(dtype, width, values, mask), contiguous=False)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None, *, scale: float, causal: bool, fill: float) -> mx.array:
    """softmax(scale q k^T, masked) v; all are (batch, heads, positions, width), and fewer heads of keys are shared by groups of queries.

    fill: what hidden scores are: -inf, or finite, when a query that sees nothing gives the mean of all values.
    """
    batch, heads, positions, width = q.shape
    values, dtype = v.shape[-1], str(q.dtype).rsplit(".", 1)[-1]
    numbers = mx.array([scale, float(causal), float(fill != -math.inf)], mx.float32)
    masks = [] if mask is None else [mx.broadcast_to(mask, (batch, heads, positions, k.shape[2]))]
    kind = None if mask is None else "bool" if mask.dtype == mx.bool_ else str(mask.dtype).rsplit(".", 1)[-1]
    threads = min(_THREADS if max(width, values) <= 128 else _THREADS // 2, -(-k.shape[2] * _TEAM // 32) * 32)
    (y,) = _kernel(dtype, width, values, kind)(
        inputs=[numbers, q, k, v, *masks],
        output_shapes=[(batch, heads, positions, values)],
        output_dtypes=[q.dtype],
        grid=(threads * batch * heads * positions, 1, 1),
        threadgroup=(threads, 1, 1),
    )
    return y
