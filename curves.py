"""Orders in which LION visits the patches of an image, including the paper's snake curves.

A curve is an int64 tensor `[N]`: `curve[t]` is the token visited at step `t`. Patches are numbered
in raster order over an `(h, w)` grid; prefix tokens (class, distillation) come before all patches
and are visited first on every curve. LION reads a curve in both directions, so a curve and its
reverse are equivalent: of the eight snakes that begin in a corner, four are distinct.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def row_snake(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Row by row, every second row from right to left: int64 `[h * w]`."""
    return _snake(_patches(h, w, device))


def column_snake(h: int, w: int, device: torch.device | str | None = None) -> Tensor:
    """Column by column, every second column upwards: `row_snake` of the transposed grid."""
    return _snake(_patches(h, w, device).T)


def inverse(curve: Tensor) -> Tensor:
    """The step at which each token is visited: `curve[inverse(curve)]` is 0, 1, ...; `[..., N]`."""
    return curve.argsort(dim=-1)


def check_order(order: str) -> None:
    """Raises ValueError for an unknown order."""
    known = isinstance(order, str) and all(name in ORDERS for name in order.split("+"))
    if order != "Normal" and not known:
        raise ValueError(
            f"Unknown order {order!r}: choose one of Normal, {', '.join(ORDERS)}, or several "
            "joined by +, such as S+Hilbert."
        )


def num_curves(order: str) -> int:
    """Number of curves of an order, each with its own decays."""
    if order == "Normal":
        return 1
    return sum(len(ORDERS[name][1]) for name in order.split("+"))


def scan_curves(
    order: str, grid: tuple[int, int], num_prefix: int = 0, device: torch.device | str | None = None
) -> Tensor | None:
    """Curves of an order over a patch grid, prefix tokens included.

    Returns int64 `[C, num_prefix + h * w]` (for orders joined by `+`, the curves of all of them),
    or None for `Normal`, whose single curve is the token order itself. Raises ValueError for an
    unknown order.
    """
    check_order(order)
    if order == "Normal":
        return None
    patches = _patches(*grid, device)
    along = [ORDERS[name] for name in order.split("+")]
    curves = torch.stack([visit(view(patches)) for visit, views in along for view in views])
    prefix = torch.arange(num_prefix, device=device).expand(len(curves), -1)
    return torch.cat([prefix, curves + num_prefix], dim=1)


def _patches(h: int, w: int, device: torch.device | str | None) -> Tensor:
    return torch.arange(h * w, device=device).view(h, w)


def _snake(grid: Tensor) -> Tensor:
    backwards = torch.arange(grid.shape[0], device=grid.device)[:, None] % 2 == 1
    return torch.where(backwards, grid.flip(1), grid).flatten()


def _diagonal(grid: Tensor) -> Tensor:
    """Diagonal by diagonal from the upper left corner, every second one upwards."""
    rows, columns = _rows_and_columns(grid)
    diagonal = rows + columns
    along = torch.where(diagonal % 2 == 0, columns, rows)
    return grid.flatten()[(diagonal * sum(grid.shape) + along).flatten().argsort()]


def _morton(grid: Tensor) -> Tensor:
    """Z-order: quarter by quarter, recursively, of the smallest power-of-2 square around it."""
    rows, columns = _rows_and_columns(grid)
    code = torch.zeros_like(grid)
    for bit in range(max(grid.shape).bit_length()):
        code |= ((columns >> bit & 1) << 2 * bit) | ((rows >> bit & 1) << 2 * bit + 1)
    return grid.flatten()[code.flatten().argsort()]


def _hilbert(grid: Tensor) -> Tensor:
    """A Hilbert curve of any rectangle, from the upper left to the upper right corner.

    Every step leads to a neighbour; if sides are odd, some steps are diagonal.
    """
    h, w = grid.shape
    if h == 1 or w == 1:
        return grid.flatten()
    half = _even_half(w)
    if 2 * w > 3 * h:
        return torch.cat([_hilbert(grid[:, :half]), _hilbert(grid[:, half:])])
    upper = _even_half(h)
    down, up = grid[:upper, : w // 2], grid[:upper, w // 2 :]
    return torch.cat([_hilbert(down.T), _hilbert(grid[upper:]), _hilbert(up.flip(0, 1).T)])


def _even_half(side: int) -> int:
    """About half of a side; even if the side is longer than 2, which avoids diagonal steps."""
    half = side // 2
    return half + half % 2 if side > 2 else half


def _rows_and_columns(grid: Tensor) -> tuple[Tensor, Tensor]:
    h, w = grid.shape
    return (
        torch.arange(h, device=grid.device)[:, None].expand(h, w),
        torch.arange(w, device=grid.device).expand(h, w),
    )


def _as_it_is(grid: Tensor) -> Tensor:
    return grid


def _transposed(grid: Tensor) -> Tensor:
    return grid.T


def _mirrored(grid: Tensor) -> Tensor:
    return grid.flip(1)


def _transposed_and_mirrored(grid: Tensor) -> Tensor:
    return grid.T.flip(1)


View = Callable[[Tensor], Tensor]
# The function that visits a grid, and the views of the grid it is applied to, one per curve.
ORDERS: dict[str, tuple[View, tuple[View, ...]]] = {
    "S": (_snake, (_as_it_is, _transposed)),
    "Snakes": (_snake, (_as_it_is, _transposed, _mirrored, _transposed_and_mirrored)),
    "Diagonal": (_diagonal, (_as_it_is, _mirrored)),
    "Morton": (_morton, (_as_it_is, _transposed)),
    "Hilbert": (_hilbert, (_as_it_is, _transposed)),
}
