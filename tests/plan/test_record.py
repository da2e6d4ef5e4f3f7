"""Records: fields from annotations, in order."""

from __future__ import annotations

from typing import Any

import pytest

from jax_mps.plan.record import Record


class Point(Record):
    x: int
    y: int = 2

    @property
    def total(self) -> int:
        return self.x + self.y


class Named(Point):
    name: str = ""
    seen: int = 0

    def _made(self) -> None:
        self.seen += 1


def test_fields_come_by_place_or_name() -> None:
    assert [Point(1).total, Point(1, 5).total, Point(y=3, x=4).total] == [3, 6, 7]
    named = Named(1, 2, "n")
    assert (named.x, named.y, named.name, named.seen) == (1, 2, "n", 1)


def test_a_copy_with_changes() -> None:
    point = Named(1, 2, "n")
    other = point.replaced(y=7)
    assert (type(other), other.x, other.y, other.name, point.y) == (Named, 1, 7, "n", 2)


def test_equal_to_itself_alone() -> None:
    one = Point(1)
    assert one == one
    assert one != Point(1)
    assert len({one, Point(1)}) == 2


@pytest.mark.parametrize(("values", "named"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 2}), ((1,), {"z": 2})], ids=str)
def test_other_fields(values: tuple[int, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="Point takes x, y"):
        Point(*values, **named)
