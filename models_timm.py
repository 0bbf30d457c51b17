"""What timm's registry knows: names, and how models of all families are built.

Those of this repository are registered here.
"""

import difflib
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch
from torch import nn

import models_hydra  # noqa: F401  (this and those below register their models)
import models_lion  # noqa: F401
import models_lion_plus  # noqa: F401
import models_masked_softmax  # noqa: F401
import models_vim  # noqa: F401
from errors import UserError, first_line, is_bug, one_line

logger = logging.getLogger(__name__)

# Arguments that some families do not have, and the command line's names for them.
OPTIONAL = {
    "drop_path_rate": "--drop-path",
    "drop_rate": "--drop",
    "img_size": "--input-size",
}
# The options of LION models that main.py has arguments for.
LION_OPTIONS = (
    "mask_type", "order", "format", "chunk_size", "decay_init", "pos_emb", "cls_tok",
)  # fmt: skip


def check_name(name: str, kind: str = "model") -> None:
    """Raises UserError, with the names that are meant most likely, if timm has no such model."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = similar(architecture)
        hint = f": did you mean {' or '.join(close)}?" if close else "; see timm.list_models()."
        raise UserError(f"There is no {kind} {name!r}{hint}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        hint = f": it has {', '.join(known)}." if known else f": use {architecture}."
        raise UserError(f"timm has no weights {tag!r} of the {kind} {architecture}{hint}")


def similar(name: str) -> list[str]:
    """Up to three models that begin with `name`, are of its family, or at least look like it."""
    name, known = name.lower().replace("-", "_"), timm.list_models()
    begin_alike = [model for model in known if model.startswith(name)]
    if begin_alike:
        return sorted(begin_alike, key=len)[:3]
    family = [model for model in known if model.split("_")[0] == name.split("_")[0]]
    return difflib.get_close_matches(name, family or known, cutoff=0.0 if family else 0.6)


def built_name(name: str, distillation_type: str) -> str:
    """The architecture that training builds for a --model, which for distillation has a token."""
    name = name.partition(".")[0]  # weights of timm's come after the point
    if distillation_type == "none" or "distilled" in name:
        return name
    return name.replace("_patch16", "_distilled_patch16")


def plus_name(name: str) -> str:
    """The model that is the LION model of this name with what --plus adds."""
    return name.replace("lion_", "lion_plus_", 1)


def check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for options that no model has, and for sizes that cannot be."""
    for option, remedy in {"input_size": "give --input-size", "required": "leave it out"}.items():
        if option in options:
            raise UserError(f"{option} in --model-kwargs is no option of timm's models: {remedy}.")
    for option in ("depth", "embed_dim", "num_heads", "patch_size"):
        value = options.get(option)  # some families take several
        if isinstance(value, str | float | bool) or (isinstance(value, int) and value < 1):
            raise UserError(
                f"{option} in --model-kwargs must be a whole number of at least 1, not {value!r}."
            )


def create(
    name: str,
    /,
    *,
    input_size: int | tuple[int, int],
    required: Collection[str] = (),
    **options: Any,
) -> nn.Module:
    """The model `name` for images of `input_size` pixels, with random weights.

    `options` are those of timm's models. Of `drop_rate` and `drop_path_rate`, those that a family
    does not have are left out, with a warning unless they are 0.

    Raises:
        UserError: the model cannot be built with these options, has not one of those that are
            `required`, or is not for images of this size.
    """
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options = {"img_size": input_size, **options}
    while True:
        try:
            return timm.create_model(name, **options)
        except Exception as error:  # every family checks its arguments in ways of its own
            unknown = _unknown_option(error, options)
            if unknown and unknown in required and options[unknown]:
                raise UserError(f"{name} has no {OPTIONAL[unknown]}: leave it out.") from error
            if is_bug(error) and not isinstance(error, TypeError):  # that is of an unknown option
                raise
            if unknown is None or not _can_do_without(name, unknown, options[unknown]):
                raise UserError(
                    f"{name} cannot be built with these arguments ({one_line(error)}): "
                    "check --model-kwargs and --input-size."
                ) from error
        if options.pop(unknown) and unknown != "img_size":
            logger.info("%s has no %s: built without", name, OPTIONAL[unknown])


def resize(model: Any, size: int | tuple[int, int]) -> None:
    """Makes `model` one for images of `size` pixels, where it is built for one size.

    Raises UserError if it cannot be.
    """
    if not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(img_size=size)
    except Exception as error:  # every family has its own reasons
        if is_bug(error):
            raise
        raise UserError(
            f"The model takes no images of {size} pixels ({first_line(error)})."
        ) from error


def train_attention_alone(model: Any, name: str) -> None:
    """Freezes all but attention, pooling by it, classifier and position embedding, as DeiT does.

    Raises UserError if `model`, called `name`, has no attention.
    """
    classifier = model.get_classifier()
    heads = classifier if isinstance(classifier, tuple) else (classifier,)
    if not any(".attn." in place for place, _ in model.named_parameters()):
        raise UserError(f"{name} has no attention to train: leave --attn-only out.")
    for place, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in place or place.startswith(("pos_embed", "attn_pool"))
    for head in heads:
        head.requires_grad_()


@torch.no_grad()
def require_logits(
    model: nn.Module, name: str, num_classes: int, input_size: tuple[int, int, int]
) -> None:
    """Raises UserError if `model`, called `name`, makes no logits `[B, num_classes]` of images."""
    training, device = model.training, next(model.parameters()).device
    try:
        logits = model.eval()(torch.zeros(2, *input_size, device=device))
    except Exception as error:  # every family has its own reasons
        if is_bug(error):
            raise
        size = "x".join(map(str, input_size[1:]))
        remedy = "use another --input-size"
        if "channels" in str(error):
            remedy = f"they have {input_size[0]} channels, so leave in_chans out of --model-kwargs"
        raise UserError(
            f"{name} cannot read images of {size} pixels ({one_line(error)}): {remedy}."
        ) from error
    model.train(training)
    shape = list(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
    if shape != [2, num_classes]:
        raise UserError(
            f"{name} is no classifier of the {num_classes} classes of the data: its output for 2 "
            f"images is {shape}. Choose one, without num_classes and global_pool in --model-kwargs."
        )


def _unknown_option(error: Exception, options: dict[str, Any]) -> str | None:
    if not isinstance(error, TypeError) or "unexpected keyword" not in str(error):
        return None
    named = re.findall(r"'(\w+)'", str(error))
    return next((name for name in named if name in OPTIONAL and name in options), None)


def _can_do_without(name: str, option: str, value: Any) -> bool:
    """Only the size matters: a model of one fixed size takes images of no other."""
    own = timm.get_pretrained_cfg_value(name, "input_size") or ()
    return option != "img_size" or value in (*own[-1:], tuple(own[1:]))
