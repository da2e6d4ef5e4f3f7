"""Steps printed back as a StableHLO module in MLIR's generic form: what a Host segment hands to XLA.

Values are numbered in the order of the text, so that equal steps print equally whatever they were cut from. XLA on CPU takes no token as
a parameter (jaxlib 0.10), and a token holds nothing: those among the inputs are made inside, those among the outputs are left out.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np

from jax_mps.plan.types import MLIR_NAMES, Region, Step, Value

# Annotations of shardings and memories; on one device each is the identity. XLA aborts the process on some of them.
IDENTITY_CALLS = frozenset([
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
    "xla.sdy.FuncResultSharding", "xla.sdy.GlobalToLocalShape", "xla.sdy.LocalToGlobalShape", "xla.sdy.PropagationBarrier",
    "annotate_device_placement", "LayoutConstraint", "MoveToHost", "MoveToDevice",
])  # fmt: skip

# Discardable attributes that name meshes, devices or memories of the whole program, which a part of it does not hold.
_DROPPED = re.compile(r"^(sdy|xla\.sdy)\.|^mhlo\.(sharding|frontend_attributes|memory_kind|layout_mode)$")

_BARE = re.compile(r"^[A-Za-z_][\w.$]*$")
_TOKEN = "token"


def module_text(inputs: Sequence[Value], steps: Sequence[Step], outputs: Sequence[Value]) -> str:
    """A module whose public `@main` computes `outputs` from `inputs` by `steps`.

    Raises:
        ValueError: a step that was made by a rewrite and has no MLIR form, one that calls a function of its old module, or a value that
            is read but neither given nor computed.
    """
    return _Printer().module(inputs, steps, outputs)


def data_values(values: Sequence[Value]) -> list[Value]:
    """The values that `@main` takes or returns: all but the tokens."""
    return [v for v in values if v.dtype != _TOKEN]


def is_identity_call(step: Step) -> bool:
    """Whether the step is an annotation that changes nothing on one device."""
    if step.name != "stablehlo.custom_call" or step.attributes["call_target_name"] not in IDENTITY_CALLS:
        return False
    return [v.type for v in step.operands] == [v.type for v in step.results]


def is_printable(step: Step) -> bool:
    """Whether the step itself (its regions aside) has a StableHLO form."""
    try:
        _attributes(step, with_constant=False)
    except ValueError:
        return False
    return True


class _Printer:
    """The lines so far, and the name of every value in scope."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: MutableMapping[Value, str] = {}
        self.count = 0

    def module(self, inputs: Sequence[Value], steps: Sequence[Step], outputs: Sequence[Value]) -> str:
        given = data_values(inputs)
        returned = data_values(outputs)
        arguments = ", ".join(f"{self.define(v)}: {v.type}" for v in given)
        self.lines.append("module @host {")
        self.lines.append(f"func.func public @main({arguments}) -> ({', '.join(str(v.type) for v in returned)}) {{")
        for value in inputs:
            if value.dtype == _TOKEN:
                self.lines.append(f'{self.define(value)} = "stablehlo.create_token"() : () -> !stablehlo.token')
        for step in steps:
            self.step(step)
        self.lines.append(f'"func.return"({self.uses(returned)}) : ({_types(returned)}) -> ()')
        self.lines.append("}\n}\n")
        return "\n".join(self.lines)

    def define(self, value: Value) -> str:
        name = self.names[value] = f"%{self.count}"
        self.count += 1
        return name

    def name(self, value: Value) -> str:
        try:
            return self.names[value]
        except KeyError:
            raise ValueError(f"{value!r} is read but neither an input nor computed before") from None

    def uses(self, values: Sequence[Value]) -> str:
        return ", ".join(map(self.name, values))

    def step(self, step: Step) -> None:
        if "original" in step.attributes:
            self.original(step)
            return
        attributes = _attributes(step)
        operands = self.uses(step.operands)
        if is_identity_call(step):
            self.names.update((r, self.names[o]) for r, o in zip(step.results, step.operands, strict=True))
            return
        start = len(self.lines)
        for region in step.regions:
            self.region(region)
        regions = f" ({_joined(self.lines[start:])})" if step.regions else ""
        del self.lines[start:]
        results = ", ".join(self.define(v) for v in step.results)
        inner = ", ".join(f"{_attribute_name(n)} = {text}" if text else _attribute_name(n) for n, text in attributes)
        self.lines.append(
            f'{results}{" = " if results else ""}"{step.name}"({operands}){regions} {{{inner}}} : ({_types(step.operands)}) -> ({_types(step.results)})'
        )

    def original(self, step: Step) -> None:
        """The steps that a rewrite made one step of. Their values have no names after it: some are computed elsewhere, too, perhaps not in this region."""
        outer, before = self.names, step.original
        self.names = ChainMap(dict(zip(before.arguments, map(self.name, step.operands), strict=True)), outer)
        for part in before.steps:
            self.step(part)
        results = [self.name(v) for v in before.results]
        self.names = outer
        outer.update(zip(step.results, results, strict=True))

    def region(self, region: Region) -> None:
        """One region as one entry of `lines`."""
        start = len(self.lines)
        arguments = ", ".join(f"{self.define(v)}: {v.type}" for v in region.arguments)
        self.lines.append(f"^bb0({arguments}):")
        for step in region.steps:
            self.step(step)
        self.lines.append(f'"stablehlo.return"({self.uses(region.results)}) : ({_types(region.results)}) -> ()')
        self.lines[start:] = ["{\n" + "\n".join(self.lines[start:]) + "\n}"]


