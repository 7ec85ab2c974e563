"""Ctrl-C that waits for the end of a training step, so that a run resumes exactly where it stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PatientInterrupt"]


class PatientInterrupt:
    """While entered, Ctrl-C and "interrupt kernel" only set ``asked``; a second one interrupts at once.

    Acts in the main thread only, and only where nobody else, such as ``nohup``, has decided what SIGINT does.
    Leaving it with a request that nobody has answered raises KeyboardInterrupt.

    Args:
        may_insist: whether a second one interrupts at once. Not under torchrun, which hands on what Slurm has
            sent to all already, and kills by itself what does not stop.

    >>> with PatientInterrupt() as interrupt:
    ...     interrupt.asked
    False
    """

    def __init__(self, may_insist: bool = True):
        self.may_insist = may_insist

    def __enter__(self) -> PatientInterrupt:
        self.asked = self.may_interrupt = False
        main = threading.current_thread() is threading.main_thread()
        self.installed = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind, *_) -> None:
        if self.installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and kind is None:
            raise KeyboardInterrupt

    def _note(self, *_) -> None:
        again, self.asked = self.asked, True
        if again and self.may_insist or self.may_interrupt:
            raise KeyboardInterrupt

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """Let a request, also one that came before, interrupt the body at once."""
        self.may_interrupt = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self.may_interrupt = False
