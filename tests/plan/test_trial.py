"""Fusing on the CPU: tried in another process, and only for functions that are hot."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from jax_mps import runtime
from jax_mps.config import Settings
from jax_mps.plan import fusion, segments, trial

on_cpu = pytest.mark.skipif(runtime.device_kind() != "cpu" or sys.platform != "linux", reason="fused at once there")


def chain(x: mx.array, y: mx.array) -> list[mx.array]:
    for _ in range(4):
        x, y = x * 0.5 + y * y, mx.maximum(y - x, 0.0)
    return [x, y]


@pytest.fixture()
def content(tmp_path: Path) -> bytes:
    """A function file."""
    with runtime.locked():
        mx.export_function(str(tmp_path / "chain"), chain, mx.zeros((256, 256)), mx.zeros((256, 256)))
    return (tmp_path / "chain").read_bytes()


SHAPES = [((256, 256), "float32")] * 2


def result(tried: trial.Trial) -> bool:
    end = time.monotonic() + 280
    while (found := tried.repays()) is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@on_cpu
@pytest.mark.alone  # the trial has the lowest priority
def test_a_trial_times_and_leaves_nothing(content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It has kernels made where MLX looks for them, and a result either way; its folder goes."""
    if not trial.possible():
        pytest.skip("no compiler here")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    caplog.set_level("INFO", "jax_mps.plan.trial")
    tried = trial.Trial(content, SHAPES)
    result(tried)
    assert "fused" in caplog.text
    assert "ms" in caplog.text
    assert list(tmp_path.glob("mlx/*/cpu/*.so"))
    assert not list(tmp_path.glob("jax-mps-trial-*"))


@on_cpu
@pytest.mark.parametrize(("times", "repays"), [([1.0, 0.5], True), ([1.0, 0.95], False), (None, False)], ids=str)
def test_results(content: bytes, monkeypatch: pytest.MonkeyPatch, times: list[float] | None, repays: bool) -> None:
    """Only a clear gain counts; a process that fails is none."""
    write = f"import sys; open(sys.argv[1] + '/found.json', 'w').write('{times}')" if times else "raise SystemExit(3)"
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda code, **more: start([code[0], "-c", write, code[-1]], **more))
    assert result(trial.Trial(content, SHAPES)) is repays


