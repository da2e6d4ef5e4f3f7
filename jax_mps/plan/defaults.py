"""The spec's defaults for attributes that a module may leave out, so that lowerings read every attribute plainly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jax_mps.plan.types import Step


def _ones(n: int) -> tuple[int, ...]:
    return (1,) * n


def _padding(n: int) -> np.ndarray[Any, Any]:
    return np.zeros((n, 2), np.int64)


def _convolution(op: Step) -> dict[str, Any]:
    n = len(op.input_spatial_dimensions)
    return {
        "window_strides": _ones(n), "padding": _padding(n), "lhs_dilation": _ones(n), "rhs_dilation": _ones(n),
        "window_reversal": (False,) * n, "precision_config": ("DEFAULT", "DEFAULT"),
    }  # fmt: skip


def _reduce_window(op: Step) -> dict[str, Any]:
    n = op.operand.rank
    return {"window_strides": _ones(n), "base_dilations": _ones(n), "window_dilations": _ones(n), "padding": _padding(n)}


def _select_and_scatter(op: Step) -> dict[str, Any]:
    n = op.operand.rank
    return {"window_dimensions": _ones(n), "window_strides": _ones(n), "padding": _padding(n)}


def _compare(op: Step) -> dict[str, Any]:
    kind = op.operand
    if kind.is_floating or kind.is_complex:
        return {"compare_type": "FLOAT"}
    return {"compare_type": "UNSIGNED" if kind.is_unsigned or kind.dtype == "bool" else "SIGNED"}


def _fixed(**values: Any) -> Callable[[Step], dict[str, Any]]:
    return lambda op: values


_DEFAULTS: dict[str, Callable[[Step], dict[str, Any]]] = {
    "stablehlo.convolution": _convolution,
    "stablehlo.reduce_window": _reduce_window,
    "stablehlo.select_and_scatter": _select_and_scatter,
    "stablehlo.compare": _compare,
    "stablehlo.dot_general": _fixed(precision_config=("DEFAULT", "DEFAULT"), algorithm=None),
    "stablehlo.dot": _fixed(precision_config=("DEFAULT", "DEFAULT")),
    "stablehlo.gather": _fixed(indices_are_sorted=False),
    "stablehlo.scatter": _fixed(indices_are_sorted=False, unique_indices=False),
    "stablehlo.sort": _fixed(dimension=-1, is_stable=False),
    "stablehlo.cholesky": _fixed(lower=False),
    "stablehlo.custom_call": _fixed(has_side_effect=False, api_version=1, backend_config="", output_operand_aliases=()),
    "stablehlo.all_reduce": _fixed(channel_handle=0, use_global_device_ids=False),
    "stablehlo.all_gather": _fixed(channel_handle=0, use_global_device_ids=False),
    "stablehlo.reduce_scatter": _fixed(channel_handle=0, use_global_device_ids=False),
    "stablehlo.collective_permute": _fixed(channel_handle=0),
    "stablehlo.collective_broadcast": _fixed(channel_handle=0),
    "stablehlo.all_to_all": _fixed(channel_handle=0),
    "stablehlo.rng_bit_generator": _fixed(rng_algorithm="DEFAULT"),
}


def complete(op: Step) -> dict[str, Any]:
    """Every attribute of the step, those left out by the module included."""
    default = _DEFAULTS.get(op.name)
    return {**default(op), **op.attributes} if default else dict(op.attributes)
