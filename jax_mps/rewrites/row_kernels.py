"""Reductions along rows with the elementwise steps before, between and after them, in one step; on CUDA.

There one kernel of our own reads the operands and writes the results (ops/row_kernels.py), where MLX has one for each reduction and one for the steps
between two of them. An island of such steps grows from a reduction, or from what other rewrites made of several (softmax and its relatives): steps whose
results only the island reads, and steps that leave nothing else to read what the island holds. What it reads may be made by it for others as well
(the sum of a residual stream, before a norm): where that is in memory anyway, and made of what is.

Cheap steps that are made of positions and constants alone (a causal mask) are computed in place, by as many islands as read them; so are broadcasts.

Arrays are large; in the bodies of loops, they may be small where the kernel does the work of three or more; a norm's, anywhere, where it does that of two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops import cuda_text, row_kernels
from jax_mps.ops.bodies import folds
from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.scatter import line_of
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, TensorType, Value, numpy_dtype
from jax_mps.rewrites.match import splat
from jax_mps.rewrites.recompute import note_stage
from jax_mps.rewrites.table import Scope

_FEWEST, _FEWEST_ROWS, _FEWEST_COLUMNS = 1 << 18, 128, 32  # elements; rows, one or more for each processor; columns
_FEWEST_IN_LOOP, _LONGEST_IN_LOOP = 4, 1 << 12  # columns of small arrays; what they cost is the start of a kernel, in each iteration
_LEAST_SAVED = 2  # kernels of MLX's, for small arrays that are no norm's
_MOST_ROWS = 1 << 26
_MOST_STEPS, _MOST_ARRAYS = 48, 8  # of one kernel: enough for what JAX writes, and few registers
_MOST_FREE = 12  # steps from positions to a mask
_AHEAD = 4  # steps to what an island may grow by
_FREE = 16  # what is so many times smaller may be read by any number of kernels

_VIEWS = frozenset(["stablehlo.broadcast_in_dim", "stablehlo.reshape"])
_STRIDED = frozenset(f"stablehlo.{name}" for name in ("broadcast_in_dim", "convolution", "reverse", "transpose"))  # copied for our kernels
_SOURCES = frozenset(["stablehlo.iota", "stablehlo.constant"])
_CHEAP = frozenset(
    f"stablehlo.{name}" for name in ("add", "and", "compare", "convert", "maximum", "minimum", "multiply", "negate", "not", "or", "select", "subtract", "xor")
)


# ---- what other rewrites made one step of, as steps again -----------------------------------------------------------------------------


class _Writer:
    """Steps, in order, each printable as StableHLO."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, name: str, *operands: Value, kind: TensorType, result: Value | None = None, regions: tuple[Region, ...] = (), **lists: Any) -> Value:
        """lists: attributes that are lists of numbers."""
        text = tuple((k, f"array<i64: {', '.join(map(str, v))}>" if v else "array<i64>") for k, v in lists.items())
        return self.put(Step(f"stablehlo.{name}", operands, (result or Value(kind),), lists, regions, text=text))

    def put(self, step: Step) -> Value:
        self.steps.append(step)
        return step.results[0]

    def compare(self, direction: str, a: Value, b: Value) -> Value:
        given = {"comparison_direction": direction, "compare_type": "SIGNED"}
        text = (("comparison_direction", f"#stablehlo<comparison_direction {direction}>"), ("compare_type", "#stablehlo<comparison_type SIGNED>"))
        return self.put(Step("stablehlo.compare", (a, b), (Value(TensorType(a.shape, "bool")),), given, text=text))

    def positions(self, kind: TensorType) -> Value:
        """Along the rows."""
        last = kind.rank - 1
        return self.put(Step("stablehlo.iota", (), (Value(kind),), {"iota_dimension": last}, text=(("iota_dimension", f"{last} : i64"),)))

    def number(self, value: float, kind: TensorType) -> Value:
        number = np.array(value, numpy_dtype(kind.dtype))
        scalar = self.put(Step("stablehlo.constant", (), (Value(TensorType((), kind.dtype)),), {"value": number}, text=()))
        return scalar if not kind.shape else self.step("broadcast_in_dim", scalar, kind=kind, broadcast_dimensions=())

    def to(self, x: Value, dtype: str, result: Value | None = None) -> Value:
        return x if x.dtype == dtype and result is None else self.step("convert", x, kind=TensorType(x.shape, dtype), result=result)

    def fold(self, name: str, x: Value) -> Value:
        """Along the rows, half types with their own number in the end."""
        kind, scalar = TensorType(x.shape[:-1], x.dtype), TensorType((), x.dtype)
        start = self.number(row_kernels.FOLDS[name][1], scalar)
        a, b, c = Value(scalar), Value(scalar), Value(scalar)
        body = Region((a, b), (Step(f"stablehlo.{name}", (a, b), (c,), text=()),), (c,))
        return self.step("reduce", x, start, kind=kind, regions=(body,), dimensions=(x.type.rank - 1,))

    def spread(self, row: Value, like: Value) -> Value:
        return self.step("broadcast_in_dim", row, kind=like.type, broadcast_dimensions=tuple(range(like.type.rank - 1)))

    def line(self, x: Value, like: Value) -> Value:
        """The same for all rows."""
        row = self.to(self.step("reshape", x, kind=TensorType(like.shape[-1:], x.dtype)), like.dtype)
        return self.step("broadcast_in_dim", row, kind=like.type, broadcast_dimensions=(like.type.rank - 1,))

    def exponentials(self, x: Value, m: Value) -> tuple[Value, Value, Value]:
        """x - m, exp(x - m), and the sum of that."""
        shifted = self.step("subtract", x, self.spread(m, x), kind=x.type)
        e = self.step("exponential", shifted, kind=x.type)
        return shifted, e, self.fold("add", e)

    def softmax(self, x: Value, times: Value | None = None, result: Value | None = None) -> Value:
        """times: what each row is multiplied by."""
        wide = self.to(x, "float32")
        _, e, total = self.exponentials(wide, self.fold("maximum", wide))
        factor = self.step("divide", times or self.number(1.0, total.type), total, kind=total.type)  # one division a row
        same = x.dtype == "float32"
        y = self.step("multiply", e, self.spread(factor, e), kind=e.type, result=result if same else None)
        return y if same else self.to(y, x.dtype, result)


