"""The plan: a small SSA form of StableHLO in plain Python values.

A `Plan` holds no MLIR object, so it can be rewritten, cut into segments, printed back as StableHLO and shown to a user long after
the module it came from is gone. Nothing here knows of MLX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

# NumPy's name of an element type -> MLIR's. Tokens are carried as a scalar bool.
MLIR_NAMES: dict[str, str] = {
    "bool": "i1", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "uint8": "ui8", "uint16": "ui16", "uint32": "ui32", "uint64": "ui64",
    "int2": "i2", "int4": "i4", "uint2": "ui2", "uint4": "ui4",
    "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64",
    "complex64": "complex<f32>", "complex128": "complex<f64>",
    "float4_e2m1fn": "f4E2M1FN", "float6_e2m3fn": "f6E2M3FN", "float6_e3m2fn": "f6E3M2FN",
    "float8_e3m4": "f8E3M4", "float8_e4m3": "f8E4M3", "float8_e4m3b11fnuz": "f8E4M3B11FNUZ", "float8_e4m3fn": "f8E4M3FN",
    "float8_e4m3fnuz": "f8E4M3FNUZ", "float8_e5m2": "f8E5M2", "float8_e5m2fnuz": "f8E5M2FNUZ", "float8_e8m0fnu": "f8E8M0FNU",
    "token": "token",
}  # fmt: skip
DTYPES: dict[str, str] = {mlir: name for name, mlir in MLIR_NAMES.items()}

# What MLX computes on every device; all others are host dtypes (DESIGN.md).
DEVICE_DTYPES: frozenset[str] = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    + ["float16", "bfloat16", "float32", "complex64", "token"]
)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype (ml_dtypes for what NumPy lacks) of an element type's name."""
    if dtype == "token":
        return np.dtype(bool)
    extended = getattr(ml_dtypes, dtype, None)
    return np.dtype(extended if extended is not None else dtype)


@dataclass(frozen=True, slots=True)
class TensorType:
    """A static shape and an element type, named as NumPy and ml_dtypes name it ("float32", "bool", "int4", "token")."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the dense array in host memory (a sub-byte element takes one byte)."""
        return self.size * numpy_dtype(self.dtype).itemsize

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def is_complex(self) -> bool:
        return self.dtype.startswith("complex")

    @property
    def is_unsigned(self) -> bool:
        return self.dtype.startswith("uint")

    @property
    def is_integer(self) -> bool:
        return self.dtype.startswith(("int", "uint"))

    @property
    def is_signed(self) -> bool:
        return self.dtype.startswith("int")

    def __str__(self) -> str:
        """The type in MLIR's words: `tensor<2x3xf32>`."""
        if self.dtype == "token":
            return "!stablehlo.token"
        return f"tensor<{''.join(f'{d}x' for d in self.shape)}{MLIR_NAMES[self.dtype]}>"


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


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A whole program: the entry function's arguments, steps and results; `donated` lists argument positions that may be consumed."""

    name: str
    body: Region
    donated: tuple[int, ...] = ()
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
