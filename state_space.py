"""The recurrences of state space models as pure functions: what Hydra and Vim mix tokens with.

Both read tokens in order, so a direction is chosen by the order of the tokens handed over. Time and
memory are linear in N, backward included; states are float32 or wider. On a GPU they are Triton
kernels (`lion_kernels.semiseparable`, `lion_kernels.scan`), which choose their chunks themselves.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lion_kernels


def semiseparable_product(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, *, chunk_size: int = 64
) -> Tensor:
    """`y_t = h_t c_t` with `h_t = e^(log_decay_t) h_(t-1) + x_t b_t^T` (arXiv 2405.21060).

    That is a lower triangular product `y_i = sum_(j<=i) e^(l_(j+1) + ... + l_i) (c_i . b_j) x_j`:
    matrix products inside chunks, carried states between them.

    - `x`: `[B, N, H, P]`; `b`, `c`: `[B, N, S]`, shared by the heads; all of one dtype.
    - `log_decay`: `[B, N, H]`, at most 0, float32 or wider.

    Returns `[B, N, H, P]` in the dtype of `x`.
    """
    if has_kernels(x) and {x.shape[3], b.shape[2]} <= set(lion_kernels.HEAD_DIMS):
        from lion_kernels.semiseparable import semiseparable_product

        return semiseparable_product(x, log_decay, b, c)
    n = x.shape[1]
    size = min(chunk_size, n)
    padding = -n % size  # at the end, where no token reads it
    x = F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, size)).transpose(2, 3)
    log_decay, b, c = (
        F.pad(t, (0, 0, 0, padding)).unflatten(1, (-1, size)) for t in (log_decay, b, c)
    )
    sums = log_decay.mT.cumsum(-1)  # [B, M, H, L], inside each of M chunks of L tokens
    total = sums[..., -1:]
    left = (total - sums).exp().to(x.dtype)
    states = _before_each_chunk((x * left.unsqueeze(-1)).mT @ b.unsqueeze(2), total.exp())
    weights = (c @ b.mT).unsqueeze(2) * _triangular_decay(sums).to(x.dtype)
    within = weights @ x  # [B, M, H, L, P]
    across = c.unsqueeze(2) @ states.to(x.dtype).mT * sums.exp().to(x.dtype).unsqueeze(-1)
    return (within + across).transpose(2, 3).flatten(1, 2)[:, :n]


def selective_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk_size: int = 32
) -> Tensor:
    """`y_t = h_t . c_t` with `h_t = e^(delta_t a) h_(t-1) + delta_t x_t b_t` (arXiv 2312.00752).

    Every channel and state has its own decay, so there is no matrix product: one multiplication and
    addition per token on all states. Backward computes the states of each chunk again.

    - `x`, `delta`: `[B, N, C]`; `a`: `[C, S]`, negative; `b`, `c`: `[B, N, S]`; of any dtypes.

    Returns `[B, N, C]` in the dtype of `x`.
    """
    if has_kernels(x):
        from lion_kernels.scan import selective_scan

        return selective_scan(x, delta, a, b, c)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, delta, a, b, c = (t.to(wide) for t in (x, delta, a, b, c))
    state = x.new_zeros(x.shape[0], *a.shape)
    outputs = []
    for chunk in zip(*(t.split(chunk_size, 1) for t in (x, delta, b, c)), strict=True):
        if torch.is_grad_enabled():
            state, y = checkpoint(
                _scan_chunk, state, a, *chunk, use_reentrant=False, preserve_rng_state=False
            )
        else:
            state, y = _scan_chunk(state, a, *chunk)
        outputs.append(y)
    return torch.cat(outputs, 1).to(dtype)


def has_kernels(x: Tensor) -> bool:
    """Whether there are kernels for tensors like `x`."""
    return bool(lion_kernels.ENABLED) and x.is_cuda and x.dtype in lion_kernels.DTYPES


def draw_step_bias(
    size: int, *, smallest: float = 1e-3, largest: float = 0.1, floor: float = 1e-4
) -> Tensor:
    """`[size]`, whose softplus is log-uniform between `smallest` and `largest`: initial steps."""
    low, high = math.log(smallest), math.log(largest)
    step = (low + (high - low) * torch.rand(size)).exp().clamp(min=floor)
    return step + (-torch.expm1(-step)).log()  # the inverse of softplus


def _before_each_chunk(added: Tensor, decay: Tensor) -> Tensor:
    """`h_(m+1) = decay_m h_m + added_m` from `h_0 = 0`: `[B, M, H, P, S]`; decay `[B, M, H, 1]`."""
    added = added.to(decay.dtype)
    states = [torch.zeros_like(added[:, 0])]
    for factor, addition in zip(
        decay.unsqueeze(-1).unbind(1)[:-1], added.unbind(1)[:-1], strict=True
    ):
        states.append(torch.addcmul(addition, factor, states[-1]))
    return torch.stack(states, dim=1)


def _triangular_decay(sums: Tensor) -> Tensor:
    """`e^(sums_i - sums_j)` for i >= j, else 0: `[..., L]` -> `[..., L, L]`."""
    size = sums.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=sums.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(later, -math.inf).exp()


def _scan_chunk(
    state: Tensor, a: Tensor, x: Tensor, delta: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """The state `[B, C, S]` after the chunk, and its outputs `[B, L, C]`."""
    decays = (delta.unsqueeze(-1) * a).exp()
    added = (delta * x).unsqueeze(-1) * b.unsqueeze(-2)
    states = []
    for decay, addition in zip(decays.unbind(1), added.unbind(1), strict=True):
        state = torch.addcmul(addition, decay, state)
        states.append(state)
    return state, (torch.stack(states, 1) @ c.unsqueeze(-1)).squeeze(-1)
