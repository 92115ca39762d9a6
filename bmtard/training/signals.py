"""SIGTERM and SIGINT as a request to stop at a moment from which a run can go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal has ended the work; the message, one line, says what is kept."""

    def __init__(self, number: int, message: str = "stopped") -> None:
        super().__init__(message)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status that shells give to a process ended by this signal."""
        return 128 + self.number


class StopRequest:
    """Whether a signal has asked to stop, while ``listening``.

    A second signal does not wait: it raises KeyboardInterrupt where it is. Not so where processes
    stop together: there a launcher passes on what the terminal has sent to all of them already.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        """agree: gives the highest of the numbers that all the processes call it with."""
        self._number: int | None = None
        self._at_once = False
        self._agree = agree

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over, but none that the process ignores; only in the main thread."""
        self._number = None
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {
                number: signal.signal(number, self._receive)
                for number in NUMBERS
                if signal.getsignal(number) not in (signal.SIG_IGN, None)
            }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that changes nothing worth keeping: a signal raises Stopped where it is."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def check(self) -> None:
        """Raises Stopped if a signal has come, to any of the processes that stop together."""
        number = self._number or 0
        if self._agree is not None:
            number = self._agree(number)
        if number:
            raise Stopped(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:
            if self._agree is not None:
                return
            raise KeyboardInterrupt
        self._number = number
        if self._at_once:
            raise Stopped(number)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Stopped, as SIGINT raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    mine = threading.current_thread() is threading.main_thread()
    mine = mine and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
