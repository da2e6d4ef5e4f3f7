"""The examples: on mps they do what they do on cpu, and they say clearly what is wrong with their input."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(600)
def test_resnet_on_both_backends() -> None:
    """Gradients of the first step and the losses agree, with nothing on the host."""
    run("scripts/compare_examples.py", "resnet", "--steps", "5")


@pytest.mark.slow
@pytest.mark.device
@pytest.mark.timeout(600)
def test_gpt_on_both_backends() -> None:
    """From one set of weights, greedy tokens are equal."""
    run("scripts/compare_examples.py", "gpt", "--gpt-steps", "10", "--tokens", "32")


def cifar_file(path: Path, labels: list[int]) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1).tofile(path)
    return pixels


def test_cifar10_is_read(tmp_path: Path) -> None:
    """Records are a label and three colour planes; images come out as rows, columns, colours from 0 to 1."""
    pixels = cifar_file(tmp_path / "data_batch_1.bin", [3, 9])
    cifar_file(tmp_path / "data_batch_2.bin", [0])
    images, labels = load("examples/resnet/main.py").cifar10(tmp_path)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.float32
    assert labels.tolist() == [3, 9, 0]
    np.testing.assert_allclose(images[1, 5, 7], pixels[1].reshape(3, 32, 32)[:, 5, 7] / 255, rtol=1e-6)


@pytest.mark.parametrize(("content", "message"), [(None, "no data_batch"), (b"\0" * 100, "whole number"), (b"\x0b" + b"\0" * 3072, "label 11")])
def test_cifar10_errors(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A missing, cut or foreign file is named."""
    if content is not None:
        (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        load("examples/resnet/main.py").cifar10(tmp_path)


def test_digits_are_the_default() -> None:
    images, labels = load("examples/resnet/main.py").digits()
    assert images.shape == (1797, 32, 32, 3)
    assert (images.min(), images.max()) == (0, 1)
    assert set(labels) == set(range(10))


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
