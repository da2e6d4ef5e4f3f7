"""StableHLO bytes to a `Plan`: read, normalise with MLIR's passes, walk the blocks, inline calls.

What a composite or a custom call means is not decided here; a composite that no lowering claims is replaced by its decomposition.
"""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import chlo, mhlo, mpmd, sdy, stablehlo

from jax_mps.errors import InvalidProgram
from jax_mps.plan import attributes
from jax_mps.plan import layouts as orders
from jax_mps.plan.defaults import complete
from jax_mps.plan.types import MEMORY_KINDS, Layouts, Memories, Plan, Region, Step, TensorType, Value

log = logging.getLogger(__name__)

Scope = dict[ir.Value, Any]  # an MLIR value: ours, or a tuple of ours, nested as the tuple is
Claims = Callable[[Step], bool]  # whether some lowering takes a composite whole
Whole = Callable[[Sequence[Value], Sequence[Step], Sequence[Value]], Step | None]  # one step for the body of a called function, where there is one

_IDENTITIES = frozenset(["sdy.sharding_constraint", "sdy.reshard", "sdy.propagation_barrier"])
_IGNORED = frozenset(["sdy.mesh"])
_RETURNS = frozenset(["func.return", "stablehlo.return", "sdy.return"])


@functools.cache
def _registry() -> ir.DialectRegistry:
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext

    registry = ir.DialectRegistry()
    _jax_mlir_ext.register_dialects(registry)
    return registry


def make_context() -> ir.Context:
    """A context that knows every dialect a JAX program may hold."""
    context = ir.Context()
    context.append_dialect_registry(_registry())
    context.load_all_available_dialects()
    stablehlo.register_dialect(context)
    chlo.register_dialect(context)
    sdy.register_dialect(context)
    mpmd.register_dialect(context)
    mhlo.register_mhlo_dialect(context)
    context.enable_multithreading(False)  # a thread pool for each context would be leaked
    return context


def parse(code: bytes) -> ir.Module:
    """Read a StableHLO portable artifact, MLIR bytecode or text.

    Raises:
        InvalidProgram: the bytes are none of these, or do not verify.
    """
    context = make_context()
    said: list[str] = []
    # the bindings' own way of collecting messages ends the process when one is no UTF-8 (jaxlib 0.10 to 0.12)
    context.emit_error_diagnostics = True

    def keep(diagnostic: ir.Diagnostic) -> bool:
        said.append(_message(diagnostic))
        return True

    with context.attach_diagnostic_handler(keep):
        try:
            if code[:4] == b"ML\xefR":
                return stablehlo.deserialize_portable_artifact(context, code)
        except Exception as error:  # the bindings raise bare RuntimeError, ValueError and MLIRError for the same thing
            log.debug("no portable artifact: %s", error)
        try:
            with context:
                return ir.Module.parse(code)
        except Exception as error:
            reason = "; ".join(dict.fromkeys(said)) or str(error)
            raise InvalidProgram(f"the program ({len(code)} bytes) is no StableHLO module that this jaxlib can read: {reason}") from error


def _message(diagnostic: ir.Diagnostic) -> str:
    try:
        return f"{diagnostic.message} ({location})" if (location := _location(diagnostic.location)) else str(diagnostic.message)
    except (RuntimeError, UnicodeDecodeError):  # it quotes bytes that are no text
        return "a name that is not UTF-8"


def canonical(module: ir.Module) -> bytes:
    """The module as text without what has no meaning: locations, the names of the module and its functions, the names of results.

    Text, not bytecode: the bytecode's header names MLIR's version, and JAX's minor versions would share nothing.
    """
    text = module.operation.get_asm(enable_debug_info=False, print_generic_op_form=True, large_elements_limit=None)
    names: dict[str, str] = {}

    def plain(match: re.Match[str]) -> str:
        if match["info"]:
            return "jax.info"
        name = match["defined"] or match["used"]
        if not name or name == '"main"' or name == "main":
            return match[0]
        number = names.setdefault(name.strip('"'), f"f{len(names)}")
        return f'sym_name = "{number}"' if match["defined"] else f"@{number}"

    return _NAMED.sub(plain, text).encode()


# Strings are matched first, so that what looks like a name inside one is left alone.
_STRING = r'"(?:[^"\\]|\\.)*"'
_NAMED = re.compile(rf"(?P<info>jax\.(?:result_info|arg_info) = {_STRING})|sym_name = (?P<defined>{_STRING})|@(?P<used>{_STRING}|[\w.$-]+)|{_STRING}")


