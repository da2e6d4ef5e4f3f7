"""Elementwise steps that are too deep for one of MLX's fused kernels, as one kernel of our own; on CUDA.

`mx.compile` (0.32) makes one kernel of eleven steps that read each other, and starts another one before these, which writes its result to memory: a
gelu's gradient is three kernels. Ours (ops/row_kernels.py) holds as many steps as there are. Large arrays alone: of small
ones, the start of a kernel is what they cost.

An island is a step of full size and what leads to it: steps that only the island reads, and those that others read after it, which are written too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jax_mps.errors import Unsupported
from jax_mps.ops import cuda_text, row_kernels
from jax_mps.ops.registry import is_elementwise
from jax_mps.ops.target import device_kind
from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Plan, Region, Step, Value
from jax_mps.rewrites.regions import innermost_first

DEEPEST = 11  # steps that MLX fuses in any case
LEAST = 1 << 20  # elements
_FEWEST_ROWS, _FEWEST_COLUMNS = 128, 32
_MOST_STEPS, _MOST_ARRAYS, _MOST_OUTPUTS = 64, 8, 3
_SMALLER = 16  # what is so many times smaller is read where it is needed

_SPREAD = frozenset(["stablehlo.broadcast_in_dim", "stablehlo.constant"])


def deep_kernels(plan: Plan) -> Plan:
    """The plan with kernels for what MLX would cut."""
    return innermost_first(plan, _region) if device_kind() == "cuda" else plan


def _region(region: Region) -> Region:
    groups = _Finder(region).groups() if any(_is_inside(step) for step in region.steps) else []
    if not groups:
        return region
    last = {group.results[-1]: group for group in groups}
    made = {value for group in groups for value in group.results} - set(last)
    steps = [last.get(step.results[0], step) if step.results else step for step in region.steps if not (step.results and step.results[0] in made)]
    done = Region(region.arguments, tuple(steps), region.results)
    return Region(done.arguments, tuple(live_steps(done)), done.results)


def _is_inside(step: Step) -> bool:
    """Whether a kernel may compute the step: elementwise, large, and in rows."""
    if not is_elementwise(step.name) or len(step.results) != 1 or not step.result.rank or step.result.size < LEAST:
        return False
    shape = step.result.shape
    enough = shape[-1] >= _FEWEST_COLUMNS and math.prod(shape[:-1]) >= _FEWEST_ROWS
    return enough and cuda_text.expression(step, ["a"] * len(step.operands)) is not None


class _Finder:
    """Islands of one region. depth: of the steps inside, how far the longest way back inside leads."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.made = {value: step for step in region.steps for value in step.results}
        self.place = {step: i for i, step in enumerate(region.steps)}
        self.readers: dict[Value, list[Step]] = {}
        self.depth: dict[Step, int] = {}
        for step in region.steps:
            for value in step.reads():
                self.readers.setdefault(value, []).append(step)
            if _is_inside(step):
                before = [self.made.get(v) for v in step.operands]
                self.depth[step] = 1 + max((self.depth.get(s, 0) for s in before if s is not None), default=0)
        self.results = frozenset(region.results)
        self.taken: set[Step] = set()

    def groups(self) -> list[Step]:
        """From the last step to the first: a step that others of an island read belongs to that."""
        found = []
        for step in reversed(self.region.steps):
            if self.depth.get(step, 0) > DEEPEST and step not in self.taken:
                island, outputs = self._island(step)
                if self._depth_of(island) > DEEPEST and (group := self._group(island, outputs)) is not None:
                    found.append(group)
                    self.taken |= island.keys()
        return found

    def _island(self, root: Step) -> tuple[Mapping[Step, None], list[Value]]:
        """The steps that lead to one, itself first, and which of their results are read elsewhere."""
        island, outputs = {root: None}, [root.results[0]]
        candidates = sorted({s for v in root.operands if (s := self.made.get(v)) in self.depth and s is not None}, key=self.place.__getitem__)
        while candidates:  # the latest first: all of its readers inside are known by then
            step = candidates.pop()
            outside = [reader for reader in self.readers[step.results[0]] if reader not in island]
            written = bool(outside) or step.results[0] in self.results
            early = any(self.place[reader] < self.place[root] for reader in outside)
            same = step.result.size == root.result.size and step.result.shape[-1] == root.result.shape[-1] and step not in self.taken
            if not same or early or len(island) >= _MOST_STEPS or (written and len(outputs) == _MOST_OUTPUTS):
                continue
            island[step] = None
            if written:
                outputs.append(step.results[0])
            more = {s for v in step.operands if (s := self.made.get(v)) is not None and s in self.depth and s not in island}
            candidates = sorted(more.union(candidates), key=self.place.__getitem__)
        return island, outputs[::-1]

    def _depth_of(self, island: Mapping[Step, None]) -> int:
        depth: dict[Step, int] = {}
        for step in sorted(island, key=self.place.__getitem__):
            before = [s for v in step.operands if (s := self.made.get(v)) is not None]
            depth[step] = 1 + max((depth.get(s, 0) for s in before), default=0)
        return max(depth.values())

    def _group(self, island: Mapping[Step, None], outputs: Sequence[Value]) -> Step | None:
        """The step for an island; None if it has too many arrays, or its kernel cannot be written."""
        steps: dict[Step, None] = {}
        operands: dict[Value, None] = {}
        for step in sorted(island, key=self.place.__getitem__):
            for value in step.operands:
                self._read(value, island, steps, operands)
            steps[step] = None
        root = self.made[outputs[-1]]
        shape = root.result.shape
        rows, columns = math.prod(shape[:-1]), shape[-1]
        original = Region(tuple(operands), tuple(steps), tuple(outputs))
        if len(operands) + len(outputs) > _MOST_ARRAYS:
            return None
        try:
            row_kernels.kernel_of(original, rows, columns)
        except Unsupported:
            return None
        given = {"rows": rows, "columns": columns, "original": original}
        return Step("jax_mps.row_kernel", tuple(operands), tuple(outputs), given, location=root.location, text=())

    def _read(self, value: Value, island: Mapping[Step, None], steps: dict[Step, None], operands: dict[Value, None]) -> None:
        """A broadcast of something small, or a constant, is part of the kernel; what else comes from outside is an operand."""
        maker = self.made.get(value)
        if maker is None or maker in island:
            if maker is None:
                operands[value] = None
        elif maker.name in _SPREAD and all(v.type.size * _SMALLER <= value.type.size for v in maker.operands):
            for v in maker.operands:
                self._read(v, island, steps, operands)
            steps[maker] = None
        elif maker.name == "stablehlo.constant":
            steps[maker] = None
        else:
            operands[value] = None
