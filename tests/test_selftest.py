"""A newer MLX than the tested one: its files are tried before they are trusted, once, and nothing is wrong where they fail."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import mlx.core as mx
import pytest
from device.programs import run

from jax_mps import runtime, selftest

NEWER = "import mlx.core\nmlx.core.__version__ = '99.1.0'\n"
BROKEN = (
    NEWER
    + """
real = mlx.core.import_function
def misreading(path):
    function = real(path)
    return lambda *arrays: [a + 1 for a in function(*arrays)]
mlx.core.import_function = misreading
"""
)
PROGRAM = """
import logging
logging.basicConfig(level=logging.WARNING, format="LOG %(message)s")
f = jax.jit(lambda x: jnp.tanh(x @ x.T).sum() + jnp.linalg.cholesky(jnp.eye(3))[0, 0])
for _ in range(2):
    value = float(f(jnp.arange(6.0).reshape(2, 3) / 9))
report(value=value)
"""


@pytest.fixture(autouse=True)
def newer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A version that nobody has tested, and where the answer about it is kept."""
    monkeypatch.setattr(runtime, "MLX_VERSION", "99.1.0")
    monkeypatch.setenv("JAX_MPS_CACHE_DIR", str(tmp_path / "cache"))
    note = selftest._note()
    assert note is not None
    return note


@pytest.mark.alone
def test_this_mlx_passes_quickly() -> None:
    selftest.misread()
    started = time.perf_counter()
    assert selftest.misread() is None
    assert time.perf_counter() - started < 0.2


def test_the_answer_is_kept(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert selftest._newer_works(newer)
    monkeypatch.setattr(selftest, "misread", lambda: pytest.fail("asked again"))
    assert selftest._newer_works(newer)
    assert newer.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("version", ["0.32.2", "0.32.4", "0.32"])
def test_tested_versions_are_taken_at_their_word(version: str) -> None:
    assert selftest._version(version) <= selftest.TESTED_MLX


@pytest.mark.parametrize("version", ["0.32.5", "0.33.0.dev20261101", "1.0"])
def test_others_are_not(version: str) -> None:
    assert selftest._version(version) > selftest.TESTED_MLX


def test_a_failure_is_kept_and_said(newer: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*arguments: object) -> None:
        raise ValueError("another format")

    monkeypatch.setattr(mx, "export_function", refuse)
    with caplog.at_level(logging.WARNING):
        assert not selftest._newer_works(newer)
    monkeypatch.undo()
    assert not selftest._newer_works(newer)
    assert len(caplog.records) == 2
    assert "99.1.0 is newer than 0.32.4" in caplog.text
    assert "another format" in caplog.text


def test_a_process_that_died_over_it_has_answered(newer: Path) -> None:
    newer.touch()
    assert not selftest._newer_works(newer)


def test_an_interrupt_is_no_answer(newer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "misread", interrupt)
    with pytest.raises(KeyboardInterrupt):
        selftest._newer_works(newer)
    assert not newer.exists()


def test_without_a_cache_folder_it_is_tried_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_MPS_CACHE", "0")
    assert selftest._note() is None
    assert selftest._newer_works(None)


def test_programs_of_a_newer_mlx(tmp_path: Path) -> None:
    """One that passes has a disk cache; one that fails has none, says so once, and is right."""
    want = run(PROGRAM, tmp_path / "tested").report["value"]
    assert run(NEWER + PROGRAM, tmp_path / "good").report["value"] == want
    warm = run(NEWER + PROGRAM, tmp_path / "good")
    assert warm.stats["translations"] == 0
    for _ in range(2):
        broken = run(BROKEN + PROGRAM, tmp_path / "bad")
        assert broken.report["value"] == pytest.approx(want, rel=1e-6)
        assert broken.stats["translations"] > 0
        assert broken.output.count("misreads its own files") == 1


@pytest.mark.parametrize(
    ("architecture", "clusters"), [("sm_90", True), ("sm_90a", True), ("sm_120", True), ("sm_80", False), ("unknown", False), ("applegpu_g13s", False)]
)
def test_which_gpus_run_blocks_in_clusters(architecture, clusters) -> None:
    assert runtime.has_clusters(architecture) is clusters
