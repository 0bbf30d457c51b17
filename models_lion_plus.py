"""LION with what the paper's model does not have, each off by default: `plus` names some of

- `conv`: a depthwise 3 x 3 convolution over the grid of patches, beside the mixer;
- `gate`: an output gate, `sigmoid(W x + b)` times what is projected;
- `rope`: a rotary embedding of queries and keys in the numerator, by rows and columns. The
  denominator stays without it, hence positive. It runs in plain PyTorch, in every format.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from models_lion import (
    SIZES,
    LionAttention,
    LionBlock,
    LionVisionTransformer,
    Masks,
    create_variant,
    imagenet_cfg,
)

PLUS = ("conv", "gate", "rope")


class Place(NamedTuple):
    """Where patches are: curves `[C, N]`, (h, w), and rotary embedding `[h * w, 2 * head_dim]`."""

    curves: Tensor | None
    grid: tuple[int, int]
    angles: Tensor | None


class LionPlusAttention(LionAttention):
    """As LionAttention, with parameters `conv` and `gate` where these are asked for.

    The `attn_mask` of its calls is a `Place`.
    """

    def __init__(self, dim: int, num_heads: int, *, plus: Sequence[str] = (), **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        placed: dict[str, Any] = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.rotates = "rope" in plus
        if self.rotates and self.head_dim % 4:
            raise ValueError(f"rope needs heads of a multiple of 4 wide, not {self.head_dim}.")
        conv = partial(nn.Conv2d, dim, dim, 3, padding=1, groups=dim, **placed)
        self.conv = conv() if "conv" in plus else None
        self.gate = nn.Linear(dim, dim, **placed) if "gate" in plus else None

    def _curves(self, attn_mask: Place | None) -> Tensor | None:
        return super()._curves(attn_mask and attn_mask.curves)

    def _has_kernel(self, x: Tensor) -> bool:
        return not self.rotates and super()._has_kernel(x)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, *, normalise: bool | None = None
    ) -> Tensor:
        if not self.rotates:
            return super()._attend(q, k, v, masks, normalise=normalise)
        attend = partial(super()._attend, masks=masks, normalise=False)
        angles = masks.attn_mask.angles
        numerator = attend(self._rotated(q, angles), self._rotated(k, angles), v)
        if not (self.normalise if normalise is None else normalise):
            return numerator
        denominator = attend(q, k, torch.ones_like(v[..., :1]))
        return numerator / (denominator + self.eps)

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        prefix, patches = x.tensor_split([self.num_prefix_tokens], 2)
        return torch.cat([prefix, apply_rot_embed_cat(patches, angles).to(x.dtype)], 2)

    def _completed(self, y: Tensor, x: Tensor, attn_mask: Any) -> Tensor:
        if self.conv is not None:
            prefix = self.num_prefix_tokens
            patches = x[:, prefix:].mT.unflatten(2, attn_mask.grid)
            y = y + F.pad(self.conv(patches).flatten(2).mT, (0, 0, prefix, 0))
        return y if self.gate is None else y * self.gate(x).sigmoid()


class LionPlusBlock(LionBlock):
    mixer_class = LionPlusAttention


class LionPlusVisionTransformer(LionVisionTransformer):
    """As LionVisionTransformer; `plus` names some of `PLUS`.

    Raises ValueError for others, and for `conv` or `rope` with a patch_drop_rate.
    """

    block_class = LionPlusBlock

    def __init__(self, *args: Any, plus: Sequence[str] = (), **kwargs: Any):
        if unknown := [name for name in plus if name not in PLUS]:
            raise ValueError(f"Unknown plus {unknown[0]!r}: choose some of {', '.join(PLUS)}.")
        if kwargs.get("patch_drop_rate") and {"conv", "rope"} & set(plus):
            raise ValueError("conv and rope need every patch: leave patch_drop_rate at 0.")
        super().__init__(*args, **kwargs, more_of_mixer={"plus": tuple(plus)})

    def _curves_for(self, x: Tensor) -> Any:
        grid = tuple(self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        mixer, angles = self.blocks[0].attn, None
        if mixer.rotates:
            sines_and_cosines = build_rotary_pos_embed(
                list(grid), dim=mixer.head_dim, in_pixels=False, device=x.device
            )
            angles = torch.cat(sines_and_cosines, -1)
        return Place(super()._curves_for(x), grid, angles)


default_cfgs = generate_default_cfgs(
    {f"lion_plus_{size}_patch16_224": imagenet_cfg() for size in SIZES}
)


@register_model
def lion_plus_tiny_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionPlusVisionTransformer:
    return create_variant(
        LionPlusVisionTransformer, "lion_plus_tiny_patch16_224", pretrained, **kwargs
    )


@register_model
def lion_plus_small_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionPlusVisionTransformer:
    return create_variant(
        LionPlusVisionTransformer, "lion_plus_small_patch16_224", pretrained, **kwargs
    )


@register_model
def lion_plus_base_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionPlusVisionTransformer:
    return create_variant(
        LionPlusVisionTransformer, "lion_plus_base_patch16_224", pretrained, **kwargs
    )
