"""Copies that products need of views, several of them in one step; on CUDA.

MLX's products want the last two dimensions of an operand side by side in memory. Attention's heads are not: queries, keys and values are slices of one
array, or arrays of their own, where heads stand between positions and features; so are the gradients of all three. MLX copies each, by a kernel of its
own, in each product that reads it or where heads and features are merged; one kernel of our own (ops/strided.py) makes the copies that are first needed
together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from jax_mps.ops import strided
from jax_mps.ops.dot import Matrix, is_precise, matrices
from jax_mps.ops.products import TINY
from jax_mps.ops.target import device_kind
from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, TensorType, Value
from jax_mps.rewrites.recompute import LATE, note_stage

Strides = tuple[int, ...]

_PRODUCTS = frozenset(["stablehlo.dot_general", "jax_mps.biased_product"])
_VIEWS = frozenset(["stablehlo.slice", "stablehlo.transpose", "stablehlo.reshape"])
_FLOATS = frozenset(["float32", "float16", "bfloat16"])
_SIDES = ("lhs", "rhs")


def dense_copies(plan: Plan) -> Plan:
    """The plan with copies for products made together, on CUDA."""
    if device_kind() != "cuda":
        return plan
    body = _region(plan.body)
    return plan if body is plan.body else replace(plan, body=body)


def _region(region: Region) -> Region:
    steps = []
    for step in region.steps:
        inner = tuple(_region(r) for r in step.regions)
        steps.append(replace(step, regions=inner) if any(a is not b for a, b in zip(inner, step.regions, strict=True)) else step)
    if any(a is not b for a, b in zip(steps, region.steps, strict=True)):
        region = Region(region.arguments, tuple(steps), region.results)
    if sum(step.name in _PRODUCTS or step.name == "stablehlo.reshape" for step in steps) < 2:
        return region
    groups = _Finder(region).groups()
    return _written(region, groups) if groups else region


@dataclass(slots=True)
class _Copy:
    """What products, or reshapes that no view will do for, read of a value as a copy. order: its dimensions as the copy has them; root: what it is a view of;
    uses: steps and the operand's place in each, the first one first; copies: how many MLX would make."""

    value: Value
    order: tuple[int, ...]
    root: Value
    result: Value
    uses: list[tuple[Step, int]] = field(default_factory=list)
    copies: int = 0


@dataclass(slots=True)
class _Group:
    """Copies that are made before a step; views: steps that have to be there by then."""

    first: Step
    members: list[_Copy]
    views: tuple[Step, ...]


