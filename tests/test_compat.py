"""Each touch of JAX's private names: on, and the path that ran is the one meant. A feature that JAX's next version breaks fails here by name."""

from __future__ import annotations

import functools
import gc
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify, io_callback

import jax_mps
from jax_mps import compat

pytestmark = pytest.mark.device

X = np.arange(1, 5, dtype=np.float32)
RESULT = jax.ShapeDtypeStruct((4,), np.float32)
FEATURES = {
    "nonexperimental", "cpu beside mps", "donation", "linear algebra", "callbacks", "debug callbacks", "approx_top_k", "ffi targets",
    "random bits", "rules of cpu", "platform_dependent", "persistent cache", "buffer callbacks",
    "exported for cpu", "profiler", "transfer guards", "dlpack",
}  # fmt: skip


@pytest.fixture(autouse=True)
def mps() -> None:
    """The plugin is registered."""
    assert jax.default_backend() == "mps"


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_every_feature_is_on(name: str) -> None:
    """On each jax that this project supports."""
    assert compat.features()[name] == "on"


def test_no_feature_is_untested() -> None:
    """The list above is whole."""
    assert set(compat.features()) == FEATURES


def test_a_feature_that_fails_costs_itself(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, by name and reason; the next one is turned on all the same."""
    monkeypatch.setattr(compat, "_states", {})
    found: list[str] = []

    def broken() -> None:
        raise AttributeError("no _platforms_with_donation")

    table: dict[str, Callable[[], None]] = {"first": broken, "second": lambda: found.append("second")}
    with caplog.at_level(logging.WARNING):
        compat._install(table)
        compat._install(table)
    assert compat.features() == {"first": "off: AttributeError: no _platforms_with_donation", "second": "on"}
    assert found == ["second"]
    assert [r.getMessage() for r in caplog.records] == ["with this version of jax, mps goes without 'first': AttributeError: no _platforms_with_donation"]


@pytest.mark.parametrize("name", ["register_custom_call_handler", "_xla.custom_call_targets", "_xla"])
def test_custom_calls_of_cpu_that_jaxlib_does_not_tell(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Said once. LAPACK is known by its names; a target of the user's own is refused by its."""
    client = compat.xla_client()
    known = types.SimpleNamespace(**vars(client))
    if "." in name:
        known._xla = types.SimpleNamespace(register_custom_call_target=client._xla.register_custom_call_target)
    else:
        delattr(known, name)
    monkeypatch.setattr(compat, "xla_client", lambda: known)
    monkeypatch.setattr(compat, "_states", {})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert compat.cpu_call_targets() == frozenset()
    missing = name.rsplit(".")[-1]
    assert [missing in r.getMessage() for r in caplog.records] == [True]
    assert missing in compat.features()["custom calls of cpu"]
    np.testing.assert_allclose(np.asarray(jax.jit(lambda a: jnp.linalg.cholesky(a) + 1)(4 * np.eye(3, dtype=np.float32))), 2 * np.eye(3) + 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of_the_users_own"):
        jax.jit(jax.ffi.ffi_call("of_the_users_own", RESULT))(X)


def targets(f: Callable[..., Any], *args: Any) -> set[str]:
    """Custom calls in the function's module for mps."""
    from jax_mps.plan import build

    plan = build.build(build.parse(str(jax.jit(f).lower(*args).compiler_ir("stablehlo")).encode()))
    return {s.call_target_name for s in plan.body.walk() if s.name == "stablehlo.custom_call"}


MATRIX = (X[:, None] @ X[None] + np.eye(4, dtype=np.float32)).astype(np.float32)
LINALG: dict[str, tuple[Callable[..., Any], str]] = {
    "cholesky": (jnp.linalg.cholesky, "lapack_spotrf_ffi"),
    "eig": (jnp.linalg.eigvals, "lapack_sgeev_ffi"),
    "eigh": (jnp.linalg.eigvalsh, "lapack_ssyevd_ffi"),
    "hessenberg": (jsl.hessenberg, "lapack_sgehrd_ffi"),
    "lu": (lambda a: jsl.lu(a)[2], "lapack_sgetrf_ffi"),
    "qr": (lambda a: jnp.linalg.qr(a)[1], "lapack_sgeqrf_ffi"),
    "qr, pivoted": (lambda a: jsl.qr(a, pivoting=True)[1], "lapack_sgeqp3_ffi"),
    "schur": (lambda a: jsl.schur(a)[0], "lapack_sgees_ffi"),
    "svd": (jnp.linalg.svdvals, "lapack_sgesdd_ffi"),
    "triangular_solve": (lambda a: jsl.solve_triangular(a, a[0]), "lapack_strsm_ffi"),
    "tridiagonal": (lambda a: lax.linalg.tridiagonal(a)[1], "lapack_ssytrd_ffi"),
    "tridiagonal_solve": (lambda a: lax.linalg.tridiagonal_solve(a[0], a[1] + 30, a[2], a), "lapack_sgtsv_ffi"),
}


@pytest.mark.parametrize("name", LINALG)
def test_linear_algebra_is_lapack(name: str) -> None:
    """Cpu's rules and cpu's numbers."""
    f, target = LINALG[name]
    assert any(t.startswith(target) for t in targets(f, MATRIX)), targets(f, MATRIX)
    got = jax.jit(f)(MATRIX)
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.jit(f)(MATRIX)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-4, atol=1e-4)


def test_random_bits_are_straight_line_code() -> None:
    """17 times slower otherwise, with every test green."""
    text = jax.jit(lambda k: jax.random.bits(k, (8,))).lower(jax.random.key(0)).as_text()
    assert "stablehlo.while" not in text
    assert "cu_threefry" not in text
    with jax.default_device(jax.devices("cpu")[0]):
        want = np.asarray(jax.random.bits(jax.random.key(7), (9,)))
    np.testing.assert_array_equal(np.asarray(jax.random.bits(jax.random.key(7), (9,))), want)


def test_approx_top_k_is_exact() -> None:
    """No custom call is left that XLA would have to decompose."""
    assert targets(lambda x: lax.approx_max_k(x, 2), X) <= {"mhlo.topk"}
    values, indices = jax.jit(lambda x: lax.approx_min_k(x, 2))(X[::-1].copy())
    assert (values.tolist(), indices.tolist()) == ([1, 2], [3, 2])


def test_donation_invalidates() -> None:
    """The input is gone, as on other platforms."""
    x = jnp.asarray(X) + 0
    jax.jit(lambda v: v + 1, donate_argnums=0)(x)
    assert x.is_deleted()


def test_memory_of_ffi_targets_in_python() -> None:
    """JAX's own registration takes a function for mps."""
    jax.ffi.register_ffi_target("test_compat_scale", lambda x, by: x * by, platform="mps")
    call = jax.ffi.ffi_call("test_compat_scale", RESULT)
    np.testing.assert_array_equal(jax.jit(lambda x: call(x, by=np.int32(3)))(X), X * 3)


def test_an_unknown_target_is_named() -> None:
    """UNIMPLEMENTED, with the op, its types and the line."""
    with pytest.raises(Exception, match=r"UNIMPLEMENTED.*nosuchtarget.*test_compat.py.*tensor<4xf32>"):
        jax.jit(jax.ffi.ffi_call("nosuchtarget", RESULT))(X)


# ---- callbacks ---------------------------------------------------------------------------------------------------------------------


def twice(x: Any) -> Any:
    return jax.pure_callback(lambda a: np.asarray(a) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")


PURE: dict[str, Callable[..., Any]] = {
    "plain": twice,
    "twice the same operand": lambda x: jax.pure_callback(lambda a, b: a + b, RESULT, x, x),
    "no operands": lambda x: jax.pure_callback(lambda: X, RESULT) + x,
    "a constant operand": lambda x: jax.pure_callback(lambda a, b: a * b, RESULT, x, jnp.float32(2)),
    "two results": lambda x: jax.pure_callback(lambda a: (a, a.sum()), (RESULT, jax.ShapeDtypeStruct((), np.float32)), x),
    "vmap": lambda x: jax.vmap(twice)(x[:, None]),
    "vmap, expand_dims": lambda x: jax.vmap(lambda v: jax.pure_callback(lambda a: a * 2, jax.ShapeDtypeStruct((), "float32"), v, vmap_method="expand_dims"))(x),
    "in a branch": lambda x: lax.cond(x[0] > 0, twice, lambda v: v, x),
    "in a branch not taken": lambda x: lax.cond(x[0] < 0, twice, lambda v: v, x),
    "in a loop": lambda x: lax.fori_loop(0, 300, lambda i, c: twice(c) * 0.5 + 1, x),
    "in a scan": lambda x: lax.scan(lambda c, a: (twice(c) * 0.5 + a, c), x, X),
    "jax inside": lambda x: jax.pure_callback(lambda a: jnp.sin(a) + jax.jit(lambda v: v * 3)(a), RESULT, x),
    "bfloat16": lambda x: twice(x.astype(jnp.bfloat16)),
    "empty": lambda x: twice(x[:0]),
    "bool": lambda x: jax.pure_callback(lambda a: a > 2, jax.ShapeDtypeStruct((4,), bool), x),
}  # fmt: skip


@pytest.mark.parametrize("name", PURE)
def test_pure_callback(name: str) -> None:
    """As on cpu."""
    got = jax.jit(PURE[name])(X)
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.jit(PURE[name])(X)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), rtol=1e-6)


