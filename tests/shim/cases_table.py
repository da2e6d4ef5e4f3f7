"""The table, driven as the framework drives it; programs are Python functions of thunks."""

import sys
import threading
import time

import numpy as np
from shim import toy
from shim.table import PjrtError, Table, ffi
from shim.toy import Thunk, counts, log

table = Table(toy.lib.shim_api())
F32 = 11


class Program:
    """An executable of a Python function, which is called with the arguments' thunks."""

    def __init__(self, run, inputs=1, outputs=1, shape=(4,), dtype=F32, **replaced):
        self.run = run
        self.name = getattr(run, "__name__", "program")
        self.fingerprint = b"\0\1finger"
        self.code_size = 12
        self.devices = ((0,),)
        self.parameter_memories = self.output_memories = self.parameter_layouts = self.output_layouts = ()
        self.parameter_types = ((dtype, shape),) * inputs
        self.output_types = ((dtype, shape),) * outputs
        self.output_states = (0,) * outputs
        self.donated = ()
        self.effects = self.waits = self.prompt = False
        self.direct = True
        self.cost = 1
        vars(self).update(replaced)

    def __call__(self, *args):
        return self.run(*args)


programs = {}


def install(**replaced):
    toy.install(**{"compile": lambda code, format, options: programs.pop(bytes(code))} | replaced)


install()
client = table.client()


def load(run, *args, **options):
    programs[b"next"] = run if isinstance(run, Program) else Program(run, *args, **options)
    return table.compile(client, b"next")


def put(*values):
    return table.put(client, np.array(values, np.float32))


def fails(call, *words, code=None):
    """The call raises a PjrtError that holds the words; returns it."""
    try:
        call()
    except PjrtError as error:
        assert all(word in str(error) for word in words), str(error)
        assert code is None or error.code == code, error.code
        return error
    raise AssertionError("no error")


def thunk(function):
    return lambda *args: [Thunk(function, args)]


def broken(x):
    raise ArithmeticError("the toy is broken")


double = load(thunk(lambda x: x * 2))
add = load(thunk(np.add), 2)
fail = load(thunk(broken))


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


# ---- laziness ----
def case_direct_is_lazy():
    """A direct program is not evaluated until somebody reads, and its completion event is born ready."""
    x = put(1, 2, 3, 4)
    log.clear()
    (y,), done = table.execute(double, [x])
    (z,), _ = table.execute(double, [y])
    assert table.is_ready(done)
    assert log == []
    np.testing.assert_array_equal(table.read(z), [4, 8, 12, 16])
    assert log == [("evaluate", 1)]
    table.destroy(x, y, z)


def case_ready_event_evaluates():
    """Asking for a ready event starts the evaluation, and asking it does not block."""
    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(double, [x])
    event = table.Buffer_ReadyEvent(buffer=y).event
    until(lambda: table.is_ready(event))
    again = table.Buffer_ReadyEvent(buffer=y).event
    assert table.is_ready(again)
    table.Event_Destroy(event=event)
    table.Event_Destroy(event=again)
    table.destroy(x, y)


def case_is_ready_never_blocks():
    """While another thread holds the lock, a ready event is made and asked at once."""
    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(double, [x])
    toy.lib.shim_lock()
    event = table.Buffer_ReadyEvent(buffer=y).event
    time.sleep(0.05)
    assert not table.is_ready(event)
    toy.lib.shim_unlock()
    table.Event_Await(event=event)
    assert table.is_ready(event)
    table.Event_Destroy(event=event)
    table.destroy(x, y)


def case_long_copies():
    """A copy of 20 MiB goes to the host in pieces."""
    want = np.arange(5 * 2**20 + 3, dtype=np.float32)
    x = table.put(client, want)
    assert np.array_equal(table.read(x).view(np.float32).ravel(), want)
    table.destroy(x)


def case_waiting_beside_a_gpu():
    """Where evaluation is long, it is started in the client's scope, and what is waited for is an array that depends on the values."""
    seen = []

    class Scope:
        def __enter__(self):
            seen.append("enter")

        def __exit__(self, *failure):
            seen.append("exit")

    def sentinel(values):
        seen.append(f"sentinel of {len(values)}")
        return Thunk(np.zeros, (1,))

    def start(values):
        seen.append(f"start {len(values)}")
        toy.engine.evaluate(values[:-1])

    def synchronize(value):
        seen.append(type(value).__name__)

    means = {"evaluate_now": None, "start": start, "synchronize": synchronize, "scope": Scope, "sentinel": sentinel, "eager_cost": 0, "short_cost": 0}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means)
    other = table.client()
    x = table.put(other, np.float32([1, -2, 3, -4]))
    try:
        (y,), _ = table.execute(double, [x])
        event = table.Buffer_ReadyEvent(buffer=y).event
        assert table.is_ready(event)
        assert seen == ["enter", "sentinel of 0", "exit", "enter", "start 2", "exit", "Thunk"], seen
        table.Event_Destroy(event=event)
        table.destroy(x, y)
    finally:
        install()


def case_first_results_are_evaluated_to_the_end():
    """Where the client says so, what a function returned first is never just started, though nobody wants it any more; what it returns later is."""
    seen = []

    def now(values):
        seen.append(("now", len(values)))
        toy.engine.evaluate(values)

    def start(values):
        seen.append(("start", len(values)))
        toy.engine.evaluate(values[:-1])

    class Scope:
        def __enter__(self):
            pass

        def __exit__(self, *failure):
            pass

    def sentinel(values):
        return Thunk(np.zeros, (1,))

    means = {"evaluate_now": now, "start": start, "synchronize": lambda value: None, "scope": Scope, "sentinel": sentinel, "first_to_the_end": True}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means | {"eager_cost": 0, "short_cost": 0, "lazy_cost": 1 << 62})
    other = table.client()
    turned = load(lambda x: [Thunk(np.negative, (x,)), Thunk(np.abs, (x,))], 1, 2)
    x = table.put(other, np.float32([1, -2, 3, -4]))
    try:
        for _ in range(2):
            results, _ = table.execute(turned, [x])
            event = table.Buffer_ReadyEvent(buffer=results[0]).event
            assert table.is_ready(event)
            table.Event_Destroy(event=event)
            table.destroy(*results)
        assert seen == [("now", 4), ("start", 3)], seen
        table.destroy(x)
    finally:
        install()
        table.client()


