"""Models for `torch.hub.load(REPOSITORY, "lion_base_patch16_224", mask_type="Selective", ...)`."""

from models_lion import (  # noqa: F401
    lion_base_distilled_patch16_224,
    lion_base_patch16_224,
    lion_small_distilled_patch16_224,
    lion_small_patch16_224,
    lion_tiny_distilled_patch16_224,
    lion_tiny_patch16_224,
)

dependencies = ["torch", "timm", "einops"]
