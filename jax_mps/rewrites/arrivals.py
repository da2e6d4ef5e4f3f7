"""Sums over rows that their kernel finishes by itself, on CUDA: its blocks count themselves, and the last one sums up what all have left (ops/arrivals.py).

The words that they count in are made by one step for a region's kernels, in each run of the region: so nothing may be moved out of loops after this.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from jax_mps.ops import columns, norm_rows
from jax_mps.ops.arrivals import WORDS
from jax_mps.ops.target import device_kind
from jax_mps.plan.types import Plan, Region, Step, TensorType, Value, numpy_dtype
from jax_mps.rewrites.norm_ends import fits
from jax_mps.rewrites.regions import innermost_first

_FEWEST = 2  # kernels of a region that are saved, for one


def counted(plan: Plan) -> Plan:
    """The plan with such sums."""
    return innermost_first(plan, _region) if device_kind() == "cuda" else plan


def _region(region: Region) -> Region:
    sums = [step for step in region.steps if _has_parts(step)]
    if len(sums) < _FEWEST:
        return region
    zeros = _zeros(len(sums) * WORDS)
    found = {step: _with_words(step, zeros.results[0], i * WORDS) for i, step in enumerate(sums)}
    first = region.steps.index(sums[0])
    done = [found.get(step, step) for step in region.steps]
    return Region(region.arguments, (*done[:first], zeros, *done[first:]), region.results)


def _has_parts(step: Step) -> bool:
    """Whether a step's kernel can finish its sums."""
    if step.name == "jax_mps.column_sums":
        width = math.prod(step.operand.shape[step.lead :])
        return columns.finishes(numpy_dtype(step.operand.dtype).itemsize, step.operand.size // width, width)
    return step.name == "jax_mps.norm_gradient" and norm_rows.finishes(step.sums, step.operand.shape[-1]) and fits(step)


def _zeros(size: int) -> Step:
    number, whole = Value(TensorType((), "uint32")), Value(TensorType((size,), "uint32"))
    constant = Step("stablehlo.constant", (), (number,), {"value": np.array(0, np.uint32)}, text=())
    spread = Step("stablehlo.broadcast_in_dim", (number,), (whole,), {"broadcast_dimensions": ()}, text=(("broadcast_dimensions", "array<i64>"),))
    return Step("jax_mps.zeros", (), (whole,), {"original": Region((), (constant, spread), (whole,))}, text=())


def _with_words(step: Step, words: Value, first: int) -> Step:
    """The step with one more operand, of which it has its words from `first` on."""
    old = step.original
    original = Region((*old.arguments, words), old.steps, old.results)
    return replace(step, operands=(*step.operands, words), attributes={**step.attributes, "first_word": first, "original": original})
