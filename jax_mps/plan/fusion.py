"""`mx.compile` of device segments: when, and not where MLX would fuse more than a kernel can hold."""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from jax_mps import runtime
from jax_mps.config import settings

log = logging.getLogger(__name__)

# On a GPU each fused kernel costs about a second the first time (then MLX finds it on disk), and a program has one for every few ops: one
# of so many ops more is compiled a run later.
_OPS_A_RUN = 32
# Inputs and outputs of one fused kernel. Metal binds 31 buffers, of which MLX takes four for strides, shape and rank; it bounds only the
# inputs of what it fuses, and a kernel with more fails when it is evaluated (MLX 0.32).
_MOST_BUFFERS = {"metal": 27}


def wants_compile(runs: int, ops: int) -> bool | None:
    """Whether a function that ran so often is to be compiled now; None: never. Not before its first run has made its constants real."""
    chosen = settings().compile
    if chosen == "0" or (chosen == "auto" and runtime.device_kind() == "cpu"):
        return None
    return runs >= (1 if chosen == "1" else 1 + ops // _OPS_A_RUN)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its elementwise ops fused; itself where MLX cannot (a result that is a constant, for one), or must not."""
    fused = mx.compile(function)
    most = _MOST_BUFFERS.get(runtime.device_kind())

    def call(*arrays: mx.array) -> Any:
        nonlocal fused, most
        try:
            if most is not None:
                limit, most = most, None
                if widest_kernel(fused, arrays) > limit:
                    log.debug("not compiled: a fused kernel would have more than %d inputs and outputs", limit)
                    fused = function
            return fused(*arrays)
        except ValueError as error:
            log.debug("not compiled: %s", error)
            fused = function
            return function(*arrays)

    return call


_NODE = r'\{ (\d+) \[label ="Compiled'
_EDGE = r'(?:"\w+" -> (\d+)|(\d+) -> "\w+")$'


def widest_kernel(fused: Callable[..., Any], arrays: Sequence[mx.array]) -> int:
    """The most inputs and outputs of any kernel that a compiled function fuses for such arrays: read from its graph, of which nothing runs."""
    from jax_mps.plan.export import with_big_stack  # not in a warm start, but where a limit asks for it

    results = fused(*[mx.zeros(a.shape, a.dtype) for a in arrays])
    text = io.StringIO()
    with_big_stack(lambda: mx.export_to_dot(text, *results), deep=True)
    kernels = set()
    ends: Counter[str] = Counter()
    for line in text.getvalue().splitlines():
        if node := re.match(_NODE, line):
            kernels.add(node[1])
        elif edge := re.match(_EDGE, line):
            ends[edge[1] or edge[2]] += 1
    return max((ends[kernel] for kernel in kernels), default=0)
