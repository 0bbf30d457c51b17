"""LION-Lit: no decays, so that every query meets one state of all keys, in linear time.

With phi and the denominator r_i as in `chunks.py`, q_i = phi(q_i) / sqrt(D) and means over tokens,
for sums of them would overflow in float16,

    S = 1/N sum_j phi(k_j) v_j^T    z = 1/N sum_j phi(k_j)    r_i = q_i . z + eps / N
    out_i = q_i S / r_i
    T = 1/N sum_i (q_i / r_i) dO_i^T    u = 1/N sum_i (q_i / r_i) delta_i
    d q_i = (S dO_i - delta_i z) / r_i    d phi(k_j) = T v_j - u    dv_j = phi(k_j) T

Programs have a CHUNK of the tokens; they leave means over it, which the next kernel averages.
"""

import triton
import triton.language as tl

from lion_kernels.common import (
    add_dot,
    dot,
    feature_map,
    feature_map_and_slope,
    feature_map_grad,
    key_mask,
    load_state,
    load_tile,
    part_of_sequence,
    store_state,
    store_tile,
)


@triton.jit
def _mean_state(STATES, VECTORS, num_chunks, D: tl.constexpr):
    """The mean of the chunks' states `[D, D]` and vectors `[D]`."""
    state = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for chunk in range(0, num_chunks):
        state += load_state(STATES + chunk * D * D, D)
        vector += tl.load(VECTORS + chunk * D + tl.arange(0, D))
    return state / num_chunks, vector / num_chunks


@triton.jit
def _dot_state(a, state):
    """`a state^T`, of which most cancels: in half precision also what rounding the state left."""
    rounded = state.to(a.dtype)
    product = dot(a, tl.trans(rounded))
    if a.dtype != tl.float32:
        remainder = (state - rounded.to(tl.float32)).to(a.dtype)
        product = add_dot(a, tl.trans(remainder), product)
    return product


