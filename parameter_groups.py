"""Parameters that learn at their own rate and with their own weight decay."""

from collections.abc import Iterable

import torch
from torch import nn


def set_apart(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    *,
    lr_scale: float = 1.0,
    weight_decay: float | None = None,
) -> None:
    """Moves `parameters` of a new optimiser to groups of their own, behind the others.

    `lr_scale` is what timm's schedules multiply their learning rate by. `weight_decay` is for those
    that have any; None leaves it as it is.
    """
    chosen = set(parameters)
    for group in list(optimizer.param_groups):
        apart = [p for p in group["params"] if p in chosen]
        if not apart:
            continue
        group["params"] = [p for p in group["params"] if p not in chosen]
        own = {**group, "params": apart, "lr_scale": group.get("lr_scale", 1.0) * lr_scale}
        if weight_decay is not None and group["weight_decay"]:
            own["weight_decay"] = weight_decay
        optimizer.add_param_group(own)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
