"""The method inside other libraries' loops, and compact networks on a hub; each is imported when asked for.

``trainer_callback`` is for the Trainer of Hugging Face's transformers, ``lightning_callback`` for that of
Lightning, ``project_everywhere`` for a loop of your own under accelerate or torchrun, ``hub_network_class``
for huggingface_hub, and ``write_scalars`` for TensorBoard.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrpet.lowrank.compact_file import load_compact, save_compact
from lrpet.lowrank.projector import LowRankProjector
from lrpet.lowrank.ranks import Report
from lrpet.processes import Processes

__all__ = [
    "hub_network_class",
    "lightning_callback",
    "project_everywhere",
    "trainer_callback",
    "write_scalars",
]


def project_everywhere(projector: LowRankProjector, *, exact: bool = False) -> Report:
    """Project, and give every process the weights of the first, to the bit; alone it is ``projector.step()``.

    Args:
        projector: of the network itself, in each process of PyTorch's default group.
        exact: see :meth:`LowRankProjector.step`.

    Returns:
        The report of this process.

    >>> projector = LowRankProjector(nn.Sequential(nn.Conv2d(3, 8, 3)), [2])
    >>> project_everywhere(projector)[0].action
    'projected'
    """
    report = projector.step(exact=exact)
    weights = [projector.model.get_submodule(name).weight.detach() for name in projector.ranks]
    Processes.now().copy_from(0, weights)
    return report


def trainer_callback(projector: LowRankProjector, every: int | None = None) -> Any:
    """Return a ``TrainerCallback`` of transformers that projects while the Trainer trains.

    It projects before the Trainer evaluates and saves, and once more, exactly, at the end of the training.
    Its attribute ``report`` is that of the last projection.

    Args:
        projector: of the model that the Trainer gets.
        every: steps of the optimizer from one projection to the next; None for once an epoch.

    Raises:
        ImportError: transformers is not installed.

    Source: https://huggingface.co/docs/transformers/main_classes/callback.
    """
    from transformers import TrainerCallback

    class Projection(TrainerCallback):
        report: Report | None = None

        def on_step_end(self, args, state, control, **kwargs):
            if every is not None and state.global_step % every == 0:
                self.report = project_everywhere(projector)

        def on_epoch_end(self, args, state, control, **kwargs):
            if every is None:
                self.report = project_everywhere(projector)

        def on_train_end(self, args, state, control, **kwargs):
            self.report = project_everywhere(projector, exact=True)

    _check_every(every)
    return Projection()


def lightning_callback(projector: LowRankProjector, every: int | None = None) -> Any:
    """Return a ``Callback`` of Lightning that projects while its Trainer trains.

    It projects after the last batch of an epoch, before validation and checkpoints, and once more, exactly,
    at the end of the training. Its attribute ``report`` is that of the last projection.

    Args:
        projector: of the LightningModule, or of a network in it.
        every: steps of the optimizer from one projection to the next; None for once an epoch.

    Raises:
        ImportError: lightning is not installed.

    Source: https://lightning.ai/docs/pytorch/stable/extensions/callbacks.html.
    """
    from lightning.pytorch import Callback

    class Projection(Callback):
        report: Report | None = None
        last = 0  # step of the optimizer; gradients are perhaps summed over several batches

        def on_train_start(self, trainer, pl_module):
            self.last = trainer.global_step  # more than 0 where the training resumes

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            step = trainer.global_step
            if trainer.is_last_batch if every is None else step // every > self.last // every:
                self.report, self.last = project_everywhere(projector), step

        def on_train_end(self, trainer, pl_module):
            self.report = project_everywhere(projector, exact=True)

    _check_every(every)
    return Projection()


def _check_every(every: int | None) -> None:
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every must be None or a whole number of steps, 1 or more; got {every!r}")


@cache
def hub_network_class() -> type[nn.Module]:
    """Return a class around a compact network with ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    ``cls(compact)`` runs as the network and has it as ``network``. ``cls.from_pretrained(folder,
    model=model)`` takes a folder, offline, or the name of a repository, and a ``model`` as
    :func:`lrpet.load_compact` does.

    Raises:
        ImportError: huggingface_hub is not installed.

    Source: https://huggingface.co/docs/huggingface_hub/guides/integrations.
    """
    from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download

    class HubNetwork(nn.Module, PyTorchModelHubMixin, library_name="lrpet"):
        def __init__(self, network: nn.Module):
            super().__init__()
            self.network = network

        def forward(self, *inputs: Tensor, **named: Tensor):
            return self.network(*inputs, **named)

        def _save_pretrained(self, save_directory: Path) -> None:
            save_compact(self.network, save_directory / constants.SAFETENSORS_SINGLE_FILE)

        @classmethod
        def _from_pretrained(cls, *, model_id: str, model: nn.Module, **where):
            file = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
            if not Path(model_id).is_dir():
                file = hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **where)
            return cls(load_compact(file, model))

    return HubNetwork


def write_scalars(writer: Any, report: Report, step: int) -> None:
    """Write a report to TensorBoard, each of its numbers as a scalar, see :meth:`Report.metrics`.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or another object with ``add_scalar``.
        report: of :meth:`LowRankProjector.step`.
        step: epoch or iteration.

    >>> class Printer:
    ...     def add_scalar(self, name, value, step):
    ...         print(name, value, step)
    >>> report = LowRankProjector(nn.Sequential(nn.Linear(8, 8)), {"0": 2}).step()
    >>> write_scalars(Printer(), report, step=1)  # doctest: +ELLIPSIS
    layers_projected 1 1
    energy_kept_mean 0... 1
    energy_kept_min 0... 1
    energy_kept/0 0... 1
    rank/0 2 1
    """
    for name, value in report.metrics().items():
        writer.add_scalar(name, value, step)