@on_cpu
def test_one_at_a_time(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, []

    def popen(code: list[str], **more: Any) -> Any:
        started.append(start([code[0], "-c", "import time; time.sleep(60)"], **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    first, second = trial.Trial(content, SHAPES), trial.Trial(content, SHAPES)
    assert [first.repays(), second.repays(), first.repays(), second.repays()] == [None] * 4
    assert len(started) == 1
    started[0].kill()
    started[0].wait()
    assert first.repays() is False
    assert second.repays() is None
    assert len(started) == 2
    second._end(None)  # as at exit
    assert started[1].poll() is not None


def test_a_process_that_cannot_start(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def popen(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", popen)
    assert trial.Trial(content, SHAPES).repays() is False


@pytest.mark.parametrize(
    ("change", "private"),
    [
        (lambda f: None, True), (lambda f: f.chmod(0o777), False), (lambda f: (f / "0.32").chmod(0o770), False),
        (lambda f: (f / "0.32" / "cpu").symlink_to("/tmp"), False),
    ],
)  # fmt: skip
def test_kernels_that_others_could_write(tmp_path: Path, change: Callable[[Path], Any], private: bool) -> None:
    """MLX runs what it finds there."""
    folder = tmp_path / "mlx"
    assert trial._is_private(folder)
    (folder / "0.32").mkdir(parents=True)
    for path in (folder, folder / "0.32"):
        path.chmod(0o755)
    change(folder)
    assert trial._is_private(folder) is private


@pytest.mark.parametrize(
    ("kind", "chosen", "ops", "cost", "look"),
    [
        ("cpu", "0", 10, 10, 0), ("cpu", "1", 10, 10, 1), ("cuda", "auto", 64, 10, 3), ("cuda", "0", 64, 10, 0), ("metal", "auto", 1, 10, 1),
        ("cpu", "auto", 10, 0, 333_333), ("cpu", "auto", 0, 0, 3_333_333), ("cpu", "auto", 10, 10**9, 33), ("cpu", "auto", 10, 10**12, 20),
    ],
)  # fmt: skip
def test_when_a_function_is_looked_at(monkeypatch: pytest.MonkeyPatch, kind: str, chosen: str, ops: int, cost: int, look: int) -> None:
    monkeypatch.setattr(runtime, "device_kind", lambda: kind)
    monkeypatch.setattr(fusion, "settings", lambda: Settings(compile=chosen))
    assert fusion.first_look(ops, cost) == look


class Files:
    """One function file in memory."""

    def __init__(self, content: bytes | None) -> None:
        self._content = content

    def function(self, name: str) -> Callable[..., Any]:
        return chain

    def content(self, name: str) -> bytes | None:
        return self._content

    def artifact(self, name: str) -> bytes:
        raise KeyError(name)

    def constant(self, digest: str, kind: Any) -> mx.array:
        raise KeyError(digest)


@on_cpu
@pytest.mark.parametrize(("answers", "looks"), [([None, None, True], [20, 41, 62, 0]), ([None, False], [20, 41, 0])], ids=str)
def test_a_segment_goes_on_as_it_is_until_the_trial_ends(monkeypatch: pytest.MonkeyPatch, answers: list[bool | None], looks: list[int]) -> None:
    """Asked ever so many runs; the same numbers throughout."""
    monkeypatch.setattr(fusion, "settings", lambda: Settings(compile="auto"))
    monkeypatch.setattr(fusion, "_HOT_SECONDS", 0.0)
    monkeypatch.setattr(fusion, "_TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(trial, "possible", lambda: True)
    left = list(answers)
    monkeypatch.setattr(trial.Trial, "repays", lambda self: left.pop(0))
    fused: list[Any] = []
    monkeypatch.setattr(fusion, "compiled", lambda function: fused.append(function) or (lambda *a: function(*a)))
    segment = segments.Device("f", (), ("float32",) * 2, 8, 8, 64, Files(b"file"))
    seen = []
    for _ in range(100):
        results = segment.run([mx.array([0.5]), mx.array([0.25])])
        assert [r.item() for r in results] == [r.item() for r in chain(mx.array([0.5]), mx.array([0.25]))]
        seen.append(segment._look)
    assert list(dict.fromkeys(seen)) == looks
    assert len(fused) == (answers[-1] is True)
    assert not left


@on_cpu
def test_a_function_without_a_file_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "settings", lambda: Settings(compile="auto"))
    monkeypatch.setattr(trial, "possible", lambda: True)
    segment = segments.Device("f", (), ("float32",) * 2, 8, 10**12, 64, Files(None))
    assert segment.choose(20, SHAPES) == (chain, 0)


PROGRAM = """
import time, numpy as np, jax, jax.numpy as jnp, jax_mps
import jax_mps.plan.fusion as fusion
fusion._HOT_SECONDS = fusion._TRIAL_SECONDS = 0.01
from jax_mps.plan import trial
assert trial.possible()
trial.GAIN = 1e9  # however noisy the machine

@jax.jit
def step(x):
    for _ in range(5):
        x = 0.5 * jnp.sin(x) + 0.25 * x * x
    return x

x = np.linspace(-2, 2, 4096, dtype="float32")
want, end = np.array(step(x)), time.monotonic() + 280
while not jax_mps.stats()["compiles"]:
    assert time.monotonic() < end
    time.sleep(0.01)  # the other process has the lowest priority
    np.testing.assert_allclose(np.array(step(x)), want, rtol=1e-6)
np.testing.assert_allclose(np.array(step(x)), want, rtol=1e-6)
print("fused")
"""


@on_cpu
@pytest.mark.alone  # the trial has the lowest priority
def test_through_jax(tmp_path: Path) -> None:
    """A hot program is fused in time, without a word from the user."""
    if not trial.possible():
        pytest.skip("no compiler here")
    environment = {n: v for n, v in os.environ.items() if n != "JAX_MPS_COMPILE"}
    environment |= {"JAX_PLATFORMS": "mps", "TMPDIR": str(tmp_path), "JAX_MPS_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fused\n"
    assert not list(tmp_path.glob("jax-mps-trial-*"))
