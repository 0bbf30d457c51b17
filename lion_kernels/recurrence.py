"""LION as a recurrence, for inference: the custom operator `lion::recurrence` stores no states.

A program has a head of an image, or some columns of its values, and walks with one state over the
blocks of tokens: along each curve first forwards, then backwards, and then it adds the pairs inside
the blocks. With the sums x (exclusive) and y (inclusive) of the log2 decays inside a block and
their total g,

    forwards   out_i += 2^(x_i) q_i S              S <- 2^g S + sum_j 2^(g - x_j) k_j v_j^T
    backwards  out_i += 2^(g - y_i) q_i S + pairs  S <- 2^g S + sum_j 2^(y_j) k_j v_j^T

where every exponent is at most 0. Between the walks OUT is the mean of the values so far, which
float16 has room for, and R its weight, the row sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels.common import (
    counted,
    decay_mask,
    decay_sums,
    load_features,
    load_rows,
    store_rows,
    visited,
)
from lion_kernels.ops import Task
from lion_kernels.registry import operator


@triton.jit
def _added(state, vector, k, share, v, PRECISION: tl.constexpr):
    """The states of pairs and of keys alone after some tokens, each with its share."""
    k *= share[:, None]
    state += tl.dot(tl.trans(k.to(v.dtype)), v, input_precision=PRECISION)
    return state, vector + tl.sum(k, 0)


@triton.jit
def recurrence_kernel(
    QKV, DECAY, CURVES, VALID, DOCUMENTS, OUT, R, n, heads, prefix, stride_b, stride_n,
    decay_b, decay_n, decay_h, eps, scale,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SCANS: tl.constexpr,
    DECAYS: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr,
    PACKED: tl.constexpr, CURVED: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """`eps` is the share of one walk; `scale` that of one curve."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D + part * COLUMNS
    OUT += (b * n * heads + h) * D + part * COLUMNS
    R += (bh * tl.num_programs(1) + part) * n  # the parts do not wait for each other
    blocks = tl.cdiv(n, ROWS)
    for c in range(SCANS):
        for side in tl.static_range(2):
            tl.debug_barrier()  # other threads stored what this one loads
            state = tl.zeros((D, COLUMNS), tl.float32)
            vector = tl.zeros((D,), tl.float32)
            for i in range(0, blocks):
                if side == 0:
                    steps = i * ROWS + tl.arange(0, ROWS)
                else:
                    steps = (blocks - 1 - i) * ROWS + tl.arange(0, ROWS)
                valid = steps < n
                tokens = visited(CURVES + c * n, steps, valid, CURVED)
                counts = counted(VALID + b * n, tokens, valid, PADDED)
                x, y = decay_sums(
                    DECAY + b * decay_b + (c * heads + h) * decay_h, DOCUMENTS + b * n, steps,
                    tokens, valid, counts, prefix, decay_n, DECAYS, PACKED,
                )  # fmt: skip
                total = tl.min(y, 0)
                if side == 0:
                    reached, left = tl.exp2(x), tl.exp2(total - x)
                else:
                    reached, left = tl.exp2(total - y), tl.exp2(y)
                # Warps may share a row. Barriers of the products part its loads from its stores.
                again = valid & ((c > 0) | (side == 1))
                before = load_rows(OUT, tokens, again, heads * D, COLUMNS)
                if NORMALISE:
                    r_before = tl.load(R + tokens, mask=again, other=0.0)
                q = load_features(Q, tokens, valid, stride_n, D, FEATURES, FAST) * scale
                k = load_features(K, tokens, counts, stride_n, D, FEATURES, FAST)
                v = load_rows(V, tokens, counts, stride_n, COLUMNS)
                q_t = q.to(dtype)
                out = tl.dot(q_t, state.to(dtype), input_precision=PRECISION) * reached[:, None]
                r = tl.sum(q * vector, 1) * reached
                if side == 1:
                    w = tl.dot(q_t, tl.trans(k.to(dtype)), input_precision=PRECISION)
                    x_j = tl.where(counts, x, 1e30)
                    w *= decay_mask(x[:, None], y[:, None], x_j[None, :], y[None, :])
                    r += tl.sum(w, 1)
                    out += tl.dot(w.to(dtype), v, input_precision=PRECISION)
                if NORMALISE:
                    r += r_before + eps
                    out = (out + before.to(tl.float32) * r_before[:, None]) * (1 / r)[:, None]
                    tl.store(R + tokens, r, mask=valid)
                else:
                    out += before.to(tl.float32)
                store_rows(OUT, tokens, valid, heads * D, out, COLUMNS)
                fade = tl.exp2(total)
                left = tl.where(counts, left, 0.0)
                state, vector = _added(state * fade, vector * fade, k, left, v, PRECISION)


