"""What a counted loop leaves for after: sums over its iterations of products that nothing waits for, as gradients of weights are.

The backward pass of a scan carries `dW + x_t^T g_t`, which no iteration looks at. There each iteration hands out its `g_t` as a row instead, and one product
after the loop sums over rows and iterations together (in another order: floats round otherwise, by no more than in any product). So with sums of such
a `g_t` itself, as gradients of biases are, and with rows that are handed out as products of `g_t` and weights, as gradients of inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from jax_mps.ops.bodies import folds
from jax_mps.plan import dependence
from jax_mps.plan.batching import Batch
from jax_mps.plan.dependence import Dependence, Outside
from jax_mps.plan.loops import UNROLL_BUDGET, Apart, Constants, constant_step, renamed, size
from jax_mps.plan.partition import Target, live_steps, stays
from jax_mps.plan.scans import read_counter
from jax_mps.plan.trips import Row
from jax_mps.plan.types import Region, Step, TensorType, Value, numpy_dtype

_MOVES = ("stablehlo.reshape", "stablehlo.transpose")
_OF_ROWS = (*_MOVES, "stablehlo.broadcast_in_dim", "stablehlo.add")


def sunk(loop: Step, constants: Constants, target: Target) -> Apart:
    """The loop without what can wait until after it: itself, where that is nothing."""
    whole = Apart([], loop, [], {})
    if not any(s.name == "stablehlo.dot_general" for s in loop.regions[1].steps):
        return whole
    reader = read_counter(loop, constants, live_steps)
    if reader is None or reader.trips * size(reader.body) <= UNROLL_BUDGET:
        return whole
    sinker = _Sinker(Dependence(reader))
    return sinker.apart(loop) if sinker.pays() and stays(loop, constants, target) else whole


@dataclass(frozen=True, slots=True)
class _Tree:
    """What linear steps make of some leaves: products, and other values."""

    linear: frozenset[Step]
    products: frozenset[Step]
    others: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A carry that takes a row from each iteration, of products of something and what is the same in all."""

    position: int
    row: Row
    tree: _Tree
    update: Step


