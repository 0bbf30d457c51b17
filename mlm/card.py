"""What a saved model has beside its weights: the module that loads it, and a model card."""

from collections.abc import Iterable
from pathlib import Path

LOADER = "modeling_lion"
CARD = "README.md"

_MODULE = '''"""The classes of this model, for `from_pretrained(..., trust_remote_code=True)`."""

try:
    from mlm.modeling import (  # noqa: F401
{names}
    )
except ModuleNotFoundError as error:
    raise ImportError(
        "This model needs LION: run `pip install .` in LION's repository (see README.md)."
    ) from error
'''

_CARD_TEXT = """---
library_name: transformers
tags:
- lion
- linear-attention
---

# A BERT-shaped encoder with {mixer}

LION is bidirectional linear attention ([arXiv 2502.16249](https://arxiv.org/abs/2502.16249)). The
code of the model is in LION's repository; in a clone of it, run

```bash
pip install .
```

and then, anywhere, with the path of this folder:

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`trust_remote_code` runs `{loader}.py`, which imports the installed classes. After
`import mlm.modeling` it is not needed.
"""


def write_card(folder: Path, classes: Iterable[str], *, mixer: str, auto: str) -> None:
    """Writes the module, and the card unless there is one.

    `classes` are names in `mlm.modeling`; `auto` is the Auto class that the card loads.
    """
    names = "\n".join(f"        {name}," for name in sorted(classes))
    (folder / f"{LOADER}.py").write_text(_MODULE.format(names=names), encoding="utf-8")
    card = folder / CARD
    if not card.exists():
        card.write_text(_CARD_TEXT.format(mixer=mixer, auto=auto, loader=LOADER), encoding="utf-8")
