"""torch.compile of a model in place, whose weights keep their names, and of augmentation."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from errors import UserError

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that record what a model launches
# Blocks share a cache. Where they differ, each has entries of its own: in training, in evaluation,
# and for another size of batch, or any, in each.
ENTRIES = 4


class StochasticDepth(nn.Module):
    """timm's DropPath, but the rate is a tensor: to the compiler, blocks of any rate are alike."""

    keep: Tensor

    def __init__(self, rate: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1 - rate, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, ...]`, of which each sample is dropped or divided by the share that is kept."""
        if not self.training:
            return x
        drawn = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
        return x * torch.where(drawn < self.keep, 1 / self.keep, 0.0).to(x.dtype)


def check_compiler(backend: str | None, mode: str | None) -> None:
    """Raises UserError for a compiler that is not there, or a mode that it does not have."""
    if backend and backend not in (*torch._dynamo.list_backends(), "eager", "aot_eager"):
        raise UserError(f"There is no compiler {backend!r}: use --torchcompile alone.")
    if mode is None:
        return
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise UserError(f"There is no --torchcompile-mode {mode!r}: use {', '.join(modes)}.")
    if backend is None:
        raise UserError(f"--torchcompile-mode {mode} goes with --torchcompile: add it.")
    if mode != "default" and backend != "inductor":
        raise UserError(f"--torchcompile {backend} has no modes: leave --torchcompile-mode out.")


def compile_in_place(
    model: nn.Module, backend: str = "inductor", mode: str | None = None, **options: Any
) -> None:
    """Compiles each of `model.blocks` by itself, else the whole model.

    The whole, too, for CUDA graphs. With blocks of their own, DDP averages the gradients of one
    while those of the next are computed. To be called behind `World.distributed`, with the model
    that was given there. `options` are more of torch.compile's.
    """
    blocks = getattr(model, "blocks", None)
    parts, by_block = [model], False
    if isinstance(blocks, nn.ModuleList | nn.Sequential) and mode not in CUDA_GRAPHS:
        parts, by_block = list(blocks), True
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, ENTRIES * len(parts))
    if by_block:
        config.optimize_ddp = False  # it would cut a block where DDP's buckets end
        _make_alike(parts)
    for part in parts:
        part.compile(backend=backend, mode=mode, **options)


def _make_alike(blocks: Sequence[nn.Module]) -> None:
    """Otherwise each block with a rate of its own compiles, and looks through all the others'."""
    modules = [dict(block.named_modules()) for block in blocks]
    places = {name for found in modules for name, part in found.items() if type(part) is DropPath}
    for block, found in zip(blocks, modules, strict=True):
        device = next(block.parameters()).device
        for name in places:
            part = found.get(name)
            if isinstance(part, DropPath | nn.Identity):  # timm's blocks have that for a rate of 0
                depth = StochasticDepth(getattr(part, "drop_prob", 0.0), device)
                block.set_submodule(name, depth.train(part.training))


def begin_step() -> None:
    """Lets CUDA graphs, if there are any, overwrite what they gave out in the step before."""
    if "torch._inductor.cudagraph_trees" in sys.modules:  # whose import takes seconds
        torch.compiler.cudagraph_mark_step_begin()


def compile_augmentation(
    transform: Callable[[Tensor], Tensor], backend: str = "inductor"
) -> Callable[[Tensor], Tensor]:
    """In few kernels, with the random numbers that `transform` draws by itself."""
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(transform, backend=backend, options=options)
