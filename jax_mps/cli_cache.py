"""`jax-mps cache ...`: look at, check, share and empty the cache. Every command works while programs run."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jax_mps import cli_graph
from jax_mps.cache import FORMAT, Key, Listing, Refused, Store, archive, eviction, paths, translator_digest
from jax_mps.cache.misses import Miss
from jax_mps.cache.store import NOTHING_STORED
from jax_mps.cli import OK, REFUSED, USAGE, WRONG, Answer, Table, add_command

_SHOWN = 20  # misses that `explain` lists
SIZES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SPANS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "used": lambda row: -row["used"],
    "size": lambda row: -row["bytes"],
    "ops": lambda row: -(row["ops"] or 0),
    "name": lambda row: row["name"],
}


def add_commands(commands: Any) -> None:
    """Add `cache` and what is below it."""
    group = add_command(commands, "cache", None, "look at, check, share and empty the cache of translated programs")
    cache = group.add_subparsers(metavar="COMMAND")
    _add(cache, "dir", folder, "print the cache's folder")
    _add(cache, "info", info, "show entries, bytes, hit rate, devices and versions")
    listing = _add(cache, "list", list_entries, "list the stored programs")
    listing.add_argument("--sort", choices=SORTS, default="used", help="order, largest or latest first (default: used)")
    listing.add_argument("--filter", metavar="TEXT", default="", help="only programs whose name or device contains TEXT")
    listing.add_argument("--limit", type=int, metavar="N", help="only the first N")
    shown = _add(cache, "show", show, "print a stored program as text")
    shown.add_argument("key", help="the first digits of an entry's key, or its name")
    pictures = shown.add_mutually_exclusive_group()
    pictures.add_argument("--dot", action="store_true", help="as a graph, for Graphviz")
    pictures.add_argument("--svg", action="store_true", help="as a picture, drawn by Graphviz")
    explained = _add(cache, "explain", explain, "say why a program was translated: the named parts of its key, and what differs from the entry most like it")
    explained.add_argument("key", nargs="?", help="the first digits of a key, or a name (default: what was missed last)")
    explained.add_argument("other", nargs="?", help="what to compare it with (default: the entry most like it)")
    verified = _add(cache, "verify", verify, "read and check every file")
    verified.add_argument("--repair", action="store_true", help="remove what is damaged, and what nothing uses")
    pruned = _add(cache, "prune", prune, "remove some of the entries")
    pruned.add_argument("--max-bytes", type=size, metavar="SIZE", help="least recently used first, until SIZE is left (500M, 2G)")
    pruned.add_argument("--older-than", type=span, metavar="AGE", help="what was not used for AGE (12h, 30d)")
    pruned.add_argument("--stale", action="store_true", help="what another MLX or another version of jax-mps made")
    cleared = _add(cache, "clear", clear, "remove everything")
    cleared.add_argument("--yes", action="store_true", help="do not ask")
    exported = _add(cache, "export", export, "write the whole cache to a tar file, to ship it to another machine")
    exported.add_argument("file", type=Path)
    imported = _add(cache, "import", import_, "add the programs in a tar file, each verified; it is as trusted as its sender")
    imported.add_argument("file", type=Path)
    warmed = _add(cache, "warm", warm, "run a Python script on MLX to fill the cache")
    warmed.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")


def size(text: str) -> int:
    """Bytes: 1000000, 500M, 2G."""
    match = re.fullmatch(r"(\d+)([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 500M or 2G")
    return int(match[1]) * SIZES[match[2]]


def span(text: str) -> int:
    """Seconds: 90s, 12h, 30d, 2w."""
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span of time; write 12h or 30d")
    return int(match[1]) * SPANS[match[2]]


def folder(options: argparse.Namespace) -> Answer:
    """`cache dir`: succeeds whether or not the folder exists, so that scripts can use it."""
    root = _root(options)
    return Answer({"folder": str(root)}, [str(root)]) if root else _refused("there is no home folder; set JAX_MPS_CACHE_DIR")


def info(options: argparse.Namespace) -> Answer:
    """`cache info`."""
    store = _store(options)
    usage, host = store.usage(), _host_store(store).usage()
    counts = store.saved_counts()
    asked = sum(counts.values())
    made_for = Counter((_summary(entry)["device"], _part(entry.header.key, "mlx")) for entry in store.entries())
    data = {
        "folder": str(store.root),
        "unusable": store.unusable,
        "turned_off": paths.turned_off(),
        "format": FORMAT,
        "entries": usage["entries"].files,
        "constants": usage["constants"].files,
        "bytes": sum(use.blocks for use in usage.values()) * eviction.BLOCK,
        "max_bytes": store.max_bytes,
        "host_code": {"files": host["entries"].files, "bytes": host["entries"].blocks * eviction.BLOCK},
        **counts,
        "hit_rate": counts["hits"] / asked if asked else None,
        "by_device": [{"device": d, "mlx": m, "entries": n} for (d, m), n in sorted(made_for.items())],
    }
    return Answer(data, table=Table(("", ""), _info_rows(data)), code=REFUSED if store.unusable else OK)


def list_entries(options: argparse.Namespace) -> Answer:
    """`cache list`."""
    found = [_row(entry) for entry in _store(options).entries()]
    found = [row for row in found if options.filter in row["name"] or options.filter in row["device"]]
    found = sorted(found, key=SORTS[options.sort])[: options.limit]
    headings = ("key", "name", "device", "ops", "segments", "host", "size", "last used")
    rows = [_cells(row) for row in found]
    return Answer(found, table=Table(headings, rows, frozenset({"ops", "segments", "host", "size"})))


def show(options: argparse.Namespace) -> Answer:
    """`cache show KEY`."""
    store = _store(options)
    found = _find(store, options.key)
    if isinstance(found, Answer):
        return found
    entry = store.get(found.header.key)
    if entry is None:
        return Answer(
            {"error": "unusable"},
            ["This entry cannot be used: it is damaged, or has lost a constant. `jax-mps cache verify` says which."],
            code=WRONG,
        )
    if options.dot or options.svg:
        return _picture(entry.manifest, svg=options.svg)
    text = entry.manifest.get("plan_text")
    files = {name: len(entry.read(name)) for name in entry.names}
    data = {**_row(found), "files": files, "constants": dict(entry.constants), "manifest": entry.manifest}
    lines = [text] if isinstance(text, str) else ["(this entry holds no text of its plan)"]
    lines += ["", *(f"{name}: {amount} bytes" for name, amount in files.items())]
    lines += [f"constant {digest[:12]}: {amount} bytes" for digest, amount in entry.constants.items()]
    return Answer(data, lines)


def _picture(manifest: dict[str, Any], *, svg: bool) -> Answer:
    try:
        text = cli_graph.dot(manifest["program"])
        drawn = cli_graph.svg(text) if svg else text
    except KeyError as missing:
        return Answer({"error": f"no {missing}"}, [f"This entry's manifest has no {missing}."], code=WRONG)
    except cli_graph.NoGraphviz as reason:
        return Answer({"error": str(reason)}, [f"{reason}."], code=WRONG)
    return Answer({"svg" if svg else "dot": drawn}, [drawn.rstrip()])


def explain(options: argparse.Namespace) -> Answer:
    """`cache explain [KEY [OTHER]]`: the parts of a key beside those of another, which of them differ, and why it was missed."""
    store = _store(options)
    entries, missed = list(store.entries()), store.misses()
    subject = _subject(store, entries, missed, options.key)
    if isinstance(subject, Answer):
        return subject
    other = _find(store, options.other) if options.other else _most_like(subject, entries)
    if isinstance(other, Answer):
        return other
    return _compared(subject, other, [] if options.key else [_explained(miss, entries) for miss in missed[:_SHOWN]])


def verify(options: argparse.Namespace) -> Answer:
    """`cache verify`: exit code 1 if anything is wrong."""
    store = _store(options)
    problems = store.verify(repair=options.repair)
    collected = store.collect() if options.repair else 0
    checked = sum(use.files for use in store.usage().values())
    data = {"checked": checked, "problems": [{"path": p.path, "what": p.what} for p in problems], "collected": collected}
    lines = [f"{problem.path}: {problem.what}" for problem in problems]
    end = "removed" if options.repair else "found"
    lines.append(f"{checked} files, {len(problems)} problems {end}" + (f", {collected} unused files removed" if collected else ""))
    if store.unusable:
        return _refused(store.unusable)
    return Answer(data, lines, code=WRONG if problems and not options.repair else OK)


def prune(options: argparse.Namespace) -> Answer:
    """`cache prune`."""
    store = _store(options)
    if options.max_bytes is None and options.older_than is None and not options.stale:
        return Answer({"error": "usage"}, ["Say what to remove: --max-bytes, --older-than or --stale."], code=USAGE)
    if store.unusable:
        return _refused(store.unusable)
    removed = sum(store.remove(entry.digest) for entry in store.entries() if _is_doomed(entry, options))
    files = removed + store.collect()
    if options.max_bytes is not None:
        files += store.evict(options.max_bytes)
    left = sum(use.blocks for use in store.usage().values()) * eviction.BLOCK
    return Answer({"removed_files": files, "bytes": left}, [f"removed {files} files; {human(left)} are left"])


def clear(options: argparse.Namespace) -> Answer:
    """`cache clear`: compiled host code goes, too. Asks on a terminal, and needs --yes elsewhere."""
    store = _store(options)
    try:
        store.require_ours()
        if not options.yes and not _agreed(f"Remove every translated program in {store.root}?"):
            return Answer({"cleared": False}, ["Nothing was removed; --yes removes without asking."], code=WRONG)
        freed = store.clear()
        if (host := _host_store(store)).root.exists():
            freed += host.clear()
    except Refused as reason:
        return _refused(str(reason))
    except OSError as error:
        return _refused(f"{store.root} cannot be cleared: {error.strerror or error}")
    return Answer({"cleared": True, "bytes": freed}, [f"removed {human(freed)} from {store.root}"])


def export(options: argparse.Namespace) -> Answer:
    """`cache export FILE.tar`."""
    try:
        moved = archive.export_tar(_store(options), options.file)
    except OSError as error:
        return Answer({"error": str(error)}, [f"cannot write {options.file}: {error.strerror or error}"], code=WRONG)
    return Answer({"files": moved.files}, [f"wrote {moved.files['entries']} programs to {options.file}"])


def import_(options: argparse.Namespace) -> Answer:
    """`cache import FILE.tar`."""
    store = _store(options)
    try:
        moved = archive.import_tar(store, options.file)
    except (OSError, EOFError, tarfile.TarError) as error:
        return Answer({"error": str(error)}, [f"cannot read {options.file}: {error}"], code=WRONG)
    if store.unusable:
        return _refused(store.unusable)
    data = {"files": moved.files, "refused": [{"name": name, "why": why} for name, why in moved.refused]}
    lines = [f"refused {name}: {why}" for name, why in moved.refused]
    lines.append(f"added {moved.files['entries']} programs. They are as trusted as whoever sent them.")
    return Answer(data, lines, code=WRONG if moved.refused else OK)


def warm(options: argparse.Namespace) -> Answer:
    """`cache warm SCRIPT ...`: the script's own exit code is the answer's."""
    store = _store(options)
    command: list[str] = options.script
    if not command:
        return Answer({"error": "usage"}, ["Name a script to run."], code=USAGE)
    before = store.usage()["entries"].files
    code = _run_with_progress([sys.executable, *command], _environment(store), lambda: store.usage()["entries"].files - before)
    added = store.usage()["entries"].files - before
    return Answer({"added": added, "exit_code": code}, [f"{added} programs added to {store.root}"], code=code)


def human(amount: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


# These say themselves what is wrong with a folder.
_ALWAYS = frozenset(["dir", "info", "clear"])


def _add(commands: Any, name: str, command: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
    def run(options: argparse.Namespace) -> Answer:
        reason = None if name in _ALWAYS else _store(options).unusable
        return command(options) if reason is None else _refused(reason)

    parser = add_command(commands, name, run, text)
    parser.add_argument("--dir", type=Path, metavar="FOLDER", help="another cache folder than JAX_MPS_CACHE_DIR or the default")
    return parser


def _root(options: argparse.Namespace) -> Path | None:
    named: Path | None = options.dir
    return Path(os.path.abspath(named)) if named else paths.cache_folder()  # links are to be seen, not followed


def _store(options: argparse.Namespace) -> Store:
    return Store(_root(options))


def _host_store(store: Store) -> Store:
    """XLA's compiled code for host segments (`host.kept`), in a store of its own below the cache; it may not be there."""
    return Store(store.root / "host")