def test_mps_inside_a_callback() -> None:
    """A callback that dispatches to mps, compiles and waits does not hang."""

    def inner(a: Any) -> Any:
        with jax.default_device(jax.devices("mps")[0]):
            return np.asarray(jax.jit(lambda v: jnp.cos(v) * 5)(np.asarray(a)))

    got = jax.jit(lambda x: jax.pure_callback(inner, RESULT, x))(X)
    np.testing.assert_allclose(got, np.cos(X) * 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a: 1 / 0, "division by zero"),
        (lambda a: a[:1], "Incorrect output shape"),
        (lambda a: a.astype(np.int8), "Incorrect output dtype"),
    ],
    ids=["raises", "shape", "dtype"],
)
def test_a_callback_that_fails(function: Any, words: str) -> None:
    """The call raises, with the exception's text, though nobody asks for the result."""
    with pytest.raises(Exception, match=words):
        jax.jit(lambda x: jax.pure_callback(function, RESULT, x))(X)


def test_ordered_io_callbacks_keep_their_order() -> None:
    """Across calls, loops and kinds of result."""
    seen: list[int] = []

    def note(value: Any) -> None:
        seen.append(int(value))

    @jax.jit
    def f(x: Any) -> Any:
        io_callback(note, None, 100, ordered=True)
        lax.fori_loop(0, 4, lambda i, c: (io_callback(note, None, i, ordered=True), c)[1], 0)
        y = io_callback(lambda v: np.float32(v * 2), jax.ShapeDtypeStruct((), np.float32), x[0], ordered=True)
        io_callback(note, None, y.astype(jnp.int32), ordered=True)
        return y

    for _ in range(3):
        f(X)
    jax.effects_barrier()
    assert seen == [100, 0, 1, 2, 3, 2] * 3


