"""What a `while` says of itself: its counter, its trip count, the values it never changes; and unrolling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from jax_mps.plan.trips import Counter
from jax_mps.plan.types import Region, Step, TensorType, Value, has_effects

# A loop of a static trip count is unrolled into its segment while trips x body steps stay within this budget.
UNROLL_BUDGET = 512
# ... and a longer one has this many steps in each chunk of iterations that is exported as one function.
CHUNK_BUDGET = 96
# A loop that only its values end runs up to so many iterations, of so many steps together, before it looks at them, if what an iteration
# computes (elements) and carries (bytes) is less than this: the last ones are then for nothing.
FORETOLD_LENGTH, FORETOLD_STEPS = 8, 256
FORETOLD_COST, FORETOLD_BYTES = 1 << 14, 1 << 18

Constants = Mapping[Value, np.ndarray]


def invariants(body: Region) -> frozenset[int]:
    """Carry positions that the body returns unchanged."""
    return frozenset(i for i, (a, r) in enumerate(zip(body.arguments, body.results, strict=True)) if a is r)


def find_counter(cond: Region, body: Region, constants: Constants) -> Counter | None:
    """Recognise `i < bound` over a carry that the body increases by a constant (the spec knows no counted loop; JAX emits this)."""
    inside = {**constants, **_constants(cond), **_constants(body)}
    if len(cond.results) != 1 or any(map(has_effects, cond.steps)):
        return None
    test = _producer(cond, cond.results[0])
    if test is None or test.name != "stablehlo.compare" or not test.operand.is_integer:
        return None
    direction = test.comparison_direction
    lhs, rhs = test.operands
    if lhs not in cond.arguments:
        lhs, rhs, direction = rhs, lhs, {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
    if lhs not in cond.arguments or direction not in ("LT", "LE", "GT", "GE"):
        return None
    position = cond.arguments.index(lhs)
    step = increment(body, position, inside)
    if step is None or (step > 0) != (direction in ("LT", "LE")):
        return None
    if rhs in inside:
        return Counter(position, step, direction, int(inside[rhs]))
    if rhs in cond.arguments:
        carry = cond.arguments.index(rhs)
        return Counter(position, step, direction, None, bound_carry=carry) if carry in invariants(body) else None
    return Counter(position, step, direction, None, bound_capture=rhs)


def increment(body: Region, position: int, constants: Constants) -> int | None:
    """The constant that the body adds to a carry, or None."""
    add = _producer(body, body.results[position])
    if add is None or add.name not in ("stablehlo.add", "stablehlo.subtract"):
        return None
    lhs, rhs = add.operands
    if lhs is not body.arguments[position]:
        lhs, rhs = (rhs, lhs) if add.name == "stablehlo.add" else (lhs, rhs)
    if lhs is not body.arguments[position] or rhs not in constants:
        return None
    step = int(constants[rhs])
    step = -step if add.name == "stablehlo.subtract" else step
    return step or None


def _producer(region: Region, value: Value) -> Step | None:
    return next((s for s in region.steps if value in s.results), None)


def _constants(region: Region) -> dict[Value, np.ndarray]:
    return {s.results[0]: s.value for s in region.steps if s.name == "stablehlo.constant"}


def in_range(counter: Counter, start: int, bound: int, kind: TensorType) -> bool:
    """Whether the counter ends before it wraps around its type (a wrapping loop is run by its predicate)."""
    info = np.iinfo(np.dtype(kind.dtype))
    last = start + counter.trips(start, bound) * counter.step
    return bool(info.min <= last <= info.max)


# ---- cloning ---------------------------------------------------------------------------------------------------------------------


def inline(region: Region, arguments: Sequence[Value], steps: list[Step]) -> tuple[Value, ...]:
    """Append a copy of the region's steps for the given arguments to `steps`; returns the copy's results."""
    names: dict[Value, Value] = dict(zip(region.arguments, arguments, strict=True))
    for step in region.steps:
        steps.append(renamed(step, names))
    return tuple(names.get(v, v) for v in region.results)


def renamed(step: Step, names: dict[Value, Value]) -> Step:
    results = tuple(Value(v.type) for v in step.results)
    operands = tuple(names.get(v, v) for v in step.operands)
    regions = tuple(_renamed_region(r, names) for r in step.regions)
    names.update(zip(step.results, results, strict=True))
    return replace(step, operands=operands, results=results, regions=regions)


def _renamed_region(region: Region, names: dict[Value, Value]) -> Region:
    inner = dict(names)
    arguments = tuple(Value(v.type) for v in region.arguments)
    inner.update(zip(region.arguments, arguments, strict=True))
    steps = tuple(renamed(s, inner) for s in region.steps)
    return Region(arguments, steps, tuple(inner.get(v, v) for v in region.results))


def constant_step(value: np.ndarray, dtype: str) -> Step:
    """A step that makes a constant."""
    kind = TensorType(value.shape, dtype)
    return Step("stablehlo.constant", (), (Value(kind),), {"value": value}, text=())


def unroll(body: Region, initial: Sequence[Value], trips: int, counter: Counter, start: int, steps: list[Step]) -> tuple[Value, ...]:
    """Append `trips` copies of the body, the counter a constant in each; returns the last carry."""
    carry = list(initial)
    kind = body.arguments[counter.position].type
    for trip in range(trips):
        index = constant_step(np.array(start + trip * counter.step, kind.dtype), kind.dtype)
        steps.append(index)
        carry[counter.position] = index.results[0]
        carry = list(inline(body, carry, steps))
    return tuple(carry)


@dataclass(frozen=True, slots=True)
class Apart:
    """A loop, what runs before and after it in place of parts of it, and what stands for results that it no longer has."""

    before: list[Step]
    loop: Step
    after: list[Step]
    ends: dict[Value, Value]


def unroll_short(
    region: Region,
    constants: Constants,
    fits: Callable[[Step], bool],
    kept: Set[Step] = frozenset(),
    take_apart: Callable[[Step, Constants], Apart] = lambda loop, constants: Apart([], loop, [], {}),
) -> Region:
    """The region with every short loop of static trip count, inner ones first, replaced by copies of its body; what may leave
    the body of any has left it before.

    `fits` says whether the device can run a step; a loop with one that it cannot run is left alone, and so are those in `kept`.
    """
    if not any(s.name == "stablehlo.while" for s in region.walk()):
        return region
    known = dict(constants)
    names: dict[Value, Value] = {}
    steps: list[Step] = []
    for original in region.steps:
        inner = original
        if original.name in ("stablehlo.while", "stablehlo.case", "stablehlo.if") and original not in kept:
            inner = replace(original, regions=tuple(unroll_short(r, known, fits, kept, take_apart) for r in original.regions))
        step = renamed(inner, names)
        if step.name == "stablehlo.constant":
            known[original.results[0]] = known[step.results[0]] = step.value
        results = step.results
        if step.name == "stablehlo.while" and original not in kept:
            step, results = without_invariants(step)
            constant, step, ends = with_one_counter(step, known)
            known.update((s.results[0], s.value) for s in constant)
            parts = take_apart(step, known)
            steps += (*constant, *parts.before)
            carry = _unrolled(parts.loop, known, fits, steps)
            last = {} if carry is None else dict(zip(parts.loop.results, carry, strict=True))
            if carry is None:
                steps.append(parts.loop)
            steps += (renamed(s, last) for s in parts.after)
            ends |= {**last, **{v: last.get(end, end) for v, end in parts.ends.items()}}
            results = tuple(ends.get(v, v) for v in results)
            known.update((v, known[end]) for v, end in zip(original.results, results, strict=True) if end in known)
        else:
            steps.append(step)
        names.update(zip(original.results, results, strict=True))
    return Region(region.arguments, tuple(steps), tuple(names.get(v, v) for v in region.results))


def without_invariants(loop: Step) -> tuple[Step, tuple[Value, ...]]:
    """The loop with the carries that its body returns unchanged as captures, and what stands for each of its results: a carry is passed,
    evaluated and kept alive once per iteration, a capture never."""
    cond, body = loop.regions
    fixed = invariants(body)
    kept = [i for i in range(len(loop.operands)) if i not in fixed]
    if not fixed or not kept:
        return loop, loop.results

    def slim(region: Region, results: Sequence[Value]) -> Region:
        arguments = tuple(Value(region.arguments[i].type) for i in kept)
        names = {region.arguments[i]: loop.operands[i] for i in fixed} | dict(zip((region.arguments[i] for i in kept), arguments, strict=True))
        steps = tuple(renamed(s, names) for s in region.steps)
        return Region(arguments, steps, tuple(names.get(v, v) for v in results))

    regions = (slim(cond, cond.results), slim(body, [body.results[i] for i in kept]))
    operands, results = (tuple(values[i] for i in kept) for values in (loop.operands, loop.results))
    slimmer = replace(loop, operands=operands, results=results, regions=regions)
    return slimmer, tuple(loop.operands[i] if i in fixed else v for i, v in enumerate(loop.results))


def with_one_counter(loop: Step, constants: Constants) -> tuple[list[Step], Step, dict[Value, Value]]:
    """The loop without carries that count as its counter does: `fori_loop` has one beside that of the scan that it is. Constants, and what stands for
    the results that are gone: these."""
    counted = static_trips(loop, constants)
    if counted is None or not counted.trips:
        return [], loop, {}
    (cond, body), position = loop.regions, counted.counter.position
    inside, tested = {**constants, **_constants(body)}, {v for s in cond.walk() for v in s.operands}
    counter, distance = body.arguments[position], counted.trips * counted.counter.step
    names: dict[Value, Value] = {}
    counting, ends = list[Step](), dict[Value, Step]()
    for i, argument in enumerate(body.arguments):
        start = constants.get(loop.operands[i])
        if i == position or start is None or argument.type != counter.type or cond.arguments[i] in tested:
            continue
        info, apart = np.iinfo(np.dtype(argument.dtype)), int(start) - counted.start
        if increment(body, i, inside) != counted.counter.step or not all(info.min <= n <= info.max for n in (apart, int(start) + distance)):
            continue
        names[argument] = _moved(counter, apart, counting)
        ends[loop.results[i]] = constant_step(np.asarray(int(start) + distance, argument.dtype), argument.dtype)
    if not names:
        return [], loop, {}
    kept = [i for i, v in enumerate(loop.results) if v not in ends]
    steps = [*counting, *(renamed(s, names) for s in body.steps)]
    slim = Region(tuple(body.arguments[i] for i in kept), tuple(steps), tuple(names.get(body.results[i], body.results[i]) for i in kept))
    tests = replace(cond, arguments=tuple(cond.arguments[i] for i in kept))
    operands, results = (tuple(values[i] for i in kept) for values in (loop.operands, loop.results))
    slimmer = replace(loop, operands=operands, results=results, regions=(tests, slim))
    return list(ends.values()), slimmer, {v: s.results[0] for v, s in ends.items()}


def _moved(counter: Value, distance: int, steps: list[Step]) -> Value:
    """The counter, so far from itself, which must be in its range in every iteration."""
    if not distance:
        return counter
    constant = constant_step(np.asarray(distance, counter.dtype), counter.dtype)
    steps += [constant, Step("stablehlo.add", (counter, constant.results[0]), (Value(counter.type),), text=())]
    return steps[-1].results[0]


@dataclass(frozen=True, slots=True)
class Counted:
    """A loop whose trip count is known when it is translated."""

    counter: Counter
    start: int
    trips: int


def static_trips(loop: Step, constants: Constants) -> Counted | None:
    """How a loop counts, if its start and bound are constants."""
    cond, body = loop.regions
    counter = find_counter(cond, body, constants)
    if counter is None:
        return None
    start = constants.get(loop.operands[counter.position])
    bound = counter.bound if counter.bound_carry is None else _known(constants, loop.operands[counter.bound_carry])
    if counter.bound_capture is not None:
        bound = _known(constants, counter.bound_capture)
    if start is None or bound is None or not in_range(counter, int(start), bound, loop.operands[counter.position].type):
        return None
    return Counted(counter, int(start), counter.trips(int(start), bound))


def _unrolled(loop: Step, constants: Constants, fits: Callable[[Step], bool], steps: list[Step]) -> tuple[Value, ...] | None:
    body = loop.regions[1]
    counted = static_trips(loop, constants)
    if counted is None or counted.trips * max(1, size(body)) > UNROLL_BUDGET or not all(fits(s) for s in body.steps):
        return None
    return unroll(body, loop.operands, counted.trips, counted.counter, counted.start, steps)


def _known(constants: Constants, value: Value) -> int | None:
    found = constants.get(value)
    return None if found is None else int(found)


def fused(cond: Region, body: Region) -> Region:
    """The body followed by the condition on its results: one region that returns the next carry and the next predicate."""
    arguments = tuple(Value(v.type) for v in body.arguments)
    steps: list[Step] = []
    carry = inline(body, arguments, steps)
    predicate = inline(cond, carry, steps)
    return Region(arguments, tuple(steps), carry + predicate)


def repeated(body: Region, times: int) -> Region:
    """A region that runs the body `times` times."""
    arguments = tuple(Value(v.type) for v in body.arguments)
    steps: list[Step] = []
    carry: tuple[Value, ...] = arguments
    for _ in range(times):
        carry = inline(body, carry, steps)
    return Region(arguments, tuple(steps), carry)


def foretold(body: Region, times: int) -> Region:
    """The body `times` times, of which the first results are the next carry: the last carry, then what else each iteration returns."""
    arguments = tuple(Value(v.type) for v in body.arguments)
    steps: list[Step] = []
    carry: tuple[Value, ...] = arguments
    others: tuple[Value, ...] = ()
    for _ in range(times):
        results = inline(body, carry, steps)
        carry = results[: len(arguments)]
        others += results[len(arguments) :]
    return Region(arguments, tuple(steps), carry + others)


def foretold_length(body: Region) -> int:
    """How many iterations are worth running before it is known whether the first of them is the last: 1 where they take longer than a wait."""
    if cost(body.steps) > FORETOLD_COST or sum(v.type.nbytes for v in body.arguments) > FORETOLD_BYTES:
        return 1
    return min(FORETOLD_LENGTH, FORETOLD_STEPS // max(1, size(body)))


# What an element costs, where that is more than to write it; and the ops that do not read all of their operand.
_WEIGHTS = {"stablehlo.sort": 16, "chlo.top_k": 16, "stablehlo.scatter": 8, "stablehlo.fft": 4}
_SELECTIVE = frozenset(["stablehlo.slice", "stablehlo.dynamic_slice", "stablehlo.gather"])


def cost(steps: Iterable[Step], rate: int = 1) -> int:
    """Elements that the steps write, or read if these are more; products weighted by what they contract. rate: multiplications that a product takes
    as long for as another step for an element."""
    total = 0
    for step in steps:
        size = sum(v.type.size for v in step.results)
        if step.name in ("stablehlo.dot_general", "stablehlo.convolution"):
            size *= max(1, step.operands[1].type.size // max(1, step.result.shape[-1] if step.result.rank else 1) // rate)
            size = max(size, *(v.type.size for v in step.operands))
        elif step.name not in _SELECTIVE:
            size = max(size, *(v.type.size for v in step.operands), 0) * _WEIGHTS.get(step.name, 1)
        total += size
    return total


def size(region: Region) -> int:
    """Number of steps that compute something."""
    return sum(1 for s in region.walk() if s.name != "stablehlo.constant")
