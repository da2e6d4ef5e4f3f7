"""The plan: a small SSA form of StableHLO in plain Python values.

A `Plan` holds no MLIR object, so it can be rewritten, cut into segments, printed back as StableHLO and shown to a user long after
the module it came from is gone. Nothing here knows of MLX.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax_mps.plan.tensors import DEVICE_DTYPES, DTYPES, MEMORY_KINDS, MLIR_NAMES, Layouts, Memories, TensorType, numpy_dtype

__all__ = ["DEVICE_DTYPES", "DTYPES", "MEMORY_KINDS", "MLIR_NAMES", "Layouts", "Memories", "Plan", "Region", "Step", "TensorType", "Value", "numpy_dtype"]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One SSA value. Identity is equality; `number` only orders and prints."""

    type: TensorType
    number: int = field(default_factory=_numbers.__next__)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.type.shape

    @property
    def dtype(self) -> str:
        return self.type.dtype

    def __repr__(self) -> str:
        return f"%{self.number}: {self.type}"


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A block: its arguments, its steps in order and the values that its terminator returns."""

    arguments: tuple[Value, ...]
    steps: tuple[Step, ...]
    results: tuple[Value, ...]

    def captures(self) -> tuple[Value, ...]:
        """Values of enclosing scopes that the region reads, in order of first use."""
        defined = set(self.arguments)
        found: dict[Value, None] = {}
        for step in self.steps:
            for value in step.reads():
                if value not in defined:
                    found.setdefault(value)
            defined.update(step.results)
        for value in self.results:
            if value not in defined:
                found.setdefault(value)
        return tuple(found)

    def walk(self) -> Iterator[Step]:
        """Every step, those of nested regions included."""
        for step in self.steps:
            yield step
            for region in step.regions:
                yield from region.walk()


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation: `name` as the spec has it ("stablehlo.add"), attributes under the spec's names as plain Python values.

    Attributes read as fields (`op.slice_sizes`); an optional one that the module left out has the spec's default.
    `text` keeps each inherent attribute as MLIR wrote it, so that the step can be printed back; None if the step was made by a rewrite.
    """

    name: str
    operands: tuple[Value, ...]
    results: tuple[Value, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    location: str = ""
    text: tuple[tuple[str, str], ...] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.attributes[name]
        except KeyError:
            raise AttributeError(f"{self.name} has no attribute {name!r}") from None

    @property
    def operand(self) -> TensorType:
        """Type of the first operand."""
        return self.operands[0].type

    @property
    def result(self) -> TensorType:
        """Type of the first result."""
        return self.results[0].type

    @property
    def key(self) -> str:
        """What lowerings are registered under: the op's name, with the target's name for a custom call."""
        return f"custom_call:{self.attributes['call_target_name']}" if self.name == "stablehlo.custom_call" else self.name

    def reads(self) -> tuple[Value, ...]:
        """Operands and the values captured by regions."""
        if not self.regions:
            return self.operands
        return self.operands + tuple(v for region in self.regions for v in region.captures())

    @property
    def types(self) -> str:
        """`(tensor<4xf32>, tensor<i32>) -> tensor<f32>`, for messages."""
        results = ", ".join(str(v.type) for v in self.results)
        return f"({', '.join(str(v.type) for v in self.operands)}) -> {results}"


def has_effects(step: Step) -> bool:
    """Whether the step does something that its results do not show (a callback, or a loop around one)."""
    if step.attributes.get("has_side_effect"):
        return True
    return any(has_effects(s) for region in step.regions for s in region.steps)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A whole program: the entry function's arguments, steps and results; `donated` lists argument positions that may be consumed.

    `memories` holds the kinds of memory that arguments and results are in (indices into MEMORY_KINDS); either may be empty, for the default. So may
    `layouts`, which holds the layouts of both: None for a row-major one.
    """

    name: str
    body: Region
    donated: tuple[int, ...] = ()
    memories: Memories = ((), ())
    layouts: Layouts = ((), ())
    num_replicas: int = 1
    num_partitions: int = 1

    @property
    def arguments(self) -> tuple[Value, ...]:
        return self.body.arguments

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.body.steps

    @property
    def results(self) -> tuple[Value, ...]:
        return self.body.results
