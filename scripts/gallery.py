"""Make notebooks/pictures: of each executed notebook one picture, small, for notebooks/README.md."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
WHICH = {
    "00_method": 1,
    "05_gradient_norms": 2,
}  # of the pictures in a notebook, counted from 0; else the first
WIDTH = 360  # pixels


def pictures(notebook: Path) -> list[bytes]:
    """Return the PNG outputs of a notebook, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", ())]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def main() -> None:
    """Write the pictures."""
    (NOTEBOOKS / "pictures").mkdir(exist_ok=True)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        found = pictures(notebook)
        if found:
            image = Image.open(io.BytesIO(found[WHICH.get(notebook.stem, 0)])).convert("RGB")
            image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
            image.quantize(64).save(NOTEBOOKS / "pictures" / f"{notebook.stem}.png", optimize=True)


if __name__ == "__main__":
    main()
