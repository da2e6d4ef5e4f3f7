"""MLX's element types by the names that plans use."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

MX: dict[str, mx.Dtype] = {
    "bool": mx.bool_, "token": mx.bool_,
    "int8": mx.int8, "int16": mx.int16, "int32": mx.int32, "int64": mx.int64,
    "uint8": mx.uint8, "uint16": mx.uint16, "uint32": mx.uint32, "uint64": mx.uint64,
    "float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32, "complex64": mx.complex64,
}  # fmt: skip

UNSIGNED: dict[str, mx.Dtype] = {"int8": mx.uint8, "int16": mx.uint16, "int32": mx.uint32, "int64": mx.uint64}
BITS: dict[str, int] = {"bool": 1, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64}
BITS |= {"float16": 16, "bfloat16": 16, "float32": 32, "complex64": 64}


def mx_array(value: np.ndarray[Any, Any], dtype: str) -> mx.array:
    """A fresh, row-contiguous MLX array of a NumPy array in a device dtype (bfloat16 goes over as bits: MLX refuses ml_dtypes' views)."""
    dense = np.ascontiguousarray(value).reshape(value.shape)
    if dtype == "bfloat16":
        return mx.array(dense.view(np.uint16)).view(mx.bfloat16)
    return mx.array(dense, dtype=MX[dtype])


def literal(value: np.ndarray[Any, Any], dtype: str) -> mx.array:
    """A constant of a program. MLX writes a 0-d one into the source of a fused kernel, but -0 as 0, and of complex ones NaN and infinity as
    words that a compiler need not know (0.32.4): those are views of arrays of one element."""
    if value.ndim == 0 and dtype in ("float16", "bfloat16", "float32", "complex64"):
        parts = np.asarray(value).reshape(1).astype(np.complex64 if dtype == "complex64" else np.float32).view(np.float32)
        if (np.signbit(parts) & (parts == 0)).any() or (dtype == "complex64" and not np.isfinite(parts).all()):
            return mx.reshape(mx_array(np.asarray(value).reshape(1), dtype), ())
    return mx_array(value, dtype)
