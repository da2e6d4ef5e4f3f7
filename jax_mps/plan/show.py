"""Programs and plans as text for people: which segments there are, and why one is on the host."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator

from jax_mps.plan.program import Program
from jax_mps.plan.segments import Block, Callback, Device, Host, Segment

log = logging.getLogger(__name__)


def announce_host(program: Program) -> None:
    """Log what of a program runs on the host, each reason once a process, whether it was translated or loaded."""
    for segment in program.host_segments:
        announce(segment.reasons)


def announce(reasons: Iterable[str]) -> None:
    """Log why something runs on the host, each reason once a process."""
    for reason in reasons:
        _log_once(reason)


@functools.lru_cache(maxsize=4096)
def _log_once(reason: str) -> None:
    """Say what runs on the host, once a process: slower, therefore visible. LAPACK is there by design, which is worth less noise."""
    op, _, why = reason.partition(": ")
    if why.startswith("MLX has no") and why != op:  # every op of a float64 program has the same reason
        _log_once(f"{why}: {why}")
        return
    level = logging.INFO if op.startswith("custom_call:lapack") else logging.WARNING
    log.log(level, "runs on the host (XLA CPU): %s", reason if why != op else why)


def describe(program: Program) -> str:
    """A program's segments, one a line, nested ones indented; under a host segment the reasons for it."""
    signature = f"({', '.join(map(str, program.parameters))}) -> ({', '.join(map(str, program.results))})"
    return "\n".join([f"{program.name} {signature}", *_block(program.block, "  ")])


def _block(block: Block, indent: str) -> Iterator[str]:
    for node in block.nodes:
        yield from _segment(node.segment, indent)


def _segment(segment: Segment, indent: str) -> Iterator[str]:
    from jax_mps.plan.control import Branch, Loop, Scan, Until

    match segment:
        case Device():
            yield f"{indent}device: {segment.ops} ops"
        case Host():
            yield f"{indent}host (XLA CPU): {len(segment.inputs)} in, {len(segment.outputs)} out"
            yield from (f"{indent}    because {reason}" for reason in segment.reasons)
            if segment.joined:
                yield f"{indent}    with {segment.joined} ops beside them that take less time than a boundary"
        case Callback():
            yield f"{indent}callback into Python: {segment.target}"
        case Loop():
            how = "counted" if segment.counter else "until its condition fails"
            yield f"{indent}loop, {how}, {segment.carry} values carried"
            if segment.chunk:
                yield f"{indent}  {segment.chunk_length} iterations at a time"
            yield from _block(segment.body, indent + "  ")
            if segment.rest:
                yield f"{indent}  after {segment.rest.patience} iterations, the rest on the host (XLA CPU)"
        case Scan():
            taken = f"rows of {len(segment.sources)} arrays taken, of {len(segment.stacks)} stacked"
            yield f"{indent}loop, {segment.trips} times, {len(segment.kept)} values carried, {taken}"
            if segment.ahead:
                yield f"{indent}  {segment.ahead} {'ops' if segment.ahead > 1 else 'op'} of its body computed before it, for all iterations at once"
            if segment.behind:
                yield f"{indent}  {segment.behind} {'sums or rows' if segment.behind > 1 else 'sum'} of all iterations computed after it"
            if segment.chunk:
                yield f"{indent}  {segment.chunk_length} iterations at a time"
            for block in [b for b in (segment.body, segment.chunk) if b is not None][:1]:
                yield from _block(block, indent + "  ")
        case Until():
            yield f"{indent}loop, until its condition fails on the host, {len(segment.kept)} values carried"
            if segment.chunk:
                yield f"{indent}  {segment.chunk_length} iterations at a time"
            yield from _block(segment.body, indent + "  ")
            if segment.rest:
                yield f"{indent}  after {segment.rest.patience} iterations, the rest on the host (XLA CPU)"
        case Branch():
            yield f"{indent}branch of {len(segment.arms)}"
            for number, arm in enumerate(segment.arms):
                yield f"{indent}  arm {number}"
                yield from _block(arm, indent + "    ")
