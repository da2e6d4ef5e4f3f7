"""Steps along rows in one kernel of our own, on CUDA: what a row holds, its maximum, its sum, and what becomes of it with these.

MLX has a kernel for each reduction and one for the elementwise steps between two of them, and each reads and writes whole arrays. Here a team of
threads has a row: for each reduction it passes over the row once, then it writes the results. A short row is read once and stays in registers; a long
one is read in every pass, from the second on out of the L2 cache.

Every value of the kernel is a number for each row and column, or for each row. Its operands may be smaller: where they are read follows from the
broadcasts and reshapes between them and the whole, as an `Index`.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.ops import cuda_text
from jax_mps.ops.bodies import folds
from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Region, Step, Value, numpy_dtype

FLOATS = frozenset(["float32", "float16", "bfloat16"])
FOLDS: Mapping[str, tuple[str, float]] = {
    "add": ("{a} + {b}", 0.0),
    "multiply": ("{a} * {b}", 1.0),
    "maximum": ("jax_higher({a}, {b})", -math.inf),
    "minimum": ("jax_lower({a}, {b})", math.inf),
}

# Threads of a block that has one row or several; numbers that a thread holds of each operand. Up to 256 threads have as many registers as they want.
_WARP, _BLOCK, _HELD = 32, 128, 16
_LEAST_TEAM = 4
_MOST_TEAM = 256
_LONG_TEAM, _LONG_HELD, _FEW = 512, 8, 4  # of rows that do not fit; with so many arrays, 128 registers are enough

_HEADER = """
__device__ inline float jax_higher(float a, float b) {  // NaN wins
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float higher;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(higher) : "f"(a), "f"(b));
  return higher;
#else
  return a != a || a > b ? a : b;
