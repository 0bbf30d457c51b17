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
    """BERT's mixer, through PyTorch's fused attention; same interface as `LionAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        q, k, v = rearrange(
            self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads
        )
        mask = self._mask(valid, documents)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))

    @staticmethod
    def _mask(valid: Tensor | None, documents: Tensor | None) -> Tensor | None:
        """Which keys `[B, 1, N or 1, N]` each query sees; None is all."""
        mask = None if valid is None else valid[:, None, None]
        if documents is None:
            return mask
        together = (documents[:, :, None] == documents[:, None])[:, None]
        if mask is None:
            return together
        itself = torch.eye(documents.shape[1], dtype=torch.bool, device=documents.device)
        return together & mask | itself  # no softmax over nothing, even at padding


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
        num_prefix_tokens=0,
        normalise=config.normalize,
        feature_map=config.feature_map,
    )


# A mixer takes `(x, valid=, documents=)`, `[B, N, C]` with bool and integer `[B, N]`, or None.
MIXERS: dict[str, Callable[[PreTrainedConfig], nn.Module]] = {
    "softmax": lambda config: SoftmaxAttention(config.hidden_size, config.num_attention_heads),
    "lion-lit": partial(_lion, "Lit"),
    "lion-d": partial(_lion, "Decay"),
    "lion-s": partial(_lion, "Selective"),
    "hydra": lambda config: HydraAttention(config.hidden_size, config.num_attention_heads),
}
ORDER_BLIND = ("softmax", "lion-lit")  # mixers that tell no position from another by themselves


def positions(valid: Tensor, documents: Tensor | None) -> Tensor:
    """Number of each token `[B, N]` in its document, padding not counted."""
    count = valid.cumsum(1) - valid.long()  # tokens before
    if documents is None:
        return count
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return count - (count * starts).cummax(1).values
