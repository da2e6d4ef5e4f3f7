"""Every touch of JAX's and jaxlib's private names, each guarded by itself: a renamed name costs one feature, said in one log line.

Two kinds: functions that the plugin cannot do without (they raise), and features, which `install` turns on one by one and `features` lists.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jax_mps._shim import lib
from jax_mps.config import settings

log = logging.getLogger(__name__)

PLATFORM = "mps"

# ---- what the plugin needs ---------------------------------------------------------------------------------------------------------


def xla_client() -> Any:
    """jaxlib's XLA client module; JAX is imported first, since `batched_device_put` reads its configuration."""
    import jax  # noqa: F401
    from jaxlib import xla_client

    return xla_client


def shaped_array(shape: tuple[int, ...], dtype: Any) -> Any:
    """JAX's abstract value of an array."""
    from jax._src.core import ShapedArray

    return ShapedArray(shape, dtype)


def portable_artifact(text: str) -> bytes:
    """StableHLO text (CHLO ops allowed) as a portable artifact of this jaxlib's version."""
    from jaxlib import _jax
    from jaxlib.mlir.dialects import stablehlo

    artifact: bytes = _jax.mlir.serialize_portable_artifact(text, stablehlo.get_current_version())
    return artifact


@functools.cache
def initialize_lapack() -> None:
    """Register the lapack_*_ffi targets with XLA and load scipy's LAPACK; without the second, a run is a segmentation fault."""
    import jax._src.lax.linalg  # noqa: F401
    from jaxlib import lapack

    module: Any = lapack
    module._lapack.initialize()


def cpu_call_targets() -> frozenset[str]:
    """Custom-call targets registered with XLA's CPU compiler now, those of `jax.ffi` included; none if jaxlib does not say."""
    try:
        client = xla_client()
        client.register_custom_call_handler("cpu", client._xla.register_custom_call_target)  # jaxlib keeps them back until its own CPU client is made
        found = client._xla.custom_call_targets("Host")
        return frozenset(name.decode() if isinstance(name, bytes) else name for name in found)
    except Exception as error:  # as in `_install`
        if _CALLS not in _states:
            _turn_off(_CALLS, error)
        return frozenset()


_CALLS = "custom calls of cpu"


def put_on_mps(value: Any) -> Any:
    """A NumPy array as a JAX array on mps; its dtype is kept whatever the x64 flag says, its memory handed over as it is."""
    import jax

    device = jax.devices(PLATFORM)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    return xla_client()._xla.batched_device_put(shaped_array(value.shape, value.dtype), sharding, [value], [device], enable_x64=True)


def fingerprint(compiled: Any) -> str:
    """The fingerprint that the plugin gave the executable of a `jax.stages.Compiled`, in hexadecimal.

    Raises:
        TypeError: it is none.
    """
    try:
        found = compiled.runtime_executable().fingerprint
    except AttributeError as error:
        raise TypeError(f"expected what jax.jit(f).lower(...).compile() returns, got {type(compiled).__name__}") from error
    return bytes(found or b"").hex()


def jax_config() -> Any:
    """JAX's configuration; its flags are attributes that type checkers do not see."""
    import jax

    return jax.config


def device_count(kind: str) -> int:
    """How many devices the client has. All are MLX's one: where that is the processor, JAX's two ways to ask for several cpu devices hold,
    the option jax_num_cpu_devices and XLA's flag; JAX_MPS_NUM_DEVICES goes before them, and for a GPU.

    Raises:
        InvalidOption: the variable is no number of devices.
    """
    chosen = settings().num_devices
    if chosen is None and kind == "cpu":
        option = getattr(jax_config(), "jax_num_cpu_devices", -1)
        flag = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
        chosen = option if option >= 1 else int(flag[-1]) if flag else None
    return max(chosen or 1, 1)


def stablehlo_versions() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """This jaxlib's current and minimum StableHLO versions, each as three numbers."""
    from jaxlib.mlir.dialects import stablehlo

    current, minimum = stablehlo.get_current_version(), stablehlo.get_minimum_version()
    return tuple(int(n) for n in current.split(".")), tuple(int(n) for n in minimum.split("."))