def case_who_waits_evaluates():
    """Where the client gives the means, who asks for a ready event without the GIL evaluates the execution's values; with it, nothing blocks."""
    seen = []

    def now(values):
        seen.append(len(values))
        toy.engine.evaluate(values)

    means = {"evaluate_now": now, "start": toy.engine.evaluate, "synchronize": lambda: None}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means)
    other = table.client()
    both = load(lambda x: [Thunk(np.negative, (x,)), Thunk(np.abs, (x,))], 1, 2)
    x = table.put(other, np.float32([1, -2, 3, -4]))
    try:
        (y, z), _ = table.execute(both, [x])
        for buffer in (y, z):
            event = table.Buffer_ReadyEvent(buffer=buffer).event
            assert table.is_ready(event)
            table.Event_Destroy(event=event)
        assert seen == [2]
        (late,), _ = table.execute(double, [y])
        toy.lib.shim_lock()
        event = table.with_gil("Buffer_ReadyEvent", buffer=late).event
        assert not table.is_ready(event)
        toy.lib.shim_unlock()
        table.Event_Await(event=event)
        assert seen == [2, 1]
        table.Event_Destroy(event=event)
        table.destroy(x, y, z, late)
    finally:
        install()
        table.client()


def case_on_ready():
    """Callbacks run once, early or late, with the event's error."""
    seen = []

    @ffi.callback("void(PJRT_Error*, void*)")
    def callback(error, argument):
        seen.append((int(ffi.cast("intptr_t", argument)), None if error == ffi.NULL else str(table.taken(error))))

    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(fail, [x])
    toy.lib.shim_lock()
    event = table.Buffer_ReadyEvent(buffer=y).event
    for i in (1, 2):
        table.Event_OnReady(event=event, callback=callback, user_arg=ffi.cast("void*", i))
    assert seen == []
    toy.lib.shim_unlock()
    until(lambda: len(seen) == 2)
    table.Event_OnReady(event=event, callback=callback, user_arg=ffi.cast("void*", 3))
    assert sorted(i for i, _ in seen) == [1, 2, 3]
    assert all("the toy is broken" in text for _, text in seen)
    table.Event_Destroy(event=event)
    table.destroy(x, y)


def case_set_events():
    """The framework's own events complete when it sets them, once."""
    event = table.Event_Create().event
    assert not table.is_ready(event)
    message = ffi.new("char[]", b"so be it")
    table.Event_Set(event=event, error_code=3, error_message=message, error_message_size=8)
    assert table.is_ready(event)
    fails(lambda: table.Event_Await(event=event), "so be it", code=3)
    fails(lambda: table.Event_Error(event=event), "so be it", code=3)
    fails(lambda: table.Event_Set(event=event, error_code=0), "set before")
    table.Event_Destroy(event=event)


def case_schedule():
    """A costly program is scheduled at once, cheap ones every lazy_limit executions."""
    x = put(1, 2, 3, 4)
    costly = load(Program(thunk(np.negative), cost=10**7))
    log.clear()
    table.destroy(*table.execute(costly, [x])[0])
    assert log == [("schedule", 1)]
    for _ in range(64):
        table.destroy(*table.execute(double, [x])[0])
    assert log == [("schedule", 1)] * 2
    big = load(thunk(np.negative), 1, shape=(1 << 24,))
    many = table.put(client, np.zeros(1 << 24, np.float32))
    for _ in range(5):
        table.destroy(*table.execute(big, [many])[0])
    assert log == [("schedule", 1)] * 3
    table.destroy(x, many)


def case_schedule_may_fail():
    """A failure while scheduling is the outputs', not the call's."""

    def schedule(values):
        raise MemoryError("too large")

    x = put(1, 2, 3, 4)
    install(schedule=schedule)
    (y,), _ = table.execute(load(Program(thunk(np.negative), cost=10**7)), [x])
    install()
    fails(lambda: table.block(y), "too large")
    fails(lambda: table.read(y), "too large")
    table.destroy(x, y)


# ---- errors ----
def case_call_fails():
    """What the program's own call raises is raised by Execute, and nothing is left behind."""
    before = counts()
    x = put(1, 2, 3, 4)
    fails(lambda: table.execute(load(lambda x: 1 / 0), [x]), "ZeroDivisionError", code=13)
    table.destroy(x)
    after = counts()
    assert (after["buffers"], after["lazy"], after["events"]) == (before["buffers"], before["lazy"], before["events"])


def case_ancestors_fail():
    """A failed evaluation takes the ancestors that were not ready with it, and the descendants, but nobody else."""
    x = put(1, 2, 3, 4)
    (early,), _ = table.execute(double, [x])
    table.block(early)
    (parent,), _ = table.execute(double, [early])
    (bad,), _ = table.execute(fail, [parent])
    (child,), _ = table.execute(double, [bad])
    (grandchild,), _ = table.execute(add, [child, early])
    (other,), _ = table.execute(double, [early])
    fails(lambda: table.block(bad), "the toy is broken")
    for buffer in (bad, parent, grandchild, child):
        fails(lambda buffer=buffer: table.read(buffer), "the toy is broken")
        fails(lambda buffer=buffer: table.block(buffer), "the toy is broken")
    np.testing.assert_array_equal(table.read(other), [4, 8, 12, 16])
    np.testing.assert_array_equal(table.read(early), [2, 4, 6, 8])
    (late,), _ = table.execute(double, [bad])
    fails(lambda: table.read(late), "the toy is broken")
    fails(lambda: table.Buffer_UnsafePointer(buffer=late), "the toy is broken")
    table.destroy(x, early, parent, bad, child, grandchild, other, late)


def case_siblings():
    """An output that was evaluated is ready, whatever becomes of its siblings."""
    x = put(1, 2, 3, 4)
    both = load(lambda x: [Thunk(np.negative, (x,)), Thunk(broken, (x,))], 1, 2)
    (good, bad), _ = table.execute(both, [x])
    np.testing.assert_array_equal(table.read(good), [-1, -2, -3, -4])
    fails(lambda: table.read(bad), "the toy is broken")
    np.testing.assert_array_equal(table.read(good), [-1, -2, -3, -4])
    table.destroy(x, good, bad)


def case_waiting_ancestors_hear():
    """An ancestor whose event is waited for hears of the failure too."""
    x = put(1, 2, 3, 4)
    (parent,), _ = table.execute(double, [x])
    (bad,), _ = table.execute(fail, [parent])
    fails(lambda: table.read(bad), "broken")
    fails(lambda: table.block(parent), "broken")
    table.destroy(x, parent, bad)


def case_error_buffers():
    """CreateErrorBuffer makes a buffer that fails as told."""
    message = table.new("char[]", b"born broken")
    buffer = table.Client_CreateErrorBuffer(
        client=client, error_code=8, error_message=message, error_message_size=11, shape_element_type=F32,
        shape_dims=table.new("int64_t[]", [4]), shape_num_dims=1, memory=ffi.NULL,
    ).buffer  # fmt: skip
    fails(lambda: table.block(buffer), "born broken", code=8)
    (y,), _ = table.execute(double, [buffer])
    fails(lambda: table.read(y), "born broken", code=8)
    table.destroy(buffer, y)


