"""What small steps beside a host step are worth: which of them move to the host, and what never does."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mps.pjrt.executable import is_prompt
from jax_mps.plan import build, translate
from jax_mps.plan.boundary import COSTS
from jax_mps.plan.partition import Draft, Target, host_loops, partition
from jax_mps.plan.program import Program
from jax_mps.plan.show import describe
from jax_mps.plan.types import Step


def refusal(step: Step) -> str | None:
    return "not here" if step.name == "stablehlo.cholesky" or step.name in ("stablehlo.while", "stablehlo.custom_call") else None


def host_kind(step: Step) -> str | None:
    return ("callback" if step.call_target_name == "call" else None) if step.name == "stablehlo.custom_call" else "xla"


def cut(body: str, size: int = 4, device: str = "cpu", *, result: str = "") -> list[Draft]:
    """The segments of `body` over one square matrix %a; `MAT` stands for its type."""
    kind = f"tensor<{size}x{size}xf32>"
    text = f"module @m {{ func.func public @main(%a: MAT) -> {result or 'MAT'} {{ {body} }} }}".replace("MAT", kind)
    return partition(build.build(build.parse(text.encode())), Target(refusal, host_kind, costs=COSTS[device])).nodes


def kinds(body: str, size: int = 4, device: str = "cpu") -> list[str]:
    return [node.kind for node in cut(body, size, device)]


FACTOR = "%{} = stablehlo.cholesky %{}, lower = true : MAT "


def factors(*names: str) -> str:
    return "".join(FACTOR.format(*pair.split()) for pair in names)


BETWEEN = f"{factors('0 a')} %1 = stablehlo.sine %0 : MAT {factors('2 1')} return %2 : MAT"
BEFORE = f"%0 = stablehlo.sine %a : MAT {factors('1 0')} return %1 : MAT"
AFTER = f"{factors('0 a')} %1 = stablehlo.sine %0 : MAT return %1 : MAT"
PRODUCT = "%1 = stablehlo.dot_general %0, %0, contracting_dims = [1] x [0] : (MAT, MAT) -> MAT"


@pytest.mark.parametrize("body", [BETWEEN, BEFORE, AFTER], ids=["between", "before", "after"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_tiny_steps_join(body: str, device: str) -> None:
    assert kinds(body, device=device) == ["host"]


@pytest.mark.parametrize(("body", "expected"), [(BETWEEN, "hdh"), (BEFORE, "dh"), (AFTER, "hd")], ids=["between", "before", "after"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "metal"])
def test_work_on_large_arrays_never_moves(body: str, expected: str, device: str) -> None:
    assert "".join(k[0] for k in kinds(body, 1024, device)) == expected


def test_a_product_counts_its_multiplications() -> None:
    body = f"{factors('0 a')} {PRODUCT} return %1 : MAT"
    assert kinds(body, 32) == ["host"]
    assert kinds(body, 256) == ["host", "device"]


def test_a_boundary_is_worth_so_many_ops() -> None:
    """Each op that moves has to be compiled: a long line of tiny ones stays."""
    lines = " ".join(f"%{i + 1} = stablehlo.sine %{i} : MAT" for i in range(1, 200))
    assert kinds(f"{factors('1 a')} {lines} return %200 : MAT") == ["host", "device"]


def test_what_the_host_does_not_need_stays() -> None:
    """Of the steps before a host step only those move that it needs: it has to wait for nothing then."""
    other = "%1 = stablehlo.cosine %a : MAT"
    both = f"%0 = stablehlo.sine %a : MAT {other} {factors('2 0')} return %1, %2 : MAT, MAT"
    device, host = cut(both, result="(MAT, MAT)")
    assert [s.name for s in device.steps] == ["stablehlo.cosine"]
    assert host.joined == 1


def test_without_a_host_step_nothing_moves() -> None:
    assert kinds("%0 = stablehlo.sine %a : MAT return %0 : MAT") == ["device"]


def test_a_callback_is_no_host_region() -> None:
    call = '"stablehlo.custom_call"(%0) <{call_target_name = "call", has_side_effect = true, backend_config = ""}> : (MAT) -> ()'
    assert kinds(f"%0 = stablehlo.sine %a : MAT {call} return %0 : MAT") == ["device", "callback"]


COUNTED = """%c = stablehlo.constant dense<0> : tensor<i32>
%1:2 = stablehlo.while(%i = %c, %h = %0) : tensor<i32>, MAT
cond {{ %n = stablehlo.constant dense<{}> : tensor<i32> %p = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
  stablehlo.return %p : tensor<i1> }}
