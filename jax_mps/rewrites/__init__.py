"""Rewrites of plans, before they are cut into segments."""

from __future__ import annotations

from jax_mps.plan.types import Plan
from jax_mps.rewrites import constants, table
from jax_mps.rewrites.table import Rewrite

TABLE: tuple[Rewrite, ...] = (
    Rewrite("index arithmetic", constants.fold_index_arithmetic, "first: the others look for constants"),
    Rewrite("shift in range", constants.shift_in_range, "once amounts are folded"),
    Rewrite("dynamic slice at constants", constants.dynamic_slice_at_constants, "last: its starts are folded by then"),
)


def rewrite(plan: Plan) -> Plan:
    """The plan in its best form."""
    return table.apply(plan, TABLE)
