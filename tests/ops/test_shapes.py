"""Ops that rearrange elements by static rules."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mps.errors import Unsupported

from .harness import Case, check, check_both, run_on_mlx

DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"]


def values(*shape, dtype="float32"):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return (np.arange(np.prod(shape, dtype=int)) % 101).reshape(shape).astype(kind)


def in_dim(shape, dimensions):
    return lambda x: lax.broadcast_in_dim(x, shape, dimensions)


def module(op, result, *arguments, attributes=""):
    """A module of one function of one op."""
    names = ["%x", "%a", "%b", "%c", "%d"][: len(arguments)]
    types = [f"tensor<{kind}>" for kind in arguments]
    signature = ", ".join(f"{name}: {kind}" for name, kind in zip(names, types, strict=True))
    body = f"%r = stablehlo.{op} {', '.join(names)}{attributes} : ({', '.join(types)}) -> tensor<{result}>"
    return f"func.func @main({signature}) -> tensor<{result}> {{\n  {body}\n  return %r : tensor<{result}>\n}}"


CASES = [
    Case("broadcast_scalar", in_dim((3, 4), ()), (np.float32(2.5),)),
    Case("broadcast_leading", in_dim((3, 4), (1,)), (values(4),)),
    Case("broadcast_trailing", in_dim((3, 4), (0,)), (values(3),)),
    Case("broadcast_stretch", in_dim((3, 4, 5), (0, 2)), (values(1, 5),)),
    Case("broadcast_empty", in_dim((0, 4), (1,)), (values(4),)),
    Case("broadcast_rank_0", in_dim((), ()), (np.int32(4),)),
    Case("broadcast_unsorted", module("broadcast_in_dim", "4x5x3xf32", "3x4xf32", attributes=", dims = [2, 0]"), (values(3, 4),)),
    Case("reshape", lambda x: x.reshape(6, 2), (values(3, 4),)),
    Case("reshape_scalar", lambda x: x.reshape(()), (values(1, 1),)),
    Case("reshape_from_scalar", lambda x: x.reshape(1, 1, 1), (np.float32(1),)),
    Case("reshape_empty", lambda x: x.reshape(3, 0, 2), (values(0, 4),)),
    Case("reshape_transposed", lambda x: x.T.reshape(-1), (values(3, 4),)),
    Case("transpose", lambda x: x.transpose(2, 0, 1), (values(2, 3, 4),)),
    Case("transpose_rank_0", lambda x: lax.transpose(x, ()), (np.float32(1),)),
    Case("transpose_empty", lambda x: x.T, (values(3, 0),)),
    Case("transpose_rank_20", lambda x: x.transpose(*range(19, -1, -1)), (values(*([1, 2] * 6 + [1] * 8)),)),
    Case("concatenate", lambda x, y: jnp.concatenate([x, y, x], axis=1), (values(2, 3), values(2, 1))),
    Case("concatenate_empty_parts", lambda x, y: jnp.concatenate([y, x, y], axis=0), (values(2, 3), values(0, 3))),
    Case("concatenate_all_empty", lambda x: jnp.concatenate([x, x], axis=0), (values(0, 3),)),
    Case("concatenate_one", lambda x: lax.concatenate([x], 0), (values(3),)),
    Case("concatenate_many", lambda x: jnp.concatenate([x[i : i + 1] for i in range(63, -1, -1)]), (values(64),)),
    Case("reverse", lambda x: x[::-1], (values(5, 3),)),
    Case("reverse_all", lambda x: lax.rev(x, (0, 1, 2)), (values(2, 3, 4),)),
    Case("reverse_then_use", lambda x: jnp.sort(x[:, ::-1] * 2, axis=1).sum(axis=1), (values(4, 5),)),
    Case("reverse_of_transpose", lambda x: jnp.flip(x.T, 0) + 1, (values(3, 4),)),
    Case("reverse_rank_0", lambda x: lax.rev(x, ()), (np.float32(1),)),
    Case("reverse_empty", lambda x: x[::-1], (values(0, 2),)),
    Case("pad", lambda x, v: lax.pad(x, v, ((1, 2, 0), (0, 1, 0))), (values(3, 4), np.float32(9))),
    Case("pad_interior", lambda x, v: lax.pad(x, v, ((0, 0, 2), (1, 1, 1))), (values(3, 4), np.float32(9))),
    Case("pad_negative", lambda x, v: lax.pad(x, v, ((-1, -1, 0), (-2, 3, 0))), (values(4, 5), np.float32(9))),
    Case("pad_negative_interior", lambda x, v: lax.pad(x, v, ((-1, -2, 1), (-2, 2, 2))), (values(4, 5), np.float32(9))),
    Case("pad_away", lambda x, v: lax.pad(x, v, ((-3, 4, 0),)), (values(3), np.float32(9))),
    Case("pad_between", lambda x, v: lax.pad(x, v, ((-1, -2, 3),)), (values(2), np.float32(9))),
    Case("pad_empty", lambda x, v: lax.pad(x, v, ((2, 1, 1), (0, 0, 0))), (values(0, 2), np.float32(9))),
    Case("pad_to_empty", lambda x, v: lax.pad(x, v, ((-1, -1, 0),)), (values(2), np.float32(9))),
    Case("pad_rank_0", lambda x, v: lax.pad(x, v, ()), (np.float32(1), np.float32(9))),
    Case("pad_grad", jax.grad(lambda x, v: (lax.pad(x, v, ((-1, 2, 1),)) ** 2).sum(), (0, 1)), (values(4), np.float32(9))),
    Case("iota_f16_exact", lambda: lax.iota(jnp.float16, 5000)),
    Case("iota_bf16_exact", lambda: lax.iota(jnp.bfloat16, 5000)),
    Case("iota_wraps", lambda: lax.iota(jnp.int8, 300)),
    Case("iota_complex", lambda: lax.broadcasted_iota(jnp.complex64, (3, 4), 1)),
    Case("iota_rank_3", lambda: lax.broadcasted_iota(jnp.float32, (3, 4, 2), 1)),
    Case("iota_empty", lambda: lax.broadcasted_iota(jnp.int32, (0, 4), 1)),
    Case("get_dimension_size", module("get_dimension_size", "i32", "3x4xf32", attributes=", dim = 1"), (values(3, 4),)),
    *[Case(f"iota_{dtype}", lambda dtype=dtype: lax.broadcasted_iota(jnp.dtype(dtype), (2, 5), 1)) for dtype in DTYPES[1:]],
    *[Case(f"pad_{dtype}", lambda x: lax.pad(x, x[0, 0], ((1, 0, 1), (-1, 1, 0))), (values(3, 4, dtype=dtype),)) for dtype in DTYPES],
    *[Case(f"views_{dtype}", lambda x: jnp.concatenate([x.T[::-1], x.reshape(4, 3)], 1), (values(3, 4, dtype=dtype),)) for dtype in DTYPES],
]

WIDE = [
    Case("iota_int64", lambda: lax.iota(jnp.int64, 5)),
    Case("iota_uint64", lambda: lax.broadcasted_iota(jnp.uint64, (2, 3), 0)),
    *[Case(f"pad_{d}", lambda x: lax.pad(x, x[0], ((1, 0, 1),)), (np.array([2**62 + 1, 3, 2**53 + 1], d),)) for d in ("int64", "uint64")],
]

# XLA's CPU client refuses the dynamic ops: the same thing, said statically, is the reference.
DYNAMIC = [
    (
        Case("dynamic_reshape", module("dynamic_reshape", "2x6xf32", "3x4xf32", "2xi32"), (values(3, 4), np.array([2, 6], np.int32))),
        lambda x, s: x.reshape(2, 6),
    ),
    (
        Case(
            "dynamic_broadcast_in_dim",
            module("dynamic_broadcast_in_dim", "2x3xf32", "3xf32", "2xi32", attributes=", dims = [1]"),
            (values(3), np.array([2, 3], np.int32)),
        ),
        lambda x, s: np.broadcast_to(x, (2, 3)),
    ),
    (
        Case("dynamic_iota", module("dynamic_iota", "2x3xf32", "2xi32", attributes=", dim = 1"), (np.array([2, 3], np.int32),)),
        lambda s: np.broadcast_to(np.arange(3, dtype=np.float32), (2, 3)),
    ),
    (
        Case(
            "dynamic_pad",
            module("dynamic_pad", "6x6xf32", "3x4xf32", "f32", "2xi32", "2xi32", "2xi32"),
            (values(3, 4), np.float32(9), np.array([1, -1], np.int32), np.array([-2, 3], np.int32), np.array([2, 0], np.int32)),
        ),
        lambda x, v, *_: np.asarray(lax.pad(x, v, ((1, -2, 2), (-1, 3, 0)))),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case):
    """Same result as XLA, before and after export."""
    check_both(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_64_bits(case):
    """64-bit integers are exact."""
    with jax.enable_x64(True):
        check(case)


@pytest.mark.parametrize(("case", "static"), DYNAMIC, ids=lambda row: str(row) if isinstance(row, Case) else "")
def test_dynamic(case, static):
    """A shape operand at run time, a static result type."""
    (got,) = run_on_mlx(case)
    np.testing.assert_array_equal(got, static(*case.args))


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith(("reverse", "views"))], ids=str)
def test_reverse_on_metal(case, monkeypatch):
    """Without views of negative stride."""
    monkeypatch.setattr("jax_mps.ops.shapes.device_kind", lambda: "metal")
    check_both(case)


def test_set_dimension_size():
    """A size known only at run time is refused."""
    program = module("set_dimension_size", "4xf32", "4xf32", "i32", attributes=", dim = 0")
    with pytest.raises(Unsupported, match="size is known only at run time"):
        run_on_mlx(Case("set", program, (values(4), np.int32(2))))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=3))
def test_pad_property(rows):
    """Every mix of low, high and interior padding places each element where the spec says."""
    kept = [(n, lo, max(hi, -(n + lo + max(n - 1, 0) * step)), step) for n, lo, hi, step in rows]
    x = values(*(n for n, *_ in kept)) + 1
    config = tuple(row[1:] for row in kept)
    (got,) = run_on_mlx(Case("pad", lambda x: lax.pad(x, np.float32(-1), config), (x,)))
    want = np.full(got.shape, -1, np.float32)
    for index in np.ndindex(x.shape):
        place = tuple(lo + i * (step + 1) for i, (_, lo, _, step) in zip(index, kept, strict=True))
        if all(0 <= p < d for p, d in zip(place, want.shape, strict=True)):
            want[place] = x[index]
    np.testing.assert_array_equal(got, want)
