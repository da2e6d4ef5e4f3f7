"""What a gradient reads of the forward pass, computed anew where that is elementwise and made of what is kept anyway.

JAX differentiates step by step, and each step keeps what its own gradient reads: of a gelu, its operand, the square of that, the tanh and what
becomes of it. On a GPU, where `mx.compile` makes one kernel of a gradient's elementwise steps, the operand is enough: the rest costs nothing there,
and neither its memory nor its way to memory and back. On CPU every step is paid for, and nothing is changed.

A value is late where products or other steps that are no part of a kernel stand between it and its reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, Value
from jax_mps.rewrites.regions import innermost_first

LATE = 3  # steps that end a kernel, between a value and a late reader
LEAST = 1 << 20  # bytes of a value that is worth it
_FREE = 16  # what is so many times smaller may be read at any time
_MOST = 16  # steps that make a value anew

_VIEWS = frozenset(f"stablehlo.{name}" for name in ("reshape", "transpose", "broadcast_in_dim", "slice", "iota", "constant"))
_CHEAP = frozenset(
    f"stablehlo.{name}"
    for name in (
        "abs", "add", "and", "clamp", "compare", "convert", "cosine", "divide", "exponential", "exponential_minus_one", "is_finite", "log", "log_plus_one",
        "logistic", "maximum", "minimum", "multiply", "negate", "not", "or", "power", "rsqrt", "select", "sign", "sine", "sqrt", "subtract", "tanh",
    )
)  # fmt: skip
_SPREAD = frozenset(["stablehlo.broadcast_in_dim", "stablehlo.constant"])


def recomputed(plan: Plan) -> Plan:
    """The plan with late elementwise values made anew, on a GPU."""
    return plan if device_kind() == "cpu" else innermost_first(plan, _region)


def _is_inside(step: Step) -> bool:
    return step.name in _VIEWS or is_elementwise(step.name)


def note_stage(step: Step, stages: dict[Value, int]) -> None:
    """How many kernels' ends lead to a step's results at least."""
    stage = max((stages.get(value, 0) for value in step.reads()), default=0) + (not _is_inside(step))
    stages.update(dict.fromkeys(step.results, stage))


def _region(region: Region) -> Region:
    if not any(step.name in _CHEAP and step.result.nbytes >= LEAST for step in region.steps):
        return region
    writer = _Writer(region)
    return writer.region() if writer.recipes else region


def _readers(region: Region) -> dict[Value, list[Step]]:
    found: dict[Value, list[Step]] = {}
    for step in region.steps:
        for value in step.reads():
            found.setdefault(value, []).append(step)
    return found


class _Writer:
    """One region's new steps. recipes: a value that is not kept -> the steps that make it, in order, of values that are."""

    def __init__(self, old: Region) -> None:
        self.old = old
        self.made = {value: step for step in old.steps for value in step.results}
        self.stages: dict[Value, int] = {}
        self.roots: dict[Value, Value] = {}
        for step in old.steps:
            self._place(step)
        fixed, loose = self._kept()
        self.kept = fixed | loose
        self.recipes: dict[Value, tuple[Step, ...]] = {}
        worth = [s.results[0] for s in old.steps if s.name in _CHEAP and s.results[0] in loose and s.results[0].type.nbytes >= LEAST]
        self.readers = _readers(old) if worth else {}
        for value in worth:
            if recipe := self._recipe(value):
                self.recipes[value] = recipe
                self.kept.discard(value)

    def _place(self, step: Step) -> None:
        """How many kernels' ends lead to a step at least, and the last value on the longest way there that is not inside of a kernel."""
        latest = max(step.reads(), key=lambda value: self.stages.get(value, 0), default=None)
        note_stage(step, self.stages)
        inside = _is_inside(step)
        for value in step.results:
            self.roots[value] = self.roots.get(latest, latest) if inside and latest is not None else value

    def _is_late(self, value: Value, reader: Step) -> bool:
        return self.stages[reader.results[0]] - self.stages.get(value, 0) >= LATE if reader.results else False

    def _kept(self) -> tuple[set[Value], set[Value]]:
        """What is in memory for late steps whatever happens, and what only the insides of kernels read late. (What nothing else reads is computed late.)"""
        fixed, loose = set(self.old.results), set[Value]()
        for step in reversed(self.old.steps):
            latest = self.stages[step.results[0]] - LATE if step.results else -1
            view = step.name in _VIEWS and step.results[0] in fixed
            for value in step.reads():
                if view or value not in self.made:
                    fixed.add(value)
                elif self.stages[value] <= latest:
                    (loose if is_elementwise(step.name) else fixed).add(value)
        return fixed, loose - fixed

    def _recipe(self, value: Value) -> tuple[Step, ...]:
        """The steps from kept values to this; none if there are no such, or too many."""
        found: dict[Step, None] = {}
        waiting = [(value, False)]
        while waiting:
            current, ready = waiting.pop()
            step = self.made.get(current)
            if ready:
                assert step is not None
                found.setdefault(step)
                continue
            spread = step is not None and step.name in _SPREAD
            if current is not value and ((current in self.kept and not spread) or current.type.nbytes * _FREE <= value.type.nbytes):
                continue
            if step is None or step in found:
                if step is None:
                    return ()
                continue
            if (step.name not in _CHEAP and not spread) or len(found) + len(waiting) > 4 * _MOST:
                return ()
            waiting.append((current, True))
            waiting += [(v, False) for v in step.operands]
        return tuple(found) if sum(step.name in _CHEAP for step in found) <= _MOST and self._frees(value, found) else ()

    def _frees(self, value: Value, recipe: Mapping[Step, None]) -> bool:
        """Whether some of what the recipe makes is in memory now: what only late steps read is computed late as it is."""
        return any(
            reader not in recipe and not (made is value and self._is_late(made, reader))
            for step in recipe
            if step.name in _CHEAP
            for made in step.results
            for reader in self.readers[made]
        )

    def region(self) -> Region:
        steps: list[Step] = []
        anew: dict[tuple[Value, Value], Value] = {}
        for step in self.old.steps:
            late = [v for v in step.operands if v in self.recipes and self._is_late(v, step)]
            if late:
                root = self.roots[step.results[0]]
                for value in late:
                    self._make(value, root, anew, steps)
                step = replace(step, operands=tuple(anew[v, root] if v in self.recipes and self._is_late(v, step) else v for v in step.operands))
            steps.append(step)
        return Region(self.old.arguments, tuple(live_steps(Region(self.old.arguments, tuple(steps), self.old.results))), self.old.results)

    def _make(self, value: Value, root: Value, anew: dict[tuple[Value, Value], Value], steps: list[Step]) -> None:
        """The steps that make a value anew, after `root`."""
        for step in self.recipes[value]:
            if (step.results[0], root) in anew:
                continue
            operands = tuple(self._leaf(v, step, root, anew, steps) for v in step.operands)
            result = Value(step.results[0].type)
            anew[step.results[0], root] = result
            steps.append(replace(step, operands=operands, results=(result,)))

    def _leaf(self, value: Value, reader: Step, root: Value, anew: dict[tuple[Value, Value], Value], steps: list[Step]) -> Value:
        """A kept value behind a barrier, without which MLX would find that both computations are the same one."""
        if (value, root) not in anew:
            if value.type.nbytes * _FREE <= reader.result.nbytes:
                return value
            both = (Value(value.type), Value(root.type))
            steps.append(Step("stablehlo.optimization_barrier", (value, root), both, location=reader.location, text=()))
            anew[value, root] = both[0]
        return anew[value, root]
