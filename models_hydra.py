"""Hydra (Hwang et al., arXiv 2407.09941): vision transformers with a quasiseparable mixer.

The mixer is the sum of two strictly triangular state space products, one per direction, and a
diagonal that depends on the token. The transformer around it is timm's ViT as it stands, with its
position embedding; the head reads the class token.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models_lion import SIZES, check_class_token, imagenet_cfg
from state_space import draw_step_bias, semiseparable_product


class HydraMixer(nn.Module):
    """Token mixer with the interface of timm's attention: `[B, N, dim]` -> `[B, N, dim]`.

    Twice as wide inside as outside, it has `2 * num_heads` heads of width `dim / num_heads`. Its
    linear layers have no biases, whatever `qkv_bias` and `proj_bias` say.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        state_size: int = 64,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ):
        super().__init__()
        refused = [n for n in ("qk_norm", "attn_drop", "scale_norm") if attention.get(n)]
        if refused:
            raise ValueError(f"Hydra has no {', '.join(refused)}: leave it at its default.")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"The width {dim} is not divisible by {num_heads} heads.")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, heads = 2 * dim, 2 * num_heads
        mixed = inner + 4 * state_size
        self.heads = heads
        self.split_projected = (inner, mixed, 2 * heads)
        self.split_mixed = (inner, *4 * (state_size,))
        self.in_proj = nn.Linear(dim, sum(self.split_projected), bias=False, **placed)
        self.conv = nn.Conv1d(mixed, mixed, 7, padding=3, groups=mixed, **placed)
        self.dt_bias = nn.Parameter(torch.empty(heads, **placed))
        self.A_log = nn.Parameter(torch.empty(heads, **placed))
        self.D = nn.Parameter(torch.empty(heads, **placed))
        self.fc_D = nn.Linear(inner, heads, bias=False, **placed)
        self.norm = nn.RMSNorm(inner, eps=1e-5, **placed)
        self.out_proj = nn.Linear(inner, dim, bias=False, **placed)
        self.proj_drop = nn.Dropout(proj_drop)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Decays and steps; timm initialises the linear layers."""
        self.dt_bias.copy_(draw_step_bias(self.heads))
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        valid: Tensor | None = None,
    ) -> Tensor:
        """`valid`, bool `[B, N]`, is False for padding at the end: nothing of it is mixed."""
        z, mixed, dt = self.in_proj(x).split(self.split_projected, -1)
        if valid is not None:
            mixed = mixed * valid.unsqueeze(-1)
        mixed = F.silu(self.conv(mixed.mT).mT)
        x, *gates = mixed.split(self.split_mixed, -1)
        diagonal = self.fc_D(x) + self.D
        x = x.unflatten(-1, (self.heads, -1))
        with torch.autocast(x.device.type, enabled=False):  # steps and sums keep float32
            y = self._both_directions(x, dt, *gates, valid=valid)
        y = (y + x * diagonal.unsqueeze(-1)).flatten(2)
        return self.proj_drop(self.out_proj(self.norm(y) * F.silu(z)))

    def _both_directions(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        b_back: Tensor,
        c_back: Tensor,
        *,
        valid: Tensor | None,
    ) -> Tensor:
        """What each token `[B, N, H, P]` gets from the tokens before and after it."""
        dt = _with_flipped(*dt.chunk(2, -1))
        dt = F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)
        if valid is not None:  # no step: no decay and no input
            dt = dt * _with_flipped(valid, valid).unsqueeze(-1)
        y = semiseparable_product(
            _with_flipped(x, x) * dt.to(x.dtype).unsqueeze(-1),
            -self.A_log.to(dt.dtype).exp() * dt,
            _with_flipped(b, b_back),
            _with_flipped(c, c_back),
        )
        forward, backward = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0)).unflatten(0, (2, -1))
        return forward + backward.flip(1)


def _with_flipped(forward: Tensor, backward: Tensor) -> Tensor:
    """Both directions side by side in the batch, each in its own order: `[2B, N, ...]`."""
    return torch.cat([forward, backward.flip(1)])


default_cfgs = generate_default_cfgs(
    {
        **{f"hydra_{size}_patch16_224": imagenet_cfg() for size in SIZES},
        **{
            f"hydra_{size}_distilled_patch16_224": imagenet_cfg(classifier=("head", "head_dist"))
            for size in SIZES
        },
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    check_class_token(**kwargs)
    embed_dim, num_heads = SIZES[variant.split("_")[1]]
    defaults = {
        "patch_size": 16,
        "embed_dim": embed_dim,
        "depth": 12,
        "num_heads": num_heads,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "attn_layer": HydraMixer,
    }
    return build_model_with_cfg(
        VisionTransformerDistilled if "distilled" in variant else VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


@register_model
def hydra_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _create("hydra_tiny_patch16_224", pretrained, **kwargs)


@register_model
def hydra_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _create("hydra_small_patch16_224", pretrained, **kwargs)


@register_model
def hydra_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    return _create("hydra_base_patch16_224", pretrained, **kwargs)


@register_model
def hydra_tiny_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformerDistilled:
    return _create("hydra_tiny_distilled_patch16_224", pretrained, **kwargs)


@register_model
def hydra_small_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformerDistilled:
    return _create("hydra_small_distilled_patch16_224", pretrained, **kwargs)


@register_model
def hydra_base_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> VisionTransformerDistilled:
    return _create("hydra_base_distilled_patch16_224", pretrained, **kwargs)