class _Sinker:
    """One loop.

    sums: the positions of carries that each iteration adds to, and the trees of what it adds, of whose leaves one is the carry itself.
    kept: what the loop's iterations hand out instead. rows: what they hand out and need not, since it follows from that.
    """

    def __init__(self, on: Dependence) -> None:
        self.on, self.reader, self.body = on, on.reader, on.body
        others = [i for i in range(len(self.body.arguments)) if i != self.reader.counter]
        self.readers: dict[Value, list[Step]] = {}
        for step in self.body.steps:
            for value in step.reads():
                self.readers.setdefault(value, []).append(step)
        self.kept: dict[Value, None] = {}
        self.sums = self._sums(others)
        self.rows = [rows for i in others if (rows := self._rows(i)) is not None]

    def _sums(self, positions: Sequence[int]) -> dict[int, _Tree]:
        """Those whose other leaves are handed out for the sake of products; as all of them wait, or none, for each step that they share."""
        while True:
            late = self._late(positions)
            trees = {i: tree for i in positions if (tree := self._sum(i, late)) is not None}
            found, self.kept = dict[int, _Tree](), {}
            while ready := {i: t for i, t in trees.items() if i not in found and all(v in self.kept for v in t.others if v is not self.body.arguments[i])}:
                found.update(ready)
                made = {p for tree in ready.values() for p in tree.products}
                self.kept.update((self._base(v), None) for p in self.body.steps if p in made for v in p.operands if not self._is_read(v))
            if len(found) == len(positions):
                return found
            positions = list(found)

    def _late(self, positions: Sequence[int]) -> set[Value]:
        """Values that nothing reads but linear steps to these carries' next values."""
        ends = [self.body.results[i] for i in positions]
        late: set[Value] = set()
        for step in reversed(self.body.steps):
            for value in step.results:
                readers = self.readers.get(value, [])
                if self._reads(value) == len(readers) + ends.count(value) and all(self._is_linear(s) and s.results[0] in late for s in readers):
                    late.add(value)
        return late

    def _reads(self, value: Value) -> int:
        return self.reader.readers.get(value, 0)

    def _base(self, value: Value) -> Value:
        """What reshapes and transpositions made a value of."""
        while (step := self.reader.producers.get(value)) is not None and step.name in _MOVES:
            value = step.operands[0]
        return value

    def _is_read(self, value: Value) -> bool:
        """Whether a value is a row of a captured array, which is there after the loop, too."""
        return self.on.viewed(value) in self.on.sources and self.on.kind(value) == "row"

    def _sum(self, position: int, late: Set[Value]) -> _Tree | None:
        argument, result = self.body.arguments[position], self.body.results[position]
        if result not in late or not (argument.type.is_floating or argument.type.is_complex) or self._reads(argument) != 1:
            return None
        tree = self._tree(result, lambda value, made: value in late and self._is_linear(made))
        adds = [result]
        while (step := self.reader.producers.get(adds[-1])) is not None and step.name == "stablehlo.add" and step in tree.linear:
            adds.append(next((v for v in step.operands if v is argument), step.operands[0]))
        if adds[-1] is not argument or any(self._reads(v) != 1 for v in adds):
            return None
        changing = all(p.results[0] in late and self._is_changing(p) for p in tree.products)
        return tree if changing and all(v is argument or self.on.kind(v) is None for v in tree.others) else None

    def _tree(self, value: Value, is_linear: Callable[[Value, Step], bool]) -> _Tree:
        """What leads to a value."""
        linear, products, others, waiting = set[Step](), set[Step](), dict[Value, None](), [value]
        while waiting:
            value = waiting.pop()
            made = self.reader.producers.get(value)
            if made is not None and is_linear(value, made):
                linear.add(made)
                waiting += made.operands if made.name == "stablehlo.add" else made.operands[:1]
            elif made is not None and made.name == "stablehlo.dot_general":
                products.add(made)
            else:
                others[value] = None
        return _Tree(frozenset(linear), frozenset(products), tuple(others))

    def _is_changing(self, product: Step) -> bool:
        """Whether both sides are others in each iteration."""
        return all(self.on.kind(v) in ("row", None) and v.type.size for v in product.operands)

    def _is_linear(self, step: Step) -> bool:
        """Whether it is all the same if a step is done before a sum or after."""
        if step.name not in ("stablehlo.reduce", "stablehlo.pad"):
            return step.name in (*_MOVES, "stablehlo.slice", "stablehlo.add")
        zero = self.reader.constants.get(step.operands[1]) if len(step.operands) == 2 else None
        return zero is not None and not zero.any() and (step.name == "stablehlo.pad" or folds(step.regions[0]) == ("add",))

    def _rows(self, position: int) -> _Rows | None:
        found = self.reader.stack(position)
        if found is None or found[1].range(0, self.reader.trips) != (0, self.body.arguments[position].shape[found[1].axis]):
            return None
        update, row = found
        tree = self._tree(update.operands[1], lambda value, made: self._reads(value) == 1 and made.name in _OF_ROWS)
        alone = tree.products and not tree.others and all(self._reads(p.results[0]) == 1 and self._is_of_kept(p) for p in tree.products)
        return _Rows(position, row, tree, update) if alone else None

    def _is_of_kept(self, product: Step) -> bool:
        """Whether one side is handed out anyway, and the other is the same in all iterations."""
        free = [v for v in product.operands if self.on.kind(v) not in ("fixed", "constant")]
        return len(free) == 1 and self._base(free[0]) in self.kept and product.attributes.get("algorithm") is None

    @property
    def products(self) -> list[Step]:
        """Those that are summed."""
        found = {p for tree in self.sums.values() for p in tree.products}
        return [s for s in self.body.steps if s in found]

    @property
    def linear(self) -> list[Step]:
        """What leads from them to the sums."""
        found = {s for tree in self.sums.values() for s in tree.linear}
        return [s for s in self.body.steps if s in found]

    def pays(self) -> bool:
        """Whether what is handed out is not much more than what is saved, and within bounds for all iterations."""
        added, saved = sum(v.type.nbytes for v in self.kept), sum(p.result.nbytes for p in self.products)
        return saved > 0 and added <= 2 * saved and added * self.reader.trips <= dependence.MOST_BYTES

    # ---- apart --------------------------------------------------------------------------------------------------------------------

    def apart(self, loop: Step) -> Apart:
        on, body = self.on, self.body
        read = [v for p in self.products for v in p.operands if self._base(v) not in self.kept]
        fixed = [v for s in self.rows for p in s.tree.products for v in p.operands if self._base(v) not in self.kept]
        zeros = [v for step in self.linear if step.name != "stablehlo.add" for v in step.operands[1:]]
        source = on.leader(on.steps_to(read))
        outside = Outside(on, source and source[1])
        for step in on.steps_to([*read, *fixed, *zeros]):
            outside.add(step)
        inside: list[Step] = []
        index = self._index(source, inside)
        if index is None:
            return Apart([], loop, [], {})
        buffers = {v: _zeros((self.reader.trips, *v.shape), v.dtype, outside.steps) for v in self.kept}
        gone = {*self.sums, *(s.position for s in self.rows)}
        left = [i for i in range(len(body.arguments)) if i not in gone]
        arguments = {v: Value(b.type) for v, b in buffers.items()}
        steps = [*inside, *(s for s in body.steps if s not in inside)]
        written = [_written(arguments[v], v, index, steps) for v in self.kept]
        slim = Region((*(body.arguments[i] for i in left), *arguments.values()), tuple(steps), (*(body.results[i] for i in left), *written))
        slim = replace(slim, steps=tuple(live_steps(slim)))
        tests = replace(loop.regions[0], arguments=(*(loop.regions[0].arguments[i] for i in left), *(Value(b.type) for b in buffers.values())))
        stacks = {v: Value(b.type) for v, b in buffers.items()}
        operands, results = ((*(values[i] for i in left), *more.values()) for values, more in ((loop.operands, buffers), (loop.results, stacks)))
        after = Batch(self.reader.trips, {**outside.rows, **stacks}, outside.same_of)
        sums = self._summed({**outside.names, **{body.arguments[i]: loop.operands[i] for i in self.sums}}, after)
        ends = {loop.results[i]: sums[body.results[i]] for i in self.sums}
        ends |= {loop.results[s.position]: self._put(s, source and source[1], after) for s in self.rows}
        attributes = {**loop.attributes, "after": loop.attributes.get("after", 0) + len(gone)}
        slimmer = replace(loop, operands=operands, results=results, regions=(tests, slim), attributes=attributes)
        needed = {v for s in after.steps for v in s.reads()} | {*buffers.values()}
        return Apart(outside.live(needed), slimmer, after.steps, ends)

    def _index(self, source: tuple[Step, Row] | None, steps: list[Step]) -> Value | None:
        """Where an iteration's row goes; None if that would have to be computed."""
        if source is not None:
            return self.on.index(*source, steps)
        return self.body.arguments[self.reader.counter] if (self.reader.start, self.reader.step) == (0, 1) else None

    def _summed(self, names: dict[Value, Value], after: Batch) -> dict[Value, Value]:
        """What stands for the carries' last values, from what stands for their first ones."""
        for product in self.products:
            self._bring(product.operands, after)
            names[product.results[0]] = after.summed_product(product)
        others = dict.fromkeys(v for tree in self.sums.values() for v in tree.others if v not in names)
        names |= {v: _total(after.rows[v], v.type, after) for v in others}
        after.steps += [renamed(step, names) for step in self.linear]
        return names

    def _bring(self, values: Iterable[Value], after: Batch) -> None:
        """What is handed out, as a product reads it."""
        for value in values:
            moves: list[Step] = []
            while value not in after.rows and (step := self.reader.producers.get(value)) is not None and step.name in _MOVES:
                moves.append(step)
                value = step.operands[0]
            for step in reversed(moves if value in after.rows else []):
                after.add(step)

    def _put(self, found: _Rows, leader: Row | None, after: Batch) -> Value:
        """All rows, in the order of their own array."""
        self._bring((v for p in found.tree.products for v in p.operands), after)
        for step in self.body.steps:
            if step in found.tree.products or step in found.tree.linear:
                after.add(step)
        rows = after.rows[found.update.operands[1]]
        if found.row.sign != (leader.sign if leader is not None else 1):
            rows = after.reversed(rows, (0,))
        axis, shape = found.row.axis, found.update.operand.shape
        others = [size for d, size in enumerate(shape) if d != axis]
        rows = after.reshaped(rows, (after.count, *others))
        order = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
        return after.transposed(rows, order)


