"""The command line: what it prints, as text and as JSON, and the exit codes that scripts stand on."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import cached_programs as programs
import pytest

from jax_mps import cli, cli_info, compat
from jax_mps.cache import Store, key

COMMANDS = ("dir", "info", "list", "show", "explain", "verify", "prune", "clear", "export", "import", "warm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, which does not exist yet."""
    monkeypatch.setenv("JAX_MPS_CACHE_DIR", str(tmp_path / "jax-mps"))
    monkeypatch.delenv("JAX_MPS_CACHE", raising=False)
    return tmp_path / "jax-mps"


@pytest.fixture
def store(folder: Path) -> Store:
    """A cache of six programs."""
    store = Store(folder)
    for number in range(6):
        programs.put(store, number)
        programs.get(store, number)
    store.save_counts()
    return store


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line: exit code and output, parsed if it is JSON."""

    def run(*arguments: object) -> tuple[int, Any]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr().out
        return code, json.loads(out) if "--json" in arguments else out

    return run


def test_dir_needs_no_folder(folder: Path, said: Any) -> None:
    """Scripts ask for it before anything ran."""
    assert said("cache", "dir") == (0, f"{folder}\n")
    assert said("cache", "dir", "--json") == (0, {"folder": str(folder)})
    assert said("cache", "dir", "--dir", folder / "x") == (0, f"{folder / 'x'}\n")
    assert not folder.exists()


@pytest.mark.parametrize("command", [["info"], ["list"], ["verify"], ["prune", "--stale"]])
def test_an_absent_cache_is_an_empty_one(folder: Path, said: Any, command: list[str]) -> None:
    """Not an error, and not made by looking."""
    assert said("cache", *command)[0] == 0
    assert said("cache", *command, "--json")[0] == 0
    assert not folder.exists()


def test_info(store: Store, said: Any) -> None:
    """Entries, bytes, hit rate, devices."""
    code, data = said("cache", "info", "--json")
    assert code == 0
    assert (data["entries"], data["constants"], data["hits"], data["misses"], data["hit_rate"]) == (6, 1, 6, 0, 1.0)
    assert data["by_device"] == [{"device": "cpu", "mlx": "0.32.4", "entries": 6}]
    assert "100% of 6" in said("cache", "info")[1]


def test_list_sorts_and_filters(store: Store, said: Any) -> None:
    """By name, size, ops or last use."""
    names = {sort: [row["name"] for row in said("cache", "list", "--json", "--sort", sort)[1]] for sort in ("name", "ops", "size", "used")}
    assert names["name"] == [f"jit_f{number}" for number in range(6)]
    assert names["ops"] == names["name"][::-1]
    assert sorted(names["size"]) == sorted(names["used"]) == names["name"]
    assert [row["name"] for row in said("cache", "list", "--json", "--filter", "f3")[1]] == ["jit_f3"]
    assert len(said("cache", "list", "--limit", 2)[1].splitlines()) == 3


def test_show(store: Store, said: Any) -> None:
    """By the digits of a key or by name; the plan's text if the entry has it."""
    digest = programs.program_key(1).digest
    code, text = said("cache", "show", digest[:10])
    assert (code, "0.mlxfn" in text, "no text" in text) == (0, True, True)
    store.put(key(("module", "x")), {"plan_text": "%0 = sine %arg0", "summary": {"name": "jit_sin"}}, {}, {})
    assert "%0 = sine %arg0" in said("cache", "show", "jit_sin")[1]
    assert said("cache", "show", "jit_sin", "--json")[1]["manifest"]["plan_text"] == "%0 = sine %arg0"
    assert said("cache", "show", "nothing")[0] == 1
    code, data = said("cache", "show", "", "--json")
    assert (code, len(data["candidates"])) == (1, 7)


