"""Module to program: build the plan, cut it, lower and export each device segment, print each host region."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlib.mlir import ir

from jax_mps import runtime
from jax_mps.config import settings
from jax_mps.counters import count
from jax_mps.errors import InvalidProgram
from jax_mps.host.xla import host_function
from jax_mps.ops import load_all
from jax_mps.ops.registry import Lowerer, has_lowering, is_elementwise
from jax_mps.plan import build, control, export, hoisting, loops, segments, sinking
from jax_mps.plan.boundary import COSTS
from jax_mps.plan.interrupts import watched
from jax_mps.plan.partition import Draft, DraftBlock, Target, host_loops, is_device_step, partition
from jax_mps.plan.program import ExportedFiles, Program
from jax_mps.plan.types import Step, TensorType, Value, has_effects
from jax_mps.rewrites import rewrite, whole
from jax_mps.selftest import files_work

log = logging.getLogger(__name__)


def translate(module: ir.Module) -> tuple[Program, ExportedFiles]:
    """Translate a module.

    Raises:
        InvalidProgram: the module cannot be read as a plan.
        Unsupported: a step that nothing here can run.
    """
    count("translations")
    load_all()
    plan = build.build(module, claims, whole)
    if plan.num_replicas * plan.num_partitions > 1:
        raise InvalidProgram(f"a program for {plan.num_replicas} replicas and {plan.num_partitions} partitions; its options are for one device")
    lowerer = Lowerer()
    where = target(lowerer)
    has_loops = any(s.name == "stablehlo.while" for s in plan.body.walk())
    kept = host_loops(plan.body, where) if has_loops else frozenset()

    def fits(step: Step) -> bool:
        return is_device_step(step) and lowerer.refusal(step) is None

    unrolled = loops.unroll_short(plan.body, {}, fits, kept, lambda loop, constants: apart(loop, constants, where))
    plan = rewrite(replace(plan, body=unrolled))
    draft = partition(plan, where)
    files = ExportedFiles()
    block = _Assembler(files, lowerer).block(draft)
    parameters, results = (tuple(v.type for v in values) for values in (plan.arguments, plan.results))
    effects = any(map(has_effects, plan.steps))
    program = Program(plan.name, parameters, results, plan.donated, block, effects, plan.memories, plan.layouts)
    program.manifest = program.to_manifest()
    return program, files


def apart(loop: Step, constants: loops.Constants, where: Target) -> loops.Apart:
    """A loop without what can be done before it or after."""
    before, loop = hoisting.hoisted(loop, constants, where)
    parts = sinking.sunk(loop, constants, where)
    return replace(parts, before=[*before, *parts.before])


# Steps of a chunk of iterations on a GPU, where one call costs as much as a dozen kernels (H100: 384 took 0.65 to 0.9 of the time of 192).
_CHUNK_ON_GPU = 384


def target(lowerer: Lowerer) -> Target:
    """What runs where on this process's device."""
    from jax_mps.calls.kinds import host_kind

    kind = runtime.device_kind()
    steps = loops.CHUNK_BUDGET if kind == "cpu" else _CHUNK_ON_GPU
    host = settings().host
    return Target(lowerer.refusal, host_kind, lowerer.define, host == "error", host == "allow", COSTS[kind], steps, joined_rows=kind != "metal")


def claims(step: Step) -> bool:
    """Whether a composite is kept whole: a lowering takes it, attributes included."""
    return has_lowering(step.key) and is_device_step(step) and Lowerer().refusal(step) is None


