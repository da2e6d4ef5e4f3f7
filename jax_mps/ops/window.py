"""`reduce_window` and `select_and_scatter`: windows as shifted slices, cumulative scans recognised, no scatter needed."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.bodies import folds, is_identity
from jax_mps.ops.dtypes import MX
from jax_mps.ops.reduce import combine
from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Step

Arrays = tuple[mx.array, ...]
Combine = Callable[[Arrays, Arrays], Arrays]
_HALVES = (mx.float16, mx.bfloat16)


@lowers("stablehlo.reduce_window")
def reduce_window(op: Step, body: LoweredRegion) -> Run:
    count, shape = len(op.results), op.result.shape
    dtypes = [MX[v.dtype] for v in op.results]
    if 0 in shape:
        return lambda *arrays: [mx.zeros(shape, dtype) for dtype in dtypes]
    names = folds(body.region)
    if names is None and not body.is_elementwise:
        raise Unsupported(op, "the body is not elementwise")
    neutral = names is not None and all(is_identity(n, v) for n, v in zip(names, op.operands[count:], strict=True))
    scan = _scan(op) if neutral else None
    if (
        names is not None
        and scan is not None
        and all((_SCANS.get(n) and v.dtype != "complex64") or n == "add" for n, v in zip(names, op.operands, strict=False))
    ):
        axis, backward = scan
        return lambda *arrays: [cumulative(n, x, axis, reverse=backward) for n, x in zip(names, arrays[:count], strict=True)]
    step = _of_folds(names) if names is not None else _of_body(body)

    def run(*arrays: mx.array) -> Sequence[mx.array]:
        xs, inits = _wide(arrays[:count], names), _wide(arrays[count:], names)
        xs = tuple(_padded(x, init, op) for x, init in zip(xs, inits, strict=True))
        for axis in reversed(range(op.operand.rank)):  # inner dimensions first: the window's elements keep their order
            xs = _slide(step, xs, axis, op.window_dimensions[axis], op.window_dilations[axis], op.window_strides[axis], shape[axis])
        if not neutral:
            xs = step(tuple(mx.broadcast_to(init, shape) for init in inits), xs)
        return [x.astype(dtype) for x, dtype in zip(xs, dtypes, strict=True)]

    return run


def _of_folds(names: Sequence[str]) -> Combine:
    return lambda xs, ys: tuple(combine(n, x, y) for n, x, y in zip(names, xs, ys, strict=True))


def _of_body(body: LoweredRegion) -> Combine:
    return lambda xs, ys: body(*xs, *ys)


def _wide(arrays: Sequence[mx.array], names: Sequence[str] | None) -> Arrays:
    """Half types summed and multiplied in float32, and rounded once, as XLA does."""
    if names is None:
        return tuple(arrays)
    return tuple(a.astype(mx.float32) if a.dtype in _HALVES and n in ("add", "multiply") else a for a, n in zip(arrays, names, strict=True))


def _padded(x: mx.array, value: mx.array, op: Step) -> mx.array:
    """Init values in the holes of the base dilation and at the edges; negative edges cut off."""
    if max(op.base_dilations, default=1) > 1:
        holes = [pair for dilation in op.base_dilations for pair in ((0, 0), (0, dilation - 1))]
        spread = mx.pad(mx.expand_dims(x, tuple(range(1, 2 * x.ndim, 2))), holes, constant_values=value)
        x = spread.reshape([n * by for n, by in zip(x.shape, op.base_dilations, strict=True)])
    edges = [(int(low), int(high)) for low, high in op.padding]
    ends = [n - (by - 1) + min(high, 0) for n, by, (_, high) in zip(x.shape, op.base_dilations, edges, strict=True)]
    x = x[tuple(slice(max(-low, 0), max(end, 0)) for (low, _), end in zip(edges, ends, strict=True))]
    grown = [(max(low, 0), max(high, 0)) for low, high in edges]
    return mx.pad(x, grown, constant_values=value) if any(map(sum, grown)) else x


def _slide(step: Combine, xs: Arrays, axis: int, size: int, dilation: int, stride: int, out: int) -> Arrays:
    """Fold each window along one axis: slice by slice, or by doubling where the windows are long."""
    length = xs[0].shape[axis]
    doublings = size.bit_length() + size.bit_count() - 2
    if (size - 1) * out <= doublings * length:
        reach = (out - 1) * stride + 1
        slices = [tuple(_cut(x, axis, k * dilation, k * dilation + reach, stride) for x in xs) for k in range(size)]
        return _in_pairs(step, slices)
    powers, whole, covered = xs, None, 0
    for bit in range(size.bit_length()):
        if bit:
            powers = _joined(step, powers, powers, axis, dilation << (bit - 1))
        if size >> bit & 1:
            whole = powers if whole is None else _joined(step, whole, powers, axis, dilation * covered)
            covered += 1 << bit
    assert whole is not None
    return tuple(_cut(x, axis, 0, (out - 1) * stride + 1, stride) for x in whole)


def _in_pairs(step: Combine, parts: list[Arrays]) -> Arrays:
    while len(parts) > 1:
        parts = [step(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]


def _joined(step: Combine, xs: Arrays, ys: Arrays, axis: int, shift: int) -> Arrays:
    """Each element of `xs` with the one of `ys` that lies `shift` further on, as far as both reach."""
    n = min(xs[0].shape[axis], ys[0].shape[axis] - shift)
    return step(tuple(_cut(x, axis, 0, n) for x in xs), tuple(_cut(y, axis, shift, shift + n) for y in ys))


def _cut(x: mx.array, axis: int, start: int, stop: int, stride: int = 1) -> mx.array:
    return x[(*(slice(None),) * axis, slice(start, stop, stride))]


# ---- cumulative scans ----------------------------------------------------------------------------------------------------------------


def _scan(op: Step) -> tuple[int, bool] | None:
    """The axis and direction of a window that is a whole dimension and everything on one side of each element."""
    active = [d for d, size in enumerate(op.window_dimensions) if size > 1]
    plain = (1,) * op.operand.rank
    if len(active) != 1 or not tuple(op.window_strides) == tuple(op.base_dilations) == tuple(op.window_dilations) == plain:
        return None
    axis = active[0]
    n = op.window_dimensions[axis]
    edges = [(int(low), int(high)) for low, high in op.padding]
    if n < op.operand.shape[axis] or any(edge != (0, 0) for d, edge in enumerate(edges) if d != axis):
        return None
    return {(n - 1, 0): (axis, False), (0, n - 1): (axis, True)}.get(edges[axis])


_SCANS: dict[str, Callable[..., mx.array]] = {"add": mx.cumsum, "multiply": mx.cumprod, "maximum": mx.cummax, "minimum": mx.cummin}
_BOOLEAN = {"add": "maximum", "or": "maximum", "multiply": "minimum", "and": "minimum"}
# On CPU MLX adds in order; runs of this many terms keep float32's sums as good as XLA's.
_RUN = 128
# Forward scans of half types no longer than this are rounded at every step, which is what XLA's CPU backend does; longer ones it cuts into blocks.
_SHORT = 16


def cumulative(name: str, x: mx.array, axis: int, *, reverse: bool) -> mx.array:
    """An inclusive scan along an axis, in the array's dtype; half types are rounded once (see also `_SHORT`). Of their NaN, MLX's scans for
    the extreme make 0 on CPU (0.32.4)."""
    if x.dtype == mx.bool_:
        return _SCANS[_BOOLEAN.get(name, name)](x.astype(mx.uint8), axis=axis, reverse=reverse).astype(mx.bool_)
    in_order = not reverse and x.shape[axis] <= _SHORT and name in ("add", "multiply")
    wide = x.astype(mx.float32) if x.dtype in _HALVES and not in_order else x
    if name == "add" and wide.dtype in (mx.float32, mx.complex64) and device_kind() == "cpu":
        return _running_sum(wide, axis, reverse).astype(x.dtype)
    return _SCANS[name](wide, axis=axis, reverse=reverse).astype(x.dtype)


def _running_sum(x: mx.array, axis: int, reverse: bool) -> mx.array:
    n = x.shape[axis]
    if n <= _RUN:
        return mx.cumsum(x, axis=axis, reverse=reverse)
    rows = -(-n // _RUN)
    edge = (rows * _RUN - n, 0) if reverse else (0, rows * _RUN - n)
    x = mx.pad(x, [edge if d == axis else (0, 0) for d in range(x.ndim)])
    runs = mx.cumsum(x.reshape(*x.shape[:axis], rows, _RUN, *x.shape[axis + 1 :]), axis=axis + 1, reverse=reverse)
    totals = mx.squeeze(_cut(runs, axis + 1, *((0, 1) if reverse else (_RUN - 1, _RUN))), axis + 1)
    before = _running_sum(totals, axis, reverse)
    before = _cut(before, axis, 1, rows) if reverse else _cut(before, axis, 0, rows - 1)
    before = mx.pad(before, [((0, 1) if reverse else (1, 0)) if d == axis else (0, 0) for d in range(x.ndim)])
    summed = (runs + mx.expand_dims(before, axis + 1)).reshape(x.shape)
    return _cut(summed, axis, edge[0], edge[0] + n)


# ---- select_and_scatter --------------------------------------------------------------------------------------------------------------

# Windows of more elements than this are folded as a tree over one array that holds them all.
_UNROLLED = 64


@dataclass(frozen=True, slots=True)
class _Grid:
    """The windows of a `select_and_scatter` over an operand of `shape`: `out` of them along each dimension."""

    shape: tuple[int, ...]
    size: tuple[int, ...]
    strides: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    out: tuple[int, ...]

    def offsets(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Each element of a window: its number in row-major order and its position."""
        return enumerate(itertools.product(*map(range, self.size)))

    def at(self, padded: mx.array, offset: Sequence[int]) -> mx.array:
        """That element of every window."""
        return padded[tuple(slice(k, k + (o - 1) * s + 1, s) for k, o, s in zip(offset, self.out, self.strides, strict=True))]

    def is_inside(self, axis: int, k: int) -> np.ndarray:
        """For each window along an axis, whether its element `k` lies in the operand and not in the padding."""
        place = np.arange(self.out[axis]) * self.strides[axis] + k - self.low[axis]
        return (place >= 0) & (place < self.shape[axis])

    def valid(self, offset: Sequence[int]) -> mx.array | None:
        """As `is_inside` over all axes, broadcastable; None where every window's element is."""
        masks = []
        for axis, k in enumerate(offset):
            inside = self.is_inside(axis, k)
            if not inside.all():
                masks.append(mx.array(inside).reshape(-1, *(1,) * (len(self.shape) - 1 - axis)))
        return functools.reduce(mx.logical_and, masks) if masks else None


