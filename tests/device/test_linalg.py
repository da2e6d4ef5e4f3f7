"""Linear algebra through the plugin: JAX's cpu numbers, and no error where it gives NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from jax import lax

Function = Callable[..., Any]

MPS, CPU = jax.devices("mps")[0], jax.devices("cpu")[0]
la = lax.linalg


def positive(x: jax.Array) -> jax.Array:
    return x @ jnp.conj(x.mT) + jnp.eye(x.shape[-1], dtype=x.dtype)


def hermitian(x: jax.Array) -> jax.Array:
    return x + jnp.conj(x.mT)


BATCHED: dict[str, Function] = {
    "cholesky": lambda x: jnp.linalg.cholesky(positive(x)),
    "cholesky upper": lambda x: jnp.linalg.cholesky(positive(x), upper=True),
    "cholesky of what has none": lambda x: la.cholesky(-positive(x)),
    "triangular_solve": lambda x: la.triangular_solve(x, x[..., :2], left_side=True, lower=True),
    "triangular_solve right": lambda x: la.triangular_solve(x, x[..., :2, :], transpose_a=True, unit_diagonal=True),
    "triangular_solve conjugate": lambda x: la.triangular_solve(x, x, left_side=True, transpose_a=True, conjugate_a=True),
    "lu": lambda x: la.lu(x),
    "qr": lambda x: jnp.linalg.qr(x),
    "qr complete": lambda x: jnp.linalg.qr(x[..., :2], mode="complete"),
    "qr wide": lambda x: jnp.linalg.qr(x[..., :2, :]),
    "qr r": lambda x: jnp.linalg.qr(x, mode="r"),
    "svd": lambda x: jnp.linalg.svd(x),
    "svd full": lambda x: jnp.linalg.svd(x[..., :2, :], full_matrices=True),
    "svd reduced": lambda x: jnp.linalg.svd(x[..., :2], full_matrices=False),
    "svd values": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "svd by QR": lambda x: la.svd(x, algorithm=la.SvdAlgorithm.QR),
    "eigh": lambda x: jnp.linalg.eigh(x),
    "eigh upper": lambda x: jnp.linalg.eigh(x, UPLO="U"),
    "eigvalsh": lambda x: jnp.linalg.eigvalsh(x),
    "eig": lambda x: jnp.linalg.eig(x),
    "eig both": lambda x: la.eig(x, compute_left_eigenvectors=True),
    "eigvals": lambda x: jnp.linalg.eigvals(x),
    "schur": lambda x: la.schur(x),
    "hessenberg": lambda x: la.hessenberg(x),
    "tridiagonal": lambda x: la.tridiagonal(hermitian(x)),
    "tridiagonal_solve": lambda x: la.tridiagonal_solve(x[..., 0], x[..., 1] + 4, x[..., 2], x[..., :1]),
    "householder_product": lambda x: la.householder_product(x, x[..., 0, :]),
    "solve": lambda x: jnp.linalg.solve(x, x[..., :1]),
    "inv": lambda x: jnp.linalg.inv(x),
    "det": lambda x: jnp.linalg.det(x),
    "slogdet": lambda x: jnp.linalg.slogdet(x),
    "pinv": lambda x: jnp.linalg.pinv(x),
    "expm": lambda x: jsl.expm(x),
    "matrix_power": lambda x: jnp.linalg.matrix_power(x, 3),
    "matrix_rank": lambda x: jnp.linalg.matrix_rank(x),
}
SINGLE: dict[str, Function] = {
    "lstsq": lambda x: jnp.linalg.lstsq(x, x[:, 0]),
    "sqrtm": lambda x: jsl.sqrtm(x),
    "polar": lambda x: jsl.polar(x),
    "cho_solve": lambda x: jsl.cho_solve(jsl.cho_factor(positive(x)), x[:, 0]),
    "gradient of a determinant": lambda x: jax.grad(lambda y: jnp.abs(jnp.linalg.det(y)))(x),
    "gradient of eigenvalues": lambda x: jax.grad(lambda y: jnp.sum(jnp.linalg.eigvalsh(positive(y)) ** 2))(x),
}

_random = np.random.default_rng(0)
REAL = _random.normal(size=(2, 4, 4))
COMPLEX = REAL + 1j * _random.normal(size=(2, 4, 4))
HOLED = REAL.astype(np.float32)
HOLED[0, 0, 1] = np.nan
INPUTS: dict[str, np.ndarray[Any, Any]] = {
    "float32": REAL.astype(np.float32),
    "complex64": COMPLEX.astype(np.complex64),
    "float64": REAL,
    "NaN": HOLED,
    "singular": np.zeros((2, 4, 4), np.float32),
    "infinite": np.where(REAL > 1, np.inf, REAL).astype(np.float32),
    "empty": np.zeros((0, 4, 4), np.float32),
}


def together(table: dict[str, Function]) -> Function:
    """All functions of a table in one program; arrays of one type have it compiled once."""
    return jax.jit(lambda x: {name: jax.tree.leaves(f(x)) for name, f in table.items()})


ALL_BATCHED, ALL_SINGLE = together(BATCHED), together(SINGLE)


def on(device: jax.Device, program: Function, x: np.ndarray[Any, Any]) -> dict[str, list[np.ndarray[Any, Any]]]:
    with jax.default_device(device):
        return jax.tree.map(np.asarray, program(jax.device_put(x, device)))


def check(program: Function, x: np.ndarray[Any, Any]) -> None:
    with jax.enable_x64(x.dtype == np.float64):
        got, want = on(MPS, program, x), on(CPU, program, x)
    tolerance = 1e-9 if x.dtype == np.float64 else 2e-3  # of float32: condition numbers of up to 100, from operands that differ in the last bit
    for name in want:
        for ours, theirs in zip(got[name], want[name], strict=True):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", INPUTS)
def test_batched(name: str) -> None:
    check(ALL_BATCHED, INPUTS[name])


@pytest.mark.parametrize("name", [n for n in INPUTS if n != "empty"])
def test_single(name: str) -> None:
    check(ALL_SINGLE, INPUTS[name][0])


def test_bfloat16() -> None:
    """Triangular solves are JAX's only ones for it."""
    x = np.asarray(jnp.asarray(REAL, jnp.bfloat16) + 2 * jnp.eye(4, dtype=jnp.bfloat16))
    program = together({"solve": lambda x: la.triangular_solve(x, x, left_side=True, lower=True)})
    got, want = (on(d, program, x)["solve"][0].astype(np.float32) for d in (MPS, CPU))
    np.testing.assert_allclose(got, want, rtol=3e-2, atol=3e-2)


def test_a_matrix_without_a_root_is_nan() -> None:
    with jax.default_device(MPS):
        assert np.isnan(np.asarray(jnp.linalg.cholesky(-jnp.eye(3)))).any()
        assert not np.isfinite(np.asarray(jnp.linalg.inv(jnp.zeros((3, 3))))).any()
