"""Copies that products need, together: how many kernels copy with them and without, as MLX's products on CUDA would have it, and that nothing changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import mlx.core as mx
import numpy as np
import pytest
from ops.harness import Case, assert_same, lowered, plan_of, reference, results_of
from ops.test_strided import in_place_of_cuda

from jax_mps import rewrites
from jax_mps.ops import dot, shapes, strided
from jax_mps.plan.text import module_text
from jax_mps.rewrites import dense, pads, transposes, views


class Copies:
    """What MLX copies on CUDA, counted while a program runs step by step on the CPU: operands of products whose last two dimensions are not side by side,
    reshapes of what is not, parts of concatenations. `mx.compile` makes one of equal reshapes."""

    def __init__(self) -> None:
        self.kernels = 0
        self.known: dict[object, mx.array] = {}

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reshape, concatenate, kernel = mx.reshape, mx.concatenate, strided._kernel

        def reshaped(x, shape, **how):
            key = (*_memory(x), tuple(shape))
            if key in self.known:
                return self.known[key]
            y = reshape(x, shape, **how)
            if y.size and _memory(y)[0] != _memory(x)[0]:
                self.known[key] = y
                self.kernels += 1
            return y

        def concatenated(parts, **how):
            self.kernels += len(parts)
            return concatenate(parts, **how)

        def together(*key):
            self.kernels += 1
            return kernel(*key)

        for name in ("matmul", "addmm"):
            monkeypatch.setattr(mx, name, self.product(getattr(mx, name)))
        monkeypatch.setattr(mx, "reshape", reshaped)
        monkeypatch.setattr(mx, "concatenate", concatenated)
        monkeypatch.setattr(strided, "_kernel", together)

    def product(self, f):
        def run(*operands, **how):
            for x in operands[-2:]:
                m, n = x.shape[-2:]
                _, _, strides = _memory(x)
                self.kernels += strides[-2:] not in ((n, 1), (1, m)) and m > 1 and n > 1
            return f(*operands, **how)

        return run


ALIVE: list[mx.array] = []  # so that no address is used twice


def _memory(x: mx.array) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    mx.eval(x)
    ALIVE.append(x)
    seen = np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    return seen.ctypes.data, seen.shape, tuple(s // x.itemsize for s in seen.strides)


@pytest.fixture
def cuda(monkeypatch):
    """Products, concatenations and their rewrites as on CUDA."""
    for module in (dense, dot, pads, shapes, strided, transposes):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    monkeypatch.setattr(strided, "_kernel", in_place_of_cuda)
    return monkeypatch


R = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return R.normal(size=shape).astype(np.float32)


def attend(q, k, v):
    """(batch, heads, positions, features)"""
    return jnp.tanh(q @ k.swapaxes(-1, -2)) @ v


def heads(x, count: int):
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def merged(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def split(x, w):
    return merged(attend(*(heads(y, 4) for y in jnp.split(x @ w, 3, -1))))


def unpacked(x, w):
    q, k, v = (x @ w).reshape(2, 9, 3, 4, 8).transpose(2, 0, 3, 1, 4)
    return merged(attend(q, k, v))


def indexed(x, w):
    y = (x @ w).reshape(2, 9, 3, 4, 8)
    scores = jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", y[:, :, 0], y[:, :, 1]))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, y[:, :, 2]).reshape(2, 9, -1)


def one_head(x, w):
    return attend(*jnp.split(x @ w, 3, -1))


def separate(x, wq, wk, wv):
    return merged(attend(*(heads(x @ w, 4) for w in (wq, wk, wv))))


def general(x, wq, wk, wv, wo):
    """As flax has it."""
    q, k, v = (jnp.einsum("bte,ehd->bthd", x, w) for w in (wq, wk, wv))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jnp.tanh(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
    return jnp.einsum("bqhd,hde->bqe", mixed, wo)


def grouped(x, w):
    """Four heads of queries for two of keys and values."""
    y = x @ w
    q, k, v = y[..., :32].reshape(2, 9, 2, 2, 8), y[..., 32:48].reshape(2, 9, 2, 8), y[..., 48:].reshape(2, 9, 2, 8)
    weights = jnp.tanh(jnp.einsum("btkgd,bskd->bkgts", q, k))
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(2, 9, -1)


def cross(x, memory, wq, wkv):
    k, v = (heads(y, 4) for y in jnp.split(memory @ wkv, 2, -1))
    return merged(attend(heads(x @ wq, 4), k, v))


def gradients(f):
    def g(*args):
        return jax.grad(lambda *p: jnp.sum(jnp.square(f(*p))), tuple(range(len(args))))(*args)

    return g


X, SAME, WIDE = normal(2, 9, 32), normal(32, 32) / 9, normal(32, 96) / 9
PER_HEAD = SAME.reshape(32, 4, 8)
# The kernels that copy: of the program and of its gradients, apart and together.
FORMS = [
    (split, (X, WIDE), [4, 2, 8, 4]), (unpacked, (X, WIDE), [4, 2, 11, 4]), (indexed, (X, WIDE), [3, 1, 4, 2]), (one_head, (X, WIDE), [3, 1, 9, 2]),
    (separate, (X, SAME, SAME, SAME), [4, 2, 8, 4]), (general, (X, PER_HEAD, PER_HEAD, PER_HEAD, SAME.reshape(4, 8, 32)), [4, 2, 9, 4]),
    (grouped, (X, WIDE[:, :64]), [5, 2, 15, 4]), (cross, (X, normal(2, 7, 32), SAME, WIDE[:, :64]), [4, 2, 8, 5]),
]  # fmt: skip


def kernels(case: Case, monkeypatch, *, together: bool) -> tuple[int, list[np.ndarray]]:
    """How many kernels copy, and the results."""
    with monkeypatch.context() as patch:
        if not together:
            patch.setattr(rewrites, "dense_copies", lambda plan: plan)
            patch.setattr(strided, "MOST", 0)
        plan, program, arguments = lowered(case, rewritten=True)
        copies = Copies()
        copies.watch(patch)
        results = results_of(plan, program(*arguments), case)
    assert_same(results, reference(case), case)
    return copies.kernels, results


@pytest.mark.parametrize(("f", "args", "expected"), FORMS, ids=lambda f: getattr(f, "__name__", None))
def test_forms(f, args, expected, cuda) -> None:
    found = []
    for case in (Case("forward", f, args, rtol=1e-5, atol=1e-5), Case("gradients", gradients(f), args, rtol=1e-4, atol=1e-4)):  # products of products
        (before, plain), (after, together) = (kernels(case, cuda, together=together) for together in (False, True))
        found += [before, after]
        # not to the bit: exchanged operands are summed up in another order, and by OpenBLAS (once a test has run a product on mps) transposed ones, too
        assert_same(together, plain, case)
    assert found == expected


@pytest.mark.parametrize("f", [
    lambda x, w: attend(*[x.reshape(2, 3, 3, 32)] * 3),  # dense as they are
    lambda x, w: attend(*(y[:, None] * 2 for y in jnp.split(x @ w, 3, -1))),  # elementwise steps write dense arrays
    lambda x, w: jnp.einsum("bth,bsh->bts", x[..., :16], x[..., :16] * 2),  # one copy
    lambda x, w: x[:, :1, :16] @ w[:16, :16],  # one row
    lambda x, w: jnp.einsum("bt,bt->b", x[..., 0], x[..., 1]),  # no matrices
    lambda x, w: jnp.einsum("bth,bsh->bts", *(x[..., :32].astype(int).reshape(2, 9, 2, 16)[:, :, i] for i in (0, 1))),  # limbs of integers are made first
    lambda x, w: x[:, :2, :2] @ x[:, 2:4, 2:4],  # too small for a product of MLX's
    lambda x, w: jnp.matmul(x[..., :9], x[..., 9:18], precision="highest"),  # split into two first
])  # fmt: skip
def test_near_misses(f, cuda) -> None:
    case = Case("near", f, (X, WIDE), rtol=1e-5, atol=1e-5)
    plan, program, arguments = lowered(case, rewritten=True)
    assert "jax_mps.dense" not in [step.name for step in plan.body.walk()]
    assert_same(results_of(plan, program(*arguments), case), reference(case), case)


def test_in_loops(cuda) -> None:
    """Each iteration makes its own; what the loop does not change is copied there, too."""

    def f(x, w):
        return jax.lax.scan(lambda x, w: (split(x, w), None), x, w)[0]

    case = Case("loop", f, (X, np.stack([WIDE] * 20)), rtol=1e-4, atol=1e-4)
    plan = rewrites.rewrite(plan_of(case))
    assert [step.name for step in plan.body.walk()].count("jax_mps.dense") == 1


def test_one_array_read_twice(cuda) -> None:
    """By one product, on both sides; the copy is read with other dimension numbers."""

    def f(x):
        y = x.reshape(2, 9, 4, 8)
        return jnp.einsum("bthd,bshd->bhts", y, y) + y.swapaxes(1, 2)[..., :1]

    case = Case("square", f, (X,), rtol=1e-5, atol=1e-5)
    assert kernels(case, cuda, together=True)[0] == 1


def test_on_the_host(cuda) -> None:
    """What the host would run: the steps as they were."""
    plan = rewrites.rewrite(plan_of(Case("host", split, (X, WIDE))))
    text = module_text(plan.arguments, plan.steps, plan.results)
    assert "dense" not in text and text.count("dot_general") == 3


@pytest.mark.parametrize(("shape", "permutation", "new", "strides"), [
    ((2, 9, 32), (0, 1, 2), (2, 9, 4, 8), (288, 32, 8, 1)), ((2, 9, 4, 8), (0, 2, 1, 3), (8, 72), None),
    ((2, 9, 4, 8), (1, 0, 2, 3), (9, 1, 2, 32), (32, 0, 288, 1)),
    ((4, 6), (1, 0), (24,), None), ((4, 6), (1, 0), (2, 3, 4), (3, 1, 6)), ((4, 6), (1, 0), (3, 8), None), ((1, 6), (1, 0), (6,), (1,)),
])  # fmt: skip
def test_strides_of_reshapes(shape, permutation, new, strides) -> None:
    """As MLX finds them."""
    x = mx.zeros(shape)
    view = mx.transpose(x, permutation)
    found = views.reshaped(view.shape, [views.row_major(shape)[d] for d in permutation], new)
    assert found == strides
    same = _memory(mx.reshape(view, new))
    assert (same[0] == _memory(x)[0]) == (found is not None)
    if found is not None:
        assert [s for s, n in zip(same[2], new, strict=True) if n > 1] == [s for s, n in zip(found, new, strict=True) if n > 1]
