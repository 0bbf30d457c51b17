"""Hydra's and Vim's mixers written for reading: token by token, no flips, float64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def semiseparable_product(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Same arguments and result as that of `state_space`."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])  # [B, H, P, S]
    outputs = []
    for t in range(x.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        state = state + x[:, t, :, :, None] * b[:, t, None, None, :]
        outputs.append((state * c[:, t, None, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Same arguments and result as that of `state_space`."""
    state = x.new_zeros(x.shape[0], *a.shape)  # [B, C, S]
    outputs = []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None]
        state = (step * a).exp() * state + step * x[:, t, :, None] * b[:, t, None, :]
        outputs.append((state * c[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1)


def hydra_mixer(mixer: nn.Module, tokens: Tensor) -> Tensor:
    """`tokens` `[N, dim]` of one image through the parameters of a `HydraMixer`."""
    n, heads = tokens.shape[0], len(mixer.D)
    inner = mixer.norm.weight.numel()
    size = (mixer.conv.weight.shape[0] - inner) // 4
    projected = tokens @ mixer.in_proj.weight.T
    z, mixed, dt = projected.split((inner, inner + 4 * size, 2 * heads), 1)
    mixed = F.silu(convolved(mixer.conv, mixed, range(-3, 4)))
    x, b_ahead, c_ahead, b_back, c_back = mixed.split((inner, size, size, size, size), 1)
    total = x.view(n, heads, -1) * (x @ mixer.fc_D.weight.T + mixer.D).unsqueeze(-1)
    rows = list(total.unbind(0))
    for order, b, c, steps in (
        (range(n), b_ahead, c_ahead, dt[:, :heads]),
        (range(n - 1, -1, -1), b_back, c_back, dt[:, heads:]),
    ):
        state = x.new_zeros(heads, inner // heads, size)
        seen = torch.zeros_like(rows[0])  # by the token before, in this order
        for t in order:
            rows[t] = rows[t] + seen
            step = F.softplus(steps[t] + mixer.dt_bias)
            decay = torch.exp(-mixer.A_log.exp() * step)
            added = torch.einsum("h,hp,s->hps", step, x[t].view(heads, -1), b[t])
            state = decay[:, None, None] * state + added
            seen = state @ c[t]
    y = torch.stack(rows).flatten(1)
    y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return y * F.silu(z) @ mixer.out_proj.weight.T


def vim_mixer(mixer: nn.Module, tokens: Tensor) -> Tensor:
    """`tokens` `[N, dim]` of one image, class token first, through those of a `VimMixer`."""
    n = tokens.shape[0]
    half = (n - 1) // 2
    places = [*range(1, half + 1), 0, *range(half + 1, n)]
    x, z = (tokens[places] @ mixer.in_proj.weight.T).chunk(2, 1)
    total = 0
    for scan, order, taps in (
        (mixer.forward_scan, range(n), range(-3, 1)),
        (mixer.backward_scan, range(n - 1, -1, -1), range(3, -1, -1)),
    ):
        seen = F.silu(convolved(scan.conv, x, taps))
        size = scan.A_log.shape[1]
        projected = seen @ scan.x_proj.weight.T
        delta, b, c = projected.split((projected.shape[1] - 2 * size, size, size), 1)
        step = F.softplus(delta @ scan.dt_proj.weight.T + scan.dt_proj.bias)
        state = torch.zeros_like(scan.A_log)
        rows = [None] * n
        for t in order:
            decay = torch.exp(-step[t, :, None] * scan.A_log.exp())
            state = decay * state + (step[t] * seen[t])[:, None] * b[t]
            rows[t] = (state @ c[t] + scan.D * seen[t]) * F.silu(z[t])
        total = total + torch.stack(rows)
    mixed = (total / 2) @ mixer.out_proj.weight.T
    return torch.stack([mixed[places.index(t)] for t in range(n)])


def convolved(conv: nn.Conv1d, x: Tensor, taps: range) -> Tensor:
    """Depthwise: tap k of the kernel reads the token `taps[k]` places on, or 0 outside."""
    rows = []
    for t in range(len(x)):
        row = conv.bias
        for k, offset in enumerate(taps):
            if 0 <= t + offset < len(x):
                row = row + conv.weight[:, 0, k] * x[t + offset]
        rows.append(row)
    return torch.stack(rows)