@triton.jit
def unmasked_kernel(
    QKV, VALID, OUT, n, heads, stride_b, stride_n, eps, scale, unit,
    D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """One state of all tokens. It is their mean, as float16 has no room for sums of them."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D + part * COLUMNS
    OUT += (b * n * heads + h) * D + part * COLUMNS
    state = tl.zeros((D, COLUMNS), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for first in range(0, n, ROWS):
        tokens = first + tl.arange(0, ROWS)
        counts = counted(VALID + b * n, tokens, tokens < n, PADDED)
        k = load_features(K, tokens, counts, stride_n, D, FEATURES, FAST)
        v = load_rows(V, tokens, counts, stride_n, COLUMNS)
        share = tl.where(counts, 1.0, 0.0)
        state, vector = _added(state, vector, k, share, v, PRECISION)
    mean = (state / n).to(dtype)
    vector /= n
    for first in range(0, n, ROWS):
        tokens = first + tl.arange(0, ROWS)
        q = load_features(Q, tokens, tokens < n, stride_n, D, FEATURES, FAST) * scale
        out = tl.dot(q.to(dtype), mean, input_precision=PRECISION)
        if NORMALISE:
            out *= (1 / (tl.sum(q * vector, 1) + eps))[:, None]
        else:
            out *= unit
        store_rows(OUT, tokens, tokens < n, heads * D, out, COLUMNS)


def launch_options(dim: int, itemsize: int) -> dict[str, int]:
    """Tokens per block, columns of values per program and warps: what fits into the registers."""
    if itemsize == 4:
        return {
            "ROWS": max(16, 512 // dim),
            "COLUMNS": min(dim, 64),
            "num_warps": 4 if dim <= 64 else 8,
        }
    return {"ROWS": 64 if dim <= 64 else 32, "COLUMNS": dim, "num_warps": 4 if dim <= 64 else 8}


@operator("recurrence")
def recurrence_operator(
    projected: Tensor,
    decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    heads: int,
    dim: int,
    scans: int,
    prefix: int,
    lit: bool,
    features: str,
    normalise: bool,
    eps: float,
) -> Tensor:
    """The output of `lion::mix`, `[B, N, H * D]`; it has no gradient."""
    projected = projected.contiguous()
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected, decay, curves, valid, documents, *options)
    b, n, width = task.sizes
    out = task.empty(b, n, heads * dim, dtype=projected.dtype)
    launch = launch_options(dim, projected.element_size())
    parts = dim // launch["COLUMNS"]
    shared: dict[str, Any] = {
        "n": n, "heads": heads, "stride_b": n * width, "stride_n": width, "D": dim,
        "FEATURES": features, "PADDED": valid is not None, "NORMALISE": normalise,
        "PRECISION": "tf32x3" if projected.dtype == torch.float32 else "tf32",
        "FAST": task.fast, "num_stages": 1, **launch,
    }  # fmt: skip
    curves, valid, packed = map(task.or_any, (curves, valid, documents))
    if task.unmasked:
        unmasked_kernel[b * heads, parts](
            projected, valid, out, eps=eps / n, scale=dim**-0.5, unit=float(n), **shared
        )
        return out
    recurrence_kernel[b * heads, parts](
        projected, task.logits(), curves, valid, packed, out,
        task.empty(b, heads, parts, n if normalise else 0), eps=eps / (2 * scans),
        scale=dim**-0.5 / scans, SCANS=scans, PACKED=documents is not None,
        CURVED=task.curves is not None, **task.decays(), **shared,
    )  # fmt: skip
    return out


@torch.library.register_fake("lion::recurrence")
def _(projected, decay, curves, valid, documents, heads, dim, *_):
    return projected.new_empty(*projected.shape[:2], heads * dim)