def _refused(reason: str) -> Answer:
    return Answer({"error": reason}, [f"{reason}."], code=REFUSED)


def _part(key: Key, name: str) -> str:
    return dict(key.parts).get(name, "?")


def _summary(entry: Listing) -> dict[str, Any]:
    known = entry.header.manifest.get("summary")
    known = known if isinstance(known, dict) else {}
    counts = {name: known.get(name) for name in ("ops", "segments", "host_segments")}
    return {"name": str(known.get("name", "?")), "device": str(known.get("device") or _part(entry.header.key, "device")), **counts}


def _row(entry: Listing) -> dict[str, Any]:
    return {"key": entry.digest, **_summary(entry), "bytes": entry.bytes + sum(entry.header.constants.values()), "used": entry.used}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    counts = ("?" if row[name] is None else str(row[name]) for name in ("ops", "segments", "host_segments"))
    return (row["key"][:12], row["name"], row["device"], *counts, human(row["bytes"]), _ago(row["used"]))


def _ago(moment: float) -> str:
    seconds = time.time() - moment
    if seconds < 3600:
        return "within the hour"  # use is noted once an hour
    return f"{seconds / 3600:.0f} h ago" if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d ago"


def _info_rows(data: dict[str, Any]) -> list[tuple[str, ...]]:
    rate = "nothing asked yet" if data["hit_rate"] is None else f"{data['hit_rate']:.0%} of {data['hits'] + data['misses']}"
    state = data["unusable"] or ("turned off by JAX_MPS_CACHE" if data["turned_off"] else "usable")
    rows = [("folder", data["folder"]), ("state", state), ("programs", str(data["entries"])), ("shared constants", str(data["constants"]))]
    rows += [("size", f"{human(data['bytes'])} of at most {human(data['max_bytes'])}"), ("hits", rate)]
    if data["host_code"]["files"]:
        rows.append(("compiled host code", f"{data['host_code']['files']} programs, {human(data['host_code']['bytes'])} (this machine only)"))
    return [*rows, *((f"on {row['device']}, MLX {row['mlx']}", str(row["entries"])) for row in data["by_device"])]


