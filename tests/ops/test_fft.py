"""`fft`: each transform in one to three dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from .harness import Case, check, check_exported

R = np.random.default_rng(0)


def real(*shape):
    return R.standard_normal(shape).astype(np.float32)


def imaginary(*shape):
    return (real(*shape) + 1j * real(*shape)).astype(np.complex64)


TOLERANCE = dict(rtol=1e-5, atol=1e-4)  # butterflies in another order
LENGTHS = [(1,), (2,), (7,), (16,), (97,), (4, 6), (1, 5), (5, 1), (2, 3, 5), (3, 1, 4), (1, 1, 1)]

CASES = [
    Case(f"{kind}_{'x'.join(map(str, n))}", lambda x, kind=kind, n=n: lax.fft(x, kind, n), (make(3, *n),), **TOLERANCE)
    for kind, make in [("fft", imaginary), ("ifft", imaginary), ("rfft", real)]
    for n in LENGTHS
]
CASES += [
    Case(
        f"irfft_{'x'.join(map(str, n))}",
        lambda x, n=n: lax.fft(x, "irfft", n),
        (np.fft.rfftn(R.standard_normal((3, *n)), axes=range(1, len(n) + 1)).astype(np.complex64),),
        **TOLERANCE,
    )
    for n in LENGTHS
]
CASES += [
    Case("no_batch", jnp.fft.fft, (imaginary(12),), **TOLERANCE),
    Case("many_batches", jnp.fft.fft, (imaginary(2, 1, 3, 8),), **TOLERANCE),
    Case("empty_batch", jnp.fft.fft, (imaginary(0, 8),)),
    Case("empty_batch_rfft", jnp.fft.rfft, (real(0, 9),)),
    Case("shortened_and_padded", lambda x: (jnp.fft.rfft(x, 5), jnp.fft.rfft(x, 20), jnp.fft.irfft(x + 0j, 9)), (real(3, 12),), **TOLERANCE),
    Case("fftn_4", jnp.fft.fftn, (imaginary(2, 3, 4, 3),), **TOLERANCE),
    Case("one_of_a_view", lambda x: jnp.fft.fft(x[:, ::3], axis=1) + jnp.fft.irfft(x[:, ::3], 1), (imaginary(5, 3),), **TOLERANCE),
    Case("other_axis", lambda x: jnp.fft.fft(x, axis=0), (imaginary(6, 4),), **TOLERANCE),
    Case("real_input", jnp.fft.fft2, (real(6, 5),), **TOLERANCE),
    Case("grad", jax.grad(lambda x: jnp.sum(jnp.abs(jnp.fft.rfft(x)) ** 2)), (real(3, 9),), **TOLERANCE),
    Case("grad_irfft", jax.grad(lambda x: jnp.sum(jnp.sin(jnp.fft.irfft(jnp.fft.rfft(x) * 2, 8)))), (real(3, 8),), **TOLERANCE),
    Case("convolve", lambda x: jnp.fft.ifft(jnp.fft.fft(x) ** 2), (imaginary(3, 30),), **TOLERANCE),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fft(case):
    """Equal to XLA's."""
    check(case)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("fft_7", "rfft_2x3x5", "irfft_97", "ifft_4x6")], ids=str)
def test_fft_exported(case):
    """The same after export and import."""
    check_exported(case)
