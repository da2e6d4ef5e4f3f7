"""Five programs, cold and warm, on mps and on XLA:CPU with JAX's own persistent cache: python benchmarks/cache_mix.py [--repeats N] [--json FILE]

Every figure is the least of N processes; the two backends take turns, the one that begins another each time, both in fresh cache folders, and
both with Python's compiled modules in place. `compile` is what JAX waits for between lowering and an executable, `first` the first call, `whole`
the time from the start of the process to the first result, `cpu` the processor time until then, on all threads, which other programs on the
machine disturb less. `plugin` is the processor time that the plugin itself takes to find a warm program: reading, hashing, importing; its aim is
15 us an op + 1 ms. `blas` is what it takes to load OpenBLAS, once a process, when the first program with a product is loaded; `plugin` is without
it, all else is with it. The last line of each program is mps over xla, warm. `devices` is `import jax; jax.devices()` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRAMS = ("eager op", "MLP step", "ResNet18 step", "GPT step", "1,000-step scan")
BACKENDS = ("mps", "xla")
START = "devices"


# ---- the programs: a function and its arguments, NumPy only, so that nothing else is compiled ----------------------------------------


def normal(*shape: int, scale: float = 0.05) -> Any:
    import numpy as np

    return np.random.default_rng(sum(shape)).standard_normal(shape, "float32") * np.float32(scale)


def descend(loss: Callable[..., Any], rate: float = 0.01) -> Callable[..., Any]:
    """A step of gradient descent with momentum."""
    import jax

    def step(p: Any, m: Any, *data: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(p, *data)
        m = jax.tree.map(lambda a, g: 0.9 * a + g, m, grads)
        return jax.tree.map(lambda a, b: a - rate * b, p, m), m, value

    return step


def mlp() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax.numpy as jnp

    def loss(p: Any, x: Any) -> Any:
        for w, b in p:
            x = jnp.tanh(x @ w + b)
        return (x**2).mean()

    p = [(normal(64, 64), normal(64)) for _ in range(4)]
    return descend(loss), (p, p, normal(32, 64))


def resnet() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    stages = [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]

    def conv(x: Any, w: Any, stride: int = 1) -> Any:
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def norm(x: Any, p: Any) -> Any:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p[0] + p[1]

    def loss(p: Any, x: Any, y: Any) -> Any:
        x = jax.nn.relu(norm(conv(x, p["stem"]), p["norm"]))
        for block, (_, stride) in zip(p["blocks"], stages, strict=True):
            z = jax.nn.relu(norm(conv(x, block["a"], stride), block["na"]))
            z = norm(conv(z, block["b"]), block["nb"])
            x = jax.nn.relu(z + (norm(conv(x, block["s"], stride), block["ns"]) if "s" in block else x))
        logits = x.mean((1, 2)) @ p["head"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def scale(n: int) -> Any:
        return np.ones(n, "float32"), np.zeros(n, "float32")

    blocks, width = [], 64
    for n, stride in stages:
        block = {"a": normal(3, 3, width, n), "na": scale(n), "b": normal(3, 3, n, n), "nb": scale(n)}
        blocks.append(block | ({"s": normal(1, 1, width, n), "ns": scale(n)} if stride == 2 else {}))
        width = n
    p = {"stem": normal(3, 3, 3, 64), "norm": scale(64), "blocks": blocks, "head": normal(512, 10)}
    return descend(loss), (p, jax.tree.map(np.zeros_like, p), normal(4, 32, 32, 3), np.arange(4, dtype="int32"))


def gpt() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    width, heads, context, layers, vocabulary = 128, 4, 64, 4, 256

    def norm(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def loss(p: Any, tokens: Any) -> Any:
        x = p["embed"][tokens[:, :-1]] + p["place"]
        seen = jnp.tril(jnp.ones((context, context), bool))
        for layer in p["layers"]:
            q, k, v = jnp.split(norm(x) @ layer["qkv"], 3, -1)
            q, k, v = (a.reshape(*a.shape[:2], heads, -1).swapaxes(1, 2) for a in (q, k, v))
            scores = jnp.where(seen, q @ k.swapaxes(-1, -2) / np.sqrt(width // heads), -jnp.inf)
            x = x + (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape) @ layer["out"]
            x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
        logits = norm(x) @ p["embed"].T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()

    layer = {"qkv": normal(width, 3 * width), "out": normal(width, width), "up": normal(width, 4 * width), "down": normal(4 * width, width)}
    p = {"embed": normal(vocabulary, width), "place": normal(context, width), "layers": [layer] * layers}
    return descend(loss), (p, jax.tree.map(np.zeros_like, p), np.arange(4 * (context + 1), dtype="int32").reshape(4, -1) % vocabulary)


def scan() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    def program(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) + 0.1 * c, c.sum()), x, length=1000)

    return program, (normal(8, 16), normal(16, 16))


def eager() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import jax.numpy as jnp

    return jnp.sin, (normal(16),)


BUILDERS = dict(zip(PROGRAMS, (eager, mlp, resnet, gpt, scan), strict=True))


# ---- one process ---------------------------------------------------------------------------------------------------------------------


def watch(spent: dict[str, float]) -> None:
    """Add up what the plugin spends in compile and in imports, and in loading OpenBLAS for them."""
    from jax_mps import blas
    from jax_mps.pjrt.client import Client
    from jax_mps.plan.segments import Device

    for owner, name, part in ((Client, "compile", "plugin"), (Device, "load", "plugin"), (blas, "install", "blas")):
        original = getattr(owner, name)

        def timed(*arguments: Any, original: Callable[..., Any] = original, part: str = part) -> Any:
            start = time.thread_time()
            try:
                return original(*arguments)
            finally:
                took = time.thread_time() - start
                spent[part] += took
                if part == "blas":
                    spent["plugin"] -= took

        setattr(owner, name, timed)


def child(name: str) -> None:
    """Run one program, and print seconds as JSON."""
    import jax

    on_mps = jax.default_backend() == "mps"
    if name == START:
        sys.stdout.write(f"FOUND {json.dumps({'whole': time.time() - float(os.environ['CACHE_MIX_START']), 'cpu': time.process_time()})}\n")
        return
    spent = {"plugin": 0.0, "blas": 0.0}
    if on_mps:
        watch(spent)
    function, arguments = BUILDERS[name]()
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    middle = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    end = time.perf_counter()
    found = {"compile": middle - start, "first": end - middle, "whole": time.time() - float(os.environ["CACHE_MIX_START"]), "cpu": time.process_time()}
    if on_mps:
        import jax_mps
        from jax_mps import compat
        from jax_mps.pjrt import entry
        from jax_mps.plan.segments import Device

        segments = entry.client().program(compat.fingerprint(compiled)).segments()
        found |= spent | {"ops": sum(s.ops for s in segments if isinstance(s, Device)), "translations": jax_mps.stats()["translations"]}
    sys.stdout.write(f"FOUND {json.dumps(found)}\n")


# ---- all of them ---------------------------------------------------------------------------------------------------------------------


def run(name: str, backend: str, folder: Path) -> dict[str, float]:
    settings = {"JAX_PLATFORMS": "mps", "JAX_MPS_CACHE_DIR": str(folder)}
    if backend == "xla":
        settings = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        settings["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}  # compiling modules anew would hide everything else
    environment |= settings | {"CACHE_MIX_START": str(time.time())}
    done = subprocess.run([sys.executable, __file__, "--child", name], env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if done.returncode or not found:
        raise RuntimeError(f"{name} on {backend} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(found[0].removeprefix("FOUND "))
    return result


def least(samples: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(s[name] for s in samples) for name in samples[0]}


def measure(name: str, repeats: int) -> dict[str, dict[str, float]]:
    """`cold` and `warm` of each backend."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = {backend: Path(folder) / backend for backend in BACKENDS}
        for backend in BACKENDS:
            found[f"{backend} cold"] = run(name, backend, folders[backend])
        samples: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
        for turn in range(repeats):
            for backend in BACKENDS if turn % 2 else reversed(BACKENDS):
                samples[backend].append(run(name, backend, folders[backend]))
    return found | {f"{backend} warm": least(samples[backend]) for backend in BACKENDS}


