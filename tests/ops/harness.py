"""Op tables: a row is a JAX function (or StableHLO text) with its arguments; the reference is the same program on XLA's CPU backend.

`run_on_mlx` translates and runs the steps on MLX directly (no shim, no cache, no host): what fails here has no device lowering.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import mlx.core as mx
import numpy as np
from jaxlib import _jax
from jaxlib.mlir.dialects import stablehlo

from jax_mps.ops import load_all
from jax_mps.ops.dtypes import mx_array
from jax_mps.ops.registry import lower_steps
from jax_mps.plan import build
from jax_mps.plan.translate import claims
from jax_mps.plan.types import Plan, numpy_dtype
from jax_mps.rewrites import rewrite, whole


@dataclass(frozen=True)
class Case:
    """One row. `f` is a JAX function of `args` (NumPy arrays), or StableHLO text whose @main takes them.

    Tolerances are relative and absolute; integer and bool results must be equal. A row with a tolerance looser than the default
    names the operation that lost the bits in a comment.
    """

    name: str
    f: Callable[..., Any] | str
    args: Sequence[Any] = ()
    rtol: float | None = None
    atol: float | None = None
    platform: str = "tpu"  # whose lowering rules are used: JAX's generic ones, as for an unknown platform

    def __str__(self) -> str:
        return self.name


# float32 results of MLX and XLA differ by a few ulp; half types by one of theirs
RTOL = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-6, "complex64": 4e-6}


def portable_artifact(case: Case) -> bytes:
    """The bytes that a plugin would be handed for the row's program."""
    if isinstance(case.f, str):
        text = case.f
    else:
        lowered = jax.jit(case.f, keep_unused=True).trace(*case.args).lower(lowering_platforms=(case.platform,))
        text = str(lowered.compiler_ir("stablehlo"))
    return _jax.mlir.serialize_portable_artifact(text, stablehlo.get_current_version())


def plan_of(case: Case) -> Plan:
    """The row's program as a plan, composites kept where a lowering claims them."""
    load_all()
    return build.build(build.parse(portable_artifact(case)), claims, whole)


def lowered(case: Case, *, rewritten: bool = False) -> tuple[Plan, Callable[..., list[mx.array]], list[mx.array]]:
    """The row's plan (after the rewrites, if wanted), its steps as one function of arrays, and its arguments."""
    plan = rewrite(plan_of(case)) if rewritten else plan_of(case)
    steps = lower_steps(plan.steps)
    flat = [np.asarray(a) for a in jax.tree.leaves(case.args)]
    arguments = [mx_array(a.astype(numpy_dtype(v.dtype)), v.dtype) for v, a in zip(plan.arguments, flat, strict=True)]

    def run(*arrays: mx.array) -> list[mx.array]:
        env = dict(zip(plan.arguments, arrays, strict=True))
        for step in steps:
            step(env)
        return [env[v] for v in plan.results]

    return plan, run, arguments


def run_on_mlx(case: Case) -> list[np.ndarray[Any, Any]]:
    """Results of the row's program, computed by our lowerings alone."""
    plan, run, arguments = lowered(case)
    return results_of(plan, run(*map(as_view, arguments)), case)


def as_view(array: mx.array) -> mx.array:
    """The same values not row by row: every second of twice as many, or one that is broadcast. Programs hand such arrays to each other."""
    if array.ndim == 0 or array.size == 0:
        return array
    mx.eval(array)
    view = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    bits = np.asarray(view)
    if (bits == bits.flat[0]).all():
        seen = mx.broadcast_to(array.reshape(-1)[0], array.shape)
    else:
        seen = mx.repeat(array, 2, axis=-1)[..., ::2]
    mx.eval(seen)
    return seen


def run_exported(case: Case) -> list[np.ndarray[Any, Any]]:
    """As `run_on_mlx`, but through a file: what a later process runs."""
    plan, run, arguments = lowered(case)
    return results_of(plan, through_a_file(run, arguments), case)


