"""The published definition of the mixer, written for reading: float64, products step by step."""

import torch
from torch import Tensor

from curves import inverse, scan_curves


def dense_mask(decay: Tensor) -> Tensor:
    """M `[..., N, N]` of decays `[..., N]` in token order, row by row as the paper defines it."""
    lower = _products_below_diagonal(decay)
    upper = _products_below_diagonal(decay.flip(-1)).flip(-1, -2)
    return lower + upper + torch.eye(decay.shape[-1]).to(decay)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    documents: Tensor | None = None,
):
    """Same arguments and results as the formats of `models_lion`."""
    weights = q @ k.mT
    if documents is not None:
        weights = weights * (documents[:, :, None] == documents[:, None])[:, None]
    if log_decay is not None:
        decay = log_decay.exp()
        if curves is None:
            mask = dense_mask(decay[0])
        else:
            masks = []
            for curve, a in zip(curves, decay, strict=True):
                steps = inverse(curve)
                masks.append(dense_mask(a[..., curve])[..., steps, :][..., steps])
            mask = torch.stack(masks).mean(0)
        weights = weights * mask
    return weights @ v, weights.sum(-1, keepdim=True)


def curves_for(order: str, n: int) -> Tensor | None:
    """Curves of `n` tokens, one of them a prefix, over the squarest grid of the others."""
    if order == "S" and n == 1:
        return torch.zeros(2, 1, dtype=torch.long)
    h = max(d for d in range(1, n + 1) if (n - 1) % d == 0 and d * d <= max(n - 1, 1))
    return scan_curves(order, (h, (n - 1) // h), num_prefix=1)


def _products_below_diagonal(decay: Tensor) -> Tensor:
    n = decay.shape[-1]
    row = torch.zeros_like(decay)
    rows = [row]
    for i in range(1, n):
        diagonal = torch.nn.functional.one_hot(torch.tensor(i - 1), n).to(decay)
        row = (row + diagonal) * decay[..., i - 1 : i]
        rows.append(row)
    return torch.stack(rows, dim=-2)