def bytecode(module: ir.Module) -> bytes:
    """The module in MLIR's bytecode; what says where values lie is left out, since XLA's converter to HLO refuses it."""
    for op in list(_operations(module.operation)):
        if op.name in _IDENTITIES:
            op.results[0].replace_all_uses_with(op.operands[0])
            op.erase()
    written = io.BytesIO()
    module.operation.write_bytecode(written)
    return written.getvalue()


def _operations(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.regions:
        for block in region.blocks:
            for view in block.operations:
                yield view.operation
                yield from _operations(view.operation)


def module_name(module: ir.Module) -> str:
    """The program's own name ("jit_f")."""
    attrs = module.operation.attributes
    return ir.StringAttr(attrs["sym_name"]).value if "sym_name" in attrs else "main"


def build(module: ir.Module, claims: Claims = lambda step: False, whole: Whole = lambda operands, steps, results: None) -> Plan:
    """Translate a module whose entry is `@main` (or its only public function) into a plan. Called functions are inlined.

    Raises:
        InvalidProgram: no entry function, a dynamic shape that nothing refines, or a call of an unknown function.
    """
    try:
        return _Builder(module, claims, whole).plan()
    except RuntimeError as error:
        if "conversion error" not in str(error):  # nanobind's words
            raise
        raise InvalidProgram("the program holds a name that is not UTF-8") from error


def donated(module: ir.Module) -> tuple[int, ...]:
    """The positions of the arguments that a module may consume."""
    return tuple(_donated(_main(module)))


def memories(module: ir.Module) -> Memories:
    """The kinds of memory of a module's arguments and results.

    Raises:
        InvalidProgram: a kind that no device here has.
    """
    main = _main(module)
    return _memories(main, "arg_attrs"), _memories(main, "res_attrs")


def _memories(main: ir.OpView, which: str) -> tuple[int, ...]:
    kinds = [kind or MEMORY_KINDS[0] for kind in _texts(main, which, "mhlo.memory_kind")]
    for kind in kinds:
        if kind not in MEMORY_KINDS:
            raise InvalidProgram(f"no device here has a memory of kind {kind!r}; there are {', '.join(MEMORY_KINDS)}")
    return tuple(map(MEMORY_KINDS.index, kinds)) if any(kind != MEMORY_KINDS[0] for kind in kinds) else ()


def take_layouts(module: ir.Module) -> Layouts | None:
    """What a module says of the layouts of its arguments and results, taken out of it: without, XLA makes all of them row-major. None where it
    says nothing.

    Raises:
        InvalidProgram: a layout with tiles.
    """
    main = _main(module)
    wanted = _wanted_layouts(main)
    if not any(map(any, wanted)):
        return None
    chosen = orders.choose(build(module).body, wanted)
    with module.context:
        for which in ("arg_attrs", "res_attrs"):
            rows = [{a.name: a.attr for a in row if a.name != _LAYOUT} for row in map(ir.DictAttr, ir.ArrayAttr(main.attributes[which]))]
            main.attributes[which] = ir.ArrayAttr.get([ir.DictAttr.get(row) for row in rows])
    return chosen


_LAYOUT = "mhlo.layout_mode"


def _wanted_layouts(main: ir.OpView) -> tuple[list[str], list[str]]:
    return _texts(main, "arg_attrs", _LAYOUT), _texts(main, "res_attrs", _LAYOUT)


def _texts(main: ir.OpView, which: str, name: str) -> list[str]:
    """What the attribute of that name says of each argument or result; "" for nothing."""
    if which not in main.attributes:
        kind = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        return [""] * len(kind.inputs if which == "arg_attrs" else kind.results)
    rows = map(ir.DictAttr, ir.ArrayAttr(main.attributes[which]))
    return [ir.StringAttr(row[name]).value if name in row else "" for row in rows]


def _main(module: ir.Module) -> ir.OpView:
    functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body.operations if op.operation.name == "func.func"}
    main = functions.get("main") or next(iter(functions.values()), None)
    if main is None:
        raise InvalidProgram("the module has no function")
    return main


def _donated(main: ir.OpView) -> Iterator[int]:
    if "arg_attrs" not in main.attributes:
        return
    for position, attrs in enumerate(ir.ArrayAttr(main.attributes["arg_attrs"])):
        named = ir.DictAttr(attrs)
        if "tf.aliasing_output" in named or "jax.buffer_donor" in named:
            yield position


