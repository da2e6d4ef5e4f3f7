"""Errors in the user's words, each with the PJRT code that it reaches JAX as."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_mps.plan.types import Step

# PJRT_Error_Code (pjrt_abi.json), the ones that are used.
INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED, INTERNAL = 3, 5, 8, 9, 12, 13


class JaxMpsError(Exception):
    """Base of everything that the plugin raises on purpose; `code` is the PJRT error code."""

    code = INTERNAL


class InvalidProgram(JaxMpsError):
    """The bytes are no StableHLO program that can be read."""

    code = INVALID_ARGUMENT


class InvalidOption(JaxMpsError):
    """An option or environment variable has a value that is not one of its own."""

    code = INVALID_ARGUMENT


class NoBufferType(JaxMpsError):
    """An element type that PJRT has no arrays of."""

    code = UNIMPLEMENTED


class OutOfMemory(JaxMpsError):
    """A program needs more memory than the device has."""

    code = RESOURCE_EXHAUSTED


class Interrupted(JaxMpsError):
    """A long program was ended by Ctrl-C or by the interpreter's exit."""

    code = 1


class Unsupported(JaxMpsError):
    """A step that the device cannot run. Says the fact; the op, its types and its source line are added here."""

    code = UNIMPLEMENTED

    def __init__(self, op: Step, fact: str) -> None:
        self.op = op
        self.fact = fact
        where = f" at {op.location}" if op.location else ""
        super().__init__(f"{op.key}{where}: {fact}; types {op.types}")