def _find(store: Store, text: str) -> Listing | Answer:
    entries = list(store.entries())
    found = [entry for entry in entries if entry.digest.startswith(text)] or [e for e in entries if _summary(e)["name"] == text]
    if len(found) == 1:
        return found[0]
    reason = f"no entry is called {text}" if not found else f"{len(found)} entries are called {text}"
    lines = [f"{reason}.", *(f"{entry.digest[:16]}  {_summary(entry)['name']}" for entry in found[:20])]
    return Answer({"error": reason, "candidates": [entry.digest for entry in found]}, lines, code=WRONG)


class _Subject(NamedTuple):
    """What `explain` explains: an entry, a miss, or an entry that was missed before it was made."""

    key: Key
    name: str
    entry: Listing | None
    miss: Miss | None


def _subject(store: Store, entries: Sequence[Listing], missed: Sequence[Miss], text: str | None) -> _Subject | Answer:
    if text is None and not entries and not missed:
        return Answer({"error": "empty"}, ["The cache is empty."], code=WRONG)
    if text is None:
        found = None if missed else max(entries, key=lambda entry: entry.used)
        miss = missed[0] if missed else None
    else:
        answer = _find(store, text)
        found = None if isinstance(answer, Answer) else answer
        miss = next((m for m in missed if m.key.digest.startswith(text) or m.name == text), None) if found is None else None
        if isinstance(answer, Answer) and miss is None:
            return answer
    key = found.header.key if found else miss.key if miss else None
    assert key is not None
    found = found or next((entry for entry in entries if entry.digest == key.digest), None)
    miss = miss or next((m for m in missed if m.key.digest == key.digest), None)
    return _Subject(key, _summary(found)["name"] if found else miss.name if miss else "?", found, miss)


