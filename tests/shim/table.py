"""Drives the PJRT table itself, without JAX: what the framework would do, in a few lines of Python."""

import ctypes
import importlib.util
import json
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CSHIM = HERE.parents[1] / "cshim"


def load_generator():
    """cshim/generate_abi.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("generate_abi", CSHIM / "generate_abi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()
FACTS = json.loads((HERE / "pjrt_abi.json").read_text())

ffi = FFI()
ffi.cdef("\n".join(line for line in generator.header(FACTS).split("#define PJRT_FUNCTIONS")[0].splitlines() if line[:1] != "#"))


class PjrtError(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def text(pointer, size):
    return bytes(ffi.buffer(pointer, size)).decode()


class Table:
    """Calls slots by name: table.Buffer_ElementType(buffer=b).type."""

    def __init__(self, address):
        self.api = ffi.cast("PJRT_Api*", address)
        self.keep = []

    def __getattr__(self, name):
        return lambda **fields: self.call(name, getattr(self.api, f"PJRT_{name}"), fields)

    def call(self, name, function, fields):
        args = ffi.new(f"PJRT_{name}_Args*")
        args.struct_size = ffi.sizeof(args[0])
        for field, value in fields.items():
            setattr(args, field, value)
        error = function(args)
        if isinstance(error, ffi.CData) and error != ffi.NULL:
            raise self.taken(error)
        return args

    def with_gil(self, name, **fields):
        """The same with the GIL held, as jaxlib has it in some calls; cffi lets go of it."""
        function = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(int(ffi.cast("uintptr_t", getattr(self.api, f"PJRT_{name}"))))
        return self.call(name, lambda args: ffi.cast("PJRT_Error*", function(int(ffi.cast("uintptr_t", args))) or 0), fields)

    def taken(self, error):
        message = self.Error_Message(error=error)
        exception = PjrtError(self.Error_GetCode(error=error).code, text(message.message, message.message_size))
        self.Error_Destroy(error=error)
        return exception

    def new(self, kind, value):
        data = ffi.new(kind, value)
        self.keep.append(data)
        return data

    # ---- what tests do all the time ----
    def client(self):
        return self.Client_Create().client

    def compile(self, client, code=b"x"):
        program = self.new("PJRT_Program*", {"code": self.new("char[]", code), "code_size": len(code)})
        program.format, program.format_size = self.new("char[]", b"mlir"), 4
        return self.Client_Compile(client=client, program=program).executable

    def put(self, client, array, dtype=11):
        dims = self.new("int64_t[]", array.shape)
        strides = self.new("int64_t[]", array.strides)
        args = self.Client_BufferFromHostBuffer(
            client=client,
            data=ffi.cast("void*", array.ctypes.data),
            type=dtype,
            dims=dims,
            num_dims=array.ndim,
            byte_strides=strides,
            num_byte_strides=array.ndim,
        )
        self.Event_Destroy(event=args.done_with_host_buffer)
        return args.buffer

    def outputs_of(self, loaded):
        executable = self.LoadedExecutable_GetExecutable(loaded_executable=loaded).executable
        count = self.Executable_NumOutputs(executable=executable).num_outputs
        self.Executable_Destroy(executable=executable)
        return count

    def execute(self, executable, buffers, keep=()):
        """The output buffers and the completion event."""
        outputs = self.outputs_of(executable)
        arguments = self.new("PJRT_Buffer*[]", buffers or 1)
        results = self.new("PJRT_Buffer*[]", outputs or 1)
        events = self.new("PJRT_Event*[]", 1)
        options = self.new("PJRT_ExecuteOptions*", {"num_non_donatable_input_indices": len(keep)})
        options.non_donatable_input_indices = self.new("int64_t[]", list(keep) or 1)
        self.LoadedExecutable_Execute(
            executable=executable,
            options=options,
            argument_lists=self.new("PJRT_Buffer**[]", [arguments]),
            num_devices=1,
            num_args=len(buffers),
            output_lists=self.new("PJRT_Buffer**[]", [results]),
            device_complete_events=events,
        )
        return list(results)[:outputs], events[0]

    def block(self, buffer):
        event = self.Buffer_ReadyEvent(buffer=buffer).event
        try:
            self.Event_Await(event=event)
        finally:
            self.Event_Destroy(event=event)

    def read(self, buffer):
        import numpy as np

        dims = self.Buffer_Dimensions(buffer=buffer)
        shape = [dims.dims[i] for i in range(dims.num_dims)]
        size = self.Buffer_ToHostBuffer(src=buffer).dst_size
        out = np.empty(size, np.uint8)
        done = self.Buffer_ToHostBuffer(src=buffer, dst=ffi.cast("void*", out.ctypes.data), dst_size=size)
        self.Event_Await(event=done.event)
        self.Event_Destroy(event=done.event)
        return out.view(np.float32).reshape(shape)

    def is_ready(self, event):
        return self.Event_IsReady(event=event).is_ready

    def destroy(self, *buffers):
        for buffer in buffers:
            self.Buffer_Destroy(buffer=buffer)
