"""MLIR attributes as plain Python values, under the spec's names and with the spec's defaults."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from jax_mps.plan.types import DTYPES, TensorType, numpy_dtype

_ENUM = re.compile(r"^#(?:stablehlo|chlo|mhlo)<[a-z_]+ ([A-Za-z0-9_]+)>$")
_CHANNEL = re.compile(r"handle = (-?\d+)")
_SHAPED = re.compile(r"^tensor<((?:\d+x)*)(.*?)(?:, (#.*))?>$")


def tensor_type(text: str) -> TensorType:
    """Read an MLIR type's text.

    Raises:
        ValueError: a dynamic dimension, or a type that is no tensor of a known element type.
    """
    if text == "!stablehlo.token":
        return TensorType((), "token")
    match = _SHAPED.match(text)
    if match is None or match[2] not in DTYPES:
        raise ValueError(f"the type {text} is neither a static tensor of a known element type nor a token")
    return TensorType(tuple(int(d) for d in match[1].split("x")[:-1]), DTYPES[match[2]])


def _flat(wrap: Callable[[ir.Attribute], Any], **names: str) -> Callable[[ir.Attribute], dict[str, Any]]:
    """A decoder that spreads a dimension-numbers attribute into the attributes that the spec gives the op."""

    def decode(attribute: ir.Attribute) -> dict[str, Any]:
        numbers = wrap(attribute)
        return {ours: _plain(getattr(numbers, theirs)) for ours, theirs in names.items()}

    return decode


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(int(v) for v in value)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SPREAD: dict[str, Callable[[ir.Attribute], dict[str, Any]]] = {
    "#stablehlo.dot<": _flat(
        stablehlo.DotDimensionNumbers,
        **_same("lhs_batching_dimensions", "rhs_batching_dimensions", "lhs_contracting_dimensions", "rhs_contracting_dimensions"),
    ),
    "#stablehlo.gather<": _flat(
        stablehlo.GatherDimensionNumbers,
        **_same("offset_dims", "collapsed_slice_dims", "operand_batching_dims", "start_indices_batching_dims"),
        **_same("start_index_map", "index_vector_dim"),
    ),
    "#stablehlo.scatter<": _flat(
        stablehlo.ScatterDimensionNumbers,
        **_same("update_window_dims", "inserted_window_dims", "input_batching_dims", "scatter_indices_batching_dims"),
        **_same("index_vector_dim"),
        scatter_dims_to_operand_dims="scattered_dims_to_operand_dims",
    ),
    "#stablehlo.conv<": _flat(
        stablehlo.ConvDimensionNumbers,
        **_same("input_batch_dimension", "input_feature_dimension", "input_spatial_dimensions"),
        **_same("kernel_input_feature_dimension", "kernel_output_feature_dimension", "kernel_spatial_dimensions"),
        **_same("output_batch_dimension", "output_feature_dimension", "output_spatial_dimensions"),
    ),
}


def decode(name: str, attribute: ir.Attribute, text: str) -> dict[str, Any]:
    """One named attribute, as MLIR writes it, as the spec's attribute(s): an enum as its name, an array as a tuple, a dense one as a NumPy array."""
    for prefix, spread in _SPREAD.items():
        if text.startswith(prefix):
            return spread(attribute)
    return {name: value(attribute, text)}


def value(attribute: ir.Attribute, text: str) -> Any:
    """An attribute's plain value; what has none is left as its text."""
    match attribute:
        case ir.BoolAttr():
            return bool(attribute.value)
        case ir.IntegerAttr() | ir.FloatAttr() | ir.StringAttr():
            return attribute.value
        case ir.FlatSymbolRefAttr():
            return attribute.value
        case ir.ArrayAttr():
            return tuple(value(a, str(a)) for a in attribute)
        case ir.DenseI64ArrayAttr() | ir.DenseI32ArrayAttr() | ir.DenseBoolArrayAttr():
            return tuple(attribute)
        case ir.DictAttr():
            return {n.name: value(n.attr, str(n.attr)) for n in attribute}
        case ir.TypeAttr():
            return text
        case ir.UnitAttr():
            return True
        case ir.DenseElementsAttr():
            return dense(text)
    if text.startswith("dense<"):
        return dense(text)
    if (channel := _CHANNEL.search(text)) and text.startswith("#stablehlo.channel_handle"):
        return int(channel[1])
    enum = _ENUM.match(text)
    return enum[1] if enum else text


