"""Keys and the translator's digest: equal exactly when what they stand for is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_mps.cache import Key, key, translator_digest

UNLIKE = {
    "order": ((("a", "1"), ("b", "2")), (("b", "2"), ("a", "1"))),
    "boundary between values": ((("a", "1"), ("b", "23")), (("a", "12"), ("b", "3"))),
    "boundary between name and value": ((("ab", "c"),), (("a", "bc"),)),
    "lengths inside values": ((("a", "1:b"),), (("a", "1"), ("b", ""))),
    "an empty part": ((("a", "1"),), (("a", "1"), ("b", ""))),
    "bytes and text": ((("a", b"1"),), (("a", "1"),)),
    "unicode": ((("a", "\u00e9"),), (("a", "e\u0301"),)),
}


@pytest.mark.parametrize(("one", "other"), UNLIKE.values(), ids=UNLIKE)
def test_different_parts_have_different_digests(one: object, other: object) -> None:
    """No two lists of parts share an encoding."""
    assert key(*one).digest != key(*other).digest  # type: ignore[misc]


def test_digest_is_pinned() -> None:
    """The encoding is part of the format: a change of it needs a new FORMAT."""
    assert key(("module", b"module"), ("mlx", "0.32.4")).digest == "7b3b7eafa684af03aee156940ba4ebd81c51014a1a6d7f9f9dfba6ab1c5a7713"


def test_a_part_is_named_once() -> None:
    """Two parts of one name would make a key ambiguous to its readers."""
    with pytest.raises(ValueError, match="once"):
        key(("a", "1"), ("a", "2"))


def test_lone_surrogates_have_a_digest() -> None:
    """Environment values can hold them."""
    assert len(key(("env", "\udc80")).digest) == 64


def test_differences_name_the_parts() -> None:
    """`explain` stands on this."""
    one, other = key(("module", "m"), ("mlx", "1")), key(("module", "m"), ("mlx", "2"), ("device", "gpu"))
    assert one.differences(other) == (("mlx", "1", "2"), ("device", None, "gpu"))
    assert one.differences(one) == ()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package with the translator's folders."""
    for name in ("plan/types.py", "ops/__init__.py", "ops/deep/dot.py", "host/run.py"):
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    return tmp_path / "pkg"


def next_process(package: Path) -> str:
    """The digest as another process would take it."""
    translator_digest.cache_clear()
    return translator_digest(package)


def test_translator_digest_sees_an_edit(package: Path) -> None:
    """A fixed lowering is another translator, and undoing the fix is the old one again; also with size and time unchanged."""
    before = next_process(package)
    dot = package / "ops" / "deep" / "dot.py"
    text, info = dot.read_text(), dot.stat()
    dot.write_text(text.upper())
    os.utime(dot, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert next_process(package) != before
    dot.write_text(text)
    assert next_process(package) == before


def test_a_process_keeps_its_translator(package: Path) -> None:
    """It runs what it has imported: programs that it makes must not be stored as the edited translator's."""
    before = translator_digest(package)
    (package / "ops" / "deep" / "dot.py").write_text("# fixed")
    assert translator_digest(package) == before


@pytest.mark.parametrize("name", ["ops/new.py", "calls/first.py", "ops/deep/deeper/x.py"])
def test_translator_digest_sees_new_files(package: Path, name: str) -> None:
    """Also in folders that did not exist."""
    before = next_process(package)
    (package / name).parent.mkdir(parents=True, exist_ok=True)
    (package / name).write_text("")
    assert next_process(package) != before


def test_translator_digest_sees_renames_and_swaps(package: Path) -> None:
    """Names count, not only bytes."""
    before = next_process(package)
    (package / "plan" / "types.py").rename(package / "plan" / "kinds.py")
    assert next_process(package) != before


def test_translator_digest_ignores_the_rest(package: Path, tmp_path: Path) -> None:
    """Byte code, other folders, times and the place of the package change nothing."""
    before = next_process(package)
    (package / "ops" / "__pycache__").mkdir()
    (package / "ops" / "__pycache__" / "dot.pyc").write_bytes(b"x")
    (package / "cli.py").write_text("")
    os.utime(package / "host" / "run.py", (0, 0))
    moved = package.rename(tmp_path / "elsewhere")
    assert next_process(moved) == before


def test_importing_the_cache_brings_neither_jax_nor_mlx() -> None:
    """The package is pure Python, so that the command line and other tools start at once."""
    code = "import sys, jax_mps.cache as c; print([m for m in ('jax', 'jaxlib', 'mlx', 'numpy', 'rich') if m in sys.modules])"
    root = Path(sys.modules["jax_mps.cache"].__file__ or "").parents[2]
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
    assert run.stdout.strip() == b"[]", run


def test_keys_are_values() -> None:
    """Equal and hashable."""
    assert Key((("a", "1"),)) in {key(("a", "1"))}
