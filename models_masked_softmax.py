"""A control for LION: softmax attention with LION's mask of decays.

`y = softmax(q k^T / sqrt(D) + log M) v` with the mask M of `models_lion.py`; without decays, in
`Lit`, plain softmax attention. What it has over LION is the softmax's, what it has over plain
attention is the mask's. Time and memory are quadratic, and there is the format `Attention` alone.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from models_lion import (
    SIZES,
    LionAttention,
    LionBlock,
    LionVisionTransformer,
    Masks,
    create_variant,
    decay_mask,
    imagenet_cfg,
)


class MaskedSoftmaxAttention(LionAttention):
    """Token mixer with LION's parameters and masks, but the weights of a softmax."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, feature_map=False, **kwargs)

    def set_format(self, format: str, chunk_size: int | None = None) -> None:
        super().set_format(format, chunk_size)
        if format != "Attention":
            raise ValueError(f"Masked softmax has no format {format}: use Attention.")

    def _has_kernel(self, x: Tensor) -> bool:
        return False

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, *, normalise: bool | None = None
    ) -> Tensor:
        if masks.valid is not None or masks.documents is not None:
            raise ValueError("Masked softmax knows no padding and no documents: give neither.")
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
        if masks.log_decay is not None:
            curves = self._curves(masks.attn_mask)
            scores = scores + decay_mask(masks.log_decay, curves).log()
        return scores.softmax(-1).to(v.dtype) @ v


class MaskedSoftmaxBlock(LionBlock):
    mixer_class = MaskedSoftmaxAttention


class MaskedSoftmaxVisionTransformer(LionVisionTransformer):
    """LION's vision transformer around these mixers, with the same arguments."""

    block_class = MaskedSoftmaxBlock


default_cfgs = generate_default_cfgs(
    {f"lion_softmax_{size}_patch16_224": imagenet_cfg() for size in SIZES}
)


@register_model
def lion_softmax_tiny_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> MaskedSoftmaxVisionTransformer:
    return create_variant(
        MaskedSoftmaxVisionTransformer, "lion_softmax_tiny_patch16_224", pretrained, **kwargs
    )


@register_model
def lion_softmax_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> MaskedSoftmaxVisionTransformer:
    return create_variant(
        MaskedSoftmaxVisionTransformer, "lion_softmax_small_patch16_224", pretrained, **kwargs
    )


@register_model
def lion_softmax_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> MaskedSoftmaxVisionTransformer:
    return create_variant(
        MaskedSoftmaxVisionTransformer, "lion_softmax_base_patch16_224", pretrained, **kwargs
    )
