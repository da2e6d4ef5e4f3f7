"""Cut a plan into nodes: straight lines for the device, maximal convex regions for the host, loops and branches.

The result (`Draft`) is still pure: nothing is exported or compiled here. `segments` turns drafts into what runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from jax_mps.errors import Unsupported
from jax_mps.plan import conditions, loops, scans
from jax_mps.plan.boundary import COSTS, Costs, Group, Judge
from jax_mps.plan.trips import Condition, Counter
from jax_mps.plan.types import DEVICE_DTYPES, Plan, Region, Step, Value, has_effects

log = logging.getLogger(__name__)

# A device segment of more steps than this is cut, and one where so many depend on each other in a row: MLX's export and compilation recurse
# along them. Cuts cost: what is broadcast or fused on one side is an array for the other (an optimizer's update ran 5 times slower).
MAX_DEVICE_STEPS = 16000
MAX_DEPTH = 4000
# A branch whose arms have no more steps than this (and run on the device) is computed on both sides and selected.
SELECT_BUDGET = 8

_CONTROL = frozenset(["stablehlo.while", "stablehlo.case", "stablehlo.if"])
_FASTER = "so many tiny steps take XLA a tenth of the time"


@dataclass(frozen=True, slots=True)
class Target:
    """What can run where: `refusal` says why a step cannot run on the device (None if it can), `host_kind` how the host would run it
    ("xla", "callback", "ffi", None if it cannot); `forbid_host` makes the former an error; `lend_loops` lets loops go to the host that it runs
    far faster; `costs` weigh a boundary between the two.
    `define` is told of the steps of a block before it is asked about them; `chunk_steps` is how many a chunk of iterations has at most;
    `joined_rows`: a kernel may make any number of small rows that are put together after it."""

    refusal: Callable[[Step], str | None]
    host_kind: Callable[[Step], str | None]
    define: Callable[[Iterable[Step]], None] = lambda steps: None
    forbid_host: bool = False
    lend_loops: bool = False
    costs: Costs = COSTS["cpu"]
    chunk_steps: int = loops.CHUNK_BUDGET
    joined_rows: bool = False


@dataclass(slots=True, eq=False)
class Draft:
    """A node: what kind of segment, its steps, the values it reads and those it gives to others."""

    kind: str  # "device", "host", "callback", "loop", "scan", "until", "branch"
    steps: list[Step]
    reads: tuple[Value, ...] = ()
    writes: tuple[Value, ...] = ()
    reasons: tuple[str, ...] = ()  # why a host node is there
    joined: int = 0  # how many of its steps are there only since they are small
    work: int | None = None  # microseconds that a host node takes, if they can be bounded
    cond: DraftBlock | None = None
    body: DraftBlock | None = None
    fused: DraftBlock | None = None
    chunk: DraftBlock | None = None
    chunk_length: int = 0
    counter: Counter | None = None
    arms: tuple[DraftBlock, ...] = ()
    carry: int = 0
    scan: scans.Scan | None = None
    ahead: int = 0  # ops of a scan that are computed before it
    behind: int = 0  # carries of a scan that are computed after it
    condition: Condition | None = None
    kept: tuple[int, ...] = ()
    counters: tuple[tuple[int, int], ...] = ()
    rest: Draft | None = None  # a host node that runs a loop after so many iterations
    patience: int = 0


@dataclass(slots=True, eq=False)
class DraftBlock:
    """Nodes in order, over inputs (arguments, then captures) to outputs."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: list[Draft] = field(default_factory=list)

    @property
    def device_only(self) -> bool:
        """One device node, whose results are exactly the outputs: the block is one function."""
        return len(self.nodes) == 1 and self.nodes[0].kind == "device" and set(self.outputs) <= {*self.nodes[0].writes, *self.inputs}

    def walk(self) -> Iterable[Draft]:
        for node in self.nodes:
            yield node
            for block in (node.cond, node.body, node.chunk if node.scan and not node.body else None, *node.arms):
                if block is not None:
                    yield from block.walk()


