"""Shutdown, forks and signals: each in a process of its own."""

import pytest

PRELUDE = """
import os, signal, sys, threading, time
sys.path.insert(0, {folder!r})
import numpy as np
from shim import toy
jax = toy.start()
jnp = jax.numpy
x = jax.device_put(np.arange(4, dtype=np.float32))
def wait_job(x): return x + 1
def sleep_job(x): return x + 1
def job(x): return x + 1
"""


@pytest.fixture
def run(python):
    def run(body, **options):
        from shim.table import HERE

        return python(["-c", PRELUDE.format(folder=str(HERE.parent)) + body], **options)

    return run


# What is still going on when the interpreter ends.
ENDINGS = {
    "lazy": "y = jax.jit(jnp.sin)(x)",
    "ready": "y = jax.jit(jnp.sin)(x).block_until_ready()",
    "a job": "y = jax.jit(sleep_job)(x)",
    "many jobs": "ys = [jax.jit(sleep_job)(x) for _ in range(50)]",
    "a failed one": "y = jax.jit(jnp.sin)(x * 0 + 666)",
    "a numpy view": "y = np.asarray(jax.jit(jnp.sin)(x))",
    "an armed event": "y = jax.jit(jnp.sin)(jax.jit(sleep_job)(x)); print(y.is_ready())",
    "a __del__": "class A:\n    def __del__(self): self.y = None\na = A(); a.y = jax.jit(jnp.sin)(x); a.a = a",
    "a waiting thread": "y = jax.jit(sleep_job)(x); threading.Thread(target=y.block_until_ready, daemon=True).start()",
    "an atexit user": "import atexit; atexit.register(lambda: print(np.asarray(x + 1)))",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit(run, ending):
    """The interpreter ends quickly and cleanly, whatever is going on."""
    done = run(ENDINGS[ending] + "\nprint('end')", timeout=20)
    assert (done.returncode, done.stdout.splitlines()[0 if ending != "an armed event" else 1]) == (0, "end"), done.stderr


def test_exit_does_not_wait_for_ever(run):
    """A job that never ends does not keep the process."""
    done = run("toy.gate.clear()\ny = jax.jit(wait_job)(x)\ntime.sleep(0.1)\nprint('end')", timeout=15)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_finalized(run):
    """After shim_finalize everything is refused in words, waiting for what was cancelled included."""
    done = run("""
y = jax.jit(sleep_job)(x)
z = jax.jit(sleep_job)(x)
toy.lib.shim_finalize()
for call in (lambda: jax.jit(job)(x), lambda: np.asarray(x), z.block_until_ready, lambda: jax.device_put(np.ones(3))):
    try: call()
    except Exception as e: print("shutting down" in str(e))
print(toy.lib.shim_stopping())
""")
    assert (done.returncode, done.stdout.split()) == (0, ["True"] * 4 + ["1"]), done.stdout + done.stderr


def test_fork(run):
    """A forked child gets an error instead of a hang, and the parent goes on. (At a child's exit jaxlib joins threads that are not
    there, on every backend; so it leaves as multiprocessing's children do.)"""
    done = run("""
os.register_at_fork(after_in_child=toy.lib.shim_forked)
f = jax.jit(job)
y = f(x)
z = jax.jit(jnp.sin)(x)
pid = os.fork()
if pid == 0:
    ok = []
    for call in (lambda: f(x), lambda: np.asarray(y), z.block_until_ready, lambda: jax.device_put(np.ones(4))):
        try: call()
        except Exception as e: ok.append("forked" in str(e))
    del y, z
    print(ok, flush=True)
    os._exit(0)
print(os.waitpid(pid, 0)[1], flush=True)
print(np.asarray(f(y)))
""")
    assert done.stdout.splitlines() == ["[True, True, True, True]", "0", "[2. 3. 4. 5.]"], done.stdout + done.stderr
    assert done.returncode == 0


def test_interrupts(run):
    """SIGINTs are counted and passed on; what was there before is restored, unless somebody else came."""
    done = run("""
lib = toy.lib
def interrupt():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        print("interrupted", lib.shim_interrupts())
interrupt()
lib.shim_watch_interrupts(1)
lib.shim_watch_interrupts(1)
interrupt()
lib.shim_watch_interrupts(0)
interrupt()
lib.shim_watch_interrupts(0)
interrupt()
lib.shim_watch_interrupts(1)
signal.signal(signal.SIGINT, lambda *a: print("theirs"))
lib.shim_watch_interrupts(0)
interrupt()
lib.shim_watch_interrupts(1)
interrupt()
lib.shim_watch_interrupts(0)
""")
    expected = ["interrupted 0", "interrupted 1", "interrupted 2", "interrupted 2", "theirs", "theirs"]
    assert done.stdout.splitlines() == expected, done.stdout + done.stderr


def test_interrupted_hook(run):
    """Ctrl-C in a hook reaches the user as KeyboardInterrupt, not only as an error of JAX."""
    done = run("""
def evaluate(values):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
toy.install(evaluate=evaluate)
try:
    y = jax.jit(jnp.sin)(x)
    try:
        np.asarray(y)
        time.sleep(1)
    except Exception as e:
        print("error")
        time.sleep(1)
    print("not reached")
except KeyboardInterrupt:
    print("interrupted")
""")
    assert done.stdout.splitlines()[-1:] == ["interrupted"], done.stdout + done.stderr
    assert "not reached" not in done.stdout