class _Assembler:
    """Turns drafts into segments; the parts go to `files`."""

    def __init__(self, files: ExportedFiles, lowerer: Lowerer) -> None:
        self.files = files
        self.lowerer = lowerer
        self.names = 0

    def name(self, suffix: str) -> str:
        self.names += 1
        return f"{self.names - 1}.{suffix}"

    def block(self, draft: DraftBlock) -> segments.Block:
        slots: dict[Value, int] = {v: i for i, v in enumerate(draft.inputs)}
        nodes = []
        for node in draft.nodes:
            segment = self.segment(node)
            for value in node.writes:
                slots.setdefault(value, len(slots))
            nodes.append(segments.Node(segment, tuple(slots[v] for v in node.reads), tuple(slots[v] for v in node.writes)))
        block = segments.Block(len(draft.inputs), len(slots), nodes, tuple(slots[v] for v in draft.outputs))
        return block

    def segment(self, draft: Draft) -> segments.Segment:
        match draft.kind:
            case "device":
                return self.device(draft)
            case "host":
                return self.host(draft)
            case "callback":
                return self.callback(draft)
            case "loop":
                return self.loop(draft)
            case "scan":
                return self.scan(draft)
            case "until":
                return self.until(draft)
            case _:
                return self.branch(draft)

    def device(self, draft: Draft) -> segments.Device:
        traceable = export.traceable(draft.steps, draft.reads, draft.writes, self.lowerer)
        name = self.name("mlxfn")
        if path := self.exported(traceable):
            self.files.paths[name] = path
        else:
            self.files.functions[name] = export.interpreted(traceable)
        for constant in traceable.constants:
            self.files.constants[constant.digest] = constant.value
        constants = tuple((c.digest, TensorType(c.value.shape, c.dtype)) for c in traceable.constants)
        ops = sum(1 for s in draft.steps if s.name != "stablehlo.constant")
        dtypes = tuple(v.dtype for v in draft.reads)
        cost = loops.cost(draft.steps, _PRODUCT_RATES.get(runtime.device_kind(), 1))
        return segments.Device(name, constants, dtypes, ops, cost, _peak(draft), self.files, _kernels(draft.steps))

    def exported(self, traceable: export.Traceable) -> Path | None:
        """The function's file; None where files are of no use, or MLX cannot write one, which is a lowering's fault: the program runs all the same."""
        if not files_work():
            return None
        try:
            path = export.export(traceable, self.files.folder)
        except ValueError as error:
            if "serialize" not in str(error):
                raise
            log.warning("a program is not kept on disk, and builds its graph at each call: %s. Please report this.", error)
            count("exports_refused")
            return None
        count("exports")
        return path

    def host(self, draft: Draft) -> segments.Host:
        count("host_segments")
        name = self.name("mlir")
        steps, seen = watched(draft.steps)
        self.files.artifacts[name] = host_function((*draft.reads, *([seen] if seen else [])), steps, draft.writes).artifact
        inputs, outputs = (tuple(v.type for v in values) for values in (draft.reads, draft.writes))
        return segments.Host(name, inputs, outputs, tuple(dict.fromkeys(draft.reasons)), draft.joined, draft.work, seen is not None, self.files)

    def callback(self, draft: Draft) -> segments.Callback:
        (step,) = draft.steps
        inputs, outputs = (tuple(v.type for v in values) for values in (draft.reads, draft.writes))
        return segments.Callback(step.call_target_name, _config(step), inputs, outputs)

    def loop(self, draft: Draft) -> control.Loop:
        counter = draft.counter
        captures = draft.reads[draft.carry :]
        position = captures.index(counter.bound_capture) if counter and counter.bound_capture is not None else None
        assert draft.cond is not None and draft.body is not None
        return control.Loop(
            carry=draft.carry,
            cond=self.block(draft.cond),
            body=self.block(draft.body),
            fused=self.block(draft.fused) if draft.fused else None,
            chunk=self.block(draft.chunk) if draft.chunk else None,
            chunk_length=draft.chunk_length,
            counter=counter,
            bound_capture=position,
            kind=draft.writes[counter.position].dtype if counter else "int32",
            rest=self.rest(draft),
        )

    def rest(self, draft: Draft) -> control.Rest | None:
        return control.Rest(self.host(draft.rest), draft.patience) if draft.rest else None

    def scan(self, draft: Draft) -> control.Scan:
        scan = draft.scan
        assert scan is not None
        sources, stacks = tuple(row for _, row in scan.sources), tuple(row for _, row in scan.stacks)
        return control.Scan(
            kept=scan.kept,
            stacked=tuple(position for position, _ in scan.stacks),
            types=tuple(v.type for v in draft.reads[: draft.carry + len(stacks) + len(sources)]),
            counter=scan.counter,
            kind=draft.writes[scan.counter].dtype,
            start=scan.start,
            step=scan.step,
            trips=scan.trips,
            uses_counter=scan.uses_counter,
            sources=sources,
            stacks=stacks,
            body=self.block(draft.body) if draft.body else None,
            chunk=self.block(draft.chunk) if draft.chunk else None,
            chunk_length=draft.chunk_length,
            ahead=draft.ahead,
            behind=draft.behind,
        )

    def until(self, draft: Draft) -> control.Until:
        assert draft.condition is not None and draft.body is not None
        kinds = tuple(v.dtype for v in draft.writes)
        chunk = self.block(draft.chunk) if draft.chunk else None
        body, rest = self.block(draft.body), self.rest(draft)
        return control.Until(draft.kept, draft.counters, kinds, draft.condition, body, chunk, draft.chunk_length, rest)

    def branch(self, draft: Draft) -> control.Branch:
        return control.Branch(tuple(self.block(a) for a in draft.arms), predicate=draft.reads[0].dtype == "bool")


