"""LION-Lit: no decays, so that every query meets one state of all keys, in linear time.

With phi and the denominator r_i as in `chunks.py`, q_i = phi(q_i) / sqrt(D) and means over tokens,
for sums of them would overflow in float16,

    S = 1/N sum_j phi(k_j) v_j^T        z = 1/N sum_j phi(k_j)
    T = 1/N sum_i (q_i / r_i) dO_i^T    u = 1/N sum_i (q_i / r_i) delta_i
    r_i = q_i . z + eps / N             out_i = q_i S / r_i
    d q_i = (S dO_i - delta_i z) / r_i    d phi(k_j) = T v_j - u    dv_j = phi(k_j) T

Programs have a CHUNK of the tokens; they leave means over it, which the next kernel averages.
"""

import triton
import triton.language as tl

from lion_kernels import common


@triton.jit
def _mean_state(STATES, VECTORS, first, num_chunks, D: tl.constexpr):
    """The mean of the states `[D, D]` and vectors `[D]` of a sequence's chunks."""
    state, vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    STATES, VECTORS = STATES + first * D * D, VECTORS + first * D + tl.arange(0, D)
    for chunk in range(0, num_chunks):
        state += common.load_state(STATES + chunk * D * D, D)
        vector += tl.load(VECTORS + chunk * D)
    return state / num_chunks, vector / num_chunks


@triton.jit
def _dot_state(a, state):
    """`a state^T`, of which most cancels: in half precision also what rounding the state left."""
    rounded = state.to(a.dtype)
    product = common.dot(a, tl.trans(rounded))
    if a.dtype != tl.float32:
        remainder = (state - rounded.to(tl.float32)).to(a.dtype)
        product = common.dot(a, tl.trans(remainder), product)
    return product


@triton.jit
def key_state_kernel(
    QKV, VALID, STATES, VECTORS, n, heads, stride_n,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """S and z of each chunk, `[B, H, chunks, D, D]` and `[B, H, chunks, D]`, float32."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    K = QKV + row + heads * D
    state, vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        _, tokens, valid = common.tile(0, n, first, None, BLOCK)
        counts = common.key_mask(VALID, b * n, tokens, valid)
        k = common.load_tile(K, tokens, valid, stride_n, D)
        v = common.load_tile(K + heads * D, tokens, valid, stride_n, D)
        phi = tl.where(counts[:, None], common.feature_map(k, FEATURES)[0], 0.0).to(k.dtype)
        state = common.dot(tl.trans(phi), v, state)  # [D, D]
        vector += tl.sum(phi.to(tl.float32), 0)
    common.store_state(STATES, VECTORS, bh * num_chunks + chunk, state / CHUNK, vector / CHUNK, D)


@triton.jit
def mix_fwd_kernel(
    QKV, STATES, VECTORS, OUT, INV_DENOM, n, heads, stride_n, eps, out_scale, D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """OUT `[B, N, H, D]` and 1 / r `[B, H, N]`; if not normalised, `out_scale` makes sums."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    state, vector = _mean_state(STATES, VECTORS, bh * num_chunks, num_chunks, D)
    state = state.to(QKV.dtype.element_ty)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        _, tokens, valid = common.tile(0, n, first, None, BLOCK)
        q = common.load_tile(QKV + row, tokens, valid, stride_n, D)
        q = (common.feature_map(q, FEATURES)[0] * D**-0.5).to(q.dtype)
        out = common.dot(q, state)  # [BLOCK, D]
        if NORMALISE:
            inv_denom = 1 / (tl.sum(q.to(tl.float32) * vector[None, :], 1) + eps)
            out *= inv_denom[:, None]
            tl.store(INV_DENOM + bh * n + tokens, inv_denom, mask=valid)
        else:
            out *= out_scale
        common.store_tile(OUT + own, tokens, valid, heads * D, out, D)


@triton.jit
def mix_bwd_dq_kernel(
    QKV, STATES, VECTORS, OUT, INV_DENOM, DO, QUERY_STATES, QUERY_VECTORS, DQKV, n, heads, stride_n,
    eps, out_scale, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """dq into DQKV, and T and u of each chunk. For the rounding residual, see `chunks.py`."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    state, vector = _mean_state(STATES, VECTORS, bh * num_chunks, num_chunks, D)
    query_state, query_vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        _, tokens, valid = common.tile(0, n, first, None, BLOCK)
        do = common.load_tile(DO + own, tokens, valid, heads * D, D)
        delta = common.load_delta(do, OUT + own, tokens, valid, heads * D, NORMALISE)
        inv_denom = tl.load(INV_DENOM + bh * n + tokens, mask=valid, other=0.0)
        q = common.load_tile(QKV + row, tokens, valid, stride_n, D)
        q, slope = common.feature_map(q, FEATURES)
        scaled = q * tl.where(valid, inv_denom * D**-0.5, 0.0)[:, None]  # q_i / r_i, [BLOCK, D]
        narrow = common.narrow(scaled, do.dtype)
        query_state = common.dot(tl.trans(narrow), do, query_state)  # [D, D]
        query_vector += tl.sum(scaled * delta[:, None], 0)
        dq = _dot_state(do, state) - delta[:, None] * vector[None, :]  # [BLOCK, D]
        if NORMALISE and FEATURES != "none":
            residual = tl.sum(q * dq, 1) - eps * D**0.5 * delta
            dq -= (residual / tl.sum(q, 1))[:, None]
        dq *= (inv_denom * D**-0.5 * out_scale)[:, None]
        dq = common.feature_map_grad(q, slope, dq, FEATURES)
        common.store_tile(DQKV + row, tokens, valid, stride_n, dq, D)
    state, vector = query_state / CHUNK, query_vector / CHUNK
    common.store_state(QUERY_STATES, QUERY_VECTORS, bh * num_chunks + chunk, state, vector, D)


@triton.jit
def mix_bwd_dkv_kernel(
    QKV, VALID, QUERY_STATES, QUERY_VECTORS, DQKV, n, heads, stride_n, out_scale,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """dk and dv into DQKV."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    K, DK = QKV + row + heads * D, DQKV + row + heads * D
    state, vector = _mean_state(QUERY_STATES, QUERY_VECTORS, bh * num_chunks, num_chunks, D)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n), BLOCK):
        _, tokens, valid = common.tile(0, n, first, None, BLOCK)
        counts = common.key_mask(VALID, b * n, tokens, valid)
        v = common.load_tile(K + heads * D, tokens, valid, stride_n, D)
        k = common.load_tile(K, tokens, valid, stride_n, D)
        phi, slope = common.feature_map(k, FEATURES)
        phi = tl.where(counts[:, None], phi, 0.0)
        dk = (_dot_state(v, state) - vector[None, :]) * out_scale  # [BLOCK, D]
        dk = common.feature_map_grad(phi, slope, dk, FEATURES)
        dv = common.dot(phi.to(v.dtype), state.to(v.dtype)) * out_scale  # [BLOCK, D]
        common.store_tile(DK, tokens, valid, stride_n, tl.where(counts[:, None], dk, 0.0), D)
        common.store_tile(DK + heads * D, tokens, valid, stride_n, dv, D)
