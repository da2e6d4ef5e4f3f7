"""Programs that call Python are cached as well: their entries name no function, and are bound to the functions of each process."""

from __future__ import annotations

from pathlib import Path

from device.programs import Ran, run

TRAIN = """
@jax.jit
def step(w, x):
    loss, slope = jax.value_and_grad(lambda w: (jnp.tanh(x @ w) ** 2).mean())(w)
    jax.debug.print("loss {loss}", loss=loss)
    return w - 0.1 * slope, loss

w, x = np.full((4, 2), 0.5, "float32"), np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
for _ in range(3):
    w, loss = step(w, x)
jax.effects_barrier()
report(loss=float(loss))
"""

# Two functions and one of them twice, at the top and in a loop; `first` and `second` stand on line 3.
CALLS = """
double, plus = lambda v: np.asarray(v) * 2, lambda v: np.asarray(v) + 100
FUNCTIONS
kind = jax.ShapeDtypeStruct((3,), jnp.float32)

@jax.jit
def program(x):
    y = jax.pure_callback(first, kind, x)
    z = jax.experimental.io_callback(second, kind, jnp.sin(x) * 0, ordered=True)
    again = jax.pure_callback(first, kind, x + 1)
    looped, sums = lax.scan(lambda c, _: (jax.pure_callback(second, kind, c) * 0.5, c.sum()), x, length=2)
    return y, z, again, looped, sums

import jax.experimental
report(results=[np.asarray(v).tolist() for v in program(np.arange(3, dtype="float32"))])
"""
FORWARD, SWAPPED, ONE = "first, second = double, plus", "first, second = plus, double", "first, second = double, double"

CLOSURES = """
def scaled(k):
    return jax.jit(lambda x: jax.pure_callback(lambda v: np.asarray(v) * k, jax.ShapeDtypeStruct((2,), jnp.float32), x + 1))

x = np.ones(2, "float32")
before = jax_mps.stats()["translations"]
results = [np.asarray(scaled(k)(x)).tolist() for k in (2, 3, 5)]
report(results=results, translated=jax_mps.stats()["translations"] - before)
"""

WRONG_SHAPE = """
def function(v): return np.zeros(SIZE, "float32")
program = jax.jit(lambda x: jax.pure_callback(function, jax.ShapeDtypeStruct((2,), jnp.float32), x * 2))
try: report(result=np.asarray(program(np.ones(2, "float32"))).tolist())
except jax.errors.JaxRuntimeError as error: report(error=str(error))
"""


def test_train_step_with_a_print(tmp_path: Path) -> None:
    """A step with one `jax.debug.print` is read back, and prints in the second process what it printed in the first."""
    cold = run(TRAIN, tmp_path)
    warm = run(TRAIN, tmp_path, NO_TRANSLATION="nor MLIR")
    assert cold.stats["translations"] > 0
    assert warm.stats["translations"] == warm.stats["exports"] == 0
    assert warm.report["loss"] == cold.report["loss"]
    printed = [[line for line in ran.output.splitlines() if line.startswith("loss")] for ran in (cold, warm)]
    assert printed[0] == printed[1]
    assert len(printed[0]) == 3


def test_each_call_reaches_its_own_function(tmp_path: Path) -> None:
    """Two functions, one of them called twice; swapping them in another process is a hit, and swaps the results."""

    def results(functions: str, **environment: str) -> list[list[float]]:
        return run(CALLS.replace("FUNCTIONS", functions), tmp_path, **environment).report["results"]

    forward = [[0, 2, 4], [100, 100, 100], [2, 4, 6], [75, 75.25, 75.5], [3, 151.5]]
    swapped = [[100, 101, 102], [0, 0, 0], [101, 102, 103], [0, 1, 2], [3, 3]]
    assert results(FORWARD) == forward
    assert results(FORWARD, NO_TRANSLATION="nor MLIR") == forward
    assert results(SWAPPED, NO_TRANSLATION="nor MLIR") == swapped
    assert results("#\n" + SWAPPED, NO_TRANSLATION="1") == swapped  # moved by a line: by the canonical key
    assert results("#\n" + FORWARD, NO_TRANSLATION="nor MLIR") == forward


def test_one_function_for_two(tmp_path: Path) -> None:
    """A function in both places gives its results in both, whatever the cache holds of the program with two."""
    run(CALLS.replace("FUNCTIONS", FORWARD), tmp_path)
    ran = run(CALLS.replace("FUNCTIONS", ONE), tmp_path)
    assert ran.report["results"] == [[0, 2, 4], [0, 0, 0], [2, 4, 6], [0, 1, 2], [3, 3]]


def test_closures_in_one_process(tmp_path: Path) -> None:
    """The program in memory is not handed out with an older closure bound to it; nor is it translated again."""
    for environment in ({}, {"NO_TRANSLATION": "nor MLIR"}, {"JAX_MPS_CACHE": "0"}):
        ran = run(CLOSURES, tmp_path, **environment)
        assert ran.report["results"] == [[4, 4], [6, 6], [10, 10]]
        assert ran.report["translated"] == (0 if "NO_TRANSLATION" in environment else 1)


def test_shapes_are_checked_when_warm(tmp_path: Path) -> None:
    """What a function returns is checked against what the program announces, in the second process, too."""
    run(WRONG_SHAPE.replace("SIZE", "2"), tmp_path)
    warm = run(WRONG_SHAPE.replace("SIZE", "3"), tmp_path, NO_TRANSLATION="nor MLIR")
    assert "Incorrect output shape" in warm.report["error"]


FFI = """
@functools.partial(jax.jit, static_argnums=1)
def program(x, scale):
    return jax.ffi.ffi_call("scaled", jax.ShapeDtypeStruct(x.shape, x.dtype))(x + 1, by=np.float32(scale), sizes=(2, 3), name="n") * 2

jax_mps.register_ffi_target("scaled", FUNCTION)
if ANOTHER: jax_mps.register_ffi_target("unrelated", lambda x: x)
report(values=np.asarray(program(np.arange(3, dtype="float32"), 0.5)).tolist())
"""
SCALE = "lambda x, by, sizes, name: x * by + sum(sizes) + len(name)"


def test_ffi_targets_in_python_are_cached(tmp_path: Path) -> None:
    """The entry says which target; the function is each process's own. Attributes come back as they were; targets that are not called cost nothing."""
    head = "import functools\n"

    def once(function: str = SCALE, another: bool = False, **environment: str) -> Ran:
        return run(head + FFI.replace("FUNCTION", function).replace("ANOTHER", str(another)), tmp_path, **environment)

    cold = once()
    assert cold.report["values"] == [13.0, 14.0, 15.0]
    assert cold.stats["translations"] > 0
    assert once(NO_TRANSLATION="nor MLIR").report["values"] == cold.report["values"]
    assert once(another=True, NO_TRANSLATION="nor MLIR").report["values"] == cold.report["values"]
    assert once("lambda x, by, sizes, name: x * 0 + by", NO_TRANSLATION="1").report["values"] == [1.0, 1.0, 1.0]


def test_a_target_that_is_not_registered_is_no_hit(tmp_path: Path) -> None:
    """The name is part of the key: where no function answers for it, the program is refused as it would be without a cache."""
    source = "import functools\n" + FFI.replace("FUNCTION", SCALE).replace("ANOTHER", "False")
    run(source, tmp_path)
    bare = run(source.replace('jax_mps.register_ffi_target("scaled"', '("scaled"'), tmp_path, check=False)
    assert bare.code != 0
    assert "scaled" in bare.output
