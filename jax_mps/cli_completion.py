"""`jax-mps completion SHELL`: a completion script, made from the command line's own description."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from jax_mps.cli import Answer, add_command, make_parser

SHELLS = ("bash", "zsh", "fish")
_BASH = """_jax_mps() {
    local words=""
    case "${COMP_WORDS[*]:1:COMP_CWORD-1} " in
%s
    esac
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _jax_mps jax-mps"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit"


def add_commands(commands: Any) -> None:
    """Add `completion`."""
    parser = add_command(commands, "completion", completion, 'print a completion script for a shell: eval "$(jax-mps completion bash)"')
    parser.add_argument("shell", choices=SHELLS)


def completion(options: argparse.Namespace) -> Answer:
    """The script for one shell."""
    words = dict(_words(make_parser(), ()))
    lines = _fish(words) if options.shell == "fish" else _bash(words)
    if options.shell == "zsh":
        lines.insert(0, _ZSH)
    return Answer({"shell": options.shell, "script": "\n".join(lines)}, lines)


def _words(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings[-1:]
        if not action.option_strings and action.choices is not None:
            found += action.choices
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from _words(below, (*path, name))
    yield path, found


def _bash(words: dict[tuple[str, ...], list[str]]) -> list[str]:
    longest_first = sorted(words.items(), key=lambda item: -len(item[0]))
    cases = [f'        "{"".join(f"{name} " for name in path)}"*) words="{" ".join(found)}" ;;' for path, found in longest_first]
    return (_BASH % "\n".join(cases)).splitlines()


def _fish(words: dict[tuple[str, ...], list[str]]) -> list[str]:
    lines = []
    for path, found in words.items():
        below = [word for word in found if not word.startswith("-")]
        seen = "".join(f"__fish_seen_subcommand_from {name}; and " for name in path)
        if below:
            lines.append(f"complete -c jax-mps -f -n '{seen}not __fish_seen_subcommand_from {' '.join(below)}' -a '{' '.join(below)}'")
        seen = seen.removesuffix("; and ") or "__fish_use_subcommand"
        lines += [f"complete -c jax-mps -n '{seen}' -l {word[2:]}" for word in found if word.startswith("--")]
    return lines