class _Builder:
    """One walk over a module. `scope` maps MLIR values to ours; it is copied on the way into a function or region."""

    def __init__(self, module: ir.Module, claims: Claims, whole: Whole) -> None:
        self.module = module
        self.claims = claims
        self.whole = whole
        self.functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body.operations if op.operation.name == "func.func"}
        self.types: dict[ir.Type, TensorType] = {}

    def plan(self) -> Plan:
        main = _main(self.module)
        block = main.regions[0].blocks[0]
        attrs = self.module.operation.attributes
        body = self.region(block, {})
        return Plan(
            name=module_name(self.module),
            body=body,
            donated=tuple(_donated(main)),
            memories=(_memories(main, "arg_attrs"), _memories(main, "res_attrs")),
            layouts=orders.choose(body, _wanted_layouts(main)),
            num_replicas=ir.IntegerAttr(attrs["mhlo.num_replicas"]).value if "mhlo.num_replicas" in attrs else 1,
            num_partitions=ir.IntegerAttr(attrs["mhlo.num_partitions"]).value if "mhlo.num_partitions" in attrs else 1,
        )

    def type(self, kind: ir.Type) -> TensorType:
        known = self.types.get(kind)
        if known is None:
            try:
                known = self.types[kind] = attributes.tensor_type(str(kind))
            except ValueError as error:
                raise InvalidProgram(str(error)) from None
        return known

    def region(self, block: ir.Block, scope: Scope) -> Region:
        """A block as a region; values of `scope` that it reads are captures."""
        inner = dict(scope)
        arguments = tuple(Value(self.type(a.type)) for a in block.arguments)
        inner.update(zip(block.arguments, arguments, strict=True))
        steps: list[Step] = []
        results = self.walk(block, inner, steps)
        return Region(arguments, tuple(steps), results)

    def walk(self, block: ir.Block, scope: Scope, steps: list[Step]) -> tuple[Value, ...]:
        for view in block.operations:
            op = view.operation
            if op.name in _RETURNS:
                return self.flatten(op.operands, scope)
            self.visit(op, scope, steps)
        return ()

    def flatten(self, operands: Any, scope: Scope) -> tuple[Value, ...]:
        """Operands as our values, tuples spread into their elements."""
        return tuple(leaf for v in operands for leaf in _leaves(scope[v]))

    def visit(self, op: ir.Operation, scope: Scope, steps: list[Step]) -> None:
        name = op.name
        if name in _IGNORED:
            return
        if name in _IDENTITIES:
            scope[op.results[0]] = scope[op.operands[0]]
        elif name in ("func.call", "sdy.manual_computation", "sdy.named_computation"):
            self.inline(op, scope, steps)
        elif name == "stablehlo.composite":
            self.composite(op, scope, steps)
        elif name == "stablehlo.tuple":
            scope[op.results[0]] = tuple(scope[v] for v in op.operands)
        elif name == "stablehlo.get_tuple_element":
            scope[op.results[0]] = scope[op.operands[0]][ir.IntegerAttr(op.attributes["index"]).value]
        elif name == "stablehlo.constant" or name == "arith.constant":
            self.emit(Step("stablehlo.constant", (), (Value(self.type(op.results[0].type)),), {"value": attributes.constant(op)}, text=()), op, scope, steps)
        else:
            self.emit(self.step(op, scope), op, scope, steps)

    def emit(self, step: Step, op: ir.Operation, scope: Scope, steps: list[Step]) -> None:
        steps.append(step)
        if len(op.results) == len(step.results):
            scope.update(zip(op.results, step.results, strict=True))
        else:  # one result of tuple type
            scope[op.results[0]] = step.results

    def step(self, op: ir.Operation, scope: Scope) -> Step:
        decoded: dict[str, Any] = {}
        text: list[tuple[str, str]] = []
        for name, attribute in _attributes(op):
            written = str(attribute)
            text.append((name, written))
            decoded.update(attributes.decode(name, attribute, written))
        bare = Step(
            name=op.name,
            operands=self.flatten(op.operands, scope),
            results=tuple(Value(t) for t in self.result_types(op)),
            attributes=decoded,
            regions=tuple(self.region(r.blocks[0], scope) if len(r.blocks) else Region((), (), ()) for r in op.regions),
            location=_location(op.location),
            text=tuple(text),
        )
        object.__setattr__(bare, "attributes", complete(bare))
        return bare

    def result_types(self, op: ir.Operation) -> list[TensorType]:
        if len(op.results) == 1 and str(op.results[0].type).startswith("tuple<"):
            kind = ir.TupleType(op.results[0].type)
            return [self.type(kind.get_type(i)) for i in range(kind.num_types)]
        return [self.type(r.type) for r in op.results]

    def inline(self, op: ir.Operation, scope: Scope, steps: list[Step]) -> None:
        """Replace a call (or a manual computation on one device) by the steps of its body."""
        body = op.regions[0].blocks[0] if op.name.startswith("sdy.") else self.function(ir.FlatSymbolRefAttr(op.attributes["callee"]).value)
        operands, start = self.flatten(op.operands, scope), len(steps)
        inner = dict(zip(body.arguments, operands, strict=True))
        results = self.walk(body, inner if op.name == "func.call" else {**scope, **inner}, steps)
        scope.update(zip(op.results, results, strict=True))
        one = self.whole(operands, steps[start:], results) if op.name == "func.call" else None
        if one is not None:
            steps[start:] = [one]

    def function(self, name: str) -> ir.Block:
        if name not in self.functions:
            raise InvalidProgram(f"a call of @{name}, which the module does not define")
        return self.functions[name].regions[0].blocks[0]

    def composite(self, op: ir.Operation, scope: Scope, steps: list[Step]) -> None:
        body = self.function(ir.FlatSymbolRefAttr(op.attributes["decomposition"]).value)
        operands = self.flatten(op.operands, scope)
        inner: dict[str, Any] = {}
        if "composite_attributes" in op.attributes:
            for named in ir.DictAttr(op.attributes["composite_attributes"]):
                inner.update(attributes.decode(named.name, named.attr, str(named.attr)))
        step = Step(
            name=ir.StringAttr(op.attributes["name"]).value,
            operands=operands,
            results=tuple(Value(t) for t in self.result_types(op)),
            attributes={**inner, "version": ir.IntegerAttr(op.attributes["version"]).value if "version" in op.attributes else 0},
            location=_location(op.location),
        )
        if self.claims(step):
            self.emit(step, op, scope, steps)
            return
        if step.name == "chlo.scan" and inner.get("is_reverse") and _counts_up(body, step.dimension):
            self.reversed_scan(step, body, steps)
            scope.update(zip(op.results, step.results, strict=True))
            return
        results = self.walk(body, dict(zip(body.arguments, operands, strict=True)), steps)
        scope.update(zip(op.results, results, strict=True))

    def reversed_scan(self, step: Step, body: ir.Block, steps: list[Step]) -> None:
        """jaxlib 0.10's decomposition of chlo.scan forgets `is_reverse`: turn the scanned arrays around before and after."""
        inputs, outputs = step.operandSegmentSizes[0], step.resultSegmentSizes[0]
        dimension = (step.dimension,)
        operands = [_reverse(v, dimension, steps) if i < inputs else v for i, v in enumerate(step.operands)]
        results = self.walk(body, dict(zip(body.arguments, operands, strict=True)), steps)
        object.__setattr__(step, "results", tuple(_reverse(v, dimension, steps) if i < outputs else v for i, v in enumerate(results)))


