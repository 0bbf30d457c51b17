"""A trained model from its checkpoint alone, with what its images become and its classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset

import checkpoint
import models_timm
import preprocessing
from errors import UserError
from preprocessing import Preprocessing


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode on the CPU.

    Attributes:
        images: what images become; the model's `pretrained_cfg` has it, too.
        classes: their names in the data; [] where the checkpoint does not tell.
        saved: the checkpoint; its `args` are those of the training, {} where it does not tell.
        options: what `timm.create_model` built the model with, but for size and classes.
    """

    model: Any  # of timm: an nn.Module with attributes of its own
    images: Preprocessing
    classes: list[str]
    saved: dict[str, Any]
    options: dict[str, Any]

    @property
    def class_names(self) -> list[str]:
        """Names of the outputs for people: words for ImageNet's, numbers where none is known."""
        return readable(self.classes, self.model.num_classes)


def load(
    source: str | Path,
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    ema: bool = False,
    input_size: int | None = None,
    saved: dict[str, Any] | None = None,
) -> Pretrained:
    """The model in a checkpoint: a file, a URL, `hf-hub:OWNER/NAME` or a folder of timm's.

    `name` and `options` are those of `timm.create_model`, for weights that do not tell their model.
    `ema` takes the moving average; `input_size` is in pixels, by default that of the training,
    of bare weights that of their position embedding, else the model's.
    `saved` is what `source` holds, where that has been read before.

    Raises:
        UserError: it cannot be read, does not tell its model, or is of another one.
    """
    saved = saved or checkpoint.load(source)
    settings = saved.get("args") or {}
    name, known = model_of(settings, name, source)
    if not name:
        raise UserError(f"{source} does not tell which model it is of: add --model.")
    models_timm.check_name(name)
    models_timm.check_options(options or {})
    options = {**known, **(options or {})}
    weights = checkpoint.bare_names(checkpoint.weights_of(saved, ema=ema, source=source))
    images = preprocessing.of_checkpoint(saved, name, source)
    if images is None:
        images = preprocessing.of_model(name)
        if side := _side(weights):
            images = images.at(side)
    classes = list(saved.get("classes") or [])
    count = len(classes) or _outputs(name, weights)
    wanted = {"num_classes": count, **options}
    model: Any = models_timm.create(name, input_size=images.size, **wanted)
    checkpoint.load_weights(model, weights, source)
    if input_size and input_size != images.size:
        images = images.at(input_size)
        models_timm.resize(model, input_size)
    models_timm.require_logits(model, name, count, images.input_size)
    own = {**images.for_timm(), "num_classes": count}
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    return Pretrained(model.eval(), images, classes, {**saved, "args": settings}, options)


def named_model(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name in timm, and the options, of the model that main.py's `settings` ask for."""
    name: str = settings["model"]
    options: dict[str, Any] = {}
    if (kind := settings.get("distillation_type", "none")) != "none":
        name = models_timm.built_name(name, kind)
    if name.startswith("lion_"):
        options = {key: settings[key] for key in models_timm.LION_OPTIONS if key in settings}
    if settings.get("plus"):
        name, options["plus"] = models_timm.plus_name(name), settings["plus"]
    return name, {**options, **settings.get("model_kwargs", {})}


def model_of(
    settings: Mapping[str, Any], name: str, source: str | Path
) -> tuple[str, dict[str, Any]]:
    """The model that a checkpoint's `settings` tell, as `named_model` does, else `name`.

    Raises:
        UserError: they tell another than `name`, where that is given.
    """
    told = settings.get("model")
    if not (told and isinstance(told, str)):
        return name, {}
    built, options = named_model(settings)
    known = [model.partition(".")[0] for model in (told, built)]
    if name and name.partition(".")[0] not in known:
        models_timm.check_name(name)  # one that is misspelt is of no model at all
        raise UserError(f"{source} is of {told}, not of {name}: name that model.")
    return built, options


def readable(classes: Sequence[str], count: int) -> list[str]:
    """Names for people of `count` classes, which the data calls `classes`."""
    imagenet = ImageNetInfo(infer_imagenet_subset({"num_classes": count}) or "imagenet-1k")
    if not classes and imagenet.num_classes() == count:
        return [imagenet.index_to_description(i) for i in range(count)]
    known = set(imagenet.label_names())
    names = list(classes) or [f"class {i}" for i in range(count)]
    return [imagenet.label_name_to_description(n) if n in known else n for n in names]


def _side(weights: Mapping[str, Any]) -> int:
    """Pixels of the square images that a ViT's position embedding is of; 0 of other weights."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    parts = ("cls_token", "pos_embed", "patch_embed.proj.weight")
    match [shapes.get(name) for name in parts]:
        case (1, token, _), (1, length, _), (_, 3, _, pixels):
            more = sum(shapes.get(name, (1, 0))[1] for name in ("dist_token", "reg_token"))
            for patches in (length - token - more, length):  # DeiT III's is of patches alone
                if patches > 0 and (side := math.isqrt(patches)) ** 2 == patches:
                    return side * pixels
    return 0


def _outputs(name: str, weights: Mapping[str, Any]) -> int:
    """The number of classes that the classifier among `weights` tells apart."""
    heads = timm.get_pretrained_cfg_value(name, "classifier") or "head"
    head = heads if isinstance(heads, str) else heads[0]
    weight = weights.get(f"{head}.weight")
    if weight is not None:
        return len(weight)
    return int(timm.get_pretrained_cfg_value(name, "num_classes") or 0)
