"""Which steps the host can run, and how."""

from __future__ import annotations

from typing import Any

import pytest

from jax_mps.calls import ffi
from jax_mps.calls.kinds import host_kind
from jax_mps.plan.types import Region, Step, TensorType, Value

X = Value(TensorType((4,), "float32"))
Y = Value(TensorType((4,), "float32"))
Z = Value(TensorType((2,), "float32"))


def call(target: str, result: Value = Y, **attributes: Any) -> Step:
    text = (("call_target_name", f'"{target}"'), *((n, str(v)) for n, v in attributes.items()))
    return Step("stablehlo.custom_call", (X,), (result,), {"call_target_name": target}, text=text)


def loop(inner: Step) -> Step:
    body = Region((Value(X.type),), (inner,), (Y,))
    return Step("stablehlo.while", (X,), (Y,), regions=(Region((Value(X.type),), (), ()), body), text=())


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        (Step("stablehlo.sine", (X,), (Y,), text=()), "xla"),
        (Step("chlo.erf_inv", (X,), (Y,), {"version": 1}), "xla"),
        (Step("mps.softmax", (X,), (Y,)), None),
        (Step("stablehlo.infeed", (), (Y,), text=()), None),
        (call("lapack_ssyevd_ffi"), "xla"),
        (call("lapack_of_another_time"), "xla"),
        (call("Qr"), "xla"),
        (call("mhlo.erf"), "xla"),
        (call("Sharding"), "xla"),
        (call("SPMDFullToShardShape", Z), None),
        (call("mps_python_callback"), "callback"),
        (call("test_registered"), "ffi"),
        (call("nosuch"), None),
        (call("xla_ffi_python_cpu_callback"), None),
        (call("Qr", called_computations="[@f]"), None),
        (loop(call("Qr")), "xla"),
        (loop(call("mps_python_callback")), None),
        (loop(call("nosuch")), None),
        (loop(loop(Step("stablehlo.outfeed", (), (), text=()))), None),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.key}({', '.join(s.key for r in v.regions for s in r.walk())})" if isinstance(v, Step) else "none",
)
def test_host_kind(step: Step, kind: str | None) -> None:
    """None is an UNIMPLEMENTED error with the target's name."""
    ffi.register_ffi_target("test_registered", lambda x: x)
    assert host_kind(step) == kind