def partition(plan: Plan, target: Target) -> DraftBlock:
    """Cut a whole program.

    Raises:
        Unsupported: a step that neither the device nor the host can run, or that only the host can while it is forbidden.
    """
    return _Cutter(target).block(own_results(plan.body, plan.donated), ())


def host_loops(body: Region, target: Target) -> frozenset[Step]:
    """The loops that go to the host whole: worth nothing unrolled."""
    if target.forbid_host or not any(_Cutter(target).is_refused(s) for s in body.walk()):
        return frozenset()
    drafts = _Cutter(target).block(body, ()).walk()
    return frozenset(s for draft in drafts if draft.kind == "host" for s in draft.steps if s.regions)


def stays(loop: Step, constants: loops.Constants, target: Target) -> bool:
    """Whether the device runs a loop and all of its steps."""
    cutter = _Cutter(target, {v: Step("stablehlo.constant", (), (v,), {"value": value}) for v, value in constants.items()})
    return not cutter.lent(loop) and not any(cutter.is_refused(s) for region in loop.regions for s in region.walk())


def own_results(body: Region, donated: Sequence[int]) -> Region:
    """The region with a copy for each result that is an argument (unless donated) or an earlier result: XLA's outputs never alias."""
    taken = {v for i, v in enumerate(body.arguments) if i not in donated}
    copies: list[Step] = []
    results: list[Value] = []
    for value in body.results:
        if value in taken and value.dtype in DEVICE_DTYPES:
            copies.append(Step("jax_mps.copy", (value,), (Value(value.type),)))
            value = copies[-1].results[0]
        taken.add(value)
        results.append(value)
    return Region(body.arguments, (*body.steps, *copies), tuple(results))


def is_device_step(step: Step) -> bool:
    """Whether MLX has the element types of the step and of its regions."""
    values = [*step.operands, *step.results]
    for region in step.regions:
        values += region.arguments
        for inner in region.walk():
            values += [*inner.operands, *inner.results]
    return all(v.dtype in DEVICE_DTYPES for v in values)


def live_steps(region: Region) -> list[Step]:
    """The region's steps without those whose results nobody reads."""
    needed = set(region.results)
    kept: list[Step] = []
    for step in reversed(region.steps):
        if has_effects(step) or any(v in needed for v in step.results):
            kept.append(step)
            needed.update(step.reads())
    return kept[::-1]


