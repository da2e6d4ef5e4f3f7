"""The shim's structs are laid out as the facts say, and its table is complete."""

from shim import toy
from shim.table import FACTS


def layout(name):
    out = toy.ffi.new("int64_t*")
    return out[0] if toy.lib.shim_layout(name.encode(), out) else None


def expected_rows():
    for name, struct in FACTS["structs"].items():
        if "sizeof_lp64" in struct:
            yield name, struct["sizeof_lp64"]
        if "struct_size_lp64" in struct:
            yield f"{name}:size", struct["struct_size_lp64"]
        for field in struct["fields"]:
            if field["name"] and "offset_lp64" in field:
                yield f"{name}.{field['name']}", field["offset_lp64"]
    for values in FACTS["enums"].values():
        for value in values:
            yield value["name"], value["value"]


def test_layout():
    """Every size, offset and enumerator is the fact's."""
    rows = list(expected_rows())
    assert len(rows) > 1000
    assert {name: layout(name) for name, _ in rows} == dict(rows)


def test_unknown_names_are_not_found():
    assert layout("PJRT_Nothing") is None
