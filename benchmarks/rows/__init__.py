"""All rows, in the table's order. `rows(small)`: small is for CPUs."""

from __future__ import annotations

from benchmarks.harness import Row
from benchmarks.rows import copies, gpt, indexing, linalg, loops, products, recurrent, resnet, tiny


def rows(small: bool) -> list[Row]:
    """Every row at one of two sizes."""
    modules = (tiny, copies, products, resnet, gpt, recurrent, loops, indexing, linalg)
    return [row for module in modules for row in module.rows(small)]
