"""Every row of the op tables in the form for Metal: its graph against what is known of MLX's Metal backend (`metal`), some run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from jax import lax
from ops.kernels import lower_for

from jax_mps.errors import Unsupported

from . import metal as facts
from . import (
    test_bits,
    test_complex,
    test_convolution,
    test_dot,
    test_elementwise,
    test_fft,
    test_gather,
    test_random,
    test_reduce,
    test_scatter,
    test_shapes,
    test_slices,
    test_sort,
    test_special,
    test_window,
)
from .harness import Case, assert_same, lowered, reference, results_of

TABLES = [
    test_bits, test_complex, test_convolution, test_dot, test_elementwise, test_fft, test_gather, test_random, test_reduce, test_scatter,
    test_shapes, test_slices, test_sort, test_special, test_window,
]  # fmt: skip
# Whose forms for Metal are their own: rows of these are run as well, every so many
RUN = {test_complex: 1, test_convolution: 4, test_fft: 1, test_scatter: 2, test_sort: 2}


WIDE = ("WIDE", "X64", "BITS")  # tables of rows that need 64 bits


@pytest.fixture
def on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    lower_for("metal", monkeypatch)


def rows(module: ModuleType) -> Iterator[tuple[Case, bool]]:
    """The rows of a module's tables, and whether they need 64 bits."""
    for name, table in vars(module).items():
        if name != "REFUSED" and isinstance(table, list) and table and isinstance(table[0], Case):
            yield from ((case, name in WIDE or module in (test_bits, test_elementwise)) for case in table)


SUMS = [jnp.sum, jnp.prod, jnp.max, jnp.min, jnp.argmax, jnp.cumsum, jnp.cumprod, lax.cummax, jnp.sort]
LONG = [Case(f"{f.__name__}_{dtype}", lambda x, f=f: f(x, axis=1), (np.arange(12).reshape(3, 4).astype(dtype),)) for f in SUMS for dtype in ("int64", "uint64")]

MORE = [
    Case("sort_permuted", lambda x: jnp.sort(jnp.swapaxes(x, 0, 1) * 2), (np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32),)),
    Case("argsort_middle", lambda x: jnp.argsort(x.T, axis=1), (np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32),)),
    Case("top_k_permuted", lambda x: lax.top_k(jnp.swapaxes(x, 0, 1) * 2, 3), (np.random.default_rng(0).normal(size=(3, 4, 40)).astype(np.float32),)),
    Case(
        "bitcast_up",
        lambda x: [lax.bitcast_convert_type(lax.bitcast_convert_type(x, t), x.dtype) for t in ("uint8", "int16")],
        (np.float32([1.5, -0.0, np.nan]),),
    ),
    Case("product_of_slices", lambda x: jnp.dot(x[1:], x[:-1]), (np.arange(9, dtype=np.float16),)),
    Case("bitcast_of_slice", lambda x: lax.bitcast_convert_type((x * 2)[1:9].reshape(2, 4), jnp.float32), (np.arange(20, dtype=np.uint8),)),
    Case("scatter_to_slice", lambda x: (x * 2)[1:].at[jnp.array([1, 1, 3])].max(jnp.float16(3)), (np.arange(9, dtype=np.float16),)),
    Case("set_in_slice", lambda x, i: (x * 2)[1:].at[i].set(jnp.int8(3), mode="promise_in_bounds"), (np.arange(9, dtype=np.int8), np.array([1, 4], np.int32))),
    Case("irfft_imaginary_first", lambda x: jnp.fft.irfft(x, 19), ((np.ones((3, 10)) * (1 + 2j) + np.arange(10)).astype(np.complex64),), rtol=1e-5, atol=1e-5),
    Case(
        "conv_3x3_half",
        lambda x, w: lax.conv(x, w, (1, 1), "SAME"),
        tuple(np.random.default_rng(0).normal(size=s).astype(np.float16) for s in ((1, 32, 5, 5), (32, 32, 3, 3))),
        rtol=2e-3,
        atol=2e-2,  # sums of 288 products, rounded to float16
    ),
    Case(
        "gradient_of_causal_depthwise",
        jax.grad(lambda x, w: lax.conv_general_dilated(x, w, (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4).sum()),
        tuple(np.random.default_rng(0).normal(size=s).astype(np.float32) for s in ((2, 8, 4), (3, 1, 4))),
        rtol=1e-5,
    ),
    Case("constants", lambda x: (jnp.where(x > 0, -0.0, x), jnp.where(x > 0, complex(np.nan, 1), 0), x + jnp.inf), (np.float32([-1, 0, 1]),)),
]


R = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return R.normal(size=shape).astype(jnp.dtype(dtype))


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def network(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A convolution, a batch norm, pooling, a stride."""
    y = lax.conv_general_dilated(x, w["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu((y - y.mean((0, 1, 2))) * lax.rsqrt(y.var((0, 1, 2)) + 1e-5))
    y = lax.conv_general_dilated(y, w["b"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return (lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") ** 2).sum()


# As models have them, rewrites included
PROGRAMS = [
    *(
        Case(f"attention_{dtype}", lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), (normal(2, 8, 4, 64, dtype=dtype),) * 3)
        for dtype in ("float32", "bfloat16")
    ),
    Case("norm", norm, (normal(6, 32), normal(32))),
    Case("norm_gradient", jax.grad(lambda x, s: norm(x, s).sum() * 2, (0, 1)), (normal(6, 32, dtype="bfloat16"), normal(32, dtype="bfloat16"))),
    Case("residual", jax.grad(lambda x, w, s: norm(x + jnp.tanh(norm(x, s) @ w), s).sum() * 2, (0, 1, 2)), (normal(6, 32), normal(32, 32), normal(32))),
    Case("cross_entropy", jax.grad(lambda x, i: -jnp.take_along_axis(jax.nn.log_softmax(x), i, 1).mean()), (normal(8, 10), np.arange(8)[:, None] % 10)),
    *(
        Case(
            f"network_{dtype}",
            jax.grad(network),
            ({"a": normal(3, 3, 32, 32, dtype=dtype), "b": normal(3, 3, 32, 8, dtype=dtype)}, normal(2, 8, 8, 32, dtype=dtype)),
        )
        for dtype in ("float32", "bfloat16")
    ),
    Case("embedding", jax.grad(lambda t, i: (t[i] ** 2).sum()), (normal(16, 4, dtype="float16"), np.arange(6).reshape(2, 3))),
    Case("segments", lambda x, i: jax.ops.segment_max(x, i, 5), (normal(9, dtype="bfloat16"), np.arange(9) % 5)),
    Case("sampling", lambda x: jax.random.categorical(jax.random.key(0), lax.top_k(x, 5)[0]), (normal(4, 3, 60),)),
    Case("dropout", lambda x: jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x / 0.5, 0), (normal(4, 5, dtype="float16"),)),
    Case("filter", lambda x, y: jnp.fft.irfft(jnp.fft.rfft(x, 38) * jnp.fft.rfft(y, 38), 38), (normal(2, 20), normal(2, 19))),
    Case("median", lambda x: jnp.median(jnp.swapaxes(x, 0, 2), axis=1), (normal(3, 7, 5),)),
    Case("lexsort", lambda x, y: jnp.lexsort((x, y)), (np.arange(9) % 4, np.arange(9) % 3)),
]


def check(case: Case, wide: bool, *, run: bool) -> list[str]:
    with jax.enable_x64(wide):
        try:
            plan, function, arguments = lowered(case, rewritten=True)
        except Unsupported:
            return []  # the host's: their own tests say which
        found = [f"{case}: {text}" for text in facts.complaints(function, arguments)]
        if run and not found:
            assert_same(results_of(plan, function(*arguments), case), reference(case), case)
    return found


@pytest.mark.parametrize("module", TABLES, ids=lambda m: m.__name__.rpartition("test_")[2])
def test_the_tables(module: ModuleType, on_metal: None) -> None:
    """No row needs what Metal lacks, and rows whose form is Metal's own are right."""
    cases, every = list(rows(module)), RUN.get(module, 0)
    assert cases
    assert [text for i, (case, wide) in enumerate(cases) for text in check(case, wide, run=every > 0 and i % every == 0)] == []


@pytest.mark.parametrize("case", MORE, ids=str)
def test_what_metal_would_get_wrong(case: Case, on_metal: None) -> None:
    """Programs that MLX's Metal backend computes wrongly, or not at all, from the graphs that other devices get."""
    assert check(case, False, run=True) == []


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_programs(case: Case, on_metal: None) -> None:
    """Parts of models, as they are rewritten."""
    _, function, arguments = lowered(case, rewritten=True)
    assert list(facts.complaints(function, arguments)) == []


def test_64_bits(on_metal: None) -> None:
    """Reductions and scans of 64-bit integers have kernels."""
    assert [text for case in LONG for text in check(case, True, run=False)] == []


@pytest.mark.parametrize("rule", facts.RULES, ids=lambda r: f"{r.names}: {r.why}")
def test_the_rules(rule: facts.Rule) -> None:
    """Each refuses what it is about."""
    primitives, _ = facts.graph(lambda: rule.example(), [])
    assert any(rule.refuses(p) for p in primitives if p.name in rule.names.split())


@pytest.mark.parametrize("value", [-0.0, complex(np.nan, 0), complex(1, -0.0)])
def test_misprinted_constants(value: complex) -> None:
    """They would be scalars of a graph; what a program has of them is none."""
    assert facts.is_misprinted(mx.array(value))
    assert list(facts.complaints(lambda x: x + mx.array(value), [mx.zeros((2,), mx.complex64)]))


def test_long_transforms(on_metal: None) -> None:
    """Longer than Metal's kernels take: the host's."""
    with pytest.raises(Unsupported, match="length 16777217 on Metal"):
        lowered(Case("fft", lambda x: jnp.fft.fft(x), (np.zeros(2**24 + 1, np.complex64),)))
