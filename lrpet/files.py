"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["digest", "write_file", "write_whole"]


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when all of it is on the disk.

    Args:
        path: the file; what stood there before stays until the new one is whole.

    Its folder is made where it is missing.

    Raises:
        OSError: it could not be written; names the file and the free space of its disk.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with write_whole(Path(folder) / "a.txt") as file:
    ...         _ = file.write(b"all of it")
    ...     os.listdir(folder)
    ['a.txt']
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(there).free / 1e6
        advice = "what stood there before is untouched; make room or give another folder, then start again"
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror or error}, {free:.1f} MB free; {advice}",
        ) from error
    finally:
        part.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is there whole or not at all, and read it back.

    Raises:
        OSError: it could not be written, or what is read is not what was written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_file(Path(folder) / "new" / "a.txt", "text")
    ...     (Path(folder) / "new" / "a.txt").read_text()
    'text'
    """
    content = content.encode() if isinstance(content, str) else content
    with write_whole(path) as file:
        file.write(content)
    if path.read_bytes() != content:
        raise OSError(
            f"{path} does not hold what was written to it; look at its disk, or give another folder"
        )


def digest(files: Iterable[str | Path]) -> str:
    """Return the SHA-256 of the contents of files, one after the other.

    >>> digest([])[:8]
    'e3b0c442'
    """
    content = hashlib.sha256()
    for file in files:
        content.update(Path(file).read_bytes())
    return content.hexdigest()
