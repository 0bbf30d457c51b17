"""Vim (Zhu et al., arXiv 2401.09417): vision models of bidirectional Mamba mixers alone.

No attention and no MLP: each block is a mixer after an RMSNorm, with one selective scan per
direction. The head reads the class token, which the mixers find in the middle of the sequence; to
the rest of the model it is the first token, as timm has it. The stream between the blocks is
float32 under autocast.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models_lion import SIZES, check_class_token, imagenet_cfg
from state_space import draw_step_bias, selective_scan


class VimScan(nn.Module):
    """One direction of the mixer: `x`, `z` `[B, N, C]` in its order -> `[B, N, C]`."""

    def __init__(self, channels: int, rank: int, state_size: int, **placed: Any):
        super().__init__()
        self.split_projected = (rank, state_size, state_size)
        self.conv = nn.Conv1d(channels, channels, 4, padding=3, groups=channels, **placed)
        self.x_proj = nn.Linear(channels, sum(self.split_projected), bias=False, **placed)
        self.dt_proj = nn.Linear(rank, channels, **placed)
        self.A_log = nn.Parameter(torch.empty(channels, state_size, **placed))
        self.D = nn.Parameter(torch.empty(channels, **placed))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Decays and steps; timm, which comes first, initialises the other linear layers."""
        channels, state_size = self.A_log.shape
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        self.dt_proj.bias.copy_(draw_step_bias(channels))
        self.A_log.copy_(torch.arange(1, state_size + 1).log().expand(channels, -1))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        x = F.silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        projected = self.x_proj(x)
        with torch.autocast(x.device.type, enabled=False):  # steps and states keep float32
            wide = torch.promote_types(x.dtype, torch.float32)
            delta, b, c = projected.split(self.split_projected, -1)
            weight, bias = self.dt_proj.weight.to(wide), self.dt_proj.bias.to(wide)
            delta = F.softplus(F.linear(delta.to(wide), weight, bias))
            y = selective_scan(x, delta, -self.A_log.to(wide).exp(), b, c)
        return (y + self.D.to(x.dtype) * x) * F.silu(z)


class VimMixer(nn.Module):
    """Token mixer: `[B, N, dim]` -> `[B, N, dim]`, the mean of a scan in each direction.

    The scans meet the first `num_prefix_tokens` tokens in the middle of the others.
    """

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        num_prefix_tokens: int = 1,
        proj_drop: float = 0.0,
        **placed: Any,
    ):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.num_prefix_tokens = num_prefix_tokens
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **placed)
        self.forward_scan = VimScan(inner, rank, state_size, **placed)
        self.backward_scan = VimScan(inner, rank, state_size, **placed)
        self.out_proj = nn.Linear(inner, dim, bias=False, **placed)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        half = (x.shape[1] - prefix) // 2
        x = _swapped(x, prefix, half)
        x, z = self.in_proj(x).chunk(2, -1)
        y = self.forward_scan(x, z) + self.backward_scan(x.flip(1), z.flip(1)).flip(1)
        return self.proj_drop(_swapped(self.out_proj(y / 2), half, prefix))


class VimBlock(nn.Module):
    """`x + mixer(norm(x))`, in place of timm's Block; heads and MLP have no meaning here."""

    def __init__(
        self,
        dim: int,
        *,
        num_prefix_tokens: int,
        norm_layer: Any,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unused: Any,
    ):
        super().__init__()
        refused = [n for n in ("qk_norm", "attn_drop", "init_values") if unused.get(n)]
        if refused:
            raise ValueError(f"Vim has no {', '.join(refused)}: leave it at its default.")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = norm_layer(dim, **placed)
        self.attn = VimMixer(
            dim, num_prefix_tokens=num_prefix_tokens, proj_drop=proj_drop, **placed
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(self.norm(x)))


def _swapped(x: Tensor, first: int, second: int) -> Tensor:
    """Tokens `[B, N, dim]` with the first `first` and the next `second` of them exchanged."""
    head, next_, rest = x.split((first, second, x.shape[1] - first - second), 1)
    return torch.cat([next_, head, rest], 1)


class VimVisionTransformer(VisionTransformer):
    """timm's VisionTransformer around Vim's blocks."""

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"*.A_log"}


class VimVisionTransformerDistilled(VisionTransformerDistilled):
    """With DeiT's distillation token, beside the class token in the middle, and its head."""

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"*.A_log"}


default_cfgs = generate_default_cfgs(
    {
        **{f"vim_{size}_patch16_224": imagenet_cfg() for size in SIZES},
        **{
            f"vim_{size}_distilled_patch16_224": imagenet_cfg(classifier=("head", "head_dist"))
            for size in SIZES
        },
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    check_class_token(**kwargs)
    distilled = "distilled" in variant
    prefix = kwargs.get("class_token", True) + kwargs.get("reg_tokens", 0) + distilled
    defaults = {
        "patch_size": 16,
        "embed_dim": SIZES[variant.split("_")[1]][0],
        "depth": 24,
        "norm_layer": partial(nn.RMSNorm, eps=1e-5),
        "block_fn": partial(VimBlock, num_prefix_tokens=prefix),
    }
    return build_model_with_cfg(
        VimVisionTransformerDistilled if distilled else VimVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VimVisionTransformer:
    return _create("vim_tiny_patch16_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VimVisionTransformer:
    return _create("vim_small_patch16_224", pretrained, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VimVisionTransformer:
    return _create("vim_base_patch16_224", pretrained, **kwargs)


@register_model
def vim_tiny_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VimVisionTransformerDistilled:
    return _create("vim_tiny_distilled_patch16_224", pretrained, **kwargs)


@register_model
def vim_small_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VimVisionTransformerDistilled:
    return _create("vim_small_distilled_patch16_224", pretrained, **kwargs)


@register_model
def vim_base_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VimVisionTransformerDistilled:
    return _create("vim_base_distilled_patch16_224", pretrained, **kwargs)
