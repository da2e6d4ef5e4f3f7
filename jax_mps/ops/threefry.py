"""JAX's draws of random bits (see rewrites/threefry.py): one kernel of our own on a GPU, MLX's ops on CPU.

MLX's own `random.bits` is the same algorithm, but counts (i, i + n/2) where JAX counts (0, i). A kernel reads sizes from an array and not from
its source, so that there are three of them for all shapes, compiled once for a machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.dtypes import MX
from jax_mps.ops.random import three_fry_2x32
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

Shape = tuple[int, ...]

_MOST = 2**31 - 1  # threads of one grid


@lowers("jax_mps.threefry2x32")
def threefry2x32(op: Step) -> Run:
    """Both words of each counter, encrypted."""
    shape = op.result.shape
    if _on_gpu(shape):
        return lambda *arrays: _launch("pair", shape, arrays[:2], arrays[2:4])

    def run(key0: mx.array, key1: mx.array, high: mx.array, low: mx.array) -> list[mx.array]:
        return [mx.broadcast_to(v, shape) for v in three_fry_2x32((key0, key1), (high, low))]

    return run


@lowers("jax_mps.threefry_counted")
def threefry_counted(op: Step) -> Run:
    """As `threefry2x32`, of the counters (0, position in `drawn`)."""
    shape, drawn = op.result.shape, op.drawn
    if _on_gpu(shape):
        return lambda *arrays: _launch("counted", shape, arrays[:2], (), math.prod(drawn))
    return lambda key0, key1, *rest: _in_blocks(key0, key1, shape, drawn, lambda x, y: [x, y])


@lowers("jax_mps.threefry_bits")
def threefry_bits(op: Step) -> Run:
    """The two words of `threefry_counted` xored."""
    shape, drawn = op.result.shape, op.drawn
    if _on_gpu(shape):
        return lambda *arrays: _launch("bits", shape, arrays[:2], (), math.prod(drawn))
    return lambda key0, key1, *rest: _in_blocks(key0, key1, shape, drawn, lambda x, y: [x ^ y])


@lowers("jax_mps.unit")
def unit(op: Step) -> Run:
    """The high bits as a fraction of 1."""
    shift, scale, dtype = op.shift, mx.array(2.0**-op.mantissa, MX[op.result.dtype]), MX[op.result.dtype]
    return lambda bits, *rest: (bits >> mx.array(shift, bits.dtype)).astype(dtype) * scale


# On CPU, a draw of one key is made in up to so many blocks of at least so many elements: each of a hundred steps then finds its operands in a
# cache, and MLX, which starts steps ahead, holds a sixteenth of the memory.
_BLOCKS, _BLOCK = 16, 1 << 17

Finish = Callable[[mx.array, mx.array], list[mx.array]]


def _in_blocks(key0: mx.array, key1: mx.array, shape: Shape, drawn: Shape, finish: Finish) -> list[mx.array]:
    """What `finish` makes of both words of the counters (0, position)."""
    size = math.prod(drawn)
    if key0.size > 1 or size < 2 * _BLOCK:
        words = three_fry_2x32((key0, key1), (mx.array(0, mx.uint32), mx.arange(size, dtype=mx.uint32).reshape(drawn)))
        return [mx.broadcast_to(v, shape) for v in finish(*words)]
    keys = mx.reshape(key0, ()), mx.reshape(key1, ())
    block = max(_BLOCK, -(-size // _BLOCKS))
    starts = range(0, size, block)
    parts = [finish(*three_fry_2x32(keys, (mx.array(0, mx.uint32), mx.arange(start, min(size, start + block), dtype=mx.uint32)))) for start in starts]
    return [mx.reshape(mx.concatenate(list(v)), shape) for v in zip(*parts, strict=True)]


# ---- the kernel ----------------------------------------------------------------------------------------------------------------------

_INDEX = {"cuda": "blockIdx.x * blockDim.x + threadIdx.x", "metal": "thread_position_in_grid.x"}
_COUNTER = {"pair": ("high[i % sizes[2]]", "low[i % sizes[2]]"), "counted": ("0", "i % sizes[2]"), "bits": ("0", "i % sizes[2]")}
_OUTPUTS = {"pair": ["first", "second"], "counted": ["first", "second"], "bits": ["out"]}
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _on_gpu(shape: Shape) -> bool:
    return device_kind() in _INDEX and 0 < math.prod(shape) <= _MOST


def source(form: str, device: str) -> str:
    """The kernel's body: one thread for each element, sizes = (elements, elements for each key, counters)."""
    high, low = _COUNTER[form]
    lines = [
        f"uint32_t i = {_INDEX[device]};",
        "if (i >= sizes[0]) return;",
        "uint32_t j = i / sizes[1];",
        "uint32_t k0 = key0[j], k1 = key1[j], k2 = k0 ^ k1 ^ 0x1BD11BDAu;",
        f"uint32_t x = {high} + k0, y = {low} + k1;",
    ]
    for group in range(5):
        lines += [f"x += y; y = x ^ ((y << {r}) | (y >> {32 - r}));" for r in _ROTATIONS[group % 2]]
        lines.append(f"x += k{(group + 1) % 3}; y += k{(group + 2) % 3} + {group + 1}u;")
    lines.append("out[i] = x ^ y;" if form == "bits" else "first[i] = x; second[i] = y;")
    return "\n".join(lines)