def _zeros(shape: tuple[int, ...], dtype: str, steps: list[Step]) -> Value:
    zero = constant_step(np.zeros((), numpy_dtype(dtype)), dtype)
    text = (("broadcast_dimensions", "array<i64>"),)
    steps += [zero, Step("stablehlo.broadcast_in_dim", zero.results, (Value(TensorType(shape, dtype)),), {"broadcast_dimensions": ()}, text=text)]
    return steps[-1].results[0]


def _written(rows: Value, value: Value, index: Value, steps: list[Step]) -> Value:
    """The rows, one of them being the value."""
    zero = constant_step(np.asarray(0, index.dtype), index.dtype)
    row = Step("stablehlo.reshape", (value,), (Value(TensorType((1, *value.shape), value.dtype)),), text=())
    starts = (index, *zero.results * value.type.rank)
    steps += [zero, row, Step("stablehlo.dynamic_update_slice", (rows, *row.results, *starts), (Value(rows.type),), text=())]
    return steps[-1].results[0]


def _total(rows: Value, kind: TensorType, after: Batch) -> Value:
    """The sum over all iterations."""
    zero = constant_step(np.zeros((), numpy_dtype(kind.dtype)), kind.dtype)
    scalar = TensorType((), kind.dtype)
    arguments = Value(scalar), Value(scalar)
    add = Step("stablehlo.add", arguments, (Value(scalar),), text=())
    region = Region(arguments, (add,), add.results)
    named, text = {"dimensions": (0,)}, (("dimensions", "array<i64: 0>"),)
    after.steps += [zero, Step("stablehlo.reduce", (rows, *zero.results), (Value(kind),), named, (region,), text=text)]
    return after.steps[-1].results[0]
