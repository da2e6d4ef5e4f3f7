"""The same elementwise steps of several small arrays, in one step; on CUDA.

An optimizer updates each parameter by one formula, and most parameters are small (biases, scales). MLX starts a kernel for each of them; one kernel of
our own computes several (ops/joined.py). What is joined is read by nothing but itself and the region's end, so that no member can wait for another.
MLX writes the results of its own kernels over operands that nobody needs any more, which ours cannot: so large arrays stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jax_mps.ops.cuda_text import MEMORY, REGISTER, constant, expression
from jax_mps.ops.joined import Recipe
from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, Value
from jax_mps.rewrites.match import splat
from jax_mps.rewrites.table import Scope

LARGEST = 1 << 20  # bytes of any array of a member
FEWEST, FEWEST_IN_LOOP = 4, 2  # members
# What a kernel has to have room for: of AdamW's updates, of which it has for eight, a hundred took the host 2.38 ms joined and 1.91 apart; of momentum's,
# with room for eleven, 1.76 and 1.98 (H100, 2026-11-23 15:46).
_ROOM = 10
_LONGEST = 64  # steps of a member

_SPREADING = ("stablehlo.broadcast_in_dim", "stablehlo.reshape")
# What MLX would copy for a kernel of ours: views, and gradients of a convolution's kernel, which are transposed.
_VIEWS = frozenset(f"stablehlo.{name}" for name in ("broadcast_in_dim", "transpose", "slice", "reverse", "iota", "convolution"))


def joined(plan: Plan) -> Plan:
    """The plan with small updates joined, on CUDA."""
    if device_kind() != "cuda":
        return plan
    body = _region(plan.body, Scope(plan.body), FEWEST)
    return plan if body is plan.body else replace(plan, body=body)


def _region(region: Region, scope: Scope, fewest: int) -> Region:
    steps: list[Step] = []
    for old in region.steps:
        inner = tuple(_region(r, scope, FEWEST_IN_LOOP) for r in old.regions)
        step = replace(old, regions=inner) if any(a is not b for a, b in zip(inner, old.regions, strict=True)) else old
        steps.append(step)
        scope.producers.update((value, step) for value in step.results)
    if any(a is not b for a, b in zip(steps, region.steps, strict=True)):
        region = Region(region.arguments, tuple(steps), region.results)
    if sum(_is_small(value, scope) for value in region.results) < fewest:
        return region
    groups = _Finder(region, scope).groups(fewest)
    if not groups:
        return region
    replaced = {value for group in groups for value in group.results}
    steps = [step for step in region.steps if replaced.isdisjoint(step.results)]
    done = Region(region.arguments, (*steps, *groups), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)


def _is_small(value: Value, scope: Scope) -> bool:
    """Whether an elementwise step makes the value, and it is no number alone."""
    step = scope.producers.get(value)
    return step is not None and is_elementwise(step.name) and value.type.rank > 0 and 0 < value.type.nbytes <= LARGEST


@dataclass(frozen=True, slots=True)
class _Member:
    """What one island of elementwise steps reads and leaves, in the order of the recipe that it is computed by."""

    location: str
    constants: tuple[float, ...]
    numbers: tuple[Value, ...]
    arrays: tuple[Value, ...]
    results: tuple[Value, ...]


class _Finder:
    """One region. last: the steps, small and elementwise, that only each other and the region's results read."""

    def __init__(self, region: Region, scope: Scope) -> None:
        self.region, self.scope = region, scope
        self.place = {value: i for i, step in enumerate(region.steps) for value in step.results}
        self.results = frozenset(region.results)
        self.last = self._last()
        self.held: frozenset[Value] | None = None

    def _last(self) -> set[Step]:
        seen, last = Counter(self.region.results), set[Step]()
        waiting = list(self.region.results)
        while waiting:
            value = waiting.pop()
            if value not in self.place or not _is_small(value, self.scope) or seen[value] != self.scope.reads(value):
                continue
            step = self.scope.producers[value]
            if step not in last:
                last.add(step)
                seen.update(step.operands)
                waiting += step.operands
        return last

    def groups(self, fewest: int) -> list[Step]:
        alike: dict[tuple[str, ...], list[list[Step]]] = {}
        for island in self._islands():
            if len(island) <= _LONGEST:
                alike.setdefault(tuple(step.name for step in island), []).append(island)
        found: dict[Recipe, list[_Member]] = {}
        for islands in alike.values():
            if len(islands) >= fewest:
                for island in islands:
                    if (read := _Reader(self, island).read()) is not None:
                        recipe, member = read
                        found.setdefault(recipe, []).append(member)
        return [group for recipe, members in found.items() if len(members) >= fewest for group in _grouped(recipe, members, self.scope)]

    def _islands(self) -> list[list[Step]]:
        """The steps of `last` in the plan's order, those together that read each other."""
        of: dict[Step, list[Step]] = {}
        for step in self.region.steps:
            if step not in self.last:
                continue
            island = [step]
            for value in step.operands:
                other = of.get(self.scope.producers[value]) if value in self.place else None
                if other is None or other is island:
                    continue
                if len(other) > len(island):
                    island, other = other, island
                island += other
                of.update(dict.fromkeys(other, island))
            of[step] = island
        islands = {id(island): island for island in of.values()}
        return [sorted(island, key=lambda step: self.place[step.results[0]]) for island in islands.values()]

    def is_held(self, value: Value) -> bool:
        """Whether a value is in memory whatever is done here, and is no view."""
        step = self.scope.producers.get(value)
        if step is None or value not in self.place:
            return True
        if not is_elementwise(step.name):
            return step.name not in _VIEWS
        if self.held is None:
            fused = (step.reads() for step in self.region.steps if not is_elementwise(step.name) and step.name not in _VIEWS)
            self.held = self.results.union(*fused)
        return value in self.held


