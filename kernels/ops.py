"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import math

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from kernels.chunked import backward_kernel, forward_kernel


def chunk_size(qkv: Tensor) -> int:
    """Tokens per chunk: 64, or what fits into shared memory for wide heads."""
    return max(16, min(64, 8192 // (qkv.shape[4] * qkv.element_size())))


def _sums(log_decay: Tensor, curves: Tensor | None, size: int) -> Tensor:
    """Chunk-local sums x and y of log2 decays, along the curves: `[2, C, B or 1, H, M * size]`."""
    n = log_decay.shape[3]
    if curves is not None:
        log_decay = log_decay.gather(3, curves[:, None, None].expand_as(log_decay))
    # A decay of 2^-32 is none, and larger sums would round those of the open gates beside it.
    decays = (log_decay * math.log2(math.e)).clamp(min=-32)
    steps = F.pad(decays, (0, -n % size)).unflatten(3, (-1, size))
    y = steps.cumsum(4)
    return torch.stack([y - steps, y]).flatten(4)


def _sweeps(qkv: Tensor, log_decay: Tensor | None, curves: Tensor | None, lit: bool, **extra):
    """Grid, and for each curve the arguments that both directions share."""
    b, n, _, heads, dim = qkv.shape
    size = chunk_size(qkv)
    chunks = triton.cdiv(n, size)
    options = {
        "D": dim, "BLOCK": size, "LIT": lit, "DECAY": log_decay is not None,
        "PRECISION": precision(qkv), **extra,
    }  # fmt: skip
    common = {"n": n, "heads": heads, "stride_b": qkv.stride(0), "stride_n": qkv.stride(1),
              "scale": dim**-0.5}  # fmt: skip
    if log_decay is None:
        sums, sums_b, scans = qkv.new_empty(2, 1, 0, dtype=torch.float32), 0, 1
    else:
        sums = _sums(log_decay, curves, size)
        scans, sums_b = log_decay.shape[0], heads * chunks * size if log_decay.shape[1] > 1 else 0
    for c in range(scans):
        curve = sums if curves is None or log_decay is None else curves[c]
        yield c, (qkv, sums[0, c], sums[1, c], curve), {
            **common, **options, "sums_b": sums_b, "CURVED": curve is not sums, "ADD": c > 0,
            "WEIGHT": 1 / scans,
        }  # fmt: skip


def precision(qkv: Tensor) -> str:
    """Of matrix products: three tf32 products in float32, but wide heads have no room for them."""
    if qkv.dtype != torch.float32:
        return "tf32"
    return "tf32x3" if qkv.shape[4] <= 64 else "ieee"


def _packed(qkv: Tensor) -> Tensor:
    dim, heads = qkv.shape[4], qkv.shape[3]
    return qkv if qkv.stride()[2:] == (heads * dim, dim, 1) else qkv.contiguous()


def _states(qkv: Tensor, decay: bool, count: int) -> tuple[Tensor, Tensor]:
    b, n, _, heads, dim = qkv.shape
    chunks = triton.cdiv(n, chunk_size(qkv)) if decay else 0
    return (
        qkv.new_empty(b, heads, chunks, count, dim, dim),
        qkv.new_empty(b, heads, chunks, count, dim, dtype=torch.float32),
    )


def _resources(qkv: Tensor, backward: bool) -> dict[str, int]:
    wide = qkv.shape[4] > 64 or qkv.dtype == torch.float32
    return {"num_warps": 8 if wide or backward else 4, "num_stages": 1}


@torch.library.custom_op("lion::mix", mutates_args=())
def mix_operator(
    qkv: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    lit: bool,
    eps: float,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` and the row sums plus eps, float32 `[B, H, N]`."""
    qkv = _packed(qkv)
    b, n, _, heads, dim = qkv.shape
    out = qkv.new_empty(b, n, heads, dim)
    sums = qkv.new_empty(b, heads, n if normalise else 0, dtype=torch.float32)
    states = _states(qkv, log_decay is not None, 1)
    for _, tensors, options in _sweeps(qkv, log_decay, curves, lit, NORMALISE=normalise):
        forward_kernel[(b * heads,)](
            *tensors, *states, out, sums, eps=eps, **options, **_resources(qkv, False)
        )
    return out, sums


@mix_operator.register_fake
def _(qkv, log_decay, curves, lit, eps, normalise):
    b, n, _, heads, dim = qkv.shape
    sums = qkv.new_empty(b, heads, n if normalise else 0, dtype=torch.float32)
    return qkv.new_empty(b, n, heads, dim), sums


@torch.library.custom_op("lion::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor,
    qkv: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    out: Tensor,
    sums: Tensor,
    lit: bool,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `qkv`, packed, and of the log decays, `[C, B, H, N]` (empty without decay)."""
    qkv, grad = _packed(qkv), grad.contiguous()
    b, n, _, heads, _ = qkv.shape
    scans = 0 if log_decay is None else log_decay.shape[0]
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    flux = qkv.new_empty(scans, b, heads, n, dtype=torch.float32)
    states = _states(qkv, log_decay is not None, 2)
    for c, tensors, options in _sweeps(qkv, log_decay, curves, lit, NORMALISE=normalise):
        backward_kernel[(b * heads,)](
            *tensors, *states, out, sums, grad, dqkv, flux[c] if scans else flux,
            **options, **_resources(qkv, True),
        )  # fmt: skip
    return dqkv, flux


@mix_backward.register_fake
def _(grad, qkv, log_decay, curves, out, sums, lit, normalise):
    b, n, _, heads, _ = qkv.shape
    scans = 0 if log_decay is None else log_decay.shape[0]
    return qkv.new_empty(qkv.shape), qkv.new_empty(scans, b, heads, n, dtype=torch.float32)


def _save(ctx, inputs, output):
    qkv, log_decay, curves, ctx.lit, _, ctx.normalise = inputs
    ctx.save_for_backward(qkv, log_decay, curves, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    qkv, log_decay, curves, out, sums = ctx.saved_tensors
    if grad is None:
        return (None,) * 6
    dqkv, flux = mix_backward(grad, qkv, log_decay, curves, out, sums, ctx.lit, ctx.normalise)
    if log_decay is None:
        return dqkv, None, None, None, None, None
    if log_decay.shape[1] == 1 < flux.shape[1]:
        flux = flux.sum(1, keepdim=True)
    return dqkv, flux, None, None, None, None


mix_operator.register_autograd(_gradients, setup_context=_save)
