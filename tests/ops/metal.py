"""What MLX's Metal backend can compute, and computes right: facts read from its source (0.32), each with the file that it comes from.

`check` holds a graph against them, so that what is lowered for Metal is looked at without a Mac. A primitive or an element type that is not
here fails too: somebody has to look it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

SIGNED = {"int8", "int16", "int32", "int64"}
INTEGERS = SIGNED | {f"u{name}" for name in SIGNED}
FLOATS = {"float16", "bfloat16", "float32"}
REAL = {"bool"} | INTEGERS | FLOATS
ALL = REAL | {"complex64"}


@dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Primitive:
    """One of a graph; `arguments` as MLX writes them to a file. made_by: the primitives that made its inputs, None for the graph's own inputs."""

    name: str
    arguments: Sequence[Any]
    inputs: Sequence[Array]
    outputs: Sequence[Array]
    made_by: Sequence[Primitive | None] = field(repr=False)


# ---- which kernels there are, for which types of the first input ---------------------------------------------------------------------

# complex64 is left out where there is a kernel that is wrong by more than rounding: see RULES
KERNELS: list[tuple[str, set[str], str]] = [
    ("Abs Sign Square Negative", REAL, "kernels/unary.metal"),
    ("Ceil Floor", REAL, "kernels/unary.metal"),
    ("ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh Cosh Sinh Erf ErfInv Expm1 Log1p Round Rsqrt Sigmoid Sqrt Tan Tanh", FLOATS, "kernels/unary.metal"),
    ("Cos Sin Exp Log", FLOATS | {"complex64"}, "kernels/unary.metal"),
    ("Negative", {"complex64"}, "kernels/unary.metal"),
    ("Real Imag", {"complex64"}, "kernels/unary.metal"),
    ("LogicalNot LogicalAnd LogicalOr", {"bool"}, "kernels/unary.metal, binary.metal"),
    ("Add Subtract Multiply Power", ALL, "kernels/binary.metal"),
    ("Equal NotEqual Less LessEqual Greater GreaterEqual", REAL, "kernels/binary.metal"),
    ("Equal NotEqual", {"complex64"}, "kernels/binary.metal"),
    ("Maximum Minimum", ALL, "kernels/binary.metal"),
    ("Divide ArcTan2", FLOATS, "kernels/binary.metal"),
    ("Remainder", INTEGERS | FLOATS, "kernels/binary.metal"),
    ("FloorDivide", INTEGERS, "kernels/binary_ops.h"),
    ("BitwiseBinary", INTEGERS | {"bool"}, "kernels/binary.metal"),
    ("Select", ALL, "kernels/ternary.metal"),
    ("AsType Full Pad Concatenate SliceUpdate DynamicSlice DynamicSliceUpdate", ALL, "kernels/copy.metal"),
    ("Broadcast Reshape Flatten Unflatten ExpandDims Squeeze Transpose Slice Split View AsStrided Depends", ALL, "backend/gpu/primitives.cpp"),
    ("Arange", INTEGERS | FLOATS, "kernels/arange.metal"),
    ("Reduce", ALL, "kernels/reduce.metal"),
    ("ArgReduce", REAL, "kernels/arg_reduce.metal"),
    ("Scan", ALL, "kernels/scan.metal"),
    ("Sort ArgSort Partition", ALL - {"bool"}, "kernels/sort.metal"),
    ("Softmax LogSumExp", FLOATS, "softmax.cpp:17, logsumexp.cpp:16"),
    ("Matmul", FLOATS, "matmul.cpp:1454"),
    ("Convolution", FLOATS, "kernels/conv.metal"),
    ("FFT", {"float32", "complex64"}, "kernels/fft.metal"),
    ("Gather GatherAxis Scatter", ALL, "kernels/indexing"),
    ("CustomKernel", ALL, "custom_kernel.cpp"),
]


def kernel_types() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for names, dtypes, _ in KERNELS:
        for name in names.split():
            found[name] = found.get(name, set()) | dtypes
    return found


# ---- what no kernel does, or does wrong ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """refuses: whether a primitive must not reach Metal. example: a function of no arguments whose graph has such a one."""

    names: str
    refuses: Callable[[Primitive], bool]
    why: str
    source: str
    example: Callable[[], mx.array]


def _moves_back(p: Primitive) -> bool:
    return any(step < 0 for step in p.arguments[-1 if p.name == "Slice" else 3])


def _transformed(p: Primitive) -> int:
    longest = 0
    for axis in p.arguments[0]:
        n = max(p.inputs[0].shape[axis], p.outputs[0].shape[axis])
        longest = max(longest, n if n & (n - 1) == 0 else 1 << (2 * n - 2).bit_length())
    return longest


