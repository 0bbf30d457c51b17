"""LION's mixer for GPUs: Triton kernels behind the custom operator `lion::mix`."""

import importlib.util
import os

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENABLED = os.environ.get("LION_KERNELS", "1") != "0" and importlib.util.find_spec("triton")


def available(qkv: Tensor) -> bool:
    """Whether there are kernels for `qkv`, `[B, N, 3, H, D]`: its device, head width and dtype."""
    return bool(ENABLED) and qkv.is_cuda and qkv.shape[4] in HEAD_DIMS and qkv.dtype in DTYPES


def mix(
    qkv: Tensor,
    log_decay: Tensor | None = None,
    curves: Tensor | None = None,
    *,
    lit: bool,
    eps: float = 1e-6,
    normalise: bool = True,
) -> Tensor:
    """`num / (den + eps)` of LION (arXiv 2502.16249), or `num` alone if not `normalise`.

    Feature maps (`elu + 1` if `lit`, else normalised `silu + 0.5`) and the scale `D**-0.5` of `q`
    are applied inside. Sums are float32; work and memory are linear in N; the result is bitwise
    repeatable.

    - `qkv`: `[B, N, 3, H, D]`, D one of 16, 32, 64, 128, as the Linear layer wrote it.
    - `log_decay`: `[C, B or 1, H, N]`, float32, token order; None is a decay of 1.
    - `curves`: `[C, N]`, int64; None is token order, for C = 1.

    Returns `[B, N, H * D]` in the dtype of `qkv`. Raises ValueError for another head width.
    """
    from kernels.ops import mix_operator

    b, n, _, heads, dim = qkv.shape
    if dim not in HEAD_DIMS:
        raise ValueError(f"The kernels have heads of width 16, 32, 64 or 128, not {dim}.")
    return mix_operator(qkv, log_decay, curves, lit, eps, normalise)[0].view(b, n, heads * dim)
