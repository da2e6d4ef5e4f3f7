"""A toy Python half: enough StableHLO to drive the shim through JAX, with thunks that a test can make fail or wait.

It stands in for jax_mps.pjrt, so that the shim is tested alone. Values are numpy arrays behind thunks ("thunk", the default) or
MLX arrays ("mlx"). A program whose name contains "job" is not direct; "effect" also gives it effects; "eager" a high cost; "donate"
donates its first parameter. Sines of the value 666 fail when they are evaluated; cosines of it when the program runs.
"""

import atexit
import importlib.util
import sys
import threading
import time
from pathlib import Path

import numpy as np


def load_shim():
    """jax_mps._shim, without running jax_mps/__init__.py."""
    package = importlib.util.find_spec("jax_mps")
    (path,) = (path for folder in package.submodule_search_locations for path in Path(folder).glob("_shim*.so"))
    spec = importlib.util.spec_from_file_location("jax_mps._shim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_shim = load_shim()
ffi, lib = _shim.ffi, _shim.lib

DTYPES = {"i1": (1, np.bool_), "i32": (4, np.int32), "f32": (11, np.float32), "f64": (12, np.float64)}
NUMPY = dict(DTYPES.values()) | {6: np.uint8, 8: np.uint32, 5: np.int64, 9: np.uint64}
log = []  # what the hooks were asked, in order
gate = threading.Event()  # jobs named "wait" wait for it
gate.set()


class Thunk:
    """A value that is computed when asked; keeps its inputs until then."""

    __slots__ = ("data", "function", "inputs")

    def __init__(self, function, inputs, data=None):
        self.function, self.inputs, self.data = function, inputs, data

    def evaluate(self):
        todo = [self]
        while todo:
            top = todo[-1]
            missing = [] if top.data is not None else [x for x in top.inputs if x.data is None]
            if missing:
                todo += missing
                continue
            todo.pop()
            if top.data is None:
                function, inputs = top.function, [x.data for x in top.inputs]
                top.data = np.zeros(np.shape(inputs[0]), inputs[0].dtype)  # as MLX does: garbage on a second try
                top.inputs = ()
                top.data = function(*inputs)

    def __del__(self):
        todo = list(self.inputs)
        self.inputs = ()
        while todo:  # without recursion, however long the chain
            x = todo.pop()
            if isinstance(x, Thunk) and sys.getrefcount(x) <= 2:
                todo += x.inputs
                x.inputs = ()


def fail_on_666(name, function):
    def run(x):
        if np.any(x == 666):
            raise ArithmeticError(f"the toy cannot take the {name} of 666")
        return function(x)

    return run


UNARY = {"stablehlo.sine": fail_on_666("sine", np.sin), "stablehlo.negate": np.negative}
BINARY = {"stablehlo.add": np.add, "stablehlo.multiply": np.multiply, "stablehlo.subtract": np.subtract}


class ThunkEngine:
    """numpy behind thunks."""

    def constant(self, array):
        return Thunk(None, (), array)

    def apply(self, name, shape, args):
        if name in ("stablehlo.broadcast_in_dim", "stablehlo.convert"):
            return Thunk(lambda x: np.broadcast_to(x, shape[1]).astype(shape[0]), args)
        if name == "stablehlo.cosine":
            args[0].evaluate()
            return Thunk(None, (), fail_on_666("cosine", np.cos)(args[0].data))
        return Thunk((UNARY | BINARY)[name], args)

    def evaluate(self, values):
        for value in values:
            value.evaluate()

    def schedule(self, values):
        pass

    def export(self, value):
        if not value.data.flags.c_contiguous:
            value = Thunk(None, (), np.ascontiguousarray(value.data))
        return value, memoryview(value.data.reshape(-1).view(np.uint8)).toreadonly()


class MlxEngine:
    """MLX, on one thread-unsafe stream."""

    def __init__(self):
        import mlx.core as mx

        self.mx = mx
        self.stream = mx.new_thread_unsafe_stream(mx.default_device())
        self.dtypes = {np.float32: mx.float32, np.int32: mx.int32, np.bool_: mx.bool_}

    def constant(self, array):
        with self.mx.stream(self.stream):
            return self.mx.array(array)

    def apply(self, name, shape, args):
        mx, s = self.mx, self.stream
        if name in ("stablehlo.broadcast_in_dim", "stablehlo.convert"):
            return mx.broadcast_to(args[0], shape[1], stream=s).astype(self.dtypes[shape[0]], stream=s)
        return {"add": mx.add, "multiply": mx.multiply, "subtract": mx.subtract, "sine": mx.sin, "negate": mx.negative}[name.removeprefix("stablehlo.")](
            *args, stream=s
        )

    def evaluate(self, values):
        self.mx.eval(values)

    def schedule(self, values):
        self.mx.async_eval(values)

    def export(self, value):
        with self.mx.stream(self.stream):
            value = self.mx.contiguous(value)
        self.mx.eval(value)
        return value, memoryview(value)


engine = ThunkEngine()


class Executable:
    """What the shim reads; the program is a list of (op, shape, operands)."""

    def __init__(self, code):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import stablehlo

        with ir.Context() as context:
            context.allow_unregistered_dialects = True
            stablehlo.register_dialect(context)
            module = stablehlo.deserialize_portable_artifact(context, code)
            self.name = ir.StringAttr(module.operation.attributes["sym_name"]).value
            main = next(op for op in module.body.operations if op.operation.attributes["sym_name"].value == "main")
            self.read(main.operation, ir)
        self.code = code
        self.devices = ((0,),)
        self.parameter_memories = self.output_memories = self.parameter_layouts = self.output_layouts = ()
        self.fingerprint = self.name.encode()
        self.code_size = len(code)
        self.output_states = tuple(int(dtype == 12) for dtype, _ in self.output_types)
        self.donated = (0,) if "donate" in self.name else ()
        self.effects, self.waits, self.prompt = "effect" in self.name, False, False
        self.direct = "job" not in self.name and "effect" not in self.name
        self.cost = 10**9 if "eager" in self.name else 1

    def read(self, main, ir):
        def typed(value):
            t = ir.RankedTensorType(value.type)
            return DTYPES[str(t.element_type)][0], tuple(t.shape)

        block = main.regions[0].blocks[0]
        numbers = {value: i for i, value in enumerate(block.arguments)}
        self.parameter_types = tuple(typed(x) for x in block.arguments)
        self.steps = []
        for op in block.operations:
            name = op.operation.name
            if name == "func.return":
                self.outputs = [numbers[x] for x in op.operation.operands]
                self.output_types = tuple(typed(x) for x in op.operation.operands)
                break
            result = op.operation.results[0]
            number, shape = typed(result)
            dtype = NUMPY[number]
            constant = None
            if name == "stablehlo.constant":
                dense = ir.DenseElementsAttr(op.operation.attributes["value"])
                constant = np.array(dense).astype(dtype).reshape(shape)
            self.steps.append((name, (dtype, shape), [numbers[x] for x in op.operation.operands], constant))
            numbers[result] = len(numbers)

    def __call__(self, *args):
        values = list(args)
        for name, shape, operands, constant in self.steps:
            if constant is not None:
                values.append(engine.constant(constant))
            else:
                values.append(engine.apply(name, shape, [values[i] for i in operands]))
        return [values[i] for i in self.outputs]


def locked(function, *args):
    lib.shim_lock()
    try:
        return function(*args)
    finally:
        lib.shim_unlock()


def execute(exe, args):
    log.append(("execute", exe.name))
    if "wait" in exe.name:
        gate.wait(20)
    if "sleep" in exe.name:
        time.sleep(0.3)
    return exe(*args)


def evaluate(values):
    log.append(("evaluate", len(values)))
    locked(engine.evaluate, values)


def schedule(values):
    log.append(("schedule", len(values)))
    engine.schedule(values)


def from_host(view, dtype, dims):
    array = np.frombuffer(view, NUMPY[dtype]).reshape(dims).copy()
    return engine.constant(array), False


adopted = {}


def host_view(value):
    return locked(engine.export, value)


HOOKS = {
    "plugin_attributes": lambda: attributes(),
    "client_create": lambda options: {
        "platform_name": "mps",
        "platform_version": "toy 1",
        "device_kind": "toy",
        "device_strings": tuple(f"ToyDevice(id={i})" for i in range(1)),
        "memory_kinds": ("device",),
        "is_on_cpu": True,
        "attributes": {"toy": True, "cores": 2, "dims": (1, 2)},
        "eager_cost": 10**6,
        "lazy_cost": 10**6,
        "short_cost": 8 * 10**6,
        "lazy_limit": 64,
        "lazy_bytes": 1 << 28,
    },
    "client_destroy": lambda: log.append(("client_destroy", 0)),
    "compile": lambda code, format, options: Executable(code),
    "load": lambda serialized, options: Executable(serialized),
    "serialize": lambda exe: exe.code,
    "optimized_program": lambda exe: None,
    "prepare": lambda exe, run: (exe, (), 0),
    "execute": execute,
    "evaluate": evaluate,
    "schedule": schedule,
    "from_host": from_host,
    "adopt": lambda address: adopted.get(address),
    "host_view": host_view,
    "memory_stats": lambda: {"bytes_in_use": 7, "bytes_limit": 9},
    "cost_analysis": lambda exe: {"flops": 3.0},
    "describe_error": lambda exc: (13, f"{type(exc).__name__}: {exc}"),
}


def attributes():
    from jaxlib.mlir.dialects import stablehlo

    def version(text):
        return tuple(int(x) for x in text.split("."))

    return {
        "xla_version": 2,
        "stablehlo_current_version": version(stablehlo.get_current_version()),
        "stablehlo_minimum_version": version(stablehlo.get_minimum_version()),
    }


def counts():
    out = ffi.new("int64_t[8]")
    lib.shim_counts(out)
    names = ("buffers", "executables", "lazy", "pending", "events", "bytes", "executes", "zero")
    return dict(zip(names, out, strict=True))


def install(**replaced):
    hooks = HOOKS | replaced
    assert lib.shim_install(int(ffi.cast("uintptr_t", id(hooks)))) == 0


def start(kind="thunk", **replaced):
    """Registers the toy with JAX and returns jax; call it before JAX looks for its backends."""
    global engine
    engine = MlxEngine() if kind == "mlx" else ThunkEngine()
    install(**replaced)
    import jax

    atexit.register(lib.shim_finalize)
    from jax._src import xla_bridge
    from jax._src.interpreters import mlir

    xla_bridge.discover_pjrt_plugins = lambda: None  # the real plugin, where it is installed, would take the name
    capsules = []
    assert lib.shim_append_capsule(id(capsules)) == 0
    xla_bridge.register_plugin("mps", priority=1000, c_api=capsules[0])
    xla_bridge._nonexperimental_plugins.add("mps")
    mlir._platforms_with_donation.append("mps")
    jax.config.update("jax_platforms", "mps,cpu")
    return jax
