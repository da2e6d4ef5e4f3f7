"""Kernels that only a GPU has, as C++ that a CPU runs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def needs_compiler() -> None:
    """Skip where there is no g++: these tests compile what they test."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")


def library(text: str, *flags: str) -> ctypes.CDLL:
    """The C++20 text, compiled and loaded."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "kernel.cpp"
    path.write_text(text)
    subprocess.run(["g++", "-std=c++20", *flags, "-shared", "-fPIC", "-o", path.with_suffix(".so"), path], check=True)
    loaded = ctypes.CDLL(str(path.with_suffix(".so")))
    shutil.rmtree(folder)
    return loaded
