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
from jax_mps.counters import count

log = logging.getLogger(__name__)

# On a GPU each fused kernel costs about a second the first time (then MLX finds it on disk), and a program has one for every few ops: one
# of so many ops more is compiled a run later.
_OPS_A_RUN = 32
# On the CPU a kernel costs 1-2 s of a C++ compiler, each time /tmp is new. A function that has run for so long, by these estimates of what MLX
# takes there, is likely to run for a while; a process of its own then finds out whether fusing it pays (`trial`).
_HOT_SECONDS, _TRIAL_SECONDS = 10.0, 2.0
_SECONDS_AN_OP, _SECONDS_AN_ELEMENT = 3e-6, 3e-10
_FEWEST_RUNS = 20
# Inputs and outputs of one fused kernel. Metal binds 31 buffers, of which MLX takes four for strides, shape and rank; it bounds only the
# inputs of what it fuses, and a kernel with more fails when it is evaluated (MLX 0.32).
_MOST_BUFFERS = {"metal": 27}
# Inputs of at most so many bytes may stay where they are while the kernels are made: the memory of those that are donated is then not the results'.
_HELD = 1 << 28


def first_look(ops: int, cost: int) -> int:
    """The run before which a function is fused, or tried (`is_tried_first`), at the earliest; 0: never. It has run before, so that its
    constants are real."""
    chosen = settings().compile
    if chosen == "1":
        return 1
    if chosen == "0":
        return 0
    return later_look(0, ops, cost) if runtime.device_kind() == "cpu" else 1 + ops // _OPS_A_RUN


def later_look(run: int, ops: int, cost: int) -> int:
    """The run before which to ask about a trial (again): some seconds of such runs later."""
    seconds = _HOT_SECONDS if run == 0 else _TRIAL_SECONDS
    return run + max(_FEWEST_RUNS, int(seconds / (_SECONDS_AN_OP * max(ops, 1) + _SECONDS_AN_ELEMENT * cost)))


def is_tried_first() -> bool:
    """Whether a function has to be faster fused before it is: on the CPU, unless the user chose."""
    return settings().compile == "auto" and runtime.device_kind() == "cpu"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its elementwise ops fused; itself where MLX cannot (a result that is a constant, for one), or must not.

    Kernels are made when the first results are evaluated: here, so that one that cannot be made is no error of the program's.
    """
    fused = mx.compile(function)
    most, made = _MOST_BUFFERS.get(runtime.device_kind()), False

    def call(*arrays: mx.array) -> Any:
        nonlocal fused, made
        try:
            if made:
                return fused(*arrays)
            made = True
            if most is not None and widest_kernel(fused, arrays) > most:
                fused = refused(f"a fused kernel would have more than {most} inputs and outputs")
            results = fused(*arrays)
            if sum(a.nbytes for a in arrays) <= _HELD:
                mx.eval(results)
            return results
        except (ValueError, IndexError, RuntimeError) as error:
            fused = refused(error)
            return function(*arrays)

    def refused(why: object) -> Callable[..., Any]:
        count("compiles_refused")
        log.debug("not compiled: %s", why)
        return function

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
