"""Seconds spent on the parts of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Clock"]


class Clock:
    """Adds up seconds under names; what is spent under another name within the body does not count twice.

    >>> clock = Clock()
    >>> with clock("train"):
    ...     with clock("projection"):
    ...         pass
    >>> list(clock.seconds)
    ['projection', 'train']
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the time of the body under ``name``; nothing where it ends by an error, as it is done again."""
        began, told = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[name] += time.perf_counter() - began - (sum(self.seconds.values()) - told)
