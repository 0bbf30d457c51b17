"""LION as a recurrence, for inference: the custom operator `lion::recurrence` stores no states.

A program has a head of an image, or some columns of its values, and walks with one state over the
blocks of tokens: along each curve forwards, then backwards, and adds the pairs inside the blocks.
Between the walks OUT is the mean of the values so far, and DENOM its denominator.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import common
from lion_kernels.decay import decay_cumsum
from lion_kernels.launches import operator
from lion_kernels.ops import ARGUMENTS, NUM_TENSORS, Call, like_outputs, mix_operator


@triton.jit
def recurrence_kernel(
    QKV, DECAY, CURVE, VALID, DOCUMENTS, OUT, DENOM, n, heads, prefix, stride_n, decay_c, decay_b,
    decay_n, eps, scale, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    NUM_CURVES: tl.constexpr, DECAYS: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """OUT `[B, N, H, D]` of QKV `[B, N, 3, H, D]`, and DENOM `[B, H, parts, N]`; `eps` is the share
    of one walk, `scale` that of one curve."""
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * n * stride_n + h * D
    K = Q + heads * D
    V = K + heads * D + part * COLUMNS
    OUT += (b * n * heads + h) * D + part * COLUMNS
    DENOM += (bh * tl.num_programs(1) + part) * n  # the parts do not wait for each other
    blocks = tl.cdiv(n, BLOCK)
    for c in range(NUM_CURVES):
        for backwards in tl.static_range(2):
            tl.debug_barrier()  # other threads stored what this one loads
            state = tl.zeros((D, COLUMNS), tl.float32)
            vector = tl.zeros((D,), tl.float32)
            for i in range(0, blocks):
                steps = (blocks - 1 - i if backwards else i) * BLOCK + tl.arange(0, BLOCK)
                valid = steps < n
                tokens, counts, x, y = decay_cumsum(
                    DECAY + c * decay_c + b * decay_b + h, CURVE, VALID, DOCUMENTS, c * n, b * n,
                    steps, valid, prefix, decay_n, DECAYS,
                )  # fmt: skip
                total = tl.min(y, 0)
                reached = tl.exp2(total - y if backwards else x)
                left = tl.exp2(y if backwards else total - x)
                # Warps may share a row. Barriers of the products part its loads from its stores.
                again = valid & ((c > 0) | (backwards == 1))
                before = common.load_tile(OUT, tokens, again, heads * D, COLUMNS)
                if NORMALISE:
                    denom_before = tl.load(DENOM + tokens, mask=again, other=0.0)
                q = common.load_tile(Q, tokens, valid, stride_n, D)
                phi = common.feature_map(q, FEATURES)[0] * scale
                k = common.feature_map(common.load_tile(K, tokens, valid, stride_n, D), FEATURES)[0]
                k = tl.where(counts[:, None], k, 0.0)
                v = common.load_tile(V, tokens, valid, stride_n, COLUMNS)
                q = phi.to(dtype)  # [BLOCK, D]
                out = common.dot(q, state.to(dtype)) * reached[:, None]  # [BLOCK, COLUMNS]
                denom = tl.sum(phi * vector, 1) * reached
                if backwards == 1:
                    w = common.dot(q, tl.trans(k.to(dtype)))  # [BLOCK, BLOCK]
                    w *= common.decay_mask(x[:, None], y[:, None], x[None, :], y[None, :])
                    denom += tl.sum(w, 1)
                    out = common.dot(w.to(dtype), v, out)
                if NORMALISE:
                    denom += denom_before + eps
                    out += before.to(tl.float32) * denom_before[:, None]
                    out *= (1 / denom)[:, None]
                    tl.store(DENOM + tokens, denom, mask=valid)
                else:
                    out += before.to(tl.float32)
                common.store_tile(OUT, tokens, valid, heads * D, out, COLUMNS)
                k *= left[:, None]
                state = common.dot(tl.trans(k.to(dtype)), v, state * tl.exp2(total))
                vector = vector * tl.exp2(total) + tl.sum(k, 0)


def launch_options(dim: int, itemsize: int) -> dict[str, int]:
    """Tokens per block, columns of values per program and warps: what fits into the registers."""
    half, warps = itemsize == 2, 4 if dim <= 64 else 8
    block = (64 if dim <= 64 else 32) if half else max(16, 512 // dim)
    columns = dim if half else min(dim, 64)
    return {"BLOCK": block, "COLUMNS": columns, "num_warps": warps, "num_stages": 1}


def _walk(call: Call) -> None:
    options = launch_options(call.dim, call.qkv.element_size())
    parts, rows = call.dim // options["COLUMNS"], call.values["n"] * call.values["NORMALISE"]
    call.launch(
        recurrence_kernel, (call.sequences, parts), options,
        DENOM=call.empty(call.sequences, parts, rows),
        eps=call.values["eps"] / (2 * call.num_curves), scale=call.dim**-0.5 / call.num_curves,
    )  # fmt: skip


@operator("recurrence", lambda *a: like_outputs(*a)[0], f"({ARGUMENTS}) -> Tensor")
def recurrence_operator(*arguments: Any) -> Tensor:
    """The output of `lion::mix`, `[B, N, H * D]`; it has no gradient."""
    if arguments[4] is None and arguments[9]:  # no decay: one state as it is
        return mix_operator(*arguments)[0]
    out = like_outputs(*arguments)[0]
    Call.run(_walk, (*arguments[:NUM_TENSORS], out), arguments[NUM_TENSORS:])
    return out