# ---- the executor ----
def case_jobs_are_pending():
    """A program that is not direct is dispatched without waiting, and direct programs on its result queue behind it."""
    x = put(1, 2, 3, 4)
    job = load(Program(thunk(np.negative), direct=False, name="wait"))
    toy.gate.clear()
    (y,), done = table.execute(job, [x])
    (z,), _ = table.execute(double, [y])
    assert table.is_ready(done)
    event = table.Buffer_ReadyEvent(buffer=z).event
    time.sleep(0.05)
    assert not table.is_ready(event)
    assert counts()["pending"] == 2
    toy.gate.set()
    table.Event_Await(event=event)
    np.testing.assert_array_equal(table.read(z), [-2, -4, -6, -8])
    np.testing.assert_array_equal(table.read(y), [-1, -2, -3, -4])
    assert toy.lib.shim_drain(1000) == 1
    assert counts()["pending"] == 0
    table.Event_Destroy(event=event)
    table.destroy(x, y, z)


def case_jobs_keep_their_order():
    """Jobs run in program order, on one thread, which is not the caller's."""
    order = []

    def job(number):
        def run(x):
            order.append((number, threading.get_ident()))
            return [x]

        return load(Program(run, direct=False, name=f"job{number}"))

    x = put(1, 2, 3, 4)
    buffers = [table.execute(job(i), [x])[0][0] for i in range(20)]
    table.block(buffers[-1])
    assert [number for number, _ in order] == list(range(20))
    assert len({thread for _, thread in order} | {threading.get_ident()}) == 2
    table.destroy(x, *buffers)


def case_jobs_fail():
    """What a job raises is its outputs', and of what depends on them."""
    x = put(1, 2, 3, 4)
    job = load(Program(lambda x: 1 / 0, direct=False))
    (y,), done = table.execute(job, [x])
    (z,), _ = table.execute(double, [y])
    fails(lambda: table.block(z), "ZeroDivisionError")
    fails(lambda: table.read(y), "ZeroDivisionError")
    table.Event_Await(event=done)
    table.destroy(x, y, z)


def case_effects():
    """The completion event of a program with effects is not ready before it ran, and has its error."""
    x = put(1, 2, 3, 4)
    job = load(Program(thunk(np.negative), direct=False, effects=True, name="wait"))
    toy.gate.clear()
    (y,), done = table.execute(job, [x])
    assert not table.is_ready(done)
    toy.gate.set()
    table.Event_Await(event=done)
    table.Event_Destroy(event=done)
    (z,), done = table.execute(load(Program(lambda x: 1 / 0, direct=False, effects=True)), [x])
    fails(lambda: table.Event_Await(event=done), "ZeroDivisionError")
    table.Event_Destroy(event=done)
    table.destroy(x, y, z)


def case_deleted_while_pending():
    """A job keeps what it needs, though its arguments and results be deleted meanwhile."""
    job = load(Program(thunk(np.negative), direct=False, name="wait"))
    x = put(1, 2, 3, 4)
    toy.gate.clear()
    (y,), _ = table.execute(job, [x])
    (z,), _ = table.execute(double, [y])
    (unused,), _ = table.execute(double, [y])
    table.destroy(x, y, unused)
    toy.gate.set()
    np.testing.assert_array_equal(table.read(z), [-2, -4, -6, -8])
    table.destroy(z)


def case_callbacks_run_programs():
    """A job may run programs: direct ones, jobs, and on the result of a job queued behind its own."""
    x = put(1, 2, 3, 4)
    inner = load(Program(thunk(np.negative), direct=False, name="inner"))
    later = []
    seen = {}
    go = threading.Event()

    def run(value):
        go.wait(10)
        (a,), _ = table.execute(double, [x])
        (b,), _ = table.execute(inner, [a])
        seen["own"] = table.read(b)
        (c,), _ = table.execute(double, [later[0]])
        table.block(later[0])
        seen["later"] = table.read(c)
        table.destroy(a, b, c)
        return [value]

    (y,), _ = table.execute(load(Program(run, direct=False, name="outer")), [x])
    later += table.execute(inner, [x])[0]
    go.set()
    table.block(y)
    np.testing.assert_array_equal(seen["own"], [-2, -4, -6, -8])
    np.testing.assert_array_equal(seen["later"], [-2, -4, -6, -8])
    table.destroy(x, y, *later)


def case_callbacks_cannot_wait_for_themselves():
    """A job that waits for its own result is refused, and does not hang."""
    x = put(1, 2, 3, 4)
    mine = []
    seen = []
    go = threading.Event()

    def run(value):
        go.wait(10)
        seen.append(fails(lambda: table.read(mine[0]), "computation that called it", code=9))
        (y,), _ = table.execute(double, [mine[0]])
        seen.append(fails(lambda: table.read(y), "computation that called it", code=9))
        table.destroy(y)
        return [value]

    mine += table.execute(load(Program(run, direct=False, name="selfish")), [x])[0]
    go.set()
    table.block(mine[0])
    assert len(seen) == 2
    table.destroy(x, *mine)


# ---- donation and deletion ----
def is_deleted(buffer):
    return table.Buffer_IsDeleted(buffer=buffer).is_deleted


def case_donation():
    """A donated argument is deleted by a dispatch that succeeds, unless the caller keeps it."""
    donating = load(Program(thunk(np.add), 2, donated=(0,)))
    x, y = put(1, 2, 3, 4), put(1, 1, 1, 1)
    (z,), _ = table.execute(donating, [x, y], keep=[0])
    assert not is_deleted(x)
    (w,), _ = table.execute(donating, [x, y])
    assert is_deleted(x)
    assert not is_deleted(y)
    fails(lambda: table.execute(donating, [x, y]), "argument 0", "deleted or donated", code=3)
    fails(lambda: table.read(x), "float32[4]", "deleted or donated", code=3)
    fails(lambda: table.execute(donating, [y, y]), "arguments 0 and 1", "donated", code=3)
    assert not is_deleted(y)
    (v,), _ = table.execute(donating, [y, y], keep=[0])
    for result in (z, w):
        np.testing.assert_array_equal(table.read(result), [2, 3, 4, 5])
    broken_call = load(Program(lambda x: 1 / 0, donated=(0,)))
    fails(lambda: table.execute(broken_call, [y]), "ZeroDivisionError")
    assert not is_deleted(y)
    table.destroy(x, y, z, w, v)


def case_jobs_own_what_was_donated():
    """A job has the only reference to a donated argument."""
    references = []

    def execute(exe, args):
        references.append(sys.getrefcount(args[0]))
        return toy.execute(exe, args)

    install(execute=execute)
    for donated in ((), (0,)):
        x = put(1, 2, 3, 4)
        (y,), _ = table.execute(load(Program(thunk(np.negative), direct=False, donated=donated)), [x])
        table.block(y)
        assert is_deleted(x) == bool(donated)
        table.destroy(x, y)
    install()
    assert references[0] == references[1] + 1


