"""Programs for several devices, whole on a private XLA CPU client that has as many: its partitioner, its collectives.

The devices of one process are all MLX's one device (`compat.device_count`), so there is nothing to gain from sharding there but the
right answer: what a program of many devices does can be tested without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_mps import compat
from jax_mps.calls import callbacks
from jax_mps.errors import UNIMPLEMENTED, JaxMpsError
from jax_mps.host.xla import HostError, cpu, to_numpy
from jax_mps.plan.tensors import TensorType, numpy_dtype

Array = np.ndarray[Any, Any]

_TOKEN = np.zeros((0,), bool)  # as JAX passes it


class Refused(JaxMpsError):
    """What a program for several devices may not do here; says so."""

    code = UNIMPLEMENTED


class HostCallback:
    """A call into Python as XLA's CPU client makes it, on any device's thread."""

    def __init__(self, op: Any) -> None:
        from jaxlib.mlir import ir

        from jax_mps.plan.attributes import tensor_type

        self.marker = ir.StringAttr(op.attributes["backend_config"]).value
        self.effects = "has_side_effect" in op.attributes and ir.BoolAttr(op.attributes["has_side_effect"]).value
        self.inputs, self.outputs = (tuple(tensor_type(str(v.type)) for v in values) for values in (op.operands, op.results))
        self.function = callbacks.find(self.marker)  # alive for as long as the program

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        """XLA hands None for a token, and takes None for it."""
        results = callbacks.call(callbacks.TARGET, self.marker, arrays, self.inputs, self.outputs)
        return tuple(None if t.dtype == "token" else r for r, t in zip(results, self.outputs, strict=True))


def link_callbacks(module: Any) -> list[HostCallback]:
    """Turn a module's callbacks into those of XLA's CPU client, which knows them by their place in this list."""
    from jaxlib.mlir import ir

    found: list[HostCallback] = []

    def visit(op: Any) -> Any:
        if op.name == "stablehlo.custom_call" and ir.StringAttr(op.attributes["call_target_name"]).value == callbacks.TARGET:
            found.append(HostCallback(op))
            unsigned, signless = ir.IntegerType.get_unsigned(64), ir.IntegerType.get_signless(32)
            target = "xla_ffi_partitioned_python_cpu_callback" if callbacks.PARTITIONED in op.attributes else "xla_ffi_python_cpu_callback"
            op.attributes["call_target_name"] = ir.StringAttr.get(target)
            op.attributes["backend_config"] = ir.DictAttr.get({"index": ir.IntegerAttr.get(unsigned, len(found) - 1)})
            op.attributes["api_version"] = ir.IntegerAttr.get(signless, 4)
            op.attributes["operand_layouts"] = ir.Attribute.parse(_row_major(found[-1].inputs))
            op.attributes["result_layouts"] = ir.Attribute.parse(_row_major(found[-1].outputs))
        return ir.WalkResult.ADVANCE

    with module.context, ir.Location.unknown():
        module.operation.walk(visit)
    return found


def _row_major(types: Sequence[TensorType]) -> str:
    """An attribute with a layout for each type, without which XLA's partitioner ends the process (jaxlib 0.10)."""
    ranks = [t.rank for t in types]
    return f"[{', '.join(f'dense<{[*range(rank)][::-1]}> : tensor<{rank}xindex>' for rank in ranks)}]"


class Sharded:
    """A program compiled for `replicas * partitions` devices. The types are those of one device, after partitioning."""

    def __init__(self, code: Any, options: bytes, replicas: int, partitions: int, callbacks: Sequence[HostCallback]) -> None:
        """Compile.

        Args:
            code: a StableHLO module's bytes, as they came; if it has callbacks, the parsed module. options: the CompileOptionsProto
                that came with it. callbacks: what `link_callbacks` found.

        Raises:
            HostError: XLA refuses the program.
        """
        compat.initialize_lapack()
        xla = compat.xla_client()
        self._cpu = cpu(replicas * partitions)
        chosen = xla.CompileOptions.ParseFromString(options)
        chosen.device_assignment = xla.DeviceAssignment.create(np.arange(replicas * partitions).reshape(replicas, partitions))
        try:
            self._loaded = self._cpu.compile(code, chosen, *([list(callbacks)] if callbacks else []))
            self.module: bytes = self._loaded.hlo_modules()[0].as_serialized_hlo_module_proto()
        except Exception as error:  # jaxlib's error classes differ between versions
            raise HostError("compiling for several devices", error) from error
        shape = xla.XlaComputation(self.module).program_shape()
        result = shape.result_shape()
        self.parameters = tuple(map(_type, shape.parameter_shapes()))
        self.results = tuple(map(_type, result.tuple_shapes() if result.is_tuple() else (result,)))
        self._avals = [compat.shaped_array(*((0,), np.bool_) if t.dtype == "token" else (t.shape, numpy_dtype(t.dtype))) for t in self.parameters]

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """Run with the arguments of the first device, then of the second, and so on; the results come in the same order.

        Raises:
            HostError: the run fails.
        """
        count = len(self._avals)
        try:
            puts = []
            for i, (aval, kind) in enumerate(zip(self._avals, self.parameters, strict=True)):
                parts = arrays[i::count] if kind.dtype != "token" else [_TOKEN] * len(self._cpu.devices)
                puts.append(self._cpu.put(aval, *parts))
            run = self._loaded.execute_sharded(puts, with_tokens=True)
            done = run.consume_token()
            results = run.disassemble_into_single_device_arrays()
            outputs = [
                np.zeros((), bool) if kind.dtype == "token" else to_numpy(shards[device])
                for device in range(len(self._cpu.devices))
                for shards, kind in zip(results, self.results, strict=True)
            ]
            done.block_until_ready()  # each device has a thread of its own, and results may be none
            for put in puts:  # an input that the program does not read may still be in copy
                if not put.is_deleted():  # donated
                    put.block_until_ready()
        except Exception as error:
            raise HostError("running on several devices", error) from error
        return outputs


def _type(shape: Any) -> TensorType:
    return TensorType((), "token") if shape.is_token() else TensorType(tuple(shape.dimensions()), str(shape.numpy_dtype()))
