"""Whether function files can be trusted: MLX changes their format without a version of its own, and checks nothing when it reads one.

The tested MLX is taken at its word. A newer one has to read back, bit for bit, what it wrote; the answer is kept in the cache folder. Where
it fails there is no disk cache, and programs are built op by op.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from jax_mps import runtime
from jax_mps.cache import paths
from jax_mps.plan.program import import_function

log = logging.getLogger(__name__)

TESTED_MLX = (0, 32, 4)
_PASSED = "reads back what it writes\n"


@functools.cache
def files_work() -> bool:
    """Whether this process may run function files: its first MLX streams are ours, and this MLX's files are right. Asked before each use."""
    return runtime.device().first and (_version(runtime.MLX_VERSION) <= TESTED_MLX or _newer_works(_note()))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _note() -> Path | None:
    """Where the answer for this version is kept; None without a cache folder."""
    folder = None if paths.turned_off() else paths.cache_folder()
    if folder is None or paths.prepare(folder) is not None:
        return None
    return folder / f"mlx-{runtime.MLX_VERSION}-{runtime.device_kind()}.txt"


def _newer_works(note: Path | None) -> bool:
    found = _read(note) if note is not None else None
    if found is None:
        found = _tried(note)
    if found != _PASSED:
        tested = ".".join(map(str, TESTED_MLX))
        reason = found.strip() or "the process ended while it read"
        log.warning("MLX %s is newer than %s, the last one tested, and misreads its own files (%s): no disk cache", runtime.MLX_VERSION, tested, reason)
    return found == _PASSED


def _read(note: Path) -> str | None:
    try:
        return note.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _tried(note: Path | None) -> str:
    """The answer, tried and noted. An empty note comes first: who dies on the way has answered."""
    with suppress(OSError):
        if note is not None:
            note.touch(mode=0o600)
    try:
        wrong = misread()
    except BaseException:  # Ctrl-C is no answer
        with suppress(OSError):
            if note is not None:
                note.unlink()
        raise
    answer = f"{wrong}\n" if wrong else _PASSED
    with suppress(OSError):
        if note is not None:
            _replace(note, answer)
    return answer


def _replace(note: Path, answer: str) -> None:
    handle, name = tempfile.mkstemp(dir=note.parent)
    with os.fdopen(handle, "w") as file:
        file.write(answer)
    os.replace(name, note)


# ---- the test --------------------------------------------------------------------------------------------------------------------


def misread() -> str | None:
    """What is wrong with a function that was written and read back; None if nothing is. On the CPU, whatever the device: the format is one."""
    stream = runtime.device().beside or runtime.device().stream
    random = np.random.default_rng(0)
    with runtime.locked(), mx.stream(stream), tempfile.TemporaryDirectory(prefix="jax-mps-") as folder:
        x, y = (mx.array(random.normal(size=(8, 8)).astype(np.float32)) for _ in range(2))
        i = mx.array([3, 0, 3, 7], mx.int32)
        path = Path(folder, "function.mlxfn")
        try:
            mx.export_function(str(path), _primitives, x, y, i)
            function = import_function(path, path.read_bytes())  # which may bring another BLAS
            got, want = _values(function(x, y, i)), _values(_primitives(x, y, i))
        except Exception as error:  # whatever a changed MLX raises
            return f"{type(error).__name__}: {error}"
    wrong = [n for n, (a, b) in enumerate(zip(got, want, strict=False)) if a != b]
    return None if len(got) == len(want) and not wrong else f"{len(got)} of {len(want)} results, wrong ones {wrong}"


def _primitives(x: Any, y: Any, i: Any) -> list[mx.array]:
    """One of each family of primitives with a state of its own: axes, shapes, types, modes, constants."""
    whole = (x * 100).astype(mx.int32)
    image = mx.reshape(x, (1, 8, 8, 1))
    return [
        mx.where(x < y, mx.exp(x), mx.array(2.5)) + mx.tanh(y) * mx.array(np.arange(8, dtype=np.float32)),
        (whole ^ mx.array(-1, mx.int32)) << mx.array(3, mx.int32),
        mx.view(x, mx.uint32) >> mx.array(7, mx.uint32),
        x.astype(mx.bfloat16).astype(mx.float16),
        mx.stack([x, y], -1).view(mx.complex64),
        x @ mx.transpose(y),
        mx.conv_general(image, mx.reshape(y[:3, :3], (1, 3, 3, 1)), stride=2, padding=([1, 0], [0, 1]), input_dilation=2),
        mx.sum(x, axis=0), mx.max(y, axis=1, keepdims=True), mx.argmax(x, axis=1), mx.any(x > y, axis=0), mx.cumsum(x, axis=1, reverse=True),
        mx.sort(x, axis=0), mx.argsort(y, axis=1),
        mx.take(x, i, axis=1), mx.take_along_axis(x, whole % 8, axis=1), x.at[i].add(y[:4]), x.at[:, i[0]].maximum(y[1]),
        x[1:7:2, ::-1], mx.slice(x, i[:1], (0,), (4, 8)), mx.slice_update(x, y[:2], i[1:2], (0,)),
        mx.pad(x, [(1, 2), (0, 3)]), mx.concatenate([x, y], axis=1), mx.as_strided(x, (3, 4), (8, 1), 5), mx.broadcast_to(x[:, :1], (8, 5)),
        mx.real(mx.fft.fft(x, axis=1)), mx.fft.irfft(mx.fft.rfft(y, axis=0), n=7, axis=0),
        mx.random.uniform(shape=(4,), key=mx.random.key(3)),
    ]  # fmt: skip


def _values(arrays: Sequence[mx.array]) -> list[tuple[str, tuple[int, ...], bytes]]:
    mx.eval(*arrays)
    return [(str(a.dtype), a.shape, np.asarray(a).tobytes()) for a in arrays]