Parts = Callable[[_Writer, Step, Value | None], None]  # writes what a step stands for; the value: the softmax of its rows, if that is known


def _softmax(w: _Writer, step: Step, known: Value | None) -> None:
    w.softmax(step.operands[0], result=step.results[0])


def _log_softmax(w: _Writer, step: Step, known: Value | None) -> None:
    x = w.to(step.operands[0], "float32")
    shifted, _, total = w.exponentials(x, w.fold("maximum", x))
    log = w.step("log", total, kind=total.type)
    y = w.step("subtract", shifted, w.spread(log, shifted), kind=x.type)
    w.to(y, step.result.dtype, step.results[0])


def _log_sum_exp(w: _Writer, step: Step, known: Value | None) -> None:
    shifted = w.to(step.operands[0], "float32")
    total = w.fold("add", w.step("exponential", shifted, kind=shifted.type))
    _row(w, w.step("log", total, kind=total.type), step.results[0])


def _logsumexp(w: _Writer, step: Step, known: Value | None) -> None:
    x = w.to(step.operands[0], "float32")
    m = w.fold("maximum", x)
    _, _, total = w.exponentials(x, m)
    log = w.step("add", w.step("log", total, kind=m.type), m, kind=m.type)
    finite = w.step("is_finite", m, kind=TensorType(m.shape, "bool"))
    _row(w, w.step("select", finite, log, m, kind=m.type), step.results[0])  # of an infinity or NaN, that


