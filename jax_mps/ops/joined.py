"""The same elementwise steps for several arrays on CUDA, in one kernel of our own: optimizers update a hundred small parameters by one formula, and MLX
starts a kernel for each, which takes the host longer than the GPU."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from jax_mps.ops.cuda_kernel import cuda_kernel
from jax_mps.ops.cuda_text import HEADER, MEMORY, REGISTER, load, store
from jax_mps.ops.dtypes import MX
from jax_mps.ops.registry import Run, lowers
from jax_mps.plan.types import Step

_THREADS = 256
_SPAN = 4 * _THREADS  # elements of a block

# MLX gives each result of a kernel a list of its inputs and one of the other results: 15 ns an entry, to make, evaluate and free (CPU, MLX 0.32.4). A kernel
# of so many entries costs the host what three kernels do.
_MOST_ENTRIES = 1400
_MOST_POINTERS = 400  # of 8 bytes: CUDA hands 4 KiB to a kernel


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is computed for one element of a member's arrays.

    lines: C++, a variable each; constants: how many floats each member has of its own, `c0`, ...; numbers: the types of numbers in memory, `q0`, ...;
    arrays: of arrays, `x0`, ...; results: the type of each and the variable that holds it; shared: the places of numbers that all members read.
    """

    lines: tuple[str, ...]
    constants: int
    numbers: tuple[str, ...]
    arrays: tuple[str, ...]
    results: tuple[tuple[str, str], ...]
    shared: frozenset[int] = frozenset()

    @property
    def most(self) -> int:
        """How many members one kernel has at most."""
        read, written = len(self.numbers) - len(self.shared) + len(self.arrays), len(self.results)
        entries = math.isqrt(_MOST_ENTRIES // (written * (read + written)))
        return min(entries, (_MOST_POINTERS - 2 - len(self.shared)) // (read + written))

    def variables(self) -> list[tuple[str, str]]:
        """The names and types of what each member has of its own: numbers, arrays, results."""
        names = (("q", self.numbers), ("x", self.arrays), ("y", tuple(dtype for dtype, _ in self.results)))
        return [(f"{letter}{i}", dtype) for letter, dtypes in names for i, dtype in enumerate(dtypes) if letter != "q" or i not in self.shared]


def source(recipe: Recipe, members: int) -> str:
    """The kernel's body. sizes = (each member's first block, each member's elements)."""
    names = recipe.variables()
    lines = ["uint32_t member = 0;", f"for (int k = 1; k < {members}; k++) member += blockIdx.x >= sizes[k];"]
    lines += [f"{'' if name[0] == 'y' else 'const '}{MEMORY[dtype]}* __restrict__ {name}_at;" for name, dtype in names]
    lines.append("switch (member) {")
    for k in range(members):
        label = f"case {k}:" if k + 1 < members else "default:"
        lines.append("  ".join([label, *(f"{name}_at = {name}_{k};" for name, _ in names), "break;"]))
    lines.append("}")
    lines += [f"{REGISTER[dtype]} q{i} = {load(dtype, f'q{i}_at[0]')};" for i, dtype in enumerate(recipe.numbers)]
    lines += [f"float c{i} = constants[member * {recipe.constants} + {i}];" for i in range(recipe.constants)]
    lines += [
        f"uint32_t first = (blockIdx.x - sizes[member]) * {_SPAN}, size = sizes[{members} + member];",
        f"uint32_t end = first + {_SPAN} < size ? first + {_SPAN} : size;",
        f"for (uint32_t i = first + threadIdx.x; i < end; i += {_THREADS}) {{",
    ]
    lines += [f"  {REGISTER[dtype]} {name} = {load(dtype, f'{name}_at[i]')};" for name, dtype in names if name[0] == "x"]
    lines += [f"  {line}" for line in recipe.lines]
    lines += [f"  y{i}_at[i] = {store(dtype, name)};" for i, (dtype, name) in enumerate(recipe.results)]
    return "\n".join([*lines, "}"])


def inputs(recipe: Recipe, members: int) -> list[str]:
    """The names of what a kernel reads, in order."""
    of_each = [name for name, _ in recipe.variables() if name[0] != "y"]
    return ["sizes", "constants", *(f"q{i}_at" for i in sorted(recipe.shared)), *(f"{name}_{k}" for k in range(members) for name in of_each)]


@functools.cache
def _kernel(recipe: Recipe, members: int) -> Callable[..., list[mx.array]]:
    outputs = [f"y{i}_{k}" for k in range(members) for i in range(len(recipe.results))]
    text = source(recipe, members)
    name = f"jax_joined_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return cuda_kernel(name, inputs(recipe, members), outputs, text, header=HEADER if "jax_" in text else "")


def table(sizes: Sequence[int]) -> tuple[list[int], int]:
    """The kernel's `sizes` for members of so many elements; and how many blocks it has."""
    starts = [0, *itertools.accumulate(-(-size // _SPAN) for size in sizes)]
    return [*starts[:-1], *sizes], starts[-1]


@lowers("jax_mps.joined")
def joined(op: Step) -> Run:
    """Operands: what any member reads, once; order: which of them the kernel reads, in its order; constants: each member's. Results: each member's."""
    recipe, members, constants = op.recipe, op.members, op.constants
    step = len(recipe.results)
    sizes, blocks = table([v.type.size for v in op.results[::step]])
    shapes, dtypes = [v.shape for v in op.results], [MX[v.dtype] for v in op.results]

    def run(*operands: mx.array) -> list[mx.array]:
        return _kernel(recipe, members)(
            inputs=[mx.array(sizes, mx.uint32), mx.array(constants or [0.0], mx.float32), *(operands[i] for i in op.order)],
            output_shapes=shapes,
            output_dtypes=dtypes,
            grid=(_THREADS * blocks, 1, 1),
            threadgroup=(_THREADS, 1, 1),
        )

    return run
