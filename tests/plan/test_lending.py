"""Which loops go to the host only because XLA runs them far faster there, and which never do."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mps.plan import build
from jax_mps.plan.boundary import COSTS
from jax_mps.plan.partition import Draft, Target, partition
from jax_mps.plan.types import Step
from tests.device.programs import run


def host_kind(step: Step) -> str | None:
    inner = [step, *(s for region in step.regions for s in region.walk())]
    return None if any(s.name == "stablehlo.infeed" for s in inner) else "xla"


def loop(trips: str = "10000", size: int = 4, *, condition: str = "", step: str = "%g = stablehlo.sine %h : MAT", **choices: object) -> Draft:
    """What becomes of a loop over one square matrix; the bound is a number or an argument's name."""
    given = "" if trips == "%n" else f"%n = stablehlo.constant dense<{trips}> : tensor<i32>"
    text = f"""module @m {{ func.func public @main(%a: MAT{", %n: tensor<i32>" if trips == "%n" else ""}) -> MAT {{
      {given} %zero = stablehlo.constant dense<0> : tensor<i32>
      %r:2 = stablehlo.while(%i = %zero, %h = %a) : tensor<i32>, MAT
      cond {{ {condition or "%p = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>"} stablehlo.return %p : tensor<i1> }}
      do {{ %one = stablehlo.constant dense<1> : tensor<i32> %j = stablehlo.add %i, %one : tensor<i32> {step}
        stablehlo.return %j, %g : tensor<i32>, MAT }}
      return %r#1 : MAT }} }}""".replace("MAT", f"tensor<{size}x{size}xf32>")
    target = Target(lambda step: None, host_kind, **{"lend_loops": True, "costs": COSTS["cpu"], **choices})  # type: ignore[arg-type]
    return next(node for node in partition(build.build(build.parse(text.encode())), target).nodes if node.kind != "device")


BY_VALUE = """%z = stablehlo.constant dense<0.0> : tensor<f32> %s = stablehlo.reduce(%h init: %z) applies stablehlo.add across dimensions = [0, 1] :
  (MAT, tensor<f32>) -> tensor<f32> %p = stablehlo.compare GT, %s, %z : (tensor<f32>, tensor<f32>) -> tensor<i1>"""


@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_a_long_loop_of_tiny_steps_is_lent(device: str) -> None:
    node = loop(costs=COSTS[device])
    assert node.kind == "host"
    assert node.reasons == ("stablehlo.while: so many tiny steps take XLA a tenth of the time",)


NEAR: dict[str, tuple[tuple[str, int], dict[str, object]]] = {
    "few iterations": (("100", 4), {}),
    "large steps": (("10000", 512), {}),
    "products, large": (("10000", 512), {"step": "%g = stablehlo.dot_general %h, %h, contracting_dims = [1] x [0] : (MAT, MAT) -> MAT"}),
    "not wanted": (("10000", 4), {"lend_loops": False}),
    "what the host cannot run": (
        ("10000", 4),
        {"step": '%g = "stablehlo.sine"(%h) : (MAT) -> MAT %t = stablehlo.create_token : !stablehlo.token '
                 '%q:2 = "stablehlo.infeed"(%t) : (!stablehlo.token) -> (tensor<i32>, !stablehlo.token)'},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_which_loops_stay(name: str) -> None:
    (trips, size), choices = NEAR[name]
    node = loop(trips, size, **choices)  # type: ignore[arg-type]
    assert node.kind != "host"
    assert node.rest is None


@pytest.mark.parametrize(("trips", "condition"), [("%n", ""), ("0", BY_VALUE)], ids=["a bound that is given", "a condition on values"])
def test_a_loop_of_unknown_length_is_lent_later(trips: str, condition: str) -> None:
    node = loop(trips, condition=condition)
    assert node.kind in ("loop", "until")
    assert node.rest is not None
    assert 100 < node.patience < 1000
    assert node.rest.reasons == (f"stablehlo.while: so many tiny steps take XLA a tenth of the time, after {node.patience} iterations",)
    assert loop(trips, 512, condition=condition).rest is None
    assert loop(trips, condition=condition, lend_loops=False).rest is None


ROW = """%row = stablehlo.constant dense<1.0> : tensor<1x1xf32>
  %g = stablehlo.dynamic_update_slice %h, %row, %i, %i : (MAT, tensor<1x1xf32>, tensor<i32>, tensor<i32>) -> MAT"""
CHOICE = """%g = "stablehlo.case"(%i) ({{ %s = stablehlo.negate %h : MAT stablehlo.return %s : MAT }}, {{
  %t = {} stablehlo.return %t : MAT }}) : (tensor<i32>) -> MAT"""


def test_what_is_written_in_place_counts_by_what_is_written() -> None:
    assert loop("%n", 256, step=ROW).rest is not None
    assert loop("%n", 256).rest is None


def test_a_choice_counts_by_its_shorter_branch_unless_the_longer_one_takes_longer_than_the_device() -> None:
    longer = "stablehlo.sine %h : MAT"
    assert loop("%n", 24, step=CHOICE.format(longer)).rest is not None
    assert loop("%n", 96, step=CHOICE.format(longer)).rest is None


def test_however_long_a_loop_is_that_is_counted_it_is_lent_from_the_beginning() -> None:
    """It can be interrupted there (test_interrupts.py)."""
    assert loop("2000000000").kind == "host"


PROGRAM = """
    import jax_mps
    x, n = np.arange(6, dtype=np.float32), np.int32(1500)
    programs = {
        "counted": lambda: lax.fori_loop(0, n + jnp.int32(x.sum()), lambda i, c: c * 0.999 + i.astype(c.dtype), x),
        "scan": lambda: lax.scan(lambda c, _: (jnp.sin(c) + x, c.sum()), x, length=2000),
        "until": lambda: lax.while_loop(lambda c: c[0].sum() < 1e5, lambda c: (c[0] + x, c[1] + 1), (x, 0)),
    }
    got, calls = [], []
    for program in programs.values():
        got += [np.asarray(v).tolist() for v in jax.tree.leaves(jax.jit(program)())]
        calls.append(jax_mps.stats()["host_calls"] - sum(calls))
    shown = jax_mps.explain(jax.jit(programs["until"]).lower().compile())
    report(got=got, calls=calls, shown=shown)
"""


def test_the_three_ways_of_saying_where(tmp_path: Path) -> None:
    """The same numbers with the host allowed, needed or refused, and from disk; it is called only where it is allowed."""
    allowed, again, needed, refused = (
        run(PROGRAM, tmp_path, **environment) for environment in ({}, {"NO_TRANSLATION": "nor MLIR"}, {"JAX_MPS_HOST": "needed"}, {"JAX_MPS_HOST": "error"})
    )
    assert all(allowed.report["calls"])
    assert " iterations, the rest on the host" in allowed.report["shown"]
    assert "host" not in needed.report["shown"].replace("on the host, 2", "")  # its condition is answered there
    assert again.report == {**allowed.report, "stats": again.report["stats"]}
    assert needed.report["calls"] == refused.report["calls"] == [0, 0, 0]
    assert needed.report["got"] == refused.report["got"]
    for ours, theirs in zip(allowed.report["got"], needed.report["got"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
