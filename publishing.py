"""Trained models as others load them: timm's folders, the Hugging Face Hub, small checkpoints."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm.models
from huggingface_hub import HfApi

import checkpoint
import hub
from arguments import get_args_parser
from errors import UserError, told_as
from preprocessing import SMALL_IMAGE
from pretrained import Pretrained
from resuming import RULES, Rule

CARD = "README.md"
PLACES = ("data_path", "teacher_path")  # on the machine of the training
OTHER_WEIGHTS = "started from the weights of another training"  # instead of their place
_CARD_TEXT = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
---

# {architecture} for {count} classes

| | |
|---|---|
{facts}

The recipe, as far as it is not the default of LION's `main.py`:

```
{recipe}
```

## Use it

In a clone of LION's repository (bidirectional linear attention,
[arXiv 2502.16249](https://arxiv.org/abs/2502.16249)), with the path of this folder or its
`hf-hub:OWNER/NAME`:

```bash
python scripts/predict.py --checkpoint FOLDER IMAGE
```

or as any model of timm:

```python
import timm, {module}
from timm.data import create_transform, resolve_data_config

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_data_config(model=model))
```
"""


def recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of main.py's arguments that say what was trained and how, not where."""
    kept = [n for n, rule in RULES.items() if rule is not Rule.FREE and n not in PLACES]
    tuned = {"finetune": OTHER_WEIGHTS} if settings.get("finetune") else {}
    return {n: settings[n] for n in (*kept, "decay_init") if n in settings} | tuned


def save_for_hf(trained: Pretrained, folder: str | Path) -> None:
    """Writes `config.json`, `model.safetensors` and, unless there is one, a model card.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` builds it again, once the module that
    registers it is imported, with its preprocessing for `resolve_data_config`.
    """
    folder = Path(folder)
    extra = {hub.TRAINING: recipe(trained.saved["args"])} if trained.saved["args"] else {}
    timm.models.save_for_hf(
        trained.model,
        str(folder),
        model_config={
            "label_names": trained.classes,
            hub.PREPROCESSING: trained.images.state(),
            **extra,
        },
        model_args=trained.options,
        safe_serialization=True,
    )
    if not (folder / CARD).exists():
        (folder / CARD).write_text(card(trained), encoding="utf-8")


def push_to_hf_hub(trained: Pretrained, name: str) -> str:
    """Uploads what `save_for_hf` writes as `OWNER/NAME`, and returns its address.

    A model card that is there stays.

    Raises:
        UserError: the Hub refuses it or cannot be reached.
    """
    api = HfApi(library_name="lion")
    with told_as(f"cannot upload {name}", "name it OWNER/NAME, log in by `hf auth login`"):
        name = api.create_repo(name, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            save_for_hf(trained, folder)
            written = api.file_exists(name, CARD)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add the model",
                              ignore_patterns=[CARD] if written else None)  # fmt: skip
    return f"{hub.PREFIX}{name}"


def save_weights(trained: Pretrained, path: str | Path, *, half: bool = False) -> None:
    """Writes a checkpoint without the state of a training, of use to every command.

    Weights are the model's; `half` stores them in float16, at half the size. Raises UserError if
    they do not fit into that, and RuntimeError if the file cannot be written.
    """
    weights = trained.model.state_dict()
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        if beyond := [k for k, v in weights.items() if v.isinf().any()]:
            raise UserError(f"{beyond[0]} has values beyond float16's 65,504: leave --half out.")
    saved = trained.saved
    content = {"model": weights, "data_config": trained.images.state()}
    content |= {"classes": trained.classes} if trained.classes else {}
    content |= {"args": recipe(saved["args"])} if saved["args"] else {}
    checkpoint.save(content, path, keep_previous=False)


def card(trained: Pretrained) -> str:
    """The model card: data, recipe and preprocessing, as the checkpoint tells them."""
    settings, images = trained.saved["args"], trained.images.for_timm()
    architecture = trained.model.pretrained_cfg["architecture"]
    here, larger = images["crop_pct"], trained.images.crop_pct
    crop = f"crop {here:g} ({images['crop_mode']})"
    crop += f"; {larger:g} above {SMALL_IMAGE} pixels" if larger != here else ""
    facts = {
        "Parameters": f"{sum(p.numel() for p in trained.model.parameters()):,}",
        "Data": settings.get("data_set", "not in the checkpoint"),
        "Classes": ", ".join(trained.class_names[:20]) + ", ..." * (trained.model.num_classes > 20),
        "Images": " x ".join(map(str, images["input_size"])),
        "Normalisation": f"mean {_numbers(images['mean'])}, standard deviation "
        f"{_numbers(images['std'])}, of pixels in [0, 1]",
        "Resized": f"{images['interpolation']}, {crop}",
    }
    if "epoch" in trained.saved:
        facts["Epochs"] = f"{trained.saved['epoch'] + 1} of {settings.get('epochs', 'unknown')}"
    default = get_args_parser().get_default
    chosen = {k: v for k, v in recipe(settings).items() if v != default(k)}
    return _CARD_TEXT.format(
        architecture=architecture,
        count=trained.model.num_classes,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        recipe="\n".join(f"{name}: {value}" for name, value in chosen.items())
        or "not in the checkpoint",
        module=type(trained.model).__module__,
    )


def _numbers(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"
