"""The table of ``bench models`` as a page, and what in it would be a fault."""

from __future__ import annotations

from collections import Counter

import torch

__all__ = ["PRUNE_RATIO", "faults", "page"]
PRUNE_RATIO = 0.75  # at which the factors of a square layer cost half of it
EXACT = 1e-9  # of float64 numbers, by the largest of them; rounding stays under 1e-12
ONNX = 1e-3  # of float32 numbers
COUNTED = "network | layers | left out | share | BatchNorms | dense | told | run"
HEAD = f"| {COUNTED} | error | folded | loaded | ONNX |"
LEGEND = """\
- *layers*: taken, of all. *left out*: how many, and why; the name of a class says that it is derived from a
  layer and may compute something else. *share*: of the parameters, in the layers taken.
- *BatchNorms*: right after a layer, of all. The others follow something else, such as a sum, a
  concatenation, a layer that is left out, or one applied to tokens.
- *dense*, *told*, *run*: millions of multiply-adds for the inputs tried, of the dense network, of the compact
  one as `lrpet.cost` tells before it is made, and counted in a run of it. Where a module around a layer reads
  its `weight`, as T5, ViT and CLIP do to see its dtype, the factors are multiplied first, and both count it.
- *error*: of outputs, factorized against projected, by the largest. *folded*: with BatchNorm folded too,
  except where one holds an activation. *loaded*: saved and loaded, against factorized. *ONNX*: in float32,
  onnxruntime against PyTorch.
""".splitlines()


def faults(row: dict) -> list[str]:
    """Return what is wrong with a row without anybody having been told; what was refused is not.

    >>> faults({"network": "some", "failed": "ValueError: it is sharded"})
    []
    """
    if "failed" in row:
        return []
    limits = {"error": EXACT, "fold_error": EXACT, "load_error": 0.0, "onnx_error": ONNX}
    found = [name for name, limit in limits.items() if not row.get(name, 0.0) <= limit]
    return found + ["told_macs"] * (row["told_macs"] != row["real_macs"])


def page(found: dict[str, str | None], rows: list[dict]) -> str:
    """Return the table as Markdown.

    Args:
        found: the version of each library, None where it is not installed.
        rows: of :func:`lrpet.bench.models.examine`.

    >>> page({"timm": None}, []).splitlines()[0]
    '# Networks that were tried'
    """
    missing = [library for library, version in found.items() if not version]
    wrong = [row["network"] for row in rows if faults(row)]
    used = ", ".join(f"{library} {version}" for library, version in found.items() if version)
    lines = [
        "# Networks that were tried",
        "",
        "Made by `python -m lrpet.bench models` with the packages of `requirements-zoo.lock`; all numbers",
        "are in `results/bench/models-cpu.json`. Weights are random, BatchNorms and biases too. All",
        f"convolutions and Linear layers that can take part do, at prune ratio {PRUNE_RATIO}, in float64.",
        "",
        f"PyTorch {torch.__version__}, {used}."
        + (f" Not installed, so not tried: {', '.join(missing)}." if missing else ""),
        "",
        f"**{len(rows)} networks; wrong without a word: {', '.join(wrong) or 'none'}.**",
        "",
        *LEGEND,
    ]
    for library in dict.fromkeys(row["library"] for row in rows):
        lines += [
            "",
            f"## {library} {found[library]}",
            "",
            HEAD,
            "| --- " * 12 + "|",
        ]
        lines += [_line(row) for row in rows if row["library"] == library]
    skipped = [f"- {row['network']}: {_first(row['onnx_skipped'])}" for row in rows if "onnx_skipped" in row]
    lines += ["", "## Why ONNX was skipped", "", *skipped] if skipped else []
    return "\n".join(lines) + "\n"


def _first(text: str) -> str:
    return text.partition("\n")[0].replace("|", "/").replace("<", "‹").replace(">", "›")


def _line(row: dict) -> str:
    if "failed" in row:
        return f"| {row['network']} | refused: {_first(row['failed'])} |" + " |" * 10
    left_out: Counter = Counter()
    for reason, count in row["left_out"].items():
        left_out[_in_short(reason)] += count
    cells = [
        row["network"],
        f"{row['taken']} of {row['layers']}",
        ", ".join(f"{count} {reason}" for reason, count in left_out.items()),
        f"{row['params_share']:.0%}",
        f"{row['paired']} of {row['batchnorms']}" if row["batchnorms"] else "",
        *(f"{row[name] / 1e6:.2f}" for name in ("dense_macs", "told_macs", "real_macs")),
        *(f"{row[name]:.0e}" if row[name] else "0" for name in ("error", "fold_error", "load_error")),
        f"{row['onnx_error']:.0e}" if "onnx_error" in row else "skipped" * ("onnx_skipped" in row),
    ]
    return f"| {' | '.join(cells)} |"


def _in_short(reason: str) -> str:
    if reason.startswith("its weight is also that of"):
        return "tied"
    if reason.startswith("another module reads its weight"):
        return "used by another module"
    return reason.partition(" is a subclass")[0].partition(" (")[0]
