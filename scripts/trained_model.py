"""What predict.py, visualize.py and export.py share: the arguments that name the model."""

import argparse
from typing import Any

import pretrained
from argument_parser import KeyValues
from errors import UserError, as_user_error
from models_lion import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="CHECKPOINT",
        help="file, URL, hf-hub:OWNER/NAME or a folder of timm's save_for_hf")  # fmt: skip
    add("--use-ema", action="store_true", help="take the moving average of the weights")
    add("--input-size", type=int, metavar="PIXELS", help="default: that of the training")
    add("--model", default="", metavar="NAME",
        help="in timm; only for weights that do not tell it")  # fmt: skip
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="of the model, instead of the checkpoint's: mask_type=Selective, say")  # fmt: skip
    add("--format", choices=FORMATS,
        help="of LION: how the same function is computed (default: the checkpoint's)")  # fmt: skip
    add("--chunk-size", type=int, metavar="TOKENS",
        help="per chunk of --format Chunk (default: the checkpoint's)")  # fmt: skip


def load(
    options: argparse.Namespace, saved: dict[str, Any] | None = None, **more: Any
) -> pretrained.Pretrained:
    """The model that `add_arguments` asked for; `more` are further options of it.

    `saved` is what its checkpoint holds, where that has been read before.

    Raises UserError as `pretrained.load` does, and for --format of other models.
    """
    if options.input_size is not None and options.input_size < 1:
        raise UserError(f"--input-size must be at least 1, not {options.input_size}.")
    trained = pretrained.load(
        options.checkpoint,
        name=options.model,
        options={**options.model_kwargs, **more},
        ema=options.use_ema,
        input_size=options.input_size,
        saved=saved,
    )
    if options.format or options.chunk_size is not None:
        if not hasattr(trained.model, "set_format"):
            raise UserError("--format and --chunk-size are of LION models: leave them out.")
        own = trained.model.blocks[0].attn.format
        with as_user_error():
            trained.model.set_format(options.format or own, options.chunk_size)
    return trained