def register_plugin(capsule: Any, *, priority: int) -> None:
    """Make the platform known to JAX, with the PJRT table in the capsule."""
    from jax._src import xla_bridge

    try:
        xla_bridge.register_plugin(PLATFORM, priority=priority, c_api=capsule, factory=_make_client)
    except TypeError as error:
        _turn_off(_CPU, error)
        xla_bridge.register_plugin(PLATFORM, priority=priority, c_api=capsule)


def _make_client() -> Any:
    """The client, as JAX would make it; with JAX_PLATFORMS=mps, JAX's cpu client beside it. JAX holds its lock around this."""
    from jax._src import xla_bridge

    client = xla_bridge.make_pjrt_c_api_client(PLATFORM)
    _states.pop(_CPU, None)
    _install({_CPU: functools.partial(_cpu_beside, client)})
    return client


# ---- features ----------------------------------------------------------------------------------------------------------------------

_before: dict[str, Callable[[], None]] = {}
_after: dict[str, Callable[[], None]] = {}
_states: dict[str, str] = {}


class _Missing(Exception):
    """JAX lacks what a feature needs, or has it in another form."""


def _feature(name: str, table: dict[str, Callable[[], None]]) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def enter(turn_on: Callable[[], None]) -> Callable[[], None]:
        table[name] = turn_on
        return turn_on

    return enter


def install_before() -> None:
    """Turn on the features that JAX reads while a plugin is registered."""
    _install(_before)


def install() -> None:
    """Turn on the features that need the platform to be known. Those that fail are logged, once, and stay off."""
    _install(_after)


def _install(table: dict[str, Callable[[], None]]) -> None:
    for name, turn_on in table.items():
        if name in _states:
            continue
        try:
            turn_on()
        except Exception as error:  # any change in JAX must cost this feature only
            _turn_off(name, error)
        else:
            _states[name] = "on"


def _turn_off(name: str, error: Exception) -> None:
    _states[name] = f"off: {type(error).__name__}: {error}"
    log.warning("with this version of jax, mps goes without %r: %s: %s", name, type(error).__name__, error)


def features() -> dict[str, str]:
    """Each feature with "on", or "off: " and the reason. Empty before the plugin is registered."""
    return dict(_states)


@_feature("nonexperimental", _before)
def _nonexperimental() -> None:
    """No warning that the platform is experimental."""
    from jax._src import xla_bridge

    xla_bridge._nonexperimental_plugins.add(PLATFORM)


_CPU = "cpu beside mps"


def _cpu_beside(client: Any) -> None:
    """JAX_PLATFORMS=mps is enough: callbacks put their arguments on JAX's cpu devices. The flag and the default stay mps."""
    from jax._src import xla_bridge

    if jax_config().jax_platforms == PLATFORM and "cpu" not in xla_bridge._backends:
        if not callable(xla_bridge._init_backend):
            raise _Missing("jax._src.xla_bridge._init_backend is no function")
        xla_bridge._backends = _Backends({PLATFORM: client})


class _Backends(dict[str, Any]):
    """JAX's backends by platform; `cpu` is made when it is first asked for, which takes 5 ms and few programs do."""

    def get(self, platform: str, default: Any = None) -> Any:
        return self[platform] if platform == "cpu" else super().get(platform, default)

    def __missing__(self, platform: str) -> Any:
        if platform != "cpu":
            raise KeyError(platform)
        from jax._src import xla_bridge

        with _making_cpu:
            if not super().__contains__(platform):
                self[platform] = xla_bridge._init_backend(platform)
        return super().__getitem__(platform)


_making_cpu = threading.Lock()


@_feature("donation", _after)
def _donation() -> None:
    """JAX marks donated arguments for platforms on this list only."""
    from jax._src.interpreters import mlir

    if PLATFORM not in mlir._platforms_with_donation:
        mlir._platforms_with_donation.append(PLATFORM)


