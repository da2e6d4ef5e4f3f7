#!/usr/bin/env python3
"""Run StableHLO's and JAX's own tests on this platform and write the figures to docs/coverage.md.

    suites.py run hlo|jax --tools DIR --stablehlo DIR --jax DIR --out DIR [--fraction 0.05 --seed dev --jobs 2]
    suites.py report --tools DIR --out DIR [--host-ops FILE] [--write docs/coverage.md]

--tools is the folder with hlosuite/run.py and jaxsuite/run.py; --stablehlo and --jax are checkouts, JAX's at the tag of the installed
version. `run` leaves its results in --out: with the host allowed, and with JAX_MPS_HOST=error, where what MLX cannot run is an error.
`report` reads them; what was not run is left out. It also lists, from the sources, what each family of ops refuses.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import importlib.metadata
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("suites")

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: made by scripts/suites.py -->", "<!-- end of figures -->"
PACKAGES = ("jax", "jaxlib", "mlx", "numpy", "scipy")
# Linear algebra goes to LAPACK on every device, by design.
LINEAR_ALGEBRA = re.compile(r"triangular_solve|cholesky|custom_call:(lapack_|Qr|ProductOfElementary|tridiagonal)")
REFUSED = re.compile(r"UNIMPLEMENTED: ([\w.:]+)(?: at \S+)?: (.*?); JAX_MPS_HOST=error")


# ---- running -------------------------------------------------------------------------------------------------------------------


def commands(args: argparse.Namespace) -> dict[str, list[list[str]]]:
    """The commands of each suite, in order; results are named after the variant."""
    hlo, jax, out = args.tools / "hlosuite" / "run.py", args.tools / "jaxsuite" / "run.py", args.out
    sample = ["--fraction", str(args.fraction), "--seed", args.seed, "-j", str(args.jobs), "--dut", "cpu"]  # JAX's tests skip as on cpu

    # the tool passes --dut on as an environment variable, which only scripts/jax_dut.py reads
    dut = [
        "PYTEST_ADDOPTS=-p jax_dut",
        os.pathsep.join(["PYTHONPATH=" + str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    ]

    def of_jax(name: str, platforms: str, *more: str, env: tuple[str, ...] = ()) -> list[str]:
        where = ["--checkout", str(args.jax), "--out", str(out / name), "--platforms", platforms]
        return [str(jax), "run", *where, *sample, *more, "--env", *dut, *env]

    def of_hlo(name: str) -> list[str]:
        baseline = str(hlo.with_name("baseline-cpu.json"))
        return [
            str(hlo),
            "run",
            "--stablehlo",
            str(args.stablehlo),
            "--out",
            str(out / f"{name}.json"),
            "--platforms",
            "mps",
            "--baseline",
            baseline,
        ]

    strict = str(jax.with_name("exclusions-strict.json"))
    return {
        "hlo": [of_hlo("hlo"), of_hlo("hlo-device")],
        "jax": [
            of_jax("jax-cpu", "cpu", "--features", "--exclusions", strict),
            [str(jax), "catalog", str(out / "jax-cpu"), str(out / "catalog.json")],
            of_jax("jax", "mps"),
            of_jax("jax-device", "mps", env=("JAX_MPS_HOST=error",)),
            of_jax("jax-cpu-x64", "cpu", "--x64", "--features", "--exclusions", strict),
            [str(jax), "catalog", str(out / "jax-cpu-x64"), str(out / "catalog-x64.json")],
            of_jax("jax-x64", "mps", "--x64"),
        ],
    }


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for command in commands(args)[args.suite]:
        log.info("%s", shlex.join(command))
        host = {"JAX_MPS_HOST": "error"} if str(args.out / "hlo-device.json") in command else {}
        subprocess.run([sys.executable, *command], env={**os.environ, **host}, check=True)


# ---- StableHLO's cases ---------------------------------------------------------------------------------------------------------


def hlo_cases(args: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """The cases that XLA's CPU backend passes, with our outcome."""
    path = args.out / f"{name}.json"
    if not path.exists():
        return None
    baseline = json.loads((args.tools / "hlosuite" / "baseline-cpu.json").read_text())["cases"]
    return {k: v for k, v in json.loads(path.read_text())["cases"].items() if baseline.get(k, {}).get("o") == "passed"}


def refusals(cases: dict[str, Any]) -> Counter[tuple[str, str]]:
    """Of programs that failed with the host forbidden: (op, reason)."""
    found = (REFUSED.search(c.get("msg", "")) for c in cases.values() if c["o"] != "passed")
    return Counter(("any op" if m[2].startswith("MLX has no ") else m[1], m[2]) for m in found if m)


