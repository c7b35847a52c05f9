"""SIGTERM, SIGINT, SIGUSR1 (a scheduler's notice) and SIGHUP: noted while the state changes, else obeyed at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

STATUS = 75  # EX_TEMPFAIL of sysexits.h: what is saved goes on with the same command

_received = 0
_deferring = False


class Stopped(SystemExit):
    """Ends the program with status 75; the message says what became of the run."""

    def __init__(self, number: int, what: str = "") -> None:
        super().__init__(STATUS)
        self.message = f"stopped by {signal.Signals(number).name}{what}: the same command goes on"


def watch() -> None:
    """Obey signals from now on."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    Thread(target=_count_interrupts, args=(read_end,), daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _note)


def _count_interrupts(read_end: int) -> None:
    """End the process at the second SIGINT, even where its main thread hangs in a library and handles no signal."""
    count = 0
    while count < 2:
        count += os.read(read_end, 1)[0] == signal.SIGINT
    os._exit(128 + signal.SIGINT)


def _note(number: int, frame: FrameType | None) -> None:
    global _received
    if not _received:  # launchers may pass on what was sent to all
        _received = number
        if not _deferring:
            raise Stopped(number)


def received() -> int:
    """The signal that was sent to this process; 0: none."""
    return _received


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is only noted, and asked for by `received`; after an error, too, so that nothing replaces it."""
    global _deferring
    _deferring = True
    yield
    _deferring = False


@contextmanager
def obeyed() -> Iterator[None]:
    """Inside, which is inside `deferred`, a signal raises Stopped at once; so does one that came before."""
    global _deferring
    _deferring = False
    try:
        if _received:
            raise Stopped(_received)
        yield
    finally:
        _deferring = True