def through_a_file(run: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Sequence[mx.array]:
    """Results of a function after export and import."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "f.mlxfn")
        mx.export_function(path, run, *arguments)
        results: Sequence[mx.array] = mx.import_function(path)(*arguments)
        mx.eval(*results)
        return results


def check_exported(case: Case) -> None:
    """Assert that the row's program survives export and import bit for bit."""
    for index, (fresh, loaded) in enumerate(zip(run_on_mlx(case), run_exported(case), strict=True)):
        assert fresh.tobytes() == loaded.tobytes(), f"{case.name}[{index}]: differs after export and import"


def check_both(case: Case) -> None:
    """`check` and `check_exported` with one lowering."""
    plan, run, arguments = lowered(case)
    fresh = results_of(plan, run(*arguments), case)
    assert_same(fresh, reference(case), case)
    loaded = results_of(plan, through_a_file(run, arguments), case)
    for index, (ours, theirs) in enumerate(zip(fresh, loaded, strict=True)):
        assert ours.tobytes() == theirs.tobytes(), f"{case.name}[{index}]: differs after export and import"


def results_of(plan: Plan, outputs: Sequence[mx.array], case: Case) -> list[np.ndarray[Any, Any]]:
    mx.eval(*outputs)
    for value, output in zip(plan.results, outputs, strict=True):
        assert tuple(output.shape) == value.shape, f"{case.name}: shape {output.shape}, expected {value.type}"
        assert str(output.dtype).removeprefix("mlx.core.") == value.dtype.replace("token", "bool"), f"{case.name}: {output.dtype}, expected {value.type}"
    return [to_numpy(o) for o in outputs]


def to_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """A NumPy copy; bfloat16 as ml_dtypes has it."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(numpy_dtype("bfloat16"))
    return np.array(array)


# Of the reference, which runs once: to compile it is most of a row's time, and a third less like this.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}


def reference(case: Case) -> list[np.ndarray[Any, Any]]:
    """The same program on XLA's CPU backend (StableHLO text through the backend's own client)."""
    cpu = jax.devices("cpu")[0]
    if not isinstance(case.f, str):
        with jax.default_device(cpu):
            return [np.asarray(a) for a in jax.tree.leaves(jax.jit(case.f, compiler_options=QUICKLY)(*case.args))]
    from jaxlib import xla_client

    devices = xla_client.DeviceList((cpu,))
    options = xla_client.CompileOptions()
    options.env_option_overrides = list(QUICKLY.items())
    executable = cpu.client.compile_and_load(case.f, devices, options)
    arguments = [jax.device_put(np.asarray(a), cpu) for a in case.args]
    results = executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    return [np.asarray(r[0]) for r in results]


def check(case: Case) -> None:
    """Assert that MLX's results equal the reference in shape and dtype, and in value within the row's tolerance."""
    assert_same(run_on_mlx(case), reference(case), case)


def assert_same(got: Sequence[np.ndarray[Any, Any]], want: Sequence[np.ndarray[Any, Any]], case: Case) -> None:
    """Compare result lists; NaNs are equal, zeros of either sign are."""
    assert len(got) == len(want), f"{case.name}: {len(got)} results, expected {len(want)}"
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        label = f"{case.name}[{index}]"
        assert ours.shape == theirs.shape, f"{label}: shape {ours.shape}, expected {theirs.shape}"
        assert ours.dtype == theirs.dtype, f"{label}: dtype {ours.dtype}, expected {theirs.dtype}"
        name = theirs.dtype.name
        if name not in RTOL:
            np.testing.assert_array_equal(ours, theirs, err_msg=label)
            continue
        wide = np.complex128 if name == "complex64" else np.float64
        rtol = RTOL[name] if case.rtol is None else case.rtol
        atol = 1e-30 if case.atol is None else case.atol
        np.testing.assert_allclose(ours.astype(wide), theirs.astype(wide), rtol=rtol, atol=atol, err_msg=label)