def _most_like(one: _Subject, entries: Sequence[Listing]) -> Listing | None:
    others = [entry for entry in entries if entry.digest != one.key.digest]
    return max(others, key=lambda other: _likeness(one, other), default=None)


def _likeness(one: _Subject, other: Listing) -> tuple[bool, bool, int, float]:
    """The same module under another key first, then what has the same name."""
    different = [name for name, *_ in one.key.differences(other.header.key)]
    return "module" not in different, _summary(other)["name"] == one.name, -len(different), other.used


def _explained(miss: Miss, entries: Sequence[Listing]) -> dict[str, Any]:
    nearest = _most_like(_Subject(miss.key, miss.name, None, miss), entries)
    different = [name for name, *_ in miss.key.differences(nearest.header.key)] if nearest else []
    near = nearest and {"key": nearest.digest, "name": _summary(nearest)["name"]}
    return {"key": miss.key.digest, "name": miss.name, "when": miss.when, "why": miss.why, "nearest": near, "different": different}


def _compared(one: _Subject, other: Listing | None, missed: Sequence[dict[str, Any]]) -> Answer:
    there = dict(other.header.key.parts) if other else {}
    different = [name for name, *_ in one.key.differences(other.header.key)] if other else []
    data = {
        "entry": one.entry and _row(one.entry),
        "missed": one.miss and {"name": one.miss.name, "when": one.miss.when, "why": one.miss.why},
        "parts": dict(one.key.parts),
        "other": other and _row(other),
        "different": different,
        "misses": list(missed),
    }
    here = dict(one.key.parts)
    rows: list[tuple[str, ...]] = [(n, _short(here.get(n)), _beside(n, there, different)) for n in dict.fromkeys((*here, *there))]
    headings = ("part", one.key.digest[:12], other.digest[:12] if other else "(no other entry)")
    after = [_verdict(one.name, _summary(other)["name"], different)] if other else []
    if one.miss:
        after.append(f"{one.name} was translated {_ago(one.miss.when)}: {one.miss.why}.")
    if len(missed) > 1:
        after += ["", "The latest misses, and what differs from the entry most like each:"]
        after += [f"  {row['key'][:12]}  {row['name']}, {_ago(row['when'])}: {_because(row)}" for row in missed]
    return Answer(data, table=Table(headings, rows), after=after)


