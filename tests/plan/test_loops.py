"""Counters, trip counts, unrolling, fusing: on plans alone."""

from __future__ import annotations

import numpy as np
import pytest

from jax_mps.plan import build, loops
from jax_mps.plan.trips import Counter
from jax_mps.plan.types import Plan, Region, Step, TensorType, Value

LOOP = """module @m {{ func.func public @main(%x: tensor<4xf32>, %lo: tensor<{t}>, %hi: tensor<{t}>) -> tensor<4xf32> {{
%start = stablehlo.constant dense<{start}> : tensor<{t}>
%bound = stablehlo.constant dense<{bound}> : tensor<{t}>
%step = stablehlo.constant dense<{step}> : tensor<{t}>
%r:3 = stablehlo.while(%i = {i}, %h = %hi, %y = %x) : tensor<{t}>, tensor<{t}>, tensor<4xf32>
cond {{ %p = stablehlo.compare {compare} : (tensor<{t}>, tensor<{t}>) -> tensor<i1> stablehlo.return %p : tensor<i1> }}
do {{ %j = stablehlo.{op} {operands} : tensor<{t}>
  %z = stablehlo.sine %y : tensor<4xf32> stablehlo.return %j, {h}, %z : tensor<{t}>, tensor<{t}>, tensor<4xf32> }}
return %r#2 : tensor<4xf32> }} }}"""

DEFAULTS = {"t": "i32", "start": 0, "bound": 10, "step": 1, "i": "%start", "compare": "LT, %i, %bound", "op": "add", "operands": "%i, %step", "h": "%h"}


def plan_of(**changes: object) -> Plan:
    return build.build(build.parse(LOOP.format(**{**DEFAULTS, **changes}).encode()))


def counter_of(plan: Plan) -> Counter | None:
    loop = plan.steps[-1]
    constants = {s.results[0]: s.value for s in plan.steps if s.name == "stablehlo.constant"}
    return loops.find_counter(*loop.regions, constants)


@pytest.mark.parametrize(
    ("changes", "trips"),
    [
        ({}, 10),
        ({"step": 3}, 4),
        ({"start": 10}, 0),
        ({"start": 11}, 0),
        ({"compare": "LE, %i, %bound"}, 11),
        ({"compare": "GT, %bound, %i"}, 10),
        ({"start": 10, "bound": 0, "step": -1, "compare": "GT, %i, %bound"}, 10),
        ({"start": 10, "bound": 0, "step": 3, "op": "subtract", "compare": "GT, %i, %bound"}, 4),
        ({"start": 10, "bound": 0, "step": -3, "compare": "GE, %i, %bound"}, 4),
        ({"start": 0, "bound": 0, "step": -3, "compare": "GE, %i, %bound"}, 1),
        ({"operands": "%step, %i"}, 10),
        ({"t": "ui8", "bound": 200}, 200),
    ],
    ids=str,
)
def test_trip_counts(changes: dict[str, object], trips: int) -> None:
    """Against counting in Python."""
    plan = plan_of(**changes)
    counter = counter_of(plan)
    assert counter is not None
    assert counter.bound is not None
    start = int(plan.steps[0].value)
    holds = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__}[counter.direction]
    i = counted = 0
    i = start
    while holds(i, counter.bound):
        i, counted = i + counter.step, counted + 1
    assert counter.trips(start, counter.bound) == counted == trips


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 0},
        {"step": -1},
        {"op": "multiply"},
        {"compare": "NE, %i, %bound"},
        {"compare": "LT, %bound, %i"},
        {"op": "subtract", "operands": "%step, %i"},
        {"compare": "LT, %i, %h", "h": "%j"},
    ],
    ids=str,
)
def test_what_is_no_counter(changes: dict[str, object]) -> None:
    """The near misses: these loops are run by their predicate."""
    assert counter_of(plan_of(**changes)) is None


def test_a_bound_that_is_carried_or_captured() -> None:
    carried = counter_of(plan_of(compare="LT, %i, %h"))
    assert carried is not None
    assert carried.bound_carry == 1
    plan = plan_of(compare="LT, %i, %lo")
    captured = counter_of(plan)
    assert captured is not None
    assert captured.bound_capture is plan.arguments[1]


def test_a_counter_that_wraps_is_not_trusted() -> None:
    """An int8 that would pass 127 before its bound: the trip count is not computed."""
    counter = Counter(0, 7, "LT", 127)
    assert not loops.in_range(counter, 0, 127, TensorType((), "int8"))
    assert loops.in_range(counter, 0, 127, TensorType((), "int32"))


def names(plan: Plan, fits: bool = True) -> list[str]:
    body = loops.unroll_short(plan.body, {}, lambda step: fits)
    return [s.name.removeprefix("stablehlo.") for s in body.steps]


def test_short_loops_are_unrolled() -> None:
    assert names(plan_of()).count("sine") == 10
    assert "while" not in names(plan_of())


def test_long_loops_and_those_that_do_not_fit_are_not() -> None:
    assert "while" in names(plan_of(bound=100_000))
    assert "while" in names(plan_of(), fits=False)
    assert "while" in names(plan_of(i="%lo"))


def test_unrolling_makes_the_counter_constant() -> None:
    body = loops.unroll_short(plan_of(start=3, bound=6).body, {}, lambda step: True)
    values = [int(s.value) for s in body.steps if s.name == "stablehlo.constant" and s.value.dtype == np.int32]
    assert {3, 4, 5} <= set(values)


def test_fused_returns_carry_and_predicate() -> None:
    loop = plan_of().steps[-1]
    region = loops.fused(*loop.regions)
    assert len(region.results) == 4
    assert region.results[-1].dtype == "bool"
    defined = set(region.arguments)
    for step in region.steps:
        assert isinstance(step, Step)
        defined.update(step.results)
    assert set(region.results) <= defined


def test_repeated_runs_the_body_in_a_chain() -> None:
    loop = plan_of().steps[-1]
    region = loops.repeated(loop.regions[1], 3)
    sines = [s for s in region.steps if s.name == "stablehlo.sine"]
    assert len(sines) == 3
    assert sines[2].operands == sines[1].results


def test_what_runs_ahead_returns_what_tells_of_the_end() -> None:
    body = plan_of().steps[-1].regions[1]
    told = Region(body.arguments, body.steps, (*body.results, body.results[2]))
    region = loops.foretold(told, 3)
    assert len(region.results) == len(body.arguments) + 3
    assert region.results[2] is region.results[-1]
    assert sum(s.name == "stablehlo.sine" for s in region.steps) == 3


def test_how_far_ahead() -> None:
    """Short bodies of little work alone: a long iteration for nothing costs more than to wait for the one before."""
    body = plan_of().steps[-1].regions[1]
    assert loops.foretold_length(body) == loops.FORETOLD_LENGTH
    assert loops.foretold_length(loops.repeated(body, 40)) == loops.FORETOLD_STEPS // 80
    large = Region((*body.arguments, Value(TensorType((1 << 17,), "float32"))), body.steps, body.results)
    assert loops.foretold_length(large) == 1


@pytest.mark.parametrize(("left", "right", "elements", "fast"), [((4, 8), (8, 16), 512, 128), ((1, 512), (512, 64), 512 * 64, 512 * 64)])
def test_what_a_product_costs(left, right, elements, fast) -> None:
    """What it multiplies, or where that is fast, what it reads or writes."""
    a, b, y = (Value(TensorType(shape, "float32")) for shape in (left, right, (left[0], right[1])))
    step = Step("stablehlo.dot_general", (a, b), (y,))
    assert (loops.cost([step]), loops.cost([step], 256)) == (elements, fast)
