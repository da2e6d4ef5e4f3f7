"""How a block of threads knows that it is the last of a kernel's, on CUDA: it sums up what all of them have left, which would else take a second kernel.

Blocks count themselves in words of memory that are zero before. One small kernel makes these for all kernels of a region (rewrites/arrivals.py), in
each run of it, each kernel has words of its own: others may run beside it. Which block is last differs from run to run, the order of summation does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

WORDS = 64  # of one kernel, 256 bytes
_THREADS = 256

# arrive(word, count): whether this block is the last of so many, in all of its threads. What the others have written is read by __ldcg then, since a
# processor's own cache does not know of it. `arrived` is an input to MLX: that nobody else reads these words is what makes it right to write them; they
# are left as they were, should what reads them be run again.
TEXT = """
__shared__ bool last;
auto arrive = [&](uint32_t word, uint32_t count) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* counter = (uint32_t*)arrived + FIRST + word;
    last = atomicAdd(counter, 1u) + 1 == count;
    if (last) *counter = 0;
  }
  __syncthreads();
  __threadfence();
  return last;
};
"""

_SOURCE = "uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;\nif (i < sizes[0]) words[i] = 0;"


@functools.cache
def _kernel() -> Callable[..., list[mx.array]]:
    return cuda_kernel("jax_zeros", ["sizes"], ["words"], _SOURCE)


@lowers("jax_mps.zeros")
def zeros(op: Step) -> Run:
    """A kernel and not MLX's zeros, which `mx.compile` would take for any other zeros of that size."""
    if device_kind() != "cuda":
        raise Unsupported(op, "a kernel that only CUDA has")
    size = op.result.size

    def run() -> list[mx.array]:
        return _kernel()(
            inputs=[mx.array([size], mx.uint32)],
            output_shapes=[(size,)],
            output_dtypes=[mx.uint32],
            grid=(-(-size // _THREADS) * _THREADS, 1, 1),
            threadgroup=(_THREADS, 1, 1),
        )

    return run
