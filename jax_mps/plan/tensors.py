"""Element types and static shapes. Nothing here knows of MLX or of plans: a program that is read back needs no more of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"] + ["float16", "bfloat16", "float32", "complex64", "token"]
)

# What JAX calls the memories of a device, the default first. All of them are the one that MLX has.
MEMORY_KINDS = ("device", "pinned_host", "unpinned_host")

Memories = tuple[tuple[int, ...], tuple[int, ...]]
Layout = tuple[int, ...]  # the dimensions in the order in which they lie in memory, fastest first
Layouts = tuple[tuple[Layout | None, ...], tuple[Layout | None, ...]]


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy's dtype (ml_dtypes for what NumPy lacks) of an element type's name."""
    if dtype == "token":
        return np.dtype(bool)
    extended = getattr(ml_dtypes, dtype, None)
    return np.dtype(extended if extended is not None else dtype)


class TensorType(NamedTuple):
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