def _counts_up(body: ir.Block, dimension: int) -> bool:
    """Whether a decomposed scan writes its rows where its loop's counter says, the first one first."""
    loops = [op for op in body.operations if op.operation.name == "stablehlo.while"]
    steps = [op for loop in loops for op in loop.regions[1].blocks[0].operations]
    writes = [op for op in steps if op.operation.name == "stablehlo.dynamic_update_slice"]
    return any(isinstance(op.operands[2 + dimension].owner, ir.Block) for op in writes)


def _reverse(value: Value, dimensions: tuple[int, ...], steps: list[Step]) -> Value:
    """Append a `stablehlo.reverse` of a value."""
    result = Value(value.type)
    text = (("dimensions", f"array<i64: {', '.join(map(str, dimensions))}>"),)
    steps.append(Step("stablehlo.reverse", (value,), (result,), {"dimensions": dimensions}, text=text))
    return result


def _leaves(value: Any) -> Iterator[Value]:
    if isinstance(value, tuple):
        for element in value:
            yield from _leaves(element)
    else:
        yield value


def _attributes(op: ir.Operation) -> Iterator[tuple[str, ir.Attribute]]:
    for item in op.attributes:
        if isinstance(item, str):  # jaxlib 0.10 iterates names, later ones named attributes
            yield item, op.attributes[item]
        else:
            yield item.name, item.attr


def _location(location: ir.Location) -> str:
    """`file:line` of the user's code, innermost first, from MLIR's nested location."""
    text = str(location)
    found = _FILE.findall(text)
    return f"{found[0][0]}:{found[0][1]}" if found else ""


_FILE = re.compile(r'"([^"]+)":(\d+):\d+')