class _Reader:
    """Reads one island as a recipe."""

    def __init__(self, finder: _Finder, island: Sequence[Step]) -> None:
        self.finder, self.scope = finder, finder.scope
        self.island, self.shape = dict.fromkeys(island), island[0].result.shape
        self.names: dict[Value, str | None] = {}
        self.lines: list[str] = []
        self.constants: list[float] = []
        self.slots: dict[str, dict[Value, str]] = {"q": {}, "x": {}}

    def read(self) -> tuple[Recipe, _Member] | None:
        results = [value for step in self.island for value in step.results if value in self.finder.results]
        names = [self.name(value) for value in results]
        if None in names or len(self.lines) > _LONGEST:
            return None
        numbers, arrays = (tuple(slots) for slots in self.slots.values())
        left = tuple((v.dtype, name or "") for v, name in zip(results, names, strict=True))
        recipe = Recipe(tuple(self.lines), len(self.constants), _dtypes(numbers), _dtypes(arrays), left)
        return recipe, _Member(next(iter(self.island)).location, tuple(self.constants), numbers, arrays, tuple(results))

    def name(self, value: Value) -> str | None:
        """The variable or literal that a value is; None if it has to stay outside, and cannot."""
        if (found := self.names.get(value)) is None and (found := self._literal(value)) is None:
            found = self.names[value] = self._number(value) or self._array(value)
        return found

    def _literal(self, value: Value) -> str | None:
        """Floats may differ between members."""
        number = splat(value, self.scope) if value.dtype in REGISTER else None
        if number is None or not value.type.is_floating:
            return None if number is None else constant(value.dtype, number)
        self.constants.append(float(number))
        return f"c{len(self.constants) - 1}"

    def _number(self, value: Value) -> str | None:
        """A number that is the same for all elements: computed here, if nobody else reads it."""
        number = value
        while (step := self.scope.maker(number, *_SPREADING)) is not None and step.operand.size == 1:
            number = step.operands[0]
        if number.type.size != 1 or number.shape == self.shape:
            return None
        return (self._computed(number) if self.scope.reads(number) == 1 else None) or self._read("q", number)

    def _array(self, value: Value) -> str | None:
        if value.shape != self.shape or value.type.nbytes > LARGEST:
            return None
        if self.scope.producers.get(value) not in self.island and self.finder.is_held(value):
            return self._read("x", value)
        return self._computed(value)

    def _computed(self, value: Value) -> str | None:
        """A new variable, by a line of the recipe."""
        step = self.scope.producers.get(value)
        if step is None or value not in self.finder.place or not is_elementwise(step.name) or len(self.lines) > _LONGEST:
            return None
        names = [self.name(v) for v in step.operands]
        text = None if None in names else expression(step, [name or "" for name in names])
        if text is None:
            return None
        self.lines.append(f"{REGISTER[value.dtype]} r{len(self.lines)} = {text};")
        return f"r{len(self.lines) - 1}"

    def _read(self, kind: str, value: Value) -> str | None:
        return self.slots[kind].setdefault(value, f"{kind}{len(self.slots[kind])}") if value.dtype in MEMORY else None


def _dtypes(values: Sequence[Value]) -> tuple[str, ...]:
    return tuple(v.dtype for v in values)


def _grouped(recipe: Recipe, members: Sequence[_Member], scope: Scope) -> list[Step]:
    """Steps of as many members each, so that one text does for all; few members may be left over."""
    shared = (i for i, number in enumerate(members[0].numbers) if all(member.numbers[i] is number for member in members))
    recipe = replace(recipe, shared=frozenset(shared))
    if recipe.most < _ROOM:
        return []
    counts = range(min(recipe.most, len(members)), 1, -1)
    count = min(counts, key=lambda n: len(members) // n + len(members) % n, default=0)
    return [_group(recipe, members[k : k + count], scope) for k in range(0, len(members) - count + 1, count)] if count else []


def _group(recipe: Recipe, members: Sequence[_Member], scope: Scope) -> Step:
    read = [members[0].numbers[i] for i in sorted(recipe.shared)]
    for member in members:
        read += [*(number for i, number in enumerate(member.numbers) if i not in recipe.shared), *member.arrays]
    results = tuple(value for member in members for value in member.results)
    operands = tuple(dict.fromkeys(read))
    places = {value: i for i, value in enumerate(operands)}
    given = {
        "recipe": recipe,
        "members": len(members),
        "constants": tuple(number for member in members for number in member.constants),
        "order": tuple(places[value] for value in read),
        "original": Region(operands, _between(operands, results, scope), results),
    }
    return Step("jax_mps.joined", operands, results, given, location=members[0].location, text=())


def _between(operands: Sequence[Value], results: Sequence[Value], scope: Scope) -> tuple[Step, ...]:
    """The steps that lead from the operands to the results, in order."""
    found = dict[Step, None]()
    waiting = [(scope.producers[value], False) for value in reversed(results)]
    known = frozenset(operands)
    while waiting:
        step, ready = waiting.pop()
        if ready:
            found.setdefault(step)
        elif step not in found:
            waiting.append((step, True))
            waiting += [(scope.producers[value], False) for value in step.operands if value not in known]
    return tuple(found)
