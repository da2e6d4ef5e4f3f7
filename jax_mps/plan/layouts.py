"""Layouts: the order in which the dimensions of arguments and results lie in memory, fastest first.

They are what JAX asks for and is told (`jax.experimental.layout`), not where MLX puts anything: its arrays have strides of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jax_mps.errors import InvalidProgram
from jax_mps.plan.tensors import Layout, Layouts
from jax_mps.plan.types import Region, Value

AUTO = "auto"
_CONCRETE = re.compile(r"\{([\d,]*)(?::E\(\d+\))?\}")  # as XLA writes them; E is the size of a sub-byte element


def choose(body: Region, wanted: tuple[Sequence[str], Sequence[str]]) -> Layouts:
    """The layouts of a program's arguments and results; none for row-major ones, empty if all are.

    Args:
        body: the program. wanted: of arguments and of results, what `mhlo.layout_mode` says: "" for nothing, "auto", or a layout.

    Raises:
        InvalidProgram: a layout with tiles, or none at all.
    """
    if not any(map(any, wanted)):
        return (), ()
    arguments = [_read(mode, value) for mode, value in zip(wanted[0], body.arguments, strict=True)]
    found = propagate(body, arguments) if AUTO in wanted[1] else {}
    results = [found.get(value) if mode == AUTO else _read(mode, value) for mode, value in zip(wanted[1], body.results, strict=True)]
    return _plain(arguments), _plain(results)


def propagate(body: Region, arguments: Sequence[Layout | None]) -> dict[Value, Layout]:
    """Of the values that have one, the layout that is that of an argument or of a `with_layout_constraint`, seen through transposes and
    through whatever keeps a value's shape."""
    found = {v: layout or _row_major(v) for v, layout in zip(body.arguments, arguments, strict=True)}
    for step in body.steps:
        if step.key == "custom_call:LayoutConstraint":
            found.update({v: tuple(map(int, order)) for v, order in zip(step.results, step.attributes["result_layouts"], strict=True)})
        elif step.name == "stablehlo.transpose" and step.operands[0] in found:
            permutation = list(step.attributes["permutation"])
            found[step.results[0]] = tuple(permutation.index(axis) for axis in found[step.operands[0]])
        else:
            for result in step.results:
                known = next((found[o] for o in step.operands if o in found and o.type.shape == result.type.shape), None)
                if known is not None:
                    found[result] = known
    return found


def _row_major(value: Value) -> Layout:
    return tuple(reversed(range(value.type.rank)))


def _read(mode: str, value: Value) -> Layout | None:
    if mode in ("", AUTO, "default"):
        return None
    match = _CONCRETE.fullmatch(mode)
    if match is None:
        raise InvalidProgram(f"the layout {mode} of {value.type}: only an order of dimensions is known here")
    return tuple(map(int, match[1].split(","))) if match[1] else ()


def _plain(layouts: Sequence[Layout | None]) -> tuple[Layout | None, ...]:
    """Row-major ones as None, and nothing if all are."""
    plain = tuple(None if layout == tuple(reversed(range(len(layout or ())))) else layout for layout in layouts)
    return plain if any(layout is not None for layout in plain) else ()
