"""Checkpoints as timm and the Hugging Face Hub keep them: a folder of weights and configuration."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.errors import RemoteEntryNotFoundError as EntryNotFoundError
from safetensors.torch import load_file
from timm.data import resolve_data_config

from errors import UserError, first_line
from preprocessing import Preprocessing

PREFIX = "hf-hub:"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
# Keys in the configuration: main.py's arguments, and the training's preprocessing, as timm's own
# says of small images that they are not cropped, which is wrong of larger ones.
TRAINING, PREPROCESSING = "training", "data_config"


def is_hub(source: str | Path) -> bool:
    return str(source).startswith(PREFIX)


def download(source: str) -> Path:
    """The folder in the Hub's cache with the files of `hf-hub:OWNER/NAME[@REVISION]`.

    Raises:
        UserError: there is no such model, it is none of timm's form, or it cannot be reached.
    """
    name, _, revision = source.removeprefix(PREFIX).partition("@")

    def get(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision or None))

    try:
        folder = get(CONFIG).parent
        try:
            get(WEIGHTS[0])
        except EntryNotFoundError:
            get(WEIGHTS[1])
    except EntryNotFoundError as error:
        raise UserError(
            f"{source} holds no {CONFIG} with {' or '.join(WEIGHTS)}: name a model that timm or "
            "scripts/export.py has written."
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"cannot download {source}: {first_line(error)} (name it "
            "hf-hub:OWNER/NAME[@REVISION]; private models need `hf auth login`)"
        ) from error
    return folder


def read_folder(folder: Path) -> dict[str, Any]:
    """A folder of timm's `save_for_hf` as a checkpoint of main.py.

    It holds `model` (the weights), `data_config`, `args` (as far as the configuration tells them)
    and, where they are named, `classes`.

    Raises:
        OSError, ValueError, KeyError, TypeError: files are missing or not of this form.
    """
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(f"this folder holds no {CONFIG}: name a file in it")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    images = config.get("pretrained_cfg", config)
    resolved = resolve_data_config(pretrained_cfg=images)
    checkpoint = {
        "model": read_weights(folder),
        "data_config": config.get(PREPROCESSING) or Preprocessing(**resolved).state(),
        "args": config.get(TRAINING)
        or {"model": config["architecture"], "model_kwargs": config.get("model_args") or {}},
    }
    names = config.get("label_names") or images.get("label_names")
    return checkpoint | ({"classes": list(names)} if isinstance(names, list) else {})


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    found = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"there is neither {' nor '.join(WEIGHTS)}")
    if found[0].suffix == ".safetensors":
        return load_file(found[0])
    return torch.load(found[0], map_location="cpu", weights_only=True)
