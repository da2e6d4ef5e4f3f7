"""A stored program as a picture: its manifest as Graphviz's dot text, and that as SVG where Graphviz is installed."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]

_COLOURS = {"device": "#d5e8d4", "host": "#f8cecc", "callback": "#ffe6cc", "loop": "#dae8fc", "scan": "#dae8fc", "until": "#dae8fc", "branch": "#e1d5e7"}


class NoGraphviz(Exception):
    """Graphviz cannot draw here; the text says why."""


def dot(program: Json) -> str:
    """A program's manifest as a directed graph: a box for each segment, a frame for each block inside a loop or branch, types on the edges."""
    types = [_type(t) for t in program["parameters"]]
    lines = ["digraph {", '  node [shape=box style="rounded,filled" fillcolor=white fontname="sans-serif"];', '  edge [fontname="sans-serif" fontsize=9];']
    lines += [f"  label={_quoted(program['name'])}; labelloc=t;"]
    lines += [f"  {line}" for line in _Graph().block(program["block"], types)]
    return "\n".join([*lines, "}"]) + "\n"


def svg(text: str) -> str:
    """Dot text drawn by Graphviz.

    Raises:
        NoGraphviz: it is not installed, or fails.
    """
    command = shutil.which("dot")
    if command is None:
        raise NoGraphviz("Graphviz's `dot` is not installed; --dot prints the text that it draws")
    done = subprocess.run([command, "-Tsvg"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise NoGraphviz(f"Graphviz's `dot` failed: {done.stderr.strip()}")
    return done.stdout


class _Graph:
    """Numbers the nodes of one graph."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def name(self) -> str:
        return f"n{next(self.numbers)}"

    def block(self, block: Json, types: Sequence[str] = ()) -> Iterator[str]:
        """The lines of a block: its inputs, its segments and its outputs, joined by the values they pass on."""
        start, end = self.name(), self.name()
        yield f"{start} [label=inputs shape=ellipse];"
        yield f"{end} [label=outputs shape=ellipse];"
        makers = dict.fromkeys(range(block["inputs"]), start)
        for node in block["nodes"]:
            name = self.name()
            yield from self.segment(name, node["segment"])
            yield from _edges(name, node["reads"], makers, start, types)
            makers |= dict.fromkeys(node["writes"], name)
        yield from _edges(end, block["outputs"], makers, start, types)

    def segment(self, name: str, segment: Json) -> Iterator[str]:
        kind = segment["kind"]
        yield f"{name} [label={_quoted(_label(segment))} fillcolor={_quoted(_COLOURS.get(kind, 'white'))}];"
        for title, block in _blocks(segment):
            inner = list(self.block(block))
            yield f"subgraph cluster_{name}_{title.replace(' ', '_')} {{"
            yield f'  label={_quoted(title)}; style="rounded,dashed";'
            yield from (f"  {line}" for line in inner)
            yield "}"
            yield f"{name} -> {inner[0].split()[0]} [style=dashed];"


def _edges(to: str, slots: Sequence[int], makers: dict[int, str], start: str, types: Sequence[str]) -> Iterator[str]:
    """One edge from each maker of the slots, labelled with the arguments' types or with how many values it carries."""
    by_maker: dict[str, list[int]] = {}
    for slot in slots:
        by_maker.setdefault(makers[slot], []).append(slot)
    for maker, made in by_maker.items():
        known = [types[s] for s in made] if maker == start and types else []
        text = "\n".join(known) if 0 < len(known) <= 4 else f"{len(made)} values" if len(made) > 1 else ""
        yield f"{maker} -> {to} [label={_quoted(text)}];"


def _blocks(segment: Json) -> list[tuple[str, Json]]:
    if segment["kind"] == "branch":
        return [(f"arm {number}", arm) for number, arm in enumerate(segment["arms"])]
    titles = ("cond", "body") if segment.get("body") else ("chunk",)  # a scan may have only one of the two
    return [(title, segment[title]) for title in titles if segment.get(title)]


def _label(segment: Json) -> str:
    match segment["kind"]:
        case "device":
            return f"device\n{segment['ops']} ops"
        case "host":
            return "\n".join(["host (XLA CPU)", *segment["reasons"][:3]])
        case "callback":
            return f"callback into Python\n{segment['target']}"
        case "loop":
            return f"loop, {'counted' if segment['counter'] else 'until its condition fails'}\n{segment['carry']} values carried{_rest(segment)}"
        case "until":
            return f"loop, until its condition fails\n{len(segment['kept'])} values carried{_rest(segment)}"
        case "scan":
            return f"loop, {segment['trips']} times\n{len(segment['kept'])} values carried"
        case kind:
            return str(kind)


def _rest(loop: Json) -> str:
    return f"\nafter {loop['rest']['patience']} iterations on the host" if loop.get("rest") else ""


def _type(kind: Sequence[Any]) -> str:
    dtype, shape = kind
    return f"{dtype}[{','.join(map(str, shape))}]"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # dot's strings escape quotes, and show \n as a new line, as JSON's do
