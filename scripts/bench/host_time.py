"""Python's time: how long a call of one attention layer takes to return, done or not."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from curves import scan_curves
from models_lion import LionAttention

VARIANTS = ("softmax", "Lit", "Decay-Normal", "Selective-Normal", "Decay-S", "Selective-S")


def host_time(
    variants: Sequence[str] = VARIANTS, *, device: str = "cuda", side: int = 14, heads: int = 12,
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, rounds: int = 300,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """Microseconds of host time of a layer's forward and backward pass, by variant.

    A variant is "softmax", the ViT's layer with PyTorch's attention of the context (choose one with
    `torch.nn.attention.sdpa_kernel`), or a mask and an order of LION, "Selective-S". Layers have
    parameters and inputs of `dtype`, one image of `side**2 + 1` tokens. They take turns and are
    medians of `rounds`, each begun with an idle device.
    """
    torch.manual_seed(0)
    placed = {"device": device, "dtype": dtype}
    x = torch.randn(1, side**2 + 1, heads * head_dim, requires_grad=True, **placed)
    grad = torch.ones_like(x)
    layers = {name: make_layer(name, heads * head_dim, heads, side, placed) for name in variants}
    times = {name: [] for name in variants}
    for _ in range(10 + rounds):  # in 10 of them kernels compile and allocations get cached
        for name, (layer, curves) in layers.items():
            layer.zero_grad()  # as after a step
            x.grad = None
            forward, y = until_returned(layer, x, curves)
            backward, _ = until_returned(y.backward, grad)
            times[name].append((forward, backward))
    return {name: tuple(1e6 * median(part[10:]) for part in zip(*taken, strict=True))
            for name, taken in times.items()}  # fmt: skip


def make_layer(
    name: str, width: int, heads: int, side: int, placed: dict[str, Any]
) -> tuple[nn.Module, Tensor | None]:
    """A layer, and its curves."""
    if name == "softmax":
        return Attention(width, heads, qkv_bias=True, **placed), None
    mask, _, order = name.partition("-")
    layer = LionAttention(width, heads, mask_type=mask, order=order or "Normal", **placed)
    return layer, scan_curves(order or "Normal", (side, side), 1, device=placed["device"])


def until_returned(call: Callable[..., Any], *arguments: Tensor | None) -> tuple[float, Any]:
    """Seconds of a call, begun with an idle device, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = perf_counter()
    result = call(*arguments)
    return perf_counter() - start, result