@lowers("stablehlo.select_and_scatter")
def select_and_scatter(op: Step, select: LoweredRegion, scatter: LoweredRegion) -> Run:
    shape, dtype = op.operand.shape, MX[op.result.dtype]
    source = op.operands[1].type
    if 0 in shape:
        return lambda x, source, init: mx.zeros(shape, dtype)
    if 0 in source.shape:
        return lambda x, source, init: mx.broadcast_to(init, shape)
    names = folds(scatter.region)
    if not select.is_elementwise or (names is None and not scatter.is_elementwise):
        raise Unsupported(op, "a region is not elementwise")
    low, high = (tuple(int(side) for side in sides) for sides in zip(*op.padding, strict=True))
    if min(*low, *high) < 0:
        raise Unsupported(op, "negative padding")
    grid = _Grid(shape, tuple(op.window_dimensions), tuple(op.window_strides), low, high, source.shape)
    step = _of_folds(names) if names is not None else _of_body(scatter)

    def run(x: mx.array, source: mx.array, init: mx.array) -> mx.array:
        x, source, init = (mx.reshape(a, a.shape) for a in (x, source, init))
        x = mx.pad(x, list(zip(low, high, strict=True)))
        chosen = _chosen(x, grid, lambda a, b: select(a, b)[0])
        if names is not None:
            (source,), (init,) = _wide((source,), names), _wide((init,), names)
        return _scattered(chosen, source, init, grid, step, is_sum=names == ("add",)).astype(dtype)

    return run