def _row(w: _Writer, row: Value, result: Value) -> None:
    w.step("reshape", w.to(row, result.dtype), kind=result.type, result=result)


def _softmax_gradient(w: _Writer, step: Step, known: Value | None) -> None:
    x, g = step.operands[:2]
    s = known or w.softmax(x)
    total = w.fold("add", w.step("multiply", g, s, kind=s.type))
    w.step("multiply", s, w.step("subtract", g, w.spread(total, s), kind=s.type), kind=s.type, result=step.results[0])


def _softmax_times(w: _Writer, step: Step, known: Value | None) -> None:
    x, q = step.operands[:2]
    row = w.to(w.step("reshape", q, kind=TensorType(x.shape[:-1], q.dtype)), x.dtype)
    if known is None:
        w.softmax(x, w.to(row, "float32"), step.results[0])
    else:
        w.step("multiply", known, w.spread(row, known), kind=known.type, result=step.results[0])


def _one_a_row(w: _Writer, step: Step, known: Value | None) -> None:
    """Into zeros, one number a row at a place that each row has."""
    shape, (_, indices, updates) = step.operand.shape, step.operands
    place = w.step("reshape", indices, kind=TensorType(shape[:-1], indices.dtype))
    if step.attributes.get("wrapped"):  # negative ones count from the end
        above = w.step("add", place, w.number(shape[-1], place.type), kind=place.type)
        place = w.step("select", w.compare("LT", place, w.number(0, place.type)), above, place, kind=place.type)
    positions = w.positions(TensorType(shape, place.dtype))
    row = w.step("reshape", updates, kind=TensorType(shape[:-1], updates.dtype))
    here = w.compare("EQ", positions, w.spread(place, positions))
    w.step("select", here, w.spread(row, step.results[0]), w.number(0.0, step.result), kind=step.result, result=step.results[0])


def _norm(w: _Writer, step: Step, known: Value | None) -> None:
    """In float32, the variance of what is left around the mean."""
    x, *rest = step.operands
    c, row = w.to(x, "float32"), TensorType(x.shape[:-1], "float32")
    size = w.number(x.shape[-1], row)
    if step.name == "jax_mps.layer_norm":
        mean = w.step("divide", w.fold("add", c), size, kind=row)
        c = w.step("subtract", c, w.spread(mean, c), kind=c.type)
    variance = w.step("divide", w.fold("add", w.step("multiply", c, c, kind=c.type)), size, kind=row)
    root = w.step("rsqrt", w.step("add", variance, w.number(step.eps, row), kind=row), kind=row)
    y = w.step("multiply", c, w.spread(root, c), kind=c.type)
    for name, line in zip(["multiply"] * step.scaled + ["add"] * step.shifted, rest, strict=False):
        y = w.step(name, y, w.line(line, y), kind=y.type)
    w.to(y, step.result.dtype, step.results[0])


_PARTS: Mapping[str, Parts] = {
    "jax_mps.softmax": _softmax,
    "jax_mps.log_softmax": _log_softmax,
    "jax_mps.log_sum_exp": _log_sum_exp,
    "jax_mps.logsumexp": _logsumexp,
    "jax_mps.softmax_gradient": _softmax_gradient,
    "jax_mps.softmax_times": _softmax_times,
    "jax_mps.layer_norm": _norm,
    "jax_mps.rms_norm": _norm,
    "stablehlo.scatter": _one_a_row,
}
_NORMS = frozenset(["jax_mps.layer_norm", "jax_mps.rms_norm"])
ROOTS = frozenset(["stablehlo.reduce", *_PARTS]) - {"stablehlo.scatter"}


# ---- islands -------------------------------------------------------------------------------------------------------------------------


