"""Branches small enough to compute on both sides and select (plan/partition.py decides which). Loops are segments of their own."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.plan.types import Step


@lowers("stablehlo.case")
def case(op: Step, *branches: LoweredRegion) -> Run:
    def run(index: mx.array) -> Sequence[mx.array]:
        results = branches[-1]()  # the spec: an index out of bounds runs the last branch
        for number, branch in enumerate(branches[:-1]):
            results = _select(index == number, branch(), results)
        return results

    return run


@lowers("stablehlo.if")
def if_(op: Step, true_branch: LoweredRegion, false_branch: LoweredRegion) -> Run:
    return lambda pred: _select(pred, true_branch(), false_branch())


def _select(pred: mx.array, on_true: Sequence[mx.array], on_false: Sequence[mx.array]) -> tuple[mx.array, ...]:
    return tuple(mx.where(pred, t, f) for t, f in zip(on_true, on_false, strict=True))
