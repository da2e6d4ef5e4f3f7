"""What the entry point does in a fresh process: register, or one sentence and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.device

_ROOT = Path(__file__).parent.parent


def run(code: str, platforms: str | None, *folders: Path) -> str:
    """What a process prints, its log with it; it must end well."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    if platforms is not None:
        environment["JAX_PLATFORMS"] = platforms
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), str(_ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def distribution(folder: Path, name: str, value: str) -> Path:
    """A folder that looks like an installed distribution with an entry point named mps."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[jax_plugins]\nmps = {value}\n")
    return folder


@pytest.fixture()
def own(tmp_path: Path) -> Path:
    """Our entry point, whether or not the project is installed."""
    return distribution(tmp_path / "own", "jax_mps_of_this_test", "jax_mps.plugin")


SHOW = "import jax, sys; print(jax.default_backend(), jax.config.jax_platforms, 'mlx.core' in sys.modules)"


@pytest.mark.parametrize(
    ("platforms", "shown"),
    [
        (None, "mps None True"), ("", "mps  True"), ("mps", "mps mps True"), ("mps,cpu", "mps mps,cpu True"),
        ("cpu,mps", "cpu cpu,mps True"), ("cpu", "cpu cpu False"),
    ],
    ids=str,
)  # fmt: skip
def test_which_platform_is_the_default(own: Path, platforms: str | None, shown: str) -> None:
    """mps where MLX works and the user has not said otherwise; with other platforms alone, MLX is not even imported."""
    out = run(SHOW, platforms, own)
    assert out.splitlines()[0].replace("None", "").split() == shown.replace("None", "").split()
    assert "experimental" not in out


def test_cpu_is_beside(own: Path) -> None:
    """JAX_PLATFORMS=mps alone has cpu devices for callbacks, before and after the backends are cleared; the flag is left alone."""
    code = """
import jax, jax.numpy as jnp, jax.extend.backend
def show():
    print(jax.default_backend(), jax.devices()[0].platform, jax.devices("cpu")[0].platform, jax.config.jax_platforms)
    print(jax.jit(lambda x: jax.pure_callback(lambda a: a * 2, x, x))(jnp.ones(2)))
show()
jax.extend.backend.clear_backends()
show()
"""
    assert run(code, "mps", own).splitlines() == ["mps mps cpu mps", "[2. 2.]"] * 2


def test_collections_are_left_as_they_were(own: Path) -> None:
    """Python's collector pauses while the plugin is imported, and goes on afterwards where it was on."""
    code = "import gc, jax; {}; jax.devices(); print(gc.isenabled())"
    assert [run(code.format(f"gc.{state}()"), "mps", own).strip() for state in ("enable", "disable")] == ["True", "False"]


def test_another_plugin_of_the_name(own: Path, tmp_path: Path) -> None:
    """One sentence that names it; JAX goes on with what is left."""
    (tmp_path / "other" / "other_mps").mkdir(parents=True)
    (tmp_path / "other" / "other_mps" / "__init__.py").write_text("def initialize(): print('the other one')")
    other = distribution(tmp_path / "other", "jax_mps", "other_mps")
    out = run(SHOW, None, own, other)
    assert "cpu" in out
    assert "the other one" in out
    assert out.count("another plugin for it is installed, jax_mps (other_mps)") == 1


def test_mlx_that_cannot_be_imported(own: Path, tmp_path: Path) -> None:
    """Says which extra to install; JAX goes on without mps."""
    broken = tmp_path / "broken" / "mlx"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    out = run(SHOW, None, broken.parent, own)
    assert out.splitlines()[0].startswith("cpu")
    assert out.count("The mps platform is not available: MLX cannot be imported (libmlx.so: cannot open shared object file)") == 1
    assert sys.platform != "linux" or "jax-mps-mlx[cpu]" in out


def test_an_old_mlx(own: Path, tmp_path: Path) -> None:
    """Older ones compute wrong numbers on Metal."""
    old = tmp_path / "old" / "mlx"
    old.mkdir(parents=True)
    (old / "__init__.py").write_text("")
    (old / "core.py").write_text("__version__ = '0.31.0.dev3'")
    assert "MLX 0.31.0.dev3 is installed, 0.32.4 or later is needed" in run(SHOW, None, old.parent, own)


def test_call_targets_that_jaxlib_keeps_back(own: Path) -> None:
    """LAPACK's and a user's targets for cpu are known before anything ran on the host."""
    code = "import jax; jax.devices(); from jax_mps import compat; print('lapack_sgetrf_ffi' in compat.cpu_call_targets())"
    assert "True" in run(code, "mps", own)


def test_the_version_names_no_other_backend(own: Path) -> None:
    """JAX takes a platform whose version mentions one of these for XLA's backend of that name."""
    from jax_mps.pjrt import entry

    assert not any(name in word for name in ("cuda", "rocm", "oneapi") for word in entry.NAMES.values())
    assert "MLX" in run("import jax; print(jax.devices()[0].client.platform_version)", "mps", own)
