"""What is computed from the rows of one array, as polynomials: two ways to write a gradient are one polynomial.

Symbols of the elements of a row: "C", the row less its mean (or the row itself); "u1", "v1", another array (a vector, the same for all rows).
Symbols of whole rows: "M", its mean; "R", 1 / sqrt(mean(C^2) + eps); "S..." the sum of a product of elements; "T", 1 unless all of C is 0,
and "Z", 0 unless it is, where nobody knows (`settled`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

Monomial: TypeAlias = tuple[tuple[str, int], ...]  # symbols and powers, in order
Polynomial: TypeAlias = dict[Monomial, float]

_MOST_TERMS = 24
CLOSE = 1e-6  # coefficients hold constants that were rounded to float32


def monomial(powers: Iterable[tuple[str, int]]) -> Monomial:
    """The product of powers; a symbol may come several times."""
    total: dict[str, int] = {}
    for symbol, power in powers:
        total[symbol] = total.get(symbol, 0) + power
    return tuple(sorted((s, p) for s, p in total.items() if p))


def is_of_elements(symbol: str) -> bool:
    return symbol[0] in "Cuv"


def has_root(p: Polynomial) -> bool:
    return any(symbol == "R" for term in p for symbol, _ in term)


def sum_symbol(elements: Monomial) -> str:
    """The sum along the row of a product of elements."""
    return "S" + repr(elements)


def add(p: Polynomial, q: Polynomial, sign: float = 1.0) -> Polynomial:
    """p + sign q; what is left of terms that cancel is rounding."""
    total = dict(p)
    for term, factor in q.items():
        old = total.get(term, 0.0)
        new = old + sign * factor
        if abs(new) <= CLOSE * abs(factor):
            total.pop(term, None)
        else:
            total[term] = new
    return total


def multiply(p: Polynomial, q: Polynomial) -> Polynomial | None:
    """Their product; None if it is longer than any that a gradient needs."""
    if len(p) * len(q) > _MOST_TERMS:
        return None
    total: Polynomial = {}
    for a, x in p.items():
        for b, y in q.items():
            total = add(total, {monomial((*a, *b)): x * y})
    return total


def inverse(p: Polynomial) -> Polynomial | None:
    """1 / p, for one term of whole rows."""
    if len(p) != 1:
        return None
    ((term, factor),) = p.items()
    if not factor or any(is_of_elements(symbol) or symbol == "Z" for symbol, _ in term):
        return None
    return {tuple((s, power if s == "T" else -power) for s, power in term): 1 / factor}


def equal(p: Polynomial, q: Polynomial) -> bool:
    return p.keys() == q.keys() and all(abs(p[t] - q[t]) <= CLOSE * abs(q[t]) for t in p)


def settled(p: Polynomial) -> Polynomial | None:
    """p without "T" and "Z", which mean nothing beside C; None if one is where C is not."""
    total: Polynomial = {}
    for term, factor in p.items():
        symbols = dict(term)
        if ("T" in symbols or "Z" in symbols) and "C" not in symbols:
            return None
        if "Z" not in symbols:
            total = add(total, {tuple(part for part in term if part[0] != "T"): factor})
    return total


def row_sum(p: Polynomial, size: int, eps: float, *, centred: bool) -> Polynomial:
    """The sum along rows of that size. The mean of C^2 is R^-2 - eps; C of centred rows adds up to 0."""
    total: Polynomial = {}
    for term, factor in p.items():
        elements = tuple((s, power) for s, power in term if is_of_elements(s))
        rest = tuple((s, power) for s, power in term if not is_of_elements(s))
        if not elements:
            total = add(total, {rest: factor * size})
        elif elements == (("C", 2),):
            total = add(total, {monomial((*rest, ("R", -2))): factor * size, rest: -factor * size * eps})
        elif not (centred and elements == (("C", 1),)):
            total = add(total, {monomial((*rest, (sum_symbol(elements), 1))): factor})
    return total
