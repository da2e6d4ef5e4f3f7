"""The second process: no translation, no export, no MLIR; and what is and is not a hit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from device.programs import PRELUDE, Ran, finish, run, start

import jax_mps
from jax_mps.cache import Store

MLP = """
def loss(p, x):
    for w in p: x = jnp.tanh(x @ w)
    return (x ** 2).mean()

@jax.jit
def step(p, x):
    l, g = jax.value_and_grad(loss)(p, x)
    return l, [a - 0.1 * b for a, b in zip(p, g)]

x = np.linspace(-1, 1, 32, dtype="float32").reshape(4, 8)
p = [np.full((8, 8), 0.1 * (i + 1), "float32") for i in range(3)]
for _ in range(3):
    l, p = step(p, x)
report(loss=float(l))
"""

# A while inside a scan inside a cond, a Host step in the innermost body, captured values at every depth.
NESTED = """
k = np.arange(6, dtype="float32")

def host_step(y):  # a comparator that no table of ours knows, so that the sort runs on the host
    return lax.sort((jnp.sin(y), y), num_keys=1)[1] + jnp.linalg.cholesky(jnp.eye(6) * (2 + y[0] ** 2))[0]

@jax.jit
def program(x, n):
    outer = x * 2
    def taken(v):
        def body(c, a):
            def step(s):
                i, y = s
                return i + 1, host_step(y + jnp.sin(outer) * a + k)
            i, y = lax.while_loop(lambda s: (s[0] < 5) & (s[1].sum() < 1e3), step, (0, c))
            return y, y.sum() + i
        return lax.scan(body, v, jnp.arange(20.0) + n)
    return lax.cond(n > 0, taken, lambda v: (v, jnp.zeros(20)), x)

y, ys = program(k, np.float32(1))
z, zs = program(k, np.float32(-1))
report(y=np.asarray(y).tolist(), ys=np.asarray(ys).tolist(), z=np.asarray(z).tolist())
"""


def test_second_process_translates_nothing(tmp_path: Path) -> None:
    """A train step is read back from disk by its raw bytes, and gives the same loss."""
    cold = run(MLP, tmp_path)
    warm = run(MLP, tmp_path, NO_TRANSLATION="nor MLIR")
    assert cold.stats["translations"] == cold.stats["disk_misses"] > 0
    assert warm.stats["translations"] == warm.stats["exports"] == 0
    assert warm.stats["disk_hits"] == warm.stats["alias_hits"] == cold.stats["translations"]
    assert warm.report["loss"] == cold.report["loss"]


def test_warm_start_imports_no_translator(tmp_path: Path) -> None:
    """A warm start imports neither the translator nor any lowering."""
    source = MLP + 'print("MODULES", sorted(m for m in sys.modules if m.startswith(("jax_mps.plan.build", "jax_mps.ops.", "jax_mps.rewrites."))))'
    run(source, tmp_path)
    warm = run(source, tmp_path)
    (line,) = [line for line in warm.output.splitlines() if line.startswith("MODULES")]
    assert line == "MODULES ['jax_mps.ops.dtypes']"


def test_nested_control_flow_cold_and_warm(tmp_path: Path) -> None:
    """A while in a scan in a cond with a host step inside: right cold, warm, and as XLA's CPU backend has it."""
    cold = run(NESTED, tmp_path)
    warm = run(NESTED, tmp_path, NO_TRANSLATION="nor MLIR")
    reference = finish(start(NESTED, tmp_path, JAX_PLATFORMS="cpu"))
    assert cold.stats["host_segments"] > 0
    for name in ("y", "ys", "z"):
        assert cold.report[name] == warm.report[name]
        assert cold.report[name] == pytest.approx(reference.report[name], rel=1e-5)


def test_moved_and_renamed_function_is_a_hit(tmp_path: Path) -> None:
    """Lines, file and function name are not part of a program."""
    run(MLP, tmp_path)
    moved = run("#\n" * 5 + MLP.replace("step", "another_step").replace("def loss", "\n\ndef loss"), tmp_path, NO_TRANSLATION="1")
    assert moved.stats["translations"] == 0
    assert moved.stats["disk_hits"] > 0


