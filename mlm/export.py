"""The folder of a model as Hugging Face has it, which is whole at every moment."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mlm.card import CARD


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model and its tokeniser to `folder`.

    A folder that is there is renewed file by file, so it must be of a model of the same settings.
    """
    temporary = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():
            temporary.rename(folder)
            return
        for path in temporary.iterdir():
            if path.name != CARD or not (folder / CARD).exists():  # it may be edited by hand
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