class _Finder:
    """One region. views: what a value is a view of, and its strides there."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.made = {value: step for step in region.steps for value in step.results}
        self.place = {value: i for i, step in enumerate(region.steps) for value in step.results}
        self.views: dict[Value, tuple[Value, Strides]] = {}
        self.stages: dict[Value, int] = {}
        for step in region.steps:
            note_stage(step, self.stages)

    def groups(self) -> list[_Group]:
        found = []
        waiting = self._copies()
        while waiting:
            first = waiting[0].uses[0][0]
            members: list[_Copy] = []
            for copy in waiting:
                if len(members) < strided.MOST and self._is_there(copy, first) and self._belongs(copy, members):
                    members.append(copy)
            taken = {id(copy) for copy in members}
            waiting = [copy for copy in waiting if id(copy) not in taken]
            if sum(copy.copies for copy in members) > 1 and strided.fits(members[0].value.dtype, [copy.value.shape for copy in members]):
                found.append(_Group(first, members, self._chain(members, first)))
        return found

    def _copies(self) -> list[_Copy]:
        """All copies, in the order of the products that are the first to read them."""
        found: dict[tuple[Value, tuple[int, ...]], _Copy] = {}
        forms: dict[tuple[Value, tuple[int, ...]], set[object]] = {}
        for step in self.region.steps:
            for side, order, form in self._copied_by(step):
                value = step.operands[side]
                key = value, order
                if key not in found:
                    shape = tuple(value.shape[d] for d in order)
                    found[key] = _Copy(value, order, self.view(value)[0], Value(TensorType(shape, value.dtype)))
                found[key].uses.append((step, side))
                if form not in forms.setdefault(key, set()):
                    forms[key].add(form)
                    found[key].copies += 1
        return list(found.values())

    def _copied_by(self, step: Step) -> Iterator[tuple[int, tuple[int, ...], object]]:
        """The operands that a step has copied: the place of each, the order of its dimensions, and what is the same for two steps that share a copy."""
        if step.name == "stablehlo.reshape" and step.result.size and self._viewed(step.results[0]) is None:
            strides = self.view(step.operands[0])[1]
            if [stride for stride, size in zip(strides, step.operand.shape, strict=True) if size > 1][-1] == 1:
                yield 0, tuple(range(step.operand.rank)), step.result.shape
        elif step.name in _PRODUCTS and step.result.dtype in _FLOATS:
            for side, it in enumerate(matrices(step)):
                value = step.operands[side]
                if value.dtype in _FLOATS and self._is_copied(step, value, it):
                    strides = self.view(value)[1]
                    views = self._is_one(it.rows, value.shape, strides) and self._is_one(it.columns, value.shape, strides)
                    yield side, (*it.batching, *it.inside), it.is_copied or (step if views else it.rows)

    def _is_copied(self, step: Step, value: Value, it: Matrix) -> bool:
        """Whether the product has the operand copied: by MLX as it is, since nothing is computed of it before."""
        (m, n), (lhs, rhs) = it.size, step.operands[:2]
        plain = lhs.dtype == rhs.dtype == step.result.dtype and not is_precise(step)
        if min(m, n) == 1 or lhs.type.size + rhs.type.size < TINY * math.prod(it.batches) or not (plain or it.is_copied):
            return False
        _, strides = self.view(value)
        turned = (*it.columns, *it.rows), (*it.rows, *it.columns)
        return strides[it.inside[-1]] == 1 and not any(_is_dense([value.shape[d] for d in order], [strides[d] for d in order]) for order in turned)

    def _is_one(self, dims: Sequence[int], shape: Sequence[int], strides: Strides) -> bool:
        """Whether dimensions are one without a copy."""
        return _reshaped([shape[d] for d in dims], [strides[d] for d in dims], (math.prod(shape[d] for d in dims),)) is not None

    def _is_there(self, copy: _Copy, first: Step) -> bool:
        """Whether what is copied can be made before a step."""
        return self.place.get(copy.root, -1) < self.place[first.results[0]]

    def _belongs(self, copy: _Copy, members: Sequence[_Copy]) -> bool:
        """A view of the same array, or needed soon after: what is copied long before takes memory."""
        if not members:
            return True
        soon = self.stages[copy.uses[0][0].results[0]] - self.stages[members[0].uses[0][0].results[0]] < LATE
        return copy.value.dtype == members[0].value.dtype and (soon or any(copy.root is other.root for other in members))

    def _chain(self, members: Sequence[_Copy], first: Step) -> tuple[Step, ...]:
        """Views that are made after the step, in order."""
        late: dict[Step, None] = {}
        for copy in members:
            value = copy.value
            while value is not copy.root:
                step = self.made[value]
                if self.place[value] > self.place[first.results[0]]:
                    late[step] = None
                value = step.operands[0]
        return tuple(sorted(late, key=lambda step: self.place[step.results[0]]))

    def view(self, value: Value) -> tuple[Value, Strides]:
        """What a value is a view of, and its strides there; itself, if MLX makes it anew."""
        if value not in self.views:
            self.views[value] = self._viewed(value) or (value, _row_major(value.shape))
        return self.views[value]

    def _viewed(self, value: Value) -> tuple[Value, Strides] | None:
        step = self.made.get(value)
        if step is None or step.name not in _VIEWS or not value.type.size:
            return None
        root, strides = self.view(step.operands[0])
        if step.name == "stablehlo.slice":
            return root, tuple(s * by for s, by in zip(strides, step.strides, strict=True))
        if step.name == "stablehlo.transpose":
            return root, tuple(strides[d] for d in step.permutation)
        reshaped = _reshaped(step.operand.shape, strides, value.shape)
        return None if reshaped is None else (root, reshaped)


def _row_major(shape: Sequence[int]) -> Strides:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(size == 1 or stride == expected for size, stride, expected in zip(shape, strides, _row_major(shape), strict=True))


def _reshaped(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> Strides | None:
    """The strides of a reshape that is a view, as MLX finds them; None if it has to copy."""
    runs: list[tuple[int, int]] = []  # dimensions that follow each other in memory: their size, the stride of the last
    for size, stride in zip(shape, strides, strict=True):
        if size > 1 and runs and runs[-1][1] == stride * size:
            runs[-1] = runs[-1][0] * size, stride
        elif size > 1:
            runs.append((size, stride))
    found: list[int] = []
    left = 1
    for size in new:
        if size > 1 and left == 1:
            left, stride = runs.pop(0)
        if left % size:
            return None
        left //= size
        found.append(left * stride if size > 1 else 0)
    return tuple(found)


def _written(region: Region, groups: Sequence[_Group]) -> Region:
    before: dict[Step, list[Step]] = {}
    uses: dict[Step, list[tuple[int, _Copy]]] = {}
    for group in groups:
        before.setdefault(group.first, []).extend([*group.views, _made(group)])
        for copy in group.members:
            for step, side in copy.uses:
                uses.setdefault(step, []).append((side, copy))
    steps: dict[Step, None] = {}
    for step in region.steps:
        steps.update(dict.fromkeys(before.get(step, ())))
        new = step
        for side, copy in uses.get(step, ()):
            new = _reading(new, side, copy)
        steps[new] = None
    done = Region(region.arguments, tuple(steps), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)


def _made(group: _Group) -> Step:
    """The step that makes copies."""
    operands = tuple(dict.fromkeys(copy.value for copy in group.members))
    results = tuple(copy.result for copy in group.members)
    plain = tuple(_transpose(copy.value, copy.result, copy.order) for copy in group.members)
    given = {
        "sources": tuple(operands.index(copy.value) for copy in group.members),
        "permutations": tuple(copy.order for copy in group.members),
        "original": Region(operands, plain, results),
    }
    return Step("jax_mps.dense", operands, results, given, location=group.first.location, text=())


def _reading(step: Step, side: int, copy: _Copy) -> Step:
    """The step that reads the copy in place of an operand."""
    if step.name not in _PRODUCTS:
        return replace(step, operands=(copy.result,))
    name, back = _SIDES[side], tuple(copy.order.index(d) for d in range(len(copy.order)))
    operands = (*step.operands[:side], copy.result, *step.operands[side + 1 :])
    value = Value(copy.value.type)
    inner = replace(step, operands=(*step.operands[:side], value, *step.operands[side + 1 :]))
    moved = {f"{name}_{kind}_dimensions": tuple(back[d] for d in step.attributes[f"{name}_{kind}_dimensions"]) for kind in ("batching", "contracting")}
    original = Region(operands, (_transpose(copy.result, value, back), inner), step.results)
    return replace(step, operands=operands, attributes={**step.attributes, **moved, "original": original}, text=())


def _transpose(value: Value, result: Value, permutation: Sequence[int]) -> Step:
    text = f"array<i64: {', '.join(map(str, permutation))}>"
    return Step("stablehlo.transpose", (value,), (result,), {"permutation": tuple(permutation)}, text=(("permutation", text),))
