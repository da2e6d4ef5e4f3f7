"""The store: what was put comes back, whatever is wrong on the disk is a miss, and writers never raise."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cached_programs as programs
import pytest

from jax_mps.cache import Alias, Damaged, Store, constant_digest, files, key, misses

Change = Callable[[Path], object]


def files_of(folder: Path, kind: str) -> list[Path]:
    """The stored files of one kind."""
    return sorted(path for path in (folder / "1" / kind).rglob("*") if path.is_file())


def test_round_trip(store: Store, folder: Path) -> None:
    """Put, then get in another process's place; through the alias, too."""
    assert programs.get(store, 1) is None
    assert programs.put(store, 1)
    for reader in (store, Store(folder)):
        entry = programs.get(reader, 1)
        assert entry is not None
        assert programs.is_right(entry, 1)
        assert reader.verify() == []
    assert store.unusable is None


def test_reading_makes_no_folder(store: Store, folder: Path) -> None:
    """A miss leaves no trace on the disk."""
    assert programs.get(store, 1) is None
    assert not folder.exists()


def test_files_from_paths(store: Store, tmp_path: Path) -> None:
    """A file may be given as a path; it stays where it is."""
    path = tmp_path / "exported.mlxfn"
    path.write_bytes(b"function")
    assert store.put(programs.program_key(0), {}, {"0.mlxfn": path}, {})
    entry = store.get(programs.program_key(0))
    assert entry is not None
    assert entry.read("0.mlxfn") == path.read_bytes() == b"function"


def test_a_missing_path_is_not_stored(store: Store, tmp_path: Path) -> None:
    """The disk's fault, so no exception."""
    assert not store.put(programs.program_key(0), {}, {"0.mlxfn": tmp_path / "gone"}, {})


def test_wrong_digest_is_the_callers_fault(store: Store) -> None:
    """A constant under a wrong name would be damage for ever."""
    with pytest.raises(ValueError, match="not its own"):
        store.put(programs.program_key(0), {}, {}, {"ab" * 32: b"x"})


def test_small_programs_are_cheap_in_files(store: Store, folder: Path) -> None:
    """One file for the program, one for the alias; a shared constant once."""
    for number in (1, 3, 5):
        programs.put(store, number)
    assert [len(files_of(folder, kind)) for kind in ("entries", "aliases", "constants")] == [3, 3, 1]


