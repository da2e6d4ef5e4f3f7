"""Shifts and counts against XLA's CPU backend: shifts by the width and beyond, negative ones, every integer type."""

import jax
import mlx.core as mx
import numpy as np
import pytest
from jax import lax

from jax_mps.ops import bits
from jax_mps.plan.types import Step, TensorType, Value

from .harness import Case, check, check_exported
from .test_elementwise import INTEGERS, each, edges, pairs

SHIFTS = each(lax.shift_left, lax.shift_right_arithmetic, lax.shift_right_logical)
LOGIC = each(lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor)
COUNTS = each(lax.bitwise_not, lax.population_count, lax.clz)

CASES = [
    *(Case(f"shifts_{d}", SHIFTS, pairs(d)) for d in INTEGERS),
    *(Case(f"logic_{d}", LOGIC, pairs(d)) for d in INTEGERS),
    *(Case(f"counts_{d}", COUNTS, (edges(d),)) for d in INTEGERS),
    Case("logic_bool", each(LOGIC, lambda x, y: lax.bitwise_not(x)), pairs("bool")),
    Case("scalar", each(SHIFTS, lambda x, y: COUNTS(x)), (np.int32(-7), np.int32(33))),
    Case("empty", each(SHIFTS, lambda x, y: COUNTS(x)), (np.zeros((0, 2), np.uint8),) * 2),
    Case("rotation", lambda x: (x << 13) | lax.shift_right_logical(x, np.uint32(19)), (edges("uint32"),)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_xla(case):
    with jax.enable_x64(True):
        check(case)
        check_exported(case)


def test_counts_of_every_byte():
    x = np.arange(256, dtype=np.uint8)
    assert np.array(bits.popcnt(mx.array(x))).tolist() == [int(n).bit_count() for n in x]
    assert np.array(bits.count_leading_zeros(mx.array(x))).tolist() == [8 - int(n).bit_length() for n in x]


@pytest.mark.parametrize("name", ["shift_left", "shift_right_logical", "shift_right_arithmetic"])
def test_amounts_known_to_be_in_range(name):
    """With the attribute that a rewrite sets, the result is the general form's."""
    value = Value(TensorType((5,), "int16"))
    x, s = mx.array([1, -1, -32768, 32767, 12], dtype=mx.int16), mx.array([0, 15, 3, 7, 1], dtype=mx.int16)
    plain, checked = (bits.shift(Step(f"stablehlo.{name}", (value, value), (value,), a)) for a in ({"in_range": True}, {}))
    assert plain(x, s).tolist() == checked(x, s).tolist()
    assert plain(x, s).dtype == mx.int16