class _Cutter:
    """Cuts one block; `inner` makes the cutter of a nested one, which sees the constants of this."""

    def __init__(self, target: Target, constant_steps: Mapping[Value, Step] = MappingProxyType({})) -> None:
        self.target = target
        self.constant_steps = dict(constant_steps)

    @property
    def judge(self) -> Judge:
        """Made anew: kept, it would be a cycle, which only the garbage collector ends."""
        return Judge(self.target.costs, lambda s: not has_effects(s) and self.target.host_kind(s) == "xla", self.trips)

    def inner(self) -> _Cutter:
        return _Cutter(self.target, self.constant_steps)

    # ---- blocks ------------------------------------------------------------------------------------------------------------------

    def block(self, region: Region, captures: tuple[Value, ...]) -> DraftBlock:
        """Cut a region; `captures` are inputs after its arguments. Constants of outer scopes are copied in, never captured."""
        steps = live_steps(region)
        outer = [self.constant_steps[v] for v in _constants_read(steps, region.results, self.constant_steps)]
        steps = outer + steps
        for step in steps:
            if step.name == "stablehlo.constant":
                self.constant_steps[step.results[0]] = step
        self.target.define(steps)
        draft = DraftBlock(region.arguments + captures, region.results)
        draft.nodes = self.nodes(steps, region.results)
        return draft

    def captures(self, *regions: Region) -> tuple[Value, ...]:
        """What the regions read of enclosing scopes, constants left out."""
        found: dict[Value, None] = {}
        for region in regions:
            for value in region.captures():
                if value not in self.constant_steps:
                    found.setdefault(value)
        return tuple(found)

    # ---- nodes -------------------------------------------------------------------------------------------------------------------

    def nodes(self, steps: list[Step], outputs: tuple[Value, ...]) -> list[Draft]:
        reasons: dict[Step, str] = {}
        kinds = {s: self.kind(s, reasons) for s in steps if s.name != "stablehlo.constant"}
        self.join(kinds)
        self.place_constants(steps, outputs, kinds)
        order = _schedule([s for s in steps if s in kinds], kinds)
        drafts = [self.draft(kind, group, reasons) for kind, group in order]
        self.wire(drafts, outputs)
        return drafts

    def join(self, kinds: dict[Step, str]) -> None:
        """Move small steps to the host while that saves boundaries."""
        moved = {s for s, kind in kinds.items() if kind == "host"}
        while moved and not self.target.forbid_host:
            moved = self.judge.moved(_schedule(list(kinds), kinds))
            kinds.update(dict.fromkeys(moved, "host"))

    def place_constants(self, steps: list[Step], outputs: tuple[Value, ...], kinds: dict[Step, str]) -> None:
        """A constant needs a node of its own only where a value is needed outside device and host segments, which hold copies."""
        wanted = set(outputs)
        for step, kind in kinds.items():
            if kind not in ("device", "host"):
                wanted.update(step.operands)
        for step in steps:
            if step.name == "stablehlo.constant" and step.results[0] in wanted:
                kinds[step] = "device" if step.result.dtype in DEVICE_DTYPES else "host"

    def trips(self, loop: Step) -> int | None:
        """How often a loop runs, if that is known now."""
        counted = loops.static_trips(loop, {v: s.value for v, s in self.constant_steps.items()})
        return counted.trips if counted else None

    def kind(self, step: Step, reasons: dict[Step, str]) -> str:
        if step.name in ("stablehlo.case", "stablehlo.if") and self.selectable(step):
            return "device"
        if step.name in _CONTROL:
            if self.mostly_host(step):
                reasons[step] = "most of its body runs on the host"
                return "host"
            if self.lent(step):
                reasons[step] = _FASTER
                return "host"
            return "loop" if step.name == "stablehlo.while" else "branch"
        reason = self.refusal(step)
        if reason is None:
            return "device"
        how = self.target.host_kind(step)
        if how is None or (self.target.forbid_host and how == "xla"):
            raise Unsupported(step, reason + ("; JAX_MPS_HOST=error forbids the host" if how else ""))
        reasons[step] = reason
        return "host" if how == "xla" else "callback"

    def refusal(self, step: Step) -> str | None:
        if not is_device_step(step):
            dtypes = {v.dtype for v in (*step.operands, *step.results)} - DEVICE_DTYPES
            return f"MLX has no {', '.join(sorted(dtypes)) or 'such element type'}"
        return self.target.refusal(step)

    def selectable(self, step: Step) -> bool:
        small = sum(loops.size(r) for r in step.regions) <= SELECT_BUDGET
        return small and not has_effects(step) and is_device_step(step) and self.target.refusal(step) is None

    def is_refused(self, step: Step) -> bool:
        """Whether the device cannot run a step that is neither control nor a constant."""
        return step.name not in _CONTROL and step.name != "stablehlo.constant" and self.refusal(step) is not None

    def mostly_host(self, step: Step) -> bool:
        """Whether a control step goes to the host whole: what the device could do of it is the lesser part, or not worth the boundaries."""
        if self.target.forbid_host or not self.judge.movable(step):
            return False
        inner = [s for r in step.regions for s in r.walk() if s.name not in _CONTROL and s.name != "stablehlo.constant"]
        refused = {s for s in inner if self.is_refused(s)}
        return 2 * len(refused) > len(inner) or self.judge.is_light(inner, refused)

    def lent(self, step: Step) -> bool:
        """Whether a loop that the device could run goes to the host as it is, for its speed."""
        return self.lendable(step) and self.trips(step) is not None and self.judge.is_far_faster(step)

    def lendable(self, step: Step) -> bool:
        return self.target.lend_loops and step.name == "stablehlo.while" and self.judge.movable(step)

    def lend_rest(self, draft: Draft, step: Step, captures: tuple[Value, ...]) -> None:
        """Have the host run what is left of a loop, if it goes on and on: from the carry as it is then, and the captures."""
        patience = self.judge.patience(step) if self.lendable(step) else None
        if patience is None:
            return
        loop = replace(step, operands=tuple(Value(v.type) for v in step.operands), results=tuple(Value(v.type) for v in step.results))
        copies = [self.constant_steps[v] for v in _constants_read([loop], (), self.constant_steps)]
        why = f"{step.key}: {_FASTER}, after {patience} iterations"
        draft.rest = Draft("host", [*copies, loop], reads=(*loop.operands, *captures), writes=loop.results, reasons=(why,))
        draft.patience = patience

    def draft(self, kind: str, group: list[Step], reasons: dict[Step, str]) -> Draft:
        if kind == "loop":
            return self.loop(group[0])
        if kind == "branch":
            return self.branch(group[0])
        read = [self.constant_steps[v] for v in _constants_read(group, (), self.constant_steps)]
        copies = [] if kind == "callback" else [s for s in read if s not in group]
        why = tuple(f"{s.key}: {reasons[s]}" for s in group if s in reasons)
        joined = sum(s not in reasons and s.name != "stablehlo.constant" for s in group) if kind == "host" else 0
        return Draft(kind, copies + group, reasons=why, joined=joined, work=self.judge.bound(group) if kind == "host" else None)

    def wire(self, drafts: list[Draft], outputs: tuple[Value, ...]) -> None:
        """Fill in what each node reads of and writes for the others."""
        wanted: set[Value] = set(outputs)
        for draft in reversed(drafts):
            if draft.kind in ("device", "host", "callback"):
                defined = {v for s in draft.steps for v in s.results}
                draft.reads = tuple(dict.fromkeys(v for s in draft.steps for v in s.reads() if v not in defined))
                if draft.kind == "callback":
                    draft.reads = draft.steps[0].operands  # one argument for each operand, a repeated one too
                draft.writes = tuple(v for s in draft.steps for v in s.results if v in wanted or draft.kind == "callback")
                wanted.difference_update(draft.writes)  # of the copies of a constant, the nearest one before its reader is written
            wanted.update(draft.reads)

    # ---- control flow ------------------------------------------------------------------------------------------------------------

    def loop(self, step: Step) -> Draft:
        constants = {v: s.value for v, s in self.constant_steps.items()}
        scan = scans.find_scan(step, constants, live_steps)
        if scan is not None:
            return self.scan(step, scan)
        cond, body = step.regions
        captures = self.captures(cond, body)
        counter = loops.find_counter(cond, body, constants)
        condition = None if counter else conditions.find_condition(cond, captures, constants)
        if condition is not None:
            return self.until(step, condition, captures)
        draft = Draft("loop", [], writes=step.results, carry=len(step.operands), counter=counter)
        draft.reads = step.operands + captures
        draft.body = self.inner().block(body, captures)
        draft.cond = self.inner().block(cond, captures)
        self.lend_rest(draft, step, captures)
        if counter is None:
            both = loops.fused(cond, body)
            fused = self.inner().block(both, captures)
            draft.fused = fused if fused.device_only else None
            self.foretell(draft, both, captures)
        elif draft.body.device_only:
            length = loops.CHUNK_BUDGET // max(1, loops.size(body))
            if length > 1:
                chunk = self.inner().block(loops.repeated(body, length), captures)
                if chunk.device_only:
                    draft.chunk, draft.chunk_length = chunk, length
        return draft

    def scan(self, step: Step, scan: scans.Scan) -> Draft:
        """Its reads: carries that are kept, carries that are stacked, sources of rows, captures."""
        captures = self.captures(scan.body)
        carried = tuple(step.operands[i] for i in (*scan.kept, *(i for i, _ in scan.stacks)))
        reads = carried + tuple(v for v, _ in scan.sources) + captures
        draft = Draft("scan", [], reads=reads, writes=step.results, carry=len(scan.kept), scan=scan)
        draft.ahead, draft.behind = (step.attributes.get(name, 0) for name in ("ahead", "after"))
        length = scan.chunk_length(self.target.chunk_steps, joined=self.target.joined_rows)
        if length > 1:
            chunk = self.inner().block(scan.repeated(length), captures)
            if chunk.device_only:
                draft.chunk, draft.chunk_length = chunk, length
        if draft.chunk is None or scan.trips % length:
            draft.body = self.inner().block(scan.repeated(1), captures)
        return draft

    def until(self, step: Step, condition: Condition, captures: tuple[Value, ...]) -> Draft:
        """A loop whose condition the host answers; carries that only count stay on the host. Its reads: carries that are kept, counters, captures."""
        body = replace(step.regions[1], steps=tuple(live_steps(step.regions[1])))
        counters = scans.counters(body, {v: s.value for v, s in self.constant_steps.items()})
        kept = tuple(i for i in range(len(step.operands)) if i not in counters)
        slim = Region(tuple(body.arguments[i] for i in kept), body.steps, tuple(body.results[i] for i in kept))
        reads = tuple(step.operands[i] for i in (*kept, *counters)) + captures
        draft = Draft("until", [], reads=reads, writes=step.results, carry=len(kept), condition=condition, kept=kept, counters=tuple(counters.items()))
        draft.body = self.inner().block(slim, captures)
        self.lend_rest(draft, step, captures)
        watched = tuple(slim.results[kept.index(p)] for p in condition.carries() if p in kept)
        self.foretell(draft, replace(slim, results=slim.results + watched), captures)
        return draft

    def foretell(self, draft: Draft, body: Region, captures: tuple[Value, ...]) -> None:
        """Several iterations as one function, where they are cheaper than to wait for each; the body returns what the condition is told from, too."""
        length = loops.foretold_length(body)
        if length > 1 and len(body.results) > len(body.arguments):
            chunk = self.inner().block(loops.foretold(body, length), captures)
            if chunk.device_only:
                draft.chunk, draft.chunk_length = chunk, length

    def branch(self, step: Step) -> Draft:
        captures = self.captures(*step.regions)
        arms = tuple(self.inner().block(r, captures) for r in step.regions)
        return Draft("branch", [], reads=step.operands + captures, writes=step.results, arms=arms)