def hlo_lines(args: argparse.Namespace) -> Iterator[str]:
    cases = hlo_cases(args, "hlo")
    if cases:
        yield f"* {figure(cases)} of the cases that XLA's CPU backend passes, float64 and complex128 among them, give the right numbers."
        yield from (f"  * fails: `{k}`: {first_line(v)}" for k, v in cases.items() if v["o"] != "passed")
    cases = hlo_cases(args, "hlo-device")
    if cases:
        device = {k: v for k, v in cases.items() if not k.endswith("[f64]")}
        algebra = {k: v for k, v in device.items() if v["o"] != "passed" and LINEAR_ALGEBRA.search(v.get("msg", ""))}
        rest = {k: v for k, v in device.items() if k not in algebra}
        yield "* Wholly on the device (`JAX_MPS_HOST=error`), of the programs in MLX's element types: " + figure(rest)
        yield f"  * {len(algebra)} more are linear algebra, which goes to LAPACK"
        yield from (f"  * not on the device: `{k}`: {first_line(v)}" for k, v in rest.items() if v["o"] != "passed")


def figure(cases: dict[str, Any]) -> str:
    passed = sum(c["o"] == "passed" for c in cases.values())
    return f"**{passed} of {len(cases)}** ({100 * passed / max(1, len(cases)):.2f} %)"


def first_line(case: dict[str, Any]) -> str:
    return str(case.get("msg", case["o"])).splitlines()[0][:160]


# ---- JAX's suite ---------------------------------------------------------------------------------------------------------------

VARIANTS = {"jax": "as users run it, but that tests skip themselves as on cpu (scripts/jax_dut.py)", "jax-device": "`JAX_MPS_HOST=error`", "jax-x64": "`--x64`"}


def jax_lines(args: argparse.Namespace) -> Iterator[str]:
    tool = args.tools / "jaxsuite" / "run.py"
    for name, words in VARIANTS.items():
        if not is_complete(args.out / name):
            continue
        catalog = args.out / ("catalog-x64.json" if name == "jax-x64" else "catalog.json")  # of what passes on cpu
        command = [str(tool), "report", str(args.out / name), "--exclusions", str(tool.with_name("exclusions-strict.json"))]
        command += ["--catalog", str(catalog)] if catalog.exists() else []
        text = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
        kept = text.split("per file (")[0].split("\n", 1)[1].rstrip()  # without the line that names the folder
        meta = json.loads((args.out / name / "meta.json").read_text())
        yield from (
            f"{words}, a sample of {meta['fraction']} with seed `{meta['seed']}`, started {meta['started']}:",
            "",
            "```",
            kept,
            "```",
            "",
        )
        if name == "jax-device":
            yield from (apart(args.out / name, catalog), "")


# What a test's first refused step was.
HOSTED = {
    "several": re.compile(r"a program for \w+ devices runs on the host"),
    "algebra": LINEAR_ALGEBRA,
    "types": re.compile(r"MLX has no \w"),
}


def apart(folder: Path, catalog: Path) -> str:
    """Of the tests that pass on cpu, how many pass without the host, and what the others need it for."""
    cpu = json.loads(catalog.read_text())["tests"] if catalog.exists() else {}
    counts: Counter[str] = Counter()
    for path in sorted((folder / "files").glob("*.json")):
        for name, test in json.loads(path.read_text()).get("tests", {}).items():
            if test["o"] != "skipped" and cpu.get(name, ["passed"])[0] == "passed":
                said = test.get("msg", "") if test["o"] != "passed" else ""
                counts[next((kind for kind, words in HOSTED.items() if words.search(said)), "failed" if said else "passed")] += 1
    own = counts["passed"] + counts["failed"]
    return (
        f"Of those that pass on cpu, {counts['algebra']} need the host for linear algebra (LAPACK, on every device), {counts['types']} for an "
        f"element type that MLX lacks, {counts['several']} because they are programs for several devices. Of the others, "
        f"**{counts['passed']} of {own}** ({100 * counts['passed'] / max(own, 1):.2f} %) pass without it."
    )


def is_complete(folder: Path) -> bool:
    meta = folder / "meta.json"
    return meta.exists() and len(list((folder / "files").glob("*.json"))) >= json.loads(meta.read_text())["nfiles"]


def jax_refusals(args: argparse.Namespace) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted((args.out / "jax-device" / "files").glob("*.json")):
        found += refusals(json.loads(path.read_text()).get("tests", {}))
    return found


# ---- what the sources say ------------------------------------------------------------------------------------------------------


def registered(tree: ast.Module) -> list[str]:
    """The op names that a module registers: strings in `lowers(...)`, keys of `elementwise({...})`, tables spread into either."""
    tables = {t.id: n.value for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in targets(n) if n.value is not None}
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("lowers", "elementwise"):
            for argument in node.args:
                inner = argument.value if isinstance(argument, ast.Starred) else argument
                names += strings(tables.get(inner.id, inner) if isinstance(inner, ast.Name) else inner)
    return sorted(set(names))


