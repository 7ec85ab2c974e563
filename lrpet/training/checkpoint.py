"""One checkpoint format: written whole, checked when it is read."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from pickle import UnpicklingError

import torch

from lrpet.files import write_whole
from lrpet.processes import ALONE, Processes

__all__ = ["has_checkpoint", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint, then its SHA-256, atomically; the one before stays as ``*.previous``.

    Unlike what a run leaves, it is not read back, which would cost as much again after every epoch: the sum
    is checked when it is loaded, and damage costs no more than the time since the one before.

    Args:
        path: the file.
        state: tensors, numbers, strings, lists and dicts only, so that it loads without running code.

    Raises:
        OSError: the disk is full or not writable; names the file and the free space. The checkpoint before is
            untouched.
    """
    content, part = io.BytesIO(), path.with_suffix(".part")
    torch.save(state, content)
    with write_whole(part) as file:
        file.write(content.getbuffer())
        file.write(hashlib.sha256(content.getbuffer()).digest())
    if path.is_file():
        os.replace(path, path.with_suffix(".previous"))
    os.replace(part, path)


def has_checkpoint(path: Path) -> bool:
    """Tell whether there is a checkpoint; a kill between two renames leaves only ``*.previous``."""
    return path.is_file() or path.with_suffix(".previous").is_file()


def load_checkpoint(
    path: Path, device: torch.device | str = "cpu", processes: Processes = ALONE
) -> dict | None:
    """Read the newest whole checkpoint: ``path``, else the one before, which takes its place; else None.

    The first process reads it, so that no other needs to see the folder; nothing in it depends on their
    number.

    Raises:
        ValueError: files are there, but each is truncated or altered, or holds objects that would run code.
    """
    found = processes.share(lambda: _newest_whole(path))
    if found is None:
        return None
    file, content = found
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"checkpoint {file} holds more than data and was not made by this project; refused: {error}"
        ) from error


def _newest_whole(path: Path) -> tuple[Path, bytes] | None:
    damaged = []
    for file in (path, path.with_suffix(".previous")):
        if not file.is_file():
            continue
        content = file.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            for name in damaged:
                print(f"{name} is damaged; resuming from {file.name}", flush=True)
            if file != path:  # else the next checkpoint would put the damaged one in its place
                os.replace(file, path)
            return file, content[:-32]
        damaged.append(file)
    if damaged:
        raise ValueError(
            f"checkpoint {damaged[0]} is damaged and there is no whole one before it; "
            "move it away to start the run anew"
        )
    return None
