"""What rewrites of several steps into one share: looking through broadcasts, finding reductions along rows, and replacing whole groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_mps.ops.bodies import folds
from jax_mps.plan.types import Region, Step, Value
from jax_mps.rewrites.table import Scope

_SPREADING = ("stablehlo.broadcast_in_dim", "stablehlo.reshape")
_DEEPEST = 16
_LARGEST_SPLAT = 4096  # elements that are compared; splats are stored as one


def origin(value: Value, scope: Scope) -> tuple[Value, list[int | None]]:
    """What broadcasts and reshapes spread into `value`; and for each dimension of `value`, the dimension of the origin that it runs along.

    None for a dimension along which the origin is repeated, or whose size is 1. Only reshapes that add or drop such dimensions are looked through,
    and sums along them.
    """
    dims: list[int | None] = [d if size > 1 else None for d, size in enumerate(value.shape)]
    while (step := scope.maker(value, *_SPREADING, "stablehlo.reduce")) is not None:
        source = step.operands[0]
        if step.name == "stablehlo.reduce" and not changes_nothing(step, scope):
            break
        if step.name == "stablehlo.broadcast_in_dim":
            back = {d: i for i, d in enumerate(step.broadcast_dimensions) if source.shape[i] > 1}
        else:
            long, source_long = ([d for d, size in enumerate(v.shape) if size != 1] for v in (value, source))
            if [value.shape[d] for d in long] != [source.shape[d] for d in source_long]:
                return value, dims
            back = dict(zip(long, source_long, strict=True))
        dims = [None if d is None else back.get(d) for d in dims]
        value = source
    return value, dims


def changes_nothing(step: Step, scope: Scope) -> bool:
    """Whether a reduction is a sum along dimensions of size 1, as the gradients of broadcasts are."""
    if len(step.results) != 1 or any(step.operand.shape[d] != 1 for d in step.dimensions):
        return False
    return folds(step.regions[0]) == ("add",) and splat(step.operands[1], scope) == 0.0


def row_origin(value: Value, lead: Sequence[int], scope: Scope) -> Value | None:
    """The value of shape `lead`, or `lead` and a 1, whose elements stand in `value` once for each row: along the leading dimensions as they
    are, repeated along the last; None if `value` is not spread like this. `value` may itself be that."""
    source, dims = origin(value, scope)
    if tuple(source.shape) not in (tuple(lead), (*lead, 1)):
        return None
    rows = len(lead)
    if tuple(value.shape[:rows]) != tuple(lead) or value.type.rank not in (rows, rows + 1):
        return None
    return source if dims == [d if size > 1 else None for d, size in enumerate(lead)] + [None] * (value.type.rank - rows) else None


def row_origin_rounded(value: Value, lead: Sequence[int], scope: Scope) -> Value | None:
    """`row_origin`, looking through conversions between floats as well: half types are summed in float32 and rounded."""
    while True:
        row = row_origin(value, lead, scope)
        step = scope.maker(value if row is None else row, "stablehlo.convert")
        if step is None or not step.operand.is_floating or not step.result.is_floating:
            return row
        value = step.operands[0]


def splat(value: Value, scope: Scope) -> Any:
    """The one element of a constant all of whose elements are equal, as a Python number; None if it is none."""
    constant = scope.constant(value)
    if constant is None or constant.size == 0:
        return None
    stored = constant[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in constant.strides)]
    first = stored.reshape(-1)[:1]
    if stored.size > _LARGEST_SPLAT or not bool(np.all(stored == first)):
        return None
    return first.item() if first.dtype.kind != "V" else float(first.astype(np.float32)[0])


def row_reduction(value: Value, fold: str, scope: Scope) -> Value | None:
    """What `value` is the fold of along its last axis ("add", "maximum"), from the fold's neutral element; None if it is not that."""
    step = scope.maker(value, "stablehlo.reduce")
    if step is None or len(step.results) != 1 or tuple(step.dimensions) != (step.operand.rank - 1,):
        return None
    neutral = 0.0 if fold == "add" else -np.inf
    return step.operands[0] if folds(step.regions[0]) == (fold,) and splat(step.operands[1], scope) == neutral else None


def same(a: Value, b: Value, scope: Scope, depth: int = 0) -> bool:
    """Whether two values are computed by equal steps from the same values (JAX repeats itself: the mask of a softmax is applied twice)."""
    a, b = _unconverted(a, scope), _unconverted(b, scope)
    if a is b:
        return True
    x, y = scope.producers.get(a), scope.producers.get(b)
    if x is None or y is None or depth == _DEEPEST or x.name != y.name or a.type != b.type or len(x.results) != 1:
        return False
    if not x.name.startswith(("stablehlo.", "chlo.")) or _fold_of(x) != _fold_of(y):
        return False
    if x.name == "stablehlo.constant":
        return bool(np.array_equal(x.value, y.value)) or x.value.tobytes() == y.value.tobytes()
    if x.text is None or x.text != y.text or len(x.operands) != len(y.operands):
        return False
    return all(same(p, q, scope, depth + 1) for p, q in zip(x.operands, y.operands, strict=True))


