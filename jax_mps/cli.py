"""The command `jax-mps`: what runs here, and the cache.

Exit codes: 0 all is well; 1 what was asked for is not there, or something is wrong with it; 2 the command line itself; 3 the
cache folder cannot be used or is not ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

OK, WRONG, USAGE, REFUSED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under headings; the columns named in `right` are numbers."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command has to say: `data` for --json, lines and a table for people, and the exit code."""

    data: Any
    lines: Sequence[str] = ()
    table: Table | None = None
    code: int = OK
    after: Sequence[str] = field(default=())


Command = Callable[[argparse.Namespace], Answer]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    command: Command | None = options.command
    if command is None:
        (options.parser or parser).print_help()
        return USAGE
    try:
        answer = command(options)
        say(answer, as_json=options.json)
        sys.stdout.flush()
    except BrokenPipeError:  # `jax-mps cache list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return 130
    return answer.code


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; the commands' modules are imported here, not their libraries."""
    from jax_mps import cli_cache, cli_completion, cli_info

    parser = argparse.ArgumentParser(prog="jax-mps", description="JAX on MLX: what runs here, and its cache of translated programs.")
    parser.set_defaults(command=None, parser=None)
    commands = parser.add_subparsers(metavar="COMMAND")
    cli_info.add_commands(commands)
    cli_cache.add_commands(commands)
    cli_completion.add_commands(commands)
    return parser


def add_command(commands: Any, name: str, command: Command | None, text: str) -> argparse.ArgumentParser:
    """Add a command with what all of them have: a help text and --json. Without a function it only holds others."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command, parser=parser)
    if command is not None:
        parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
    return parser


def say(answer: Answer, *, as_json: bool) -> None:
    """Print an answer to standard output."""
    if as_json:
        sys.stdout.write(json.dumps(answer.data, indent=2) + "\n")
        return
    write_lines(answer.lines)
    if answer.table is not None and not _say_richly(answer.table):
        write_lines(plain(answer.table))
    write_lines(answer.after)


def write_lines(lines: Sequence[str]) -> None:
    """Print lines."""
    sys.stdout.writelines(f"{line}\n" for line in lines)


def plain(table: Table) -> list[str]:
    """A table as aligned text."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (table.headings, *table.rows) if any(table.headings) else table.rows:
        cells = zip(row, widths, table.headings, strict=True)
        lines.append("  ".join(c.rjust(w) if h in table.right else c.ljust(w) for c, w, h in cells).rstrip())
    return lines


def _say_richly(table: Table) -> bool:
    if not sys.stdout.isatty():
        return False
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
    except ImportError:
        return False
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(table.headings))
    for heading in table.headings:
        drawn.add_column(heading, justify="right" if heading in table.right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    Console(markup=False, highlight=False).print(drawn)
    return True


if __name__ == "__main__":
    sys.exit(main())