_TYPE = ["float32", [2, 3]]
_LEAF = {"inputs": 1, "slots": 2, "outputs": [1]}
_DEVICE = {"kind": "device", "ops": 7}
_BODY = _LEAF | {"nodes": [{"segment": {"kind": "host", "reasons": ['a "reason"']}, "reads": [0], "writes": [1]}]}
_LOOP = {"kind": "loop", "cond": _LEAF | {"nodes": [{"segment": _DEVICE, "reads": [0], "writes": [1]}]}, "body": _BODY, "counter": None, "carry": 1}
_LOOP["rest"] = {"patience": 70, "host": {}}
GRAPH = {
    "name": "jit_loop",
    "parameters": [_TYPE],
    "block": {"inputs": 1, "slots": 2, "outputs": [1], "nodes": [{"segment": _LOOP, "reads": [0], "writes": [1]}]},
}


def test_show_as_a_graph(store: Store, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dot text by ourselves; an SVG if Graphviz is there, else a sentence."""
    store.put(key(("module", "x")), {"program": GRAPH, "summary": {"name": "jit_loop"}}, {}, {})
    code, text = said("cache", "show", "jit_loop", "--dot")
    assert code == 0
    for part in ('label="jit_loop"', "after 70 iterations", "7 ops", r"host (XLA CPU)\na \"reason\"", 'label="float32[2,3]"', "subgraph cluster_n2_body"):
        assert part in text
    assert text.count("{") == text.count("}")
    assert said("cache", "show", "jit_loop", "--dot", "--json")[1]["dot"] == text
    monkeypatch.setenv("PATH", "")
    assert said("cache", "show", "jit_loop", "--svg") == (1, "Graphviz's `dot` is not installed; --dot prints the text that it draws.\n")
    assert said("cache", "show", "jit_f1", "--dot")[0] == 1, "its manifest holds no program"


def test_info_and_clear_know_compiled_host_code(store: Store, folder: Path, said: Any) -> None:
    """XLA's code for host segments lies below the cache, in a store of its own."""
    kept = Store(folder / "host")
    kept.put(key(("artifact", "x")), {}, {"executable": b"code"}, {})
    assert said("cache", "info", "--json")[1]["host_code"] == {"files": 1, "bytes": 4096}
    assert "1 programs" in said("cache", "info")[1]
    assert said("cache", "clear", "--yes")[0] == 0
    assert Store(folder / "host").get(key(("artifact", "x"))) is None
    assert said("cache", "info", "--json")[1]["host_code"]["files"] == 0


def test_explain_names_the_part_that_differs(store: Store, said: Any) -> None:
    """The entry most like it is the one that could have been used."""
    parts = dict(programs.program_key(3).parts)
    other = key(*(parts | {"mlx": "0.33.0"}).items())
    store.put(other, programs.manifest(3), {}, {})
    code, data = said("cache", "explain", other.digest[:12], "--json")
    assert (code, data["different"], data["other"]["key"]) == (0, ["mlx"], programs.program_key(3).digest)
    text = said("cache", "explain", other.digest)[1]
    assert "because of: mlx" in text
    assert "0.33.0" in text
    one, two = (programs.program_key(number).digest for number in (0, 1))
    assert said("cache", "explain", one, two, "--json")[1]["different"] == ["module"]
    assert said("cache", "explain")[0] == 0


def test_explain_says_why_a_program_was_missed(store: Store, said: Any) -> None:
    """Without a key, what was missed last, beside the entry that it could nearly have used: the same module first, then the same name."""
    parts = dict(programs.program_key(2).parts)
    elsewhere = key(*(parts | {"mlx": "0.33.0"}).items())
    edited = key(*(parts | {"module": "another"}).items())
    for missed, name in ((edited, "jit_f4"), (elsewhere, "jit_renamed")):
        assert store.get(missed) is None
        assert store.note_miss(missed, name)
    code, data = said("cache", "explain", "--json")
    assert (code, data["entry"], data["missed"]["name"]) == (0, None, "jit_renamed")
    assert (data["different"], data["other"]["key"]) == (["mlx"], programs.program_key(2).digest)
    assert [(m["name"], m["different"], m["nearest"]["name"]) for m in data["misses"]] == [
        ("jit_renamed", ["mlx"], "jit_f2"), ("jit_f4", ["module"], "jit_f4"),
    ]  # fmt: skip
    text = said("cache", "explain")[1]
    assert "nothing is stored under this key" in text
    assert "jit_f4, within the hour: module (jit_f4" in text
    assert said("cache", "explain", "jit_renamed", "--json")[1]["different"] == ["mlx"]
    assert said("cache", "explain", elsewhere.digest[:12])[0] == 0
    assert said("cache", "explain", "jit_nobody")[0] == 1


def test_explain_of_an_empty_cache(folder: Path, said: Any) -> None:
    """Says so."""
    assert said("cache", "explain")[0] == 1


def test_verify_and_repair(store: Store, folder: Path, said: Any) -> None:
    """Exit code 1 while something is wrong."""
    assert said("cache", "verify")[0] == 0
    (path,) = (folder / "1" / "entries").rglob(programs.program_key(0).digest)
    os.truncate(path, 10)
    code, data = said("cache", "verify", "--json")
    assert (code, [problem["path"] for problem in data["problems"]]) == (1, [str(path)])
    assert said("cache", "verify", "--repair")[0] == 0
    assert said("cache", "verify", "--json")[1]["problems"] == []


def test_prune(store: Store, folder: Path, said: Any) -> None:
    """By size, age and origin; without a choice it is a mistake."""
    assert said("cache", "prune")[0] == 2
    assert said("cache", "prune", "--older-than", "1h", "--json")[1]["removed_files"] == 0
    for path in (folder / "1" / "entries").rglob(programs.program_key(0).digest):
        os.utime(path, (time.time() - 7200,) * 2)
    assert said("cache", "prune", "--older-than", "1h", "--json")[1]["removed_files"] == 1
    store.put(key(("module", "m"), ("translator", "of yesterday")), {}, {}, {})
    assert said("cache", "prune", "--stale", "--json")[1]["removed_files"] == 1
    assert said("cache", "prune", "--max-bytes", "20k", "--json")[1]["bytes"] <= 20 << 10
    assert said("cache", "prune", "--max-bytes", "many")[0] == 2


def test_clear(store: Store, folder: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal it needs --yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert said("cache", "clear")[0] == 1
    assert programs.get(store, 0) is not None
    code, data = said("cache", "clear", "--yes", "--json")
    assert (code, data["cleared"]) == (0, True)
    assert programs.get(store, 0) is None


def test_clear_asks_on_a_terminal(store: Store, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes only a yes."""

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.readline = lambda: answer
            self.isatty = lambda: True

    for answer, code in (("\n", 1), ("n\n", 1), ("y\n", 0)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert said("cache", "clear")[0] == code


REFUSED = [
    ["clear", "--yes"], ["clear"], ["verify"], ["info"], ["prune", "--stale"], ["list"], ["show", "x"], ["explain"], ["export", "a.tar"],
    ["import", "a.tar"], ["warm", "script.py"],
]  # fmt: skip


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_what_is_not_ours_is_refused(folder: Path, said: Any, command: list[str]) -> None:
    """With exit code 3, and nothing is touched."""
    real = folder.parent / "real"
    real.mkdir()
    (real / "thesis.tex").write_text("")
    folder.symlink_to(real)
    assert said("cache", *command)[0] == 3
    assert said("cache", command[0], "--json", *command[1:])[0] == 3  # `warm` gives the script what comes after it
    assert (real / "thesis.tex").exists()


def test_clear_refuses_an_untagged_folder(folder: Path, said: Any) -> None:
    """A mistyped JAX_MPS_CACHE_DIR costs nothing."""
    folder.mkdir(mode=0o700)
    (folder / "1").mkdir()
    code, text = said("cache", "clear", "--yes")
    assert (code, "neither empty nor" in text) == (3, True)
    assert (folder / "1").exists()


@pytest.mark.parametrize("name", ["cache.tar", "cache.tar.gz"])
def test_export_and_import(store: Store, tmp_path: Path, said: Any, name: str) -> None:
    """Everything arrives, and is right."""
    file = tmp_path / name
    assert said("cache", "export", file, "--json") == (0, {"files": {"constants": 1, "entries": 6, "aliases": 6}})
    assert said("cache", "export", file)[0] == 1, "an existing file is not overwritten"
    code, data = said("cache", "import", file, "--dir", tmp_path / "other", "--json")
    assert (code, data["files"]) == (0, {"constants": 1, "entries": 6, "aliases": 6})
    other = Store(tmp_path / "other")
    for number in range(6):
        entry = programs.get(other, number)
        assert entry is not None
        assert programs.is_right(entry, number)


def hostile(tmp_path: Path, good: Path) -> Path:
    """An archive with everything that an archive can have against us."""
    target = tmp_path / "hostile.tar"
    with tarfile.open(good) as source, tarfile.open(target, "w") as tar:
        for member in source.getmembers():
            data = source.extractfile(member)
            member.name = member.name[:-1] + ("0" if member.name[-1] != "0" else "1")  # a valid file in the wrong place
            tar.addfile(member, data)
        for name in ("../../evil", "/tmp/evil", "jax-mps-cache/1/entries/../../../evil", "jax-mps-cache/1/tmp/" + "ab" * 32):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("jax-mps-cache/1/entries/" + "ab" * 32)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return target


FAILURES = {
    "no such entry to show": (["show", "jit_nobody"], 1),
    "no such entry to explain": (["explain", "jit_nobody"], 1),
    "no such entry to compare": (["explain", "jit_f1", "jit_nobody"], 1),
    "two of the name": (["show", ""], 1),
    "no archive": (["import", "/nonexistent.tar"], 1),
    "no archive inside": (["import", __file__], 1),
    "an archive in the way": (["export", __file__], 1),
    "not asked": (["clear"], 1),
    "no script": (["warm"], 2),
    "a script that fails": (["warm", "/nonexistent.py"], 2),  # python's own answer
    "an unknown order": (["list", "--sort", "colour"], 2),
    "no number": (["list", "--limit", "some"], 2),
    "no size": (["prune", "--max-bytes", "plenty"], 2),
    "no age": (["prune", "--older-than", "yesterday"], 2),
    "an unknown command": (["empty"], 2),
    "no key": (["show"], 2),
}


@pytest.mark.parametrize(("command", "code"), FAILURES.values(), ids=FAILURES)
def test_what_fails_says_so(store: Store, said: Any, command: list[str], code: int) -> None:
    """By its exit code, with --json as well; nothing is lost."""
    assert said("cache", *command)[0] == code
    if code == 1:
        answer = said("cache", command[0], "--json", *command[1:])
        assert answer[0] == code
        assert isinstance(answer[1], dict)
    assert store.usage()["entries"].files == 6


def test_import_takes_only_what_verifies(store: Store, tmp_path: Path, said: Any) -> None:
    """Wrong places, paths upwards, links and foreign names are refused one by one."""
    said("cache", "export", tmp_path / "good.tar")
    bad = hostile(tmp_path, tmp_path / "good.tar")
    code, data = said("cache", "import", bad, "--dir", tmp_path / "other", "--json")
    assert (code, sum(data["files"].values()), len(data["refused"])) == (1, 0, 18)
    assert list(tmp_path.rglob("evil")) == []
    (tmp_path / "text.tar").write_text("no archive")
    assert said("cache", "import", tmp_path / "text.tar")[0] == 1
    os.truncate(tmp_path / "good.tar", 5000)
    assert said("cache", "import", tmp_path / "good.tar", "--dir", tmp_path / "cut")[0] == 1
    assert Store(tmp_path / "cut").verify() == []


def test_warm_runs_a_script(folder: Path, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On our platform and with this cache; its exit code is ours."""
    script = tmp_path / "train.py"
    script.write_text("""
import os, sys
from jax_mps.cache import Store, key
assert os.environ["JAX_PLATFORMS"] == "mps"
Store().put(key(("module", sys.argv[1])), {}, {}, {})
sys.exit(int(sys.argv[2]))
""")
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parents[1]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert said("cache", "warm", "--json", script, "a", 0) == (0, {"added": 1, "exit_code": 0})
    assert said("cache", "warm", script, "b", 7)[0] == 7
    assert said("cache", "warm")[0] == 2


def test_commands_work_with_the_cache_turned_off(store: Store, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at it and to clear it."""
    monkeypatch.setenv("JAX_MPS_CACHE", "0")
    code, data = said("cache", "info", "--json")
    assert (code, data["turned_off"], data["entries"]) == (0, True, 6)


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_no_command_prints_help(said: Any, arguments: list[str]) -> None:
    """With the exit code of a wrong command line."""
    code, text = said(*arguments)
    assert (code, "usage: jax-mps" in text) == (2, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(said: Any, command: str) -> None:
    """And --json."""
    code, text = said("cache", command, "--help")
    assert (code, "--json" in text) == (0, True)


def test_info_of_the_whole(folder: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails is shown, and decides the exit code if nothing runs without it."""

    def broken() -> dict[str, Any]:
        raise ImportError("libmlx.so: cannot open shared object file")

    good = dict.fromkeys(("device", "blas", "degraded"), lambda: {"kind": "cpu"})
    for name, function in good.items():
        monkeypatch.setattr(cli_info, name, function)
    code, data = said("info", "--json")
    assert (code, data["works"], data["cache"]["folder"]) == (0, True, str(folder))
    assert {"jax", "jaxlib", "mlx", "python"} <= set(data["versions"])
    assert "works" in said("info")[1]
    monkeypatch.setattr(cli_info, "device", broken)
    code, data = said("info", "--json")
    assert (code, "libmlx" in data["device"]["error"]) == (1, True)


def test_info_says_what_is_degraded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with the reason; nothing is, on the versions of JAX that are supported."""
    assert cli_info.degraded() == {}
    monkeypatch.setattr(compat, "_states", {"donation": "on", "random bits": "off: AttributeError: no threefry2x32_p"})
    assert cli_info.degraded() == {"random bits": "AttributeError: no threefry2x32_p"}


def test_no_heavy_import_for_the_cache(folder: Path) -> None:
    """`jax-mps cache dir` starts at once."""
    code = "import sys; from jax_mps.cli import main; main(['cache', 'info']); print(sorted({'jax', 'mlx', 'rich', 'numpy'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done


def test_a_closed_pipe_is_no_error(store: Store) -> None:
    """`jax-mps cache list | head -0`."""
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = subprocess.Popen([sys.executable, "-m", "jax_mps.cli", "cache", "list"], env=environment, stdout=-1, stderr=-1)
    assert run.stdout is not None
    run.stdout.close()
    assert run.stderr is not None
    assert run.stderr.read() == b""
    assert run.wait() == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [("", {"info", "cache", "completion"}), ("cache ", set(COMMANDS)), ("cache list --so", {"--sort"}), ("completion b", {"bash"})],
)
def test_completion_in_bash(said: Any, typed: str, expected: set[str]) -> None:
    """The words that fit."""
    script = said("completion", "bash")[1]
    words = ["jax-mps", *typed.split(" ")]
    script += f"COMP_WORDS=({' '.join(words)} '')\nCOMP_CWORD={len(words) - 1}\n_jax_mps\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert {word for word in done.stdout.split() if not word.startswith("--h")} == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_elsewhere(said: Any, shell: str) -> None:
    """A script that names every command."""
    code, data = said("completion", shell, "--json")
    assert code == 0
    assert all(command in data["script"] for command in COMMANDS)


def test_tables() -> None:
    """Numbers to the right, no blanks at the end."""
    table = cli.Table(("name", "ops"), [("a", "10"), ("long", "5")], frozenset({"ops"}))
    assert cli.plain(table) == ["name  ops", "a      10", "long    5"]
