"""What is built: one stable-ABI wheel, a source archive that builds the same wheel, and an editable install.

Nothing is downloaded: builds run without isolation, and new environments see this one's packages.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout, not only the tests"),
]


def version(name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version(name).split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


if version("setuptools") < (77,):
    pytest.skip("needs setuptools >= 77 in this environment (make setup brings it)", allow_module_level=True)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def pip(*arguments: str | Path, cwd: Path, into: Path | None = None) -> None:
    """This environment's pip, working for another environment where one is given."""
    target = ("--python", into / "bin" / "python") if into else ()
    run(sys.executable, "-m", "pip", *target, "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.namelist()
    assert len(listed) == len(set(listed))
    return set(listed)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout as a clone would be: no build products, the link jax_mps/cache kept."""
    copy = tmp_path_factory.mktemp("tree") / "src"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info", "*.so", "*.o", "uv.lock")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    backend = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    name = run(sys.executable, "-c", backend, cwd=tree).splitlines()[-1]
    return tree / "dist" / name


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment's folder, which sees the packages of this one, but not its editable installs."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    # A path line alone: .pth files in the other folder, which editable installs are made of, are not read.
    (site / "zz_outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_serves_every_python(wheel: Path) -> None:
    """One file for CPython 3.11 and later on this platform."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    _, _, python, abi, tag = wheel.stem.split("-")
    assert (python, abi) == ("cp311", "abi3")
    assert tag == platform or sys.platform == "darwin"


def test_the_wheel_holds_the_packages_once(wheel: Path) -> None:
    """Every module of jax_mps and of cache, the extension, and nothing of the rest of the tree."""
    code = {name for name in names_in(wheel) if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jax_mps").rglob("*.py") if "__pycache__" not in path.parts}
    modules |= {f"jax_mps/cache/{path.name}" for path in (ROOT / "cache").glob("*.py")}
    assert code == modules | {"jax_mps/_shim.abi3.so", "jax_mps/py.typed"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """Name, licence, extras, command, and JAX's entry point."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["Name"] == "jax-mps-mlx"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == ["cpu", "cuda", "cli"]
    assert entry_points.split() == ["[console_scripts]", "jax-mps", "=", "jax_mps.cli:main", "[jax_plugins]", "mps", "=", "jax_mps.plugin"]


def test_the_extension_exports_two_names(wheel: Path, tmp_path: Path) -> None:
    """Everything else is static: exported names collide with other libraries in the process."""
    if sys.platform != "linux" or shutil.which("nm") is None:
        pytest.skip("needs nm of binutils")
    with zipfile.ZipFile(wheel) as archive:
        extension = archive.extract("jax_mps/_shim.abi3.so", tmp_path)
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", extension, cwd=tmp_path).splitlines()}
    assert exported - {"_init", "_fini"} == {"GetPjrtApi", "PyInit__shim"}


def test_the_source_archive_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        listed = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    for needed in ("cshim/build_shim.py", "cshim/shim.h", "tests/test_blas.py", "examples/resnet/main.py", "LICENSE", "Makefile"):
        assert needed in listed
    assert not any(name.startswith("jax_mps/cache") for name in listed)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / sdist.name.removesuffix(".tar.gz"), cwd=tmp_path)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert names_in(again) == names_in(wheel)


LOCATE = """
import importlib.metadata as metadata, pathlib
import jax_mps, jax_mps.cache, jax_mps._shim
import jax_mps.cache.paths
(found,) = [e for e in metadata.entry_points(group="jax_plugins") if e.dist.name == "jax-mps-mlx"]
print(found.value, pathlib.Path(jax_mps.__file__).parent, pathlib.Path(jax_mps.cache.__file__).resolve().parent)
"""


def test_the_installed_wheel(wheel: Path, environment: Path, tmp_path: Path) -> None:
    """All is imported from the environment; the command runs; JAX finds the entry point."""
    python = environment / "bin" / "python"
    pip("install", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path, into=environment)
    plugin, package, cache = run(python, "-c", LOCATE, cwd=tmp_path).split()
    assert plugin == "jax_mps.plugin"
    assert Path(package).is_relative_to(environment)
    assert Path(cache) == Path(package) / "cache"
    assert "cache" in run(environment / "bin" / "jax-mps", "--help", cwd=tmp_path)


def test_the_editable_install(tree: Path, environment: Path, tmp_path: Path) -> None:
    """Edits of jax_mps and of cache are seen at once, and `cache` is not importable by that name."""
    python = environment / "bin" / "python"
    pip("install", "--no-deps", "--no-build-isolation", "--force-reinstall", "--editable", tree, cwd=tmp_path, into=environment)
    _, package, cache = run(python, "-c", LOCATE, cwd=tmp_path).split()
    assert (Path(package), Path(cache)) == (tree / "jax_mps", tree / "cache")
    (tree / "cache" / "just_added.py").write_text("here = True\n")
    assert run(python, "-c", "from jax_mps.cache.just_added import here; print(here)", cwd=tmp_path) == "True"
    probe = "import importlib.util as u; print(u.find_spec('cache'))"
    assert run(python, "-c", probe, cwd=tmp_path) == "None"