def case_deleted():
    """A deleted buffer still knows its shape, and refuses everything else."""
    x = put(1, 2, 3, 4)
    table.Buffer_Delete(buffer=x)
    table.Buffer_Delete(buffer=x)
    assert is_deleted(x)
    assert table.Buffer_Dimensions(buffer=x).dims[0] == 4
    fails(lambda: table.block(x), "deleted", code=3)
    fails(lambda: table.Buffer_UnsafePointer(buffer=x), "deleted", code=3)
    fails(lambda: table.Buffer_IncreaseExternalReferenceCount(buffer=x), "deleted", code=3)
    fails(lambda: table.Buffer_CopyToDevice(buffer=x, dst_device=table.Client_Devices(client=client).devices[0]), "deleted")
    table.destroy(x)


def case_external_references():
    """A pointer stays right after deletion until the last external reference is gone."""
    for destroy_first in (False, True):
        x = put(1, 2, 3, 4)
        for _ in range(2):
            table.Buffer_IncreaseExternalReferenceCount(buffer=x)
        pointer = table.Buffer_OpaqueDeviceMemoryDataPointer(buffer=x).device_memory_ptr
        table.Buffer_Delete(buffer=x)
        if destroy_first:
            table.destroy(x)
        table.Buffer_DecreaseExternalReferenceCount(buffer=x)
        np.testing.assert_array_equal(np.frombuffer(ffi.buffer(pointer, 16), np.float32), [1, 2, 3, 4])
        if not destroy_first:
            assert table.Buffer_OpaqueDeviceMemoryDataPointer(buffer=x).device_memory_ptr == pointer
        table.Buffer_DecreaseExternalReferenceCount(buffer=x)
        if not destroy_first:
            fails(lambda x=x: table.Buffer_DecreaseExternalReferenceCount(buffer=x), "no external references")
            table.destroy(x)


def case_pointers_lead_to_values():
    """shim_value_at finds the value behind a pointer, while its buffer lives."""
    x = put(1, 2, 3, 4)
    pointer = table.Buffer_UnsafePointer(buffer=x).buffer_pointer
    found = []
    assert toy.lib.shim_value_at(pointer, id(found)) == 1
    np.testing.assert_array_equal(found[0].data, [1, 2, 3, 4])
    assert toy.lib.shim_value_at(pointer + 4, id(found)) == 0
    table.destroy(x)
    assert toy.lib.shim_value_at(pointer, id(found)) == 0
    assert len(found) == 1


# ---- to and from the host ----
def case_strides():
    """Host arrays arrive right whatever their strides, and leave in the layout that is asked for."""
    base = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    arrays = [base, base.T, base[::-1], base[:, ::2, ::-2], np.asfortranarray(base), base[:, :1], base[1:1], base[0, 0, 0], base[:, 0]]
    arrays += [np.broadcast_to(base[0, 0], (3, 5))]
    for array in arrays:
        array = np.asarray(array)
        x = table.put(client, array)
        np.testing.assert_array_equal(table.read(x), array)
        if array.ndim and array.size:
            strides = np.asfortranarray(np.zeros_like(array, order="C")).strides
            out = np.zeros(array.shape, np.float32, order="F")
            layout = table.new("PJRT_Buffer_MemoryLayout*", {"type": 1})
            layout.strides.byte_strides = table.new("int64_t[]", strides)
            layout.strides.num_byte_strides = array.ndim
            table.Buffer_ToHostBuffer(src=x, dst=ffi.cast("void*", out.ctypes.data), dst_size=out.nbytes, host_layout=layout)
            np.testing.assert_array_equal(out, array)
            out[...] = 0
            layout = table.new("PJRT_Buffer_MemoryLayout*", {"type": 0})
            layout.tiled.minor_to_major = table.new("int64_t[]", list(range(array.ndim)))
            layout.tiled.minor_to_major_size = array.ndim
            table.Buffer_ToHostBuffer(src=x, dst=ffi.cast("void*", out.ctypes.data), dst_size=out.nbytes, host_layout=layout)
            np.testing.assert_array_equal(out, array)
        table.destroy(x)


def case_bad_layouts():
    """Layouts that cannot be honoured are refused."""
    x = put(1, 2, 3, 4)
    out = table.new("char[]", 16)
    layout = table.new("PJRT_Buffer_MemoryLayout*", {"type": 0})
    layout.tiled.minor_to_major = table.new("int64_t[]", [1])
    layout.tiled.minor_to_major_size = 1
    read = lambda size=16: table.Buffer_ToHostBuffer(src=x, dst=out, dst_size=size, host_layout=layout)  # noqa: E731
    fails(read, "permutation", code=3)
    layout.tiled.num_tiles = 1
    fails(read, "tiled", code=3)
    layout.type = 1
    layout.strides.num_byte_strides = 2
    fails(read, "strides", code=3)
    fails(lambda: read(15), "15 bytes", code=3)
    fails(lambda: table.Buffer_CopyRawToHost(buffer=x, dst=out, offset=8, transfer_size=12), code=3)
    table.Buffer_CopyRawToHost(buffer=x, dst=out, offset=8, transfer_size=8)
    assert list(ffi.cast("float*", out)[0:2]) == [3, 4]
    table.destroy(x)


def case_adoption():
    """An array with zero strides only may stand for a value that is on the device already."""
    mine = Thunk(np.negative, (Thunk(None, (), np.arange(4, dtype=np.float32)),))
    sentinel = np.broadcast_to(np.zeros(1, np.float32), (4,))
    x = table.put(client, sentinel)
    np.testing.assert_array_equal(table.read(x), np.zeros(4))
    toy.adopted[sentinel.ctypes.data] = mine, False
    y = table.put(client, sentinel)
    assert table.Buffer_Dimensions(buffer=y).num_dims == 1
    np.testing.assert_array_equal(table.read(y), [0, -1, -2, -3])
    toy.adopted.clear()
    table.destroy(x, y)


def case_kept_views():
    """A from_host that keeps its view of the caller's memory is refused."""
    kept = []

    def from_host(view, dtype, dims):
        kept.append(np.frombuffer(view, np.float32))
        return Thunk(None, (), np.zeros(4, np.float32)), False

    install(from_host=from_host)
    fails(lambda: put(1, 2, 3, 4), "from_host kept a view", code=13)
    install()


def case_copies():
    """A copy shares the value, pending ones too, and outlives what it was copied from."""
    device = table.Client_Devices(client=client).devices[0]
    job = load(Program(thunk(np.negative), direct=False, name="wait"))
    x = put(1, 2, 3, 4)
    toy.gate.clear()
    (y,), _ = table.execute(job, [x])
    copy = table.Buffer_CopyToDevice(buffer=y, dst_device=device).dst_buffer
    again = table.Buffer_CopyToMemory(buffer=y, dst_memory=table.Buffer_Memory(buffer=y).memory).dst_buffer
    table.destroy(x, y)
    toy.gate.set()
    for buffer in (copy, again):
        np.testing.assert_array_equal(table.read(buffer), [-1, -2, -3, -4])
    table.destroy(copy, again)


