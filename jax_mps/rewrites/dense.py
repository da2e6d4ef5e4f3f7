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
from jax_mps.rewrites.regions import innermost_first
from jax_mps.rewrites.straight import straightened
from jax_mps.rewrites.views import Strides, is_dense, reshaped, row_major, transposition

_PRODUCTS = frozenset(["stablehlo.dot_general", "jax_mps.biased_product"])
_VIEWS = frozenset(["stablehlo.slice", "stablehlo.transpose", "stablehlo.reshape"])
_FLOATS = frozenset(["float32", "float16", "bfloat16"])
_SIDES = ("lhs", "rhs")


def dense_copies(plan: Plan) -> Plan:
    """The plan with copies for products made together, on CUDA."""
    return innermost_first(plan, _region) if device_kind() == "cuda" else plan


def _region(region: Region) -> Region:
    if sum(step.name in _PRODUCTS or step.name == "stablehlo.reshape" for step in region.steps) < 2:
        return region
    region = straightened(region)
    groups = _Finder(region).groups()
    return _written(region, groups) if groups else region


@dataclass(slots=True)
class _Copy:
    """What products, or reshapes that no view will do for, read of a value as a copy. order: its dimensions as the copy has them; root: what it is a view of;
    uses: steps, the operand's place in each and the order of its dimensions there, the first one first; copies: how many MLX would make."""

    value: Value
    order: tuple[int, ...]
    root: Value
    result: Value
    uses: list[tuple[Step, int, tuple[int, ...]]] = field(default_factory=list)
    copies: int = 0


@dataclass(slots=True)
class _Group:
    """Copies that are made before a step; views: steps that have to be there by then."""

    first: Step
    members: list[_Copy]
    views: tuple[Step, ...]


