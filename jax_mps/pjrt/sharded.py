"""The executable of a program for several devices: the whole of it on the host (host/several.py)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from jax_mps.config import settings
from jax_mps.counters import count
from jax_mps.host import several
from jax_mps.pjrt.buffer import HOST, LAZY
from jax_mps.pjrt.executable import is_host, pjrt_type, result_value
from jax_mps.pjrt.options import CompileOptions, field, fields

log = logging.getLogger(__name__)


class ShardedExecutable:
    """What C reads of it (cshim/README.md): parameters and results of the first device, then of the second, and so on."""

    direct = prompt = False
    code_size = cost = 0

    def __init__(self, code: bytes, options: bytes, chosen: CompileOptions, fingerprint: bytes, source: Callable[[], bytes]) -> None:
        """Compile.

        Raises:
            Refused: the host is forbidden.
            HostError: XLA refuses the program.
        """
        from jax_mps.plan import build

        devices = len(chosen.devices) * len(chosen.devices[0])
        if settings().host == "error":
            raise several.Refused(f"a program for {devices} devices runs on the host; JAX_MPS_HOST=error forbids it")
        module = build.parse(code)
        callbacks = several.link_callbacks(module)
        self.effects = any(c.effects for c in callbacks)
        self.waits = bool(callbacks)  # as in pjrt/executable.py
        self.name = build.module_name(module)
        self.fingerprint = fingerprint
        self.source = source
        self.devices = chosen.devices
        layouts = build.take_layouts(module)
        self.parameter_layouts, self.output_layouts = layouts or ((), ())
        self._program = program = several.Sharded(module if callbacks or layouts else code, options, len(chosen.devices), len(chosen.devices[0]), callbacks)
        given = build.donated(module)
        self.parameter_memories, self.output_memories = build.memories(module)
        self.donated = tuple(p + device * len(program.parameters) for device in range(devices) for p in given)
        self._results = program.results * devices
        self.parameter_types = tuple(map(pjrt_type, program.parameters)) * devices
        self.output_types = tuple(map(pjrt_type, self._results))
        self.output_states = tuple(HOST if is_host(t) else LAZY for t in self._results)
        _announce(self.name, devices)

    def execute(self, arguments: list[Any]) -> Sequence[Any]:
        """Run on the executor's thread; `arguments` is emptied."""
        from jax_mps.plan.segments import to_host

        count("host_calls")
        arrays = to_host(arguments)
        arguments.clear()
        return [result_value(v, t) for v, t in zip(self._program(arrays), self._results, strict=True)]

    def optimized_program(self) -> tuple[bytes, bytes]:
        """Its format and bytes: XLA's module, from which JAX reads the shardings that the partitioner chose."""
        return b"hlo_with_config", with_config(self._program.module)


@functools.lru_cache(maxsize=1024)
def _announce(name: str, devices: int) -> None:
    log.warning("%s is a program for %d devices: it runs on the host (XLA CPU)", name, devices)


def with_config(module: bytes) -> bytes:
    """A serialized HloModuleProto {host_program_shape = 4} as an HloModuleProtoWithConfig {hlo_module = 1, config = 2}, where XLA wants no more
    of the config than HloModuleConfigProto's {entry_computation_layout = 1}."""
    layout = b"".join(bytes(value) for number, value in fields(module) if number == 4 and isinstance(value, bytes))
    return field(1, module) + field(2, field(1, layout))