# ---- arguments ----
def case_arguments_are_checked():
    """Wrong arguments are refused by number, with what was expected and what came."""
    x = put(1, 2, 3, 4)
    short = put(1, 2)
    other = table.put(client, np.zeros(4, np.int32), 4)
    fails(lambda: table.execute(double, []), "takes 1 arguments, got 0", code=3)
    fails(lambda: table.execute(add, [x, short]), "argument 1", "expected float32[4], got float32[2]", code=3)
    fails(lambda: table.execute(add, [other, x]), "argument 0", "expected float32[4], got int32[4]", code=3)
    token = load(Program(lambda x: [x], shape=(), dtype=23))
    flag = table.put(client, np.array(True), 1)
    table.destroy(*table.execute(token, [flag])[0])
    table.LoadedExecutable_Delete(executable=token)
    assert table.LoadedExecutable_IsDeleted(executable=token).is_deleted
    fails(lambda: table.execute(token, [flag]), "deleted", code=3)
    table.destroy(x, short, other, flag)


# ---- hooks that return rubbish ----
def case_rubbish():
    """A hook that returns rubbish is named in an error."""
    x = put(1, 2, 3, 4)
    (lazy,), _ = table.execute(double, [x])
    stats = lambda: table.Device_MemoryStats(device=table.Client_Devices(client=client).devices[0])  # noqa: E731
    rows = [
        ("client_create", table.client, [None, {}, {"platform_name": 3}]),
        ("compile", lambda: table.compile(client), [None, 3, Program(None, output_types=3), Program(None, parameter_types=((11, 4),)),
                                                    Program(None, parameter_types=((99, ()),)), Program(None, donated=(7,)),
                                                    Program(None, output_states=()), Program(None, output_states=(3,)), Program(None, cost="much"),
                                                    Program(None, name=3), Program(None, output_types=((11, (-1,)),))]),
        ("from_host", lambda: put(1, 2, 3, 4), [None, 3, (1, 2, 3)]),
        ("host_view", lambda: table.read(lazy), [None, (1, 2), (1, b"short"), (1, memoryview(bytes(32))[::2])]),
        ("memory_stats", stats, [None, 3]),
        ("cost_analysis", lambda: table.Executable_GetCostAnalysis(executable=executable_of(double)), [3, {1: 2}, {"a": None}]),
        ("serialize", lambda: table.Executable_Serialize(executable=executable_of(double)), [None, "text"]),
        ("prepare", lambda: table.execute(load(thunk(np.negative)), [x]), [None, (1, 2), (1, (), False), (len, [], False)]),
    ]  # fmt: skip
    for hook, call, results in rows:
        for result in results:
            install(**{hook: lambda *a, r=result: r})
            fails(call, hook, code=13)
    install()
    for result in ([], [1, 2], 7, None, [None]):
        fails(lambda result=result: table.execute(load(lambda x: result), [x]), "hook prepare", code=13)
        (y,), _ = table.execute(load(Program(lambda x, result=result: result, direct=False)), [x])
        fails(lambda y=y: table.block(y), "hook execute", code=13)
        table.destroy(y)
    table.destroy(x, lazy)


def case_errors_are_described():
    """describe_error decides code and text; when it fails itself, the exception's own text is used."""
    x = put(1, 2, 3, 4)
    bad = load(lambda x: 1 / 0)

    def raising(exc):
        raise KeyError("not even that")

    rows = [(lambda exc: (8, "told so"), 8, "told so"), (raising, 13, "ZeroDivisionError: division by zero")]
    rows += [(lambda exc, r=r: r, 13, "ZeroDivisionError") for r in (None, (1,), ("a", "b"), (3, b"bytes"))]
    rows += [(lambda exc: (99, "no such code"), 13, "no such code")]
    for hook, code, words in rows:
        install(describe_error=hook)
        fails(lambda: table.execute(bad, [x]), words, code=code)

    class Silent(Exception):
        def __str__(self):
            raise ValueError

    def silent(x):
        raise Silent

    install(describe_error=raising)
    fails(lambda: table.execute(load(silent), [x]), "Silent", "cannot be printed")
    install()
    table.destroy(x)


def case_install_wants_every_hook():
    hooks = dict(toy.HOOKS)
    del hooks["adopt"]
    assert toy.lib.shim_install(id(hooks)) == -1
    assert toy.lib.shim_install(id([])) == -1


# ---- metadata ----
def executable_of(loaded):
    return table.LoadedExecutable_GetExecutable(loaded_executable=loaded).executable


def case_metadata():
    """An executable's metadata is what Python said."""
    loaded = load(Program(None, 2, 3, shape=(2, 3), donated=(1,), name="jit_f"))
    exe = executable_of(loaded)
    assert table.Executable_NumOutputs(executable=exe).num_outputs == 3
    name = table.Executable_Name(executable=exe)
    assert ffi.buffer(name.executable_name, name.executable_name_size)[:] == b"jit_f"
    for print_of, which in ((table.Executable_Fingerprint, exe), (table.LoadedExecutable_Fingerprint, loaded)):
        fingerprint = print_of(executable=which)
        assert ffi.buffer(fingerprint.executable_fingerprint, fingerprint.executable_fingerprint_size)[:] == b"\0\1finger"
    assert table.Executable_SizeOfGeneratedCodeInBytes(executable=exe).size_in_bytes == 12
    types = table.Executable_OutputElementTypes(executable=exe)
    assert list(types.output_types[0 : types.num_output_types]) == [11] * 3
    dims = table.Executable_OutputDimensions(executable=exe)
    assert list(dims.dim_sizes[0 : dims.num_outputs]) == [2] * 3
    assert list(dims.dims[0:6]) == [2, 3] * 3
    for kinds, count in (
        (table.Executable_OutputMemoryKinds(executable=exe), 3),
        (table.Executable_ParameterMemoryKinds(executable=exe), 2),
    ):
        assert getattr(kinds, "num_outputs" if count == 3 else "num_parameters") == count
        assert [ffi.string(kinds.memory_kinds[i]) for i in range(count)] == [b"device"] * count
    stats = table.Executable_GetCompiledMemoryStats(executable=exe)
    assert (stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.alias_size_in_bytes) == (48, 72, 24)
    cost = table.Executable_GetCostAnalysis(executable=exe)
    assert (cost.num_properties, cost.properties[0].float_value) == (1, 3.0)
    fails(lambda: table.Executable_OptimizedProgram(executable=exe, program=table.new("PJRT_Program*", {})), "jit_f", code=12)
    table.LoadedExecutable_Destroy(executable=loaded)
    assert table.Executable_NumReplicas(executable=exe).num_replicas == 1  # it is counted
    again = table.Client_Load(client=client, executable=exe).loaded_executable
    table.Executable_Destroy(executable=exe)
    table.LoadedExecutable_Destroy(executable=again)


