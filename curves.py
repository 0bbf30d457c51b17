"""Orders in which LION visits the patches of an image (the paper's space-filling snake curves).

A curve is an int64 tensor `[N]`: `curve[t]` is the token visited at step `t`. Patches are numbered
in raster order over an `(h, w)` grid; prefix tokens (class, distillation) come before all patches
and are visited first on every curve.
"""

import torch
from torch import Tensor

ORDERS = ("Normal", "S")


def row_snake(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Row by row, every second row from right to left: int64 `[h * w]`."""
    return _snake(torch.arange(h * w, device=device).view(h, w))


def column_snake(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Column by column, every second column upwards: `row_snake` of the transposed grid."""
    return _snake(torch.arange(h * w, device=device).view(h, w).T)


def inverse(curve: Tensor) -> Tensor:
    """Step at which each token is visited, of curves `[..., N]`: `curve[inverse(curve)]` counts."""
    return curve.argsort(dim=-1)


def scan_curves(
    order: str, grid: tuple[int, int], num_prefix: int = 0, device: torch.device | str | None = None
) -> Tensor | None:
    """Curves of an order over a patch grid, prefix tokens included.

    Returns int64 `[C, num_prefix + h * w]`: two snakes for order `S`, and None for `Normal`, whose
    single curve is the token order itself. Raises ValueError for an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"Unknown order {order!r}: choose one of {', '.join(ORDERS)}.")
    if order == "Normal":
        return None
    patches = torch.stack([row_snake(*grid, device=device), column_snake(*grid, device=device)])
    prefix = torch.arange(num_prefix, device=device).expand(2, -1)
    return torch.cat([prefix, patches + num_prefix], dim=1)


def _snake(grid: Tensor) -> Tensor:
    backwards = torch.arange(grid.shape[0], device=grid.device)[:, None] % 2 == 1
    return torch.where(backwards, grid.flip(1), grid).flatten()