TIMES = ("compile", "first", "whole", "cpu")


def ratios(found: dict[str, dict[str, float]]) -> str:
    mps, xla = (found[f"{backend} warm"] for backend in BACKENDS)
    return f"  {'mps / xla':10}" + "".join(f"{mps[n] / xla[n]:10.2f}" if n in mps else f"{'':10}" for n in TIMES)


def line(label: str, row: dict[str, float]) -> str:
    times = "".join(f"{1e3 * row[n]:10.1f}" if n in row else f"{'':10}" for n in TIMES)
    if "plugin" not in row:
        return f"  {label:10}{times}"
    aim = 1 + 0.015 * row["ops"]
    return f"  {label:10}{times}{1e3 * row['plugin']:10.1f}{aim:10.1f}{1e3 * row['blas']:10.1f}{row['ops']:8.0f} ops{row['translations']:3.0f} translated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="warm processes of each program and backend")
    parser.add_argument("--only", choices=(START, *PROGRAMS), action="append", help="these programs only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured, in seconds")
    parser.add_argument("--child", choices=(START, *PROGRAMS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    found = {}
    sys.stdout.write(f"{'ms':12}{'compile':>10}{'first':>10}{'whole':>10}{'cpu':>10}{'plugin':>10}{'its aim':>10}{'blas':>10}\n")
    for name in options.only or (START, *PROGRAMS):
        found[name] = measure(name, options.repeats)
        sys.stdout.write("\n".join([name, *(line(label, row) for label, row in found[name].items()), ratios(found[name])]) + "\n")
        sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
