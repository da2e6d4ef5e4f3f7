"""Small updates joined: the plan, and the kernel's own source, compiled for the CPU, in the place of the kernel that only CUDA has."""

from __future__ import annotations

import ctypes
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of, to_numpy
from ops.kernels import NUMBERS, library, needs_compiler

from jax_mps.ops import joined as kernels
from jax_mps.ops.cuda_text import HEADER, MEMORY
from jax_mps.ops.dtypes import mx_array
from jax_mps.plan.types import numpy_dtype
from jax_mps.rewrites import join, rewrite

RUN = """
struct Index {{ uint32_t x; }};
static Index blockIdx, threadIdx;
static void body({parameters}) {{
{body}
}}
extern "C" void run(uint32_t blocks, void** at) {{
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < 256; threadIdx.x++) body({arguments});
}}
"""


@functools.cache
def compiled(recipe, members):
    """As `joined._kernel`."""
    names = recipe.variables()
    of_each = {f"{name}_{k}": dtype for written in (False, True) for k in range(members) for name, dtype in names if (name[0] == "y") == written}
    types = {"sizes": "uint32", "constants": "float32", **{f"q{i}_at": recipe.numbers[i] for i in sorted(recipe.shared)}, **of_each}
    reads = kernels.inputs(recipe, members)
    assert list(types)[: len(reads)] == reads
    kinds = [f"{'const ' if name in reads else ''}{MEMORY[dtype]}*" for name, dtype in types.items()]
    parameters = ", ".join(f"{kind} {name}" for kind, name in zip(kinds, types, strict=True))
    arguments = ", ".join(f"({kind})at[{i}]" for i, kind in enumerate(kinds))
    text = RUN.format(parameters=parameters, arguments=arguments, body=kernels.source(recipe, members))
    run = library(NUMBERS + HEADER + "\n#define __restrict__ __restrict\n" + text, "-O1", "-ffp-contract=off").run

    def kernel(*, inputs, output_shapes, output_dtypes, grid, threadgroup):
        assert threadgroup == (256, 1, 1) and grid[0] % 256 == 0 and len(types) <= 400
        names = [str(d).rsplit(".", 1)[-1] for d in output_dtypes]
        outputs = [np.full(shape, 77).astype(numpy_dtype(name)) for shape, name in zip(output_shapes, names, strict=True)]
        held = [np.ascontiguousarray(to_numpy(x)) for x in inputs]
        assert [numpy_dtype(d) for d in types.values()] == [a.dtype for a in (*held, *outputs)]
        run(ctypes.c_uint32(grid[0] // 256), (ctypes.c_void_p * len(types))(*(a.ctypes.data for a in (*held, *outputs))))
        return [mx_array(a, name) for a, name in zip(outputs, names, strict=True)]

    return kernel


@pytest.fixture
def cuda(monkeypatch):
    """The plan and its lowering for CUDA, of updates with any number of results."""
    needs_compiler()
    monkeypatch.setattr(join, "_ROOM", 1)
    monkeypatch.setattr(join, "device_kind", lambda: "cuda")
    monkeypatch.setattr(kernels, "_kernel", compiled)


R = np.random.default_rng(0)


def normal(*shape: int, dtype: str = "float32") -> np.ndarray:
    return R.normal(0.5, 1.0, shape).astype(numpy_dtype(dtype))


def counts(plan):
    """How many members each joined step has, inner regions included."""
    return sorted(step.members for step in plan.body.walk() if step.name == "jax_mps.joined")


def run(f, *args, joined=(), rtol=None, atol=None):
    """The results on the plan for CUDA, checked against JAX on the CPU, and against the steps as they were."""
    case = Case("joined", f, args, rtol=rtol, atol=atol)
    plan, program, arguments = lowered(case, rewritten=True)
    assert counts(plan) == sorted(joined)
    got = results_of(plan, program(*arguments), case)
    assert_same(got, reference(case), case)
    plain, program, arguments = lowered(case)
    assert_same(got, results_of(plain, program(*arguments), case), case)
    return plan


SHAPES = [(768,), (5,), (3, 4), (1025,), (2, 2, 300), (1,), (1024,)]


def trees(dtype="float32", shapes=SHAPES):
    return [normal(*shape, dtype=dtype) for shape in shapes], [normal(*shape, dtype=dtype) for shape in shapes]


def updated(optimizer):
    """One step of an optimizer: parameters, its state, of parameters, gradients that a reduction makes, and the state."""

    def f(parameters, gradients, state):
        gradients = jax.tree.map(lambda g: lax.cumsum(g), gradients)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    return f


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-3),
    "adam of a schedule": optax.adam(optax.linear_schedule(1e-3, 1e-4, 50)),
    "clipped by value": optax.chain(optax.clip(0.5), optax.rmsprop(1e-2)),
    "clipped by the norm of all": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "lion": optax.lion(1e-3),
    "lamb": optax.lamb(1e-3),
}