class _Finder:
    """One region. views: what a value is a view of, its strides there and where it begins."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.made = {value: step for step in region.steps for value in step.results}
        self.place = {value: i for i, step in enumerate(region.steps) for value in step.results}
        self.views: dict[Value, tuple[Value, Strides, int]] = {}
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
        found: dict[object, _Copy] = {}
        forms: dict[object, set[object]] = {}
        for step in self.region.steps:
            for side, order, form in self._copied_by(step):
                value = step.operands[side]
                root, strides, begin = self.view(value)
                shape = tuple(value.shape[d] for d in order)
                key = root, begin, shape, tuple(strides[d] for d in order)
                if key not in found:
                    found[key] = _Copy(value, order, root, Value(TensorType(shape, value.dtype)))
                found[key].uses.append((step, side, order))
                if form not in forms.setdefault(key, set()):
                    forms[key].add(form)
                    found[key].copies += 1
        return list(found.values())

    def _copied_by(self, step: Step) -> Iterator[tuple[int, tuple[int, ...], object]]:
        """The operands that a step has copied: the place of each, the order of its dimensions, and what is the same for two steps that share a copy."""
        if step.name == "stablehlo.reshape" and step.result.size and self._viewed(step.results[0]) is None:
            order = tuple(range(step.operand.rank))
            if _last(step.operand.shape, self.view(step.operands[0])[1], order) == 1:
                yield 0, order, step.result.shape
        elif step.name in _PRODUCTS and step.result.dtype in _FLOATS:
            for side, it in enumerate(matrices(step)):
                value = step.operands[side]
                if value.dtype in _FLOATS and self._is_copied(step, value, it):
                    strides = self.view(value)[1]
                    views = self._is_one(it.rows, value.shape, strides) and self._is_one(it.columns, value.shape, strides)
                    inside = (*it.columns, *it.rows) if _last(value.shape, strides, it.rows) == 1 else (*it.rows, *it.columns)
                    yield side, (*it.batching, *inside), it.is_copied or (step if views else it.rows)

    def _is_copied(self, step: Step, value: Value, it: Matrix) -> bool:
        """Whether the product has the operand copied: by MLX as it is, since nothing is computed of it before."""
        (m, n), (lhs, rhs) = it.size, step.operands[:2]
        plain = lhs.dtype == rhs.dtype == step.result.dtype and not is_precise(step)
        if min(m, n) == 1 or lhs.type.size + rhs.type.size < TINY * math.prod(it.batches) or not (plain or it.is_copied):
            return False
        strides = self.view(value)[1]
        if 1 not in (_last(value.shape, strides, it.rows), _last(value.shape, strides, it.columns)):  # which no runs of 16 bytes would do for
            return False
        turned = (*it.columns, *it.rows), (*it.rows, *it.columns)
        return not any(is_dense([value.shape[d] for d in order], [strides[d] for d in order]) for order in turned)

    def _is_one(self, dims: Sequence[int], shape: Sequence[int], strides: Strides) -> bool:
        """Whether dimensions are one without a copy."""
        return reshaped([shape[d] for d in dims], [strides[d] for d in dims], (math.prod(shape[d] for d in dims),)) is not None

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

    def view(self, value: Value) -> tuple[Value, Strides, int]:
        """What a value is a view of, its strides there and where it begins; itself, if MLX makes it anew."""
        if value not in self.views:
            self.views[value] = self._viewed(value) or (value, row_major(value.shape), 0)
        return self.views[value]

    def _viewed(self, value: Value) -> tuple[Value, Strides, int] | None:
        step = self.made.get(value)
        if step is None or step.name not in _VIEWS or not value.type.size:
            return None
        root, strides, begin = self.view(step.operands[0])
        if step.name == "stablehlo.slice":
            begin += sum(s * start for s, start in zip(strides, step.start_indices, strict=True))
            return root, tuple(s * by for s, by in zip(strides, step.strides, strict=True)), begin
        if step.name == "stablehlo.transpose":
            return root, tuple(strides[d] for d in step.permutation), begin
        found = reshaped(step.operand.shape, strides, value.shape)
        return None if found is None else (root, found, begin)


def _last(shape: Sequence[int], strides: Strides, dims: Sequence[int]) -> int:
    """The stride of the last of these dimensions that is longer than 1."""
    return next((strides[d] for d in reversed(dims) if shape[d] > 1), 0)


def _written(region: Region, groups: Sequence[_Group]) -> Region:
    before: dict[Step, list[Step]] = {}
    uses: dict[Step, list[tuple[int, tuple[int, ...], Value]]] = {}
    for group in groups:
        before.setdefault(group.first, []).extend([*group.views, _made(group)])
        for copy in group.members:
            for step, side, order in copy.uses:
                uses.setdefault(step, []).append((side, order, copy.result))
    steps: dict[Step, None] = {}
    for step in region.steps:
        steps.update(dict.fromkeys(before.get(step, ())))
        new = step
        for side, order, result in uses.get(step, ()):
            new = _reading(new, side, order, result)
        steps[new] = None
    done = Region(region.arguments, tuple(steps), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)


def _made(group: _Group) -> Step:
    """The step that makes copies."""
    operands = tuple(dict.fromkeys(copy.value for copy in group.members))
    results = tuple(copy.result for copy in group.members)
    plain = tuple(transposition(copy.value, copy.result, copy.order) for copy in group.members)
    given = {
        "sources": tuple(operands.index(copy.value) for copy in group.members),
        "permutations": tuple(copy.order for copy in group.members),
        "original": Region(operands, plain, results),
    }
    return Step("jax_mps.dense", operands, results, given, location=group.first.location, text=())


def _reading(step: Step, side: int, order: Sequence[int], copy: Value) -> Step:
    """The step that reads the copy, whose dimensions are in that order, in place of an operand."""
    if step.name not in _PRODUCTS:
        return replace(step, operands=(copy,))
    name, back = _SIDES[side], tuple(order.index(d) for d in range(len(order)))
    operands = (*step.operands[:side], copy, *step.operands[side + 1 :])
    value = Value(step.operands[side].type)
    inner = replace(step, operands=(*step.operands[:side], value, *step.operands[side + 1 :]))
    moved = {f"{name}_{kind}_dimensions": tuple(back[d] for d in step.attributes[f"{name}_{kind}_dimensions"]) for kind in ("batching", "contracting")}
    original = Region(operands, (transposition(copy, value, back), inner), step.results)
    return replace(step, operands=operands, attributes={**step.attributes, **moved, "original": original}, text=())
