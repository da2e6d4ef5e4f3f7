"""How a step that the device cannot run may run on the host."""

from __future__ import annotations

from jax_mps import compat
from jax_mps.calls import callbacks, ffi
from jax_mps.plan.text import is_identity_call, is_printable
from jax_mps.plan.types import Step

# Expanded by XLA's CPU compiler itself, with no registration.
_BUILT_IN = frozenset(["Qr", "ProductOfElementaryHouseholderReflectors", "TopK"])

# Registered with XLA, but meaningless without the function list of an executable of JAX's own cpu backend.
_FOREIGN = ("xla_ffi_python_", "xla_ffi_partitioned_python_", "xla_buffer_python_")

# XLA compiles these, and then waits for a peer that never comes.
_WAITING = frozenset(["stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv"])

# XLA's CPU compiler ends the process over a concatenation of these (jaxlib 0.10 to 0.12; `bit_offset != nullptr`).
_NEVER_JOINED = frozenset(["int2", "uint2"])


def host_kind(step: Step) -> str | None:
    """ "xla": XLA's CPU compiler takes the step; "callback" or "ffi": a Python function answers for it; None: nothing does."""
    if step.name == "stablehlo.custom_call":
        return _call_kind(step)
    if not _plain(step):
        return None
    inner = (s for region in step.regions for s in region.walk())
    return "xla" if all(_plain(s) for s in inner) else None


def _plain(step: Step) -> bool:
    if step.name == "stablehlo.custom_call":
        return _call_kind(step) == "xla"
    if step.name == "stablehlo.concatenate" and step.result.dtype in _NEVER_JOINED:
        return False
    return step.name not in _WAITING and is_printable(step)


def _call_kind(step: Step) -> str | None:
    target = str(step.call_target_name)
    if target == callbacks.TARGET:
        return "callback"
    if ffi.is_registered(target):
        return "ffi"
    if is_identity_call(step):
        return "xla"
    known = target in _BUILT_IN or target.startswith(("lapack_", "mhlo.")) or target in compat.cpu_call_targets()
    return "xla" if known and is_printable(step) and not target.startswith(_FOREIGN) else None