def row_kernels_of(steps: Sequence[Step], scope: Scope) -> list[Step]:
    """The steps that stand for islands of a region's steps."""
    if device_kind() != "cuda":
        return []
    seeds = [(step, sizes) for step in steps if step.name in ROOTS and (sizes := _sizes(step, scope)) is not None]
    if seeds and _is_outermost(steps, scope):
        seeds = [(step, sizes) for step, sizes in seeds if _is_large(*sizes) or step.name in _NORMS]
    if not seeds:
        return []
    finder = _Finder(steps, scope)
    for step, sizes in reversed(seeds):  # gradients read the softmax, and leave what that is made of to it
        finder.grow(step, *sizes)
    return _shared(sorted(finder.groups, key=finder.place_of))


def _sizes(step: Step, scope: Scope) -> tuple[int, int] | None:
    """Rows and columns of what such a kernel may begin with, if they are enough for one."""
    if step.name in _PARTS:
        shape = step.operand.shape
        sizes = (math.prod(shape[:-1]), shape[-1]) if step.operand.dtype in row_kernels.FLOATS and shape else None
    else:
        sizes = row_kernels.along_rows(step, splat(step.operands[1], scope)) if len(step.results) == 1 else None
    return sizes if sizes is not None and (_is_large(*sizes) or _is_small(*sizes, fewest=1 if step.name in _NORMS else 2)) else None


def _is_large(rows: int, columns: int) -> bool:
    return _FEWEST_ROWS <= rows < _MOST_ROWS and columns >= _FEWEST_COLUMNS and rows * columns >= _FEWEST


def _is_small(rows: int, columns: int, fewest: int) -> bool:
    return rows >= fewest and _FEWEST_IN_LOOP <= columns <= _LONGEST_IN_LOOP and rows * columns < _FEWEST


def _is_outermost(steps: Sequence[Step], scope: Scope) -> bool:
    """Whether these are the program's own steps, and not those of a loop or branch."""
    return all(steps[i].results == scope.body.steps[i].results for i in (0, -1))  # each step is what another with its results became


def _widens(step: Step) -> bool:
    """Whether a conversion is of fewer bytes than it gives, exactly."""
    return step.name == "stablehlo.convert" and step.operand.dtype in ("float16", "bfloat16") and step.result.dtype == "float32"


def _is_of_rows(step: Step) -> bool:
    """Whether a slice is of neighbours in memory."""
    return step.result.shape[1:] == step.operand.shape[1:] and set(step.strides) <= {1}


def _has_text(step: Step) -> bool:
    return step.name in _VIEWS or cuda_text.expression(step, ["a"] * len(step.operands)) is not None


@dataclass(frozen=True, slots=True)
class _Island:
    """Steps of the region, and what they read and give. outputs: what is read elsewhere. free: steps that are computed for others as well."""

    inside: frozenset[Step]
    operands: tuple[Value, ...]
    outputs: tuple[Value, ...]
    free: tuple[Step, ...]

    def large(self, size: int) -> int:
        return sum(v.type.size == size for v in self.outputs)


