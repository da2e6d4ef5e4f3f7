"""Every slot of the table is a function, and those that do nothing say so."""

import re

from shim import toy
from shim.table import CSHIM, FACTS, PjrtError, Table, ffi, generator

STUBS = re.findall(r"^STUB\((\w+)\)", (CSHIM / "api.c").read_text(), re.M)


def test_version():
    """The table declares the version that it is, since the framework trusts it."""
    api = Table(toy.lib.shim_api()).api
    version = api.pjrt_api_version
    assert (version.major_version, version.minor_version) == (FACTS["api_major"], FACTS["api_minor"]) == (0, 104)
    assert api.struct_size == ffi.sizeof("PJRT_Api") == FACTS["structs"]["PJRT_Api"]["sizeof_lp64"]


def test_no_slot_is_empty():
    api = Table(toy.lib.shim_api()).api
    names = FACTS["api_functions"]
    assert len(names) == 135
    assert [name for name in names if getattr(api, name) == ffi.NULL] == []


def test_stubs_name_themselves():
    table = Table(toy.lib.shim_api())
    assert len(STUBS) <= 30
    wrong = []
    for name in STUBS:
        try:
            getattr(table, name)()
            wrong.append(name)
        except PjrtError as error:
            if (error.code, str(error)) != (12, f"PJRT_{name} is not implemented"):
                wrong.append((name, str(error)))
    assert wrong == []


def test_facts_are_the_generators_input():
    """The committed header is what the generator makes of the committed facts."""
    assert (CSHIM / "pjrt_abi.h").read_text() == generator.header(FACTS)
    assert (CSHIM / "layout.inc").read_text() == generator.layout(FACTS)
