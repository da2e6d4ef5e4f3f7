"""Where the cache lives, and whether that folder can be trusted.

Checksums notice accidents; only the folder's owner and permissions keep other users' programs out. So a folder that
is a symlink, belongs to somebody else or can be written by others is refused, with the reason as a sentence.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

FORMAT = 1  # of the folder, the entries and the aliases; a change of any of them is a new number and a new sub-folder
KERNELS = "kernels-"  # how the names of folders of CUDA kernels begin, one for each version of MLX and architecture
TAG = "JAX_MPS_CACHE.TAG"
CACHEDIR_TAG = "CACHEDIR.TAG"
_CACHEDIR_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Made by jax-mps; see https://bford.info/cachedir/\n"
_TAG_TEXT = b"Programs translated by jax-mps. Everything here can be made again: `jax-mps cache clear` empties it.\n"


class Refused(Exception):
    """An operation on a folder that is not ours to change; the text says why."""


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """`JAX_MPS_CACHE_DIR`, or `jax-mps` in the user's cache folder; None where there is no home to put it in."""
    named = environ.get("JAX_MPS_CACHE_DIR")
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    caches = "~/Library/Caches" if sys.platform == "darwin" else environ.get("XDG_CACHE_HOME", "").strip()
    folder = os.path.expanduser(os.path.join(caches or "~/.cache", "jax-mps"))
    return Path(folder) if os.path.isabs(folder) else None


def turned_off(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `JAX_MPS_CACHE` says to run without a disk cache."""
    return environ.get("JAX_MPS_CACHE", "").strip().lower() in {
        "0",
        "off",
        "false",
        "no",
    }


def max_bytes_asked(environ: Mapping[str, str] = os.environ) -> int | None:
    """`JAX_MPS_CACHE_MAX_BYTES` as a number; None where it is absent or not a number (the default then holds)."""
    text = environ.get("JAX_MPS_CACHE_MAX_BYTES", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def distrust(folder: Path) -> str | None:
    """Why `folder`, which must exist, cannot hold a cache; None if it can.

    Raises OSError where the folder cannot be looked at, FileNotFoundError where it does not exist.
    """
    info = os.lstat(folder)
    if stat.S_ISLNK(info.st_mode):
        return f"{folder} is a symbolic link"
    if not stat.S_ISDIR(info.st_mode):
        return f"{folder} is not a folder"
    if info.st_uid != os.geteuid():
        return f"{folder} belongs to user {info.st_uid}, not to the user that runs this program ({os.geteuid()})"
    if info.st_mode & 0o022:
        return f"{folder} can be written by others (mode {stat.S_IMODE(info.st_mode):o}); chmod go-w it"
    return _distrust_parent(folder.parent) or _distrust_content(folder)


def is_tagged(folder: Path) -> bool:
    """Whether `folder` carries our own tag, so that what it holds is ours to delete."""
    try:
        return stat.S_ISREG(os.lstat(folder / TAG).st_mode)
    except OSError:
        return False


def prepare(folder: Path) -> str | None:
    """Make `folder` a cache folder if it is absent or empty; the reason why it cannot be one, or None.

    The tag is the first thing written, so another process never sees our files without it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _mkdir(folder)
        reason = distrust(folder)
        if reason is None and not is_tagged(folder):
            _tag(folder)
    except OSError as error:
        return f"{folder} cannot be used: {error.strerror or error}"
    return reason


def _distrust_parent(parent: Path) -> str | None:
    mode = os.stat(parent).st_mode
    if mode & 0o002 and not mode & stat.S_ISVTX:
        return f"{parent}, which holds it, lets everybody rename folders (mode {stat.S_IMODE(mode):o})"
    return None


def _distrust_content(folder: Path) -> str | None:
    if is_tagged(folder):
        return None
    others = set(os.listdir(folder)) - {TAG, CACHEDIR_TAG}
    if others and not is_tagged(folder):  # asked again: another process may have made it meanwhile
        return f"{folder} is neither empty nor a jax-mps cache (it has no {TAG})"
    return None


def _mkdir(folder: Path) -> None:
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)


def _tag(folder: Path) -> None:
    for name, text in ((TAG, _TAG_TEXT), (CACHEDIR_TAG, _CACHEDIR_TEXT)):
        _write_new(folder / name, text)


def _write_new(path: Path, text: bytes) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.write(handle, text)
    finally:
        os.close(handle)