def targets(node: ast.Assign | ast.AnnAssign) -> list[ast.Name]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t for t in found if isinstance(t, ast.Name)]


def strings(node: ast.expr) -> list[str]:
    """The strings of a literal, or the keys of a dictionary."""
    elements = node.keys if isinstance(node, ast.Dict) else node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    return [e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)]


def reasons(tree: ast.Module) -> list[str]:
    """The facts for which its lowerings refuse a step, which then runs on the host."""
    found: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Unsupported":
            found.setdefault(re.sub(r"^f?['\"]|['\"]$", "", ast.unparse(node.args[1])))
    return list(found)


def family_lines() -> Iterator[str]:
    yield from ("| family | on the device | on the host, because of |", "|---|---|---|")
    for path in sorted((ROOT / "jax_mps" / "ops").glob("*.py")):
        tree = ast.parse(path.read_text())
        names, why = registered(tree), reasons(tree)
        if names:
            yield f"| {path.stem} | {', '.join(n.removeprefix('stablehlo.') for n in names)} | {'; '.join(why).replace('|', '/') or '–'} |"


def missing_ops() -> list[str]:
    """StableHLO's ops for which no lowering is registered and which the plan does not dissolve."""
    from jaxlib.mlir.dialects import _stablehlo_ops_gen as generated

    from jax_mps.ops import load_all
    from jax_mps.ops.registry import has_lowering

    load_all()
    ops = {v.OPERATION_NAME for v in vars(generated).values() if hasattr(v, "OPERATION_NAME")}
    dissolved = {f"stablehlo.{n}" for n in ("while", "if", "case", "return", "composite", "tuple", "get_tuple_element", "custom_call")}
    return sorted(op for op in ops if not has_lowering(op) and op not in dissolved)


# ---- the page ------------------------------------------------------------------------------------------------------------------


def page(args: argparse.Namespace) -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [BEGIN, "", f"{today}, Python {sys.version.split()[0]}, {versions}.", "", "### StableHLO's interpreter tests and testdata", ""]
    lines += [*hlo_lines(args), "", "### JAX's test suite", "", *jax_lines(args)]
    lines += [
        "### What went to the host",
        "",
        "Of the runs above with the host forbidden: the first op of each program that MLX could not run.",
        "",
    ]
    hosted = refusals(hlo_cases(args, "hlo-device") or {}) + jax_refusals(args)
    lines += ["| programs | op | reason |", "|---|---|---|", *(f"| {n} | {op} | {why} |" for (op, why), n in hosted.most_common(60)), ""]
    if args.host_ops and args.host_ops.exists():
        lines += ["From a run of JAX's suite with the host allowed:", "", "```", args.host_ops.read_text().rstrip(), "```", ""]
    lines += ["### Where each family runs", "", *family_lines(), ""]
    lines += [f"StableHLO ops without a lowering, which run on the host whole: {', '.join(missing_ops())}.", "", "### Commands", "", "```"]
    lines += ["python scripts/suites.py run hlo --tools TOOLS --stablehlo CHECKOUT --jax CHECKOUT --out RESULTS"]
    lines += ["python scripts/suites.py run jax --tools TOOLS --stablehlo CHECKOUT --jax CHECKOUT --out RESULTS --fraction 0.05 --seed dev"]
    lines += ["python scripts/suites.py report --tools TOOLS --out RESULTS --write docs/coverage.md", "```", "", END]
    return "\n".join(lines)


def report(args: argparse.Namespace) -> None:
    text = page(args)
    if args.write is None:
        sys.stdout.write(text + "\n")
        return
    old = args.write.read_text() if args.write.exists() else f"# Coverage\n\n{BEGIN}\n{END}\n"
    before, _, rest = old.partition(BEGIN)
    args.write.write_text(before + text + rest.partition(END)[2])
    log.info("wrote %s", args.write)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="run a suite")
    one.add_argument("suite", choices=["hlo", "jax"])
    one.add_argument("--stablehlo", type=Path, default=Path())
    one.add_argument("--jax", type=Path, default=Path())
    one.add_argument("--fraction", type=float, default=0.05)
    one.add_argument("--seed", default="dev")
    one.add_argument("--jobs", type=int, default=2)
    one.set_defaults(do=run)
    two = commands.add_parser("report", help="print the figures, or write them into a page")
    two.add_argument("--host-ops", type=Path, help="a list of ops that ran on the host, to be quoted")
    two.add_argument("--write", type=Path)
    two.set_defaults(do=report)
    for command in (one, two):
        command.add_argument("--tools", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
