"""Products whose result is put in another order: computed in that order, or in one that leaves lines whole; on CUDA.

`jnp.einsum` puts either operand first. The scores of queries in groups that share keys come out as (keys, positions, groups), and all of them would be
turned round, where the queries are copied anyway. What a head has mixed comes out as (features, positions), and would be merged number by number. The
gradients of scores would be turned back for products that are smaller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jax_mps.plan.partition import live_steps
from jax_mps.plan.types import Region, Step, TensorType, Value
from jax_mps.rewrites.views import reshaped, row_major, transposition

_KINDS = ("batching", "contracting")
_INSERTED = ("stablehlo.reshape", "stablehlo.broadcast_in_dim")
_CONCATENATED = ("stablehlo.concatenate", "jax_mps.concatenated")


def straightened(region: Region) -> Region:
    """One region with its products in the order that is read."""
    region = _of_untransposed(region)
    made = {value: step for step in region.steps for value in step.results}
    reads = Counter(region.results)
    readers: dict[Value, Step] = {}
    for step in region.steps:
        reads.update(step.reads())
        readers.update(dict.fromkeys(step.reads(), step))
    new: dict[Step, tuple[Step, ...]] = {}
    for step in region.steps:
        product = made.get(step.operands[0]) if step.name == "stablehlo.transpose" else None
        if product is None or product.name != "stablehlo.dot_general" or reads[product.results[0]] != 1 or product.attributes.get("algorithm") is not None:
            continue
        found = _in_order(product, step) or (_in_lines(product, step) if _is_copied(step, reads, readers) else ())
        if found:
            new[product], new[step] = (), found
    if not new:
        return region
    return Region(region.arguments, tuple(s for step in region.steps for s in new.get(step, (step,))), region.results)


def _of_untransposed(region: Region) -> Region:
    """Products of transposed arrays, which are larger than the result, as transposed products."""
    made: dict[Value, Step] = {}
    steps: list[Step] = []
    for step in region.steps:
        found: tuple[Step, ...] = (step,)
        if step.name == "stablehlo.dot_general":
            for side in (0, 1):
                found = (*_through(found[0], side, made), *found[1:])
        steps += found
        made.update((value, s) for s in found for value in s.results)
    done = Region(region.arguments, tuple(steps), region.results)
    return region if len(steps) == len(region.steps) else Region(done.arguments, tuple(live_steps(done)), done.results)


def _through(product: Step, side: int, made: Mapping[Value, Step]) -> tuple[Step, ...]:
    """The product of what an operand is a transposition of, whose free dimensions are in another order, and the transposition of the result."""
    operand, name = product.operands[side], ("lhs", "rhs")[side]
    step = made.get(operand)
    if step is None or step.name != "stablehlo.transpose" or operand.type.size <= product.result.size:
        return (product,)
    dims = {kind: product.attributes[f"{name}_{kind}_dimensions"] for kind in _KINDS}
    free = [step.permutation[d] for d in range(operand.type.rank) if d not in (*dims["batching"], *dims["contracting"])]
    batch, middle = _parts(product)
    first = (batch, middle)[side]
    order = list(range(product.result.rank))
    order[first : first + len(free)] = [first + sorted(free).index(d) for d in free]
    shape = [0] * len(order)
    for d, size in zip(order, product.result.shape, strict=True):
        shape[d] = size
    operands = tuple(step.operands[0] if i == side else v for i, v in enumerate(product.operands))
    result, value = Value(TensorType(tuple(shape), product.result.dtype)), Value(operand.type)
    inner = replace(product, operands=tuple(value if i == side else v for i, v in enumerate(product.operands)))
    back = [order.index(d) for d in range(len(order))]
    given = {
        **product.attributes,
        **{f"{name}_{kind}_dimensions": tuple(step.permutation[d] for d in old) for kind, old in dims.items()},
        "original": Region(
            operands, (replace(step, operands=operands[side : side + 1], results=(value,)), inner, transposition(product.results[0], result, back)), (result,)
        ),
    }
    return replace(product, operands=operands, results=(result,), attributes=given, text=()), transposition(result, product.results[0], order)


def _in_order(product: Step, step: Step) -> tuple[Step, ...]:
    """The product as it is read, if batches stay first and the dimensions of each operand together. An operand that has them in another order is
    transposed before, unless it is larger than the result."""
    batch, middle = _parts(product)
    rest = step.permutation[batch:]
    left, right = [d for d in rest if d < middle], [d for d in rest if d >= middle]
    if tuple(step.permutation[:batch]) != tuple(range(batch)) or list(rest) not in ([*left, *right], [*right, *left]):
        return ()
    orders = [d - batch for d in left], [d - middle for d in right]
    if any(order != sorted(order) and v.type.size > product.result.size for order, v in zip(orders, product.operands, strict=True)):
        return ()
    return _rebuilt(product, orders, step.results[0], step.permutation, exchanged=list(rest) != [*left, *right])


def _in_lines(product: Step, step: Step) -> tuple[Step, ...]:
    """The product of exchanged operands, transposed, if what is read last is then last in memory."""
    batch, middle = _parts(product)
    if step.permutation[-1] != middle - 1 or middle == batch:
        return ()
    order = (*range(batch), *range(middle, product.result.rank), *range(batch, middle))
    value = Value(TensorType(tuple(product.result.shape[d] for d in order), product.result.dtype))
    orders = [*range(middle - batch)], [*range(product.result.rank - middle)]
    back = transposition(value, step.results[0], [order.index(d) for d in step.permutation])
    return *_rebuilt(product, orders, value, order, exchanged=True), back


def _parts(product: Step) -> tuple[int, int]:
    """How many of the result's dimensions are batches, and where those of the second operand begin."""
    return len(product.lhs_batching_dimensions), product.operands[0].type.rank - len(product.lhs_contracting_dimensions)


