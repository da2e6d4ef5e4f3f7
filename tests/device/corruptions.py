"""Damage the bytes of real programs and read them: run in a process of its own by `test_bad_input`.

`python corruptions.py FIRST LAST LOG` reads the numbered corruptions and writes each number before it, so that one that ends the process is known.
`python corruptions.py alone NUMBER` hands one to jaxlib's reader with nothing of ours around it.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxlib import _jax
from jaxlib.mlir.dialects import stablehlo


def programs() -> list[bytes]:
    """A product, a loop with a sort, random numbers with a gather, the gradient of a convolution."""
    image, kernel = np.ones((1, 2, 6, 6), np.float32), np.ones((3, 2, 3, 3), np.float32)
    lowered: list[Any] = [
        jax.jit(lambda x, y: jnp.tanh(x @ y) + 1).lower(np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)),
        jax.jit(lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sort(c[1]) * 2), (0, x))[1]).lower(np.ones(5, np.float32)),
        jax.jit(lambda x: jax.random.normal(jax.random.key(0), (3,)) + x[jnp.array([0, 2, 1])].sum()).lower(np.ones(5, np.float32)),
        jax.jit(jax.grad(lambda w: jnp.sum(lax.conv_general_dilated(image, w, (1, 1), "SAME") ** 2))).lower(kernel),
    ]
    return [_jax.mlir.serialize_portable_artifact(str(each.compiler_ir("stablehlo")), stablehlo.get_current_version()) for each in lowered]


def corrupted(code: bytes, number: int) -> bytes:
    """One to four bytes changed, bits flipped, pieces cut out or put in, or the end cut off."""
    chance = random.Random(number)
    data = bytearray(code)
    for _ in range(chance.choice([1, 1, 2, 4])):
        kind, at = chance.random(), chance.randrange(len(data))
        if kind < 0.6:
            data[at] = chance.randrange(256)
        elif kind < 0.75:
            data[at] ^= 1 << chance.randrange(8)
        elif kind < 0.85:
            del data[max(at, 1) :]
        elif kind < 0.95:
            del data[max(at, 1) : at + chance.randrange(1, 8)]
        else:
            data[at:at] = chance.randbytes(4)
    return bytes(data)


def read_all(first: int, last: int, log: Path) -> None:
    from jax_mps.errors import JaxMpsError
    from jax_mps.plan import build
    from jax_mps.plan.translate import translate

    codes, outcomes = programs(), Counter[str]()
    for number in range(first, last):
        log.write_text(str(number))
        try:
            translate(build.parse(corrupted(codes[number % len(codes)], number)))
            outcomes["runs"] += 1
        except JaxMpsError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            outcomes[f"unexpected {type(error).__name__}: {error}"[:200]] += 1
    print("OUTCOMES " + json.dumps(outcomes))


def read_alone(number: int) -> None:
    from jax._src.interpreters import mlir

    codes = programs()
    context = mlir.make_ir_context()
    try:
        stablehlo.deserialize_portable_artifact(context, corrupted(codes[number % len(codes)], number))
    except Exception as error:
        print("refused:", error)


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        read_alone(int(sys.argv[2]))
    else:
        read_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