def test_what_does_not_change_the_result_is_a_hit(tmp_path: Path) -> None:
    """Working directory, hash seed, file: none of them is part of a program, and all but the file leave its raw bytes alone."""
    cache = tmp_path / "cache"
    run(MLP, cache)
    filed = f"exec(compile({MLP!r}, '/elsewhere/program.py', 'exec'))"
    processes = [
        start(MLP, cache, cwd=tmp_path, NO_TRANSLATION="nor MLIR"),
        start(MLP, cache, PYTHONHASHSEED="7", NO_TRANSLATION="nor MLIR"),
        start(filed, cache, NO_TRANSLATION="1"),
    ]
    assert [finish(p).stats["translations"] for p in processes] == [0, 0, 0]


# Programs beside MLP, and the part of the key that differs.
_DEVICE = "import jax_mps.runtime as r; d = r.device()._replace(architecture='other'); r.device = lambda: d\n"
_KIND = """
import types, jax_mps.pjrt.client as c, jax_mps.runtime as r
other = r.device()._replace(kind="other")
c.runtime = types.SimpleNamespace(device=lambda: other, MLX_VERSION=r.MLX_VERSION, tf32=r.tf32, device_kind=r.device_kind)
"""
_OPTION = "import functools\n@functools.partial(jax.jit, compiler_options={'xla_cpu_enable_fast_math': True})"
_FORMAT = "import jax_mps.pjrt.client as c, jax_mps.plan.program as p; c.FORMAT = p.FORMAT = 1_000\n"
OTHERS = {
    "an op": (MLP.replace("tanh", "sin"), {}, "module"),
    "a constant": (MLP.replace("0.1 * b", "0.2 * b"), {}, "module"),
    "donation": (MLP.replace("@jax.jit", "@functools.partial(jax.jit, donate_argnums=0)").replace("\ndef loss", "import functools\ndef loss"), {}, "module"),
    "precision": ("jax.config.update('jax_default_matmul_precision', 'highest')\n" + MLP, {}, "module"),
    "an option": (MLP, {"JAX_MPS_HOST": "error"}, "host"),
    "TF32": (MLP, {"MLX_ENABLE_TF32": "1"}, "tf32"),
    "MLX's version": ("import mlx.core; mlx.core.__version__ = '99.0.0'\n" + MLP, {}, "mlx"),
    "the device": (_DEVICE + MLP, {}, "architecture"),
    "the device's kind": (_KIND + MLP, {}, "device"),
    "a compiler option": (MLP.replace("@jax.jit", _OPTION), {}, "options"),
    "the format": (_FORMAT + MLP, {}, "format"),
}


def test_what_changes_the_result_is_a_miss(tmp_path: Path) -> None:
    """Each of these is translated, and leaves an entry whose key differs from the first one's in that part alone."""
    caches = {name: tmp_path / str(number) for number, name in enumerate(OTHERS)}
    first = run(MLP, tmp_path / "first")
    for name, (source, environment, _) in OTHERS.items():
        shutil.copytree(tmp_path / "first", caches[name])
        ran = run(source, caches[name], **environment)
        assert ran.stats["translations"] == first.stats["translations"], name
    for name, (_, _, part) in OTHERS.items():
        steps = [e.header.key for e in Store(caches[name]).entries() if e.header.manifest["summary"]["name"] == "jit_step"]
        assert len(steps) == 2, name
        assert [n for n, _, _ in steps[0].differences(steps[1])] == [part], name