def case_a_program_that_is_waited_for():
    """Its call returns when it ran, and raises what it raised, though it has no effects."""
    x = put(1, 2, 3, 4)
    (y,), done = table.execute(load(Program(thunk(np.negative), direct=False, waits=True)), [x])
    assert table.is_ready(done)
    table.Event_Destroy(event=done)
    fails(lambda: table.execute(load(Program(lambda x: 1 / 0, direct=False, waits=True)), [x]), "ZeroDivisionError")
    table.destroy(x, y)


def case_a_prompt_program():
    """It runs on the caller's thread when what it reads is there, or can be evaluated at once; its results are ready with it."""
    threads = []

    def run(x):
        threads.append(threading.get_ident() == mine)
        x.evaluate()
        return [Thunk(None, (), np.negative(x.data))]

    mine = threading.get_ident()
    means = {"evaluate_now": toy.engine.evaluate, "start": toy.engine.evaluate, "synchronize": lambda: None}
    prompt = load(Program(run, direct=False, prompt=True, output_states=(2,), donated=(0,)))
    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(double, [x])
    (z,), _ = table.execute(prompt, [y], keep=[0])
    table.block(z)
    assert threads == [False]  # this client cannot evaluate at once
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means)
    other = table.client()
    try:
        v = table.put(other, np.float32([1, -2, 3, -4]))
        (u,), _ = table.execute(double, [v])
        table.read(u)  # what the job may have started is done, too
        (w,), _ = table.execute(double, [v])
        (r,), done = table.execute(prompt, [w])
        assert threads == [False, True]
        assert table.is_ready(done)
        event = table.with_gil("Buffer_ReadyEvent", buffer=r).event
        assert table.is_ready(event)
        assert is_deleted(w)
        np.testing.assert_array_equal(table.read(r), [-2, 4, -6, 8])
        (lazy,), _ = table.execute(fail, [v])
        (late,), _ = table.execute(prompt, [lazy], keep=[0])
        for buffer in (late, lazy):
            fails(lambda buffer=buffer: table.read(buffer), "the toy is broken")
        wrong = load(Program(lambda x: 1 / 0, direct=False, prompt=True))
        fails(lambda: table.execute(wrong, [v]), "ZeroDivisionError")
        table.Event_Destroy(event=event)
        table.destroy(u, v, w, r, lazy, late)
    finally:
        install()
        table.client()
    table.destroy(x, y, z)


def case_waiting_for_what_is_being_started():
    """Who waits for a value while another thread starts its evaluation does the waiting that the other one will not."""
    starting, gate, job = threading.Event(), threading.Event(), threading.Event()

    def start(values):
        starting.set()
        assert gate.wait(20)
        toy.engine.evaluate(values)

    def late(x):
        assert job.wait(20)
        x.evaluate()
        return [Thunk(None, (), x.data)]

    means = {"evaluate_now": toy.engine.evaluate, "start": start, "synchronize": lambda: None}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means)
    other = table.client()
    try:
        x = table.put(other, np.float32([1, 2, 3, 4]))
        (y,), _ = table.execute(load(Program(late, direct=False, output_states=(2,))), [x])
        (z,), _ = table.execute(load(Program(thunk(np.negative), cost=10**12)), [y])  # on the executor's thread, which starts it
        job.set()
        assert starting.wait(20)
        threading.Timer(0.3, gate.set).start()
        np.testing.assert_array_equal(table.read(z), [-1, -2, -3, -4])
        table.destroy(x, y, z)
    finally:
        install()
        table.client()


def case_donated_to_a_job():
    """What a job was given belongs to it: others that evaluate meanwhile leave it alone, and a direct one lets go before it is evaluated."""
    means = {"evaluate_now": toy.engine.evaluate, "start": toy.engine.evaluate, "synchronize": lambda: None}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | means)
    other = table.client()
    try:
        x = table.put(other, np.float32([1, -2, 3, -4]))
        (y,), _ = table.execute(double, [x])
        (z,), _ = table.execute(double, [x])

        def run(value):
            np.testing.assert_array_equal(table.read(z), [2, -4, 6, -8])
            return [Thunk(np.negative, (value,))]

        (w,), _ = table.execute(load(Program(run, direct=False, donated=(0,))), [y])
        (v,), _ = table.execute(load(Program(thunk(np.abs), donated=(0,))), [w])
        assert is_deleted(y)
        assert is_deleted(w)
        np.testing.assert_array_equal(table.read(v), [2, 4, 6, 8])
        table.destroy(x, y, z, w, v)
    finally:
        install()
        table.client()


def case_optimized_program():
    """The optimized program is asked for its size, then for itself; without the GIL it is jaxlib that asks, at each compile."""
    install(optimized_program=lambda exe: (b"mlir", b"module {}"))
    exe = executable_of(double)
    program = table.new("PJRT_Program*", {})
    fails(lambda: table.Executable_OptimizedProgram(executable=exe, program=program), code=12)
    table.with_gil("Executable_OptimizedProgram", executable=exe, program=program)
    assert program.code_size == 9
    program.code = table.new("char[]", 9)
    table.with_gil("Executable_OptimizedProgram", executable=exe, program=program)
    assert ffi.buffer(program.code, 9)[:] == b"module {}"
    assert ffi.buffer(program.format, program.format_size)[:] == b"mlir"
    install()


def case_out_fields_are_cleared():
    """Statistics that Python does not give are cleared, for as long as the caller's struct is and no further."""
    device = table.Client_Devices(client=client).devices[0]
    for size in (185, 201, 30):
        raw = ffi.new("char[]", b"\xff" * 256)
        args = ffi.cast("PJRT_Device_MemoryStats_Args*", raw)
        args.struct_size, args.extension_start, args.device = size, ffi.NULL, device
        assert table.api.PJRT_Device_MemoryStats(args) == ffi.NULL
        assert ffi.buffer(raw)[size:256] == b"\xff" * (256 - size)
        if size > 30:
            assert (args.bytes_in_use, args.bytes_limit) == (7, 9)
            assert ffi.buffer(raw)[ffi.offsetof("PJRT_Device_MemoryStats_Args", "peak_pool_bytes") + 9 : size].strip(b"\0") == b""
            assert not args.peak_bytes_in_use_is_set