def _is_copied(step: Step, reads: Mapping[Value, int], readers: Mapping[Value, Step]) -> bool:
    """Whether a transposition is read by one step, which copies it."""
    value, strides = step.results[0], [row_major(step.operand.shape)[d] for d in step.permutation]
    while value.type.size and reads[value] == 1 and (reader := readers.get(value)) is not None:
        if reader.name in _CONCATENATED:
            return True
        if reader.name not in _INSERTED or reader.result.size != value.type.size:
            return False
        found = reshaped(value.shape, strides, reader.result.shape)
        if found is None:
            return True
        value, strides = reader.results[0], list(found)
    return False


def _rebuilt(product: Step, orders: Sequence[Sequence[int]], result: Value, permutation: Sequence[int], *, exchanged: bool) -> tuple[Step, ...]:
    """A product whose result is the old one's, transposed. orders: of each operand's free dimensions."""
    steps: list[Step] = []
    operands: list[Value] = []
    before: list[Value] = []
    back: list[Step] = []
    for side, old, order in zip(("lhs", "rhs"), product.operands, orders, strict=True):
        operands.append(old)
        before.append(old)
        if list(order) != sorted(order):
            taken = [d for kind in _KINDS for d in product.attributes[f"{side}_{kind}_dimensions"]]
            free = [d for d in range(old.type.rank) if d not in taken]
            moved = dict(zip(free, (free[i] for i in order), strict=True))
            dims = [moved.get(d, d) for d in range(old.type.rank)]
            operands[-1], before[-1] = Value(TensorType(tuple(old.shape[d] for d in dims), old.dtype)), Value(old.type)
            steps.append(transposition(old, operands[-1], dims))
            back.append(transposition(operands[-1], before[-1], [dims.index(d) for d in range(old.type.rank)]))
    attributes = dict(product.attributes)
    if exchanged:
        operands.reverse()
        sides = (("lhs", "rhs"), ("rhs", "lhs"))
        attributes |= {f"{a}_{kind}_dimensions": product.attributes[f"{b}_{kind}_dimensions"] for a, b in sides for kind in _KINDS}
        attributes["precision_config"] = tuple(reversed(product.precision_config))
    plain = Value(product.result)
    inner = replace(product, operands=tuple(before), results=(plain,))
    attributes["original"] = Region(tuple(operands), (*back, inner, transposition(plain, result, permutation)), (result,))
    return *steps, replace(product, operands=tuple(operands), results=(result,), attributes=attributes, text=())
