"""Kernels of our own on CUDA, compiled once for a machine.

MLX (0.32) compiles what `mx.fast.cuda_kernel` is given anew in each process, for a second or more each, most of it for headers that it includes.
But it looks into its folder of kernels first (`MLX_PTX_CACHE_DIR`). So ours are put there, under the names that it looks for, compiled by the same
NVRTC without those headers: a tenth of a second each, once. Whatever is not as expected here, MLX compiles the kernel itself.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from jax_mps.cache.files import write_atomic
from jax_mps.counters import count
from jax_mps.runtime import device, has_clusters

log = logging.getLogger(__name__)

_TYPES = {
    "bool": "bool", "int8": "int8_t", "int16": "int16_t", "int32": "int32_t", "int64": "int64_t", "uint8": "uint8_t", "uint16": "uint16_t",
    "uint32": "uint32_t", "uint64": "uint64_t", "float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float",
}  # fmt: skip

# What a kernel's text may use besides CUDA itself, as MLX's headers have it (of an input's shape and strides, ten dimensions).
_PRELUDE = """
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned int uint32_t; typedef unsigned long long uint64_t;
struct Shape { int32_t of[10]; __device__ int32_t operator[](int i) const { return of[i]; } };
struct Strides { int64_t of[10]; __device__ int64_t operator[](int i) const { return of[i]; } };
"""
_HALF_HEADERS = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"


def cuda_kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, *, header: str = "", contiguous: bool = True) -> Callable[..., Any]:
    """As `mx.fast.cuda_kernel`; contiguous: whether inputs are copied where they are not row-contiguous."""
    header = f"// jax-mps {_DIGEST}\n{header}"  # in MLX's text, too, and so in the name that it looks for: another prelude is another kernel
    launch: Any = mx.fast.cuda_kernel(name, list(inputs), list(outputs), source, header, ensure_row_contiguous=contiguous)
    names = (tuple(inputs), tuple(outputs))
    kept: set[tuple[str, ...]] = set()

    def run(*, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], **how: Any) -> Any:
        dtypes = tuple(str(dtype).rsplit(".", 1)[-1] for dtype in (*(x.dtype for x in inputs), *output_dtypes))
        if dtypes not in kept:
            kept.add(dtypes)
            ranks = [x.ndim for x in inputs]
            read, written = zip(names[0], dtypes, ranks, strict=False), zip(names[1], dtypes[len(inputs) :], strict=True)
            keep(f"custom_kernel_{name}", header, source, signature(read, written, source))
        return launch(inputs=list(inputs), output_dtypes=list(output_dtypes), **how)

    return run


_DIGEST = hashlib.sha256((_PRELUDE + _HALF_HEADERS).encode()).hexdigest()[:8]


def signature(inputs: Iterable[tuple[str, str, int]], outputs: Iterable[tuple[str, str]], source: str) -> str:
    """A kernel's parameters as MLX writes them. inputs: name, dtype and rank; outputs: name and dtype."""
    lines = []
    for name, dtype, rank in inputs:
        lines.append(f"    const {_TYPES[dtype]}* {name}")
        if rank > 0:
            kinds = {"_shape": "Shape", "_strides": "Strides", "_ndim": "int"}
            lines += [f"    const __grid_constant__ {kind} {name}{end}" for end, kind in kinds.items() if name + end in source]
    return ",\n".join([*lines, *(f"    {_TYPES[dtype]}* {name}" for name, dtype in outputs)])


def mlx_text(name: str, header: str, source: str, parameters: str) -> str:
    """The whole text that MLX 0.32 compiles for a kernel."""
    start = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
    space = "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
    return f"{start}{header}{space}__global__ void {name}(\n{parameters}) {{\n{source}\n}}\n\n}} // namespace mlx::core::cu\n"


def own_text(name: str, header: str, source: str, parameters: str) -> str:
    """The same kernel without MLX's headers."""
    headers = _HALF_HEADERS if re.search(r"__half|__nv_bfloat16", parameters + source + header) else ""
    return f'{headers}{_PRELUDE}{header}extern "C" __global__ void {name}(\n{parameters}) {{\n{source}\n}}\n'


def keep(name: str, header: str, source: str, parameters: str) -> None:
    """Compile a kernel, if it is not there yet, and put it where MLX looks for it."""
    folder = os.environ.get("MLX_PTX_CACHE_DIR")
    try:
        if not folder:
            return
        path = Path(folder) / f"{name}_{_hash(mlx_text(name, header, source, parameters)):x}"
        if path.with_suffix(".ptx").exists():
            return
        binary = compiled(own_text(name, header, source, parameters), device().architecture)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = f"mlx::core::cu::{name}\t{name}\n".encode()
        for suffix, content in ((".txt", names), (".ptx", binary)):  # MLX takes both to be there where it finds the second
            write_atomic(str(path.with_suffix(suffix)), [content], temporary=f"{path}{suffix}.{os.getpid()}.tmp")
    except Exception as error:
        count("kernels_not_kept")
        log.warning("MLX compiles the kernel %s itself, in each process, for a second: %s", name, error)


def compiled(text: str, architecture: str) -> bytes:
    """The machine code (cubin) of C++ for an architecture, "sm_90".

    Raises:
        OSError: there is no NVRTC.
        ValueError: NVRTC refuses the text; its messages.
    """
    nvrtc, include = _nvrtc()
    number = "".join(re.findall(r"\d+", architecture))
    options = [f"--gpu-architecture=sm_{number}{'a' if has_clusters(architecture) else ''}", "--device-as-default-execution-space", *include]
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None):
        raise ValueError("NVRTC makes no program")
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            raise ValueError(_bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace"))
        return _bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _bytes(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if size_of(program, ctypes.byref(size)):
        raise ValueError("NVRTC has no result")
    buffer = ctypes.create_string_buffer(size.value)
    if read(program, buffer):
        raise ValueError("NVRTC has no result")
    return buffer.raw


@functools.cache
def _nvrtc() -> tuple[ctypes.CDLL, list[str]]:
    """The NVRTC that MLX has loaded, and the options that name CUDA's headers."""
    found = re.search(r"/\S*/libnvrtc\.so[.\d]*", Path("/proc/self/maps").read_text())
    if found is None:
        raise OSError("NVRTC is not loaded")
    roots = [Path(found[0]).parent.parent, *(Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)), Path("/usr/local/cuda")]
    include = [f"--include-path={root / 'include'}" for root in roots if (root / "include" / "cuda_fp16.h").exists()]
    return ctypes.CDLL(found[0]), include[:1]


def _hash(text: str) -> int:
    """`std::hash<std::string>` of libstdc++, which MLX is built with."""
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    data = text.encode()
    return int(function(data, len(data), 0xC70F6907))
