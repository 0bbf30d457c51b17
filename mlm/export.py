"""The folder of a model as Hugging Face has it, which is whole at every moment."""

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from files import new_folder
from mlm.card import CARD


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model and its tokeniser to `folder`.

    A folder that is there is renewed file by file, so it must be of a model of the same settings.
    """
    with new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        if not folder.exists():
            new.rename(folder)
            return
        for path in new.iterdir():
            if path.name != CARD or not (folder / CARD).exists():  # it may be edited by hand
                os.replace(path, folder / path.name)