def _chosen(x: mx.array, grid: _Grid, keeps: Callable[[mx.array, mx.array], mx.array]) -> mx.array:
    """The number of the element that each window selects: a later one replaces it where `keeps` is false. Padding is never selected."""
    count = math.prod(grid.size)
    kind = mx.int8 if count <= 127 else mx.int32
    none = mx.array(-1, kind)
    best, place = None, mx.broadcast_to(none, grid.out)
    for number, offset in grid.offsets():
        value, this, valid = grid.at(x, offset), mx.array(number, kind), grid.valid(offset)
        if best is None:
            best, place = value, mx.broadcast_to(this if valid is None else mx.where(valid, this, none), grid.out)
            continue
        replace = mx.logical_not(keeps(best, value))
        if any(grid.low) or any(grid.high):
            replace = mx.logical_or(replace, place < 0)
        if valid is not None:
            replace = mx.logical_and(replace, valid)
        best, place = mx.where(replace, value, best), mx.where(replace, this, place)
    return place


def _scattered(chosen: mx.array, source: mx.array, init: mx.array, grid: _Grid, step: Combine, *, is_sum: bool) -> mx.array:
    """Every element of the padded operand gathers from the windows that chose it: one array for each position modulo the strides."""
    overlap = [-(-w // s) for w, s in zip(grid.size, grid.strides, strict=True)]
    cells = [o + j - 1 for o, j in zip(grid.out, overlap, strict=True)]
    edges = [(j - 1, j - 1) for j in overlap]
    chosen = mx.pad(chosen, edges, constant_values=mx.array(-1, chosen.dtype))
    source = mx.pad(source, edges)
    numbers = {offset: number for number, offset in grid.offsets()}
    phases = []
    for phase in itertools.product(*map(range, grid.strides)):
        total = mx.broadcast_to(init, cells)
        for back in itertools.product(*map(range, overlap)):
            number = numbers.get(tuple(p + s * j for p, s, j in zip(phase, grid.strides, back, strict=True)))
            if number is None:
                continue
            window = tuple(slice(j - 1 - b, j - 1 - b + c) for j, b, c in zip(overlap, back, cells, strict=True))
            chose, update = chosen[window] == mx.array(number, chosen.dtype), source[window]
            if is_sum:
                (total,) = step((total,), (mx.where(chose, update, mx.array(0, update.dtype)),))
            else:
                total = mx.where(chose, step((total,), (update,))[0], total)
        phases.append(total)
    return _interleaved(phases, cells, init, grid)


def _interleaved(phases: Sequence[mx.array], cells: Sequence[int], init: mx.array, grid: _Grid) -> mx.array:
    """The phases in their places, cut to the operand's shape."""
    rank = len(cells)
    x = phases[0]
    if len(phases) > 1:
        x = mx.stack(list(phases)).reshape(*grid.strides, *cells)
        x = mx.transpose(x, [axis for d in range(rank) for axis in (rank + d, d)]).reshape([c * s for c, s in zip(cells, grid.strides, strict=True)])
    missing = [max(low + n - size, 0) for low, n, size in zip(grid.low, grid.shape, x.shape, strict=True)]
    if any(missing):
        x = mx.pad(x, [(0, m) for m in missing], constant_values=init)
    return x[tuple(slice(low, low + n) for low, n in zip(grid.low, grid.shape, strict=True))]
