"""What leaves a counted loop's body, and conditions that the host answers: on plans alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jax_mps.plan import build, conditions, scans
from jax_mps.plan.partition import live_steps
from jax_mps.plan.scans import Row, Scan
from jax_mps.plan.types import Region, Step, TensorType, Value

MODULE = """module @m {{ func.func public @main(%xs: tensor<9x4xf32>, %ys: tensor<9x4xf32>) -> tensor<9x4xf32> {{
%start = stablehlo.constant dense<{start}> : tensor<i32>
%one = stablehlo.constant dense<1> : tensor<i32>
%zero = stablehlo.constant dense<0> : tensor<i32>
%last = stablehlo.constant dense<8> : tensor<i32>
%nine = stablehlo.constant dense<9> : tensor<i32>
%r:2 = stablehlo.while(%i = %start, %y = %ys) : tensor<i32>, tensor<9x4xf32>
cond {{ %p = stablehlo.compare LT, %i, %nine : (tensor<i32>, tensor<i32>) -> tensor<i1> stablehlo.return %p : tensor<i1> }}
do {{ {index}
  %x = stablehlo.dynamic_slice %xs, %k, %zero, sizes = [1, 4] : (tensor<9x4xf32>, tensor<i32>, tensor<i32>) -> tensor<1x4xf32>
  %u = stablehlo.sine %x : tensor<1x4xf32>
  %w = stablehlo.dynamic_update_slice %y, %u, %i, %zero : (tensor<9x4xf32>, tensor<1x4xf32>, tensor<i32>, tensor<i32>) -> tensor<9x4xf32>
  {rest}
  %j = stablehlo.add %i, %one : tensor<i32> stablehlo.return %j, {result} : tensor<i32>, tensor<9x4xf32> }}
return %r#1 : tensor<9x4xf32> }} }}"""

WRAPPED = """%n = stablehlo.compare LT, %i, %zero : (tensor<i32>, tensor<i32>) -> tensor<i1> %m = stablehlo.add %i, %nine : tensor<i32>
  %k = stablehlo.select %n, %m, %i : tensor<i1>, tensor<i32>"""
UP = "%k = stablehlo.add %i, %zero : tensor<i32>"
DOWN = "%k = stablehlo.subtract %last, %i : tensor<i32>"
TWICE = "%k = stablehlo.add %i, %i : tensor<i32>"
PRODUCT = "%k = stablehlo.multiply %i, %one : tensor<i32>"


def scan_of(index: str = UP, rest: str = "", result: str = "%w", start: int = 0) -> Scan | None:
    plan = build.build(build.parse(MODULE.format(index=index, rest=rest, result=result, start=start).encode()))
    loop = next(s for s in plan.steps if s.name == "stablehlo.while")
    return scans.find_scan(loop, {s.results[0]: s.value for s in plan.steps if s.name == "stablehlo.constant"}, live_steps)


@pytest.mark.parametrize(("index", "row"), [(UP, Row(0, 0, 1)), (WRAPPED, Row(0, 0, 1)), (DOWN, Row(0, 8, -1))], ids=["up", "wrapped", "down"])
def test_rows_leave_the_body(index: str, row: Row) -> None:
    """What is left is the sine, from row to row."""
    scan = scan_of(index)
    assert scan is not None
    assert [r for _, r in scan.sources] == [row]
    assert scan.stacks == ((1, Row(0, 0, 1)),)
    assert (scan.kept, scan.trips, scan.uses_counter) == ((), 9, False)
    assert [s.name for s in scan.body.steps] == ["stablehlo.sine"]


@pytest.mark.parametrize("index", [TWICE, PRODUCT], ids=["twice the counter", "not a line"])
def test_other_indices_stay(index: str) -> None:
    scan = scan_of(index)
    assert scan is not None
    assert (scan.sources, len(scan.stacks), scan.uses_counter) == ((), 1, True)


def test_a_carry_that_is_read_stays() -> None:
    scan = scan_of(rest="%v = stablehlo.add %w, %y : tensor<9x4xf32>", result="%v")
    assert scan is not None
    assert (scan.stacks, scan.kept, scan.uses_counter) == ((), (1,), True)


def test_an_index_that_is_clamped_stays() -> None:
    """From -1 on, the spec reads row 0 twice."""
    scan = scan_of(start=-1)
    assert scan is not None
    assert (scan.sources, scan.stacks) == ((), ())


def test_repeated_takes_rows_from_one_array() -> None:
    scan = scan_of(DOWN)
    assert scan is not None
    region = scan.repeated(3)
    assert [v.shape for v in region.arguments] == [(3, 4), ()]
    assert [v.shape for v in region.results] == [(3, 4)]
    assert [s.start_indices for s in region.steps if s.name == "stablehlo.slice"] == [(2, 0), (1, 0), (0, 0)]
    (joined,) = [s for s in region.steps if s.name == "stablehlo.concatenate"]
    sines = [s.results[0] for s in region.steps if s.name == "stablehlo.sine"]
    assert list(joined.operands) == sines


def test_large_rows_are_returned_one_by_one() -> None:
    """They are written where they belong at once, not copied before."""
    scan = scan_of(DOWN)
    assert scan is not None
    made = Step("stablehlo.iota", (), (Value(TensorType((1, 1 << 14), "float32")),), {"iota_dimension": 1}, text=())
    wide = replace(scan, body=Region(scan.body.arguments, (*scan.body.steps, made), (*scan.body.results[:-1], made.results[0])))
    assert [v.shape for v in wide.repeated(3).results] == [(1, 1 << 14)] * 3


def test_small_rows_count_where_a_kernel_makes_few() -> None:
    """Those of 64 KiB are returned one by one anywhere."""
    scan = scan_of(DOWN)
    assert scan is not None
    many = replace(scan, trips=90, stacks=scan.stacks * 8, body=replace(scan.body, results=scan.body.results * 8))
    assert (many.chunk_length(1000), many.chunk_length(1000, joined=True)) == (2, 15)
    large = Value(TensorType((1, 1 << 14), "float32"))
    assert replace(many, body=replace(many.body, results=(large,) * 8)).chunk_length(1000, joined=True) == 2


@pytest.mark.parametrize(("row", "span"), [(Row(0, 2, 1), (5, 7)), (Row(1, 9, -1), (5, 7))])
def test_ranges(row: Row, span: tuple[int, int]) -> None:
    assert row.range(3, 2) == span


CONDITION = """module @m {{ func.func public @main(%x: tensor<f32>, %e: tensor<f32>) -> tensor<f32> {{
%n = stablehlo.constant dense<0> : tensor<i32>
%r:2 = stablehlo.while(%v = %x, %i = %n) : tensor<f32>, tensor<i32>
cond {{ %c = stablehlo.constant dense<7> : tensor<i32> {steps} stablehlo.return %p : tensor<i1> }}
do {{ %w = stablehlo.sine %v : tensor<f32> stablehlo.return %w, %i : tensor<f32>, tensor<i32> }}
return %r#0 : tensor<f32> }} }}"""
FLOATS, INTEGERS = "(tensor<f32>, tensor<f32>) -> tensor<i1>", "(tensor<i32>, tensor<i32>) -> tensor<i1>"
BOTH = f"%a = stablehlo.compare GT, %v, %e : {FLOATS} %b = stablehlo.compare LT, %i, %c : {INTEGERS} %p = stablehlo.and %a, %b : tensor<i1>"


def loop_of(steps: str) -> Step:
    plan = build.build(build.parse(CONDITION.format(steps=steps).encode()))
    return next(s for s in plan.steps if s.name == "stablehlo.while")


def test_a_condition_on_scalars() -> None:
    loop = loop_of(BOTH)
    captures = loop.regions[0].captures()
    found = conditions.find_condition(loop.regions[0], captures, {})
    assert found is not None
    assert (found.carries(), found.captures()) == ((0, 1), (0,))
    cases = {(0.5, 3, 0.1): True, (0.5, 7, 0.1): False, (0.1, 3, 0.5): False, (float("nan"), 3, 0.0): False}
    for (v, i, e), want in cases.items():
        assert found.holds({0: v, 1: i}, {0: e}) is want


@pytest.mark.parametrize(
    "steps",
    [
        f"%a = stablehlo.add %v, %e : tensor<f32> %p = stablehlo.compare GT, %a, %e : {FLOATS}",
        f"%p = stablehlo.compare GT, %v, %e, TOTALORDER : {FLOATS}",
    ],
    ids=["arithmetic", "total order"],
)
def test_other_conditions_are_the_devices(steps: str) -> None:
    loop = loop_of(steps)
    assert conditions.find_condition(loop.regions[0], loop.regions[0].captures(), {}) is None
