"""Every row of the op tables in the form for CUDA can be exported: an op that MLX cannot write to a file costs a program its entry on disk, and time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.kernels import lower_for

from jax_mps.errors import Unsupported
from jax_mps.ops import arrivals, columns, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry
from jax_mps.rewrites import row_kernels as islands

from .harness import Case, lowered
from .test_metal import PROGRAMS, TABLES, rows

UPDATES = Case("updates", lambda xs: [lax.cumsum(x) * np.float32(0.1) + 1 for x in xs], ([np.ones(n, np.float32) for n in (3, 5, 7, 9)],))
HEADS = Case(
    "heads",
    jax.grad(lambda x, w: jnp.tanh(jax.nn.dot_product_attention(*jnp.split((x @ w).reshape(2, 8, 6, 64), 3, 2))).sum()),
    (np.ones((2, 8, 16), np.float32), np.ones((16, 384), np.float32)),
)
UNPACKED = Case(
    "unpacked",
    jax.grad(lambda x, w: jnp.tanh(jax.nn.dot_product_attention(*(x @ w).reshape(2, 8, 3, 2, 64).transpose(2, 0, 1, 3, 4))).sum(), 1),
    (np.ones((2, 8, 16), np.float32), np.ones((16, 384), np.float32)),
)


def no_kernel(*key: Any) -> Callable[..., list[mx.array]]:
    """In the place of a kernel of ours, which only CUDA can make: results of its shapes that depend on what it reads."""

    def kernel(*, inputs: list[mx.array], output_shapes: list[Any], output_dtypes: list[mx.Dtype], **how: Any) -> list[mx.array]:
        first = mx.max(inputs[-1])
        return [mx.broadcast_to(first.astype(dtype), shape) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return kernel


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    lower_for("cuda", monkeypatch)
    for module in (arrivals, columns, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry):
        monkeypatch.setattr(module, "_kernel", no_kernel)
    for module in (columns, norm_rows):
        monkeypatch.setattr(module, "_FEWEST", 0)
    for least in ("_FEWEST", "_FEWEST_ROWS", "_FEWEST_COLUMNS"):
        monkeypatch.setattr(islands, least, 1)


def export(case: Case, wide: bool, path: Path) -> str:
    """Why MLX cannot; nothing where it can, or the host would run it."""
    with jax.enable_x64(wide):
        try:
            _, function, arguments = lowered(case, rewritten=True)
            mx.export_function(str(path), function, *arguments)
        except Unsupported:
            return ""
        except ValueError as error:
            return f"{case}: {error}"
    return ""


@pytest.mark.parametrize("module", TABLES, ids=lambda m: m.__name__.rpartition("test_")[2])
def test_the_tables(module: ModuleType, on_cuda: None, tmp_path: Path) -> None:
    cases = list(rows(module))
    assert cases
    assert [why for case, wide in cases if (why := export(case, wide, tmp_path / "f.mlxfn"))] == []


@pytest.mark.parametrize("case", [*PROGRAMS, UPDATES, HEADS, UNPACKED], ids=str)
def test_programs(case: Case, on_cuda: None, tmp_path: Path) -> None:
    """Parts of models, as they are rewritten."""
    assert export(case, False, tmp_path / "f.mlxfn") == ""


def test_what_cannot_be_exported_is_seen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="serialize"):
        mx.export_function(str(tmp_path / "f.mlxfn"), mx.contiguous, mx.zeros((2, 3)).T)
