"""What takes the place of attention in an encoder: LION, Hydra, and softmax attention itself."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models_hydra import HydraMixer
from models_lion import LionAttention


class SoftmaxAttention(nn.Module):
    """BERT's mixer, through PyTorch's fused attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """`[B, N, C]`; what `mask` and `rotation` are, `context` says."""
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        if rotation is not None:
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


class HydraAttention(HydraMixer):
    """Hydra's mixer, to which every document is handed alone, in a row of its own."""

    def forward(  # type: ignore[override]  # of the masks it takes these two
        self, x: Tensor, *, valid: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        if valid is None and documents is None:
            return super().forward(x)
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        column = positions(valid, documents)[valid]
        row = (column == 0).cumsum(0) - 1
        filled = valid.new_zeros(int((column == 0).sum()), x.shape[1])
        filled[row, column] = True
        rows = x.new_zeros(*filled.shape, x.shape[2])
        rows[row, column] = x[valid]
        mixed = super().forward(rows, valid=filled)
        y = mixed.new_zeros(x.shape)
        y[valid] = mixed[row, column]
        return y


def _lion(mask_type: str, config: PreTrainedConfig) -> LionAttention:
    return LionAttention(
        config.hidden_size,
        config.num_attention_heads,
        mask_type=mask_type,
        format=config.format,
        chunk_size=config.chunk_size,
        decay_init=config.decay_init,
        num_prefix_tokens=0,
        normalise=config.normalize,
        feature_map=config.feature_map,
    )


def _softmax(config: PreTrainedConfig) -> SoftmaxAttention:
    dim, heads = config.hidden_size, config.num_attention_heads
    if dim % heads:
        raise ValueError(f"The width {dim} is not divisible by {heads} heads.")
    if config.mixer == "softmax-rope" and dim // heads % 2:
        raise ValueError(f"softmax-rope needs heads of an even width, not {dim // heads}.")
    return SoftmaxAttention(dim, heads)


# A mixer takes `[B, N, C]` and, by their names, what `context` gives.
MIXERS: dict[str, Callable[[PreTrainedConfig], nn.Module]] = {
    "softmax": _softmax,
    "softmax-rope": _softmax,
    "softmax-alibi": _softmax,
    "lion-lit": partial(_lion, "Lit"),
    "lion-d": partial(_lion, "Decay"),
    "lion-s": partial(_lion, "Selective"),
    "hydra": lambda config: HydraAttention(config.hidden_size, config.num_attention_heads),
}
ROPE_BASE = 10_000  # of the angles of softmax-rope
ORDER_BLIND = ("softmax", "lion-lit")  # mixers that tell no position from another by themselves


def context(
    config: PreTrainedConfig,
    valid: Tensor | None,
    documents: Tensor | None,
    positions: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor | None]:
    """What the mixers need to know of the tokens `[B, N]`, computed once for all layers.

    LION and Hydra take `valid` (bool) and `documents` (integers), or None. Softmax attention takes
    its `mask`: which keys `[B, 1, N or 1, N]` each query sees, None for all, or with ALiBi the bias
    `[B or 1, H, N, N]` of `dtype`; and with rotary embedding the `rotation`
    `[2, B or 1, 1, N, D / 2]`. `positions` number the tokens; they are `[1, N]` where all rows are
    alike.
    """
    if not config.mixer.startswith("softmax"):
        return {"valid": valid, "documents": documents}
    mask = _visible(valid, documents)
    if config.mixer == "softmax-alibi":
        mask = _alibi(config.num_attention_heads, positions, mask, dtype)
    if config.mixer != "softmax-rope":
        return {"mask": mask}
    width = config.hidden_size // config.num_attention_heads
    return {"mask": mask, "rotation": _rotation(width, positions)}


def _visible(valid: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """Which keys `[B, 1, N or 1, N]` each query sees; None is all."""
    mask = None if valid is None else valid[:, None, None]
    if documents is None:
        return mask
    together = (documents[:, :, None] == documents[:, None])[:, None]
    if mask is None:
        return together
    itself = torch.eye(documents.shape[1], dtype=torch.bool, device=documents.device)
    return together & mask | itself  # no softmax over nothing, even at padding


def _alibi(heads: int, positions: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scores fall by the distance, to both sides, times 2^(-8 h / H) in head h of 1 to H."""
    slopes = torch.arange(1, heads + 1, device=positions.device).mul(-8 / heads).exp2().to(dtype)
    distance = (positions[:, None, :, None] - positions[:, None, None]).abs().to(dtype)
    bias = -slopes[:, None, None] * distance
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _rotation(width: int, positions: Tensor) -> Tensor:
    """Cosines and sines of the angles by which positions turn the pairs of a head's features."""
    exponents = torch.arange(0, width, 2, device=positions.device) / width
    angles = positions[:, None, :, None] * ROPE_BASE**-exponents
    return torch.stack([angles.cos(), angles.sin()])


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    (cos, sin), (first, second) = rotation, x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).type_as(x)


def positions(valid: Tensor, documents: Tensor | None) -> Tensor:
    """Number of each token `[B, N]` in its document, padding not counted."""
    count = valid.cumsum(1) - valid.long()  # tokens before
    if documents is None:
        return count
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return count - (count * starts).cummax(1).values
