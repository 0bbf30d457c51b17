"""Python's time: how long a call of one attention layer takes to return, done or not."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

import torch
from timm.layers import Attention
from torch import Tensor, nn

from curves import scan_curves
from models_lion import LionAttention

SOFTMAX = "softmax"
VARIANTS = (SOFTMAX, "Lit", "Decay-Normal", "Selective-Normal", "Decay-S", "Selective-S")


def host_time(
    variants: Sequence[str] = VARIANTS,
    *,
    device: str = "cuda",
    side: int = 14,
    batch: int = 1,
    heads: int = 12,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 300,
) -> dict[str, tuple[float, float]]:
    """Microseconds of host time of a layer's forward and backward pass, by variant.

    A variant is "softmax", the ViT's layer with PyTorch's attention of the context (choose one with
    `torch.nn.attention.sdpa_kernel`), or a mask and an order of LION, "Selective-S". Layers have
    parameters and inputs of `dtype` and `side**2 + 1` tokens. They take turns and are medians of
    `rounds`, each begun with an idle device: small batches show Python's time alone.
    """
    torch.manual_seed(0)
    width = heads * head_dim
    x = torch.randn(batch, side**2 + 1, width, device=device, dtype=dtype, requires_grad=True)
    layers = {name: _layer(name, width, heads, side, device, dtype) for name in variants}
    times = {name: [] for name in variants}
    for i in range(-10, rounds):
        for name, (layer, call) in layers.items():
            layer.zero_grad()  # as after a step
            taken = _one(call, x)
            if i >= 0:  # kernels are compiled and allocations cached
                times[name].append(taken)
    return {
        name: tuple(1e6 * median(part) for part in zip(*taken, strict=True))
        for name, taken in times.items()
    }


def _layer(
    name: str, width: int, heads: int, side: int, device: str, dtype: torch.dtype
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A layer, and a call of it."""
    placed = {"device": device, "dtype": dtype}
    if name == SOFTMAX:
        softmax = Attention(width, heads, qkv_bias=True, **placed)
        return softmax, softmax
    mask, _, order = name.partition("-")
    order = order or "Normal"
    layer = LionAttention(
        width, heads, qkv_bias=True, mask_type=mask, order=order, num_prefix_tokens=1, **placed
    )
    curves = scan_curves(order, (side, side), num_prefix=1, device=device)
    return layer, lambda x: layer(x, curves)


def _one(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Seconds until the forward and the backward call have returned."""
    x.grad = None
    _wait(x)
    start = perf_counter()
    y = call(x)
    forward = perf_counter() - start
    grad = torch.ones_like(y)
    _wait(x)
    start = perf_counter()
    y.backward(grad)
    return forward, perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