def _joined(regions: Sequence[str]) -> str:
    return ", ".join(regions)


def _types(values: Sequence[Value]) -> str:
    return ", ".join(str(v.type) for v in values)


def _attribute_name(name: str) -> str:
    return name if _BARE.match(name) else f'"{name}"'


def _attributes(step: Step, *, with_constant: bool = True) -> list[tuple[str, str]]:
    """Name and MLIR text of each attribute."""
    if step.name == "stablehlo.constant":
        return [("value", constant_text(step.attributes["value"], step.result.dtype))] if with_constant else []
    if step.text is None:
        if not step.name.startswith("chlo."):
            raise ValueError(f"{step.name} was made by a rewrite and has no StableHLO form")
        return [(name, _plain_text(step, name, value)) for name, value in step.attributes.items() if name != "version"]
    for name, text in step.text:
        if name == "called_computations" and text != "[]":
            raise ValueError(f"{step.key} calls functions of its module ({text}), which a part of it does not hold")
    return [(name, text) for name, text in step.text if not _DROPPED.match(name)]


def _plain_text(step: Step, name: str, value: Any) -> str:
    """An attribute of a CHLO composite, whose op has it under the same name."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return f"{value} : i64"
        case float():
            return f"{value!r} : f64"
    raise ValueError(f"the attribute {name} of {step.name} has no known text: {value!r}")


def constant_text(value: np.ndarray[Any, Any], dtype: str) -> str:
    """`dense<...> : tensor<...>` with every bit of the value; a broadcast view of one element is printed as that element.

    Raw bytes in MLIR's order: little-endian, one byte for an element smaller than one.
    """
    kind = f"tensor<{''.join(f'{d}x' for d in value.shape)}{MLIR_NAMES[dtype]}>"
    if value.size == 0:
        return f"dense<> : {kind}"
    if _is_splat(value):
        value = value[(slice(0, 1),) * value.ndim]
    if dtype == "bool" and value.size == 1:
        return f"dense<{'true' if value.all() else 'false'}> : {kind}"
    return f'dense<"0x{value.tobytes().hex()}"> : {kind}'


def _is_splat(value: np.ndarray[Any, Any]) -> bool:
    """Whether all elements are one element in memory."""
    return math.prod(value.shape) > 1 and all(stride == 0 or size == 1 for stride, size in zip(value.strides, value.shape, strict=True))