def test_unordered_effects_all_happen() -> None:
    """Though nothing reads a result of theirs."""
    seen: list[float] = []

    @jax.jit
    def f(x: Any) -> Any:
        io_callback(lambda v: seen.append(float(v)), None, x[0])
        jax.debug.callback(lambda v: seen.append(float(v)), x[1])
        return x + 1

    f(X)
    jax.effects_barrier()
    assert sorted(seen) == [1, 2]


@pytest.mark.parametrize("ordered", [False, True])
def test_debug_print(ordered: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Also under vmap (unordered only) and in a loop."""

    @jax.jit
    def f(x: Any) -> Any:
        jax.debug.print("x[0] is {}", x[0], ordered=ordered)
        lax.fori_loop(0, 2, lambda i, c: (jax.debug.print("i is {i}", i=i, ordered=ordered), c)[1], 0)
        return x

    f(X)
    jax.effects_barrier()
    assert sorted(capsys.readouterr().out.splitlines()) == ["i is 0", "i is 1", "x[0] is 1.0"]


def test_checkify() -> None:
    """Functionalised, it needs no callback; under jit alone, it is one where JAX allows it."""

    def f(x: Any) -> Any:
        checkify.check(jnp.all(x > 2), "too small: {m}", m=x[0])
        return x * 2

    error, _ = checkify.checkify(jax.jit(f))(X)
    assert "too small: 1.0" in (error.get() or "")


def test_callbacks_are_dropped_with_their_programs() -> None:
    """The table holds nothing that JAX has let go."""
    from jax_mps.calls import callbacks

    f = jax.jit(lambda x: jax.pure_callback(lambda a: a, RESULT, x))
    gc.collect()
    before = len(callbacks._table)
    f(X).block_until_ready()
    assert len(callbacks._table) == before + 1
    del f
    gc.collect()
    assert len(callbacks._table) == before


def test_a_function_outlives_its_program_until_it_ran() -> None:
    """JAX drops a one-off program as soon as it is dispatched, which is before it runs."""
    assert [float(jax.jit(lambda x, i=i: jax.pure_callback(lambda a: a + i, RESULT, x))(X)[0]) for i in range(20)] == [1.0 + i for i in range(20)]


def test_other_platforms_keep_their_callbacks() -> None:
    """The emitter of JAX answers for them as before."""
    from jax._src import callback

    assert isinstance(callback.emit_python_callback, functools.partial)
    with jax.default_device(jax.devices("cpu")[0]):
        text = jax.jit(twice).lower(X).as_text()
    assert "mps_python_callback" not in text
    assert "xla_ffi_python_cpu_callback" in text


def test_a_program_with_callbacks_is_not_serialised() -> None:
    """Its ids mean nothing elsewhere."""
    from jax.experimental import serialize_executable

    compiled = jax.jit(twice).lower(X).compile()
    with pytest.raises(Exception, match="callback"):
        serialize_executable.serialize(compiled)


# ---- export and the rest -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(LINALG) - {"qr, pivoted"}))  # JAX does not vouch for geqp3's target, on cpu either
def test_export(name: str) -> None:
    """The targets that mps's rules emit are among those that JAX declares stable: a round trip through bytes runs."""
    pytest.importorskip("flatbuffers")
    f, _ = LINALG[name]
    exported = jax.export.export(jax.jit(f), platforms=["mps"])(MATRIX)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(np.asarray(again.call(MATRIX)), np.asarray(jax.jit(f)(MATRIX)))


@pytest.mark.parametrize("platforms", [("cpu",), ("tpu", "cpu")], ids="+".join)
def test_what_was_exported_for_cpu_runs(platforms: tuple[str, ...]) -> None:
    """It takes cpu's branch of what depends on the platform, and cpu's LAPACK."""
    pytest.importorskip("flatbuffers")

    def f(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.platform_dependent(x, cpu=jnp.sin, tpu=jnp.cos), x @ x.T if "tpu" in platforms else jnp.linalg.cholesky(x @ x.T)

    exported = jax.export.deserialize(jax.export.export(jax.jit(f), platforms=platforms)(MATRIX).serialize())
    for got, want in zip(exported.call(MATRIX), jax.jit(f)(jax.device_put(MATRIX, jax.devices("cpu")[0])), strict=True):
        assert got.devices() == {jax.devices("mps")[0]}
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_what_was_exported_for_others_is_refused() -> None:
    exported = jax.export.export(jax.jit(lambda x: x + 1), platforms=["tpu"])(X)
    with pytest.raises(ValueError, match="tpu"):
        exported.call(X)


def test_topologies() -> None:
    """Compiling ahead of time is for this process's own devices; a topology without a client is refused, where jaxlib would hang."""
    from jax.experimental import topologies

    assert list(topologies.get_attached_topology(platform="mps").devices) == jax.devices("mps")
    with pytest.raises(Exception, match="get_attached_topology"):
        topologies.get_topology_desc(platform="mps")


def test_profiles_have_a_plane(tmp_path: Path) -> None:
    """Programs by name, each with the time that it took, loops and host segments among them."""

    @jax.jit
    def product(x: jax.Array) -> jax.Array:
        return x @ x

    @jax.jit
    def factor(x: jax.Array) -> jax.Array:
        return jnp.linalg.eigh(x @ x.T)[1] + 1

    x = jnp.ones((256, 256))
    jax.block_until_ready((product(x), factor(x[:8, :8])))
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready([product(x) for _ in range(3)])
        jax.block_until_ready(factor(x[:8, :8]))
    product(x)
    (file,) = tmp_path.rglob("*.xplane.pb")
    (plane,) = [p for p in jax.profiler.ProfileData.from_file(str(file)).planes if "MLX" in p.name]
    lines = {line.name: list(line.events) for line in plane.lines}
    names = [event.name for event in lines["programs"]]
    assert names.count("jit_product") == 3
    assert "jit_factor" in names
    assert all(0 < event.duration_ns < 60e9 for events in lines.values() for event in events)
    assert any("syevd" in event.name for event in lines["host segments"])


def test_fingerprints_find_programs() -> None:
    """`explain` takes what `compile` returns, and says so otherwise."""
    compiled = jax.jit(lambda x: x + 1).lower(X).compile()
    assert len(compat.fingerprint(compiled)) == 64
    with pytest.raises(TypeError, match="lower"):
        compat.fingerprint(jax.jit(lambda x: x))


@pytest.mark.parametrize("dtype", ["float32", "int64", "float64", "bfloat16", "int4"])
def test_put_on_mps_keeps_the_dtype(dtype: str) -> None:
    """Whatever the x64 flag says."""
    value = np.arange(4).astype(jnp.dtype(dtype) if dtype in ("bfloat16", "int4") else dtype)
    array = compat.put_on_mps(value)
    assert (array.dtype, array.devices()) == (value.dtype, {jax.devices("mps")[0]})
    np.testing.assert_array_equal(np.asarray(array), value)


def test_stats_are_there() -> None:
    """The package's public face imports."""
    assert jax_mps.stats()["translations"] >= 0


# ---- what JAX says of cpu ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="jax 0.11 refuses half types itself")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["cholesky", "eigh", "lu", "qr", "svd", "triangular_solve"])
def test_half_types_are_widened(name: str, dtype: str) -> None:
    """LAPACK computes in float32; results come back in the dtype that JAX announces."""
    functions: dict[str, Callable[..., Any]] = {
        "cholesky": lax.linalg.cholesky, "eigh": lambda a: lax.linalg.eigh(a)[1], "lu": lambda a: lax.linalg.lu(a)[0],
        "qr": lambda a: lax.linalg.qr(a)[1], "svd": lambda a: lax.linalg.svd(a, compute_uv=False),
        "triangular_solve": lambda a: lax.linalg.triangular_solve(a, a),
    }  # fmt: skip
    x = jnp.asarray(MATRIX, dtype)
    got, want = jax.jit(functions[name])(x), functions[name](x.astype(np.float32))
    if isinstance(got, (list, tuple)):
        [got], [want] = got, want
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want), rtol=0.02, atol=0.05)