def _constants_read(steps: Iterable[Step], results: Iterable[Value], known: Mapping[Value, Step]) -> list[Value]:
    """Constants of outer scopes that the steps (their regions included) or results read, in order of first use."""
    found: dict[Value, None] = {}
    for step in steps:
        for value in step.reads():
            if value in known:
                found.setdefault(value)
    for value in results:
        if value in known:
            found.setdefault(value)
    return list(found)


def _schedule(steps: list[Step], kinds: Mapping[Step, str]) -> list[Group]:
    """Group steps by kind in dependency order: all ready device steps, then all ready host steps, then one control step, and again.

    Effects keep the program's order among themselves.
    """
    producer = {v: s for s in steps for v in s.results}
    position = {s: i for i, s in enumerate(steps)}
    waiting: dict[Step, int] = {}
    readers: dict[Step, list[Step]] = {s: [] for s in steps}
    previous: Step | None = None
    for step in steps:
        before = {producer[v] for v in step.reads() if v in producer and producer[v] is not step}
        if has_effects(step):
            if previous is not None:
                before.add(previous)
            previous = step
        waiting[step] = len(before)
        for s in before:
            readers[s].append(step)
    ready: dict[str, list[Step]] = {"device": [], "host": [], "callback": [], "loop": [], "branch": []}
    for step in steps:
        if waiting[step] == 0:
            ready[kinds[step]].append(step)
    groups: list[Group] = []

    def take(step: Step) -> None:
        for reader in readers[step]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready[kinds[reader]].append(reader)

    while any(ready.values()):
        kind = next(k for k, queue in ready.items() if queue)
        queue = ready[kind]
        group: list[Step] = []
        depths: dict[Value, int] = {}
        limit = {"device": MAX_DEVICE_STEPS, "host": len(steps)}.get(kind, 1)
        while queue and len(group) < limit:
            step = queue.pop(0) if limit == 1 else queue.pop()
            depth = 1 + max((depths.get(v, 0) for v in step.reads()), default=0)
            if kind == "device" and depth > MAX_DEPTH:
                queue.append(step)
                break
            depths.update(dict.fromkeys(step.results, depth))
            group.append(step)
            take(step)
        group.sort(key=position.__getitem__)
        groups.append((kind, group))
    return groups
