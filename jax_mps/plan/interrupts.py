"""Loops of a host region that may run for long look, now and then, whether somebody wants to end them.

XLA runs a region as one call, which nothing ends from outside: so a custom call of ours is in such loops (cshim/calls.c), which fails once
there was an interrupt, and the run with it. It takes about 80 ns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from jax_mps.host.xla import INTERRUPTS, LOOK
from jax_mps.plan import loops
from jax_mps.plan.boundary import COSTS, Judge
from jax_mps.plan.types import Region, Step, TensorType, Value

# Microseconds, by an estimate: a loop that takes no more is left as it is; one that takes more looks after so many.
SHORT, BETWEEN = 100_000, 10_000
# Iterations between two looks, at most: XLA takes 35 ns for one of a tiny loop.
MOST = 1024

_CONTROL = frozenset(["stablehlo.while", "stablehlo.case", "stablehlo.if"])
_TRUTH, _COUNT = TensorType((), "bool"), TensorType((), "int32")
_CALL = (("call_target_name", f'"{LOOK}"'), ("has_side_effect", "true"), ("api_version", "4 : i32"), ("backend_config", "{}"))


def watched(steps: Sequence[Step]) -> tuple[tuple[Step, ...], Value | None]:
    """The steps, which fail when there are more interrupts than the value says that they need then as an input; None where no loop may run
    for long.
    """
    watch = _Watch(steps)
    found = watch.steps(steps)
    return found, None if found == tuple(steps) else watch.seen


class _Watch:
    """Rewrites steps that are given `seen`."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.seen = Value(INTERRUPTS)
        constants = {s.results[0]: s.value for s in Region((), tuple(steps), ()).walk() if s.name == "stablehlo.constant"}

        def trips(loop: Step) -> int | None:
            counted = loops.static_trips(loop, constants)
            return counted.trips if counted else None

        self.judge = Judge(COSTS["cpu"], lambda step: True, trips)

    def steps(self, steps: Iterable[Step], *, inside: bool = False) -> tuple[Step, ...]:
        """What becomes of the steps, in the body of a loop that may run for long or outside of any."""
        return tuple(found for s in steps for found in self.step(s, inside))

    def step(self, step: Step, inside: bool) -> tuple[Step, ...]:
        if step.name not in _CONTROL:
            return (step,)
        work = self.judge.bound([step])
        if work is not None and work <= SHORT:
            return (step,)
        loop = step.name == "stablehlo.while"
        inner = replace(step, regions=tuple(replace(r, steps=self.steps(r.steps, inside=inside or loop)) for r in step.regions))
        if not loop:
            return (inner,)
        each = self.judge.bound([s for r in step.regions for s in r.steps])
        between = 1 if each is None else min(MOST, BETWEEN // max(1, each))
        return self.in_slices(inner, between, first=inside) if between > 1 else (self.looking(inner),)

    def looking(self, loop: Step) -> Step:
        """The loop, which looks in each iteration."""
        cond, body = loop.regions
        return replace(loop, regions=(cond, replace(body, steps=(self.look(), *body.steps))))

    def in_slices(self, loop: Step, between: int, *, first: bool) -> tuple[Step, ...]:
        """Steps that run the loop for so many iterations at most, and again for as long as they are as many. With `first`, the first time by
        itself: what is entered often and ends soon takes 40 ns more so, and some 200 otherwise.
        """
        zero, one, most = (loops.constant_step(np.asarray(n, np.int32), "int32") for n in (0, 1, between))
        cond, body = loop.regions
        count = Value(_COUNT)
        early = _step("compare", (count, *most.results), _TRUTH, "LT")
        both = _step("and", (*cond.results, *early.results), _TRUTH)
        tested = Region((*cond.arguments, count), (*cond.steps, early, both), both.results)
        counted = _step("add", (count, *one.results), _COUNT)
        run = Region((*body.arguments, count), (*body.steps, counted), (*body.results, *counted.results))

        def carried(last: TensorType) -> tuple[Value, ...]:
            return (*(Value(v.type) for v in loop.operands), Value(last))

        def slice_of(carry: Sequence[Value]) -> tuple[Step, Step]:
            ran = replace(loop, operands=(*carry, *zero.results), results=carried(_COUNT), regions=(tested, run))
            return ran, _step("compare", (ran.results[-1], *most.results), _TRUTH, "EQ")

        arguments = carried(_TRUTH)
        ran, full = slice_of(arguments[:-1])
        again = Region(arguments, (self.look(), ran, full), (*ran.results[:-1], *full.results))
        before = slice_of(loop.operands) if first else (loops.constant_step(np.asarray(True), "bool"),)
        start = (*(before[0].results[:-1] if first else loop.operands), *before[-1].results)
        arguments = carried(_TRUTH)
        outer = replace(loop, operands=start, results=(*loop.results, Value(_TRUTH)), regions=(Region(arguments, (), arguments[-1:]), again))
        return zero, one, most, *before, outer

    def look(self) -> Step:
        return Step("stablehlo.custom_call", (self.seen,), (), {"call_target_name": LOOK, "has_side_effect": True}, text=_CALL)


def _step(name: str, operands: Sequence[Value], result: TensorType, direction: str = "") -> Step:
    text = (("comparison_direction", f"#stablehlo<comparison_direction {direction}>"), ("compare_type", "#stablehlo<comparison_type SIGNED>"))
    return Step(f"stablehlo.{name}", tuple(operands), (Value(result),), text=text if direction else ())