def test_rules_of_cpu() -> None:
    """A primitive with a rule for cpu only lowers for mps, though the rule came after the plugin; a generic rule goes first."""
    from jax._src import core
    from jax._src.interpreters import mlir

    plus = {"cpu": 1, None: 2}
    for platforms, want in ([("cpu",), 1], [("cpu", None), 2]):
        primitive = core.Primitive("test_compat")
        primitive.def_abstract_eval(lambda x: x)
        for platform in platforms:
            rule = mlir.lower_fun(lambda x, by=plus[platform]: x + by, multiple_results=False)
            mlir.register_lowering(primitive, rule, platform=platform)
        np.testing.assert_array_equal(jax.jit(primitive.bind)(X), X + want)


def test_sparse_solver() -> None:
    """Its rule for cpu is a callback into scipy."""
    from jax.experimental.sparse.linalg import spsolve

    data, indices, indptr = np.float32([2, 4, 8]), np.int32([0, 1, 2]), np.int32([0, 1, 2, 3])
    np.testing.assert_allclose(jax.jit(lambda b: spsolve(data, indices, indptr, b))(X[:3]), X[:3] / data, rtol=1e-6)


@pytest.mark.parametrize(
    ("branches", "want"),
    [(("cpu", "cuda"), "cpu"), (("cpu", "default"), "default"), (("cpu", "mps"), "mps"), (("cuda", "default"), "default")],
)
def test_platform_dependent(branches: tuple[str, ...], want: str) -> None:
    """mps takes its own branch, else the default, else cpu's."""
    adds = {"cpu": 1, "cuda": 2, "mps": 3, "default": 4}
    given: dict[str, Callable[..., Any]] = {name: functools.partial(jnp.add, adds[name]) for name in branches}
    np.testing.assert_array_equal(jax.jit(lambda x: lax.platform_dependent(x, **given))(X), X + adds[want])