class _Finder:
    """Grows islands in one region."""

    def __init__(self, steps: Sequence[Step], scope: Scope) -> None:
        self.scope, self.steps = scope, steps
        self.stages: dict[Value, int] = {}
        self.groups: list[Step] = []
        self.taken: set[Step] = set()
        self.fewer: Counter[Value] = Counter()  # reads that the groups have saved
        self.place: dict[Value, int] = {}
        self.readers: dict[Value, dict[Step, None]] = {}
        self.softmaxes: dict[Value, Value] = {}
        self.parts: dict[Step, tuple[Step, ...]] = {}
        self.free: dict[Value, tuple[Step, ...] | None] = {}
        for i, step in enumerate(steps):
            self.place.update((v, i) for v in step.results)
            for value in step.operands:
                self.readers.setdefault(value, {})[step] = None
            if step.name == "jax_mps.softmax":
                self.softmaxes.setdefault(step.operands[0], step.results[0])

    def grow(self, seed: Step, rows: int, columns: int) -> None:
        """Add the island around a step, if there is one."""
        if seed in self.taken:
            return
        first = self._closed({seed}, rows, columns)
        island = first and self._grown(first, rows, columns)
        while island is not None and (larger := self._with_sibling(island, rows, columns)):
            island = larger
        for candidate in (island and self._with_makers(island, rows, columns), island, first):
            group = candidate and self._group(candidate, rows, columns)
            if candidate and group:
                self._take(candidate, group)
                return

    def _take(self, island: _Island, group: Step) -> None:
        """Let the group read in place of its steps."""
        self.groups.append(group)
        self.taken |= island.inside
        for step in island.inside:
            self.fewer.update(step.operands)
            for value in step.operands:
                self.readers[value].pop(step, None)
        self.fewer.subtract(group.operands)
        for value in group.operands:
            self.readers.setdefault(value, {})[group] = None

    def _place(self, step: Step) -> int:
        return self.place[step.results[0]]

    def place_of(self, group: Step) -> int:
        """Where it is put."""
        return min(self.place[v] for v in group.results)

    # -- what may be inside

    def _fits(self, step: Step, rows: int, columns: int) -> bool:
        """Whether the kernel may compute a step."""
        if step in self.taken or len(step.results) != 1 or step.result.size not in (rows * columns, rows):
            return False
        if step.name in ROOTS:
            return _sizes(step, self.scope) == (rows, columns)
        if step.name == "stablehlo.scatter":
            is_row = step.operand.shape[-1:] == (columns,) and line_of(step) == step.operand.rank - 1
            return is_row and step.operands[1].dtype == "int32" and step.result.dtype in row_kernels.FLOATS and splat(step.operands[0], self.scope) == 0.0
        if step.name in _VIEWS:
            return True
        return is_elementwise(step.name) and _has_text(step)

    def _parts(self, step: Step) -> tuple[Step, ...]:
        """The steps that it stands for."""
        if step.name not in _PARTS:
            return (step,)
        if step not in self.parts:
            writer, known = _Writer(), self.softmaxes.get(step.operands[0])
            is_before = known is not None and self.place[known] < self.place[step.results[0]]
            _PARTS[step.name](writer, step, known if is_before else None)
            self.parts[step] = tuple(writer.steps)
        return self.parts[step]

    def _free(self, value: Value) -> tuple[Step, ...] | None:
        """The steps that compute a value of positions and constants alone, if they are few and cheap."""
        if value not in self.free:
            self.free[value] = None
            step = self.scope.producers.get(value)
            if step is not None and step.name in _SOURCES:
                self.free[value] = (step,) if step.name == "stablehlo.iota" or splat(value, self.scope) is not None else None
            elif step is not None and step.name in _VIEWS | _CHEAP and _has_text(step):
                before = [self._free(v) for v in step.operands]
                steps = dict.fromkeys(s for part in before if part is not None for s in part)
                if None not in before and sum(s.name in _CHEAP for s in steps) < _MOST_FREE:
                    self.free[value] = (*steps, step)
        return self.free[value]

    def _is_made_here(self, value: Value, size: int) -> bool:
        """Whether it is cheaper to compute a value again than to read it: of full size, or one that few steps make of what is small (1 + scale)."""
        step = self.scope.producers[value]
        if value.type.size == size:
            return self._is_light(value, size)
        is_line = value in self.place and value.type.rank > 0 and value.type.size * _FREE <= size and step.name in _CHEAP and _has_text(step)
        return is_line and all(self._free(v) or v not in self.place or self.scope.maker(v, *_VIEWS, "stablehlo.convert") for v in step.operands)

    def _is_light(self, value: Value, size: int, depth: int = _MOST_FREE) -> bool:
        """Whether a value is cheap to compute again, of what is small (labels: a one-hot)."""
        step = self.scope.producers.get(value)
        if value.type.size * _FREE <= size or self._free(value) is not None:
            return True
        if step is None or depth == 0 or step.name not in _VIEWS | _CHEAP or not _has_text(step):
            return False
        return all(self._is_light(v, size, depth // len(step.operands)) for v in step.operands)

    # -- growing

    def _closed(self, inside: set[Step], rows: int, columns: int) -> _Island | None:
        """The island with all that only it reads; None if the kernel would be too large, or would read what is computed too late."""
        waiting = sorted(inside, key=self._place)  # a set has another order in each process, and the kernel would have another text
        made = {v for step in inside for v in step.results}
        operands: dict[Value, None] = {}
        free: dict[Step, None] = {}
        while waiting:
            parts = self._parts(waiting.pop())
            made.update(v for part in parts for v in part.results)
            for value in (v for part in parts for v in part.operands):
                if value in made:
                    continue
                maker = self.scope.producers.get(value)
                if (known := self._free(value)) is not None:
                    free.update(dict.fromkeys(known))
                    made.update(v for s in known for v in s.results)
                elif maker is not None and value in self.place and self._is_inner(maker, inside, rows, columns):
                    inside.add(maker)
                    made.update(maker.results)
                    waiting.append(maker)
                elif maker is not None and (maker.name in _VIEWS or _widens(maker) or self._is_made_here(value, rows * columns)):
                    free[maker] = None
                    made.update(maker.results)
                    waiting.append(maker)
                else:
                    operands[value] = None
            if len(inside) > _MOST_STEPS or len(operands) > _MOST_ARRAYS:
                return None
        if again := {step for step in free if step.results[0] in self.place and self._is_inner(step, inside, rows, columns)}:
            return self._closed(inside | again, rows, columns)  # what else reads them came in later
        operands = {v: None for v in operands if v not in made}
        outputs = tuple(v for step in sorted(inside, key=self._place) for v in step.results if not self._is_read_within(v, inside))
        first = min((self.place[v] for v in outputs), default=-1)
        late = any(self.place.get(v, -1) >= first for v in operands)
        return None if late or len(operands) + len(outputs) > _MOST_ARRAYS else _Island(frozenset(inside), tuple(operands), outputs, tuple(free))

    def _is_inner(self, step: Step, inside: set[Step], rows: int, columns: int) -> bool:
        """Whether only these steps read what a step makes, and the kernel may compute it."""
        return step not in inside and self._is_read_within(step.results[0], inside) and self._fits(step, rows, columns)

    def _is_read_within(self, value: Value, inside: Iterable[Step]) -> bool:
        """Whether all reads of a value are by these steps."""
        readers = self.readers.get(value, {})
        return self.scope.reads(value) - self.fewer[value] == sum(step.operands.count(value) for step in readers if step in inside)

    def _grown(self, island: _Island, rows: int, columns: int) -> _Island:
        while (larger := self._with_readers(island, rows, columns)) is not None:
            island = larger
        return island

    def _with_readers(self, island: _Island, rows: int, columns: int) -> _Island | None:
        """The island with what reads one of its outputs (all that does, if it is of full size), and what reads the results of that, until it pays."""
        for value in island.outputs:
            larger, ends = island, [value]
            for _ in range(_AHEAD):
                more = {step for end in ends for step in self._readers(end, larger.inside, rows, columns)}
                found = self._closed({*larger.inside, *more}, rows, columns) if more else None
                if found is None:
                    break
                if self._pays(island, found, rows * columns):
                    return found
                larger, ends = found, [v for v in found.outputs if v not in island.outputs]
        return None

    def _pays(self, island: _Island, larger: _Island, size: int) -> bool:
        """Whether no more arrays are written, or the first is, of what the reductions have read."""
        if larger.large(size) <= island.large(size):
            return True
        held = {*island.operands, *(v for step in island.inside for part in self._parts(step) for v in part.results)}
        new = [part for step in larger.inside - island.inside for part in self._parts(step)]
        return larger.large(size) == 1 and any(v in held and v.type.size == size for part in new for v in part.operands)

    def _with_sibling(self, island: _Island, rows: int, columns: int) -> _Island | None:
        """The island with what else begins at one of its operands: it is read once for both (a cross entropy and its gradient)."""
        for value in (v for v in island.operands if v.type.size == rows * columns):
            near = list(self.readers.get(value, {}))
            near += [after for step in near if is_elementwise(step.name) for v in step.results for after in self.readers.get(v, {})]
            for step in near:
                if step.name in ROOTS and step not in island.inside and self._fits(step, rows, columns):
                    both = self._closed({*island.inside, step}, rows, columns)
                    larger = both and self._grown(both, rows, columns)
                    if larger and larger.large(rows * columns) <= max(1, island.large(rows * columns)):
                        return larger
        return None

    def _with_makers(self, island: _Island, rows: int, columns: int) -> _Island:
        """The island with steps that make what it reads for others as well, if these read it out of memory, as the island what it is made of."""
        for value in island.operands:
            maker = self.scope.producers.get(value)
            if maker is None or value.type.size != rows * columns or not is_elementwise(maker.name) or not self._is_held(value, island.inside):
                continue
            larger = self._closed({*island.inside, maker}, rows, columns) if value in self.place and self._fits(maker, rows, columns) else None
            if larger and all(self._is_held(v, larger.inside) for v in larger.operands if v not in island.operands and v.type.size > columns):
                return self._with_makers(larger, rows, columns)
        return island

    def _is_held(self, value: Value, inside: frozenset[Step]) -> bool:
        """Whether a value is in memory, row by row, whatever these steps do."""
        maker = self.scope.producers.get(value)
        if maker is None or value not in self.place or maker in self.taken:
            return True
        if not is_elementwise(maker.name):
            return maker.name not in _STRIDED and (maker.name != "stablehlo.slice" or _is_of_rows(maker))
        return self._is_read(value, value, inside)

    def _is_read(self, view: Value, value: Value, inside: frozenset[Step]) -> bool:
        """Whether other steps read a value, or a view of it, out of memory."""
        readers = self.readers.get(view, {})
        if self.scope.reads(view) - self.fewer[view] > sum(step.operands.count(view) for step in readers):
            return True  # by what is not in this region, or after it
        outside = [step for step in readers if step not in inside]
        views = [step for step in outside if step.name in _VIEWS]
        read = any(not is_elementwise(step.name) or self._is_late(value, step) for step in outside if step not in views)
        return read or any(self._is_read(step.results[0], value, inside) for step in views)

    def _is_late(self, value: Value, reader: Step) -> bool:
        """Whether the reader needs what no elementwise step computes from the value, or beside it."""
        if not self.stages:
            for step in self.steps:
                note_stage(step, self.stages)
        return bool(reader.results) and self.stages[reader.results[0]] > self.stages.get(value, 0)

    def _readers(self, value: Value, inside: frozenset[Step], rows: int, columns: int) -> set[Step]:
        """The steps outside that read a value, and those that read a broadcast of it; none if something reads a value of full size that does not fit."""
        found: set[Step] = set()
        waiting = [value]
        while waiting:
            current = waiting.pop()
            readers = [step for step in self.readers.get(current, {}) if step not in inside]
            fit = [step for step in readers if self._fits(step, rows, columns)]
            if current.type.size == rows * columns and (len(fit) < len(readers) or not self._is_read_within(current, {*inside, *readers})):
                return set()
            found.update(fit)
            waiting += [step.results[0] for step in fit if step.name in _VIEWS]
        return found

    # -- the step

    def _group(self, island: _Island, rows: int, columns: int) -> Step | None:
        """The step for an island; None if it saves nothing, or too little, or its kernel cannot be written."""
        least = 1 if any(step.name in _NORMS for step in island.inside) else _LEAST_SAVED
        if not _is_large(rows, columns) and _kernels_of(island.inside) - 1 < least:
            return None
        ordered = sorted(island.inside, key=self._place)
        pool = {part.results[0]: part for part in (*island.free, *(part for step in ordered for part in self._parts(step)))}
        steps: dict[Step, None] = {}
        for output in island.outputs:
            _put(output, pool, steps)
        original = Region(island.operands, tuple(steps), island.outputs)
        try:
            if not row_kernels.reads_again(original, rows, columns):
                return None
        except Unsupported:
            return None
        last = ordered[-1]
        given = {"rows": rows, "columns": columns, "original": original}
        return Step("jax_mps.row_kernel", island.operands, island.outputs, given, location=last.location, text=())


def _kernels_of(steps: Iterable[Step]) -> int:
    """How many of MLX's kernels, at least, do what these steps do."""
    names = [step.name for step in steps if step.name not in _VIEWS]
    return sum(_KERNELS.get(name, 1) for name in names if name in _KERNELS or not is_elementwise(name)) + any(map(is_elementwise, names))


_KERNELS = {"jax_mps.log_softmax": 4, "jax_mps.logsumexp": 3, "jax_mps.softmax_gradient": 3, "jax_mps.softmax_times": 2}


def _put(value: Value, pool: Mapping[Value, Step], steps: dict[Step, None]) -> None:
    """Add the steps that lead to a value, in order."""
    waiting = [(value, False)]
    while waiting:
        current, ready = waiting.pop()
        step = pool.get(current)
        if step is None or step in steps:
            continue
        if ready:
            steps[step] = None
            continue
        waiting.append((current, True))
        waiting += [(v, False) for v in step.operands]


# ---- several islands -----------------------------------------------------------------------------------------------------------------


def _shared(groups: list[Step]) -> list[Step]:
    """The groups, in order; what several of them would reduce, the first gives to the others: a gradient reads the sums of the forward pass."""
    numbers: dict[object, int] = {}
    first: dict[int, tuple[int, Value]] = {}
    given: list[dict[Value, Value]] = [{} for _ in groups]  # a group's own sum -> what others read
    known: list[dict[Value, Value]] = [{} for _ in groups]  # a group's own sum -> what it reads
    for i, group in enumerate(groups):
        for step, number in _numbered(group.original, numbers):
            if step.name == "stablehlo.reduce":
                own = step.results[0]
                at, value = first.setdefault(number, (i, own))
                if at < i and (group.rows, group.columns) == (groups[at].rows, groups[at].columns):
                    known[i][own] = given[at].setdefault(value, Value(value.type))
    return [_with_known(*parts) if parts[1] or parts[2] else parts[0] for parts in zip(groups, given, known, strict=True)]


def _numbered(region: Region, numbers: dict[object, int]) -> Iterator[tuple[Step, int]]:
    """Each step with the number of the expression that it is."""
    of: dict[Value, int] = {v: numbers.setdefault(v, len(numbers)) for v in region.arguments}
    for step in region.steps:
        if step.name == "stablehlo.constant":
            what: tuple[object, ...] = (step.result, np.ascontiguousarray(step.value).tobytes())
        else:
            what = (step.result, repr(sorted(step.attributes.items())), *(folds(body) for body in step.regions))
        number = numbers.setdefault((step.name, *what, *(of[v] for v in step.operands)), len(numbers))
        of[step.results[0]] = number
        yield step, number


def _with_known(group: Step, given: Mapping[Value, Value], known: Mapping[Value, Value]) -> Step:
    """The group with more results, and with other groups' in place of its own sums."""
    old = group.original
    views = [Step("stablehlo.reshape", (a,), (b,), text=()) for a, b in (*given.items(), *((value, own) for own, value in known.items()))]
    pool = {step.results[0]: step for step in (*old.steps, *views)}
    results = (*old.results, *given.values())
    steps: dict[Step, None] = {}
    for value in results:
        _put(value, pool, steps)
    read = {v for step in steps for v in step.operands}
    operands = tuple(v for v in (*old.arguments, *known.values()) if v in read)
    return replace(group, operands=operands, results=results, attributes={**group.attributes, "original": Region(operands, tuple(steps), results)})