def test_everything_is_private(store: Store, folder: Path) -> None:
    """0700 folders and 0600 files, whatever the umask."""
    old = os.umask(0)
    try:
        programs.put(store, 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022 or path.parent.parent.parent == folder / "1", path
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o600, path


def flip(path: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replace_by(make: Change) -> Change:
    """Put something else where the file was."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


DAMAGE: dict[str, Change] = {
    "flip": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "cut by one": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "huge": lambda path: os.truncate(path, 1 << 40),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": Path.unlink,
    "folder": replace_by(Path.mkdir),
    "dangling link": replace_by(lambda path: path.symlink_to("/nonexistent")),
    "link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "pipe": replace_by(os.mkfifo),
}


@pytest.mark.parametrize("kind", ["entries", "aliases", "constants"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_a_miss_and_is_mended(store: Store, folder: Path, kind: str, damage: Change) -> None:
    """Never an error, never wrong bytes; storing the program again makes it good."""
    programs.put(store, 1)
    (path,) = files_of(folder, kind)
    damage(path)
    entry = programs.get(store, 1)
    if entry is not None:  # a constant's bytes are checked when they are read
        with pytest.raises(Damaged):
            programs.is_right(entry, 1)
    if path.is_dir():
        path.rmdir()
    assert programs.put(store, 1)
    entry = programs.get(store, 1)
    assert entry is not None
    assert programs.is_right(entry, 1)


@pytest.mark.parametrize("kind", ["entries", "aliases"])
def test_a_valid_file_in_the_wrong_place_is_a_miss(store: Store, folder: Path, kind: str) -> None:
    """Each file says whose it is."""
    programs.put(store, 0)
    programs.put(store, 2)
    one, other = files_of(folder, kind)
    one.write_bytes(other.read_bytes())
    found = [programs.get(store, number) for number in (0, 2)]
    assert sorted(entry is None for entry in found) == [False, True]
    assert [os.path.basename(p.path) for p in store.verify()] == [one.name]


def test_swapped_constants_are_damage(store: Store, folder: Path) -> None:
    """Equal sizes, wrong contents."""
    programs.put(store, 1)
    programs.put(store, 11)
    one, other = files_of(folder, "constants")
    one_data, other_data = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_data)
    other.write_bytes(one_data)
    for number in (1, 11):
        entry = programs.get(store, number)
        assert entry is not None
        with pytest.raises(Damaged):
            programs.is_right(entry, number)


def test_damage_is_logged_once(store: Store, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line for an entry, not one for each try."""
    programs.put(store, 0)
    flip(files_of(folder, "entries")[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert store.get(programs.program_key(0)) is None
    assert len(caplog.records) == 1


def test_a_held_entry_survives_eviction(store: Store) -> None:
    """Functions are imported late; by then the file may be gone."""
    programs.put(store, 2)
    entry = programs.get(store, 2)
    assert entry is not None
    store.clear()
    assert programs.is_right(entry, 2)


def test_clear_empties_and_the_store_goes_on(store: Store, folder: Path) -> None:
    """Also for another process that had it open, with its folders gone under it."""
    other = Store(folder)
    programs.put(other, 1)
    assert store.clear() > 0
    assert programs.get(other, 1) is None
    assert sorted(path.name for path in folder.iterdir()) == ["CACHEDIR.TAG", "JAX_MPS_CACHE.TAG"]
    assert programs.put(other, 1)
    assert programs.get(store, 1) is not None


def test_clear_removes_kernels(store: Store, folder: Path) -> None:
    """MLX's own, which may lie deeper, and ours; of every version."""
    programs.put(store, 1)
    for path in ("kernels-0.32.4-sm_90/a.ptx", "kernels-0.31.0-sm_80/deep/er/b.ptx"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(bytes(5000))
    assert store.clear() >= 10000
    assert sorted(path.name for path in folder.iterdir()) == ["CACHEDIR.TAG", "JAX_MPS_CACHE.TAG"]


def test_an_interrupted_clear_is_finished_later(store: Store, folder: Path) -> None:
    """What it had taken away is found by nobody, and removed by the next clear or collect."""
    for finish in (store.collect, store.clear):
        programs.put(store, 1)
        (folder / "1").rename(folder / ".trash-1-ab")
        assert programs.get(store, 1) is None
        assert programs.put(store, 2)
        finish()
        assert not (folder / ".trash-1-ab").exists()


def fail(number: int) -> Callable[..., None]:
    """A system call that fails."""

    def call(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("call", ["replace", "open", "write", "makedirs", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_failing_writes_are_not_stored_and_do_not_raise(store: Store, folder: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, read-only and broken disks, and NFS: said once, and the next put works when the disk does."""
    programs.put(store, 0)
    big = {"0.mlxfn": bytes(files.SYNC_FROM)}
    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail(number))
        assert not store.put(key(("x", call)), {}, big, {}) or call == "makedirs"
    assert list((folder / "1" / "tmp").iterdir()) == []
    assert store.put(key(("x", call)), {}, big, {})
    assert store.verify() == []
    assert programs.get(store, 0) is not None


def test_failing_reads_are_misses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error is no reason to stop."""
    programs.put(store, 0)
    for call in ("open", "read", "fstat"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, fail(errno.EIO))
            assert programs.get(store, 0) is None
    assert programs.get(store, 0) is not None


@contextmanager
def small_file_limit() -> Iterator[None]:
    """No file may grow past 3000 bytes, as on a full disk: write() comes back short, then fails. (Not a fixture: pytest's own log is a file.)"""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_stops_in_the_middle(store: Store, folder: Path) -> None:
    """Nothing half-written is ever visible, and nothing is left lying about."""
    with small_file_limit():
        small = store.put(key(("size", "small")), {}, {"f": b"x" * 100}, {})
        big = store.put(key(("size", "big")), {}, {"f": b"x" * 5000}, {})
    assert small
    assert not big
    assert store.get(key(("size", "big"))) is None
    assert store.get(key(("size", "small"))) is not None
    assert list((folder / "1" / "tmp").iterdir()) == []


@pytest.mark.parametrize("shift", [-10 * 365 * 86400, -7200, 7200, 10 * 365 * 86400])
def test_clock_jumps(store: Store, folder: Path, shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries stay readable, their times are set right by use, and eviction still works."""
    programs.put(store, 1)
    for path in files_of(folder, "entries"):
        os.utime(path, (time.time() + shift, time.time() + shift))
    assert programs.get(store, 1) is not None
    assert abs(files_of(folder, "entries")[0].stat().st_mtime - time.time()) < 60
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + shift)
    assert programs.put(store, 2)
    assert programs.get(store, 1) is not None
    assert store.evict(0) > 0
    assert programs.get(store, 1) is None


def test_recency_is_written_at_most_hourly(store: Store, folder: Path) -> None:
    """A get costs no write, unless the entry was not used for an hour."""
    programs.put(store, 0)
    (path,) = files_of(folder, "entries")
    for age, expect_touch in ((1800, False), (7200, True)):
        os.utime(path, (time.time() - age, time.time() - age))
        before = path.stat().st_mtime
        programs.get(store, 0)
        assert (path.stat().st_mtime > before) == expect_touch


def test_counts_add_up_over_processes(store: Store, folder: Path) -> None:
    """The hit rate that the command line shows."""
    programs.put(store, 0)
    for reader in (store, Store(folder)):
        reader.get(programs.program_key(0))
        reader.get(programs.program_key(9))
        reader.save_counts()
    assert Store(folder).saved_counts() == {"hits": 2, "misses": 2}


def test_collect_frees_what_nothing_uses(store: Store, folder: Path) -> None:
    """Constants without an entry and aliases that lead nowhere, once they are old."""
    for number in (1, 11):
        programs.put(store, number)
    store.remove(programs.program_key(1).digest)
    assert store.collect() == 0
    for path in (*files_of(folder, "constants"), *files_of(folder, "aliases")):
        os.utime(path, (0, 0))
    assert store.collect() == 2
    assert programs.get(store, 1) is None
    entry = programs.get(store, 11)
    assert entry is not None
    assert programs.is_right(entry, 11)


def test_verify_repairs(store: Store, folder: Path) -> None:
    """Every kind of damage is found; repair leaves a folder that verifies."""
    for number in range(8):
        programs.put(store, number)
    flip(files_of(folder, "entries")[0])
    flip(files_of(folder, "aliases")[0])
    flip(files_of(folder, "constants")[0])
    (folder / "1" / "entries" / "ab").mkdir(exist_ok=True)
    (folder / "1" / "entries" / "ab" / "stray").write_bytes(b"")
    assert len(store.verify(repair=True)) >= 4
    assert store.verify() == []


def test_leftovers_of_killed_writers_go(store: Store, folder: Path) -> None:
    """After an hour; a temporary file in use is younger."""
    programs.put(store, 0)
    for name, age in (("1-old", 7200), ("2-new", 60)):
        path = folder / "1" / "tmp" / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age, time.time() - age))
    programs.put(Store(folder), 1)
    assert [path.name for path in (folder / "1" / "tmp").iterdir()] == ["2-new"]


def test_two_formats_share_a_folder(store: Store, folder: Path) -> None:
    """Another version of the plugin keeps its own sub-folder; clear empties both."""
    programs.put(store, 0)
    (folder / "2" / "entries").mkdir(parents=True)
    (folder / "2" / "entries" / "x").write_bytes(b"from the future")
    assert store.verify() == []
    assert store.evict(0) > 0
    assert (folder / "2" / "entries" / "x").exists()
    store.clear()
    assert not (folder / "2").exists()


def test_alias_with_a_wrong_extra_is_the_callers_fault(store: Store) -> None:
    """JSON only."""
    with pytest.raises(TypeError):
        store.put_alias(programs.raw_key(0), Alias(programs.program_key(0), "f", {"x": {1}}))


def test_constants_may_be_any_buffer(store: Store) -> None:
    """Of bytes or of wider items."""
    wide = memoryview(bytearray(64)).cast("d")
    digest = constant_digest(wide)
    assert store.put(key(("wide", "")), {}, {"f": wide}, {digest: wide})
    entry = store.get(key(("wide", "")))
    assert entry is not None
    assert entry.constant(digest) == entry.read("f") == bytes(64)


def test_misses_are_remembered(store: Store, folder: Path) -> None:
    """Each with its name, its key and the reason; latest first, from every process; what is odd in the file is left out."""
    for number in range(3):
        assert store.get(programs.program_key(number)) is None
        assert store.note_miss(programs.program_key(number), f"jit_f{number}")
    programs.put(store, 4)
    (entry,) = (folder / "1" / "entries").glob("*/*")
    entry.write_bytes(entry.read_bytes()[:-1])
    assert programs.get(store, 4) is None
    assert store.note_miss(programs.program_key(4), "jit_f4")
    with (folder / "1" / "missed").open("a") as file:
        file.write('[1, "cut')
    found = Store(folder).misses()
    assert [miss.name for miss in found] == ["jit_f4", "jit_f2", "jit_f1", "jit_f0"]
    assert found[0].why.startswith("what is stored cannot be used")
    assert found[1] == (found[1].when, "jit_f2", programs.program_key(2), "nothing is stored under this key")


def test_remembered_misses_are_bounded(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of a bounded size; the latest are kept."""
    monkeypatch.setattr(misses, "_LIMIT", 2000)
    for number in range(100):
        assert store.note_miss(programs.program_key(number), "f" * 1000)
    assert sum(file.stat().st_size for file in (folder / "1").glob("missed*")) < 5000
    assert store.misses()[0].key == programs.program_key(99)


def test_a_program_is_missed_once(store: Store) -> None:
    """By its alias and then by its own key: one miss in the hit rate; found later, one hit."""
    programs.put(store, 1)
    store.remove(programs.program_key(1).digest)
    assert programs.get(store, 1) is None
    assert store.get(programs.program_key(1)) is None
    programs.put(store, 1)
    assert store.get(programs.program_key(1)) is not None
    assert store.counts == {"hits": 1, "misses": 1}
