"""Programs at the edges, through the plugin: indices out of bounds, INT_MIN / -1, NaN, nothing at all, 20 dimensions, 2^31 bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

Function = Callable[..., Any]

MPS, CPU = jax.devices("mps")[0], jax.devices("cpu")[0]

I32, I64 = np.iinfo(np.int32), np.iinfo(np.int64)
X = np.arange(24, dtype=np.float32).reshape(4, 6)
FAR = np.array([-7, -1, 0, 3, 4, 5, I32.min, I32.max], np.int32)
UPDATES = np.arange(8, dtype=np.float32) + 100
NANS = np.array([[1, np.nan, 3, np.nan], [-np.inf, np.inf, np.nan, -np.nan], [0.0, -0.0, 0.0, -0.0]], np.float32)
SPECIAL = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e10, -1e10, 3e38, 0.99, -0.99, 255.5, 2147483648.0, -2147483904.0, 1.8446744e19],
    np.float32,
)
LIMITS = np.array([I32.min, I32.min, I32.max, -1, 0, 7, I32.min], np.int32)
DIVISORS = np.array([-1, 0, 0, 0, 0, -2, I32.min], np.int32)
COUNTS = np.array([31, 32, 33, -1, 100, 0, 32], np.int32)
TWENTY = np.arange(2**5, dtype=np.float32).reshape((1, 2) * 5 + (1,) * 10)


CASES: dict[str, tuple[Function, tuple[Any, ...]]] = {
    "gather": (lambda x, i: [x.at[i].get(mode=m) for m in ("clip", "fill")], (X, FAR)),
    "gather of two indices": (lambda x, i: x.at[i, i[::-1]].get(mode="fill", fill_value=-5), (X, FAR)),
    "scatter": (lambda x, i, u: [x.at[i, 0].set(u, mode=m) for m in ("drop", "clip")], (X, FAR, UPDATES)),
    "scatter of sums": (lambda x, i, u: [x.at[i, 1].add(u, mode=m) for m in ("drop", "clip")], (X, FAR, UPDATES)),
    "scatter of extremes": (lambda x, i, u: [x.at[i, 1].max(u), x.at[i, 1].min(-u), x.at[i, 2].multiply(u)], (X, FAR, UPDATES)),
    "dynamic_slice": (lambda x, i: [lax.dynamic_slice(x, (i[k], i[-k]), (2, 3)) for k in range(8)], (X, FAR)),
    "dynamic_update_slice": (lambda x, i: [lax.dynamic_update_slice(x, x[:2, :3], (i[k], i[-k])) for k in range(8)], (X, FAR)),
    "take_along_axis": (lambda x, i: jnp.take_along_axis(x, i[:4, None], 1), (X, FAR)),
    "unsigned indices": (lambda x, i: [x.at[i].get(mode="clip"), lax.dynamic_index_in_dim(x, i[1])], (X, np.array([0, 255, 4, 3], np.uint8))),
    "division": (lambda a, b: [lax.div(a, b), lax.rem(a, b), a // b, a % b], (LIMITS, DIVISORS)),
    "division of int8": (lambda a, b: [lax.div(a, b), lax.rem(a, b)], (np.array([-128, -128, 127, 0], np.int8), np.array([-1, 0, 0, 0], np.int8))),
    "magnitude": (lambda a: [abs(a), -a, lax.sign(a), lax.integer_pow(a, 3)], (LIMITS,)),
    "shifts": (lambda a, n: [lax.shift_left(a, n), lax.shift_right_logical(a, n), lax.shift_right_arithmetic(a, n)], (LIMITS, COUNTS)),
    "arguments of extremes": (lambda x: [f(x, axis) for f in (jnp.argmax, jnp.argmin, jnp.nanargmax) for axis in (0, 1)], (NANS,)),
    "extremes": (lambda x: [f(x, 1) for f in (jnp.max, jnp.min, jnp.nanmax, jnp.nanmin)], (NANS,)),
    "elementwise extremes": (lambda x: [lax.max(x, x[:, ::-1]), lax.min(x, x[:, ::-1]), lax.clamp(x, x * 0, x + 1)], (NANS,)),
    "sort": (lambda x: [jnp.sort(x, axis=1), jnp.argsort(x, axis=1), lax.sort(x, dimension=0), jnp.sort(x, descending=True)], (NANS,)),
    "top_k": (lambda x: lax.top_k(x, 2), (NANS,)),
    "cumulative": (lambda x: [lax.cummax(x, 1), lax.cummin(x, 1), jnp.cumsum(x, 1)], (NANS,)),
    "to integers": (lambda x: [x.astype(d) for d in ("int8", "uint8", "int16", "int32", "uint32", "bool")], (SPECIAL,)),
    "to half types": (lambda x: [x.astype(d) for d in ("float16", "bfloat16")], (SPECIAL,)),
    "functions": (lambda x: [jnp.sign(x), jnp.floor(x), jnp.round(x), lax.is_finite(x), jnp.isnan(x), lax.nextafter(x, x * 0)], (SPECIAL,)),
    "nothing": (
        lambda x: [jnp.sum(x, 0), jnp.prod(x), x @ x.T, jnp.sort(x, 0), x[::-1], x.T, jnp.cumsum(x, 0), jnp.concatenate([x, x]), jnp.sin(x), x.astype(int)],
        (np.zeros((0, 3), np.float32),),
    ),
    "extremes of nothing": (lambda x: [jnp.max(x, initial=-3.0), jnp.max(x, 1), lax.reduce(x, -1.0, lax.min, (0,))], (np.zeros((0, 3), np.float32),)),
    "arguments of extremes of nothing": (lambda x: [jnp.argmax(x, 1), jnp.argmin(x, 1)], (np.zeros((0, 3), np.float32),)),
    "a product over nothing": (lambda x, y: [x @ y, jnp.einsum("ij,jk->", x, y)], (np.zeros((2, 0), np.float32), np.zeros((0, 4), np.float32))),
    "gather of nothing": (lambda x, i: [x[i], x.at[i].set(1.0), x[i, i]], (X, np.zeros((0,), np.int32))),
    "a convolution over nothing": (lambda x, k: lax.conv(x, k, (1, 1), "SAME"), (np.zeros((0, 2, 5, 5), np.float32), np.ones((3, 2, 3, 3), np.float32))),
    "scalars": (
        lambda x: [x + 1, jnp.sum(x), jnp.sort(x[None])[0], x.reshape(1, 1), jnp.flip(x[None]), lax.cumsum(x[None]), lax.bitcast_convert_type(x, "int32")],
        (np.float32(2.5),),
    ),
    "20 dimensions": (
        lambda x: [x + 1, x.T, jnp.sum(x, (1, 3)), jnp.flip(x, 1), x.reshape(-1), jnp.sort(x, 5), x[:, ::-1, :, 0], lax.concatenate([x, x], 7)],
        (TWENTY,),
    ),
    "no iterations": (lambda x: [lax.fori_loop(0, 0, lambda i, c: c + 1, x), lax.fori_loop(5, 2, lambda i, c: c + 1, x)], (X,)),
    "a condition that is false": (lambda x: lax.while_loop(lambda c: c.sum() < 0, lambda c: c * 2, x), (X,)),
    "a scan over nothing": (lambda x: lax.scan(lambda c, v: (c + v.sum(), v), 1.0, x), (np.zeros((0, 3), np.float32),)),
    "an empty carry": (lambda x: lax.fori_loop(0, 3, lambda i, c: (c[0], c[1] + c[0].sum() + 1), (x, jnp.float32(0))), (np.zeros((0, 3), np.float32),)),
    "a scan without a carry": (lambda x: lax.scan(lambda c, v: (c, v * 2), None, x), (X,)),
    "a branch out of range": (lambda i: [lax.switch(k, [lambda: 1.0, lambda: 2.0, lambda: 3.0]) for k in i], (FAR,)),
    "no arguments": (lambda: (jnp.arange(5), jnp.float32(3)), ()),
    "no results": (lambda x: [], (X,)),
}  # fmt: skip


def on(device: jax.Device, f: Function, arguments: tuple[Any, ...]) -> list[np.ndarray[Any, Any]]:
    with jax.default_device(device):
        return [np.asarray(r) for r in jax.tree.leaves(jax.jit(f)(*(jax.device_put(a, device) for a in arguments)))]


@pytest.mark.parametrize("name", CASES)
def test_as_on_cpu(name: str) -> None:
    f, arguments = CASES[name]
    got, want = on(MPS, f, arguments), on(CPU, f, arguments)
    assert len(got) == len(want)
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), index
        kind = np.float64 if ours.dtype.kind not in "biu" else ours.dtype
        np.testing.assert_allclose(ours.astype(kind), theirs.astype(kind), rtol=1e-6, err_msg=str(index))


def test_64_bit_limits() -> None:
    with jax.enable_x64(True):
        a, b = np.array([I64.min, I64.min, I64.max, 5]), np.array([-1, 0, 0, I64.min])
        f = lambda a, b: [lax.div(a, b), lax.rem(a, b), abs(a), jnp.asarray(X)[jnp.clip(a, 0, 3)], jnp.asarray(X).at[a].add(1.0)]  # noqa: E731
        for ours, theirs in zip(on(MPS, f, (a, b)), on(CPU, f, (a, b)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(free_bytes() < 12 << 30, reason="needs 12 GiB of free memory")
@pytest.mark.alone
def test_more_than_two_to_the_31_bytes() -> None:
    """Offsets past 31 bits, as an input and as a result."""
    columns = (1 << 30) + 5
    x = jax.device_put(np.broadcast_to(np.arange(columns, dtype=np.uint8), (2, columns)), MPS)
    same, last, tail = jax.jit(lambda x: (x, x[-1, -1], lax.dynamic_slice(x, (1, columns - 3), (1, 3))))(x)
    assert int(last) == np.asarray(same)[1, -1] == 4
    np.testing.assert_array_equal(np.asarray(tail), [[2, 3, 4]])
