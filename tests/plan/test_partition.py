"""Cutting plans: kinds, convexity, order of effects, copies of constants, refusals."""

from __future__ import annotations

import pytest

from jax_mps.errors import Unsupported
from jax_mps.plan import build
from jax_mps.plan.boundary import Costs
from jax_mps.plan.partition import DraftBlock, Target, partition
from jax_mps.plan.types import Plan, Step

HOST = {"stablehlo.cholesky"}


FREE = Costs(call=0, segment=0, wait=0, megabyte=0, iteration=0, share=1)  # boundaries that are worth no op: test_boundary.py has the others


def refusal(step: Step) -> str | None:
    return "not here" if step.name in HOST or step.name in ("stablehlo.while", "stablehlo.case", "stablehlo.custom_call") else None


def host_kind(step: Step) -> str | None:
    if step.name == "stablehlo.custom_call":
        return "callback" if step.call_target_name == "call" else None
    return "xla"


def cut(body: str, forbid: bool = False, signature: str = "(%a: tensor<4x4xf32>) -> tensor<4x4xf32>") -> tuple[Plan, DraftBlock]:
    plan = build.build(build.parse(f"module @m {{ func.func public @main{signature} {{ {body} }} }}".encode()))
    return plan, partition(plan, Target(refusal, host_kind, forbid_host=forbid, costs=FREE))


def kinds(block: DraftBlock) -> list[str]:
    return [node.kind for node in block.nodes]


T = "tensor<4x4xf32>"


def test_one_device_node() -> None:
    _, block = cut(f"%0 = stablehlo.sine %a : {T} %1 = stablehlo.add %0, %a : {T} return %1 : {T}")
    assert kinds(block) == ["device"]
    assert block.device_only


def test_dead_steps_go() -> None:
    _, block = cut(f"%0 = stablehlo.sine %a : {T} %1 = stablehlo.cosine %a : {T} return %1 : {T}")
    assert [s.name for s in block.nodes[0].steps] == ["stablehlo.cosine"]


def test_host_regions_are_maximal() -> None:
    """Two host steps that do not depend on each other share a node, whatever lies between them in the text."""
    _, block = cut(
        f"%0 = stablehlo.cholesky %a, lower = true : {T} %1 = stablehlo.sine %a : {T}"
        f" %2 = stablehlo.cholesky %1, lower = true : {T} %3 = stablehlo.add %0, %2 : {T} return %3 : {T}"
    )
    assert kinds(block) == ["device", "host", "device"]
    assert block.nodes[1].reasons == ("stablehlo.cholesky: not here",) * 2


def test_every_read_is_written_before() -> None:
    _, block = cut(
        f"%c = stablehlo.constant dense<2.0> : {T} %0 = stablehlo.cholesky %c, lower = true : {T} %1 = stablehlo.multiply %0, %c : {T}"
        f" %2 = stablehlo.cholesky %1, lower = true : {T} %3 = stablehlo.add %2, %c : {T} return %3 : {T}"
    )
    known = set(block.inputs)
    for node in block.nodes:
        assert set(node.reads) <= known
        known.update(node.writes)
    assert set(block.outputs) <= known


def test_constants_are_copied_not_passed() -> None:
    """A constant that both sides read crosses no boundary."""
    _, block = cut(
        f"%c = stablehlo.constant dense<2.0> : {T} %0 = stablehlo.cholesky %c, lower = true : {T} %1 = stablehlo.multiply %0, %c : {T} return %1 : {T}"
    )
    host, device = block.nodes
    assert host.reads == ()
    assert device.reads == host.writes


def test_a_result_that_is_an_argument_is_copied() -> None:
    plan, block = cut("return %a, %a : tensor<4x4xf32>, tensor<4x4xf32>", signature=f"(%a: {T}) -> ({T}, {T})")
    assert [s.name for s in block.nodes[0].steps] == ["jax_mps.copy"] * 2
    assert not set(block.outputs) & set(plan.arguments)


def test_effects_keep_their_order() -> None:
    call = '"stablehlo.custom_call"({0}) <{{call_target_name = "call", has_side_effect = true, backend_config = "{1}"}}> : ({2}) -> ()'
    _, block = cut(f"{call.format('%a', 'one', T)} {call.format('', 'two', '')} {call.format('%a', 'three', T)} return %a : {T}")
    order = [n.steps[0].backend_config for n in block.nodes if n.kind == "callback"]
    assert order == ["one", "two", "three"]


def test_the_host_forbidden() -> None:
    with pytest.raises(Unsupported, match=r"stablehlo.cholesky.*not here.*JAX_MPS_HOST=error.*tensor<4x4xf32>"):
        cut(f"%0 = stablehlo.cholesky %a, lower = true : {T} return %0 : {T}", forbid=True)


def test_what_nothing_runs_is_named() -> None:
    with pytest.raises(Unsupported, match="custom_call:nobody"):
        cut(f"%0 = stablehlo.custom_call @nobody(%a) : ({T}) -> {T} return %0 : {T}")


def test_a_host_dtype_goes_to_the_host() -> None:
    _, block = cut(
        f"%0 = stablehlo.convert %a : ({T}) -> tensor<4x4xf64> %1 = stablehlo.sine %0 : tensor<4x4xf64>"
        f" %2 = stablehlo.convert %1 : (tensor<4x4xf64>) -> {T} %3 = stablehlo.sine %2 : {T} return %3 : {T}"
    )
    assert kinds(block) == ["host", "device"]
    assert "float64" in block.nodes[0].reasons[0]


@pytest.mark.parametrize("limit", ["MAX_DEVICE_STEPS", "MAX_DEPTH"])
def test_a_long_line_is_cut(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"jax_mps.plan.partition.{limit}", 10)
    lines = " ".join(f"%{i} = stablehlo.sine %{i - 1} : {T}" for i in range(1, 35))
    _, block = cut(f"%0 = stablehlo.sine %a : {T} {lines} return %34 : {T}")
    assert kinds(block) == ["device"] * 4
    assert sum(len(n.steps) for n in block.nodes) == 35


def test_many_steps_side_by_side_are_not_cut_for_their_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_mps.plan.partition.MAX_DEPTH", 10)
    lines = " ".join(f"%{i} = stablehlo.sine %a : {T} %s{i} = stablehlo.add %s{i - 1 if i > 1 else 0}, %{i} : {T}" for i in range(1, 8))
    _, block = cut(f"%s0 = stablehlo.cosine %a : {T} {lines} return %s7 : {T}")
    assert kinds(block) == ["device"]