@_feature("linear algebra", _after)
def _linalg() -> None:
    """The rules of cpu, which call LAPACK: several primitives have no other, and the generic ones are loops that MLX is slow at."""
    from jax._src.lax import linalg

    missing = [name for name in _LAPACK if not hasattr(linalg, f"{name}_p")]
    for name in _LAPACK:
        if name not in missing:
            _copy_cpu_rule(getattr(linalg, f"{name}_p"), _widened)
    if missing:
        raise _Missing(f"no primitive {', '.join(missing)}")


_LAPACK = (
    "cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "householder_product", "lu", "ormqr", "schur", "svd",
    "triangular_solve", "tridiagonal", "tridiagonal_solve",
)  # fmt: skip


def _copy_cpu_rule(primitive: Any, wrap: Callable[[Any, Any], Any] = lambda primitive, rule: rule) -> None:
    from jax._src.interpreters import mlir

    entry = mlir._platform_specific_lowerings["cpu"][primitive]
    mlir.register_lowering(primitive, wrap(primitive, entry.rule), platform=PLATFORM, inline=entry.inline)


def _widened(primitive: Any, rule: Any) -> Any:
    """LAPACK has no half precision: compute in float32."""
    from jax._src.interpreters import mlir

    def wide(ctx: Any, *operands: Any, **parameters: Any) -> Any:
        if not any(aval.dtype.name in _HALF for aval in ctx.avals_in):
            return rule(ctx, *operands, **parameters)

        def run(*arrays: Any) -> Any:
            found = primitive.bind(*(a.astype("float32") if a.dtype.name in _HALF else a for a in arrays), **parameters)
            results = found if primitive.multiple_results else [found]
            return [r.astype(aval.dtype) for r, aval in zip(results, ctx.avals_out, strict=True)]

        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    return wide


_HALF = frozenset(["bfloat16", "float16"])


@_feature("rules of cpu", _after)
def _rules_of_cpu() -> None:
    """A primitive that has a rule for cpu and no generic one (checkify's check, sparse solvers, a user's own) takes cpu's."""
    from jax._src.interpreters import mlir

    rules, known = mlir._platform_specific_lowerings, mlir._lowerings
    if not isinstance(rules[PLATFORM], _Rules):
        rules[PLATFORM] = _Rules(rules[PLATFORM], rules["cpu"], known)


class _Rules(dict[Any, Any]):
    """Rules of mps by primitive, then those of cpu for primitives without a generic rule, now or when they are registered."""

    def __init__(self, own: dict[Any, Any], cpu: dict[Any, Any], generic: dict[Any, Any]) -> None:
        super().__init__(own)
        self.cpu, self.generic = cpu, generic

    def __contains__(self, primitive: Any) -> bool:
        return super().__contains__(primitive) or (primitive in self.cpu and primitive not in self.generic)

    def __missing__(self, primitive: Any) -> Any:
        return self.cpu[primitive]


@_feature("platform_dependent", _after)
def _platform_dependent() -> None:
    """Where `lax.platform_dependent` names cpu, neither mps nor a default, mps takes cpu's branch."""
    from jax._src.interpreters import mlir
    from jax._src.lax.control_flow import conditionals

    index, cond = (mlir._lowerings[p] for p in (conditionals.platform_index_p, conditionals.cond_p))

    def lower_index(ctx: Any, *, platforms: Any) -> Any:
        return index.rule(ctx, platforms=_with_mps(platforms))

    def lower_cond(ctx: Any, *operands: Any, branches_platforms: Any = None, **parameters: Any) -> Any:
        if branches_platforms is not None:
            parameters["branches_platforms"] = _with_mps(branches_platforms)
        return cond.rule(ctx, *operands, **parameters)

    mlir.register_lowering(conditionals.platform_index_p, lower_index, inline=index.inline)
    mlir.register_lowering(conditionals.cond_p, lower_cond, inline=cond.inline)