def test_jax_persistent_cache(tmp_path: Any) -> None:
    """A program is written once; one with callbacks never."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_raise_persistent_cache_errors": True,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        x = jnp.asarray(X)
        jax.jit(twice)(x)
        assert not [p for p in tmp_path.iterdir() if "twice" in p.name]
        for _ in range(2):
            np.testing.assert_array_equal(jax.jit(lambda v: v * 3 + 1)(x), X * 3 + 1)
            jax.clear_caches()
        assert len([p for p in tmp_path.iterdir() if "lambda" in p.name and p.name.endswith("-cache")]) == 1
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_buffer_callback() -> None:
    """The function writes into its results, and into an input where that is the result's memory."""
    from jax.experimental.buffer_callback import ExecutionStage, buffer_callback

    def write(context: Any, out: Any, x: Any) -> None:
        assert context.stage == ExecutionStage.EXECUTE
        assert (out.writeable, x.writeable, x.shape, x.dtype.name) == (True, False, (4,), "float32")
        np.asarray(out)[...] = np.asarray(x) + np.from_dlpack(x)

    kept = jnp.asarray(X)
    np.testing.assert_array_equal(jax.jit(buffer_callback(write, RESULT))(kept), X * 2)
    np.testing.assert_array_equal(jax.jit(buffer_callback(lambda context, out, x: None, RESULT, input_output_aliases={0: 0}))(kept), X)
    np.testing.assert_array_equal(kept, X)


