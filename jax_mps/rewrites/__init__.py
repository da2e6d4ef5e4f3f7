"""Rewrites of plans, before they are cut into segments."""

from __future__ import annotations

from jax_mps.plan.types import Plan
from jax_mps.rewrites import attention, bias, columns, constants, indices, norm_ends, norms, pads, row_kernels, softmax, special, table, threefry, transposes
from jax_mps.rewrites.arrivals import counted
from jax_mps.rewrites.deep import deep_kernels
from jax_mps.rewrites.dense import dense_copies
from jax_mps.rewrites.empty import drop_empty
from jax_mps.rewrites.join import joined
from jax_mps.rewrites.recompute import recomputed
from jax_mps.rewrites.table import Rewrite, Sweep, Table

whole = threefry.whole  # for functions that JAX calls, before they are inlined


def _at(*names: str) -> frozenset[str]:
    return frozenset(f"stablehlo.{name}" for name in names)


_EXP = _at("exponential")

# One table after the other; within a table, every step sees its rows in order.
TABLES: tuple[Table, ...] = (
    (
        Rewrite("arithmetic of scalars", constants.fold_scalars, constants.ARITHMETIC, "first: the others look for constants"),
        Rewrite("converted constant", constants.fold_conversion, _at("convert"), "as above"),
        Rewrite("shift in range", constants.shift_in_range, constants.SHIFTS, "once amounts are folded"),
        Rewrite("dynamic slice at constants", constants.dynamic_slice_at_constants, _at("dynamic_slice"), "its starts are folded by then"),
        Rewrite("threefry of positions", threefry.counted, frozenset(["jax_mps.threefry2x32"]), "any time before the next"),
    ),
    (
        Rewrite("gather of all", indices.gather_all, _at("gather"), "any time"),
        Rewrite("concatenation of padded", pads.concatenated, _at("add"), "before others look at concatenations", _at("pad")),
        Rewrite("scatter to all", indices.scatter_all, _at("scatter"), "any time"),
        Rewrite("gather of converted", indices.gather_converted, _at("gather"), "before the next, which looks at the indices", _at("convert")),
        Rewrite("gather from the end", indices.gather, _at("gather"), "any time", _at("select")),
        Rewrite("scatter from the end", indices.scatter, _at("scatter"), "any time", _at("select")),
        Rewrite("indices in bounds", indices.in_bounds, _at("reduce"), "any time", _at("gather")),
        Rewrite("random bits", threefry.bits, _at("xor"), "once their counters are known to be positions", frozenset(["jax_mps.threefry_counted"])),
        Rewrite("uniform numbers", threefry.unit, _at("subtract"), "any time", _at("bitcast_convert")),
        Rewrite("erf_inv", special.erf_inv, _at("select"), "any time", _at("log_plus_one")),
        Rewrite("sigmoid", special.logistic, _at("divide"), "any time", _EXP),
        Rewrite("gradient of softmax", softmax.softmax_gradient, _at("multiply"), "gradients read the parts of what comes next", _EXP),
        Rewrite("gradient of log_softmax", softmax.normalised_times, _at("multiply"), "as above", _EXP),
    ),
    (Sweep("gradient of a norm", norms.norm_gradients, norms.ROOTS, "gradients read the parts of what comes next"),),
    (
        Rewrite("softmax", softmax.softmax, _at("divide"), "nothing else reads its parts by now", _EXP),
        Rewrite("log_softmax", softmax.log_softmax, _at("subtract"), "as above", _EXP),
        Rewrite("logsumexp", softmax.logsumexp, _at("add"), "as above", _EXP),
        Sweep("norm", norms.norms, norms.ROOTS, "as above"),
    ),
    (
        Rewrite("attention", attention.attention, _at("dot_general"), "before the next, once its softmax is one step", frozenset(["jax_mps.softmax"])),
        Rewrite("log of a sum", softmax.log_of_sum, _at("log"), "last: log_softmax holds one", _EXP),
        Rewrite("product, transposed", transposes.product_transposed, _at("transpose"), "any time", _at("dot_general")),
        Rewrite("concatenation, transposed", transposes.concatenation_transposed, _at("transpose"), "any time", _at("concatenate")),
        Rewrite("concatenation of merged", transposes.concatenated, _at("concatenate"), "any time", _at("transpose")),
        Rewrite("product of transposed", transposes.of_product, _at("dot_general"), "any time", _at("transpose")),
    ),
    (
        Rewrite("sum of one", transposes.sum_of_one, _at("reduce"), "before the next"),
        Rewrite("reshape", transposes.reshaped, _at("reshape", "transpose"), "last: the others look for the steps that JAX writes"),
        Sweep("product and bias", bias.biased_products, bias.ROOTS, "once products have their last form"),
        Sweep("ends of a norm's gradient", norm_ends.norm_ends, norm_ends.ROOTS, "before the next, which takes what sums are left"),
        Sweep("sums over rows", columns.column_sums, columns.ROOTS, "once norms have read the sums that they are made of"),
    ),
    (Sweep("kernels for rows", row_kernels.row_kernels_of, row_kernels.ROOTS, "last: grows around softmaxes, and what others have left"),),
)


def rewrite(plan: Plan) -> Plan:
    """The plan in its best form."""
    plan = drop_empty(plan)
    for rows in TABLES:
        plan = table.apply(plan, rows)
    return counted(joined(dense_copies(deep_kernels(recomputed(plan)))))