def _with_mps(platforms: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tuples of platforms' names, None for the default; mps beside cpu where nothing else is for it."""
    if any(names is None or PLATFORM in names for names in platforms):
        return platforms
    return tuple((*names, PLATFORM) if "cpu" in names else names for names in platforms)


@_feature("exported for cpu", _after)
def _exported_for_cpu() -> None:
    """A function that was exported for cpu, and not for mps, runs: what it calls by name is known here, and its numbers are those of cpu."""
    from jax._src.export import _export
    from jax._src.interpreters import mlir

    original = mlir._lowerings[_export.call_exported_p]

    def lower(ctx: Any, *operands: Any, exported: Any) -> Any:
        module = ctx.module_context
        if tuple(module.platforms) == (PLATFORM,) and PLATFORM not in exported.platforms and "cpu" in exported.platforms:
            on_cpu = ctx.replace(module_context=module.replace(platforms=("cpu",)))
            results = original.rule(on_cpu, *operands, exported=exported)
            if on_cpu.tokens_out is not None:
                ctx.set_tokens_out(on_cpu.tokens_out)
            return results
        return original.rule(ctx, *operands, exported=exported)

    mlir.register_lowering(_export.call_exported_p, lower, platform=PLATFORM)


@_feature("profiler", _after)
def _profiler() -> None:
    """`jax.profiler` traces have a plane with what ran on the device and on the host: JAX asks only plugins that it loads by a path."""
    from jaxlib import _profiler as profiler

    capsules: list[Any] = []
    lib.shim_append_capsule(id(capsules))
    profiler.register_plugin_profiler(capsules[0])


@_feature("transfer guards", _after)
def _transfer_guards() -> None:
    """`jax.transfer_guard_device_to_host` guards arrays of mps where reading them copies nothing, too."""
    from jax._src import config

    state: Any = config.transfer_guard_device_to_host

    def told(everywhere: bool, update: Callable[[str | None], None]) -> Callable[[str | None], None]:
        def hook(level: str | None) -> None:
            update(level)
            lib.shim_guard_reads(everywhere, level != "allow" if level is not None else -(not everywhere))

        return hook

    state._add_hooks(told(True, state._update_global_hook), told(False, state._update_thread_local_hook))


@_feature("dlpack", _after)
def _dlpack() -> None:
    """Other libraries read arrays of mps through DLPack, as host memory: JAX knows cpu and its own GPUs."""
    from jax._src.array import ArrayImpl

    pack, place = ArrayImpl.__dlpack__, ArrayImpl.__dlpack_device__

    def is_ours(array: Any) -> bool:
        devices = array.devices()
        return len(devices) == 1 and next(iter(devices)).platform == PLATFORM

    def __dlpack__(self: Any, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None) -> Any:
        if not is_ours(self):
            return pack(self, stream=stream, max_version=max_version, dl_device=dl_device, copy=copy)
        from jax_mps import interop

        return interop.to_dlpack(self, max_version, dl_device, copy)

    def __dlpack_device__(self: Any) -> Any:
        if not is_ours(self):
            return place(self)
        from jax._src.dlpack import DLDeviceType  # type: ignore[attr-defined]

        return DLDeviceType.kDLCPU, 0

    setattr(ArrayImpl, "__dlpack__", __dlpack__)  # noqa: B010  (a type checker refuses to assign to a method)
    setattr(ArrayImpl, "__dlpack_device__", __dlpack_device__)  # noqa: B010


@_feature("persistent cache", _after)
def _persistent_cache() -> None:
    """JAX's own compilation cache, where the user turns it on: it is for platforms on a list inside one function."""
    from jax._src import compilation_cache, compiler

    if not callable(compiler._cache_write):
        raise _Missing("jax._src.compiler._cache_write is no function")
    if not isinstance(compilation_cache.is_cache_used, functools.partial):
        compilation_cache.is_cache_used = functools.partial(_is_cache_used, compilation_cache.is_cache_used)
        compiler._cache_write = functools.partial(_cache_write, compiler._cache_write)


def _is_cache_used(original: Callable[..., bool], backend: Any) -> bool:
    return original(_Serializes() if backend.platform == PLATFORM else backend)


def _cache_write(original: Callable[..., None], key: str, seconds: float, name: str, backend: Any, executable: Any, *callbacks: Any) -> None:
    """JAX's; a program with callbacks is not written. JAX 0.10 says so itself when it is told of them."""
    if backend.platform == PLATFORM:
        from jax_mps.pjrt import entry

        if entry.calls_back(bytes(executable.fingerprint or b"")):
            if not callbacks:
                log.debug("%s calls back into Python and is not written to JAX's persistent cache", name)
                return
            callbacks = ((PLATFORM,),)
    original(key, seconds, name, backend, executable, *callbacks)


class _Serializes:
    """A backend, as far as JAX's cache asks."""

    platform = "cpu"
    supports_executable_serialization = True


@_feature("callbacks", _after)
def _callbacks() -> None:
    """`pure_callback` and `io_callback`: their rules are generic, and emit through one function that knows a list of platforms."""
    from jax._src import callback
    from jax.interpreters import mlir

    if not callable(callback.emit_python_callback):
        raise _Missing("jax._src.callback.emit_python_callback is no function")
    if not isinstance(callback.emit_python_callback, functools.partial):
        callback.emit_python_callback = functools.partial(_emit, callback.emit_python_callback)
    if hasattr(mlir, "emit_python_callback"):  # the sparse solvers' name for it
        mlir.emit_python_callback = callback.emit_python_callback


@_feature("buffer callbacks", _after)
def _buffer_callbacks() -> None:
    """`jax.experimental.buffer_callback`: a function that writes into its results."""
    from jax._src import buffer_callback
    from jax._src.interpreters import mlir

    def rule(ctx: Any, *operands: Any, callback: Any, in_tree: Any, out_tree: Any, has_side_effect: bool, input_output_aliases: Any, **_: Any) -> Any:
        from jax_mps.calls import buffers

        outputs = [(aval.shape, aval.dtype) for aval in ctx.avals_out]
        run = buffers.writer(callback, in_tree, out_tree, outputs, {o: i for i, o in input_output_aliases})
        results, _, _ = _emit(None, ctx, run, None, operands, ctx.avals_in, ctx.avals_out, has_side_effect=has_side_effect)
        return results

    mlir.register_lowering(buffer_callback.buffer_callback_p, rule, platform=PLATFORM)


@_feature("debug callbacks", _after)
def _debug_callbacks() -> None:
    """`jax.debug.print` and `jax.debug.callback` have rules for named platforms only."""
    from jax._src import debugging

    _copy_cpu_rule(debugging.debug_callback_p)
    _copy_cpu_rule(debugging.debug_print_p)


@_feature("approx_top_k", _after)
def _approx_top_k() -> None:
    """The exact top k: the generic rule is a custom call that holds functions of its module."""
    from jax._src.interpreters import mlir
    from jax._src.lax import ann

    def exact(operand: Any, *, k: int, dimension: int, is_max_k: bool) -> Any:
        from jax import lax
        from jax import numpy as jnp

        last = jnp.moveaxis(operand, dimension, -1)
        values, indices = lax.top_k(last if is_max_k else -last, k)
        return jnp.moveaxis(values if is_max_k else -values, -1, dimension), jnp.moveaxis(indices, -1, dimension)

    def rule(ctx: Any, operand: Any, *, reduction_dimension: int, is_max_k: bool, **_: Any) -> Any:
        size = ctx.avals_out[0].shape[reduction_dimension]  # more than k where the user aggregates later
        chosen = functools.partial(exact, k=size, dimension=reduction_dimension, is_max_k=is_max_k)
        return mlir.lower_fun(chosen, multiple_results=True)(ctx, operand)

    mlir.register_lowering(ann.approx_top_k_p, rule, platform=PLATFORM)


@_feature("ffi targets", _after)
def _ffi_targets() -> None:
    """`jax.ffi.register_ffi_target(name, function, platform="mps")` takes a Python function."""
    from jax_mps.calls import ffi

    def enter(name: Any, function: Any, *_: Any) -> None:
        ffi.register_ffi_target(name.decode() if isinstance(name, bytes) else name, function)

    xla_client().register_custom_call_handler(PLATFORM, enter)


@_feature("random bits", _after)
def _threefry() -> None:
    """The generic rule of threefry2x32 is straight-line code; a rolled loop (as on cpu) would leave the device at every step."""
    from jax._src.interpreters import mlir
    from jax._src.random import threefry2x32

    if threefry2x32.threefry2x32_p not in mlir._lowerings:
        raise _Missing("threefry2x32 has no generic rule")


# ---- callbacks ---------------------------------------------------------------------------------------------------------------------


def _emit(
    original: Callable[..., Any] | None,
    ctx: Any,
    callback: Callable[..., Any],
    token: Any,
    operands: Sequence[Any],
    operand_avals: Sequence[Any],
    result_avals: Sequence[Any],
    *,
    has_side_effect: bool,
    returns_token: bool = True,
    partitioned: bool = False,
    sharding: Any = None,
    **options: Any,
) -> tuple[Sequence[Any], Any, Any]:
    """JAX's `emit_python_callback`; for mps, a custom call that names the function's entry in our table."""
    if original is not None and tuple(ctx.module_context.platforms) != (PLATFORM,):
        given = {"has_side_effect": has_side_effect, "returns_token": returns_token, "partitioned": partitioned, "sharding": sharding, **options}
        return original(ctx, callback, token, operands, operand_avals, result_avals, **given)  # type: ignore[no-any-return]

    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    from jax_mps.calls import callbacks

    types = [_tensor_type(aval) for aval in result_avals]
    entry = callbacks.register(callback, types, narrow=not jax_config().jax_enable_x64)
    ctx.module_context.add_keepalive(entry)
    tokens = [token] if token is not None else []
    call = stablehlo.CustomCallOp(
        [*(t.type for t in tokens), *(ir.Type.parse(str(t)) for t in types)],
        [*tokens, *_flat(operands)],
        call_target_name=ir.StringAttr.get(callbacks.TARGET),
        has_side_effect=ir.BoolAttr.get(has_side_effect),
        backend_config=ir.StringAttr.get(entry.marker),
        api_version=ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 2),
    )
    if partitioned:  # each of several devices calls with its own part (host/several.py)
        call.attributes[callbacks.PARTITIONED] = ir.UnitAttr.get()
    if sharding is not None:
        _annotate(ctx.module_context, call, sharding, first_is_token=bool(tokens and types))
    results = list(call.results)
    return (results[1:], results[0], entry) if tokens else (results, None, entry)