JOINED = {"lion": [7, 7]}  # its moments and its parameters have no step in common


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in OPTIMIZERS), ("momentum", "float16"), ("momentum", "bfloat16"), ("adamw", "float16"), ("adamw", "bfloat16")],
)
def test_optimizers(name, dtype, cuda) -> None:
    optimizer = OPTIMIZERS[name]
    parameters, gradients = trees(dtype)
    gradients = [g * np.asarray(0.01, g.dtype) for g in gradients]
    state = jax.tree.map(np.asarray, optimizer.init(parameters))
    loose = {} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}  # sums of half types, and the quotient of two moments that are rounded
    run(updated(optimizer), parameters, gradients, state, joined=JOINED.get(name, [7]), **{"rtol": 1e-5, "atol": 1e-6, **loose})


def stepped(p, g):
    """In four steps, so that a member is found by its own."""
    return p - np.asarray(0.1, p.dtype) * lax.cumsum(g)


def sgd(parameters, gradients):
    return [stepped(p, g) for p, g in zip(parameters, gradients, strict=True)]


def test_many(cuda) -> None:
    """More than one kernel has: as many members for each, and few left over."""
    run(sgd, *trees(shapes=[(n + 1,) for n in range(64)]), joined=[21] * 3, atol=1e-6)
    assert [kernels.Recipe((), 0, (), ("float32",) * read, (("float32", "r0"),) * written).most for read, written in ((2, 1), (3, 2), (4, 3))] == [21, 11, 8]


