"""Compile: raw key, canonical key, memory, disk, translation; in that order."""

from __future__ import annotations

import atexit
import json
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mlx.core as mx

import jax_mps
from jax_mps import runtime
from jax_mps.cache import Alias, Entry, Key, Store, Writer, key, translator_digest
from jax_mps.calls import callbacks, ffi
from jax_mps.config import settings
from jax_mps.counters import count
from jax_mps.pjrt import options as compile_options
from jax_mps.pjrt.executable import Executable
from jax_mps.plan.program import FORMAT, ExportedFiles, Program, constants, import_function, process_folder
from jax_mps.plan.segments import Device, is_json
from jax_mps.plan.tensors import TensorType, numpy_dtype
from jax_mps.selftest import files_work

if TYPE_CHECKING:
    from jax_mps.pjrt.sharded import ShardedExecutable

log = logging.getLogger(__name__)

AnyExecutable: TypeAlias = "Executable | ShardedExecutable"

# Programs kept alive in memory though no executable uses them, by the bytes of their modules.
_KEEP_BYTES = 64 << 20


class Client:
    """One per process: the programs in memory, the store on disk, the writer behind it."""

    def __init__(self) -> None:
        process_folder()  # made before the writer, so that it goes after the writer's last flush
        self.store = Store()
        atexit.register(self.store.save_counts)
        self.writer = Writer()
        self._programs: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()
        self._without_files: set[str] = set()  # the keys of programs that were not exported
        self._aliases: OrderedDict[str, tuple[Program, str, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        with suppress(RuntimeError):  # no thread to be had: the first compile computes it
            threading.Thread(target=_translator, name="jax-mps-digest", daemon=True).start()  # 1-2 ms, while JAX traces

    # ---- compile -----------------------------------------------------------------------------------------------------------------

    def compile(self, code: bytes, options: bytes) -> AnyExecutable:
        """An executable for a StableHLO module.

        Raises:
            InvalidProgram: the bytes or the options cannot be read.
            Unsupported: a step that nothing here can run.
            Refused, HostError: a program for several devices that the host cannot run, or may not.
        """
        chosen = compile_options.read(options)
        form, markers = callbacks.renumber(code)
        raw = key(("code", form), *self.environment(chosen), *_ffi(form))
        identity = _identity(raw, markers)

        def source() -> bytes:
            return compile_options.pack(code, options)

        if chosen.participants > 1:
            from jax_mps.pjrt.sharded import ShardedExecutable

            return ShardedExecutable(code, options, chosen, bytes.fromhex(identity), source)
        known = self.recall(identity)
        if known is None:
            known = self.load_by_alias(raw, markers) or self.load_or_translate(code, raw, markers, chosen)
            self.remember(identity, *known, len(code))
        program, name = known
        return Executable(program, name, bytes.fromhex(identity), source, chosen.devices)

    def environment(self, chosen: compile_options.CompileOptions) -> tuple[tuple[str, str], ...]:
        """The named parts of a key that are not the program: whatever else changes the result."""
        device = runtime.device()
        return (
            ("format", str(FORMAT)),
            ("mlx", runtime.MLX_VERSION),
            ("device", device.kind),
            ("architecture", device.architecture),
            ("translator", _translator()),
            ("host", settings().host),
            ("tf32", runtime.tf32()),
            ("options", chosen.text()),
        )

    def recall(self, identity: str) -> tuple[Program, str] | None:
        with self._lock:
            found = self._aliases.get(identity)
            if found is None:
                return None
            self._aliases.move_to_end(identity)
        count("memory_hits")
        return found[0], found[1]

    def remember(self, identity: str, program: Program, name: str, size: int) -> None:
        with self._lock:
            self._aliases[identity] = (program, name, size)
            self._bytes += size
            while self._bytes > _KEEP_BYTES and len(self._aliases) > 1:
                _, (_, _, dropped) = self._aliases.popitem(last=False)
                self._bytes -= dropped

    def forget(self) -> None:
        """Drop what is kept only for later compiles."""
        with self._lock:
            self._aliases.clear()
            self._bytes = 0

    def program(self, fingerprint: str) -> Program:
        """A program that was compiled in this process, by its executable's fingerprint.

        Raises:
            KeyError: it was dropped, or never here.
        """
        with self._lock:
            return self._aliases[fingerprint][0]

    # ---- disk --------------------------------------------------------------------------------------------------------------------

    def load_by_alias(self, raw: Key, markers: Sequence[str]) -> tuple[Program, str] | None:
        """A program that the raw bytes lead to, without reading MLIR; its callbacks are the functions that `markers` name."""
        if self.uncached:
            return None
        alias = self.store.get_alias(raw)
        if alias is None:
            return None
        order = alias.extra.get("callbacks", [])  # of each of the program's callbacks, its place among the raw bytes' markers
        if sorted(order) != list(range(len(markers))):
            log.warning("a cache alias names other callbacks than its program, which is read anew")
            return None
        program = self.find(alias.key, [markers[place] for place in order])
        if program is None:
            return None
        count("alias_hits")
        return program, alias.name

    def find(self, canonical: Key, markers: Sequence[str]) -> Program | None:
        """A program from memory or from its entry; None if there is none, or anything about it is odd."""
        program = self._programs.get(canonical.digest)
        if program is not None:
            count("memory_hits")
        elif not self.uncached:
            program = self.load(canonical)
        try:
            return program and program.bind({ordinal: marker for marker, ordinal in callbacks.ordinals(markers).items()})
        except KeyError as error:
            log.warning("a cache entry calls %s, which its program lacks; it is made anew", error)
            count("cache_errors")
            return None

    def load(self, canonical: Key) -> Program | None:
        """A program from its entry, its callbacks unbound; None if there is none, or anything about it is odd."""
        entry = self.store.get(canonical)
        if entry is None:
            return None
        try:
            program = Program.from_manifest(entry.manifest["program"], EntryFiles(entry))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            log.warning("a cache entry is unusable and is made anew: %s", error)
            count("cache_errors")
            return None
        count("disk_hits")
        count("host_segments", len(program.host_segments))
        self._programs[canonical.digest] = program
        return program

    @property
    def uncached(self) -> bool:
        """Whether this process must not use function files."""
        return not files_work()

    def load_or_translate(self, code: bytes, raw: Key, markers: Sequence[str], chosen: compile_options.CompileOptions) -> tuple[Program, str]:
        """A program by its canonical form, from memory or disk; or made anew. The raw bytes will lead to it."""
        from jax_mps.plan import build  # MLIR is imported on this path only

        module = build.parse(code)
        name = build.module_name(module)
        form, order = callbacks.renumber(build.canonical(module))
        canonical = key(("module", form), *self.environment(chosen), *_ffi(form))
        program = self.find(canonical, order) or self.translate(module, canonical, order)
        if self.is_stored(program, canonical) and set(order) == set(markers):
            extra = {"callbacks": [markers.index(marker) for marker in order]} if order else {}
            self.writer.submit(lambda: self.store.put_alias(raw, Alias(canonical, name, extra)))
        return program, name

    def translate(self, module: Any, canonical: Key, markers: Sequence[str]) -> Program:
        """A new program; it is stored without this process's markers."""
        from jax_mps.plan.translate import translate

        count("disk_misses")
        translated, files = translate(module)
        ordinals = callbacks.ordinals(markers)
        unbound = translated.bind(ordinals)
        if ordinals:
            unbound.manifest = unbound.to_manifest()
        self._programs[canonical.digest] = unbound
        if files.functions:
            self._without_files.add(canonical.digest)
        if not self.uncached:
            self.writer.submit(lambda: self.store.note_miss(canonical, unbound.name))
        if self.is_stored(unbound, canonical):
            self.writer.submit(lambda: self.write(canonical, unbound, files))
        return unbound.bind({ordinal: marker for marker, ordinal in ordinals.items()})

    def is_stored(self, program: Program, canonical: Key) -> bool:
        """Whether the disk cache takes a program: not if it calls a target of `jax.ffi` that its key does not name, or with arrays, or was not exported."""
        named = json.loads(dict(canonical.parts).get("ffi", "[]"))
        return (
            not self.uncached
            and canonical.digest not in self._without_files
            and all(c.is_python or (c.target in named and is_json(c.config)) for c in program.callbacks)
        )

    def write(self, canonical: Key, program: Program, files: ExportedFiles) -> None:
        """Store a program; runs on the writer's thread."""
        from jax_mps.plan.show import describe  # here: a warm process stores nothing

        parts: dict[str, bytes | Path] = {**files.paths, **files.artifacts}
        stored = {digest: value.tobytes() for digest, value in files.constants.items()}
        manifest = {"program": program.manifest, "summary": self.summary(program), "plan_text": describe(program)}
        self.store.put(canonical, manifest, parts, stored)

    @staticmethod
    def summary(program: Program) -> dict[str, str | int]:
        """What the CLI lists of an entry."""
        segments = program.segments()
        return {
            "name": program.name,
            "ops": sum(s.ops for s in segments if isinstance(s, Device)),
            "segments": len(segments),
            "host_segments": len(program.host_segments),
            "device": runtime.device_kind(),
        }


def has_callbacks(program: Program) -> bool:
    """Whether the program calls back into this process's Python: its executable means nothing elsewhere."""
    return bool(program.callbacks)


def _translator() -> str:
    return translator_digest(Path(jax_mps.__file__).parent)


def _ffi(form: bytes) -> tuple[tuple[str, str], ...]:
    """The part of a key that names the Python targets of `jax.ffi` in a program: where one is not registered, XLA's would be called."""
    named = ffi.named_in(form)
    return (("ffi", json.dumps(named)),) if named else ()


def _identity(raw: Key, markers: Sequence[str]) -> str:
    """What a program is called in this process: its raw key, and the functions it calls."""
    return raw.digest if not markers else key(*raw.parts, ("callbacks", " ".join(markers))).digest


class EntryFiles:
    """A program's parts in a cache entry, their checksums verified when the entry was read."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._held: list[Any] = []

    def function(self, name: str) -> Callable[..., Any]:
        with self.entry.path(name) as path:
            return import_function(path, self.entry.read(name))

    def content(self, name: str) -> bytes | None:
        return self.entry.read(name)

    def artifact(self, name: str) -> bytes:
        return self.entry.read(name)

    def constant(self, digest: str, kind: TensorType) -> mx.array:
        held = constants.get(digest, kind, lambda: self._read(digest, kind))
        self._held.append(held)
        return held.array

    def _read(self, digest: str, kind: TensorType) -> mx.array:
        import numpy as np

        from jax_mps.ops.dtypes import mx_array

        return mx_array(np.frombuffer(self.entry.constant(digest), numpy_dtype(kind.dtype)).reshape(kind.shape), kind.dtype)
