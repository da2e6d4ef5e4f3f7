"""A background thread that writes, so that a program's first run does not wait for the disk."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)

LINGER = 0.05  # seconds between the first submission and the first write: the program's own first run comes first


class Writer:
    """Runs submitted functions one after another on a daemon thread. Nothing it does raises into the caller."""

    def __init__(self, *, longest: int = 4096, at_exit: float | None = 5.0) -> None:
        """longest: how many functions may wait. at_exit: seconds to finish when Python ends; None for no such wait."""
        self._longest = longest
        self._waiting: deque[Callable[[], object]] = deque()
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._busy = False
        self._hurry = False
        self._said: set[str] = set()
        self.dropped = 0
        if at_exit is not None:
            atexit.register(self.flush, at_exit)

    def submit(self, write: Callable[[], object]) -> bool:
        """Queue `write`; False if it was dropped, because too much waits or no thread can be had."""
        if os.getpid() != self._pid:
            return False  # a forked child has no writer thread, and its parent writes the same things
        with self._change:
            if len(self._waiting) >= self._longest or not self._start():
                self.dropped += 1
                self._say(
                    "drop",
                    "the disk cache cannot keep up; some programs will not be stored",
                )
                return False
            self._waiting.append(write)
            self._change.notify_all()
        return True

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything submitted has been written, at most `timeout` seconds; whether it has."""
        if os.getpid() != self._pid:
            return True
        with self._change:
            self._hurry = True
            self._change.notify_all()
            done = self._change.wait_for(lambda: not self._waiting and not self._busy, timeout)
            self._hurry = False
        return done

    def _start(self) -> bool:
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, name="jax-mps-cache-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is ending, or the system is out of threads
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: bool(self._waiting))
                self._change.wait_for(lambda: self._hurry, LINGER)
            self._drain()

    def _drain(self) -> None:
        while True:
            with self._change:
                if not self._waiting:
                    return
                write = self._waiting.popleft()
                self._busy = True
            try:
                write()
            except Exception:  # a boundary: the program that runs must not suffer for what could not be stored
                self._say("error", "the disk cache could not store a program", exc_info=True)
            finally:
                del write
                with self._change:
                    self._busy = False
                    self._change.notify_all()

    def _say(self, once: str, text: str, *, exc_info: bool = False) -> None:
        log.log(
            logging.DEBUG if once in self._said else logging.WARNING,
            text,
            exc_info=exc_info,
        )
        self._said.add(once)
