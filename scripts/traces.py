"""What happens in a LION model while it looks at an image."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curves import scan_curves
from pretrained import Pretrained


@dataclass(frozen=True)
class Choice:
    """What to draw, counted from 1: layers, heads, and (row, column) of the query's patch."""

    layers: list[int]
    heads: list[int]
    query: tuple[int, int]


@dataclass(frozen=True)
class Trace:
    """All layers, on one image, with P patches among the N tokens.

    Attributes:
        pixels: the image as the model sees it, `[height, width, 3]` in [0, 1].
        prediction: the most likely class and its probability, in words.
        grid: rows and columns of patches.
        prefix: tokens before the patches.
        weights: effective attention `[depth, heads, N, N]`.
        decays: `[depth, curves, heads, P]`; None for LION-Lit.
        selective: whether decays depend on the image.
        order: name of the order of the curves; `curves` are their patches, `[curves, P]`.
    """

    pixels: Tensor
    prediction: str
    grid: tuple[int, int]
    prefix: int
    weights: Tensor
    decays: Tensor | None
    selective: bool
    order: str
    curves: Tensor

    def attention_of(self, layer: int, head: int, query: tuple[int, int]) -> Tensor:
        """Weights `[rows, columns]` of the patches in what the query's patch becomes.

        Numbers count from 1. What is missing to a sum of 1 went to the prefix tokens.
        """
        row, column = query
        token = self.prefix + (row - 1) * self.grid[1] + column - 1
        return self.weights[layer - 1, head - 1, token, self.prefix :].view(self.grid)


@torch.inference_mode()
def trace(trained: Pretrained, pixels: Tensor) -> Trace:
    """What the model does with the normalised image `[3, height, width]`."""
    model, images = trained.model, trained.images
    weights, decays = [], []

    def note(mixer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor | None]) -> None:
        (tokens,) = inputs
        weights.append(mixer.attention_weights(tokens, named["attn_mask"])[0])
        decay = mixer.log_decay(tokens)
        decays.append(None if decay is None else decay[:, 0, :, mixer.num_prefix_tokens :].exp())

    hooks = [block.attn.register_forward_pre_hook(note, with_kwargs=True) for block in model.blocks]
    try:
        shares = model(pixels[None]).softmax(1)[0]
    finally:
        for hook in hooks:
            hook.remove()
    best = int(shares.argmax())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    grid = tuple(model.patch_embed.grid_size)
    along = scan_curves(model.order, grid)
    return Trace(
        pixels=(pixels * std + mean).clamp(0, 1).permute(1, 2, 0),
        prediction=f"{trained.class_names[best]}, {100 * shares[best]:.0f} %",
        grid=grid,
        prefix=model.num_prefix_tokens,
        weights=torch.stack(weights),
        decays=None if decays[0] is None else torch.stack(decays),
        selective=model.blocks[0].attn.mask_type == "Selective",
        order=model.order,
        curves=torch.arange(grid[0] * grid[1])[None] if along is None else along,
    )
