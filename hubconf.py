"""Models for `torch.hub.load(REPOSITORY, "lion_base_patch16_224", mask_type="Selective", ...)`."""

import typing

import timm
from torch import nn

import models_hydra
import models_lion
import models_lion_plus
import models_masked_softmax
import models_vim

dependencies = ["torch", "timm", "einops"]

# torch.hub offers what this module holds that can be called.
for _family in (models_hydra, models_lion, models_lion_plus, models_masked_softmax, models_vim):
    for _name in timm.list_models(module=_family.__name__):
        globals()[_name] = timm.model_entrypoint(_name)


def trained(checkpoint: str, **options: typing.Any) -> nn.Module:
    """The model in a checkpoint, ready for inference: `pretrained.load` says what `options` are.

    `timm.data.resolve_data_config(model=model)` tells how its images are made.
    """
    from pretrained import load  # the names above need no more than the models' own modules

    return load(checkpoint, **options).model