def _annotate(module: Any, call: Any, sharding: Any, *, first_is_token: bool) -> None:
    """Say which device calls back, as other platforms do. Shardy wants an annotation for each result, JAX gives none for the token."""
    try:
        from jax._src.interpreters import mlir
        from jax._src.named_sharding import SdyArray
        from jax._src.sharding_impls import SdyArrayList
    except ImportError as error:  # with one device it says nothing
        log.warning("a callback's sharding is left out: %s", error)
        return
    if first_is_token and isinstance(sharding, SdyArrayList):
        token = SdyArray(mesh_shape=(), dim_shardings=(), logical_device_ids=sharding.shardings[0].logical_device_ids)
        sharding = SdyArrayList((token, *sharding.shardings))
    mlir.set_sharding(module, call, sharding)


def _flat(operands: Sequence[Any]) -> list[Any]:
    """Values of MLIR; an operand may be a sequence of them."""
    return [v for operand in operands for v in (operand if isinstance(operand, (tuple, list)) else (operand,))]


def _tensor_type(aval: Any) -> Any:
    """The type of what a callback returns for an abstract value (a typed key is its uint32s, float0 is a bool)."""
    import jax
    from jax._src import core

    from jax_mps.plan.types import TensorType

    physical = core.physical_aval(aval)
    return TensorType(tuple(physical.shape), "bool" if physical.dtype == jax.dtypes.float0 else physical.dtype.name)
