"""Sums of many numbers into few bins on CUDA: one kernel of our own, which sums in each block's shared memory first.

MLX's scatter adds each number to the result itself, where all of them wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.dtypes import MX
from jax_mps.ops.target import device_kind

MOST_BINS = 8192  # of 4 bytes: 32 KiB of shared memory
_FEWEST = 1 << 15  # numbers; below, a block has too few of them
_TYPES = {"float32": "float", "int32": "int32_t"}
_THREADS, _BLOCKS = 1024, 132

# sizes = (numbers, bins, what is added to a negative index); what is outside is dropped.
_SOURCE = f"""
__shared__ TYPE part[{MOST_BINS}];
uint32_t numbers = sizes[0], bins = sizes[1];
for (uint32_t b = threadIdx.x; b < bins; b += blockDim.x) part[b] = 0;
__syncthreads();
for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < numbers; i += gridDim.x * blockDim.x) {{
  int32_t at = index[i];
  uint32_t bin = at < 0 ? at + sizes[2] : at;
  if (bin < bins) atomicAdd(&part[bin], update[i]);
}}
__syncthreads();
for (uint32_t b = threadIdx.x; b < bins; b += blockDim.x)
  if (part[b] != 0) atomicAdd(&total[b], part[b]);
"""


def fits(dtype: str, index: str, numbers: int, bins: int) -> bool:
    """Whether the kernel is for this: that many numbers of a type into so many bins."""
    return device_kind() == "cuda" and dtype in _TYPES and index == "int32" and bins <= MOST_BINS and _FEWEST <= numbers < 2**31 - 2**20


@functools.cache
def _kernel(dtype: str) -> Callable[..., list[mx.array]]:
    source = _SOURCE.replace("TYPE", _TYPES[dtype])
    return cuda_kernel(f"jax_bins_{dtype}", ["sizes", "index", "update"], ["total"], source)


def sums(index: mx.array, update: mx.array, bins: int, dtype: str, *, wrapped: bool) -> mx.array:
    """The sum of the updates of each bin. wrapped: negative indices count from the end."""
    threads = _THREADS * min(_BLOCKS, -(-index.size // (4 * _THREADS)))
    return _kernel(dtype)(
        inputs=[mx.array([index.size, bins, bins if wrapped else 0], mx.uint32), mx.reshape(index, (-1,)), mx.reshape(update, (-1,))],
        output_shapes=[(bins,)],
        output_dtypes=[MX[dtype]],
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        init_value=0.0,
    )[0]
