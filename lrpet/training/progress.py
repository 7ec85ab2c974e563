"""What a person sees while a run trains: a bar where one can be drawn, one line per epoch elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from tqdm.auto import tqdm

from lrpet.config import RunConfig

__all__ = ["Progress", "bar_is_possible"]


def bar_is_possible(environ: Mapping[str, str] = os.environ, stream=None) -> bool:
    """Tell whether somebody watches: a terminal, or a notebook that a person opened (papermill opens none).

    Jupyter's server names the notebook in ``JPY_SESSION_NAME`` and VS Code sets ``VSCODE_PID`` for its
    kernels.
    """
    stream = sys.stderr if stream is None else stream
    return (
        stream.isatty()
        or "JPY_SESSION_NAME" in environ
        or ("VSCODE_PID" in environ and "ipykernel" in sys.modules)
    )


class Progress:
    """Shows the steps of a run: loss, score and time left.

    Args:
        config: of the run; its name, epochs and metric are shown.
        steps: of an epoch.
        done: steps that an earlier session made.
        mode: "auto", "bar", "lines" or "off".
    """

    def __init__(self, config: RunConfig, steps: int, done: int = 0, mode: str = "auto"):
        if mode not in ("auto", "bar", "lines", "off"):
            raise ValueError(f"progress must be auto, bar, lines or off; got {mode!r}")
        self.title, self.epochs, self.metric = config.run_id, config.epochs, config.metric
        self.total, self.mode = self.epochs * steps, mode
        if mode == "auto":
            self.mode = "bar" if bar_is_possible() else "lines"
        self.started, self.first = time.monotonic(), done
        self.bar = tqdm(
            total=self.total,
            initial=done,
            desc=self.title,
            unit="step",
            disable=self.mode != "bar",
            mininterval=0.5,
        )
        self.bar._time = time.monotonic  # its own clock can be set back, and then the bar stands still
        self.bar.start_t = self.bar.last_print_t = self.started

    def step(self, epoch: int, scores: Mapping, done: int) -> None:
        """Advance the bar to ``done`` steps; the scores are those of this epoch's batches so far."""
        self.bar.set_postfix_str(
            f"epoch {epoch + 1}/{self.epochs}, loss {scores['train_loss']:.3f}{self._trained(scores)}",
            refresh=False,
        )
        self.bar.update(done - self.bar.n)

    def epoch(self, row: Mapping, done: int) -> None:
        """Print the line of a finished epoch where no bar is drawn."""
        if self.mode == "lines":
            left = (time.monotonic() - self.started) / max(1, done - self.first) * (self.total - done)
            print(
                f"{self.title}  epoch {row['epoch']:3d}/{self.epochs}  "
                f"loss {row['train_loss']:.3f}{self._trained(row)}  "
                f"{row['scored_on']} {self.metric.text(row[self.metric.column])}  {left / 60:.1f} min left",
                flush=True,
            )

    def _trained(self, scores: Mapping) -> str:
        """Write the score on the training batches, where the task has one."""
        name = f"train_{self.metric.column}"
        return f", train {self.metric.text(scores[name])}" if name in scores else ""

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()
