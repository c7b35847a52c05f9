"""Handling of SIGTERM, SIGINT, SIGUSR1 (the warning of a scheduler) and SIGHUP.

A signal ends the program immediately, except while the training state changes. During that time, a signal is only
recorded, and the training loop ends the program after it has saved the state.
"""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes the run

_received = 0
_deferring = False


class Stopped(SystemExit):
    """Exception that ends the program with status 75. The message names the signal and says what was saved.

    Args:
        what: the step and what was saved; empty: not known.
    """

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(STATUS)
        advice = "to resume" if what else "again"
        self.message = f"stopped by {signal.Signals(number).name}{what}: run the same command {advice}"


def watch() -> None:
    """Starts to handle the signals.

    SIGHUP stays ignored if it is ignored already. A second SIGINT ends the process in any case.
    """
    read_end, write_end = socket.socketpair()  # Windows takes no pipe
    write_end.setblocking(False)
    signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    Thread(target=_count_interrupts, args=(read_end, write_end), daemon=True).start()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has only the first two
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):  # nohup ignores SIGHUP
            signal.signal(number, _note)


def _count_interrupts(read_end: socket.socket, write_end: socket.socket) -> None:
    """Ends the process at the second SIGINT, even if its main thread hangs in a library and handles no signals.

    Args:
        write_end: socket that Python writes to. It is an argument so that it stays open.
    """
    count = 0
    while count < 2:
        count += read_end.recv(1)[0] == signal.SIGINT
    os._exit(128 + signal.SIGINT)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if not _received:  # a launcher may forward a signal that this process has already received
        _received = number
        if not _deferring:
            raise Stopped(number)


def received() -> int:
    """Returns the number of the first signal that this process has received; 0 if there is none."""
    return _received


@contextmanager
def deferred() -> Iterator[None]:
    """Signals that arrive inside the context are only recorded. `received` returns the first of them.

    After an error inside, signals are still only recorded, so that Stopped does not replace the error.
    """
    global _deferring
    _deferring = True
    yield
    _deferring = False


@contextmanager
def obeyed() -> Iterator[None]:
    """Raises Stopped immediately if a signal arrives inside the context, which must be inside `deferred`.

    If a signal has already arrived, raises Stopped on entry.
    """
    global _deferring
    _deferring = False
    try:
        if _received:
            raise Stopped(_received)
        yield
    finally:
        _deferring = True
