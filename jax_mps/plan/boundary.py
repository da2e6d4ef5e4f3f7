"""What a change between device and host costs, and which steps therefore go to the host although the device could run them.

A boundary is worth as many ops as it was measured to cost: tiny steps between two host steps, or only before or after one, are computed
there too, and so is a loop of tiny steps. Long loops of tiny steps go there by themselves, where driving them would take ten times as long as
they take XLA, boundary included. Work on large arrays never moves, nor does anything else in a program that the device can run alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jax_mps.plan.types import Step, Value


@dataclass(frozen=True, slots=True)
class Costs:
    """Microseconds on one kind of device.

    call: a host region more (views of its inputs, XLA's start, its results). segment: a device segment more. wait: until the host may read
    what the device computes. megabyte: a value of so many bytes on its way between them. iteration: one of a loop that is driven from
    here, without its ops. share: of the time that the host takes for a step, what the device would not have taken.
    """

    call: float
    segment: float
    wait: float
    megabyte: float
    iteration: float
    share: float


# Measured with 64x64 float32 on Linux, jax 0.10.2, MLX 0.32.4 (docs/performance.md): on CPU a region's call takes 35 us, of which XLA's own
# 12-20; a segment 10-20 and its evaluation 25-65; an iteration 15-31; its cores are the host's, and MLX writes 1.2 ns an element where XLA
# writes 0.3. An H100's answer takes 60 us more, a launch 5: its row is
# put together from that, not measured as a boundary; Metal is taken for one.
COSTS: Mapping[str, Costs] = {
    "cpu": Costs(call=40, segment=20, wait=40, megabyte=100, iteration=15, share=0.25),
    "cuda": Costs(call=60, segment=40, wait=100, megabyte=200, iteration=60, share=1),
    "metal": Costs(call=60, segment=40, wait=100, megabyte=100, iteration=60, share=1),
}

# One op on the device. It is also what a moved op counts at least: XLA runs it in a tenth of that, but has to compile it.
_OP = 2.0
# XLA on CPU, 65,536 float32: an elementwise op takes 0.3 ns an element, so that much for each byte written; a product 150 GFLOP/s on two cores,
# of which less is counted on.
_BYTE = 1e-4
_FLOP = 1 / 20e3
_SLOW: Mapping[str, float] = {
    **dict.fromkeys(("stablehlo.sine", "stablehlo.cosine", "stablehlo.tan", "stablehlo.power", "stablehlo.atan2", "stablehlo.cbrt"), 4e-3),
    **dict.fromkeys(("stablehlo.gather", "stablehlo.scatter", "stablehlo.reduce", "stablehlo.reduce_window"), 1e-3),
    **dict.fromkeys(("stablehlo.fft", "stablehlo.rng_bit_generator", "stablehlo.rng"), 8e-3),
    **dict.fromkeys(("stablehlo.sort", "chlo.top_k"), 0.4),
}  # fmt: skip
# LAPACK at 64x64, by the cube of the size; others take as long as the slowest.
_LAPACK = {"potrf": 1e-4, "trsm": 1e-4, "getrf": 1.5e-4, "geqrf": 2e-4, "orgqr": 2e-4, "ungqr": 2e-4, "syevd": 1e-3, "heevd": 2e-3, "gesdd": 2e-3}
_FUSED = frozenset(f"stablehlo.{n}" for n in ("constant", "reshape", "broadcast_in_dim", "iota", "transpose", "slice"))  # into their readers
_IN_PLACE = frozenset(["stablehlo.dynamic_update_slice", "stablehlo.scatter"])
_CHOICES = frozenset(["stablehlo.case", "stablehlo.if"])
_PRODUCTS = frozenset(["stablehlo.dot_general", "stablehlo.dot", "stablehlo.convolution"])
# A loop whose trip count is not known is taken to run so often: whether it moves hardly depends on it.
_TRIPS = 16
# A loop goes to the host by itself if it takes at most this share of the time there, and so long on the device that a few runs repay XLA's compiler
# (0.1 s for a scan of six ops, 1.4 s for a checkpointed while loop of 200; kept on disk). Of such loops' ops, each took XLA 8 to 140 ns.
_FAR_FASTER, _LONG = 0.1, 10e3
_OP_OF_XLA = 0.025  # of what it takes to drive it

Group = tuple[str, list[Step]]  # a kind of segment and its steps


@dataclass(frozen=True, slots=True)
class Judge:
    """Decides what moves. `movable` says whether the host can run a step that the device could; `trips` how often a loop runs, if known."""

    costs: Costs
    movable: Callable[[Step], bool]
    trips: Callable[[Step], int | None]

    def moved(self, groups: Sequence[Group]) -> set[Step]:
        """Steps that are better off on the host, by the segments that there would be without: all or none of those between two host
        regions that the later one needs, of those that the first one needs, of those after the last one."""
        feeding = _feeding(groups)
        found: set[Step] = set()
        for before, gap, after in _gaps(groups):
            if after == "host":
                chosen = [s for _, steps in gap for s in steps if s in feeding]
            elif after is None and before == "host":
                chosen = [s for _, steps in gap for s in steps]
            else:
                continue
            if all(map(self.movable, chosen)) and self.price(chosen, after) < self.gain(before, gap, after, set(chosen)):
                found.update(chosen)
        return found

    def gain(self, before: str | None, gap: Sequence[Group], after: str | None, chosen: set[Step]) -> float:
        """What is saved: segments that are left without steps, a wait, and the second call of two host regions that become one."""
        gone = [kind for kind, steps in gap if chosen.issuperset(steps)]
        saved = self.costs.wait + sum(self.costs.segment if kind == "device" else self.costs.wait for kind in gone)
        return saved + (self.costs.call if before == after == "host" else 0)

    def price(self, chosen: Sequence[Step], after: str | None) -> float:
        """What the host takes for the steps, and what more has to cross the boundary then."""
        made = {v for s in chosen for v in s.results}
        read = {v for s in chosen for v in s.reads() if v not in made}
        more = _nbytes(read) - _nbytes(made) if after else _nbytes(made) - _nbytes(read)
        return sum(self.difference(s) for s in chosen) + max(0, more) * self.costs.megabyte / 1e6

    def difference(self, step: Step) -> float:
        """What a step costs more on the host; less than nothing for a loop of little work, which the device is driven through."""
        if step.name == "stablehlo.while":
            return _OP + self.work(step) - self.driving(step)
        return max(_OP, self.work(step) * self.costs.share)

    def is_light(self, inner: Sequence[Step], refused: set[Step]) -> bool:
        """Whether a loop or branch of these steps, some of which need the host, has less work beside them than a boundary costs each time."""
        boundary = self.costs.call + self.costs.segment + self.costs.wait
        return bool(refused) and sum(self.work(s) for s in inner if s not in refused) < boundary

    def is_far_faster(self, loop: Step) -> bool:
        """Whether the host runs a loop in far less time than it takes to drive it through the device."""
        return self.driving(loop) > _LONG and self.is_tiny(loop, self.moving(loop))

    def patience(self, loop: Step) -> int | None:
        """Iterations after which the host had better run the rest of a loop; None for never, and where their number is known."""
        if self.trips(loop) is not None or self.moving(loop) > _FAR_FASTER * _LONG or not self.is_tiny(loop):
            return None
        return math.ceil(_LONG * _TRIPS / self.driving(loop))

    def is_tiny(self, loop: Step, moving: float = 0.0) -> bool:
        """Whether XLA takes far less for a loop than it takes to drive it, and less even if its branches always take the longer way."""
        driving = self.driving(loop)
        beside = moving + driving * _OP_OF_XLA
        return beside + self.work(loop, min) < _FAR_FASTER * driving and beside + self.work(loop) < driving / 2

    def moving(self, loop: Step) -> float:
        """What it takes to run a loop on the host between two device segments, its own work left out."""
        moved = _nbytes(set(loop.reads())) + _nbytes(loop.results)
        return self.costs.call + self.costs.segment + self.costs.wait + moved * self.costs.megabyte / 1e6

    def bound(self, steps: Iterable[Step]) -> int | None:
        """Microseconds that a host region takes, if its ops are known and its loops counted."""
        every = [*steps, *(s for step in steps for region in step.regions for s in region.walk())]
        if any(_is_open(s) or (s.name == "stablehlo.while" and self.trips(s) is None) for s in every):
            return None
        return round(sum(self.work(s) for s in steps))

    # ---- estimates, in microseconds ------------------------------------------------------------------------------------------------

    def work(self, step: Step, chosen: Callable[[list[float]], float] = max) -> float:
        """What XLA takes for a step on the host; `chosen` is the branch that a choice takes."""
        inner = [sum(self.work(s, chosen) for s in region.steps) for region in step.regions]
        if step.name == "stablehlo.while":
            return self.count(step) * sum(inner)
        if step.name in _CHOICES:
            return chosen(inner)
        if step.name in _FUSED:
            return 0.0
        read = step.operands[len(step.results) :] if step.name in _IN_PLACE else step.operands  # the array itself is not
        written = _nbytes(read if step.name in _IN_PLACE else step.results) * _BYTE
        if step.name == "stablehlo.custom_call":
            return written + _factoring(step)
        if step.name in _PRODUCTS:
            return written + 2 * _products(step) * _FLOP
        elements = step.result.size if step.name == "stablehlo.gather" else max((v.type.size for v in read), default=0)
        return written + elements * math.prod(step.attributes.get("window_dimensions") or ()) * _SLOW.get(step.name, 0.0)

    def driving(self, loop: Step) -> float:
        """What it takes to send a loop through the device, whatever its ops compute."""
        return self.count(loop) * (self.costs.iteration + self._driving(loop.regions[1].steps))

    def _driving(self, steps: Iterable[Step]) -> float:
        """The same for an iteration's steps: whoever drives waits for the index of a choice, too."""
        found = 0.0
        for step in steps:
            if step.name == "stablehlo.while":
                found += self.driving(step)
            elif step.name in _CHOICES:
                found += self.costs.iteration + min(self._driving(arm.steps) for arm in step.regions)
            elif step.name != "stablehlo.constant":
                found += _OP
        return found

    def count(self, loop: Step) -> int:
        trips = self.trips(loop)
        return _TRIPS if trips is None else trips


def _is_open(step: Step) -> bool:
    """Whether a step is a call that may take any time."""
    return step.name == "stablehlo.custom_call" and not step.call_target_name.startswith("lapack_")


def _factoring(call: Step) -> float:
    """Microseconds of a LAPACK call, by the product of its operand's size and least dimension."""
    routine = call.call_target_name.removeprefix("lapack_").removesuffix("_ffi")[1:]
    kind = max((v.type for v in (*call.operands, *call.results)), key=lambda t: t.size, default=None)
    return 0.0 if kind is None else kind.size * min(kind.shape[-2:], default=1) * _LAPACK.get(routine, 5e-3)


def _products(step: Step) -> int:
    """Multiplications of a product or convolution: for each result, what is contracted."""
    lhs, rhs = (v.type for v in step.operands)
    if step.name == "stablehlo.convolution":
        features: int = rhs.shape[step.kernel_output_feature_dimension]
        return step.result.size * rhs.size // max(1, features)
    contracted: tuple[int, ...] = step.attributes.get("lhs_contracting_dimensions", (lhs.rank - 1,))
    return step.result.size * math.prod([lhs.shape[d] for d in contracted])


def _nbytes(values: Iterable[Value]) -> int:
    return sum(v.type.nbytes for v in values)


def _feeding(groups: Sequence[Group]) -> set[Step]:
    """Steps that a later host step needs."""
    needed: set[Value] = set()
    found: set[Step] = set()
    for kind, steps in reversed(groups):
        for step in reversed(steps):
            feeds = any(v in needed for v in step.results)
            if feeds:
                found.add(step)
            if feeds or kind == "host":
                needed.update(step.reads())
    return found


def _gaps(groups: Sequence[Group]) -> Iterator[tuple[str | None, list[Group], str | None]]:
    """Runs of segments that compute on the device, with the kinds of what lies before and after."""
    before: str | None = None
    gap: list[Group] = []
    for kind, steps in groups:
        if kind in ("host", "callback"):
            if gap:
                yield before, gap, kind
            before, gap = kind, []
        else:
            gap.append((kind, steps))
    if gap:
        yield before, gap, None