def test_explain_says_why(tmp_path: Path) -> None:
    """`jax-mps cache explain` names the part of the key that made a second entry."""
    run(MLP, tmp_path)
    run(MLP, tmp_path, JAX_MPS_HOST="error")
    command = [sys.executable, "-m", "jax_mps.cli", "cache", "explain", "--json", "--dir", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["different"] == ["host"]


def test_edited_lowering_is_a_miss(tmp_path: Path) -> None:
    """A fixed lowering never serves yesterday's program."""
    copy = tmp_path / "copy"
    package = Path(jax_mps.__file__).parent
    shutil.copytree(package, copy / "jax_mps", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    prelude = f"import sys; sys.path.insert(0, {str(copy)!r})\n" + PRELUDE

    def once() -> Ran:
        return finish(start(MLP, tmp_path / "cache", prelude=prelude))

    assert once().stats["translations"] > 0
    assert once().stats["translations"] == 0
    with (copy / "jax_mps" / "ops" / "elementwise.py").open("a") as source:
        source.write("# a fix\n")
    assert once().stats["translations"] > 0


def test_two_versions_on_one_folder(tmp_path: Path) -> None:
    """Two jax-mps of one cache format, at once: each finds its own translation afterwards, and neither the other's."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(jax_mps.__file__).parent, copy / "jax_mps", symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "jax_mps" / "ops" / "elementwise.py").open("a") as source:
        source.write("# another version\n")
    preludes = (PRELUDE, f"import sys; sys.path.insert(0, {str(copy)!r})\n" + PRELUDE)

    def both(**environment: str) -> list[Ran]:
        return [finish(p) for p in [start(MLP, tmp_path / "cache", prelude=prelude, **environment) for prelude in preludes]]

    cold, warm = both(), both(NO_TRANSLATION="nor MLIR")
    assert all(ran.stats["translations"] > 0 for ran in cold)
    assert len({ran.report["loss"] for ran in (*cold, *warm)}) == 1
    steps = [e.header.key for e in Store(tmp_path / "cache").entries() if e.header.manifest["summary"]["name"] == "jit_step"]
    assert [n for n, _, _ in steps[0].differences(steps[1])] == ["translator"]


def test_two_processes_on_an_empty_cache(tmp_path: Path) -> None:
    """Both succeed, and leave a cache that a third reads whole."""
    processes = [start(MLP, tmp_path) for _ in range(2)]
    losses = {finish(p).report["loss"] for p in processes}
    third = run(MLP, tmp_path, NO_TRANSLATION="nor MLIR")
    assert losses == {third.report["loss"]}


def test_kill_in_mid_write_leaves_a_usable_cache(tmp_path: Path) -> None:
    """SIGKILL while the writer works: the next process runs, and finds or makes every entry."""
    kill = MLP + "import signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run(kill, tmp_path, check=False).code == -9
    after = run(MLP, tmp_path)
    assert run(MLP, tmp_path, NO_TRANSLATION="nor MLIR").report["loss"] == after.report["loss"]


def test_cache_off(tmp_path: Path) -> None:
    """JAX_MPS_CACHE=0: nothing is written, everything runs."""
    ran = run(MLP, tmp_path / "cache", JAX_MPS_CACHE="0")
    assert ran.stats["translations"] > 0
    assert not (tmp_path / "cache").exists()


def test_unusable_folder_costs_only_the_cache(tmp_path: Path) -> None:
    """A folder that anyone may write to is refused with one line; the program runs."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    ran = run(MLP, folder)
    assert ran.report["loss"] > 0
    assert list(folder.iterdir()) == []


def test_the_log_names_what_is_on_the_host_once(tmp_path: Path) -> None:
    """Cold or warm, each reason is said once a process; float64 once, not once an op."""
    source = """
    jax.config.update("jax_enable_x64", True)
    f = jax.jit(lambda x: jnp.sin(x) * 2 + jnp.cos(x))
    for n in (3, 4, 5):
        jax.block_until_ready(f(jnp.arange(float(n))))
    report()
    """
    for _ in range(2):
        ran = run(source, tmp_path)
        assert ran.output.count("runs on the host") == 1
        assert "MLX has no float64" in ran.output


def test_serialized_executable_round_trip(tmp_path: Path) -> None:
    """`jax.experimental.serialize_executable`: another process loads the bytes, runs them without a translation, and gets the same numbers."""
    program = """
    from pathlib import Path
    import pickle
    from jax.experimental import serialize_executable
    file, x = Path(FILE), np.linspace(-1, 1, 6, dtype="float32")
    if file.exists():
        compiled = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
    else:
        compiled = jax.jit(lambda x: (jnp.tanh(x), x.sum())).lower(x).compile()
        file.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    report(values=[np.asarray(v).tolist() for v in compiled(x)])
    """.replace("FILE", repr(str(tmp_path / "executable")))
    cold = run(program, tmp_path / "cache")
    warm = run(program, tmp_path / "cache", NO_TRANSLATION="nor MLIR")
    assert warm.report["values"] == cold.report["values"]
    elsewhere = run(program, tmp_path / "empty")
    assert elsewhere.report["values"] == cold.report["values"]
    assert elsewhere.stats["translations"] > 0


def test_beside_jax_own_persistent_cache(tmp_path: Path) -> None:
    """With `jax_compilation_cache_dir` as well, JAX keeps what it was sent, ours the translation: both hit, numbers are the same."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cold = run(MLP, tmp_path / "cache", **settings)
    warm = run(MLP, tmp_path / "cache", NO_TRANSLATION="nor MLIR", **settings)
    assert warm.report["loss"] == cold.report["loss"]
    assert list((tmp_path / "jax").iterdir())
