"""A whole program, ready to run: cut, exported and loaded back; or read from a cache entry. The first process runs what the tenth runs."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import blas, runtime
from jax_mps._shim import ffi, lib
from jax_mps.counters import count
from jax_mps.plan.record import Record
from jax_mps.plan.segments import Block, Callback, Device, Host, Manifest, Segment, type_from_json, type_to_json
from jax_mps.plan.tensors import Layout, Layouts, Memories, TensorType

log = logging.getLogger(__name__)

FORMAT = 4  # of the manifest; raise it when its meaning changes


class Program(Record):
    """A translated program. `block` runs it; `manifest` and `files` are what the cache keeps."""

    name: str
    parameters: tuple[TensorType, ...]
    results: tuple[TensorType, ...]
    donated: tuple[int, ...]
    block: Block
    effects: bool
    memories: Memories = ((), ())  # of parameters and results, as in Plan
    layouts: Layouts = ((), ())
    manifest: Manifest = {}  # noqa: RUF012  (given anew, never changed)
    source: Program | None = None  # what `bind` made it from, alive with it so that the next one like it is made from that, too

    @property
    def direct(self) -> Device | None:
        """The program's one device segment, if it is no more than that and neither a host dtype nor a token is among its values."""
        return None if self.effects or any(t.dtype == "token" for t in self.parameters) else self.block.function

    def to_manifest(self) -> Manifest:
        fields = {"name": self.name, "donated": list(self.donated), "effects": self.effects, "format": FORMAT}
        types = {"parameters": [type_to_json(t) for t in self.parameters], "results": [type_to_json(t) for t in self.results]}
        memories = {"memories": [list(kinds) for kinds in self.memories]} if any(self.memories) else {}
        layouts = {"layouts": [[order and list(order) for order in orders] for orders in self.layouts]} if any(self.layouts) else {}
        return {**fields, **types, **memories, **layouts, "block": self.block.to_manifest()}

    @classmethod
    def from_manifest(cls, manifest: Manifest, files: Any) -> Program:
        """Read a program.

        Raises:
            KeyError, ValueError, TypeError: the manifest is not of this format.
        """
        if manifest["format"] != FORMAT:
            raise ValueError(f"manifest format {manifest['format']}, expected {FORMAT}")
        parameters, results = (tuple(type_from_json(t) for t in manifest[n]) for n in ("parameters", "results"))
        block = Block.from_manifest(manifest["block"], files)
        if block.inputs != len(parameters) or len(block.outputs) != len(results):
            raise ValueError("the signature does not fit the block")
        inputs, outputs = (tuple(map(int, kinds)) for kinds in manifest.get("memories", ((), ())))
        laid_in, laid_out = (tuple(_order(order) for order in orders) for orders in manifest.get("layouts", ((), ())))
        donated, effects = tuple(manifest["donated"]), bool(manifest["effects"])
        memories, layouts = (inputs, outputs), (laid_in, laid_out)
        return cls(str(manifest["name"]), parameters, results, donated, block, effects, memories, layouts, manifest)

    def segments(self) -> Sequence[Segment]:
        return self.block.walk()

    @property
    def callbacks(self) -> list[Callback]:
        """The segments that call into Python."""
        return [s for s in self.segments() if isinstance(s, Callback)]

    def bind(self, markers: Mapping[str, str]) -> Program:
        """This program with its callbacks named anew; all else is shared.

        Raises:
            KeyError: a callback that `markers` does not name.
        """
        return self.replaced(block=self.block.bind(markers), source=self) if markers else self

    @property
    def host_segments(self) -> list[Host]:
        return [s for s in self.segments() if isinstance(s, Host)]


def _order(order: Sequence[int] | None) -> Layout | None:
    return None if order is None else tuple(map(int, order))


class Constants:
    """Large constants on the device, one array per content while some program uses it."""

    def __init__(self) -> None:
        self._arrays: weakref.WeakValueDictionary[tuple[str, TensorType], _Held] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, digest: str, kind: TensorType, read: Callable[[], mx.array]) -> _Held:
        with self._lock:
            held = self._arrays.get((digest, kind))
            if held is None:
                held = self._arrays[(digest, kind)] = _Held(read())
            return held


class _Held:
    """An array that a weak map can hold."""

    __slots__ = ("__weakref__", "array")

    def __init__(self, array: mx.array) -> None:
        self.array = array


constants = Constants()


@functools.cache
def process_folder() -> Path:
    """A private folder for this process's exports; goes at exit (register whatever must come before later: atexit runs backwards)."""
    folder = Path(tempfile.mkdtemp(prefix="jax-mps-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class ExportedFiles:
    """Parts that this process made, in a private folder that goes when nothing needs it any more."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=process_folder()))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True).atexit = False  # the writer may still read
        self.paths: dict[str, Path] = {}
        self.functions: dict[str, Callable[..., Any]] = {}  # in place of files, where imported functions would not run
        self.artifacts: dict[str, bytes] = {}
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        self._held: list[_Held] = []

    def function(self, name: str) -> Callable[..., Any]:
        if name in self.functions:
            return self.functions[name]
        return import_function(self.paths[name], self.paths[name].read_bytes())

    def content(self, name: str) -> bytes | None:
        return None if name in self.functions else self.paths[name].read_bytes()

    def artifact(self, name: str) -> bytes:
        return self.artifacts[name]

    def constant(self, digest: str, kind: TensorType) -> mx.array:
        from jax_mps.ops.dtypes import mx_array

        held = constants.get(digest, kind, lambda: mx_array(self.constants[digest], kind.dtype))
        self._held.append(held)
        return held.array


def import_function(path: Path | str, content: bytes) -> Callable[..., Any]:
    """Import an MLX function file whose checksum the caller knows to be right, and whose bytes are `content`."""
    if blas.is_called_by(content):
        blas.install()
    count("imports")
    return read_function(path, content)


def read_function(path: Path | str, content: bytes) -> Callable[..., Any]:
    """Import an MLX function file that is not going to be evaluated before `blas.install()`."""
    serves = _serves()
    with runtime.locked():
        if serves:
            lib.shim_serve(ffi.from_buffer(content), len(content))
        try:
            return mx.import_function(os.fspath(path))  # type: ignore[return-value]  # a pair only with return_metadata
        finally:
            if serves:
                lib.shim_serve(ffi.NULL, 0)


@functools.cache
def _serves() -> bool:
    """Whether MLX can read a function from memory (cshim/imports.c): it asks the system for each field of each primitive, half of the import."""
    return bool(lib.shim_serve_reads(b"libmlx.so") == 0)