def case_tables():
    """Devices, memories and the topology agree with what Python said."""
    device = table.Client_Devices(client=client).devices[0]
    description = table.Device_GetDescription(device=device).device_description
    kind = table.DeviceDescription_Kind(device_description=description)
    assert ffi.buffer(kind.device_kind, kind.device_kind_size)[:] == b"toy"
    attributes = table.DeviceDescription_Attributes(device_description=description)
    assert attributes.num_attributes == 3
    assert {attributes.attributes[i].type for i in range(3)} == {1, 2}  # jaxlib aborts on a bool
    assert table.Client_LookupDevice(client=client, id=0).device == device
    fails(lambda: table.Client_LookupDevice(client=client, id=1), "no device 1", code=3)
    fails(lambda: table.Client_LookupAddressableDevice(client=client, local_hardware_id=1), "no device 1", code=3)
    memory = table.Device_DefaultMemory(device=device).memory
    assert table.Memory_AddressableByDevices(memory=memory).devices[0] == device
    assert table.Device_AddressableMemories(device=device).memories[0] == memory
    topology = table.Client_TopologyDescription(client=client).topology
    a, b = (table.TopologyDescription_Fingerprint(topology=topology).fingerprint for _ in range(2))
    assert a == b != 0
    serialized = table.TopologyDescription_Serialize(topology=topology)
    assert b"toy" in ffi.buffer(serialized.serialized_bytes, serialized.serialized_bytes_size)[:]
    serialized.serialized_topology_deleter(serialized.serialized_topology)
    out = table.new("int[]", 1)
    assignment = {"client": client, "num_partitions": 1, "default_assignment_size": 1, "default_assignment": out}
    table.Client_DefaultDeviceAssignment(num_replicas=1, **assignment)
    fails(lambda: table.Client_DefaultDeviceAssignment(num_replicas=2, **assignment), code=3)
    assert layout_of(table.put(client, np.zeros((2, 3), np.float32))) == [1, 0]


def layout_of(buffer):
    args = table.Buffer_GetMemoryLayout(buffer=buffer)  # holds what is looked at
    return list(args.layout.tiled.minor_to_major[0 : args.layout.tiled.minor_to_major_size])


def case_buffers_with_layouts():
    """A layout is kept by results and copies, and is the order in which bytes are read; no address shows it."""
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    loaded = load(Program(lambda a: (a,), 1, 1, shape=(2, 3), output_layouts=((0, 1),)))
    x = table.put(client, value)
    (y,), _ = table.execute(loaded, [x])
    copy = table.Buffer_CopyToDevice(buffer=y, dst_device=table.Client_Devices(client=client).devices[0]).dst_buffer
    for buffer in (y, copy):
        assert layout_of(buffer) == [0, 1]
        assert not table.Buffer_IsOnCpu(buffer=buffer).is_on_cpu
        out = np.zeros((3, 2), np.float32)
        table.Buffer_ToHostBuffer(src=buffer, dst=ffi.cast("void*", out.ctypes.data), dst_size=24)
        np.testing.assert_array_equal(out.T, value)
        for slot in (table.Buffer_UnsafePointer, table.Buffer_OpaqueDeviceMemoryDataPointer):
            fails(lambda slot=slot, buffer=buffer: slot(buffer=buffer), "{0,1}", code=12)
    table.destroy(x, y, copy)
    for wrong in (((0, 0),), ((0,),), ((0, 1), (0, 1)), (1,)):
        fails(lambda wrong=wrong: load(Program(None, 1, 1, shape=(2, 3), output_layouts=wrong)), "did not return an executable")


def case_several_devices():
    """A program for several devices takes and gives the buffers of each; its metadata are those of one."""
    several = {"device_strings": ("a", "b", "c"), "memory_kinds": ("device", "elsewhere")}
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | several)
    other = table.client()
    devices = table.Client_Devices(client=other)
    assert [table.DeviceDescription_Id(device_description=table.Device_GetDescription(device=d).device_description).id for d in devices.devices[0:3]] == [
        0, 1, 2,
    ]  # fmt: skip
    assert devices.num_devices == 3
    assert table.Client_AddressableMemories(client=other).num_addressable_memories == 6
    fails(lambda: table.Client_LookupDevice(client=other, id=3), "no device 3", "0 to 2", code=3)
    out = table.new("int[]", 2)
    table.Client_DefaultDeviceAssignment(client=other, num_replicas=1, num_partitions=2, default_assignment_size=2, default_assignment=out)
    assert list(out) == [0, 1]

    swap = Program(None, 2, 2, direct=False, devices=((2, 1),), output_memories=(1,), donated=(0, 1))
    programs[b"next"] = swap
    loaded = table.compile(other, b"next")
    install(client_create=lambda options: toy.HOOKS["client_create"](options) | several, execute=lambda exe, values: values[::-1])
    exe = table.LoadedExecutable_GetExecutable(loaded_executable=loaded).executable
    assert table.Executable_NumPartitions(executable=exe).num_partitions == 2
    assert table.Executable_NumReplicas(executable=exe).num_replicas == 1
    assert table.Executable_NumOutputs(executable=exe).num_outputs == 1
    kinds = table.Executable_OutputMemoryKinds(executable=exe)
    assert (kinds.num_outputs, ffi.buffer(kinds.memory_kinds[0], kinds.memory_kind_sizes[0])[:]) == (1, b"elsewhere")
    assigned = table.LoadedExecutable_GetDeviceAssignment(executable=loaded)
    assert ffi.buffer(assigned.serialized_bytes, assigned.serialized_bytes_size)[:] == b"\x08\1\x10\2\x1a\3\x0a\1\2\x1a\3\x0a\1\1"
    logical = table.LoadedExecutable_AddressableDeviceLogicalIds(executable=loaded)
    assert [(i.replica, i.partition) for i in logical.addressable_device_logical_ids[0:2]] == [(0, 0), (0, 1)]

    inputs = [table.put(other, np.full(4, v, np.float32)) for v in (1, 2)]
    moved = table.Buffer_CopyToDevice(buffer=inputs[1], dst_device=devices.devices[2]).dst_buffer
    assert table.Buffer_Device(buffer=moved).device == devices.devices[2]
    fails(lambda: table.execute(loaded, [inputs[0]]), "2 devices", code=3)
    lists = [table.new("PJRT_Buffer*[]", [b]) for b in inputs]
    results = [table.new("PJRT_Buffer*[]", 1) for _ in inputs]
    events = table.new("PJRT_Event*[]", 2)
    table.LoadedExecutable_Execute(
        executable=loaded,
        options=table.new("PJRT_ExecuteOptions*", {}),
        argument_lists=table.new("PJRT_Buffer**[]", lists),
        num_devices=2,
        num_args=1,
        output_lists=table.new("PJRT_Buffer**[]", results),
        device_complete_events=events,
    )
    assert all(table.Buffer_IsDeleted(buffer=b).is_deleted for b in inputs)
    for device, value, (buffer,) in zip((2, 1), (2, 1), results, strict=True):
        np.testing.assert_array_equal(table.read(buffer), np.full(4, value))
        assert table.Buffer_Device(buffer=buffer).device == devices.devices[device]
        memory = table.Buffer_Memory(buffer=buffer).memory
        assert table.Memory_Id(memory=memory).id == 2 * device + 1
        assert table.Memory_Kind_Id(memory=memory).kind_id == 1
    for event in events:
        table.Event_Await(event=event)
        table.Event_Destroy(event=event)
    table.destroy(*inputs, moved, *(r[0] for r in results))
    for wrong in ({"devices": ((0, 3),)}, {"devices": ((0,), (1, 2))}, {"devices": ()}, {"output_memories": (2,)}):
        fails(lambda wrong=wrong: load(Program(None, 2, 2, **wrong)), "did not return an executable")
    install()


