"""Models for `torch.hub.load(REPOSITORY, "lion_base_patch16_224", mask_type="Selective", ...)`."""

from models_hydra import (  # noqa: F401
    hydra_base_distilled_patch16_224,
    hydra_base_patch16_224,
    hydra_small_distilled_patch16_224,
    hydra_small_patch16_224,
    hydra_tiny_distilled_patch16_224,
    hydra_tiny_patch16_224,
)
from models_lion import (  # noqa: F401
    lion_base_distilled_patch16_224,
    lion_base_patch16_224,
    lion_small_distilled_patch16_224,
    lion_small_patch16_224,
    lion_tiny_distilled_patch16_224,
    lion_tiny_patch16_224,
)
from models_vim import (  # noqa: F401
    vim_base_distilled_patch16_224,
    vim_base_patch16_224,
    vim_small_distilled_patch16_224,
    vim_small_patch16_224,
    vim_tiny_distilled_patch16_224,
    vim_tiny_patch16_224,
)

dependencies = ["torch", "timm", "einops"]
