"""What a row is, how its samples are taken and how its numbers are checked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import mlx.core as mx
import numpy as np

BACKENDS = ("mps", "mlx", "xla")


@dataclass(frozen=True)
class Work:
    """One backend's side of a row. run(n): do n units and wait for the last; numbers(): what they came to.

    sample: seconds of n units, where `run` does more than is to be timed.
    """

    run: Callable[[int], object]
    numbers: Callable[[], Sequence[Any]]
    sample: Callable[[int], float] | None = None

    def seconds(self, units: int) -> float:
        """Seconds of one unit, from that many."""
        if self.sample is not None:
            return self.sample(units) / units
        start = time.perf_counter()
        self.run(units)
        return (time.perf_counter() - start) / units


@dataclass(frozen=True)
class Row:
    """The same work three times. jax(device): through JAX on a device; mlx(): written by hand for MLX.

    rtol: of the numbers, norm-wise. peak: also report peak memory. What a row measures is one call of `unit`.
    """

    name: str
    jax: Callable[[jax.Device], Work]
    mlx: Callable[[], Work]
    rtol: float = 1e-4
    peak: bool = False
    unit: str = "call"


@dataclass
class Result:
    """Samples in seconds by backend, or why there are none."""

    name: str
    unit: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # seconds until the first unit was done, compilation included
    peak: dict[str, int] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)  # distance from XLA's numbers

    def median(self, backend: str) -> float | None:
        found = self.samples.get(backend)
        return statistics.median(found) if found else None

    def spread(self, backend: str) -> float | None:
        """Half the distance between the quartiles, over the median."""
        found = sorted(self.samples.get(backend, []))
        if len(found) < 4:
            return None
        low, _, high = statistics.quantiles(found, n=4)
        return (high - low) / 2 / statistics.median(found)


def measure(row: Row, xla: jax.Device, *, repeats: int, seconds: float, backends: Sequence[str] = BACKENDS) -> Result:
    """Make, check and time a row: samples of about `seconds`, the backends in turn."""
    result = Result(row.name, row.unit)
    makers = {"mps": lambda: row.jax(jax.devices("mps")[0]), "mlx": row.mlx, "xla": lambda: row.jax(xla)}
    works: dict[str, Work] = {}
    numbers: dict[str, list[np.ndarray[Any, Any]]] = {}
    for backend in backends:
        mx.clear_cache()
        try:
            work = makers[backend]()
            start = time.perf_counter()
            work.run(1)
            result.first[backend] = time.perf_counter() - start
            for _ in range(3):  # compiled from the second call on
                work.run(2)
            numbers[backend] = [np.asarray(n) for n in work.numbers()]
            works[backend] = work
        except Exception as error:  # one side of a row that fails is a result, too
            result.errors[backend] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    if "xla" in numbers:
        result.off = {b: distance(n, numbers["xla"]) for b, n in numbers.items() if b != "xla"}
        for backend, off in result.off.items():
            if not off <= row.rtol:
                result.errors[backend] = f"numbers are off by {off:.1e}"
                works.pop(backend, None)
    units = {b: max(1, min(100_000, round(seconds / max(w.seconds(1), 1e-6)))) for b, w in works.items()}
    for _ in range(repeats):
        for backend, work in works.items():
            try:
                result.samples.setdefault(backend, []).append(work.seconds(units[backend]))
            except Exception as error:
                result.errors[backend] = f"{type(error).__name__}: {str(error)[:160]}"
    if row.peak:
        for backend in ("mps", "mlx"):
            if backend in works:
                mx.synchronize()
                mx.clear_cache()
                mx.reset_peak_memory()
                works[backend].run(2)
                result.peak[backend] = mx.get_peak_memory()
    return result


def distance(got: Sequence[np.ndarray[Any, Any]], want: Sequence[np.ndarray[Any, Any]]) -> float:
    """The largest norm-wise relative error; infinite where shapes differ or there is a NaN."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = a.astype(np.complex128), b.astype(np.complex128)
        off = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
        worst = max(worst, off if off == off else float("inf"))
    return worst


# ---- the usual kinds of work -------------------------------------------------------------------------------------------------------


KEPT = 4 << 30  # bytes of results that may wait


def nbytes(tree: Any) -> int:
    return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))


def jax_calls(f: Callable[..., Any], *arguments: Any) -> Callable[[jax.Device], Work]:
    """Independent calls of a jitted function; all results are kept and awaited."""

    def make(device: jax.Device) -> Work:
        placed = jax.device_put(arguments, device)
        compiled = jax.jit(f)

        def run(units: int) -> object:
            kept = []
            for _ in range(units):
                kept.append(compiled(*placed))
                if len(kept) * nbytes(kept[0]) > KEPT:
                    jax.block_until_ready(kept)
                    kept.clear()
            return jax.block_until_ready(kept)

        return Work(run, lambda: jax.tree.leaves(compiled(*placed)))

    return make


def mlx_calls(f: Callable[..., Any], *arguments: Any, compiled: bool = True) -> Callable[[], Work]:
    """The same with `mx.compile`."""

    def make() -> Work:
        placed = jax.tree.map(mx.array, arguments)
        function = mx.compile(f) if compiled else f

        def run(units: int) -> object:
            kept = []
            for _ in range(units):
                kept.append(function(*placed))
                mx.async_eval(kept[-1])
                if len(kept) * nbytes(kept[0]) > KEPT:
                    mx.eval(kept)
                    kept.clear()
            mx.eval(kept)
            return kept

        return Work(run, lambda: mlx_leaves(function(*placed)))

    return make


def mlx_leaves(tree: Any) -> list[np.ndarray[Any, Any]]:
    return [np.array(leaf.astype(mx.float32) if leaf.dtype == mx.bfloat16 else leaf) for leaf in jax.tree.leaves(tree)]


def jax_steps(step: Callable[..., Any], state: Any, *arguments: Any, donate: bool = True) -> Callable[[jax.Device], Work]:
    """A chain `state, out = step(state, *arguments)`; the numbers are the first four `out`s."""

    def make(device: jax.Device) -> Work:
        held = [jax.device_put(state, device)]
        placed = jax.device_put(arguments, device)
        compiled = jax.jit(step, donate_argnums=0 if donate else ())
        outs: list[Any] = []

        def run(units: int) -> object:
            for _ in range(units):
                held[0], out = compiled(held[0], *placed)
                if len(outs) < 4:
                    outs.append(out)
            return jax.block_until_ready((held[0], out))

        return Work(run, lambda: jax.tree.leaves(outs))

    return make
