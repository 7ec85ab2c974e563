"""Low-rank gradient projection: GaLore, GaLore 2, Lotus, VLoRP and a random control as one PyTorch optimizer.

The weights stay dense; the optimizer's state becomes small. Notation: ``G`` is a gradient as an N×D matrix,
``K = min(N, D)``, ``L = max(N, D)``, ``r`` the rank of the *gradient's* subspace, ``P`` (K×r) its basis on
the short side, and ``S`` the projected gradient: Pᵀ·G for N < D (wide), G·P for N ≥ D (tall; a square matrix
counts as tall). One step, with η the learning rate, α the scale, λ the weight decay and t from 1::

    m ← β₁·m + (1 − β₁)·S      v ← β₂·v + (1 − β₂)·S²      U = (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)
    M ← (1 − η·λ)·M − η·α·(P·U or U·Pᵀ)

Basis, moments and all arithmetic are float32, also for weights in bfloat16, and float64 for weights in
float64. ε and weight decay stand where ``torch.optim.AdamW`` has them; the authors of GaLore and VLoRP apply
weight decay after the update, and GaLore adds ε before bias correction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from lrpet.lowrank.arguments import renamed
from lrpet.lowrank.layers import unwrap
from lrpet.lowrank.projection import truncated_svd
from lrpet.lowrank.ranks import Choice, compressible_layers

__all__ = ["STRATEGIES", "GradientProjection", "projection_groups"]
_SUBSPACE = {"rank": None, "scale": 0.25, "carry": "keep"}
_SKETCH = {"oversample": 10, "iterations": 2}  # our reading: neither GaLore 2 nor Lotus publishes them
# The settings of each strategy and their defaults, as published where they are; None must be given.
STRATEGIES: dict[str, dict[str, Any]] = {
    "galore": _SUBSPACE | {"every": 200},
    "galore2": _SUBSPACE | {"every": 200} | _SKETCH,
    "lotus": _SUBSPACE | {"threshold": 0.01, "check": 50} | _SKETCH,
    "vlorp": {"rank": None, "grain": None, "every": 100, "distribution": "normal"},
    "random": _SUBSPACE | {"every": 200},
}


def _is_number(value: Any, least: float = -math.inf, *, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and least <= value < math.inf  # a checkpoint would refuse NumPy's numbers


_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number of 0 or more", lambda v: v >= 0),  # or a tensor
    "betas": ("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)),
    "eps": ("a number of 0 or more", lambda v: _is_number(v, 0)),
    "weight_decay": ("a number of 0 or more", lambda v: _is_number(v, 0)),
    "seed": ("a whole number", lambda v: _is_number(v, kinds=(int,))),
    "rank": ("a whole number of 1 or more", lambda v: _is_number(v, 1, kinds=(int,))),
    "every": ("a whole number of steps, 1 or more", lambda v: _is_number(v, 1, kinds=(int,))),
    "check": ("a whole number of steps, 1 or more", lambda v: _is_number(v, 1, kinds=(int,))),
    "oversample": ("a whole number of 0 or more", lambda v: _is_number(v, 0, kinds=(int,))),
    "iterations": ("a whole number of 0 or more", lambda v: _is_number(v, 0, kinds=(int,))),
    "scale": ("a positive number", lambda v: _is_number(v, 0) and v > 0),
    "grain": ("a positive number", lambda v: _is_number(v, 0) and v > 0),
    "threshold": ("a number of 0 or more", lambda v: _is_number(v, 0)),
    "carry": ("keep, rotate or reset", lambda v: v in ("keep", "rotate", "reset")),
    "distribution": ("normal or sign", lambda v: v in ("normal", "sign")),
}


@renamed(layers="include")
def projection_groups(
    model: nn.Module, strategy: str, *, include: Choice, exclude: Choice = (), **settings: Any
) -> list[dict[str, Any]]:
    """Divide a model's trainable parameters into a projected group and a plain one.

    Only the weights of matching layers are projected. Published choices are the block matrices: attention and
    MLP, never embeddings, norms, biases or the output head.

    Args:
        model: the network; of a wrapped one the network inside.
        strategy: ``galore``, ``galore2``, ``lotus``, ``vlorp`` or ``random``.
        include: pattern of names of Linear layers and ungrouped convolutions, as ``blocks.*``, or what else
            chooses layers, see :func:`compressible_layers`.
        exclude: the same, for layers to leave out.
        **settings: of the strategy, see :class:`GradientProjection`; ``rank`` is required. Also settings that
            any group of an optimizer may have, as ``lr``, for the projected layers.

    Returns:
        Parameter groups with names, for :class:`GradientProjection`; the plain group is left out where it
        would be empty.

    Raises:
        ValueError: no trainable layer matches. Settings are checked by the optimizer.

    Source: arXiv 2403.03507, experimental settings.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> [group["params"][0][0] for group in projection_groups(model, "galore", include="0", rank=2)]
    ['0.weight', '0.bias']
    """
    model = unwrap(model)
    weights = {f"{name}.weight".lstrip(".") for name in compressible_layers(model, include, exclude)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projected = [(name, p) for name, p in trained if name in weights]
    plain = [(name, p) for name, p in trained if name not in weights]
    if not projected:
        raise ValueError(
            f"include={include!r} matches no trainable Linear layer or ungrouped convolution of "
            f"{type(model).__name__}; names are those of model.named_modules()"
        )
    groups = [{"params": projected, "strategy": strategy, **settings}, {"params": plain}]
    return groups if plain else groups[:1]


class GradientProjection(torch.optim.Optimizer):
    """AdamW whose moments live in a low-rank subspace of the gradient, for groups that have a ``strategy``.

    All other groups are plain AdamW. Three lines use it in any loop, also with schedulers, gradient clipping,
    accumulation and DistributedDataParallel (then give ``group=torch.distributed.group.WORLD``)::

        groups = projection_groups(model, "galore", include="blocks.*", rank=48, every=200)
        optimizer = GradientProjection(groups, lr=1e-3, weight_decay=0.05)
        ...  # backward
        optimizer.step()

    ============  =====================================  =================================================
    strategy      basis P                                a new one
    ============  =====================================  =================================================
    ``galore``    leading singular vectors of G          every ``every`` steps
    ``galore2``   the same by randomized SVD             every ``every`` steps
    ``lotus``     the same by randomized SVD             where the direction of S has changed little for long
    ``vlorp``     random entries, drawn, never stored    every ``every`` steps
    ``random``    orthonormal, unlike G: a control       every ``every`` steps
    ============  =====================================  =================================================

    Settings of a group beside ``lr``, ``betas``, ``eps`` and ``weight_decay``, with defaults in
    ``STRATEGIES``:

    - ``rank``: r; at most the short side is used, of VLoRP that of the cut matrix.
    - ``scale``: α, a factor on the learning rate of the projected layers.
    - ``carry``: the moments at a new basis: ``keep`` as they are, ``rotate`` into the new basis, or ``reset``
      to zero, with t.
    - ``oversample``, ``iterations``: of the randomized SVD.
    - ``threshold``, ``check``: Lotus asks every ``check`` steps whether ‖S/‖S‖ − S₀/‖S₀‖‖ / n < threshold,
      where S₀ is the first projected gradient of the basis and n counts the steps that used it; the next step
      then has a new basis.
    - ``grain``: c; VLoRP cuts each row of a tall G into c pieces and joins c rows of a wide one; c < 1 is the
      reverse, with 1/c. The second moment is factored as in Adafactor.
    - ``distribution``: of VLoRP's entries, ``normal`` or ``sign`` (±1). Take ``sign`` where processes run on
      different CPUs: normal numbers are not promised to be the same bits everywhere.

    Weights of more than two axes are read as N×D with N the first axis. A parameter without a gradient is
    left out of a step.

    Args:
        params: parameters or groups; :func:`projection_groups` makes groups with names, which errors then
            carry.
        lr: η, a number or a tensor of one element.
        betas: β₁ and β₂, in [0, 1).
        eps: ε.
        weight_decay: λ, decoupled.
        seed: of the random numbers: a whole number. A draw depends on seed, the parameter's position and the
            number of the basis alone; the global generator is not used.
        group: the torch.distributed group whose processes train together and hold the *same* gradients, as
            DDP leaves them; each then computes the bases of some layers and sends them to the others. None:
            every process computes all.

    Raises:
        ValueError: a setting is unknown or out of range, or a weight cannot be projected; the message names
            the layer.

    Source: arXiv 2403.03507 (GaLore), 2504.20437 (GaLore 2; our reading of a summary), 2602.01233, algorithm
    1 (Lotus), 2505.01744 and the authors' code (VLoRP).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> optimizer = GradientProjection(projection_groups(model, "galore", include="0", rank=2), lr=0.01)
    >>> model(torch.ones(4, 8)).square().mean().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()  # 4·(8·2 + 2·16·2) of the projected weight, 8 for every other number
    856
    """

    process_group = None  # of a copied or unpickled optimizer: every process then computes all bases

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
        group: Any = None,
    ):
        self.process_group = group
        # The seed is a group's setting, so that it is in the checkpoint.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"seed": seed, "strategy": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :class:`GradientProjection` for its settings.

        Args:
            param_group: ``params`` and settings.

        Raises:
            ValueError: as :class:`GradientProjection`; the group is then not added.

        >>> optimizer = GradientProjection([nn.Parameter(torch.ones(4, 6))])
        >>> weight = nn.Parameter(torch.ones(4, 6))
        >>> optimizer.add_param_group({"params": [weight], "strategy": "galore", "rank": 2})
        >>> optimizer.param_groups[1]["every"]
        200
        """
        super().add_param_group(param_group)
        try:
            _check(self, self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, after :meth:`prepare`.

        Args:
            closure: computes the loss anew, or None.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: as :meth:`prepare`; nothing is changed then.

        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> group = {"params": [weight], "strategy": "galore", "rank": 1, "scale": 1.0}
        >>> optimizer = GradientProjection([group], lr=0.1)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> weight[0]  # 1 − 0.1 · 1/√2
        tensor([0.9293, 0.9293, 0.9293], grad_fn=<SelectBackward0>)
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare()
        for item in _items(self):
            if item.parameter.grad is not None:
                _update(self, item)
        return loss

    def prepare(self) -> None:
        """Check the gradients and compute the bases that are due.

        :meth:`step` calls it; a second call before the step changes nothing. With processes told as
        ``group``, all of them must call it with the same gradients.

        Raises:
            ValueError: a gradient is sparse or complex, or one that is projected holds NaN or infinite
                values. The message names the layer, and no basis has been computed.

        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> optimizer = GradientProjection([{"params": [weight], "strategy": "galore", "rank": 1}])
        >>> weight.grad = torch.full((2, 3), torch.nan)
        >>> optimizer.prepare()
        Traceback (most recent call last):
        ValueError: parameter 0: the gradient holds NaN or infinite values; look at the loss or skip the step
        """
        _prepare(self, [item for item in _items(self) if item.parameter.grad is not None])

    def refresh_next(self) -> None:
        """Let every projected layer have a new basis at the next step, as after a projection of the weights.

        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> optimizer = GradientProjection([{"params": [weight], "strategy": "galore", "rank": 1}])
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(2, 3)
        ...     optimizer.step()
        ...     optimizer.refresh_next()
        >>> optimizer.report()[0]["refreshes"]
        2
        """
        for state in self.state.values():
            if "due" in state:
                state["due"] = True

    def state_bytes(self) -> int:
        """Return the bytes of the state that the optimizer holds between two steps, over all storages.

        In numbers, four bytes each: rK + 2rL for a layer of ``galore``, ``galore2`` and ``random``, rK + 3rL
        for ``lotus``, c·r·L + N + D for ``vlorp``, 2·N·D for a plain parameter; 0 before the first step.

        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> optimizer = GradientProjection([{"params": [weight], "strategy": "lotus", "rank": 1}])
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> optimizer.state_bytes() == 4 * (1 * 2 + 3 * 1 * 3)
        True
        """
        tensors = [v for state in self.state.values() for v in state.values() if isinstance(v, Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    def report(self) -> list[dict[str, Any]]:
        """Return a row for each projected layer; ``pandas.DataFrame`` makes a table of them.

        Returns:
            ``name``; ``side`` of the basis, ``left`` (wide) or ``right`` (tall); ``rank`` that is used;
            ``refreshes``, the number of bases so far; ``since``, the steps that used the current one;
            ``energy``, ‖S‖²/‖G‖² of the gradient that it was made from, in [0, 1] (None before the first
            basis, and for VLoRP, whose basis is not orthonormal); ``note``.

        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> optimizer = GradientProjection([{"params": [weight], "strategy": "galore", "rank": 1}])
        >>> optimizer.report()[0]["side"], optimizer.report()[0]["refreshes"]
        ('left', 0)
        """
        projected = (item for item in _items(self) if item.group["strategy"] is not None)
        return [_row(item, self.state.get(item.parameter, {})) for item in projected]

    @contextmanager
    def in_backward(self, *, pieces: int = 1, clip: float | None = None) -> Iterator[None]:
        """Update each parameter as soon as its gradient is complete, and free that gradient.

        So only one gradient is alive at a time. The block holds one ``loss.backward()``; leaving it counts as
        the step, and a further ``step()`` finds no gradient. What needs all gradients at once is refused:
        several processes, accumulation, clipping by the norm of all. After an error in the middle, the layers
        that backward had reached are updated and the others are not.

        Args:
            pieces: into how many pieces your loop cuts a batch: 1.
            clip: the norm to which your loop clips: None.

        Raises:
            ValueError: torch.distributed runs several processes, ``pieces`` or ``clip`` is anything else, a
                parameter has a gradient already, or backward reaches one twice; as :meth:`prepare` too.

        Source: the per-layer updates of the authors of arXiv 2403.03507.

        >>> model = nn.Linear(4, 6)
        >>> optimizer = GradientProjection(projection_groups(model, "galore", include="*", rank=2))
        >>> with optimizer.in_backward():
        ...     model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None, optimizer.report()[0]["since"]
        (True, 1)
        """
        with _hooks(self, pieces, clip):
            yield
        self.step()  # finds no gradient, but schedulers want to have seen it

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, also one from ``torch.load(…, weights_only=True)``, with its tensors' own types.

        ``Optimizer.load_state_dict`` alone would round float32 bases and moments to the type of bfloat16
        weights.

        Args:
            state_dict: of an optimizer with the same groups; settings come from it too.

        Raises:
            ValueError: the groups differ in number or size.

        >>> weight = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
        >>> optimizer = GradientProjection([{"params": [weight], "strategy": "galore", "rank": 1}])
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer.step()
        >>> optimizer.load_state_dict(optimizer.state_dict())
        >>> optimizer.state[weight]["basis"].dtype
        torch.float32
        """
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, item in zip(numbers, _items(self), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[item.parameter][name] = value.to(item.parameter.device, copy=True)


def _row(item: _Item, state: Mapping[str, Any]) -> dict[str, Any]:
    frame, note = item.frame(), ""
    if frame.rank == frame.side:
        note = "rank ≥ short side: Adam in rotated coordinates, more state than Adam"
        if item.group["strategy"] == "vlorp":
            note = "grain · rank ≥ short side: the first moment is as large as the gradient"
    row = {"name": item.name, "side": "right" if frame.tall else "left", "rank": frame.rank}
    row |= {"refreshes": state.get("refreshes", 0), "since": state.get("since", 0)}
    return row | {"energy": state.get("energy"), "note": note}


def _check(optimizer: GradientProjection, group: dict[str, Any]) -> None:
    first = next((item.name for item in _items(optimizer) if item.group is group), "an empty group")
    strategy = group["strategy"]
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"{first}: strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    known = STRATEGIES.get(strategy, {})
    # Schedulers that resume are given initial_lr.
    others = {"params", "param_names", "initial_lr", *optimizer.defaults}
    if unknown := sorted(group.keys() - known.keys() - others):
        has = f"strategy {strategy} has {', '.join(known) or 'none'}"
        raise ValueError(f"{first}: unknown setting {', '.join(unknown)}; {has}")
    for name, (wanted, allowed) in _ALLOWED.items():
        if name in known or name in optimizer.defaults:
            value = group.setdefault(name, known.get(name))
            if not allowed(value):
                raise ValueError(f"{first}: {name} must be {wanted}; got {value!r}")
    for item in _items(optimizer):
        if item.group is group and strategy is not None:
            item.frame()


def _items(optimizer: GradientProjection) -> Iterator[_Item]:
    number = 0
    for group in optimizer.param_groups:
        names = group.get("param_names", [None] * len(group["params"]))
        for name, parameter in zip(names, group["params"], strict=True):
            yield _Item(number, name or f"parameter {number}", parameter, group)
            number += 1


@torch.no_grad()
def _prepare(optimizer: GradientProjection, items: Sequence[_Item]) -> None:
    for item in items:
        G = item.parameter.grad
        if G.layout != torch.strided or G.is_complex():
            kind = "complex" if G.is_complex() else "sparse"
            raise ValueError(f"{item.name}: the gradient is {kind}, and must be dense and real")
    items = [item for item in items if item.group["strategy"] is not None]
    sums = [item.parameter.grad.sum() for item in items]  # cheap, and finite only where every entry is
    # Stacked, they make the host wait for a GPU once. A sum may also overflow.
    if items and not torch.stack([each.to(sums[0]) for each in sums]).isfinite().all():
        for item in items:
            if not item.parameter.grad.isfinite().all():
                what = "the gradient holds NaN or infinite values; look at the loss or skip the step"
                raise ValueError(f"{item.name}: {what}")
    due = [item for item in items if _state(optimizer, item)["due"]]
    stored = [item for item in due if item.group["strategy"] != "vlorp"]
    for item, basis in zip(stored, _new_bases(optimizer, stored), strict=True):
        _change_basis(optimizer, item, basis)
    for item in due:  # of VLoRP, the number of the draw is all that changes
        state = optimizer.state[item.parameter]
        state["refreshes"] += 1
        state["since"], state["due"] = 0, False


def _new_bases(optimizer: GradientProjection, items: Sequence[_Item]) -> list[Tensor]:
    """Return a basis (K, r) for each layer; each is computed by one process and sent to the others."""
    processes, rank, world = optimizer.process_group, 0, 1
    if processes is not None:
        rank, world = dist.get_rank(processes), dist.get_world_size(processes)
    costs = {item: item.frame().side * item.parameter.numel() for item in items}  # K²·L
    load, owner, bases = [0] * world, {}, []
    for item in sorted(costs, key=costs.get, reverse=True):  # the next one to whom has the least to do
        owner[item] = load.index(min(load))
        load[owner[item]] += costs[item]
    for item in items:
        state = optimizer.state[item.parameter]
        own = owner[item] == rank
        bases.append(item.new_basis(state["refreshes"] + 1) if own else torch.empty_like(state["basis"]))
    for sender in range(world) if world > 1 else ():
        sent = [basis for item, basis in zip(items, bases, strict=True) if owner[item] == sender]
        if sent:
            flat = torch.cat([basis.flatten() for basis in sent])
            dist.broadcast(flat, group=processes, group_src=sender)
            for basis, part in zip(sent, flat.split([basis.numel() for basis in sent]), strict=True):
                basis.copy_(part.view_as(basis))
    return bases


def _change_basis(optimizer: GradientProjection, item: _Item, basis: Tensor) -> None:
    state, frame, G = optimizer.state[item.parameter], item.frame(), item.gradient()
    if item.group["carry"] == "rotate":
        C = _product(state["basis"].mT, basis)  # (r, r)
        for name, turn in (("exp_avg", C), ("exp_avg_sq", C.square())):
            moment = state[name]
            moment.copy_(_product(moment, turn) if frame.tall else _product(turn.mT, moment))
    elif item.group["carry"] == "reset":
        state["step"] = 0  # else there were no bias correction, and the next updates too large
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    state["basis"].copy_(basis)
    kept, energy = (_size(matrix).square().item() for matrix in (frame.down(G, basis), G))
    state["energy"] = min(1.0, kept / energy) if energy else 1.0


def _state(optimizer: GradientProjection, item: _Item) -> dict[str, Any]:
    """Return the state of a parameter, made where there is none.

    Counters are Python numbers, which ``Optimizer.load_state_dict`` does not cast.
    """
    state, p, strategy = optimizer.state[item.parameter], item.parameter, item.group["strategy"]
    if state:
        return state
    state["step"], shapes = 0, {"exp_avg": p.shape, "exp_avg_sq": p.shape}
    if strategy is not None:
        # "due" is one flag for the first step, `every`, Lotus's test and refresh_next.
        state |= {"refreshes": 0, "since": 0, "due": True, "energy": None}
        frame = item.frame()
        small = (frame.rows, frame.rank) if frame.tall else (frame.rank, frame.columns)
        shapes = {"exp_avg": small, "exp_avg_sq": small, "basis": (frame.side, frame.rank)}
    if strategy == "vlorp":
        shapes = {"exp_avg": small, "row": (len(p),), "col": (p.numel() // len(p),)}
    if strategy == "lotus":
        shapes["first"] = small
    state |= {name: torch.zeros(shape, dtype=item.dtype, device=p.device) for name, shape in shapes.items()}
    return state


@torch.no_grad()
def _update(optimizer: GradientProjection, item: _Item) -> None:
    p, group, state = item.parameter, item.group, _state(optimizer, item)
    strategy, G = group["strategy"], item.gradient()
    if group["weight_decay"]:
        p.mul_(1 - group["lr"] * group["weight_decay"])
    state["step"] += 1
    if strategy is None:
        update = group["lr"] * _adam(G, state, group)
    else:
        frame = item.frame()
        basis = item.drawn_basis(state["refreshes"]) if strategy == "vlorp" else state["basis"]
        S = frame.down(G, basis)
        state["since"] += 1
        state["due"] = _due(S, state, group)
        if strategy == "vlorp":
            update = group["lr"] * _projfactor(S, lambda X: frame.up(X, basis).view(len(p), -1), state, group)
        else:
            update = frame.up(group["lr"] * group["scale"] * _adam(S, state, group), basis)
    p.sub_(update.view(p.shape))


@contextmanager
def _hooks(optimizer: GradientProjection, pieces: int, clip: float | None) -> Iterator[None]:
    """Hold the hooks that update each parameter in backward; see :meth:`GradientProjection.in_backward`."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several or pieces != 1 or clip is not None:
        got = "several processes" if several else f"pieces={pieces}, clip={clip}"
        raise ValueError(
            "in_backward updates a layer before the other gradients are known, so it needs one process, "
            f"pieces=1 and clip=None; got {got}; use step()"
        )
    items, done = {item.parameter: item for item in _items(optimizer)}, set()

    def update(parameter: Tensor) -> None:
        item = items[parameter]
        if parameter in done:
            raise ValueError(f"{item.name}: a second gradient in in_backward; use step() for accumulation")
        done.add(parameter)
        _prepare(optimizer, [item])
        _update(optimizer, item)
        parameter.grad = None

    for item in items.values():
        if item.parameter.grad is not None:
            raise ValueError(
                f"{item.name} has a gradient before in_backward; call zero_grad(), or step() for accumulation"
            )
    hooks = [p.register_post_accumulate_grad_hook(update) for p in items if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Frame(NamedTuple):
    """How a gradient is read as a matrix and projected: from the right (tall) or from the left."""

    rows: int
    columns: int
    tall: bool
    rank: int

    @property
    def side(self) -> int:
        return self.columns if self.tall else self.rows

    def down(self, G: Tensor, basis: Tensor) -> Tensor:
        return _product(G, basis) if self.tall else _product(basis.mT, G)

    def up(self, S: Tensor, basis: Tensor) -> Tensor:
        return _product(S, basis.mT) if self.tall else _product(basis, S)


@dataclass(frozen=True, eq=False)
class _Item:
    """A parameter, with its position in the optimizer, the name that errors give it, and its group."""

    number: int
    name: str
    parameter: Tensor
    group: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def frame(self) -> _Frame:
        """Return how this parameter's gradient is read; decided by shape and settings alone."""
        p, grain = self.parameter, self.group.get("grain", 1)
        if p.ndim < 2 or not p.numel():
            shape = tuple(p.shape)
            raise ValueError(f"{self.name}: a weight of shape {shape} cannot be projected; it needs two axes")
        N, D = len(p), p.numel() // len(p)
        tall, (c, d) = N >= D, Fraction(grain).limit_denominator(2**20).as_integer_ratio()  # 1/3 is a float
        if not tall:
            c, d = d, c
        if N * c % d or D * d % c:
            raise ValueError(
                f"{self.name}: grain must divide the short side of the {N}×{D} gradient, or 1/grain the long "
                f"one; got {grain}"
            )
        rows, columns = N * c // d, D * d // c
        return _Frame(rows, columns, tall, min(self.group["rank"], columns if tall else rows))

    def gradient(self) -> Tensor:
        """Return the gradient in the optimizer's precision, as the matrix that is projected where it is."""
        G = self.parameter.grad.to(self.dtype)
        return G if self.group["strategy"] is None else G.reshape(self.frame()[:2])

    def generator(self, draw: int) -> Generator:
        """Return a generator on the CPU for one draw; the numbers are mixed as SplitMix64 does it."""
        x = 0
        for part in (self.group["seed"], self.number, draw):
            x = (x + part + 0x9E3779B97F4A7C15) % 2**64
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
            x ^= x >> 31
        return Generator().manual_seed(x)

    def new_basis(self, draw: int) -> Tensor:
        """Return orthonormal columns (K, r) for the present gradient.

        Singular vectors have no sign, but moments that are kept would feel it: in each column the entry of
        largest magnitude is positive.
        """
        frame, strategy, generator = self.frame(), self.group["strategy"], self.generator(draw)
        # (K, L): its left vectors are eigenvectors, and so orthonormal even where G has a smaller rank. The
        # right ones of a square G are not.
        X = self.gradient().mT if frame.tall else self.gradient()
        if strategy == "galore":
            P = truncated_svd(X, frame.rank)[0]
        elif strategy == "random":
            entries = torch.randn(frame.side, frame.rank, generator=generator, dtype=torch.float64)
            P = torch.linalg.qr(entries).Q
        else:
            sketch = self.group["oversample"], self.group["iterations"]
            P = _sketched_vectors(X, frame.rank, *sketch, generator)
        P = P * P.gather(0, P.abs().argmax(dim=0, keepdim=True)).sign()
        return P.to(X).contiguous()

    def drawn_basis(self, draw: int) -> Tensor:
        """Return VLoRP's B, (side, r), with entries of mean 0 and variance 1/r, the same each time."""
        frame, generator = self.frame(), self.generator(draw)
        shape = (frame.side, frame.rank)
        if self.group["distribution"] == "sign":
            B = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
        else:
            B = torch.randn(shape, generator=generator)
        return B.to(self.parameter.device, self.dtype) / math.sqrt(frame.rank)


def _sketched_vectors(X: Tensor, rank: int, oversample: int, iterations: int, generator: Generator) -> Tensor:
    """Return approximate leading left singular vectors of a K×L matrix, (K, r), float64.

    Source: Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    X = X / X.abs().max().clamp(min=torch.finfo(X.dtype).tiny)  # tiny gradients have products that vanish
    samples = min(rank + oversample, len(X))
    Q = torch.linalg.qr(_product(X, torch.randn(X.shape[1], samples, generator=generator).to(X))).Q  # (K, s)
    for _ in range(iterations):
        Z = torch.linalg.qr(_product(X.mT, Q)).Q  # (L, s)
        Q = torch.linalg.qr(_product(X, Z)).Q
    return Q.double() @ truncated_svd(_product(Q.mT, X), rank)[0]


def _due(S: Tensor, state: dict[str, Any], group: dict[str, Any]) -> bool:
    """Return whether the next step needs a new basis.

    Of Lotus this is the test of algorithm 1, not the one of the paper's text, which no published threshold
    fits. Our reading: n is 1 after the step that made the basis, the next step switches, and a zero gradient
    counts as no movement.
    """
    if "every" in group:
        return state["step"] % group["every"] == 0
    n, first = state["since"], state["first"]
    if n > 1 and n % group["check"]:
        return False
    size = _size(S)
    direction = S / size.where(size > 0, 1.0)
    if n == 1:
        first.copy_(direction)
    if n % group["check"]:
        return False
    moved = _size(direction - first).item() if size > 0 and first.any() else 0.0
    return moved / n < group["threshold"]


def _adam(S: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Advance Adam's moments and return U."""
    (beta1, beta2), t = group["betas"], state["step"]
    m = state["exp_avg"].lerp_(S, 1 - beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(S, S, value=1 - beta2)
    return (m / (1 - beta1**t)) / (v / (1 - beta2**t)).sqrt_().add_(group["eps"])


def _projfactor(
    S: Tensor, up: Callable[[Tensor], Tensor], state: dict[str, Any], group: dict[str, Any]
) -> Tensor:
    """Advance VLoRP's first moment, in the subspace, and the sums of the second; return the update."""
    (beta1, beta2), t = group["betas"], state["step"]
    m = state["exp_avg"].lerp_(S, 1 - beta1)
    square = up(S).square()  # (N, D)
    row = state["row"].lerp_(square.sum(dim=1), 1 - beta2)
    col = state["col"].lerp_(square.sum(dim=0), 1 - beta2)
    total = row.sum()
    V = torch.outer(row / total.where(total > 0, 1.0), col)  # 0, not 0/0, where no gradient came yet
    return up(math.sqrt(1 - beta2**t) / (1 - beta1**t) * m) / V.sqrt_().add_(group["eps"])


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Return A·B in the precision of both, also within an autocast block."""
    with torch.autocast(A.device.type, enabled=False):
        return A @ B


def _size(matrix: Tensor) -> Tensor:
    """Return the Frobenius norm, in float64."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64)
