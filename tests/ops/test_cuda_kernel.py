"""Kernels of our own for CUDA, compiled by NVRTC (which needs no GPU) and put where MLX looks for them."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import types
from pathlib import Path

import jax
import mlx.core as mx
import numpy as np
import optax
import pytest
from ops.harness import Case, lowered
from ops.kernels import library, needs_compiler

from jax_mps.counters import stats
from jax_mps.ops import bins, columns, cuda_kernel, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry
from jax_mps.ops.dtypes import MX
from jax_mps.plan.types import numpy_dtype
from jax_mps.rewrites import row_kernels as islands


@pytest.fixture(scope="module")
def nvrtc():
    """NVRTC from its wheel, loaded as MLX loads it."""
    spec = importlib.util.find_spec("nvidia")
    found = [path for root in (spec.submodule_search_locations if spec else ()) for path in Path(root).glob("*/lib/libnvrtc*.so*")]
    if not found:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc nvidia-cuda-runtime")
    for path in sorted(found, key=lambda path: "builtins" not in path.name):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    cuda_kernel._nvrtc.cache_clear()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """MLX's folder of kernels, and `mx.fast.cuda_kernel` as something that gives zeros and says what it was asked for."""
    asked = []

    def fake(name, inputs, outputs, source, header="", *, ensure_row_contiguous=True):
        def launch(*, inputs, output_shapes, output_dtypes, **how):
            asked.append((name, header, source))
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    monkeypatch.setattr(mx.fast, "cuda_kernel", fake)
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    for module in (bins, columns, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry):
        module._kernel.cache_clear()
        monkeypatch.setattr(module, "device_kind", lambda: "cuda", raising=False)
    monkeypatch.setattr(islands, "device_kind", lambda: "cuda")
    monkeypatch.setattr(cuda_kernel, "device", lambda: types.SimpleNamespace(architecture="sm_90"))
    yield types.SimpleNamespace(path=tmp_path, asked=asked)
    for module in (bins, columns, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry):
        module._kernel.cache_clear()


