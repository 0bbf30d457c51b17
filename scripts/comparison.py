"""What `paper_table.py` and `memory_vs_resolution.py` share: the models, and how they are measured.

Precision is bfloat16 on a GPU and float32 on a CPU.
"""

import csv
import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import models_hydra  # noqa: F401, registers models, as the next two do
import models_lion
import models_vim  # noqa: F401
from journal import provenance

# Names in timm but for the size, and options.
MODELS = {
    "ViT": ("vit", {}),
    "DeiT": ("deit", {}),
    "Hydra": ("hydra", {}),
    "Vim": ("vim", {}),
    "LION-Lit": ("lion", {"mask_type": "Lit"}),
    "LION-D": ("lion", {"mask_type": "Decay"}),
    "LION-D♮": ("lion", {"mask_type": "Decay", "order": "S"}),
    "LION-S": ("lion", {"mask_type": "Selective"}),
    "LION-S♮": ("lion", {"mask_type": "Selective", "order": "S"}),
}
SIZES = tuple(models_lion.SIZES)
EXPLICIT = "explicit softmax"
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def build(label: str, size: str, pixels: int, attention: str = "") -> nn.Module:
    """One of MODELS, with random weights; ValueError for images that it cannot take."""
    name, options = MODELS[label]
    if pixels % 16 or pixels < 32:
        raise ValueError(f"images must be a multiple of 16 pixels wide, 32 at least, not {pixels}")
    model = timm.create_model(f"{name}_{size}_patch16_224", img_size=pixels, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention != EXPLICIT
    return model


def attending(attention: str) -> AbstractContextManager:
    """Where softmax attention is computed by one of BACKENDS; elsewhere PyTorch chooses."""
    return sdpa_kernel(BACKENDS[attention]) if attention in BACKENDS else nullcontext()


def working_backends(device: torch.device) -> list[str]:
    """Those of BACKENDS that compute attention and its gradient on the device."""
    found = []
    for name in BACKENDS:
        q = torch.ones(1, 1, 197, 64, dtype=precision(device), device=device, requires_grad=True)
        try:
            with attending(name), warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="scripts.comparison")  # why it does not
                F.scaled_dot_product_attention(q, q, q).sum().backward()
        except RuntimeError:
            continue
        found.append(name)
    return found


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a run takes; NaN if the device's memory is too small for it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    try:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start
    except torch.OutOfMemoryError:
        pass  # what the run held is held by the error, too, until here
    gc.collect()
    torch.cuda.empty_cache()
    return math.nan


def weight_bytes(model: nn.Module) -> int:
    tensors = (*model.parameters(), *model.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def write(
    folder: Path | None, name: str, tables: Sequence[str], rows: Sequence[dict[str, object]]
) -> None:
    """Prints the tables after what they depend on; `name.md` and `name.csv` in the folder."""
    conditions = "\n".join(f"- {key}: {value}" for key, value in provenance().items())
    report = "\n\n".join([conditions, *tables])
    print(report)
    if folder is None:
        return
    (folder / f"{name}.md").write_text(report + "\n")
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