def _fold_of(step: Step) -> Any:
    """Nothing for a step without regions, the fold of a reduction, and for any other region something that equals nothing."""
    if not step.regions:
        return None
    return folds(step.regions[0]) if step.name == "stablehlo.reduce" and folds(step.regions[0]) else object()


def _unconverted(value: Value, scope: Scope) -> Value:
    """The value before conversions to the type that it has."""
    while (step := scope.maker(value, "stablehlo.convert")) is not None and step.operand == value.type:
        value = step.operands[0]
    return value


_COMMUTATIVE = frozenset(["add", "multiply", "maximum", "minimum", "xor", "or", "and"])


class Numbers:
    """Expressions, each with one number: equal expressions have equal numbers, up to the order of operands of commutative ops."""

    def __init__(self) -> None:
        self.table: dict[tuple[object, ...], int] = {}

    def of(self, name: str, *operands: object) -> int:
        key = (name, *sorted(operands, key=repr)) if name in _COMMUTATIVE else (name, *operands)
        return self.table.setdefault(key, len(self.table))

    def of_value(self, value: Value, leaf: Value, scope: Scope) -> int | None:
        """The number of an elementwise expression over `leaf` and constants that are splats; None if it is anything else."""
        return self._of_value(value, {leaf: self.of("leaf")}, scope)

    def _of_value(self, value: Value, known: dict[Value, int | None], scope: Scope) -> int | None:
        if value in known:
            return known[value]
        known[value] = None
        constant = splat(value, scope)
        step = scope.producers.get(value)
        if constant is not None:
            known[value] = self.of("constant", constant)
        elif step is not None and step.name.startswith("stablehlo.") and not step.regions and all(v.shape == value.shape for v in step.operands):
            operands = [self._of_value(v, known, scope) for v in step.operands]
            if None not in operands and (step.name == "stablehlo.compare" or not step.attributes):
                how = (step.comparison_direction,) if step.name == "stablehlo.compare" else ()
                known[value] = self.of(step.name.removeprefix("stablehlo."), *how, *operands)
        return known[value]


def fuse(name: str, step: Step, operands: Sequence[Value], scope: Scope, attributes: Mapping[str, Any] | None = None, *, shared: bool = False) -> Step | None:
    """One step for all that leads from `operands` to `step`'s results; None if others read what would no longer be computed.

    The steps that it replaces stay in the attribute `original`, for the host, as a region whose arguments are the operands. What these read
    besides, of the values that the operands were made from (a mask), become further operands. shared: the others who read are known to be
    replaced as well.
    """
    nearby = {v for operand in operands if (maker := scope.producers.get(operand)) for v in maker.operands}
    original, more = _between(step, frozenset(operands), nearby, scope)
    if not original or (not shared and _leaks(original, scope)):
        return None
    read = (*operands, *more)
    given = {**(attributes or {}), "original": Region(read, original, step.results)}
    return Step(name, read, step.results, given, location=step.location, text=())


def _between(step: Step, operands: frozenset[Value], nearby: set[Value], scope: Scope) -> tuple[tuple[Step, ...], tuple[Value, ...]]:
    """The steps from `operands` to `step`, in order, and what of `nearby` they read; nothing if they read anything else that is not constant."""
    found: dict[Step, None] = {}
    more: dict[Value, None] = {}
    waiting = [(step, False)]
    while waiting:
        current, ready = waiting.pop()
        if ready:
            found.setdefault(current)
            continue
        if current in found:
            continue
        waiting.append((current, True))
        for value in current.operands:
            if value in operands:
                continue
            maker = scope.producers.get(value)
            if value in nearby and not (maker is not None and _is_constant(maker, scope)):
                more.setdefault(value)
            elif maker is None:
                return (), ()
            else:
                waiting.append((maker, False))
    return tuple(found), tuple(more)


def _leaks(original: Sequence[Step], scope: Scope) -> bool:
    """Whether a value that is computed on the way is read elsewhere (constants may be)."""
    inside: dict[Value, int] = {}
    for step in original:
        for value in step.operands:
            inside[value] = inside.get(value, 0) + 1
    free = {v for step in original if _is_constant(step, scope) for v in step.results}
    return any(scope.reads(v) != inside.get(v, 0) for step in original[:-1] for v in step.results if v not in free)


def _is_constant(step: Step, scope: Scope) -> bool:
    return step.name == "stablehlo.constant" or (step.name in _SPREADING and scope.constant(step.operands[0]) is not None)
