"""Steps of pre-training on random windows, each of one document."""

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from errors import UserError
from mlm.data import IGNORED
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.pretrain import Settings, amp_dtype, build_optimizer
from mlm.settings import check, override, read_yaml, typed
from scripts.bench.cases import Case


def text_cases(groups: Iterable[Case], configs: list[str], backends: Sequence[str]) -> list[Case]:
    """Cases of configurations of mlm.pretrain; `key=value` among them counts for all."""
    values = [word for word in configs if "=" in word]
    paths = [word for word in configs if "=" not in word]
    if not paths:
        raise UserError("give at least one configuration of mlm.pretrain (--configs)")
    cases = []
    for group, path in product(groups, paths):
        case = replace(group, model=Path(path).stem, config=shlex.join([path, *values]))
        settings, config = settings_of(case)
        dtype = amp_dtype(settings, torch.device(case.device))
        forms = backends if config.mixer == "softmax" else ("",)
        cases += [replace(case, precision="amp" if dtype else "float32", form=f) for f in forms]
    return cases


def settings_of(case: Case) -> tuple[Settings, LionBertConfig]:
    path, *values = shlex.split(case.config)
    given = {"data": "unused", **override(read_yaml(path), values), "length": case.tokens}
    settings = typed(Settings, given, path)
    settings.check()
    model = check(LionBertConfig.__annotations__, settings.model, "the section model")
    return settings, LionBertConfig(**model | {"max_position_embeddings": case.tokens})


def pretraining(case: Case) -> tuple[torch.optim.Optimizer, Callable[[], Tensor], list[Tensor]]:
    """The optimizer, the loss of a batch, and what is held beside the optimizer's tensors."""
    settings, config = settings_of(case)
    device = torch.device(case.device)
    model = LionBertForMaskedLM(config).to(device).train()
    if case.compiled:
        model.lion.compile()
    optimizer = build_optimizer(settings, model, device)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ids = torch.randint(config.vocab_size, (case.batch, case.tokens), device=device)
    labels: Tensor = ids.where(torch.rand(ids.shape, device=device) < settings.mask_share, IGNORED)
    documents = torch.zeros_like(ids) if settings.separate_documents else None
    batch = {"input_ids": ids, "labels": labels, "document_ids": documents}
    loss = lambda: model(**batch, targets_only=True).loss  # noqa: E731
    return optimizer, loss, [ids, labels, *model.buffers()]
