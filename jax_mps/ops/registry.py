"""Where lowerings are registered: one function from a `Step` to a function of `mx.array`s for each op name.

A lowering decodes and checks (`Unsupported` if the device cannot do it), then returns `run`, which builds MLX's graph. It runs when a
program is cut into segments and exported, never per call. Regions arrive lowered, in the op's order, as functions of arrays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from jax_mps.errors import Unsupported
from jax_mps.plan.types import Region, Step, Value

Run = Callable[..., Any]  # arrays in, one array or a sequence of arrays out
Lowering = Callable[..., Run]  # (step, *lowered regions) -> Run

_lowerings: dict[str, Lowering] = {}
_elementwise: set[str] = set()
_scope = threading.local()  # its `definitions`: what the lowerer at work on this thread was told of


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Register a lowering under one or more op names ("stablehlo.pad", "chlo.top_k" for a composite, "custom_call:Sharding")."""

    def register(lowering: Lowering) -> Lowering:
        for name in names:
            if name in _lowerings:
                raise ValueError(f"two lowerings for {name}")
            _lowerings[name] = lowering
        return lowering

    return register


def elementwise(rows: Mapping[str, Callable[..., mx.array]]) -> None:
    """Register ops whose meaning is one function applied to corresponding elements, whatever the shapes (they may broadcast)."""
    for name, function in rows.items():
        _elementwise.add(name)
        lowers(name)(lambda op, function=function: function)


def is_elementwise(name: str) -> bool:
    """Whether the op was registered as elementwise (a region made of such ops can be applied to whole arrays)."""
    return name in _elementwise


def mark_elementwise(*names: str) -> None:
    """Declare ops with a lowering of their own to be elementwise: `run` works on broadcastable shapes other than the step's."""
    _elementwise.update(names)


def has_lowering(key: str) -> bool:
    """Whether a lowering is registered under the step's key."""
    return key in _lowerings


class LoweredStep:
    """A step with its `run`; call it with the environment of values."""

    __slots__ = ("regions", "run", "step")

    def __init__(self, step: Step) -> None:
        lowering = _lowerings.get(step.key)
        if lowering is None:
            raise Unsupported(step, "no lowering to MLX")
        self.step = step
        self.regions = tuple(LoweredRegion(region) for region in step.regions)
        self.run = lowering(step, *self.regions)

    def __call__(self, env: dict[Value, mx.array]) -> None:
        """Compute the step's results from `env` into `env`."""
        for region in self.regions:
            region.env = env
        outputs = self.run(*[env[v] for v in self.step.operands])
        results = self.step.results
        if not isinstance(outputs, (list, tuple)):
            outputs = (outputs,)
        if len(outputs) != len(results):
            raise AssertionError(f"lowering of {self.step.key} gave {len(outputs)} results for {len(results)}")
        env.update(zip(results, outputs, strict=True))


class LoweredRegion:
    """A region as a function of arrays: call it with one array for each block argument, get a tuple of results.

    `region` is the plan's region, for lowerings that recognise a body; captured values come from the scope that the step runs in.
    """

    __slots__ = ("env", "region", "steps")

    def __init__(self, region: Region) -> None:
        self.region = region
        self.steps = [LoweredStep(step) for step in region.steps]
        self.env: dict[Value, mx.array] = {}

    def __call__(self, *arguments: mx.array) -> tuple[mx.array, ...]:
        env = dict(self.env)
        env.update(zip(self.region.arguments, arguments, strict=True))
        for step in self.steps:
            step(env)
        return tuple(env[v] for v in self.region.results)

    @property
    def is_elementwise(self) -> bool:
        """Whether the body may be applied to whole arrays at once: elementwise ops, scalar constants, scalar captures."""
        return all(is_elementwise(s.step.name) or (s.step.name == "stablehlo.constant" and s.step.result.rank == 0) for s in self.steps)


class Lowerer:
    """Lowers the steps of one program, each once; lowerings can ask for the steps that it was told of."""

    __slots__ = ("_definitions", "_lowered")

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        self._definitions: dict[Value, Step] = {}
        self._lowered: dict[Step, LoweredStep | Unsupported] = {}
        self.define(steps)

    def define(self, steps: Iterable[Step]) -> None:
        """Make the steps of a straight line known, before any of them is lowered."""
        self._definitions.update((v, step) for step in steps for v in step.results)

    def lower(self, step: Step) -> LoweredStep:
        """The step as a function.

        Raises:
            Unsupported: the device cannot run it.
        """
        found = self._find(step)
        if isinstance(found, Unsupported):
            raise found
        return found

    def refusal(self, step: Step) -> str | None:
        """Why the device cannot run a step; None if it can. (Its lowering decodes and checks; nothing is traced.)"""
        found = self._find(step)
        if not isinstance(found, Unsupported):
            return None
        return found.fact if found.op is step else f"{found.op.key} in its body: {found.fact}"

    def _find(self, step: Step) -> LoweredStep | Unsupported:
        found = self._lowered.get(step)
        if found is None:
            _scope.definitions = self._definitions
            try:
                found = LoweredStep(step)
            except Unsupported as error:
                found = error.with_traceback(None)  # which would hold this frame
            finally:
                _scope.definitions = {}
            if all(v in self._definitions for v in step.results):  # else more may be known later
                self._lowered[step] = found
        return found


def lower_steps(steps: Sequence[Step]) -> list[LoweredStep]:
    """Lower a straight line of steps; raises `Unsupported` for the first that the device cannot run."""
    lowerer = Lowerer(steps)
    return [lowerer.lower(step) for step in steps]


def defining_step(value: Value) -> Step | None:
    """The step that computes an operand, if the lowerer was told of it: for lowerings with a shorter way, never a must."""
    definitions: dict[Value, Step] = getattr(_scope, "definitions", {})
    return definitions.get(value)
