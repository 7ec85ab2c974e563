"""Structured pruning of filters, the other way to a smaller network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lrpet.lowrank.budget import closest_share
from lrpet.lowrank.cost import cost
from lrpet.methods.base import Method, image_shape, target_macs

__all__ = ["FilterPruning", "keep_filters", "weakest_last"]


class FilterPruning(Method):
    """Structured pruning of a trained network: the filters of smallest L1 norm go, the rest is fine-tuned.

    Every convolution whose output channels no other layer shares loses the same share of its filters, so in a
    ResNet the first of each block, as in the source. The share is the one whose multiply-adds come closest to
    those of the low-rank network.

    Cost: one pass over the weights. Source: Li et al., arXiv 1608.08710; carried out by Torch-Pruning, arXiv
    2301.12900.

    >>> from lrpet import RunConfig, build_model
    >>> config = RunConfig(method="filter_pruning", prune_ratio=0.57, epochs=2, milestones=[])
    >>> method = FilterPruning(build_model("resnet8"), config)
    >>> method.begin_epoch(1), method.model.blocks[0].conv1.out_channels
    (True, 7)
    """

    def begin_epoch(self, epoch: int) -> bool:
        """Prune when the dense epochs are over; see :class:`Method`."""
        if self.structure is not None or epoch < self.config.pretrain_epochs:
            return False
        shape = image_shape(self.config)
        order = weakest_last(self.model, shape)

        def kept(share: float) -> dict[str, list[int]]:
            counts = {name: max(1, round(share * len(filters))) for name, filters in order.items()}
            return {name: sorted(order[name][:count]) for name, count in counts.items()}

        def macs(share: float) -> int:
            return cost(keep_filters(self.model, kept(share), shape), shape).macs

        self.restore(kept(closest_share(macs, target_macs(self.model, self.config))))
        return True

    def restore(self, structure: dict | None) -> None:
        """See :class:`Method`."""
        if structure is not None:
            self.model = keep_filters(self.model, structure, image_shape(self.config))
            self.structure = structure


def weakest_last(model: nn.Module, input_shape: Sequence[int]) -> dict[str, list[int]]:
    """Return the filters by falling L1 norm, per convolution whose output channels no other layer shares.

    Args:
        model: any module that Torch-Pruning can trace.
        input_shape: (C, H, W) of one image.

    Raises:
        ValueError: there is no such convolution.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.

    >>> net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1))
    >>> net[0].weight.data[0] = 0.0
    >>> weakest_last(net, (3, 4, 4))
    {'0': [1, 0]}
    """
    torch_pruning, graph = _trace(model, input_shape)
    order = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or module.groups > 1:
            continue
        group = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, idxs=[0])
        weighted = [d for d, _ in group if isinstance(d.target.module, (nn.Conv2d, nn.Linear))]
        makers = [d for d in weighted if graph.is_out_channel_pruning_fn(d.handler)]
        users = [d for d in weighted if graph.is_in_channel_pruning_fn(d.handler)]
        if len(makers) == 1 and users:  # an output of the whole network has no user
            norms = module.weight.detach().abs().sum(dim=(1, 2, 3))  # (N,)
            order[name] = norms.argsort(descending=True, stable=True).tolist()
    if not order:
        network = type(model).__name__
        raise ValueError(f"{network} has no convolution whose filters can go alone; filter_pruning needs one")
    return order


def keep_filters(
    model: nn.Module, kept: Mapping[str, Sequence[int]], input_shape: Sequence[int]
) -> nn.Module:
    """Return a copy of a network in which the named convolutions keep only the given filters.

    Args:
        model: the network; it is not changed.
        kept: convolution name → indices of the filters that stay.
        input_shape: (C, H, W) of one image.

    Source: Fang et al., "DepGraph", arXiv 2301.12900.

    >>> net = keep_filters(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), {"0": [1, 3]}, (3, 4, 4))
    >>> [tuple(p.shape) for p in net[1].parameters()]
    [(2, 2, 1, 1), (2,)]
    """
    pruned = copy.deepcopy(model)
    torch_pruning, graph = _trace(pruned, input_shape)
    for name, filters in kept.items():
        layer = pruned.get_submodule(name)
        gone = sorted(set(range(layer.out_channels)) - set(filters))
        if gone:
            graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=gone).prune()
    return pruned


def _trace(model: nn.Module, input_shape: Sequence[int]):
    """Return Torch-Pruning and its dependency graph of a model, whose mode is as before."""
    try:
        import torch_pruning
    except ImportError as error:
        needs = "method 'filter_pruning' needs Torch-Pruning, which is not installed"
        raise ImportError(f"{needs}; run: pip install torch-pruning") from error
    was_training = model.training
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    graph = torch_pruning.DependencyGraph().build_dependency(model.eval(), example_inputs=example)
    model.train(was_training)
    return torch_pruning, graph
