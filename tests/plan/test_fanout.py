"""Many slices of one array go through blocks, and mean the same."""

import numpy as np
import pytest

from jax_mps.ops.registry import Lowerer
from jax_mps.plan.export import traceable
from jax_mps.plan.fanout import in_blocks
from jax_mps.plan.types import Step, TensorType, Value

ROWS = 400


def slices(bounds, shape=(ROWS, 4)):
    """A step for each (start, limit, stride) along the first axis, of one array."""
    x = Value(TensorType(shape, "int32"))
    steps = []
    for start, limit, stride in bounds:
        kind = TensorType((-(-(limit - start) // stride), *shape[1:]), "int32")
        named = {"start_indices": (start, 0), "limit_indices": (limit, shape[1]), "strides": (stride, 1)}
        steps.append(Step("stablehlo.slice", (x,), (Value(kind),), named))
    return x, steps


ROWS_IN_ORDER = [(i, i + 1, 1) for i in range(ROWS)]
WINDOWS = [(i, min(i + 3, ROWS), 2) for i in reversed(range(ROWS))]
CASES = {"rows": (ROWS_IN_ORDER, 7), "windows": (WINDOWS, 7), "few": (ROWS_IN_ORDER[:256], 0), "nearly all": ([(i, ROWS, 1) for i in range(ROWS)], 0)}


@pytest.mark.parametrize("name", CASES)
def test_in_blocks(name):
    import mlx.core as mx

    from jax_mps.ops import load_all

    load_all()
    bounds, blocks = CASES[name]
    x, steps = slices(bounds)
    assert len(in_blocks(steps)) == len(steps) + blocks
    array = np.arange(ROWS * 4, dtype=np.int32).reshape(ROWS, 4)
    results = traceable(steps, (x,), tuple(s.results[0] for s in steps), Lowerer()).function(mx.array(array))
    for result, (start, limit, stride) in zip(results, bounds, strict=True):
        np.testing.assert_array_equal(np.array(result), array[start:limit:stride])