# ---- the lock ----
def case_the_lock_is_recursive():
    """The lock counts; release_all and reacquire give it away and take it back whole."""
    lib = toy.lib
    taken = []

    def other():
        lib.shim_lock()
        taken.append(1)
        lib.shim_unlock()

    lib.shim_lock()
    lib.shim_lock()
    thread = threading.Thread(target=other)
    thread.start()
    lib.shim_unlock()
    time.sleep(0.02)
    assert taken == []
    lib.shim_lock()
    assert lib.shim_release_all() == 2
    thread.join()
    assert lib.shim_release_all() == 0
    lib.shim_reacquire(2)
    lib.shim_unlock()
    lib.shim_unlock()
    other()
    assert taken == [1, 1]


def case_values_are_dropped_without_waiting():
    """Destroying a lazy buffer while the lock is held elsewhere does not wait, and its value goes when the lock is free."""

    class Value:
        gone = False

        def __del__(self):
            Value.gone = True

    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(load(lambda x: [Value()]), [x])
    release = threading.Event()

    def hold():
        toy.lib.shim_lock()
        release.wait(10)
        toy.lib.shim_unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    time.sleep(0.02)
    table.destroy(y)
    assert not Value.gone
    release.set()
    thread.join()
    assert Value.gone
    table.destroy(x)


# ---- length, leaks ----
def case_long_chains():
    """A chain of 100,000 executions is built, evaluated, failed and dropped without recursion, its records too."""
    before = counts()
    one = load(thunk(np.positive))
    for ending in ("read", "fail", "drop"):
        chain = [put(1, 2, 3, 4)]
        for _ in range(100_000):
            chain += table.execute(one, chain[-1:])[0]
            table.keep.clear()
        assert counts()["lazy"] == before["lazy"] + 100_000
        if ending == "fail":
            (y,), _ = table.execute(fail, chain[-1:])
            fails(lambda y=y: table.read(y), "broken")
            fails(lambda chain=chain: table.read(chain[1]), "broken")
            table.destroy(y)
        if ending == "read":
            np.testing.assert_array_equal(table.read(chain[-1]), [1, 2, 3, 4])
        table.destroy(*chain)
        assert counts()["lazy"] == before["lazy"]


def case_records_do_not_pile_up():
    """A loop that reads a by-product of each step, and never the carry, keeps few records."""
    step = load(lambda x: [Thunk(np.positive, (x,)), Thunk(np.negative, (x,))], 1, 2)
    x = put(1, 2, 3, 4)
    most = 0
    previous = None
    for _ in range(20_000):
        (y, loss), _ = table.execute(step, [x])
        if previous:
            table.read(previous)
            table.destroy(previous)
        table.destroy(x)
        x, previous = y, loss
        most = max(most, counts()["lazy"])
    table.destroy(x, previous)
    assert most <= 2100, most


def case_nothing_leaks():
    """Running, failing, donating, copying and reading leave no buffer, event, record, or Python object behind."""
    donating = load(Program(thunk(np.add), 2, donated=(0,)))
    job = load(Program(thunk(np.negative), direct=False))
    bad_job = load(Program(lambda x: 1 / 0, direct=False))

    def once():
        x, y = put(1, 2, 3, 4), put(1, 1, 1, 1)
        (a,), _ = table.execute(donating, [x, y])
        (b,), _done = table.execute(job, [a])
        (c,), _ = table.execute(fail, [b])
        (d,), _ = table.execute(bad_job, [b])
        (e,), _ = table.execute(double, [d])
        table.read(b)
        table.block(b)
        fails(lambda: table.block(c), "broken")
        fails(lambda: table.block(e), "division")
        table.Buffer_IncreaseExternalReferenceCount(buffer=a)
        fails(lambda: table.Buffer_UnsafePointer(buffer=c), "broken")
        table.Buffer_DecreaseExternalReferenceCount(buffer=a)
        table.destroy(x, y, a, b, c, d, e)
        table.keep.clear()

    def settle():
        toy.lib.shim_drain(1000)
        log.clear()
        return counts(), sys.getallocatedblocks()

    for _ in range(20):
        once()
    before, blocks = settle()
    for _ in range(300):
        once()
    after, more = settle()
    for name in ("buffers", "lazy", "pending", "events", "bytes", "executables"):
        assert after[name] == before[name], name
    assert more - blocks < 300


def case_executables_are_freed():
    """An executable's Python object goes with its last handle, and prepare's callable too."""
    import gc
    import weakref

    program = Program(thunk(np.negative))
    gone = weakref.ref(program)
    loaded = load(program)
    del program
    x = put(1, 2, 3, 4)
    (y,), _ = table.execute(loaded, [x])
    exe = executable_of(loaded)
    table.LoadedExecutable_Destroy(executable=loaded)
    gc.collect()
    assert gone() is not None
    table.Executable_Destroy(executable=exe)
    gc.collect()
    assert gone() is None
    np.testing.assert_array_equal(table.read(y), [-1, -2, -3, -4])
    table.destroy(x, y)


def case_threads():
    """Eight threads execute, wait, read and delete at once."""
    errors = []
    job = load(Program(thunk(np.negative), direct=False))

    def work(seed):
        mine = Table(toy.lib.shim_api())
        try:
            for i in range(60):
                x = mine.put(client, np.full(4, seed + i, np.float32))
                (y,), _ = mine.execute(double, [x])
                (z,), _ = mine.execute(job, [y])
                (w,), _ = mine.execute(add, [z, y])
                if i % 3 == 0:
                    mine.block(w)
                if i % 5 == 0:
                    mine.Buffer_Delete(buffer=y)
                if i % 7 == 0:
                    (bad,), _ = mine.execute(fail, [z])
                    try:
                        mine.block(bad)
                    except PjrtError:
                        mine.destroy(bad, x, y, z, w)
                        continue
                np.testing.assert_array_equal(mine.read(w), np.zeros(4))
                mine.destroy(x, y, z, w)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
