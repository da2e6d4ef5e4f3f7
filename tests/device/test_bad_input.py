"""Bad input is refused in words that name the thing; nothing ends the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device.programs import run
from jaxlib import xla_client

from jax_mps.errors import InvalidOption, InvalidProgram
from jax_mps.pjrt import options
from jax_mps.plan import build

IDENTITY = "func.func @main(%a: tensor<3xf32>) -> tensor<3xf32> { return %a : tensor<3xf32> }"
CUSTOM_CALL = """func.func @main(%a: tensor<3xf32>) -> tensor<3xf32> {
  %0 = stablehlo.custom_call @no_such_target(%a) : (tensor<3xf32>) -> tensor<3xf32>
  return %0 : tensor<3xf32>
}"""
TWO_DEVICES = "module attributes {mhlo.num_replicas = 2 : i32} { " + IDENTITY + " }"


def compiled(program: str | bytes) -> Any:
    device = jax.devices("mps")[0]
    return device.client.compile_and_load(program, executable_devices=xla_client.DeviceList((device,)), compile_options=xla_client.CompileOptions())


# ---- programs ------------------------------------------------------------------------------------------------------------------

NOT_PROGRAMS = {
    "empty": b"",
    "words": b"hello",
    "magic alone": b"ML\xefR",
    "magic and noise": b"ML\xefR\x0dnoise\x00\xff\xfe",
    "not UTF-8": b"\xff\xfe\x00func.func",
    "unknown op": b"func.func @main() { %0 = stablehlo.nonsense : tensor<f32> return }",
    "wrong types": b"func.func @main(%a: tensor<3xf32>) -> tensor<4xf32> { return %a : tensor<3xf32> }",
}


@pytest.mark.parametrize("name", NOT_PROGRAMS)
def test_what_is_no_program(name: str) -> None:
    with pytest.raises(InvalidProgram, match=r"no StableHLO module|no function"):
        build.build(build.parse(NOT_PROGRAMS[name]))


def test_the_reason_is_mlirs() -> None:
    """The message holds what MLIR said, which is not printed elsewhere."""
    with pytest.raises(InvalidProgram, match=r"4xf32"):
        build.parse(NOT_PROGRAMS["wrong types"])


def test_an_unknown_custom_call() -> None:
    with pytest.raises(Exception, match=r"UNIMPLEMENTED: custom_call:no_such_target"):
        compiled(CUSTOM_CALL)


def test_a_program_for_two_devices() -> None:
    with pytest.raises(Exception, match="2 replicas"):
        compiled(TWO_DEVICES)


def read_corruptions(first: int, last: int, log: Path) -> subprocess.CompletedProcess[str]:
    return spawn(str(first), str(last), str(log))


def spawn(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("corruptions.py")), *arguments]
    return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, errors="replace", timeout=250)


@pytest.mark.slow
def test_a_thousand_corruptions(tmp_path: Path) -> None:
    """Each is refused or means something. Where the process ends, it is jaxlib's reader that ends it (about 1 in 300): alone, it dies of the
    same bytes, or refuses them, so that nothing of ours ever saw them and the heap that broke is the reader's work. The damage may also show only
    later, while another is read: that one is then read again, by a process that has read nothing before."""
    total, log, outcomes = 1000, tmp_path / "at", Counter[str]()
    first = 0
    while first < total:
        ran = read_corruptions(first, total, log)
        if ran.returncode == 0:
            outcomes.update(json.loads(ran.stdout.rsplit("OUTCOMES ", 1)[1]))
            break
        number = int(log.read_text())
        alone = spawn("alone", str(number))
        blamed = alone.returncode < 0 or "refused:" in alone.stdout
        assert blamed or number > first, f"corruption {number} ends our process, and jaxlib alone takes it: {ran.stderr[-500:]}"
        outcomes["jaxlib" if blamed else "later"] += 1
        first = number + blamed
    assert not [o for o in outcomes if o.startswith("unexpected")], outcomes
    assert outcomes["jaxlib"] + outcomes["later"] <= 10


# ---- serialized executables ----------------------------------------------------------------------------------------------------


def test_a_damaged_executable() -> None:
    """No byte can be changed or lost unnoticed: damage never reaches MLIR's reader."""
    data = options.pack(b"code" * 20, b"options")
    assert options.unpack(data) == (b"code" * 20, b"options")
    for size in range(len(data)):
        with pytest.raises(InvalidProgram, match="serialized executable"):
            options.unpack(data[:size])
        damaged = bytearray(data)
        damaged[size] ^= 16
        with pytest.raises(InvalidProgram, match="serialized executable"):
            options.unpack(bytes(damaged))
    with pytest.raises(InvalidProgram, match="damaged"):
        options.unpack(data + b"!")


def test_a_truncated_executable_through_jax() -> None:
    executable = compiled(IDENTITY)
    data, client = executable.serialize(), jax.devices("mps")[0].client
    devices = xla_client.DeviceList((jax.devices("mps")[0],))
    for size in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            client.deserialize_executable(data[:size], devices, None)


# ---- arguments -----------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "none": (lambda: [], "takes 1 arguments, got 0"),
    "one too many": (lambda: [jnp.ones(3)] * 2, "takes 1 arguments, got 2"),
    "another shape": (lambda: [jnp.ones(4)], r"argument 0 of main: expected float32\[3\], got float32\[4\]"),
    "another dtype": (lambda: [jnp.ones(3, jnp.int32)], r"argument 0 of main: expected float32\[3\], got int32\[3\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    arguments, words = WRONG[name]
    with pytest.raises(Exception, match=words):
        compiled(IDENTITY).execute_sharded(arguments())


def test_a_deleted_array() -> None:
    x = jnp.ones(3)
    x.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        jax.jit(jnp.sin)(x)


# ---- options and variables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "words"),
    [({"xla_typo": 1}, "No such compile option: 'xla_typo'"), ({"xla_dump_max_hlo_modules": "many"}, "'many' is not a valid int32 value")],
    ids=["name", "value"],
)
def test_a_wrong_compile_option(option: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        jax.jit(lambda x: x + 1, compiler_options=option)(jnp.ones(3))


def test_a_known_compile_option() -> None:
    f = jax.jit(lambda x: x + 1, compiler_options={"xla_dump_max_hlo_modules": 200})
    np.testing.assert_array_equal(np.asarray(f(jnp.ones(3))), np.full(3, 2, np.float32))


def test_options_that_are_no_message() -> None:
    with pytest.raises(InvalidProgram, match="CompileOptionsProto"):
        options.read(b"\xff\xff\xff")


@pytest.mark.parametrize("variable", ["JAX_MPS_DEVICE", "JAX_MPS_HOST", "JAX_MPS_COMPILE"])
def test_a_wrong_variable(variable: str) -> None:
    from jax_mps.config import Settings

    with pytest.raises(InvalidOption, match=f"{variable}='nonsense': choose one of"):
        Settings.read({variable: "nonsense"})


def test_a_wrong_variable_is_named(tmp_path: Path) -> None:
    ran = run("print(jnp.ones(3))", tmp_path, check=False, JAX_MPS_HOST="never")
    assert ran.code == 1
    assert "JAX_MPS_HOST='never': choose one of allow, needed, error" in ran.output
