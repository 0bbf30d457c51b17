"""LION's mixer for GPUs: Triton kernels behind the custom operator `lion::mix`."""

import importlib.util
import os

import torch
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
ENABLED = os.environ.get("LION_KERNELS", "1") != "0" and bool(importlib.util.find_spec("triton"))


def available(device: torch.device, dtype: torch.dtype, dim: int, trained: bool = False) -> bool:
    """Whether there are kernels for a device, a dtype and heads of width `dim`.

    Models are `trained` in float32 without them: gradients of closed gates are differences of sums,
    of which float32 rounds away up to 5e-4.
    """
    dtypes = HALF if trained else DTYPES
    return ENABLED and device.type == "cuda" and dim in HEAD_DIMS and dtype in dtypes


def padded_gates(count: int) -> int:
    """Columns of `count` gates: rows of whole 128 bytes, or torch.compile pads and copies them."""
    return -(-count // 64) * 64


def mix(
    projected: Tensor, decay: Tensor | None = None, curves: Tensor | None = None,
    valid: Tensor | None = None, documents: Tensor | None = None, *,
    heads: int, dim: int, scans: int = 1, prefix: int = 0, lit: bool = False,
    features: str = "silu", normalise: bool = True, eps: float = 1e-6, recurrent: bool = False,
) -> Tensor:  # fmt: skip
    """`num / (den + eps)` of LION (arXiv 2502.16249), or `num` alone if not `normalise`.

    The feature map and the scale `D**-0.5` of the queries are applied inside. Sums are float32; the
    result is bitwise repeatable. All pairs up to 320 tokens, along several curves 640 (in float32
    32); from there on chunks of pairs and states between them: work linear in N.

    - `projected`: `[B, N, W]`, as one Linear layer writes it: queries, keys and values, `3 * H * D`
      columns; for LION-S the logits z of its gates, `C * H` columns for decays `1 - sigmoid(z)`,
      and less than 64 that align the rows (`padded_gates`). H is `heads`, D `dim`, of HEAD_DIMS.
    - `decay`: float32; LION-D's logits w `[C, H]`, or logs of decays `[C, B, N, H]`, <= 0; or None.
    - `curves`: `[C, N]`, int64; None is token order, for C = 1. C is `scans`.
    - `valid`: bool `[B, N]`, False for padding: keys that count nowhere, with a decay of 1.
    - `documents`: integers `[B, N]`; tokens of one document stand together, and mix with no other.
    - `prefix`: the first tokens, whose decay is 1 in LION-S. `lit`: there are no decays.
    - `features`: "elu" (`elu + 1`), "silu" (`silu + 0.5`, normalised) or "none".
    - `recurrent`: one state that walks over the tokens, and beside the output no more memory than a
      number per token and head (without decays, a state for every 512 tokens); without gradients.

    Returns `[B, N, H * D]` in the dtype of `projected`. Raises ValueError for what does not fit.
    """
    from lion_kernels import ops, recurrence

    if dim not in HEAD_DIMS:
        raise ValueError(f"The kernels have heads of width 16, 32, 64 or 128, not {dim}.")
    if documents is not None and curves is not None:
        raise ValueError("The kernels keep documents apart in token order alone: give no curves.")
    gates = 0 if lit or decay is not None else scans
    if not 0 <= projected.shape[2] - heads * (3 * dim + gates) < (64 if gates else 1):
        raise ValueError(f"{heads} heads of width {dim} do not fit {projected.shape[2]} columns.")
    options = (heads, dim, scans, prefix, lit, features, normalise, eps)
    tensors = (projected, decay, curves, valid, documents)
    if recurrent:
        return recurrence.recurrence_operator(*tensors, *options)
    return ops.mix_operator(*tensors, *options)[0]