@triton.jit
def key_state_kernel(
    QKV, VALID, STATES, VECTORS, n, heads, stride_n,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """S and z of each chunk, `[B, H, chunks, D, D]` and `[B, H, chunks, D]`, float32."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh = part_of_sequence(num_chunks)
    b, h = bh // heads, bh % heads
    K = QKV + b * n * stride_n + (heads + h) * D
    state = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        valid = tokens < n
        counts = key_mask(VALID, b * n, tokens, valid)
        k = load_tile(K, tokens, valid, stride_n, D)
        v = load_tile(K + heads * D, tokens, valid, stride_n, D)
        phi = tl.where(counts[:, None], feature_map(k, FEATURES), 0.0).to(k.dtype)  # [BLOCK, D]
        state = add_dot(tl.trans(phi), v, state)  # [D, D]
        vector += tl.sum(phi.to(tl.float32), 0)
    store_state(STATES, VECTORS, bh * num_chunks + chunk, state / CHUNK, vector / CHUNK, D)


@triton.jit
def mix_fwd_kernel(
    QKV, STATES, VECTORS, OUT, INV_DENOM, n, heads, stride_n, eps, out_scale,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """OUT `[B, N, H, D]` and 1 / r `[B, H, N]`; OUT_SCALE, if not normalised, makes means sums."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh = part_of_sequence(num_chunks)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * n * stride_n + h * D
    state, vector = _mean_state(
        STATES + bh * num_chunks * D * D, VECTORS + bh * num_chunks * D, num_chunks, D
    )
    state = state.to(dtype)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        valid = tokens < n
        q = feature_map(load_tile(Q, tokens, valid, stride_n, D), FEATURES) * D**-0.5
        q = q.to(dtype)
        out = dot(q, state)  # [BLOCK, D]
        if NORMALISE:
            inv_denom = 1 / (tl.sum(q.to(tl.float32) * vector[None, :], 1) + eps)
            out *= inv_denom[:, None]
            tl.store(INV_DENOM + bh * n + tokens, inv_denom, mask=valid)
        else:
            out *= out_scale
        store_tile(OUT + (b * n * heads + h) * D, tokens, valid, heads * D, out, D)


@triton.jit
def mix_bwd_dq_kernel(
    QKV, STATES, VECTORS, OUT, INV_DENOM, DO, QUERY_STATES, QUERY_VECTORS, DQKV,
    n, heads, stride_n, eps, out_scale,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """dq into DQKV, and T and u of each chunk. For the rounding residual, see `chunks.py`."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh = part_of_sequence(num_chunks)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * n * stride_n + h * D
    DQ = DQKV + b * n * stride_n + h * D
    state, vector = _mean_state(
        STATES + bh * num_chunks * D * D, VECTORS + bh * num_chunks * D, num_chunks, D
    )
    query_state = tl.zeros((D, D), tl.float32)
    query_vector = tl.zeros((D,), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        valid = tokens < n
        do = load_tile(DO + (b * n * heads + h) * D, tokens, valid, heads * D, D)
        delta = tl.zeros((BLOCK,), tl.float32)
        inv_denom = tl.full((BLOCK,), 1.0, tl.float32)
        if NORMALISE:
            out = load_tile(OUT + (b * n * heads + h) * D, tokens, valid, heads * D, D)
            delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
            inv_denom = tl.load(INV_DENOM + bh * n + tokens, mask=valid, other=0.0)
        q, slope = feature_map_and_slope(load_tile(Q, tokens, valid, stride_n, D), FEATURES)
        scaled = q * tl.where(valid, inv_denom * D**-0.5, 0.0)[:, None]  # q_i / r_i, [BLOCK, D]
        query_state = add_dot(tl.trans(scaled.to(dtype)), do, query_state)  # [D, D]
        query_vector += tl.sum(scaled * delta[:, None], 0)
        dq = _dot_state(do, state) - delta[:, None] * vector[None, :]  # [BLOCK, D]
        if NORMALISE and FEATURES != "none":
            residual = tl.sum(q * dq, 1) - eps * D**0.5 * delta
            dq -= (residual / tl.sum(q, 1))[:, None]
        dq *= (inv_denom * D**-0.5 * out_scale)[:, None]
        dq = feature_map_grad(q, slope, dq, FEATURES)
        store_tile(DQ, tokens, valid, stride_n, dq, D)
    index = bh * num_chunks + chunk
    store_state(QUERY_STATES, QUERY_VECTORS, index, query_state / CHUNK, query_vector / CHUNK, D)


@triton.jit
def mix_bwd_dkv_kernel(
    QKV, VALID, QUERY_STATES, QUERY_VECTORS, DQKV, n, heads, stride_n, out_scale,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """dk and dv into DQKV."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh = part_of_sequence(num_chunks)
    b, h = bh // heads, bh % heads
    K = QKV + b * n * stride_n + (heads + h) * D
    DK = DQKV + b * n * stride_n + (heads + h) * D
    state, vector = _mean_state(
        QUERY_STATES + bh * num_chunks * D * D, QUERY_VECTORS + bh * num_chunks * D, num_chunks, D
    )
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        valid = tokens < n
        counts = key_mask(VALID, b * n, tokens, valid)
        v = load_tile(K + heads * D, tokens, valid, stride_n, D)
        phi, slope = feature_map_and_slope(load_tile(K, tokens, valid, stride_n, D), FEATURES)
        phi = tl.where(counts[:, None], phi, 0.0)
        dk = (_dot_state(v, state) - vector[None, :]) * out_scale  # [BLOCK, D]
        dk = feature_map_grad(phi, slope, dk, FEATURES)
        dv = dot(phi.to(v.dtype), state.to(v.dtype)) * out_scale  # [BLOCK, D]
        store_tile(DK, tokens, valid, stride_n, tl.where(counts[:, None], dk, 0.0), D)
        store_tile(DK + heads * D, tokens, valid, stride_n, dv, D)