def _is_in_pairs(p: Primitive) -> bool:
    """Whether lines of real numbers share a transform with others, and not with what was put beside them."""
    maker, shape = p.made_by[0], p.inputs[0].shape
    real = "float32" in (p.inputs[0].dtype, p.outputs[0].dtype)
    put = maker is not None and maker.name == "Concatenate" and len(maker.inputs) == 2 == shape[-2]
    return real and max(shape[-1], p.outputs[0].shape[-1]) <= 4096 and not put


def _winograd(p: Primitive) -> bool:
    strides, _, _, kernel_dilation, input_dilation, groups, flip = p.arguments
    x, w = p.inputs
    plain = set(strides) == set(kernel_dilation) == set(input_dilation) == {1} and groups == 1 and not flip
    return plain and w.shape[1:3] == (3, 3) and len(w.shape) == 4 and x.shape[-1] % 32 == 0 == w.shape[0] % 32


def _longer_at_the_end(p: Primitive) -> bool:
    strides, low, high, _, input_dilation = p.arguments[:5]
    return max(input_dilation) == 1 and any(h > l and s == 1 for s, l, h in zip(strides, low, high, strict=True))


def _sums_in_halves(p: Primitive) -> bool:
    if p.inputs[0].dtype not in ("float16", "bfloat16") or p.arguments[0] not in (_SUM, _PRODUCT):
        return False
    return p.name == "Reduce" or p.inputs[0].shape[p.arguments[1]] > _SHORT_SCAN


_SHORT_SCAN = 16  # which XLA rounds at every step, too


VIEWS = frozenset(["Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Transpose", "Slice", "Split", "View", "Broadcast", "Depends"])


def _may_begin_anywhere(maker: Primitive | None) -> bool:
    """Whether an array is, or is a view of, a slice that begins behind the first element, or an input of the graph."""
    while maker is not None and maker.name in VIEWS:
        if maker.name == "Split" or (maker.name == "Slice" and any(maker.arguments[0])):
            return True
        maker = maker.made_by[0]
    return maker is None


def _ends(x: mx.array) -> mx.array:
    return x[1:]


_SUM, _PRODUCT = 2, 3  # how Reduce, Scan and Scatter combine

RULES: list[Rule] = [
    Rule(
        "Scatter", lambda p: p.outputs[0].itemsize == 8 and not (p.outputs[0].dtype == "complex64" and p.arguments[0] == _SUM),
        "there are no atomics of 8 bytes", "indexing.cpp:233", lambda: mx.zeros((4,), mx.int64).at[mx.array([1])].add(1),
    ),
    Rule(
        "Scatter", lambda p: p.outputs[0].itemsize < 4 and _may_begin_anywhere(p.made_by[0]),
        "words of 4 bytes are written, where a slice that is taken over may begin inside of one", "kernels/atomic.h:238, backend/common/copy.h:30",
        lambda: _ends(mx.zeros((4,), mx.float16) + 1).at[mx.array([1])].add(1),
    ),
    Rule(
        "Gather Scatter", lambda p: len(p.inputs) - (1 if p.name == "Gather" else 2) > 20, "index arrays, at most 20", "indexing.cpp:24",
        lambda: mx.zeros((1,) * 21)[(mx.array([0]),) * 21],
    ),
    Rule(
        "Sort ArgSort Partition", lambda p: len(p.inputs[0].shape) > 2, "rows that lie in another order are mixed up (mlx#4366)", "sort.cpp:45",
        lambda: mx.sort(mx.zeros((2, 3, 4))),
    ),
    Rule("Slice SliceUpdate", _moves_back, "negative strides are reduced and sorted wrongly (mlx#4528)", "reduce.cpp", lambda: mx.zeros((4,))[::-1]),
    Rule("FFT", lambda p: _transformed(p) > 1 << 24, "the largest transform", "fft.cpp:142", lambda: mx.fft.fft(mx.zeros(((1 << 23) + 1,)))),
    Rule(
        "FFT", _is_in_pairs, "two lines are transformed as one: rounding errors, NaN and the imaginary parts of first elements are shared",
        "kernels/fft/readwrite.h", lambda: mx.fft.rfft(mx.zeros((2, 10))),
    ),
    Rule(
        "Convolution", lambda p: p.inputs[0].dtype != "float32" and _winograd(p), "Winograd's algorithm in half types has 40 times the error (mlx#4242)",
        "conv.cpp:1322", lambda: mx.conv2d(mx.zeros((1, 8, 8, 32), mx.bfloat16), mx.zeros((32, 3, 3, 32), mx.bfloat16)),
    ),
    Rule(
        "Reduce Scan", _sums_in_halves, "half types are added up in the type", "kernels/reduction/reduce_row.h:15, kernels/scan.h",
        lambda: mx.sum(mx.zeros((9, 9), mx.bfloat16)),
    ),
    Rule(
        "Matmul", lambda p: math.prod(p.outputs[0].shape) == 1 and any(map(_may_begin_anywhere, p.made_by)),
        "four elements are read at once at an address that is no multiple of their size", "kernels/dot.h:34 (compare matmul.cpp:1325)",
        lambda: mx.matmul(_ends(mx.zeros((9,)) + 1), mx.zeros((8,))),
    ),
    Rule(
        "Convolution", _longer_at_the_end, "the padding at the end is not looked at, what lies behind the input is read",
        "conv.cpp:53 and 940, kernels/conv.metal, depthwise_conv_1d",
        lambda: mx.conv_general(mx.zeros((2, 8, 4)), mx.zeros((4, 3, 1)), padding=([0], [2]), groups=4),
    ),
    Rule(
        "View", lambda p: p.outputs[0].itemsize > p.inputs[0].itemsize and _may_begin_anywhere(p.made_by[0]),
        "a word is read at an address that is no multiple of its size", "backend/gpu/primitives.cpp, View::eval_gpu",
        lambda: _ends(mx.zeros((5,), mx.uint8) + 1).view(mx.uint32),
    ),
    Rule("CustomKernel", lambda p: math.prod(p.arguments[5:8]) > 1024, "threads of a group", "custom_kernel.cpp:81", lambda: _kernel(2048)),
    Rule("CustomKernel", lambda p: len(p.inputs) + len(p.outputs) > 31, "buffers that one kernel binds", "compiled.cpp:246", lambda: _kernel(1, 31)),
]  # fmt: skip


