"""What changes the weights: optimisers, their groups, the moving average and clipping."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from errors import UserError, first_line

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # whose step can be one kernel
COUNTERS = ("lookahead_step",)  # of groups, from their start: state among hyperparameters


def create_optimizer(
    model: nn.Module, device: torch.device, *, opt: str, **options: Any
) -> torch.optim.Optimizer:
    """timm's optimiser of this name for a model, fused where it can be on a GPU."""
    if device.type == "cuda" and can_be_fused(opt):
        options["fused"] = True
    return create_optimizer_v2(model, opt=opt, **options)


def can_be_fused(opt: str) -> bool:
    """Whether timm's optimiser of this name, `lookahead_` before it or not, has a fused step.

    Raises ValueError where there is none of this name.
    """
    return get_optimizer_class(opt.lower().split("_")[-1], bind_defaults=False) in FUSED


def set_apart(
    optimizer: torch.optim.Optimizer,
    named_parameters: Mapping[str, nn.Parameter],
    *,
    lr_scale: float = 1.0,
    weight_decay: float | None = None,
) -> None:
    """Moves parameters of a new optimiser to groups of their own, behind the others.

    `lr_scale` is what timm's schedules multiply their learning rate by. `weight_decay` is for all
    but biases; None leaves it as it is.
    """
    chosen = set(named_parameters.values())
    biases = {p for name, p in named_parameters.items() if name.endswith("bias")}
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if p in chosen]
        group["params"] = [p for p in group["params"] if p not in chosen]
        own = {**group, "lr_scale": group.get("lr_scale", 1.0) * lr_scale}
        if weight_decay is not None:
            decayed = {**own, "weight_decay": weight_decay}
            _add_group(optimizer, [p for p in apart if p not in biases], decayed)
            apart = [p for p in apart if p in biases]
        _add_group(optimizer, apart, own)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _add_group(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], group: dict[str, Any]
) -> None:
    if parameters:
        optimizer.add_param_group({**group, "params": parameters})


class MovingAverage(ModelEmaV3):
    """timm's moving average of a model, whose tensors are looked up once and not in every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pairs: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:  # the average is on another device
            super().apply_update_(model, decay)
            return
        if not self._pairs:
            average, weights = (m.state_dict(keep_vars=True) for m in (self.module, model))
            for floating in (True, False):
                names = [n for n, t in average.items() if t.is_floating_point() is floating]
                self._pairs[floating] = [average[n] for n in names], [weights[n] for n in names]
        torch._foreach_lerp_(*self._pairs[True], weight=1 - decay)
        if self._pairs[False][0]:
            torch._foreach_copy_(*self._pairs[False])


def clip_gradients(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Norm of all gradients, before they are scaled so that it is at most `max_norm`, if given."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The run's: with layer decay, groups have its product with their `lr_scale`."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, source: str | Path) -> None:
    """Load the state of an optimiser, read from `source`, whose own hyperparameters stay.

    Raises:
        UserError: it is the state of another kind of optimiser, or of other weights.
    """
    try:
        optimizer.load_state_dict(state_for(optimizer, state))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The optimiser state of {source} does not fit ({first_line(error)}): resume with the "
            "optimiser and the arguments of its run, or start from its weights."
        ) from error


def state_for(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """The state of another optimiser with this one's hyperparameters, laid out as its weights."""
    of_saved = ("params", *COUNTERS)
    own = [{k: v for k, v in g.items() if k not in of_saved} for g in optimizer.param_groups]
    saved = state["param_groups"]
    # Before the state, for `fused` decides where it is held.
    groups = [{**theirs, **mine} for theirs, mine in zip(saved, own, strict=False)]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    values = dict(state["state"])
    for number, parameter in zip(numbers, parameters, strict=False):
        kept = values.get(number, {})
        values[number] = {name: _laid_out_like(parameter, value) for name, value in kept.items()}
    return {**state, "state": {n: v for n, v in values.items() if v},
            "param_groups": groups + saved[len(groups) :]}  # fmt: skip


def _laid_out_like(parameter: torch.Tensor, value: Any) -> Any:
    """A tensor of its shape with the strides of `parameter`, as fused optimisers ask for."""
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    if value.stride() == parameter.stride():
        return value
    return torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)
