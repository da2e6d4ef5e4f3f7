"""Layer and RMS normalisation along the last axis, and their gradients, as one step each: MLX has one kernel for a norm with its scale and bias, and one
for the gradients of rows and scale.

What JAX emits depends on how the variance is written, where the scale comes in, what is rounded, and what else the rows are read by. So no form is
matched: every step that leads from the rows is read as a polynomial (rewrites/polynomials.py), and what it computes must be the polynomial of a norm or
of a gradient. The cotangents of other readers of the rows may be added before the gradient is complete; they become operands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from jax_mps.ops.bodies import folds
from jax_mps.plan.types import Region, Step, Value
from jax_mps.rewrites import polynomials
from jax_mps.rewrites.match import fuse, origin, splat
from jax_mps.rewrites.polynomials import CLOSE, Monomial, Polynomial, add, equal, has_root, is_of_elements, monomial, row_sum, sum_symbol
from jax_mps.rewrites.table import Scope

ROOTS = frozenset(["stablehlo.rsqrt", "stablehlo.sqrt"])

_C: Monomial = (("C", 1),)
_NORMALISED: Monomial = (("C", 1), ("R", 1))
_SQUARE: Polynomial = {(("R", -2),): 1.0}  # mean(C^2) + eps
_LONGEST = 1 << 19  # elements of a row: of longer ones, n and n - 1 are too close to tell apart


@dataclass(frozen=True, slots=True)
class _Part:
    """A value that is a sum times factor R^power weights."""

    value: Value
    factor: float
    power: int
    weights: Monomial


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that are normalised, and what each value made of them is. axes: a row's dimensions. symbols: the arrays that the names of other operands
    stand for. parts: by the symbol of whole rows, the values that are it times a power of R and weights.

    truths: of comparisons with a variance that was kept from below 0; clamped: these variances. scales: the steps that sum up
    C R g over all rows, by g.
    """

    x: Value
    axes: tuple[int, ...]
    centred: bool
    eps: float
    known: dict[Value, Polynomial] = field(default_factory=dict)
    symbols: dict[str, Value] = field(default_factory=dict)
    truths: dict[Value, bool] = field(default_factory=dict)
    clamped: set[Value] = field(default_factory=set)
    scales: dict[Value, Step] = field(default_factory=dict)
    parts: dict[str, list[_Part]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return math.prod(self.x.shape[d] for d in self.axes)

    @property
    def kept(self) -> list[int]:
        """The dimensions along which there is a row after the other."""
        return [d for d in range(self.x.type.rank) if d not in self.axes]

    @property
    def is_last(self) -> bool:
        return self.axes == (self.x.type.rank - 1,)

    def polynomial(self, value: Value, scope: Scope) -> Polynomial | None:
        """What a value is; an array of the rows' shape that is not made of them is a symbol."""
        if value in self.known:
            return self.known[value]
        constant = splat(value, scope)
        if constant is not None:
            return {(): float(constant)} if value.type.is_floating and constant else {} if value.type.is_floating else None
        if not value.type.is_floating:
            return None
        if value.shape == self.x.shape:
            return self.symbol(value, scope)
        return self.weight(value, list(range(value.type.rank)), scope) if _is_one_a_row(value.shape, self) else None

    def opaque(self, value: Value, polynomial: Polynomial, scope: Scope) -> Polynomial:
        """A symbol for an array that is known, unless it has one number for each row or in all."""
        return self.symbol(value, scope) if any(is_of_elements(s) for term in polynomial for s, _ in term) else polynomial

    def symbol(self, value: Value, scope: Scope) -> Polynomial:
        source, dims = origin(value, scope)
        if source is not value and not any(dims[d] is not None for d in self.axes) and any(d is not None for d in dims):
            return self.weight(value, _long(self.x.shape), scope)
        vector = _vector(value, scope) if self.is_last else None
        named = wide_origin(value, scope) if vector is None else vector
        name = f"{'u' if vector is None else 'v'}{named.number}"
        self.symbols[name] = named
        return {((name, 1),): 1.0}

    def weight(self, value: Value, dims: list[int], scope: Scope) -> Polynomial:
        """A symbol for an array with one number for each row, whatever spreads it."""
        source, at = origin(value, scope)
        name = f"w{source.number}:{[at[d] for d in dims if at[d] is not None]}"
        self.symbols.setdefault(name, value)
        return {((name, 1),): 1.0}


def norms(steps: Sequence[Step], scope: Scope) -> list[Step]:
    """One step for each norm, with as much of scale and bias as nobody else reads without: operands rows, scale, bias."""
    found: list[Step] = []
    inside: set[Step] = set()
    for step, rows in reversed([(step, rows) for step, rows in _readings(steps, scope) if step.result.shape == rows.x.shape and rows.is_last]):
        affine = None if step in inside else _affine(rows.known[step.results[0]], rows)
        if affine is None:
            continue
        given = {"eps": rows.eps, "scaled": "scale" in affine, "shifted": "bias" in affine}
        whole = fuse("jax_mps.layer_norm" if rows.centred else "jax_mps.rms_norm", step, [rows.x, *affine.values()], scope, given)
        if whole is not None:
            found.append(whole)
            inside.update(whole.original.steps)
    return found


def _affine(polynomial: Polynomial, rows: _Rows) -> dict[str, Value] | None:
    """Scale and bias, as far as there are any, of C R scale + bias; None if it is not that."""
    found: dict[str, Value] = {}
    normalised = False
    for term, factor in (polynomials.settled(polynomial) or {}).items():
        vectors = tuple(part for part in term if part[0][0] == "v")
        rest = tuple(part for part in term if part[0][0] != "v")
        if abs(factor - 1) > CLOSE or rest not in ((), _NORMALISED) or not term or [power for _, power in vectors] not in ([], [1]):
            return None
        normalised = normalised or rest == _NORMALISED
        if vectors:
            found["scale" if rest else "bias"] = rows.symbols[vectors[0][0]]
    if not normalised or ("bias" in found and not (rows.centred and "scale" in found)):
        return None
    return {name: found[name] for name in ("scale", "bias") if name in found}


def norm_gradients(steps: Sequence[Step], scope: Scope) -> list[Step]:
    """One step for each norm whose rows' gradient is computed here: operands rows, cotangent, scale if any, what is added; results the gradient of
    the rows, and that of the scale if it is computed too."""
    place = {v: i for i, step in enumerate(steps) for v in step.results}
    sums = {(s.operands[0], tuple(sorted(s.dimensions))): s for s in steps if s.name == "stablehlo.reduce"}
    found: list[Step] = []
    for step, rows in _readings(steps, scope):
        gradient = None
        if step.name == "stablehlo.add" and step.result.shape == rows.x.shape:
            gradient = _gradient(step, rows, scope, place) if rows.is_last else _channel_gradient(step, rows, scope, place, sums)
        if gradient is not None:
            found.append(gradient)
            del rows.known[step.results[0]]  # to others it is any array
    return found


# ---- rows, and the steps that lead from them -----------------------------------------------------------------------------------------


def _readings(steps: Sequence[Step], scope: Scope) -> Iterator[tuple[Step, _Rows]]:
    """The steps of which it is known what they compute from rows that are normalised, in order."""
    seeds: dict[Value, _Rows] = {}
    for found in _normalised_rows(steps, scope):
        seeds.setdefault(found.x, found)
    owners = dict(seeds)
    for step in steps if seeds else ():
        owned = {id(rows): rows for v in step.operands if (rows := owners.get(v)) is not None and v in rows.known}
        if len(owned) != 1 or len(step.results) != 1 or step.results[0] in seeds:
            continue
        (rows,) = owned.values()
        if _read(step, rows, scope):
            owners[step.results[0]] = rows
            yield step, rows


def _normalised_rows(steps: Sequence[Step], scope: Scope) -> Iterator[_Rows]:
    """What the roots in these steps are taken of. What is guessed wrongly here leads to no gradient."""
    for step in steps:
        total = scope.maker(step.operands[0], "stablehlo.add") if step.name in ROOTS else None
        for spread, constant in (total.operands, total.operands[::-1]) if total else ():
            eps = splat(constant, scope)
            if isinstance(eps, float) and eps > 0 and (squared := _squared(spread, scope)):
                value, centred, axes = squared
                difference = scope.maker(value, "stablehlo.subtract")
                if not centred and difference is not None and splat(difference.operands[1], scope) is None:
                    value, centred = difference.operands[0], True
                x = wide_origin(value, scope)
                if x.type.is_floating and len(axes) <= x.type.rank and 1 < math.prod(x.shape[d] for d in axes if d < x.type.rank) < _LONGEST:
                    one: Polynomial = {_C: 1.0, (("M", 1),): 1.0} if centred else {_C: 1.0}
                    yield _Rows(x, axes, centred, eps, {x: one})


def _squared(spread: Value, scope: Scope) -> tuple[Value, bool, tuple[int, ...]] | None:
    """v, where the spread is the mean of v^2; True if something is subtracted from that; along which dimensions."""
    centred, axes = False, ()
    while (step := scope.producers.get(spread)) is not None:
        if step.name in ("stablehlo.multiply", "chlo.square"):
            return (step.operands[0], centred, axes) if step.operands[0] is step.operands[-1] and axes else None
        if step.name not in _PASSED:
            return None
        centred = centred or step.name == "stablehlo.subtract"
        axes = tuple(sorted(step.dimensions)) if step.name == "stablehlo.reduce" and not axes else axes
        bounded = step.name == "stablehlo.maximum" and splat(step.operands[0], scope) == 0.0
        spread = step.operands[1 if bounded or step.name == "stablehlo.select" else 0]
    return None


_PASSED = frozenset(f"stablehlo.{n}" for n in ("broadcast_in_dim", "reshape", "convert", "divide", "maximum", "reduce", "select", "subtract"))


def wide_origin(value: Value, scope: Scope) -> Value:
    """Before conversions to a wider float."""
    while (step := scope.maker(value, "stablehlo.convert")) is not None and step.operand.is_floating and step.operand.dtype in _HALF:
        value = step.operands[0]
    return value


_HALF = ("float16", "bfloat16")


def _vector(value: Value, scope: Scope) -> Value | None:
    """A line as long as the last axis that is repeated along all the others."""
    source, dims = origin(value, scope)
    size = value.shape[-1] if value.shape else 0
    if source.type.size != size or size < 2 or dims[:-1] != [None] * (value.type.rank - 1) or dims[-1] is None:
        return None
    return source


# ---- what a step computes ------------------------------------------------------------------------------------------------------------


def _read(step: Step, rows: _Rows, scope: Scope) -> bool:
    """Note what a step computes, if that is known."""
    result = step.results[0]
    if step.name == "stablehlo.compare":
        truth = _truth(step, rows, scope)
        if truth is not None:
            rows.truths[result] = truth
            rows.known[result] = {}
        return truth is not None
    reader = _READERS.get(step.name)
    polynomial = reader(step, rows, scope) if reader and result.type.is_floating else None
    if polynomial is not None:
        rows.known[result] = polynomial
        if len(polynomial) == 1:
            _note_part(result, polynomial, rows)
    return polynomial is not None


def _note_part(value: Value, polynomial: Polynomial, rows: _Rows) -> None:
    """Whether a value is the mean or a sum of a row, perhaps scaled, or its root or the reciprocal of that."""
    ((term, factor),) = polynomial.items()
    sums = [part for part in term if part[0][0] in "MS"]
    power = sum(power for symbol, power in term if symbol == "R")
    if len(sums) + len([part for part in term if part[0][0] in "Rw"]) != len(term) or not _is_one_a_row(value.shape, rows):
        return
    weights = tuple(part for part in term if part[0][0] == "w")
    if [power for _, power in sums] == [1]:
        rows.parts.setdefault(sums[0][0], []).append(_Part(value, factor, power, weights))
    elif term in ((("R", 1),), (("R", -1),)) and abs(factor - 1) < CLOSE:
        rows.parts.setdefault("R", []).append(_Part(value, 1.0, power, ()))


def _sum_of_two(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    p, q = (rows.polynomial(v, scope) for v in step.operands)
    if p and q and has_root(p) != has_root(q):  # what comes from another reader of the rows is added as it is, and may well be made of them
        p, q = (one if has_root(one) else rows.opaque(v, one, scope) for v, one in zip(step.operands, (p, q), strict=True))
    return None if p is None or q is None else add(p, q, 1.0 if step.name == "stablehlo.add" else -1.0)


def _product(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    p, q = rows.polynomial(step.operands[0], scope), rows.polynomial(step.operands[-1], scope)
    return None if p is None or q is None else polynomials.multiply(p, q)


def _quotient(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    p, q = (rows.polynomial(v, scope) for v in step.operands)
    over = None if q is None else polynomials.inverse(q)
    return None if p is None or over is None else polynomials.multiply(p, over)


def _negation(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    return {term: -factor for term, factor in rows.known[step.operands[0]].items()}


def _same(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    """A conversion between floats, or what only adds or repeats dimensions, each row's number along its row."""
    source, result = step.operands[0], step.results[0]
    if not source.type.is_floating:
        return None
    if source.shape == result.shape:
        kept = step.name != "stablehlo.broadcast_in_dim" or list(step.broadcast_dimensions) == list(range(source.type.rank))
        return rows.known[source] if kept else None
    if not _is_one_a_row(source.shape, rows) or not (result.shape == rows.x.shape or _is_one_a_row(result.shape, rows)):
        return None
    if step.name == "stablehlo.broadcast_in_dim":
        places = [step.broadcast_dimensions[d] for d in _long(source.shape)]
        if places != ([d for d in rows.kept if rows.x.shape[d] != 1] if result.shape == rows.x.shape else _long(result.shape)):
            return None
    elif step.name == "stablehlo.reshape" and result.shape == rows.x.shape:
        return None
    return rows.known[source]


def _long(shape: tuple[int, ...]) -> list[int]:
    return [d for d, size in enumerate(shape) if size != 1]


def _is_one_a_row(shape: tuple[int, ...], rows: _Rows) -> bool:
    return [s for s in shape if s != 1] == [rows.x.shape[d] for d in rows.kept if rows.x.shape[d] != 1]


def _reduction(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    """A sum along the rows, or along dimensions of size 1; sums over all rows are noted."""
    source = step.operands[0]
    if not is_sum(step, scope) or source not in rows.known:
        return None
    summed = [d for d in _long(source.shape) if d in step.dimensions]
    if rows.is_last and source.shape == rows.x.shape and summed == _long(rows.x.shape[:-1]) and step.dimensions:
        _note_scale(step, rows.known[source], rows)
    if not summed:
        return rows.known[source] if _is_one_a_row(source.shape, rows) else None
    if source.shape != rows.x.shape or summed != [d for d in rows.axes if source.shape[d] != 1]:
        return None
    return row_sum(rows.known[source], rows.size, rows.eps, centred=rows.centred)


def _note_scale(step: Step, polynomial: Polynomial, rows: _Rows) -> None:
    """Whether it is the sum of C R g over all rows."""
    ((term, factor), *others) = polynomial.items() or [((), 0.0)]
    symbols = dict(term)
    if not others and abs(factor - 1) < CLOSE and symbols.pop("C", 0) == 1 and symbols.pop("R", 0) == 1 and list(symbols.values()) == [1]:
        rows.scales.setdefault(rows.symbols[next(iter(symbols))], step)


def _root(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    if not equal(rows.known[step.operands[0]], _SQUARE):
        return None
    return {(("R", 1 if step.name == "stablehlo.rsqrt" else -1),): 1.0}


def _maximum(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    """A variance that rounding may have made less than 0."""
    for value, bound in (step.operands, step.operands[::-1]):
        if splat(bound, scope) == 0.0 and _is_variance(rows.known.get(value, {}), rows):
            rows.clamped.add(step.results[0])
            return rows.known[value]
    return None


def _is_variance(polynomial: Polynomial, rows: _Rows) -> bool:
    return equal(add(polynomial, {(): rows.eps}), _SQUARE)


_ABOVE = {"GT": True, "GE": True, "NE": True, "EQ": False, "LT": False, "LE": False}  # of a number above 0, compared with 0
_TURNED = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}


def _truth(step: Step, rows: _Rows, scope: Scope) -> bool | None:
    """What a comparison of a variance with 0, or with itself kept from below 0, says of rows that are not all the same."""
    direction = step.comparison_direction
    for one, other, how in ((*step.operands, direction), (*step.operands[::-1], _TURNED.get(direction, direction))):
        varies = one in rows.clamped or _is_variance(rows.known.get(one, {}), rows)
        if varies and splat(other, scope) == 0.0:
            return _ABOVE[how]
        if varies and other in rows.clamped and how == "EQ":
            return True
    return None


def _choice(step: Step, rows: _Rows, scope: Scope) -> Polynomial | None:
    """Of numbers, by what is known of all rows but those that are all the same; or by a constant."""
    truth = rows.truths.get(step.operands[0])
    if truth is None:
        always = splat(step.operands[0], scope)
        return None if always is None else rows.polynomial(step.operands[1 if always else 2], scope)
    chosen = rows.polynomial(step.operands[1 if truth else 2], scope)
    if chosen is None or any(symbol not in "TZ" for term in chosen for symbol, _ in term):
        return None
    return polynomials.multiply(chosen, {(("T", 1),): 1.0}) if chosen else {(("Z", 1),): 1.0}


_READERS = {
    "stablehlo.add": _sum_of_two,
    "stablehlo.subtract": _sum_of_two,
    "stablehlo.multiply": _product,
    "chlo.square": _product,
    "stablehlo.divide": _quotient,
    "stablehlo.negate": _negation,
    "stablehlo.convert": _same,
    "stablehlo.broadcast_in_dim": _same,
    "stablehlo.reshape": _same,
    "stablehlo.reduce": _reduction,
    "stablehlo.rsqrt": _root,
    "stablehlo.sqrt": _root,
    "stablehlo.maximum": _maximum,
    "stablehlo.select": _choice,
}


# ---- the gradient --------------------------------------------------------------------------------------------------------------------


def _gradient(step: Step, rows: _Rows, scope: Scope, place: Mapping[Value, int]) -> Step | None:
    """The step that computes `step`'s result, if that is the gradient of the rows; and the gradient of the scale, if all is there by then."""
    matched = _matched(rows.known[step.results[0]], rows)
    g, scale = _factors(matched[0], rows, scope) if matched and not matched[1] else (None, None)
    if matched is None or g is None:
        return None
    operands = [rows.x, g, *([] if scale is None else [scale]), *matched[2]]
    given = {"norm": "layer_norm" if rows.centred else "rms_norm", "eps": rows.eps, "scaled": scale is not None, "added": len(matched[2]), "sums": ()}
    whole = fuse("jax_mps.norm_gradient", step, operands, scope, given, shared=True)
    summed = rows.scales.get(g) if scale is not None else None
    return whole if whole is None or summed is None else with_sum(whole, "scale", summed, (rows.x, g), scope, place) or whole


def with_sum(whole: Step, name: str, summed: Step, operands: Sequence[Value], scope: Scope, place: Mapping[Value, int]) -> Step | None:
    """The gradient with a sum over all rows as one more result; None where what it reads is not there by the first of its results."""
    other = fuse(whole.name, summed, operands, scope, shared=True)
    if other is None:
        return None
    read = (*whole.operands, *(v for v in other.operands if v not in whole.operands and v not in whole.results))
    results = (*whole.results, *summed.results)
    first = min(place[v] for v in results)
    if any(place.get(v, -1) >= first for v in read):
        return None
    original = Region(read, tuple(dict.fromkeys((*whole.original.steps, *other.original.steps))), results)
    return replace(whole, operands=read, results=results, attributes={**whole.attributes, "sums": (*whole.sums, name), "original": original})


def _factors(u: Monomial, rows: _Rows, scope: Scope) -> tuple[Value | None, Value | None]:
    """The cotangent and the scale that u is the product of; no scale if it is none. Of a single row, both are vectors."""
    arrays = [rows.symbols[s] for s, _ in u]
    if any(power != 1 for _, power in u) or len(arrays) > 2 or not (u[0][0][0] == "u" or rows.x.type.size == rows.size):
        return None, None
    if len(arrays) == 2:
        return (arrays[0], arrays[1]) if u[1][0][0] == "v" else (None, None)
    product = scope.maker(arrays[0], "stablehlo.multiply")
    pairs = (product.operands, product.operands[::-1]) if product else ()
    found = [(wide_origin(g, scope), scale) for g, weight in pairs if (scale := _vector(weight, scope)) is not None]
    return next((pair for pair in found if pair[0] in rows.scales), found[0] if found else (arrays[0], None))


def _channel_gradient(step: Step, rows: _Rows, scope: Scope, place: Mapping[Value, int], sums: Mapping[tuple[Value, tuple[int, ...]], Step]) -> Step | None:
    """Of batch norm and others not along the last dimension alone, from the sums that the gradients of scale and bias are: one pass over the rows.

    sums: reductions, by what they reduce and along which dimensions.
    """
    matched = _matched(rows.known[step.results[0]], rows)
    if matched is None or len(matched[0]) != 1 or matched[0][0][1] != 1 or not rows.centred:
        return None
    u, weights, added = matched
    array = rows.symbols[u[0][0]]
    root = next(iter(rows.parts.get("R", ())), None)
    mean = next((p for p in rows.parts.get("M", ()) if not p.power and not p.weights and abs(p.factor - 1) < CLOSE), None)
    product = next((p for p in rows.parts.get(sum_symbol(monomial((*_C, *u))), ()) if p.weights in ((), weights)), None)
    if root is None or mean is None or product is None:
        return None
    known = [mean.value, root.value, product.value]
    total = sums.get((array, rows.axes))
    if total is not None and (not is_sum(total, scope) or place[total.results[0]] > place[step.results[0]]):
        total = None
    operands = [rows.x, array, *known, *(total.results if total else ()), *(rows.symbols[s] for s, _ in weights), *added]
    given = {
        "axes": rows.axes, "eps": rows.eps, "clamped": bool(rows.clamped), "summed": total is not None, "weights": tuple(p for _, p in weights),
        "root": root.power, "factor": product.factor, "power": product.power, "weighted": bool(product.weights), "added": len(added),
    }  # fmt: skip
    return fuse("jax_mps.channel_norm_gradient", step, operands, scope, given, shared=True)


def is_sum(step: Step, scope: Scope) -> bool:
    return folds(step.regions[0]) == ("add",) and splat(step.operands[1], scope) == 0.0


def _matched(polynomial: Polynomial, rows: _Rows) -> tuple[Monomial, Monomial, list[Value]] | None:
    """u and w, of the gradient of the rows w (R u - R mean(u) - C R^3 mean(C u)) (without the second term where the mean is left alone), and the
    arrays that are added to it."""
    found = polynomials.settled(polynomial) if any(("R", 3) in term for term in polynomial) else None
    if found is None:
        return None
    polynomial = found
    starts = [t for t in polynomial if ("R", 1) in t and all(s == "R" or s[0] in "uvw" for s, _ in t) and any(s[0] in "uv" for s, _ in t)]
    if len(starts) != 1:
        return None
    u = tuple((s, p) for s, p in starts[0] if s[0] in "uv")
    weights = tuple((s, p) for s, p in starts[0] if s[0] == "w")
    wanted: Polynomial = {starts[0]: 1.0, monomial([*weights, *_C, ("R", 3), (sum_symbol(monomial((*_C, *u))), 1)]): -1.0 / rows.size}
    if rows.centred:
        wanted[monomial([*weights, ("R", 1), (sum_symbol(u), 1)])] = -1.0 / rows.size
    rest = add(polynomial, wanted, -1.0)
    if any(len(t) != 1 or t[0][1] != 1 or t[0][0][0] not in "uv" or abs(factor - 1) > CLOSE for t, factor in rest.items()):
        return None
    return u, weights, [rows.symbols[t[0][0]] for t in rest]
