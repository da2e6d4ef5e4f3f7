"""Which folders are used, and which are refused: with one sentence, and without a disk cache from then on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cached_programs as programs
import pytest

from jax_mps.cache import Refused, Store, paths

ROOT = Path(sys.modules["jax_mps.cache"].__file__ or "").parents[2]


def link(folder: Path) -> None:
    """A link to a good folder."""
    (folder.parent / "real").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "real")


def full(folder: Path) -> None:
    """A folder of somebody's own files."""
    folder.mkdir(mode=0o700)
    (folder / "thesis.tex").write_text("")


def open_parent(folder: Path) -> None:
    """Everybody may rename what lies in the parent."""
    folder.mkdir(mode=0o700)
    folder.parent.chmod(0o777)


def with_mode(mode: int) -> Callable[[Path], None]:
    """A folder with these permissions."""

    def make(folder: Path) -> None:
        folder.mkdir()
        folder.chmod(mode)

    return make


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "symbolic link": (link, "symbolic link"),
    "dangling link": (lambda folder: folder.symlink_to("/nonexistent/x"), "symbolic link"),
    "file": (lambda folder: folder.write_text(""), "not a folder"),
    "group may write": (with_mode(0o770), "written by others"),
    "world may write": (with_mode(0o707), "written by others"),
    "world may write, sticky": (with_mode(0o1777), "written by others"),
    "parent open to the world": (open_parent, "rename"),
    "somebody's files": (full, "neither empty nor"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(folder: Path, make: Callable[[Path], object], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is written, nothing is read, one line is logged, nothing raises."""
    folder.parent.mkdir()
    make(folder)
    store = Store(folder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not programs.put(store, 0)
            assert programs.get(store, 0) is None
            assert store.verify() == []
            assert list(store.entries()) == []
            store.save_counts()
    assert store.unusable is not None
    assert reason in store.unusable
    assert len(caplog.records) == 1
    assert not (folder / "1").exists()


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500], ids=oct)
def test_accepted(folder: Path, mode: int) -> None:
    """Readable by others is no danger: programs are not secret, and the entries are 0600."""
    folder.parent.mkdir()
    with_mode(mode)(folder)
    assert Store(folder).unusable is None


def test_another_owner_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even root does not run what somebody else has put there."""
    programs.put(Store(folder), 0)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    store = Store(folder)
    assert programs.get(store, 0) is None
    assert "belongs to user" in (store.unusable or "")


@pytest.mark.parametrize("value", ["0", "off", "False", " no "])
def test_turned_off(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX_MPS_CACHE=0 touches no disk."""
    monkeypatch.setenv("JAX_MPS_CACHE", value)
    monkeypatch.setenv("JAX_MPS_CACHE_DIR", str(folder))
    store = Store()
    assert "JAX_MPS_CACHE" in (store.unusable or "")
    assert not programs.put(store, 0)
    assert programs.get(store, 0) is None
    assert not folder.parent.exists()


def test_environment_names_the_folder_and_the_cap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX_MPS_CACHE_DIR and JAX_MPS_CACHE_MAX_BYTES."""
    monkeypatch.setenv("JAX_MPS_CACHE_DIR", str(folder))
    monkeypatch.setenv("JAX_MPS_CACHE_MAX_BYTES", "123456")
    assert (Store().root, Store().max_bytes) == (folder, 123456)
    monkeypatch.setenv("JAX_MPS_CACHE_MAX_BYTES", "plenty")
    assert Store().max_bytes <= 5 << 30


def test_default_is_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system has it."""
    monkeypatch.delenv("JAX_MPS_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    root = Store().root
    assert root.name == "jax-mps"
    assert root.is_relative_to(tmp_path)


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system does not know, with no HOME: no cache, no exception."""
    monkeypatch.delenv("JAX_MPS_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    store = Store()
    assert "home" in (store.unusable or "")
    assert not programs.put(store, 0)


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    """`/nonexistent`, as service users have it, made hard for root as well."""
    (tmp_path / "home").write_text("a file")
    store = Store(tmp_path / "home" / ".cache" / "jax-mps")
    assert not programs.put(store, 0)
    assert programs.get(store, 0) is None
    assert store.unusable is not None


def test_clear_refuses_what_is_not_ours(folder: Path) -> None:
    """Only a tagged folder is emptied, and only of what we put there."""
    with pytest.raises(Refused, match="does not exist"):
        Store(folder).clear()
    folder.parent.mkdir()
    full(folder)
    with pytest.raises(Refused, match="neither empty nor"):
        Store(folder).clear()
    (folder / paths.TAG).write_text("")
    programs.put(Store(folder), 0)
    Store(folder).clear()
    assert (folder / "thesis.tex").exists()
    assert not (folder / "1").exists()


def test_many_processes_make_the_folder_at_once(folder: Path) -> None:
    """The tag is written first, so none of them takes the folder for somebody else's."""
    code = "import sys; from pathlib import Path; from jax_mps.cache import Store, key; print(Store(Path(sys.argv[1])).put(key(('a', 'b')), {}, {}, {}))"
    runs = [subprocess.Popen([sys.executable, "-c", code, folder], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1, stderr=-1) for _ in range(6)]
    assert [run.communicate() for run in runs] == [(b"True\n", b"")] * 6