def test_a_compiled_program_as_text() -> None:
    """HLO of the program, annotations of shardings apart."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    program = jax.jit(lambda x: lax.with_sharding_constraint(jnp.sin(x) * 2, sharding), in_shardings=sharding)
    text = program.lower(X).compile().as_text()
    assert text.startswith("HloModule")
    assert "sine" in text


READS: dict[str, Callable[[jax.Array], Any]] = {"asarray": np.asarray, "float": lambda x: float(x[0]), "str": str, "device_get": jax.device_get}


@pytest.mark.parametrize("name", READS)
def test_transfer_guards(name: str) -> None:
    """A read is refused where a guard says so, on this thread or everywhere, and nowhere else."""
    read = READS[name]
    guard = "disallow_explicit" if name == "device_get" else "disallow"
    fresh = [jnp.asarray(X) + i for i in range(4)]
    with jax.transfer_guard_device_to_host(guard):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-host transfer"):
            read(fresh[0])
        with jax.transfer_guard_device_to_host("allow"):
            read(fresh[1])
    jax.config.update("jax_transfer_guard_device_to_host", guard)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-host transfer"):
            read(fresh[2])
    finally:
        jax.config.update("jax_transfer_guard_device_to_host", None)
    np.asarray(fresh[3])
    with jax.transfer_guard_device_to_host("disallow"):
        np.asarray(fresh[3])  # its value is there already
    assert np.asarray(fresh[3]).__array_interface__["data"][0] == fresh[3].unsafe_buffer_pointer()  # as before: no copy
