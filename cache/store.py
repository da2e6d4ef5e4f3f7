"""The store: get and put programs by key, for many processes at once, never raising because of what is on the disk.

Whatever is wrong with the folder or a file is a miss, with one log line. Complete files appear by rename only, so
readers need no locks, and nothing on the reading side ever deletes: a damaged file is replaced by the next `put`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jax_mps.cache import eviction, paths
from jax_mps.cache.entry import (
    Alias,
    Damaged,
    Entry,
    Json,
    decode_alias,
    decode_entry,
    encode_alias,
    encode_entry,
    is_digest,
)
from jax_mps.cache.files import Buffer, read_whole, remove, touch, write_atomic
from jax_mps.cache.fingerprint import Key, constant_digest
from jax_mps.cache.stored import FIRST, MOST, Listing, Problem, check, read_alias, read_entry_file, read_header

if TYPE_CHECKING:
    from jax_mps.cache.misses import Miss

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 5 << 30
GRACE = 3600  # seconds: how exact recency is, and how long an unreferenced or temporary file is left alone
NOTHING_STORED = "nothing is stored under this key"
_TRASH = ".trash-"  # what `clear` has taken away and is removing

_Write = Callable[[], int]


class Store:
    """A cache folder, opened at the first use. No method raises because of the state of the disk."""

    def __init__(self, folder: Path | None = None, *, max_bytes: int | None = None) -> None:
        root = folder if folder is not None else paths.cache_folder()
        self._off = "turned off by JAX_MPS_CACHE" if folder is None and paths.turned_off() else None
        self.root = Path(os.path.abspath(root)) if root is not None else Path(os.devnull)
        self._at = f"{self.root}/{paths.FORMAT}"
        self._max_bytes = max_bytes if max_bytes is not None else paths.max_bytes_asked()
        self._readable = False
        self._writable = False
        self._said: set[str] = set()
        self._missed: dict[str, str] = {}  # digest -> why, for what was asked for and not found
        self.counts = {"hits": 0, "misses": 0}
        if root is None and self._off is None:
            self._refuse("there is no home folder to put it in; JAX_MPS_CACHE_DIR can name another")

    @property
    def unusable(self) -> str | None:
        """Why nothing can be read or stored, as a sentence; None when the folder is usable or can be made."""
        if self._off is None and not self._readable:
            try:
                reason = paths.distrust(self.root)
            except FileNotFoundError:
                return None
            except OSError as error:
                reason = f"{self.root} cannot be used: {error.strerror or error}"
            self._refuse(reason)
        return self._off

    @property
    def max_bytes(self) -> int:
        """The cap: as asked for, or 5 GiB or a tenth of the room that is free or ours, whichever is less."""
        if self._max_bytes is None:
            ours = (self._tally.get() or 0) * eviction.BLOCK
            try:
                self._max_bytes = min(DEFAULT_MAX_BYTES, (_free(self.root) + ours) // 10)
            except OSError:
                return DEFAULT_MAX_BYTES
        return self._max_bytes

    def get_alias(self, raw: Key) -> Alias | None:
        """Where the program with this raw key leads; None if that is not known."""
        if self._closed():
            return None
        path = self._file("aliases", raw.digest)
        try:
            data, info = read_whole(path, limit=FIRST)
            alias = decode_alias(data, raw.digest)
        except FileNotFoundError:
            return None
        except (OSError, MemoryError, Damaged) as error:
            self._odd(path, error)
            return None
        if _is_stale(info):
            touch(path)
        return alias

    def put_alias(self, raw: Key, alias: Alias) -> bool:
        """Remember where a raw program leads; whether that was stored. `extra` must be JSON."""
        return self._storing(
            raw.digest,
            lambda: self._write("aliases", raw.digest, [encode_alias(raw, alias)]),
        )

    def get(self, key: Key) -> Entry | None:
        """The entry stored under `key`, verified whole; None if there is none, or if anything about it is odd."""
        found = NOTHING_STORED if self._closed() else self._read_entry(key)
        if isinstance(found, Entry):
            self.counts["hits"] += 1
            return found
        if key.digest not in self._missed:  # a program that is asked for by its alias and then by its form is missed once
            self.counts["misses"] += 1
        self._missed[key.digest] = found
        return None

    def put(
        self,
        key: Key,
        manifest: Json,
        files: Mapping[str, Buffer | Path],
        constants: Mapping[str, Buffer],
    ) -> bool:
        """Store a program under `key`, replacing what is there; whether it was stored.

        manifest: a JSON object. files: name -> bytes, or a path that is read now and left in place. constants:
        constant_digest(data) -> data, contiguous. Raises ValueError or TypeError for a manifest, a name or a digest
        that is wrong in itself.
        """
        return self._storing(key.digest, lambda: self._put(key, manifest, files, constants))

    def note_miss(self, key: Key, name: str) -> bool:
        """Remember, for `misses`, that the program of this name was not found under `key`; whether that was stored."""
        from jax_mps.cache import misses  # here: a warm process has none

        miss = misses.Miss(time.time(), name, key, self._missed.pop(key.digest, NOTHING_STORED))
        return self._storing(name, lambda: misses.note(self._missed_file, miss))

    def misses(self) -> list[Miss]:
        """The latest programs that were not found, latest first."""
        from jax_mps.cache import misses

        return [] if self._closed() else misses.read(self._missed_file)

    def entries(self) -> Iterator[Listing]:
        """Every readable entry, in no useful order; damaged ones are left to `verify`."""
        for path, info in self._scan("entries"):
            try:
                header = read_header(path)
            except (OSError, Damaged):
                continue
            if header.key.digest == os.path.basename(path):
                yield Listing(header.key.digest, header, info.st_mtime, info.st_size)

    def aliases(self) -> Iterator[tuple[str, Alias]]:
        """Every readable alias, with the digest of its raw key."""
        for path, _ in self._scan("aliases"):
            try:
                yield os.path.basename(path), read_alias(path)
            except (OSError, Damaged):
                continue

    def raw(self, kind: str) -> Iterator[tuple[str, bytes]]:
        """Digest and bytes of every good file of one kind (entries, aliases, constants), for export."""
        for path, _ in self._scan(kind):
            with suppress(OSError, Damaged):
                data = read_whole(path)[0]
                check(kind, os.path.basename(path), data)
                yield os.path.basename(path), data

    def adopt(self, kind: str, digest: str, data: bytes) -> bool:
        """Store bytes that `raw` gave in another place; whether they were. Raises Damaged unless they are good."""
        if kind not in eviction.KINDS or not is_digest(digest):
            raise Damaged(f"{kind}/{digest} is no name of ours")
        check(kind, digest, data)
        return self._storing(digest, lambda: self._write(kind, digest, [data]))

    def usage(self) -> dict[str, eviction.Usage]:
        """Files and 4 KiB blocks in use, by kind, measured."""
        return dict.fromkeys(eviction.KINDS, eviction.Usage()) if self._closed() else eviction.usage(self._at)

    def remove(self, digest: str) -> bool:
        """Remove one entry; whether it was there. Its aliases lead nowhere from then on, which is a miss."""
        return is_digest(digest) and remove(self._file("entries", digest))

    def evict(self, max_bytes: int) -> int:
        """Remove the least recently used files until at most `max_bytes` are left; how many files went."""
        if self._closed():
            return 0
        removed, left = eviction.shrink(self._at, max_bytes // eviction.BLOCK)
        with suppress(OSError):  # a folder that cannot be written, or was never made
            self._tally.set(left)
        return removed

    def collect(self) -> int:
        """Remove constants that no entry uses, entries that lack a constant and aliases that lead nowhere; how many went.

        What was used or written within the hour stays: its other half may be on the way.
        """
        complete, doomed = self._complete_entries()
        used = {digest for entry in complete for digest in entry.header.constants}
        present = {entry.digest for entry in complete}
        doomed += [path for path, info in self._scan("constants") if os.path.basename(path) not in used and _is_stale(info)]
        for path, info in self._scan("aliases"):
            with suppress(OSError, Damaged):
                if _is_stale(info) and read_alias(path).digest not in present:
                    doomed.append(path)
        if not self._closed():
            self._empty_trash()  # of a `clear` that was interrupted
        return sum(map(remove, doomed))

    def verify(self, *, repair: bool = False) -> list[Problem]:
        """Read everything and check it; what is wrong. `repair` removes those files, so that they are misses.

        An entry whose constant was evicted is no problem: it is a miss, and `collect` removes it.
        """
        problems = [p for kind in eviction.KINDS for p in self._problems(kind)]
        if repair:
            for problem in problems:
                remove(problem.path)
        return problems

    def clear(self) -> int:
        """Remove everything stored, by one rename, so that other processes see all or nothing, and CUDA kernels; bytes that were used.

        Raises Refused if the folder is not ours, OSError if it cannot be changed.
        """
        self.require_ours()
        freed = sum(u.blocks for u in self.usage().values()) * eviction.BLOCK
        freed += sum(path.lstat().st_size for path in self.root.glob(f"{paths.KERNELS}*/**/*"))
        self._readable = self._writable = False
        for name in os.listdir(self.root):
            if name.isdigit() or name.startswith(paths.KERNELS):
                os.rename(self.root / name, self.root / f"{_TRASH}{_unique()}")
        self._empty_trash()
        return freed

    def require_ours(self) -> None:
        """Raise Refused, with the reason, unless the folder is a cache of ours, whose content may be removed."""
        if not self.root.exists():
            raise paths.Refused(f"{self.root} does not exist")
        reason = paths.distrust(self.root)
        if reason is None and not paths.is_tagged(self.root):
            reason = f"{self.root} has no {paths.TAG}, so it is no cache of ours"
        if reason is not None:
            raise paths.Refused(reason)

    def save_counts(self) -> None:
        """Add this process's hits and misses to the folder's, for `jax-mps cache info`; call it once, at exit."""
        counts, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        if self._readable and any(counts.values()):
            self._storing("hits and misses", lambda: self._add_counts(counts))

    def saved_counts(self) -> dict[str, int]:
        """Hits and misses of all processes that have ended, since the cache was cleared."""
        return {name: eviction.Tally(f"{self._at}/{name}").get() or 0 for name in self.counts}

    @property
    def _missed_file(self) -> str:
        return f"{self._at}/missed"

    @property
    def _tally(self) -> eviction.Tally:
        return eviction.Tally(f"{self._at}/blocks")

    def _file(self, kind: str, digest: str) -> str:
        return f"{self._at}/{kind}/{digest[:2]}/{digest}"

    def _scan(self, kind: str) -> Iterator[tuple[str, os.stat_result]]:
        return iter(()) if self._closed() else eviction.scan(f"{self._at}/{kind}")

    def _closed(self) -> bool:
        return not self._readable and self.unusable is not None

    def _refuse(self, reason: str | None) -> None:
        if reason is None:
            self._readable = True
            return
        self._off = reason
        log.warning("running without the disk cache: %s", reason)

    def _open(self) -> bool:
        if not self._writable and self.unusable is None:
            self._refuse(paths.prepare(self.root))
            if self._off is None:
                for name in ("", "/tmp", *(f"/{kind}" for kind in eviction.KINDS)):
                    os.makedirs(self._at + name, mode=0o700, exist_ok=True)
                self._drop_leftovers()
                self._writable = True
        return self._writable

    def _drop_leftovers(self) -> None:
        with os.scandir(f"{self._at}/tmp") as found:
            for file in found:
                with suppress(FileNotFoundError):  # its writer is done
                    if _is_stale(file.stat(follow_symlinks=False)):
                        remove(file.path)

    def _storing(self, what: str, write: _Write) -> bool:
        try:
            if not self._open():
                return False
            try:
                self._grow(write())
            except FileNotFoundError:  # another process has cleared the cache: once more, from the start
                self._writable = False
                if not self._open():
                    return False
                self._grow(write())
        except (OSError, MemoryError) as error:
            self._say(
                "store",
                "cannot store %s in the disk cache (%s); going on without",
                what[:12],
                error,
            )
            return False
        return True

    def _put(
        self,
        key: Key,
        manifest: Json,
        files: Mapping[str, Buffer | Path],
        constants: Mapping[str, Buffer],
    ) -> int:
        blobs = {name: data.read_bytes() if isinstance(data, Path) else data for name, data in files.items()}
        sizes = {digest: memoryview(data).nbytes for digest, data in constants.items()}
        chunks = encode_entry(key, manifest, blobs, sizes)
        if sum(memoryview(c).nbytes for c in chunks) + sum(sizes.values()) > self.max_bytes // 2:
            self._say(
                "big",
                "%s would fill more than half of the disk cache and is not stored",
                key.digest[:12],
            )
            return 0
        written = sum(self._put_constant(digest, data) for digest, data in constants.items())
        return written + self._write("entries", key.digest, chunks)

    def _put_constant(self, digest: str, data: Buffer) -> int:
        if constant_digest(data) != digest:
            raise ValueError(f"a constant was given the digest {digest}, which is not its own")
        path = self._file("constants", digest)
        try:
            self._load_constant(digest, memoryview(data).nbytes)
        except Damaged:
            return self._write("constants", digest, [data])
        touch(path)
        return 0

    def _write(self, kind: str, digest: str, chunks: Iterable[Buffer]) -> int:
        temporary = f"{self._at}/tmp/{_unique()}"
        return eviction.blocks(write_atomic(self._file(kind, digest), chunks, temporary=temporary))

    def _grow(self, amount: int) -> None:
        total = self._tally.add(amount) if amount else 0
        if total is None:
            total = sum(u.blocks for u in self.usage().values())
            self._tally.set(total)
        if total * eviction.BLOCK > self.max_bytes:
            with eviction.try_lock(f"{self._at}/lock") as mine:
                if mine:
                    self.evict(int(self.max_bytes * eviction.LOW_WATER))

    def _read_entry(self, key: Key) -> Entry | str:
        """The entry, or why there is none."""
        path = self._file("entries", key.digest)
        try:
            data, info = read_entry_file(path)
            entry = decode_entry(data, self._load_constant)
            if entry.key != key:
                raise Damaged("it was stored under another key")
            self._check_constants(entry, refresh=_is_stale(info))
        except FileNotFoundError as error:
            return NOTHING_STORED if error.filename == path else "a constant of it was evicted"
        except (OSError, MemoryError, Damaged) as error:
            self._odd(path, error)
            return f"what is stored cannot be used: {error}"
        if _is_stale(info):
            touch(path)
        return entry

    def _check_constants(self, entry: Entry, *, refresh: bool) -> None:
        for digest, size in entry.constants.items():
            path = self._file("constants", digest)
            info = os.lstat(path)  # FileNotFoundError: evicted, a plain miss
            if info.st_size != size:
                raise Damaged(f"its constant {digest} has {info.st_size} bytes instead of {size}")
            if refresh or _is_stale(info):
                touch(path)

    def _load_constant(self, digest: str, size: int) -> bytes:
        try:
            data, _ = read_whole(self._file("constants", digest), limit=size + 1)
        except OSError as error:
            raise Damaged(f"constant {digest} cannot be read: {error.strerror or error}") from error
        if len(data) != size or constant_digest(data) != digest:
            raise Damaged(f"constant {digest} does not match its checksum")
        return data

    def _odd(self, path: str, error: BaseException) -> None:
        self._say(path, "ignoring %s in the disk cache: %s", path, error)

    def _say(self, once: str, text: str, *args: object) -> None:
        level = logging.DEBUG if once in self._said or len(self._said) > 20 else logging.WARNING
        self._said.add(once)
        log.log(level, text, *args)

    def _empty_trash(self) -> None:
        """Four folders at once: a file costs 20 us to remove, or a hundred times that where the disk has to be waited for."""
        import shutil  # here: 5 ms that most processes never need
        from concurrent.futures import ThreadPoolExecutor

        def removed(folder: str) -> None:
            shutil.rmtree(folder, ignore_errors=True)

        with suppress(OSError):
            trash = [f"{self.root}/{name}" for name in os.listdir(self.root) if name.startswith(_TRASH)]
            inner = [shard for taken in trash for kind in eviction.KINDS for shard in eviction.shards(f"{taken}/{kind}")]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(removed, inner))
            for folder in trash:
                removed(folder)

    def _complete_entries(self) -> tuple[list[Listing], list[str]]:
        complete, incomplete = [], []
        for entry in self.entries():
            if all(os.path.exists(self._file("constants", digest)) for digest in entry.header.constants):
                complete.append(entry)
            elif abs(time.time() - entry.used) > GRACE:
                incomplete.append(self._file("entries", entry.digest))
        return complete, incomplete

    def _problems(self, kind: str) -> Iterator[Problem]:
        for path, info in self._scan(kind):
            try:
                if info.st_size > MOST:
                    raise Damaged(f"it has {info.st_size} bytes")
                check(kind, os.path.basename(path), read_whole(path)[0])
            except FileNotFoundError:
                continue
            except (OSError, MemoryError, Damaged) as error:
                yield Problem(path, str(error))

    def _add_counts(self, counts: Mapping[str, int]) -> int:
        for name, amount in counts.items():
            tally = eviction.Tally(f"{self._at}/{name}")
            if tally.add(amount) is None:
                tally.set(amount)
        return 0


def _free(folder: Path) -> int:
    info = os.statvfs(folder)
    return info.f_bavail * info.f_frsize


def _unique() -> str:
    return f"{os.getpid()}-{os.urandom(8).hex()}"


def _is_stale(info: os.stat_result) -> bool:
    return abs(time.time() - info.st_mtime) > GRACE  # in the future as well, after a clock jump