def _config(step: Step) -> Any:
    return step.attributes.get("mhlo.backend_config", step.backend_config)  # the former is the typed API's dictionary


# Multiplications in the time of an element of another step (H100: 80 us for 7.4 G in a convolution, 100 us for 32 M elements).
_PRODUCT_RATES = {"cuda": 256}


# What MLX fuses or makes views of; of other ops, each is about two kernels, one of them for what is fused between.
_FUSED = frozenset(["stablehlo.reshape", "stablehlo.transpose", "stablehlo.broadcast_in_dim", "stablehlo.slice", "stablehlo.iota"])


def _kernels(steps: Sequence[Step]) -> int:
    """How many kernels a GPU runs for them, compiled: an estimate."""
    heavy = sum(1 for s in steps if s.name != "stablehlo.constant" and not is_elementwise(s.name) and s.name not in _FUSED)
    return 1 + 2 * heavy + len(steps) // 16


_VIEWS = ("stablehlo.broadcast_in_dim", "stablehlo.reshape", "stablehlo.transpose")


def _peak(draft: Draft) -> int:
    """Bytes alive at once beside what is read, at most, if each value dies at its last use.

    Views, and what only elementwise steps read of elementwise steps (mx.compile never writes it), stand for the largest value they are made from;
    constants that are splats, and iotas, count nothing.
    """
    wanted = {v for s in draft.steps if not is_elementwise(s.name) for v in s.reads()} | set(draft.writes)
    source: dict[Value, Value] = {}
    last: dict[Value, int] = {}
    for index, step in enumerate(draft.steps):
        read = [source.get(v, v) for v in step.reads()]
        last.update((v, index) for v in read)
        if step.name in _VIEWS or (is_elementwise(step.name) and read and step.results[0] not in wanted):
            source[step.results[0]] = max(read, key=lambda v: v.type.nbytes)
    kept = {source.get(v, v) for v in draft.writes}
    alive = peak = 0
    counted: set[Value] = set()
    for index, step in enumerate(draft.steps):
        if step.name not in ("stablehlo.constant", "stablehlo.iota"):
            made = {v for v in step.results if v not in source}
            counted |= made
            alive += sum(v.type.nbytes for v in made)
            peak = max(peak, alive)
        dead = {v for v in (source.get(r, r) for r in step.reads()) if v in counted and last[v] == index and v not in kept}
        alive -= sum(v.type.nbytes for v in dead)
    return peak
