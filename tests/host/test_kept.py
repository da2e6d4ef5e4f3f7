"""Compiled host code between processes: found on the same machine, never where the key or the file is another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jax_mps.host import kept, xla
from jax_mps.host.xla import HostFunction, host_function
from jax_mps.plan.types import Step, TensorType, Value

KIND = TensorType((3,), "float64")


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing in memory."""
    for cached in (kept._store, kept._machine):
        cached.cache_clear()
    monkeypatch.setattr(xla, "_executables", {})


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JAX_MPS_CACHE_DIR", str(tmp_path / "cache"))
    fresh(monkeypatch)
    yield
    kept._writer().flush(10)
    fresh(monkeypatch)


def program() -> HostFunction:
    x, y = Value(KIND), Value(KIND)
    return host_function([x], [Step("stablehlo.sine", (x,), (y,), text=())], [y])


def loads(monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a run in a new process took kept code."""
    kept._writer().flush(10)
    fresh(monkeypatch)
    found: list[bytes] = []
    load = kept.load
    monkeypatch.setattr(kept, "load", lambda artifact, deserialize: load(artifact, lambda code: (found.append(code), deserialize(code))[1]))
    [result] = program()([np.arange(3.0)])
    np.testing.assert_allclose(result, np.sin(np.arange(3.0)), rtol=1e-12)
    monkeypatch.setattr(kept, "load", load)
    return len(found)


def test_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second process loads; the folder is the user's alone."""
    assert loads(monkeypatch) == 0
    assert loads(monkeypatch) == 1
    assert (tmp_path / "cache" / "host").stat().st_mode & 0o777 == 0o700


def test_other_flags_are_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA itself would load the code all the same."""
    assert loads(monkeypatch) == 0
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=SSE4_2")
    assert loads(monkeypatch) == 0


def test_another_processor_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its instructions may be missing."""
    assert loads(monkeypatch) == 0
    monkeypatch.setattr(kept, "_processor", lambda: "another")
    assert loads(monkeypatch) == 0


def test_damage_is_a_miss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every byte is under a checksum."""
    assert loads(monkeypatch) == 0
    kept._writer().flush(10)
    [file] = [f for f in (tmp_path / "cache" / "host").rglob("entries/*/*") if f.is_file()]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert loads(monkeypatch) == 0


def test_code_that_xla_refuses_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jaxlib of the same name that cannot read it compiles anew."""
    artifact = program().artifact
    kept.keep(artifact, lambda: b"no executable")
    assert loads(monkeypatch) == 1


def test_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JAX_MPS_CACHE=0 writes nothing."""
    monkeypatch.setenv("JAX_MPS_CACHE", "0")
    assert loads(monkeypatch) == 0
    assert loads(monkeypatch) == 0
    assert not (tmp_path / "cache").exists()


def test_code_that_cannot_be_serialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled in each process, and nothing is said."""

    def refuse() -> bytes:
        raise RuntimeError("UNIMPLEMENTED: `LessThan` is not serializable.")

    kept.keep(program().artifact, refuse)
    assert loads(monkeypatch) == 0
