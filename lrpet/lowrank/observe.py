"""One run of a network on example inputs, in evaluation mode, that leaves the network as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "image_like", "watching", "weight_reads"]


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run a network on a tensor (or any one argument), on a tuple of arguments, or on a dict of named ones.

    >>> call(nn.Linear(2, 3), (torch.ones(1, 2),)).shape
    torch.Size([1, 3])
    """
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, tuple) else model(example_inputs)


@contextmanager
def watching(model: nn.Module) -> Iterator[list]:
    """Set a model to evaluation without gradients; take that back at the end, and hooks in the list.

    >>> model = nn.Linear(2, 2).train()
    >>> with watching(model) as hooks:
    ...     hooks.append(model.register_forward_hook(lambda *_: None))
    >>> model.training, len(model._forward_hooks)
    (True, 0)
    """
    modes, hooks = {module: module.training for module in model.modules()}, []
    try:
        with torch.no_grad():
            model.eval()
            yield hooks
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


@contextmanager
def weight_reads(layers: Collection[nn.Module]) -> Iterator[Counter]:
    """Count how often the weight of each layer is read by something else than the layer itself.

    >>> model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    >>> with torch.no_grad(), weight_reads([model.linear1]) as reads:
    ...     _ = model(torch.ones(1, 2, 4))  # by PyTorch's fast path
    >>> reads[model.linear1] > 0
    True
    """
    reads, running, kinds = Counter(), set(), {layer: type(layer) for layer in layers}

    def watched(kind: type) -> type:
        class Watched(kind):
            def __getattr__(self, name):
                if name == "weight" and self not in running:
                    reads[self] += 1
                return super().__getattr__(name)

            def forward(self, *inputs, **named):
                running.add(self)
                try:
                    return super().forward(*inputs, **named)
                finally:
                    running.discard(self)

        return Watched

    try:
        for layer, kind in kinds.items():
            layer.__class__ = watched(kind)
        yield reads
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind


def image_like(model: nn.Module, input_shape) -> Tensor:
    """Return zeros (1, *input_shape) of the model's dtype and on its device.

    >>> image_like(nn.Linear(2, 2).double(), (3, 2)).dtype
    torch.float64
    """
    parameters = (p for p in model.parameters() if p.is_floating_point())
    like = next(parameters, torch.empty(0))
    return torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