# ---- dense constants -------------------------------------------------------------------------------------------------------------

_DENSE = re.compile(r"^dense<(.*)> : (tensor<.*>)$", re.DOTALL)
_RESOURCE = re.compile(r"^dense_resource<")


def constant(op: ir.Operation) -> np.ndarray[Any, Any]:
    """The value of a `stablehlo.constant`, shape and dtype included; a splat is a broadcast view of one element.

    The bindings cannot hand out complex, bfloat16, sub-byte or float8 elements, so those are read from the attribute's text.
    """
    result = tensor_type(str(op.results[0].type))
    try:
        attribute = op.attributes["value"]
    except TypeError:  # complex: the bindings refuse to name the attribute's class
        return dense(_constant_text(op))
    if attribute.is_splat and result.size:
        return np.broadcast_to(dense(str(attribute)), result.shape)
    if result.dtype in _BINDINGS_READ:
        return np.array(attribute).astype(numpy_dtype(result.dtype), copy=False).reshape(result.shape)
    return dense(str(attribute))


_BINDINGS_READ = frozenset(["bool", "float16", "float32", "float64"] + [f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64)])


def _constant_text(op: ir.Operation) -> str:
    text = str(op.get_asm(print_generic_op_form=True))
    start = text.index("dense<")
    end = text.rindex("}> : () ->") if "}> : () ->" in text else text.rindex("} : () ->")
    return text[start:end]


def dense(text: str) -> np.ndarray[Any, Any]:
    """Read `dense<...> : tensor<...>`: a list, a splat, or MLIR's hex form of the raw bytes."""
    match = _DENSE.match(text)
    if match is None:
        raise ValueError(f"cannot read the constant {text[:80]}")
    body, kind = match[1], tensor_type(match[2].replace("index>", "i64>"))  # layouts of custom calls are of type index
    dtype = numpy_dtype(kind.dtype)
    if body.startswith('"0x'):
        return _from_hex(body, kind, dtype)
    if not body or kind.size == 0:
        return np.zeros(kind.shape, dtype)
    elements = _complex_elements(body, dtype) if kind.is_complex else [_element(t, dtype) for t in _TOKEN.findall(body)]
    flat = np.array(elements, dtype=dtype)
    return np.broadcast_to(flat[0], kind.shape) if flat.size == 1 else flat.reshape(kind.shape)


_TOKEN = re.compile(r"[^\s,\[\]()]+")


def _element(token: str, dtype: np.dtype[Any]) -> Any:
    if token in ("true", "false"):
        return token == "true"
    if dtype.kind in "iub" and "int" in dtype.name:
        return np.array(int(token, 0)).astype(dtype)[()]
    if token.startswith("0x"):  # the bits of a float that has no decimal form
        bits = np.array(int(token, 16), dtype=f"uint{8 * dtype.itemsize}")
        return bits.view(dtype)[()]
    return np.array(float(token)).astype(dtype)[()]


def _complex_elements(body: str, dtype: np.dtype[Any]) -> list[Any]:
    part = np.dtype("float32") if dtype == np.complex64 else np.dtype("float64")
    parts = [_element(t, part) for t in _TOKEN.findall(body)]
    return [np.array([re_, im], part).view(dtype)[0] for re_, im in zip(parts[::2], parts[1::2], strict=True)]


def _from_hex(body: str, kind: TensorType, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    raw = bytes.fromhex(body[3:-1])
    if kind.dtype == "bool" and len(raw) < kind.size and len(raw) != 1:  # bit-packed in some versions, a byte each in others
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: kind.size]
        return bits.astype(bool).reshape(kind.shape)
    flat = np.frombuffer(raw, np.uint8).astype(bool) if kind.dtype == "bool" else np.frombuffer(raw, dtype)
    if flat.size == 1:
        return np.broadcast_to(flat[0], kind.shape)
    return flat.reshape(kind.shape)
