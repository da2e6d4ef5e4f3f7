"""Ops over one more leading dimension: what a loop's body computes in one iteration, for many of them at once.

Rows of a product whose other side is the same for all become rows of one large product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jax_mps.ops.products import TINY
from jax_mps.ops.registry import is_elementwise
from jax_mps.plan.loops import renamed
from jax_mps.plan.types import Step, TensorType, Value, has_effects

# Ops that move elements, or repeat them: MLX makes views of most, and what reads one may as well read its operand.
VIEWS = frozenset(f"stablehlo.{name}" for name in ("broadcast_in_dim", "reshape", "transpose", "slice"))
_OTHERS = VIEWS | {"stablehlo.concatenate", "stablehlo.reverse"}


def is_pure(step: Step) -> bool:
    """Whether a step is one that could be computed elsewhere: one result, of operands alone."""
    if len(step.results) != 1 or has_effects(step):
        return False
    return is_elementwise(step.name) or step.name in _OTHERS or step.name in ("stablehlo.dot_general", "stablehlo.reduce", "stablehlo.iota")


def can_batch(step: Step, is_row: Callable[[Value], bool]) -> bool:
    """Whether a pure step has a form for many iterations, where its operands that are rows differ between them and the others do not."""
    match step.name:
        case "stablehlo.dot_general":
            lhs, rhs = map(is_row, step.operands)
            return lhs != rhs and all(v.type.size for v in (*step.operands, *step.results)) and (lhs or step.attributes.get("algorithm") is None)
        case "stablehlo.reduce":
            return len(step.operands) == 2 and not is_row(step.operands[1]) and not step.regions[0].captures()
        case name if name in _OTHERS:
            return True
        case _:
            return is_elementwise(step.name) and not step.regions and all(v.shape in (step.result.shape, ()) for v in step.operands)


class Batch:
    """Writes the steps of `count` iterations. `rows` maps what is known of them: a value of the body -> one of shape (count, *shape); `same` says what
    stands for a value that is the same in all.
    """

    def __init__(self, count: int, rows: Mapping[Value, Value], same: Callable[[Value], Value]) -> None:
        self.count, self.rows, self.same = count, dict(rows), same
        self.steps: list[Step] = []
        self.made: dict[Value, Step] = {}

    def add(self, step: Step) -> None:
        """The step for all iterations."""
        match step.name:
            case "stablehlo.dot_general":
                row = self._product(step)
            case "stablehlo.broadcast_in_dim":
                row = self._spread(self.rows[step.operands[0]], step.result, step.broadcast_dimensions)
            case "stablehlo.reshape":
                row = self.reshaped(self.rows[step.operands[0]], (self.count, *step.result.shape))
            case "stablehlo.transpose":
                row = self.transposed(self.rows[step.operands[0]], (0, *_after(step.permutation)))
            case "stablehlo.slice":
                starts, limits, strides = (0, *step.start_indices), (self.count, *step.limit_indices), (1, *step.strides)
                row = self.sliced(self.rows[step.operands[0]], starts, limits, strides)
            case "stablehlo.concatenate":
                dimension = step.dimension + 1
                row = self._write(replace(step, attributes={"dimension": dimension}, text=(("dimension", f"{dimension} : i64"),)), self._full(step))
            case "stablehlo.reverse":
                row = self.reversed(self.rows[step.operands[0]], _after(step.dimensions))
            case "stablehlo.reduce":
                row = self._reduced(step)
            case _:
                row = self._write(step, self._full(step))
        self.rows[step.results[0]] = row

    # ---- views, which are not written where they change nothing -------------------------------------------------------------------

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        made = self.made.get(value)
        source = made.operands[0] if made is not None and made.name == "stablehlo.reshape" else value
        return source if source.shape == tuple(shape) else self.step("stablehlo.reshape", (source,), shape)

    def transposed(self, value: Value, permutation: Sequence[int]) -> Value:
        made = self.made.get(value)
        if made is not None and made.name == "stablehlo.transpose":
            value, permutation = made.operands[0], [made.permutation[d] for d in permutation]
        if list(permutation) == sorted(permutation):
            return value
        return self.step("stablehlo.transpose", (value,), [value.shape[d] for d in permutation], permutation=permutation)

    def reversed(self, value: Value, dimensions: Sequence[int]) -> Value:
        return self.step("stablehlo.reverse", (value,), value.shape, dimensions=dimensions)

    def sliced(self, value: Value, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Value:
        shape = [-(-(limit - start) // stride) for start, limit, stride in zip(starts, limits, strides, strict=True)]
        if value.shape == tuple(shape):
            return value
        return self.step("stablehlo.slice", (value,), shape, start_indices=starts, limit_indices=limits, strides=strides)

    def step(self, name: str, operands: tuple[Value, ...], shape: Sequence[int], **arrays: Sequence[int]) -> Value:
        """A step of the operands' element type whose attributes are arrays of integers."""
        named = {n: tuple(numbers) for n, numbers in arrays.items()}
        text = tuple((n, _array(numbers)) for n, numbers in named.items())
        return self._write(Step(name, operands, (Value(TensorType(tuple(shape), operands[0].dtype)),), named, text=text), operands, whole=True)

    # ---- the rest -----------------------------------------------------------------------------------------------------------------

    def _write(self, step: Step, operands: tuple[Value, ...], *, whole: bool = False) -> Value:
        result = step.results[0] if whole else Value(self._longer(step.result))
        self.steps.append(replace(step, operands=operands, results=(result,)))
        self.made[result] = self.steps[-1]
        return result

    def _longer(self, kind: TensorType) -> TensorType:
        return TensorType((self.count, *kind.shape), kind.dtype)

    def _spread(self, value: Value, kind: TensorType, dimensions: Sequence[int]) -> Value:
        return self.step("stablehlo.broadcast_in_dim", (value,), (self.count, *kind.shape), broadcast_dimensions=(0, *_after(dimensions)))

    def _full(self, step: Step) -> tuple[Value, ...]:
        """The operands, each with the leading dimension; a scalar beside larger ones is spread, or left as it is where it is the same for all."""
        full = []
        for value in step.operands:
            row = self.rows.get(value)
            scalar = not value.shape and bool(step.result.shape)
            if row is not None:
                full.append(self._spread(row, step.result, ()) if scalar else row)
            elif scalar:
                full.append(self.same(value))
            else:
                dimensions, shape = tuple(range(1, 1 + value.type.rank)), (self.count, *value.shape)
                full.append(self.step("stablehlo.broadcast_in_dim", (self.same(value),), shape, broadcast_dimensions=dimensions))
        return tuple(full)

    def _reduced(self, step: Step) -> Value:
        dimensions = tuple(_after(step.dimensions))
        changed = replace(step, attributes={**step.attributes, "dimensions": dimensions}, text=_with(step.text, dimensions=_array(dimensions)))
        return self._write(renamed(changed, {}), (self.rows[step.operands[0]], self.same(step.operands[1])))

    def _product(self, step: Step) -> Value:
        """Rows first: where the right side has them, the product of exchanged operands."""
        left = step.operands[0] in self.rows
        sides = ("lhs", "rhs") if left else ("rhs", "lhs")
        row, other = step.operands if left else step.operands[::-1]
        (rb, rc), (ob, oc) = ([step.attributes[f"{s}_{kind}_dimensions"] for kind in ("batching", "contracting")] for s in sides)
        free, others = _free(row, rb, rc), _free(other, ob, oc)
        batch = [row.shape[d] for d in rb]
        numbers = {
            "lhs_batching_dimensions": _after(rb), "rhs_batching_dimensions": tuple(ob),
            "lhs_contracting_dimensions": _after(rc), "rhs_contracting_dimensions": tuple(oc),
        }  # fmt: skip
        precision = tuple(step.precision_config if left else step.precision_config[::-1])
        shape = (*batch, self.count, *free, *others)
        product = self._multiply(step, (self.rows[row], self.same(other)), shape, numbers, precision)
        b, f = len(batch), len(free)
        rank = product.type.rank
        front, middle, last = range(b), range(b + 1, b + 1 + f), range(b + 1 + f, rank)
        return self.transposed(product, (b, *front, *middle, *last) if left else (b, *front, *last, *middle))

    def summed_product(self, step: Step) -> Value:
        """The sum of a product over all iterations."""
        numbers = {name: _after(step.attributes[name]) for name in ("lhs_batching_dimensions", "rhs_batching_dimensions")}
        numbers |= {name: (0, *_after(step.attributes[name])) for name in ("lhs_contracting_dimensions", "rhs_contracting_dimensions")}
        lhs, rhs = (self.rows[v] for v in step.operands)
        return self._multiply(step, (lhs, rhs), step.result.shape, numbers, tuple(step.precision_config))

    def _multiply(
        self, step: Step, operands: tuple[Value, Value], shape: tuple[int, ...], numbers: Mapping[str, tuple[int, ...]], precision: tuple[str, ...]
    ) -> Value:
        """A larger product in place of many like the step."""
        lhs, rhs = step.operands
        contracting = step.lhs_contracting_dimensions
        free = (_free(lhs, step.lhs_batching_dimensions, contracting), _free(rhs, step.rhs_batching_dimensions, step.rhs_contracting_dimensions))
        if sum(map(math.prod, free)) * math.prod(lhs.shape[d] for d in contracting) < TINY:
            precision = ("HIGHEST", "HIGHEST")  # as a tiny product has in any case
        text = (("dot_dimension_numbers", _dot_text(numbers)), ("precision_config", _precision_text(precision)))
        made = replace(
            step,
            results=(Value(TensorType(shape, step.result.dtype)),),
            attributes={**step.attributes, **numbers, "precision_config": precision},
            text=(*text, *(pair for pair in step.text or () if pair[0] == "algorithm")),
        )
        return self._write(made, operands, whole=True)


def _after(dimensions: Iterable[int]) -> tuple[int, ...]:
    return tuple(d + 1 for d in dimensions)


def _free(value: Value, batching: Sequence[int], contracting: Sequence[int]) -> list[int]:
    return [size for d, size in enumerate(value.shape) if d not in batching and d not in contracting]


def _array(numbers: Sequence[int]) -> str:
    return f"array<i64: {', '.join(map(str, numbers))}>" if numbers else "array<i64>"


def _with(text: tuple[tuple[str, str], ...] | None, **changed: str) -> tuple[tuple[str, str], ...] | None:
    return None if text is None else tuple((name, changed.get(name, said)) for name, said in text)


def _dot_text(numbers: Mapping[str, Any]) -> str:
    return f"#stablehlo.dot<{', '.join(f'{name} = {list(dims)}' for name, dims in numbers.items() if dims)}>"


def _precision_text(precision: Sequence[str]) -> str:
    return f"[{', '.join(f'#stablehlo<precision {p}>' for p in precision)}]"
