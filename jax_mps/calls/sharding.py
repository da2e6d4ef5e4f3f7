"""Annotations of shardings, layouts, memories and order: the identity on one device."""

from __future__ import annotations

from jax_mps.errors import Unsupported
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.text import IDENTITY_CALLS, is_identity_call
from jax_mps.plan.types import Step


@lowers(*(f"custom_call:{name}" for name in sorted(IDENTITY_CALLS)))
def annotation(op: Step) -> Run:
    """Every operand as it is; a shape that changes means more than one device."""
    if not is_identity_call(op):
        raise Unsupported(op, "operands and results differ in type, which takes more than one device")
    return lambda *operands: operands


@lowers("custom_call:control_dep")
def control_dependency(op: Step) -> Run:
    """`jax.experimental.control_deps`: a hint that one op come before another. Values never change, so any order is right."""
    if op.results:
        raise Unsupported(op, "a control dependency has no results")
    return lambda *operands: ()