do {{ %one = stablehlo.constant dense<1> : tensor<i32> %j = stablehlo.add %i, %one : tensor<i32> %g = stablehlo.sine %h : MAT
  stablehlo.return %j, %g : tensor<i32>, MAT }}"""


@pytest.mark.parametrize("trips", [3, 100_000])
def test_a_loop_of_tiny_steps_joins(trips: int) -> None:
    """Driving it from here costs more than running it there, however long it is; neither is it unrolled before."""
    body = f"{factors('0 a')} {COUNTED.format(trips)} {factors('2 1#1')} return %2 : MAT"
    assert kinds(body) == ["host"]
    assert kinds(body, 512) == ["device", "host", "scan", "host"]  # the first is the loop's constant


def test_a_loop_that_goes_to_the_host_is_not_unrolled() -> None:
    text = f"module @m {{ func.func public @main(%a: MAT) -> MAT {{ {factors('0 a')} {COUNTED.format(3)} return %1#1 : MAT }} }}"
    plan = build.build(build.parse(text.replace("MAT", "tensor<4x4xf32>").encode()))
    assert [s.name for s in host_loops(plan.body, Target(refusal, host_kind))] == ["stablehlo.while"]
    assert not host_loops(plan.body, Target(refusal, host_kind, forbid_host=True))


def test_a_loop_around_the_host_goes_whole_where_the_rest_is_small() -> None:
    body = COUNTED.format(1000).replace("stablehlo.sine %h : MAT", "stablehlo.cholesky %h : MAT %g2 = stablehlo.sine %g : MAT").replace("%j, %g :", "%j, %g2 :")
    text = f"%0 = stablehlo.cosine %a : MAT {body} return %1#1 : MAT"
    assert kinds(text) == ["host"]
    assert kinds(text, 512) == ["device", "scan"]


# ---- through the plugin ------------------------------------------------------------------------------------------------------------

MPS, CPU = jax.devices("mps")[0], jax.devices("cpu")[0]


def solved(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.linalg.solve(a, b) + 1


def scanned(a: jax.Array, b: jax.Array) -> jax.Array:
    return lax.scan(lambda c, x: (jnp.linalg.solve(a, c) + x, jnp.sum(c)), b[:, 0], b.T)[1]


def mixed(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(a @ a.T + jnp.eye(len(a))) @ jnp.linalg.inv(a + jnp.sin(a)) @ b


@pytest.mark.parametrize("function", [solved, scanned, mixed])
@pytest.mark.parametrize("size", [3, 40, 200])
def test_results(function: object, size: int) -> None:
    random = np.random.default_rng(0)
    a = (random.normal(size=(size, size)) / size + np.eye(size)).astype(np.float32)
    b = random.normal(size=(size, 5)).astype(np.float32)
    got, want = (np.asarray(jax.jit(function)(*jax.device_put((a, b), d))) for d in (MPS, CPU))  # type: ignore[arg-type]
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # two different products' rounding, through an inverse


def translated(function: Callable[..., jax.Array], size: int) -> Program:
    arguments = np.eye(size, dtype=np.float32), np.ones((size, 1), np.float32)
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("mps",)).as_text()
    return translate.translate(build.parse(text.encode()))[0]


def test_prompt_programs() -> None:
    """A call waits for little: not for a large factorisation, nor for a large product before a small one, nor for a callback or a loop."""
    assert is_prompt(translated(mixed, 8))
    assert not is_prompt(translated(solved, 2000))
    assert not is_prompt(translated(lambda a, b: jnp.linalg.cholesky((a @ a)[:4, :4]), 2000))
    assert not is_prompt(translated(lambda a, b: lax.while_loop(lambda x: x.sum() < 9, lambda x: x * 2, a), 8))


def test_explain_says_it() -> None:
    program = translated(solved, 8)
    assert "ops beside them that take less time than a boundary" in describe(program)
    assert len(program.segments()) == 1


def test_a_call_with_neither_operands_nor_results() -> None:
    """It has a cost like any other: none that is known."""
    compiled = jax.jit(lambda: jax.ffi.ffi_call("lapack_sgetrf_ffi", (), has_side_effect=True)()).lower().compile()
    assert "lapack_sgetrf_ffi" in compiled.as_text()
