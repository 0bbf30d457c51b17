"""torch.compile of a model in place, whose weights keep their names, and of augmentation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record what a model launches
# Blocks share a cache. Where their rates of stochastic depth differ, each has entries of its own:
# in training, in evaluation, and for another size of batch, or any, in each.
ENTRIES = 4


def compile_in_place(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> None:
    """Compiles each of `model.blocks` by itself, else the whole model.

    The whole, too, for CUDA graphs. With blocks of their own, DDP averages the gradients of one
    while those of the next are computed. To be called behind `World.distributed`, with the model
    that was given there.
    """
    blocks = getattr(model, "blocks", None)
    parts, by_block = [model], False
    if isinstance(blocks, nn.ModuleList | nn.Sequential) and mode not in CUDA_GRAPHS:
        parts, by_block = list(blocks), True
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, ENTRIES * len(parts))
    if by_block:
        config.optimize_ddp = False  # it would cut a block where DDP's buckets end
    for part in parts:
        part.compile(backend=backend, mode=mode)


def compile_augmentation(
    transform: Callable[[Tensor], Tensor], backend: str = "inductor"
) -> Callable[[Tensor], Tensor]:
    """In few kernels, with the random numbers that `transform` draws by itself."""
    options = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(transform, backend=backend, options=options)
