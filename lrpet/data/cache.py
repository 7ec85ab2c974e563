"""Decoded images on the disk, so that a tree is decoded once."""

from __future__ import annotations

import hashlib
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

__all__ = ["DataError"]


class DataError(ValueError):
    """The images are missing, incomplete or damaged; the text says which and what to do."""


def cache_names(root: Path, purpose: str, files: list[tuple[str, int]]) -> tuple[str, str]:
    """Return two hashes that name a cache: of folder and purpose, and of its images' names and states.

    A state is size and inode, and when the content and the inode changed last: a file that was replaced by
    another of the same size and time has another inode, or its inode changed later.
    """
    try:
        listing = [f"{os.path.relpath(p, root)} {_state(p)}" for p, _ in files]
    except OSError as error:
        raise DataError(
            f"{root} must be a folder of images that can be read; got: {error}. "
            "Allow reading it or give another --data"
        ) from error
    return tuple(
        hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]
        for lines in ([str(root.resolve()), purpose], listing)
    )


def _state(path: str) -> tuple[int, ...]:
    state = os.stat(path)
    return state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns


def read_cache(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the pixels of a cache file, which ends with their SHA-256; None if it is missing or damaged."""
    if not file.is_file():
        return None
    content = np.fromfile(file, np.uint8)
    pixels, digest = content[:-32], content[-32:].tobytes()
    if len(pixels) == math.prod(shape) and hashlib.sha256(pixels.data).digest() == digest:
        return pixels.reshape(shape)
    print(f"{file} is damaged; decoding the images again", flush=True)
    with suppress(OSError):  # another user's: the whole one takes its place all the same, or says why not
        file.unlink()
    return None
