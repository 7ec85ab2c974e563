"""A copy of a tree with smaller images."""

from __future__ import annotations

import os
from pathlib import Path

from lrpet.data.cache import DataError
from lrpet.data.tree import list_images, open_image

__all__ = ["shrink_tree"]


def shrink_tree(source: str | Path, target: str | Path, short: int = 256, on_corrupt: str = "stop") -> int:
    """Write a copy of an ImageFolder tree as JPEG of quality 95 whose shorter sides are ``short`` pixels at most, to be decoded faster.

    A file that is there already is kept, so an interrupted call goes on. The copy is other data, with a fingerprint of its own.

    Args:
        source: a folder with train/ and val/, or test/, or a folder a class.
        target: where the copy goes.
        short: pixels; images that are smaller keep their size.
        on_corrupt: "stop" or "skip", see :func:`lrpet.data.tree.list_images`.

    Returns:
        How many images the copy holds.

    Raises:
        DataError: an image cannot be decoded; names it.
    """
    from concurrent.futures import ThreadPoolExecutor

    from lrpet.files import write_whole

    source, target = Path(source).expanduser(), Path(target).expanduser()
    train, test, *_ = list_images(source, on_corrupt)
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise DataError(f"the copy of {source} must go elsewhere; got {target}")

    def shrink(path: str) -> None:
        file = target / Path(path).relative_to(source)
        file = file.with_name(f"{file.name}.jpg")  # of a.png and a.jpg two files
        if file.is_file():
            return
        image = open_image(path)
        scale = min(1.0, short / min(image.size))
        image = image.resize([max(1, round(edge * scale)) for edge in image.size])
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(file) as out:
            image.save(out, "JPEG", quality=95)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(shrink, [path for path, _ in train + test]):
            pass
    return len(train) + len(test)