def loss(x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(jax.nn.softmax(x.astype(np.float32)), labels).mean()


def use_all():
    """Each kernel of ours once, in the types that it is for."""
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        x, row = mx.zeros((8, 64), dtype), mx.zeros((64,), mx.float32)
        for kind, arrays in {"x": [x], "xx": [x], "xy": [x, x], "xc": [x, x, row], "cc": [x, row], "x,xy": [x, x]}.items():
            columns.sums(kind, *arrays)
        columns.sums("x", mx.zeros((8, 63), dtype))
        for mask in (None, mx.zeros((1, 1, 1, 9), mx.bool_), mx.zeros((1, 1, 1, 9), dtype)):
            q, k = mx.zeros((1, 2, 1, 64), dtype), mx.zeros((1, 2, 9, 64), dtype)
            decoding.attention(q, k, k, mask, scale=1.0, causal=False, fill=-np.inf)
        for width, sums in ((64, ()), (768, ("scale",)), (1000, norm_rows.EVERY), (1501, ())):
            wide, scale = mx.zeros((8, width), dtype), mx.zeros((width,), dtype) if sums else None
            norm_rows.gradient(wide, wide.astype(mx.float32), scale, None, 1e-5, dtype, centred=width < 1000, sums=sums)
    for dtype, columns_ in (("float32", 512), ("bfloat16", 1030), ("float16", 8192)):
        x = np.zeros((1024, columns_), numpy_dtype(dtype))
        _, program, arguments = lowered(Case("loss", jax.value_and_grad(loss), (x, np.zeros(1024, np.int32))), rewritten=True)
        program(*arguments)
    for dtype in bins._TYPES:
        bins.sums(mx.zeros((9,), mx.int32), mx.zeros((9,), getattr(mx, dtype)), 4, dtype, wrapped=True)
    for index in lookup._INDICES:
        for dtype in (mx.uint8, mx.uint16, mx.float32, mx.int64):
            lookup.rows_at(mx.zeros((9, 4), dtype), mx.zeros((3,), getattr(mx, index)))
    for dtype in strided._DTYPES:
        parts = [mx.zeros((3, 4), MX[dtype]), mx.zeros((3, 4), MX[dtype]).T[:3]]
        strided.dense([*parts, parts[0][None]])
        strided.concatenated(parts[:1] * strided.MOST, 0, (3 * strided.MOST, 4))
    key = mx.zeros((), mx.uint32)
    for form in threefry._OUTPUTS:
        threefry._launch(form, (4, 8), [key, key], [mx.zeros((8,), mx.uint32)] * 2 if form == "pair" else [], drawn=32)


def test_every_kernel_compiles_once(nvrtc, folder):
    use_all()
    texts = set(folder.asked)
    found = sorted(folder.path.glob("*.ptx"))
    assert len(found) == len({(name, source) for name, _, source in texts}) > 20
    for path in found:
        name = re.fullmatch(r"(custom_kernel_\w+)_[0-9a-f]+", path.stem)[1]
        assert path.read_bytes()[:4] == b"\x7fELF" and name.encode() in path.read_bytes()
        assert path.with_suffix(".txt").read_text() == f"mlx::core::cu::{name}\t{name}\n"
    times = {path: path.stat().st_mtime_ns for path in found}
    for module in (bins, columns, decoding, joined, lookup, norm_rows, row_kernels, strided, threefry):
        module._kernel.cache_clear()
    use_all()
    assert times == {path: path.stat().st_mtime_ns for path in sorted(folder.path.glob("*.ptx"))}
    assert not list(folder.path.glob("*.tmp"))


def test_text_is_mlx_own():
    """As MLX 0.32.4 puts it together (mlx/backend/cuda/custom_kernel.cpp)."""
    source = "out[0] = x_strides[0] + x_ndim + y[0];"
    parameters = cuda_kernel.signature([("x", "bfloat16", 3), ("y", "float32", 0)], [("out", "uint32"), ("more", "bool")], source)
    assert cuda_kernel.mlx_text("custom_kernel_k", "// head\n", source, parameters) == (
        "\n"
        '#include "mlx/backend/cuda/device/utils.cuh"\n'
        "\n"
        "#include <cooperative_groups.h>\n"
        "\n"
        "// head\n"
        "namespace mlx::core::cu {\n"
        "\n"
        "namespace cg = cooperative_groups;\n"
        "\n"
        "__global__ void custom_kernel_k(\n"
        "    const __nv_bfloat16* x,\n"
        "    const __grid_constant__ Strides x_strides,\n"
        "    const __grid_constant__ int x_ndim,\n"
        "    const float* y,\n"
        "    uint32_t* out,\n"
        "    bool* more) {\n"
        "out[0] = x_strides[0] + x_ndim + y[0];\n"
        "}\n"
        "\n"
        "} // namespace mlx::core::cu\n"
    )


def test_hash_is_the_standard_library_s():
    needs_compiler()
    code = '#include <string>\nextern "C" size_t hash(const char* text) { return std::hash<std::string>{}(text); }'
    function = library(code).hash
    function.restype = ctypes.c_size_t
    for text in ("", "a", "sixteen letters!", "x" * 1001):
        assert cuda_kernel._hash(text) == function(text.encode())


@pytest.mark.parametrize("wrong", ["no NVRTC", "a text that does not compile", "no folder", "a folder that nobody may write to"])
def test_mlx_compiles_what_we_cannot(request, folder, monkeypatch, wrong):
    source = "out[0] = x[0];"
    if wrong == "no NVRTC":
        monkeypatch.setattr(cuda_kernel, "_nvrtc", lambda: (_ for _ in ()).throw(OSError("NVRTC is not loaded")))
    elif wrong == "a text that does not compile":
        request.getfixturevalue("nvrtc")
        source = "out[0] = nothing;"
    elif wrong == "no folder":
        monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    else:
        monkeypatch.setattr(cuda_kernel, "compiled", lambda text, architecture: b"\x7fELF")
        monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/proc/nowhere")
    before = stats()["kernels_not_kept"]
    kernel = cuda_kernel.cuda_kernel("k", ["x"], ["out"], source)
    (out,) = kernel(inputs=[mx.zeros(4)], output_shapes=[(4,)], output_dtypes=[mx.float32], grid=(1, 1, 1), threadgroup=(1, 1, 1))
    assert out.shape == (4,) and len(folder.asked) == 1
    assert stats()["kernels_not_kept"] - before == (wrong != "no folder")
    assert not list(folder.path.glob("*"))


def test_a_folder_of_the_user_s_is_made(nvrtc, folder, monkeypatch):
    """As MLX makes it."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder.path / "a" / "b"))
    cuda_kernel.keep("custom_kernel_k", "", "out[0] = 1;", "    float* out")
    assert len(list((folder.path / "a" / "b").glob("custom_kernel_k_*.ptx"))) == 1


def test_messages_of_nvrtc(nvrtc):
    with pytest.raises(ValueError, match='identifier "nothing" is undefined'):
        cuda_kernel.compiled('extern "C" __global__ void k(float* out) { out[0] = nothing; }', "sm_90")
