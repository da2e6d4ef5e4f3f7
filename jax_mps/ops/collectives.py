"""Collectives on one device: every group is that device alone, so most are the identity."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from jax_mps.errors import Unsupported
from jax_mps.ops.registry import LoweredRegion, Run, lowers
from jax_mps.plan.types import Step


def _alone(op: Step) -> bool:
    """Whether process 0 is in a group; refuses groups that name any other."""
    groups = np.asarray(op.replica_groups)
    if groups.size and (groups.size > 1 or groups.flat[0] != 0):
        raise Unsupported(op, f"replica_groups {groups.tolist()} on one device")
    return True


@lowers("stablehlo.all_reduce", "stablehlo.reduce_scatter")
def all_reduce(op: Step, computation: LoweredRegion) -> Run:
    """One process contributes one value, which the computation never sees."""
    _alone(op)
    return lambda *operands: operands


@lowers("stablehlo.all_gather", "stablehlo.all_to_all")
def all_gather(op: Step) -> Run:
    _alone(op)
    return lambda *operands: operands


@lowers("stablehlo.collective_broadcast")
def collective_broadcast(op: Step) -> Run:
    """A process in no group gets zeros."""
    if np.asarray(op.replica_groups).size == 0:
        return lambda operand: mx.zeros_like(operand)
    _alone(op)
    return lambda operand: operand


@lowers("stablehlo.collective_permute")
def collective_permute(op: Step) -> Run:
    """A process that no pair names as a target gets zeros."""
    pairs = np.asarray(op.source_target_pairs).reshape(-1, 2)
    if (pairs != 0).any():
        raise Unsupported(op, f"source_target_pairs {pairs.tolist()} on one device")
    if len(pairs) == 0:
        return lambda operand: mx.zeros_like(operand)
    return lambda operand: operand