def test_a_network(cuda) -> None:
    """As flax keeps its parameters, in nested dictionaries; batch norm's statistics are updated beside them."""
    shapes = {"dense": {"kernel": (6, 8), "bias": (8,)}, "norm": {"scale": (8,), "bias": (8,)}, "out": {"kernel": (8, 3), "bias": (3,)}}
    parameters = jax.tree.map(lambda shape: normal(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    statistics = {"mean": normal(8), "variance": normal(8) ** 2}
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def loss_of(p, x, y):
        h = x @ p["dense"]["kernel"] + p["dense"]["bias"]
        mean, variance = h.mean(0), h.var(0)
        h = (h - mean) * lax.rsqrt(variance + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        return jnp.square(jax.nn.relu(h) @ p["out"]["kernel"] + p["out"]["bias"] - y).mean(), (mean, variance)

    def f(p, state, statistics, x, y):
        (loss, (mean, variance)), g = jax.value_and_grad(loss_of, has_aux=True)(p, x, y)
        updates, state = optimizer.update(g, state, p)
        statistics = {"mean": 0.9 * statistics["mean"] + 0.1 * mean, "variance": 0.9 * statistics["variance"] + 0.1 * variance}
        return optax.apply_updates(p, updates), state, statistics, loss

    state = jax.tree.map(np.asarray, optimizer.init(parameters))
    run(f, parameters, state, statistics, normal(16, 6), normal(16, 3), joined=[6], rtol=1e-4, atol=1e-5)  # products


def test_what_differs(cuda) -> None:
    """Floats may, and numbers that one member alone reads; types and steps may not."""
    xs, rates = [normal(n) for n in (3, 5, 7, 9)], [np.float32(n) for n in (1, 2, 3, 4)]
    run(lambda xs: [jnp.exp(x * np.float32(i)) + 1 for i, x in enumerate(xs)], xs, joined=[4])
    run(lambda xs, rates: [x * (jnp.sqrt(r) + 1) for x, r in zip(xs, rates, strict=True)], xs, rates, joined=[4])
    run(lambda xs, rates: [x * r + r * r for x, r in zip(xs, rates, strict=True)], xs, rates, joined=[4])
    run(lambda xs, rates: [x * rates[0] + rates[1] for x in xs], xs, rates, joined=[4])
    run(lambda xs: [x * 2 + 1 for x in xs[:2]] + [x * 2 - 1 for x in xs[2:]], xs)
    mixed = [normal(n, dtype=dtype) for dtype in ("float32", "float16", "bfloat16") for n in (2, 3, 4, 5)]
    run(lambda xs: [(x.astype(np.float32) * 2 + 1).astype(x.dtype) for x in xs], mixed, joined=[4, 4, 4], rtol=1e-2)
    whole = [np.arange(n, dtype=dtype) - 2 for dtype in ("int32", "int8") for n in (4, 5, 6, 7)]
    run(lambda xs: [jnp.where(x > 1, x * 3, -x) for x in xs], whole, joined=[4, 4])
    run(lambda xs: [jnp.where(x > 1, x * np.asarray(i, x.dtype), -x) for i, x in enumerate(xs)], whole)


def test_odd_sizes(cuda) -> None:
    """Numbers and arrays of nothing stay; so do large arrays."""
    shapes = [(), (0,), (3, 0), (1,), (1, 1), (2,), (1023,), (600, 600)]
    run(lambda xs: [jnp.exp(x) * 2 + 1 for x in xs], [normal(*shape) for shape in shapes], joined=[4])


def test_values_that_several_read(cuda) -> None:
    """What is computed on the way and read elsewhere: nothing of that is joined; what others make anew is made anew here, too."""
    xs = [normal(4, n) for n in (3, 5, 7, 9)]
    run(lambda xs: ([jnp.exp(x.sum(0)) * 2 for x in xs], [lax.cumsum(jnp.exp(x.sum(0))) for x in xs]), xs, joined=[4])
    run(lambda xs: ([(x.sum(0) / 4) * 0.1 for x in xs], [x - x.sum(0) / 4 for x in xs]), xs, joined=[4])


def test_near_misses(cuda) -> None:
    xs, weights = [normal(n) for n in (8, 8, 8, 8)], [normal(8, 8) for _ in range(4)]

    def chained(xs, weights):
        """Each update waits for the one before."""
        results, last = [], xs[0]
        for x, w in zip(xs, weights, strict=True):
            last = jnp.tanh(last @ w) * 2 + x
            results.append(last)
        return results

    run(chained, xs, weights, rtol=1e-4)
    run(lambda xs: [jnp.exp(x) * 2 for x in xs[:3]], xs)
    run(lambda xs: [lax.cumsum(jnp.exp(x) * 2) for x in xs], xs)
    run(lambda ws: [w.T * 2 + 1 for w in ws], weights)  # views
    run(lambda xs, ws: [x + w for x, w in zip(xs, ws, strict=True)], xs, weights)  # rows that are repeated
    run(lambda xs: [lax.erf_inv(jnp.exp(-x * x)) for x in xs], xs, rtol=1e-4)  # without text; an exponential beside 1


def test_in_loops(cuda) -> None:
    """Two are enough in a body; what leaves a loop has left it by then."""

    def epoch(parameters, batches):
        def step(carry, x):
            return [p - 0.1 * lax.cumsum(x[: p.size]) for p in carry], x.sum()

        return lax.scan(step, parameters, batches)

    case = Case("epoch", epoch, ([normal(3), normal(4)], normal(1000, 5)))
    assert counts(rewrite(plan_of(case))) == [2]


def test_on_no_other_device(monkeypatch) -> None:
    case = Case("sgd", sgd, trees())
    for device in ("cpu", "metal"):
        monkeypatch.setattr(join, "device_kind", lambda device=device: device)
        assert counts(rewrite(plan_of(case))) == []


@pytest.mark.parametrize(("name", "joined"), [("sgd", True), ("momentum", True), ("adamw", False)])
def test_where_it_pays(name, joined, monkeypatch) -> None:
    """Of many results, MLX's lists of them cost the host more than kernels."""
    monkeypatch.setattr(join, "device_kind", lambda: "cuda")
    parameters, gradients = trees()
    optimizer = OPTIMIZERS[name]
    args = (parameters, gradients, jax.tree.map(np.asarray, optimizer.init(parameters)))
    assert bool(counts(rewrite(plan_of(Case(name, updated(optimizer), args))))) == joined