def _because(row: dict[str, Any]) -> str:
    if row["why"] != NOTHING_STORED or row["nearest"] is None:
        return str(row["why"])
    return f"{', '.join(row['different']) or 'nothing'} ({row['nearest']['name']} {row['nearest']['key'][:12]})"


def _beside(name: str, there: dict[str, str], different: Sequence[str]) -> str:
    return _short(there.get(name)) if name in different else "same" if there else ""


def _verdict(name: str, other: str, different: Sequence[str]) -> str:
    if not different:
        return f"Nothing differs: both are {name}."
    if "module" in different:
        return f"They are different programs{'' if name == other else f', {name} and {other}'}; what differs: {', '.join(different)}."
    return f"{name} could not use the other entry, because of: {', '.join(different)}."


def _short(value: str | None) -> str:
    return "(absent)" if value is None else value if len(value) <= 48 else f"{value[:45]}..."


def _is_doomed(entry: Listing, options: argparse.Namespace) -> bool:
    is_old = options.older_than is not None and time.time() - entry.used > options.older_than
    return is_old or (options.stale and _is_stale(entry.header.key))


def _is_stale(key: Key) -> bool:
    parts = dict(key.parts)
    return any(parts.get(name, value) != value for name, value in _current())


def _current() -> Iterator[tuple[str, str]]:
    with suppress(metadata.PackageNotFoundError):
        yield "mlx", metadata.version("mlx")
    yield "translator", translator_digest(Path(__file__).parent)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _environment(store: Store) -> dict[str, str]:
    asked = os.environ.get("JAX_PLATFORMS", "")
    platforms = asked if "mps" in asked.split(",") else "mps"
    return {**os.environ, "JAX_PLATFORMS": platforms, "JAX_MPS_CACHE": "1", "JAX_MPS_CACHE_DIR": str(store.root)}


def _run_with_progress(command: Sequence[str], environment: dict[str, str], added: Callable[[], int]) -> int:
    process = subprocess.Popen(command, env=environment, stdout=2)  # ours is the answer's
    while True:
        try:
            code = process.wait(1.0)
            break
        except subprocess.TimeoutExpired:
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{added()} programs added ")
        except KeyboardInterrupt:
            continue  # the script has had it, too, and ends as it likes
    return code if code >= 0 else 128 - code
