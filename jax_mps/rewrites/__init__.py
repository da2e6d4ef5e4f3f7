"""Rewrites of plans, before they are cut into segments."""

from __future__ import annotations

from jax_mps.plan.types import Plan
from jax_mps.rewrites import constants, table
from jax_mps.rewrites.table import Rewrite

TABLE: tuple[Rewrite, ...] = (
    Rewrite("shift in range", constants.shift_in_range, "first: it reads constants as the module has them"),
    Rewrite("dynamic slice at constants", constants.dynamic_slice_at_constants, "after loops were unrolled: their counters are constants then"),
)


def rewrite(plan: Plan) -> Plan:
    """The plan in its best form."""
    return table.apply(plan, TABLE)
