"""jax on mps against MLX by hand and against XLA, in one table: python -m benchmarks [--quick] [--rows TEXT ...] [--json FILE] [--png FILE]

Every row is the same work three times in one process. Numbers are checked against XLA's before anything is timed; samples of the three are
taken in turn; shown are medians, and in brackets half the distance between the quartiles. XLA runs on CUDA where JAX has it, else on CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.platforms import platforms

os.environ.setdefault("JAX_PLATFORMS", platforms())
os.environ.setdefault("JAX_MPS_COMPILE", "1" if "cuda" in os.environ["JAX_PLATFORMS"] else "auto")  # from the second call, as by hand
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import mlx.core as mx

from benchmarks.harness import BACKENDS, Result, measure

ROOT = Path(__file__).resolve().parents[1]


def versions(xla: jax.Device) -> dict[str, str]:
    device = jax.devices("mps")[0]
    info = mx.device_info(mx.default_device())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "jax": jax.__version__,
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "mps": device.device_kind,
        "xla": f"{xla.platform} {xla.device_kind}",
        "device": str(info.get("device_name", platform.processor() or platform.machine())),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "tf32": os.environ.get("MLX_ENABLE_TF32", ""),
        "commit": subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
    }


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return "-"


def cell(result: Result, backend: str) -> str:
    if backend in result.errors and backend not in result.samples:
        return "failed"
    spread = result.spread(backend)
    return duration(result.median(backend)) + (f" ({spread:.0%})" if spread is not None else "")


def ratio(result: Result, other: str) -> str:
    ours, theirs = result.median("mps"), result.median(other)
    return f"{ours / theirs:.2f}" if ours and theirs else "-"


def line(result: Result) -> str:
    cells = [cell(result, b) for b in BACKENDS]
    return f"| {result.name} | {' | '.join(cells)} | {ratio(result, 'mlx')} | {ratio(result, 'xla')} |"


def start_rows(small: bool, xla: jax.Device, backends: Sequence[str]) -> list[Result]:
    """Time to the end of the first training step of a new process: with an empty cache, then with a full one."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_MPS_CACHE_DIR": folder,
            "MLX_PTX_CACHE_DIR": f"{folder}/kernels",
            "BENCH_XLA": xla.platform.replace("gpu", "cuda"),
        }
        environment |= {"JAX_COMPILATION_CACHE_DIR": f"{folder}/xla", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        os.chmod(folder, 0o700)
        for name in ("first step of a process, cold", "first step of a process, warm"):
            result = Result(name, "process")
            for backend in backends:
                command = [sys.executable, "-m", "benchmarks.start", backend, str(int(small)), str(time.time())]
                done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
                found = [float(text.split()[1]) for text in done.stdout.splitlines() if text.startswith("SECONDS")]
                if found:
                    result.samples[backend] = found
                else:
                    result.errors[backend] = done.stderr.strip().splitlines()[-1][:160] if done.stderr.strip() else f"exit {done.returncode}"
            results.append(result)
    return results


def chart(results: list[Result], path: str, title: str) -> None:
    """Bars of the time relative to mps, for each row that has both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in results if r.median("mps")]
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(shown) + 1.5))
    for offset, backend in ((-0.2, "mlx"), (0.2, "xla")):
        values = [(r.median(backend) or 0) / (r.median("mps") or 1) for r in shown]
        axes.barh([i + offset for i in range(len(shown))], values, 0.38, label={"mlx": "MLX by hand", "xla": "XLA"}[backend])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [r.name for r in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time relative to jax on mps: right of the line, mps is faster")
    axes.set_title(title, fontsize=9)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], metavar="TEXT", help="only rows whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="few, short samples")
    parser.add_argument("--size", choices=["small", "full"], help="default: full on a GPU, small on a CPU")
    parser.add_argument("--backends", nargs="*", choices=BACKENDS, default=list(BACKENDS), help="only these; without xla nothing is checked")
    parser.add_argument("--repeats", type=int, help="samples of each backend (default 9, 3 with --quick)")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    parser.add_argument("--compile", action="store_true", help="mx.compile on a CPU, too")
    parser.add_argument("--no-start", action="store_true", help="leave out the rows that start processes")
    options = parser.parse_args()

    jax.devices("mps")  # first: our MLX stream must be the process's first
    xla = jax.devices("cuda" if "cuda" in os.environ["JAX_PLATFORMS"] else "cpu")[0]
    from benchmarks.rows import rows

    if mx.default_device().type == mx.cpu and not options.compile:
        mx.disable_compile()  # there it runs g++ for seconds a kernel, minutes for a training step; jax on mps leaves it off, too
    small = options.size == "small" or (options.size is None and mx.default_device().type == mx.cpu)
    about = versions(xla)

    def say(text: str) -> None:
        print(text, flush=True)

    say("\n".join(f"{name}: {value}" for name, value in about.items()))
    say("\n| row | jax on mps | MLX by hand | jax on XLA | mps / MLX | mps / XLA |\n|---|---|---|---|---|---|")
    repeats, seconds = options.repeats or (3 if options.quick else 9), 0.05 if options.quick else 0.2
    results = []

    def keep(result: Result) -> None:
        results.append(result)
        say(line(result))
        if options.json:
            rows_now = [dataclasses.asdict(r) for r in results]
            Path(options.json).write_text(json.dumps({"about": about, "rows": rows_now}, indent=1))

    def wanted(name: str) -> bool:
        return not options.rows or any(text in name for text in options.rows)

    for row in rows(small):
        if wanted(row.name):
            keep(measure(row, xla, repeats=repeats, seconds=seconds, backends=options.backends))
    if not options.no_start and wanted("first step of a process"):
        for result in start_rows(small, xla, options.backends):
            keep(result)
    slow = [r for r in results if max(r.first.values(), default=0) > 1]
    firsts = [f"{r.name}: " + ", ".join(f"{b} {s:.2f}" for b, s in r.first.items()) for r in slow]
    say("\nSeconds until the first unit was done, compilation included: " + "; ".join(firsts))
    peaks = [f"{r.name}: " + ", ".join(f"{b} {n / 2**20:.0f} MiB" for b, n in r.peak.items()) for r in results if r.peak]
    say("Peak memory: " + "; ".join(peaks))
    for result in results:
        for backend, error in result.errors.items():
            say(f"{result.name}, {backend}: {error}")
    if options.png:
        chart(results, options.png, f"{about['device']}, {about['date']}, jax {about['jax']}, MLX {about['mlx']}")


if __name__ == "__main__":
    main()