@functools.cache
def _kernel(form: str, device: str) -> Callable[..., list[mx.array]]:
    inputs = ["sizes", "key0", "key1", *(["high", "low"] if form == "pair" else [])]
    make: Any = cuda_kernel if device == "cuda" else mx.fast.metal_kernel
    kernel = make(f"jax_threefry_{form}", inputs, _OUTPUTS[form], source(form, device))
    return cast(Callable[..., list[mx.array]], kernel)


def _launch(form: str, shape: Shape, keys: Sequence[mx.array], counters: Sequence[mx.array], drawn: int = 0) -> list[mx.array]:
    size = math.prod(shape)
    keys, repeats = _flat(keys, shape, _repeats)
    counters, period = _flat(counters, shape, _period) if counters else ((), drawn)
    sizes = mx.array([size, repeats, period], mx.uint32)
    outputs = len(_OUTPUTS[form])
    return _kernel(form, device_kind())(
        inputs=[sizes, *keys, *counters],
        output_shapes=[shape] * outputs,
        output_dtypes=[mx.uint32] * outputs,
        grid=(size, 1, 1),
        threadgroup=(256, 1, 1),
    )


def _flat(arrays: Sequence[mx.array], shape: Shape, measure: Callable[[Shape, Shape], int | None]) -> tuple[Sequence[mx.array], int]:
    """The arrays as lines, and how an element's number leads to an entry; broadcast to `shape` where that is no simple rule."""
    found = {measure((1,) * (len(shape) - a.ndim) + tuple(a.shape), shape) for a in arrays}
    number = found.pop() if len(found) == 1 else None
    if number is None:
        arrays, number = [mx.broadcast_to(a, shape) for a in arrays], measure(shape, shape)
    assert number is not None
    return [mx.reshape(a, (-1,)) for a in arrays], number


def _repeats(shape: Shape, result: Shape) -> int | None:
    """How many neighbours share an entry, if `shape` is the result's with 1 for its last dimensions."""
    kept = next((d for d in range(len(shape)) if shape[d] != result[d]), len(shape))
    return math.prod(result[kept:]) if all(s == 1 for s in shape[kept:]) else None


def _period(shape: Shape, result: Shape) -> int | None:
    """After how many elements the entries start again, if `shape` is the result's with 1 for its first dimensions."""
    kept = next((d + 1 for d in reversed(range(len(shape))) if shape[d] != result[d]), 0)
    return math.prod(result[kept:]) if all(s == 1 for s in shape[:kept]) else None