#endif
}
__device__ inline float jax_lower(float a, float b) { return -jax_higher(-a, -b); }
__device__ inline void jax_add_exponentials(float& top, float& sum, float other, float more) {  // of numbers less their maximum
  const float higher = jax_higher(top, other), less = higher == __int_as_float(0xff800000) ? 0.0f : higher;
  sum = sum * expf(top - less) + more * expf(other - less);
  top = higher;
}
template <int N, typename T, typename R> __device__ inline void jax_read(const T* from, bool whole, R* to) {
  struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Neighbours { T x[N]; };
  if (whole) {
    Neighbours read = *(const Neighbours*)from;
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = (R)read.x[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = (R)from[i];
  }
}
template <int N, typename T> __device__ inline void jax_write(T* to, bool whole, const T* from) {
  struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Neighbours { T x[N]; };
  if (whole) {
    *(Neighbours*)to = *(const Neighbours*)from;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = from[i];
  }
}
"""
HEADER = cuda_text.HEADER + _HEADER


# ---- where a value's elements lie ----------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """(row or column // divisor % modulus) * stride."""

    axis: str
    divisor: int
    modulus: int
    stride: int


Index = tuple[Piece, ...]  # the sum of these is the element's place in row-major order; strides fall


def whole_index(rows: int, columns: int) -> Index:
    return tuple(p for p in (Piece("row", 1, rows, columns), Piece("column", 1, columns, 1)) if p.modulus > 1)


def row_index(rows: int) -> Index:
    return (Piece("row", 1, rows, 1),) if rows > 1 else ()


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def coordinates(index: Index, shape: Sequence[int]) -> list[Index] | None:
    """For each dimension, what its coordinate is the sum of; None where a dimension's end lies inside of a piece."""
    found: list[list[Piece]] = [[] for _ in shape]
    strides = _strides(shape)
    for axis, divisor, modulus, stride in index:
        while modulus > 1:
            d = next(d for d, (s, n) in enumerate(zip(strides, shape, strict=True)) if s <= stride < s * n)
            inner, left = divmod(stride, strides[d])
            room, more = divmod(shape[d], inner)
            taken = min(room, modulus)
            if left or more or modulus % taken:
                return None
            found[d].append(Piece(axis, divisor, taken, inner))
            divisor, modulus, stride = divisor * taken, modulus // taken, strides[d] * shape[d]
    return [tuple(pieces) for pieces in found]


def joined(parts: Sequence[Index], shape: Sequence[int]) -> Index:
    """The index into an array of that shape, of its coordinates."""
    pieces = [p._replace(stride=p.stride * s) for part, s in zip(parts, _strides(shape), strict=True) for p in part]
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: -p.stride):
        last = merged[-1] if merged else None
        if last and last.axis == piece.axis and last.divisor == piece.divisor * piece.modulus and last.stride == piece.stride * piece.modulus:
            merged[-1] = piece._replace(modulus=last.modulus * piece.modulus)
        else:
            merged.append(piece)
    return tuple(merged)


# ---- what is computed ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """A number for each row, or for each row and column (`spread`), once so many reductions in a row are done (`stage`).

    kind: "constant", "load" (of an argument), "place" (an index as a number), "step", "fold" (of the first operand), "sum" (of exponentials, which the
    pass for their maximum has added up). text: of a constant or step, with its operands as {0}, {1}, ...
    light: made of no array's elements, computed again in each pass.
    """

    kind: str
    name: str
    dtype: str
    spread: bool
    stage: int = 0
    light: bool = True
    text: str = ""
    index: Index = ()
    argument: int = 0
    operands: tuple[int, ...] = ()


@dataclass(slots=True)
class _Graph:
    """The nodes of a region, operands first."""

    region: Region
    rows: int
    columns: int
    nodes: list[_Node] = field(default_factory=list)
    known: dict[tuple[Value, Index], int] = field(default_factory=dict)
    same: dict[_Node, int] = field(default_factory=dict)
    made: dict[Value, Step] = field(default_factory=dict)

    def build(self) -> list[int]:
        """The results' nodes."""
        self.made = {v: step for step in self.region.steps for v in step.results}
        return [self.of(v, self.index_of(v)) for v in self.region.results]

    def index_of(self, value: Value) -> Index:
        return whole_index(self.rows, self.columns) if value.type.size == self.rows * self.columns else row_index(self.rows)

    def of(self, value: Value, index: Index) -> int:
        key = value, index
        if key not in self.known:
            node = self._node(value, index)
            if isinstance(node, _Node):
                if node not in self.same:
                    self.nodes.append(node)
                node = self.same.setdefault(node, len(self.nodes) - 1)
            self.known[key] = node
        return self.known[key]

    def _node(self, value: Value, index: Index) -> _Node | int:
        step = self.made.get(value)
        spread = any(p.axis == "column" for p in index)
        if step is None:
            return _Node("load", "", value.dtype, spread, light=not spread, index=index, argument=self.region.arguments.index(value))
        if step.name == "stablehlo.reshape":
            return self.of(step.operands[0], index)
        if step.name == "stablehlo.constant":
            return _Node("constant", "", value.dtype, False, text=cuda_text.constant(value.dtype, step.value.reshape(-1)[0]))
        if step.name == "stablehlo.reduce":
            return self._fold(step, index)
        if step.name in ("stablehlo.broadcast_in_dim", "stablehlo.iota"):
            parts = coordinates(index, value.shape)
            if parts is None:
                raise Unsupported(step, "dimensions that rows end within")
            if step.name == "stablehlo.iota":
                place = parts[step.iota_dimension]
                return _Node("place", "", value.dtype, any(p.axis == "column" for p in place), index=place)
            shape = step.operand.shape
            kept = [parts[d] if n > 1 else () for d, n in zip(step.broadcast_dimensions, shape, strict=True)]
            return self.of(step.operands[0], joined(kept, shape))
        return self._step(step, index)

    def _step(self, step: Step, index: Index) -> _Node:
        text = cuda_text.expression(step, [f"{{{i}}}" for i in range(len(step.operands))])
        if text is None:
            raise Unsupported(step, "no text in CUDA's C++")
        operands = tuple(self.of(v, index if v.shape == step.result.shape else ()) for v in step.operands)
        parts = [self.nodes[n] for n in operands]
        spread, stage, light = any(p.spread for p in parts), max(p.stage for p in parts), all(p.light for p in parts)
        return _Node("step", step.name, step.result.dtype, spread, stage, light, text, operands=operands)

    def _fold(self, step: Step, index: Index) -> _Node:
        names = folds(step.regions[0])
        if index != row_index(self.rows) or step.operand.size != self.rows * self.columns or not names or names[0] not in FOLDS:
            raise Unsupported(step, "not along rows")
        operand = self.of(step.operands[0], whole_index(self.rows, self.columns))
        return self._known_sum(operand, names[0]) or _Node("fold", names[0], step.result.dtype, False, self.nodes[operand].stage + 1, operands=(operand,))

    def _known_sum(self, operand: int, name: str) -> _Node | None:
        """In a long row, the sum of exp(x - m), m the maximum of x: the pass that finds m adds them up as well."""
        e = self.nodes[operand]
        if name != "add" or is_held(self.columns) or (e.kind, e.name, e.dtype) != ("step", "stablehlo.exponential", "float32"):
            return None
        less = self.nodes[e.operands[0]]
        if less.name != "stablehlo.subtract":
            return None
        x, m = less.operands
        top = self.nodes[m]
        if (top.kind, top.name, top.operands) != ("fold", "maximum", (x,)):
            return None
        return _Node("sum", "", "float32", False, top.stage, operands=(m,))


def along_rows(step: Step, start: Any) -> tuple[int, int] | None:
    """Rows and columns of a reduction that a kernel may do: along the last dimensions, from the fold's neutral element."""
    dims, shape = tuple(sorted(step.dimensions)), step.operand.shape
    if not dims or dims != tuple(range(len(shape) - len(dims), len(shape))) or step.operand.dtype not in FLOATS:
        return None
    names = folds(step.regions[0])
    if not names or names[0] not in FOLDS or FOLDS[names[0]][1] != start:
        return None
    return math.prod(shape[: dims[0]]), math.prod(shape[dims[0] :])


def reads_again(region: Region, rows: int, columns: int) -> bool:
    """Whether something of a row is computed once one of its reductions is done.

    Raises:
        Unsupported: a step that no such kernel can hold.
    """
    graph = _Graph(region, rows, columns)
    graph.build()
    return any(n.kind == "sum" or (n.stage > (n.kind == "fold") and (n.spread or n.kind == "fold")) for n in graph.nodes)


# ---- the kernel's text ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kernel:
    """source: its body. numbers: what it reads as `sizes`. arguments: which of the region's it reads."""

    source: str
    numbers: tuple[int, ...]
    arguments: tuple[int, ...]
    threads: int
    blocks: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """How threads share the rows: threads of a row, rows of a block, neighbouring columns that are read at once, how many such runs a thread has at
    once, and whether these are all of the row."""

    team: int
    teams: int
    run: int
    runs: int
    held: bool


def is_held(columns: int) -> bool:
    """Whether a row stays in registers."""
    return columns <= _MOST_TEAM * _HELD


def _shape_of(columns: int, run: int, arrays: int) -> _Shape:
    team = _LEAST_TEAM
    while team < _MOST_TEAM and columns > team * (run if team < _WARP else _HELD):
        team *= 2
    if is_held(columns):
        return _Shape(team, _BLOCK // team if team <= _WARP else 1, run, -(-columns // (team * run)), True)
    return _Shape(_LONG_TEAM if arrays <= _FEW else _MOST_TEAM, 1, run, max(1, _LONG_HELD // run), False)


def kernel_of(region: Region, rows: int, columns: int) -> Kernel:
    """The kernel that computes a region's results of its arguments.

    Raises:
        Unsupported: a step that no such kernel can hold.
    """
    graph = _Graph(region, rows, columns)
    results = graph.build()
    return _Writer(graph, results).kernel()


class _Writer:
    """Writes one kernel."""

    def __init__(self, graph: _Graph, results: list[int]) -> None:
        self.graph, self.nodes, self.results = graph, graph.nodes, results
        self.numbers: list[int] = [graph.rows, graph.columns]
        arrays = [n for n in self.nodes if n.kind == "load"]
        self.arguments = tuple(sorted({n.argument for n in arrays}))
        whole = [graph.region.arguments[n.argument].dtype for n in arrays if n.spread]
        self.large = [i for i, v in enumerate(graph.region.results) if v.type.size == graph.rows * graph.columns]
        whole += [graph.region.results[i].dtype for i in self.large]
        widest = max((numpy_dtype(dtype).itemsize for dtype in whole), default=4)
        run = max(1, 16 // widest)
        self.shape = _shape_of(graph.columns, run if graph.columns % run == 0 else 1, len(whole))
        self.last = max((n.stage for n in self.nodes), default=0)
        self.targets = [self._folded(stage) + [n for n in results if self.nodes[n].spread and self.nodes[n].stage == stage] for stage in range(self.last + 1)]
        self.kept = self._kept()
        self.summed = {n.operands[0] for n in self.nodes if n.kind == "sum"}  # maxima whose pass adds up exponentials

    # -- plan

    def _folded(self, stage: int) -> list[int]:
        """What is reduced in a pass."""
        return list(dict.fromkeys(n.operands[0] for n in self.nodes if n.kind == "fold" and n.stage == stage + 1))

    def _needed(self, stage: int, known: set[int]) -> tuple[list[int], set[int]]:
        """What a pass computes for each element, in order, and what it takes from earlier ones."""
        found: set[int] = set()
        taken: set[int] = set()
        waiting = list(self.targets[stage])
        while waiting:
            n = waiting.pop()
            node = self.nodes[n]
            if n in found or not node.spread:
                continue
            if n in known and not node.light:
                taken.add(n)
                continue
            found.add(n)
            waiting += node.operands if node.kind == "step" else ()
        return sorted(found), taken

    def _kept(self) -> set[int]:
        """What stays in registers from one pass to another."""
        kept, known = set[int](), set[int]()
        if self.shape.held:
            for stage in range(self.last + 1):
                found, taken = self._needed(stage, known)
                kept |= taken
                known |= set(found)
        return kept

    # -- text

    def kernel(self) -> Kernel:
        shape, graph = self.shape, self.graph
        body = "".join(f"{line}\n" for line in self._lines())
        names = "".join(f"const uint32_t n{i} = sizes[{i}];\n" for i in range(len(self.numbers)))
        head = f"constexpr int TEAM = {shape.team}, TEAMS = {shape.teams}, RUN = {shape.run}, RUNS = {shape.runs};\n"
        return Kernel(head + names + body, tuple(self.numbers), self.arguments, shape.team * shape.teams, -(-graph.rows // shape.teams))

    def _lines(self) -> Iterator[str]:
        yield "const uint32_t rows = n0, columns = n1, lane = threadIdx.x % TEAM;"
        yield "uint32_t row = blockIdx.x * TEAMS + threadIdx.x / TEAM;"
        yield "const bool live = row < rows;"
        yield "if (!live) row = rows - 1;"
        yield f"const bool whole = {self._aligned()};"
        known: set[int] = set()
        for n, node in enumerate(self.nodes):
            if node.kind == "load" and node.spread:
                yield f"const size_t at{n} = {self._offset(node, 'row')};"
                if n in self.kept:
                    yield f"{self._type(n)} k{n}[RUN * RUNS];"
        yield from (f"{self._type(n)} k{n}[RUN * RUNS];" for n in sorted(self.kept) if self.nodes[n].kind != "load")
        for stage in range(self.last + 1):
            yield from self._row_numbers(stage)
            found, _ = self._needed(stage, known if self.shape.held else set())
            yield from self._pass(stage, found)
            known |= set(found)
        for i, n in enumerate(self.results):
            if i not in self.large:
                dtype = self.graph.region.results[i].dtype
                yield f"if (live && lane == 0) out{i}[row] = {cuda_text.store(dtype, self._ref(n))};"

    def _aligned(self) -> str:
        """Whether runs of neighbours can be read and written at once."""
        if self.shape.run == 1:
            return "true"
        names = {f"in{node.argument}": node.dtype for node in self.nodes if node.kind == "load" and self._is_in_runs(node)}
        names |= {f"out{i}": self.graph.region.results[i].dtype for i in self.large}
        return " && ".join(f"(size_t){name} % {min(16, self.shape.run * numpy_dtype(dtype).itemsize)} == 0" for name, dtype in names.items()) or "true"

    def _is_in_runs(self, node: _Node) -> bool:
        """Whether neighbouring columns lie beside each other, from a place that a run may begin at."""
        columns = [p for p in node.index if p.axis == "column"]
        return columns == [Piece("column", 1, self.graph.columns, 1)] and all(p.stride % self.shape.run == 0 for p in node.index if p.axis == "row")

    def _type(self, n: int) -> str:
        return cuda_text.REGISTER[self.nodes[n].dtype]

    def _number(self, value: int) -> str:
        if value not in self.numbers:
            self.numbers.append(value)
        return f"n{self.numbers.index(value)}"

    def _offset(self, node: _Node, axis: str) -> str:
        return " + ".join(self._piece(p) for p in node.index if p.axis == axis) or "0"

    def _piece(self, piece: Piece) -> str:
        extent = self.graph.rows if piece.axis == "row" else self.graph.columns
        text = piece.axis if piece.divisor == 1 else f"{piece.axis} / {self._number(piece.divisor)}"
        text = text if piece.divisor * piece.modulus >= extent else f"({text}) % {self._number(piece.modulus)}"
        return f"(size_t)({text})" if piece.stride == 1 else f"(size_t)({text}) * {self._number(piece.stride)}"

    def _ref(self, n: int, local: Sequence[int] = ()) -> str:
        node = self.nodes[n]
        if node.kind == "constant":
            return node.text
        return f"v{n}" if not node.spread or n in local else f"k{n}[e]"

    def _computed(self, n: int, local: Sequence[int] = ()) -> str:
        """The text of a step, of a place, or of a load that is not in runs."""
        node = self.nodes[n]
        if node.kind == "place":
            return f"({cuda_text.REGISTER[node.dtype]})({' + '.join(map(self._piece, node.index)) or '0'})"
        if node.kind == "load":
            offset = self._offset(node, "row") if not node.spread else f"at{n} + {self._offset(node, 'column')}"
            return cuda_text.load(node.dtype, f"in{node.argument}[{offset}]")
        return node.text.format(*(self._ref(m, local) for m in node.operands))

    def _row_numbers(self, stage: int) -> Iterator[str]:
        """What there is once for a row, as soon as it can be computed."""
        for n, node in enumerate(self.nodes):
            if node.kind == "sum" and node.stage == stage:
                (m,) = node.operands
                yield f"const float v{n} = fabsf(v{m}) < __int_as_float(0x7f800000) ? s{m} : __int_as_float(0x7fc00000);"
            elif node.stage == stage and not node.spread and node.kind not in ("constant", "fold"):
                yield f"const {self._type(n)} v{n} = {self._computed(n)};"

    def _pass(self, stage: int, found: list[int]) -> Iterator[str]:
        """One pass over the row: what it reads, what it computes, what it reduces or writes."""
        done = [n for n, node in enumerate(self.nodes) if node.kind == "fold" and node.stage == stage + 1]
        outputs = [(i, self.results[i]) for i in self.large if self.nodes[self.results[i]].stage == stage]
        reads = [n for n in found if self.nodes[n].kind == "load" and self._is_in_runs(self.nodes[n])]
        for n in done:
            yield f"float f{n} = {cuda_text.constant('float32', FOLDS[self.nodes[n].name][1])};"
            if n in self.summed:
                yield f"float t{n} = f{n}, s{n} = 0;"
        if done or outputs:
            yield from self._chunks(stage)
            yield from self._reads(reads)
            yield from self._elements([n for n in found if n not in reads], reads, done, outputs)
            yield from self._exponentials([n for n in done if n in self.summed])
            yield "}"
        if done:
            yield from self._together(done)

    def _chunks(self, stage: int) -> Iterator[str]:
        """A loop over as much of the row as its threads hold at once; every second pass backwards, from what was read last."""
        if self.shape.held:
            yield "{"
            yield "const uint32_t base = 0;"
        else:
            yield "const uint32_t chunks = (columns - 1) / (TEAM * RUN * RUNS) + 1;" if stage == 0 else ""
            yield "for (uint32_t chunk = 0; chunk < chunks; chunk++) {"
            yield f"const uint32_t base = {'(chunks - 1 - chunk)' if stage % 2 else 'chunk'} * (TEAM * RUN * RUNS);"

    def _exponentials(self, tops: list[int]) -> Iterator[str]:
        """Add up what was read, less its maximum so far."""
        for n in tops:
            yield "{"
            yield f"const float less = f{n} == __int_as_float(0xff800000) ? 0.0f : f{n};"
            yield f"s{n} *= expf(t{n} - less);"
            yield f"t{n} = f{n};"
            yield from self._loop()
            yield "#pragma unroll"
            yield f"for (int i = 0; i < RUN; i++) s{n} += expf(c{n}[j * RUN + i] - less);"
            yield "}\n}\n}"

    def _loop(self) -> Iterator[str]:
        yield "#pragma unroll"
        yield "for (int j = 0; j < RUNS; j++) {"
        yield "const uint32_t first = base + (j * TEAM + lane) * RUN;"
        yield "if (first < columns) {"

    def _reads(self, reads: list[int]) -> Iterator[str]:
        if reads:
            yield from (f"{self._type(n)} k{n}[RUN * RUNS];" for n in reads if n not in self.kept)
            yield from self._loop()
            yield from (f"jax_read<RUN>(in{self.nodes[n].argument} + at{n} + first, whole, k{n} + j * RUN);" for n in reads)
            yield "}\n}"

    def _elements(self, found: list[int], reads: list[int], done: list[int], outputs: list[tuple[int, int]]) -> Iterator[str]:
        types = [cuda_text.MEMORY[self.graph.region.results[i].dtype] for i, _ in outputs]
        yield from (f"float c{n}[RUN * RUNS];" for n in done if n in self.summed)
        yield from self._loop()
        yield from (f"alignas(16) {kind} o{i}[RUN];" for (i, _), kind in zip(outputs, types, strict=True))
        yield "#pragma unroll"
        yield "for (int i = 0; i < RUN; i++) {"
        yield "const int e = j * RUN + i;"
        yield "const uint32_t column = first + i;"
        for n in found:
            yield f"const {self._type(n)} v{n} = {self._computed(n, found)};"
            if n in self.kept:
                yield f"k{n}[e] = v{n};"
        for n in done:
            fold, operand = FOLDS[self.nodes[n].name][0], self._ref(self.nodes[n].operands[0], found)
            yield f"f{n} = {fold.format(a=f'f{n}', b=operand)};"
            if n in self.summed:
                yield f"c{n}[e] = {operand};"
        for i, n in outputs:
            yield f"o{i}[i] = {cuda_text.store(self.graph.region.results[i].dtype, self._ref(n, found))};"
        yield "}"
        yield from (f"if (live) jax_write<RUN>(out{i} + (size_t)row * columns + first, whole, o{i});" for i, _ in outputs)
        yield "}\n}"

    def _together(self, done: list[int]) -> Iterator[str]:
        """The folds of all threads of a row, in each of them."""
        yield "for (int o = (TEAM < 32 ? TEAM : 32) / 2; o > 0; o /= 2) {"
        yield from (self._combined(n, *(f"__shfl_xor_sync(0xffffffffu, {name}{n}, o)" for name in "fs")) for n in done)
        yield "}"
        if self.shape.team > _WARP:
            parts = [(f"f{n}", f"p{n}") for n in done] + [(f"s{n}", f"q{n}") for n in done if n in self.summed]
            yield from (f"__shared__ float {part}[TEAM / 32];" for _, part in parts)
            yield "if (lane % 32 == 0) {"
            yield from (f"{part}[lane / 32] = {whole};" for whole, part in parts)
            yield "}"
            yield "__syncthreads();"
            yield from (f"{whole} = {part}[0];" for whole, part in parts)
            yield "for (int w = 1; w < TEAM / 32; w++) {"
            yield from (self._combined(n, f"p{n}[w]", f"q{n}[w]") for n in done)
            yield "}"
        yield from (f"const float v{n} = {cuda_text.rounded(self.nodes[n].dtype, f'f{n}')};" for n in done)

    def _combined(self, n: int, other: str, more: str) -> str:
        if n in self.summed:
            return f"{{ const float other = {other}, more = {more}; jax_add_exponentials(f{n}, s{n}, other, more); }}"
        return f"{{ const float other = {other}; f{n} = {FOLDS[self.nodes[n].name][0].format(a=f'f{n}', b='other')}; }}"


# ---- running it ----------------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(source: str, arguments: tuple[int, ...], results: int) -> Callable[..., list[mx.array]]:
    name = f"jax_rows_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    return cuda_kernel(name, ["sizes", *(f"in{i}" for i in arguments)], [f"out{i}" for i in range(results)], source, header=HEADER)


@lowers("jax_mps.row_kernel")
def row_kernel(op: Step) -> Run:
    """The steps in `original`, whose values have so many rows and columns. On CUDA alone."""
    if device_kind() != "cuda":
        raise Unsupported(op, "a kernel that only CUDA has")
    kernel = kernel_of(op.original, op.rows, op.columns)
    shapes, dtypes = [v.shape for v in op.results], [MX[v.dtype] for v in op.results]

    def run(*operands: mx.array) -> list[mx.array]:
        return _kernel(kernel.source, kernel.arguments, len(shapes))(
            inputs=[mx.array(kernel.numbers, mx.uint32), *(operands[i] for i in kernel.arguments)],
            output_shapes=shapes,
            output_dtypes=dtypes,
            grid=(kernel.threads * kernel.blocks, 1, 1),
            threadgroup=(kernel.threads, 1, 1),
        )

    return run