def _kernel(threads: int, inputs: int = 1) -> mx.array:
    names = [f"x{i}" for i in range(inputs)]
    call: Any = mx.fast.metal_kernel("kernel", names, ["y"], "y[0] = x0[0];")
    result: mx.array = call(inputs=[mx.zeros((1,))] * inputs, output_shapes=[(1,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(threads, 1, 1))[0]
    return result


# Scalars that MLX writes wrongly into the source of fused kernels (backend/common/compiled.h: print_float_constant, print_complex_constant).
def is_misprinted(constant: mx.array) -> bool:
    if constant.ndim or constant.dtype not in (mx.float16, mx.bfloat16, mx.float32, mx.complex64):
        return False
    parts = np.array(constant.astype(mx.float32) if constant.dtype != mx.complex64 else constant).reshape(1).view(np.float32)
    return bool((np.signbit(parts) & (parts == 0)).any() or (len(parts) == 2 and not np.isfinite(parts).all()))


# ---- graphs --------------------------------------------------------------------------------------------------------------------------


def graph(function: Callable[..., Any], arguments: Sequence[mx.array]) -> tuple[list[Primitive], list[mx.array]]:
    """The primitives and constants of a function's graph, as it would be exported."""
    found: list[Primitive] = []
    constants: list[mx.array] = []
    makers: dict[str, Primitive] = {}

    def take(item: dict[str, Any]) -> None:
        if item["type"] == "constants":
            constants.extend(value for _, value in item["constants"])
            for name, _ in item["constants"]:
                makers[name] = _CONSTANT
        elif item["type"] == "primitive":
            inputs, outputs = ([Array(tuple(shape), _name(dtype)) for _, shape, dtype in item[side]] for side in ("inputs", "outputs"))
            made = Primitive(item["name"], item["arguments"], inputs, outputs, [makers.get(name) for name, _, _ in item["inputs"]])
            found.append(made)
            makers.update((name, made) for name, _, _ in item["outputs"])

    mx.export_function(take, function, *arguments)
    return found, constants


_CONSTANT = Primitive("constant", (), (), (), ())


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def complaints(function: Callable[..., Any], arguments: Sequence[mx.array]) -> Iterator[str]:
    """What of a function's graph Metal would refuse or get wrong."""
    primitives, constants = graph(function, arguments)
    types = kernel_types()
    for p in primitives:
        dtype = (*p.inputs, *p.outputs)[0].dtype
        if dtype not in types.get(p.name, ()):
            yield f"{p.name} of {dtype}: no kernel that is right is known"
        if any(a.dtype == "float64" for a in (*p.inputs, *p.outputs)):
            yield f"{p.name}: float64 (array.cpp:30)"
        for rule in RULES:
            if p.name in rule.names.split() and rule.refuses(p):
                yield f"{p}: {rule.why} ({rule.source})"
    for constant in constants:
        if is_misprinted(constant):
            yield f"the scalar {constant.item()} (backend/common/compiled.h:20)"
