"""Models for `torch.hub.load(REPOSITORY, "lion_base_patch16_224", mask_type="Selective", ...)`."""

from typing import Any

from torch import nn

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


def trained(checkpoint: str, **options: Any) -> nn.Module:
    """The model in a checkpoint, ready for inference: `pretrained.load` says what `options` are.

    `timm.data.resolve_data_config(model=model)` tells how its images are made.
    """
    from pretrained import load  # the names above need no more than the models' own modules

    return load(checkpoint, **options).model
