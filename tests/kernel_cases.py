"""Inputs of the mixer's kernels and what they should return, for the tests of every kernel."""

from itertools import product

import pytest
import torch
from reference import curves_for, dense
from torch.nn import functional as F

import lion_kernels
from models_lion import FEATURE_MAPS, attention

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = [(m, o) for m, o in product(FEATURE_MAPS, ("Normal", "S")) if (m, o) != ("Lit", "S")]
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def make_inputs(
    mask, order, n, dim=16, dtype=torch.float32, batch=2, heads=2, gate=1.0, num_curves=None
):  # fmt: skip
    """Projected tokens, LION-D's logits or None, the order's curves (at most `num_curves`) or None,
    and the output's gradient."""
    generator = torch.Generator().manual_seed(n)
    curves = None if order == "Normal" or mask == "Lit" else curves_for(order, n)[:num_curves]
    scans = 1 if curves is None else len(curves)
    gates = lion_kernels.padded_gates(scans * heads) if mask == "Selective" else 0
    projected, grad = (
        torch.randn(batch, n, width, generator=generator)
        for width in (3 * heads * dim + gates, heads * dim)
    )
    projected[..., 3 * heads * dim :] *= gate
    decay = gate * torch.randn(scans, heads, generator=generator) if mask == "Decay" else None
    projected, grad = projected.to(DEVICE, dtype), grad.to(DEVICE, dtype)
    decay, curves = (t if t is None else t.to(DEVICE) for t in (decay, curves))
    if mask == "Decay":  # random gradients alone would cancel in the sum over tokens
        grad += exact(projected, decay, curves, grad, mask, dim, formula=attention)[0]
    return projected, decay, curves, grad


def call(
    projected, decay, curves, grad, mask, dim=16, valid=None, documents=None, **options
):  # fmt: skip
    """The output of the kernels."""
    return lion_kernels.mix(
        projected, decay, curves, valid, documents,
        heads=grad.shape[2] // dim, dim=dim, lit=mask == "Lit",
        scans=1 if curves is None else len(curves),
        **{"features": "elu" if mask == "Lit" else "silu", "prefix": 1, **options},
    )  # fmt: skip


def exact(
    projected, decay, curves, grad, mask, dim=16, valid=None, documents=None,
    normalise=True, features=None, formula=dense,
):  # fmt: skip
    leaves = [t.double().requires_grad_() for t in (projected, decay) if t is not None]
    b, n, width = grad.shape
    heads, scans = width // dim, 1 if curves is None else len(curves)
    qkv, gates = leaves[0][..., : 3 * width], leaves[0][..., 3 * width :][..., : scans * heads]
    q, k, v = qkv.view(b, n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    if features != "none":
        q, k = (FEATURE_MAPS[mask](t) for t in (q, k))
    log_decay = None
    if mask == "Decay":
        log_decay = F.logsigmoid(leaves[1])[:, None, :, None].expand(-1, 1, -1, n)
    elif mask == "Selective":
        log_decay = F.logsigmoid(-gates.view(b, n, scans, heads).permute(2, 0, 3, 1))
        log_decay = F.pad(log_decay[..., 1:], (1, 0))
    if valid is not None:
        k = k * valid[:, None, :, None]
        log_decay = log_decay if log_decay is None else log_decay * valid[:, None]
    numerator, denominator = formula(q * dim**-0.5, k, v, log_decay, curves, documents)
    y = numerator / (denominator + 1e-6) if normalise else numerator
    y = y.transpose(1, 2).flatten(2)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.double(), materialize_grads=True)]
