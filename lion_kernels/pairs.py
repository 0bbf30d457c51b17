"""LION along several curves: all pairs of tokens under the mean of the curves' masks.

Tokens stay in their order, SUMS are by token, and curves share the products of pairs. Features come
from PHI_K and, in the backward pass, as q' from PHI_Q, both `[B, N, H, D]`. Where decays are alike
in all tokens and images (LION-D), TABLE `[H, SIZE, SIZE]` has the sum of a head's masks, symmetric,
and a logit's gradient comes from sums of g_ij t_ij, t_ij the exponent of a pair's mask.
"""

import triton
import triton.language as tl

from lion_kernels import common
from lion_kernels.decay import NUM_VECTORS


@triton.jit
def key_feature_kernel(
    QKV, VALID, PHI_K, n, heads, stride_n,
    D: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """phi of the keys, zero where none count: `[B, N, H, D]`."""
    part, bh, b, h, row, own = common.place(tl.cdiv(n, BLOCK), heads, n, stride_n, D)
    _, tokens, valid = common.tile(0, n, part * BLOCK, None, BLOCK)
    counts = common.key_mask(VALID, b * n, tokens, valid)
    k = common.load_tile(QKV + row + heads * D, tokens, valid, stride_n, D)
    phi = tl.where(counts[:, None], common.feature_map(k, FEATURES)[0], 0.0)
    common.store_tile(PHI_K + own, tokens, valid, heads * D, phi, D)


@triton.jit
def mask_table_kernel(
    SUMS, TABLE, heads, sums_c, SIZE: tl.constexpr, BLOCK: tl.constexpr, NUM_CURVES: tl.constexpr
):
    """The sum of each head's masks: TABLE `[H, SIZE, SIZE]`."""
    part, h, _, _, _, _ = common.place(SIZE // BLOCK, heads)
    SUMS += h * NUM_VECTORS * SIZE
    rows = part * BLOCK + tl.arange(0, BLOCK)
    xs, ys, _ = common.sums_of(SUMS, None, rows, sums_c, SIZE, NUM_CURVES)
    for start in range(0, SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = common.sum_of_masks(SUMS, None, rows, columns, xs, ys, sums_c, SIZE)
        address = TABLE + (h * SIZE + rows[:, None]) * SIZE + columns
        tl.store(address, mask.to(TABLE.dtype.element_ty))


@triton.jit
def mix_fwd_kernel(
    QKV, PHI_K, SUMS, TABLE, OUT, INV_DENOM, n, heads, stride_n, sums_c, sums_b, eps,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_CURVES: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """OUT `[B, N, H, D]` and 1 / r `[B, H, N]` of QKV `[B, N, 3, H, D]`."""
    part, bh, b, h, row, own = common.place(tl.cdiv(n, BLOCK), heads, n, stride_n, D)
    Q, V = QKV + row, QKV + row + 2 * heads * D
    PHI_K, OUT = PHI_K + own, OUT + own
    SUMS += b * sums_b + h * NUM_VECTORS * SIZE
    rows, _, valid = common.tile(0, n, part * BLOCK, None, BLOCK)
    xs, ys, _ = common.sums_of(SUMS, None, rows, sums_c, SIZE, NUM_CURVES)
    q = common.feature_map(common.load_tile(Q, rows, valid, stride_n, D), FEATURES)[0]
    q = (q * (D**-0.5 / NUM_CURVES)).to(QKV.dtype.element_ty)  # [BLOCK, D]
    out = tl.zeros((BLOCK, D), tl.float32)
    denom = tl.full((BLOCK,), eps, tl.float32)
    rounding = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = common.load_tile(PHI_K, columns, columns < n, heads * D, D)
        v = common.load_tile(V, columns, columns < n, stride_n, D)
        w = common.dot(q, tl.trans(k))  # [BLOCK, BLOCK_N]
        w *= common.sum_of_masks(SUMS, TABLE, h * SIZE + rows, columns, xs, ys, sums_c, SIZE)
        rounded = common.round_to(w, v.dtype)
        denom += tl.sum(w, 1)
        rounding += tl.sum(rounded - w, 1)
        out = common.dot(rounded.to(v.dtype), v, out)  # [BLOCK, D]
    if NORMALISE:
        tl.store(INV_DENOM + bh * n + rows, 1 / denom, mask=valid)
        out *= (1 / (denom + rounding))[:, None]  # rounded weights sum to 1 as well
    common.store_tile(OUT, rows, valid, heads * D, out, D)


@triton.jit
def mix_bwd_dq_kernel(
    QKV, PHI_Q, PHI_K, SUMS, TABLE, PLACES, OUT, INV_DENOM, DO, DELTA, DQKV, DLOG_MASK,
    n, heads, stride_n, sums_c, sums_b, eps,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_CURVES: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """dq into DQKV, q' into PHI_Q, DELTA `[B, H, N]`, and each curve's sums by query: of g_ij with
    keys earlier on it and with others, or, where there is a TABLE, of g_ij t_ij."""
    SIDES: tl.constexpr = 2 if TABLE is None else 1
    num_parts = tl.cdiv(n, BLOCK)
    part, bh, b, h, row, own = common.place(num_parts, heads, n, stride_n, D)
    images = tl.num_programs(0).to(tl.int64) // (num_parts * heads)
    dtype = QKV.dtype.element_ty
    Q, V = QKV + row, QKV + row + 2 * heads * D
    OUT, DO, PHI_Q, PHI_K = OUT + own, DO + own, PHI_Q + own, PHI_K + own
    SUMS += b * sums_b + h * NUM_VECTORS * SIZE
    rows, _, valid = common.tile(0, n, part * BLOCK, None, BLOCK)
    xs, ys, places = common.sums_of(SUMS, PLACES, rows, sums_c, SIZE, NUM_CURVES)
    do = common.load_tile(DO, rows, valid, heads * D, D)
    delta = common.load_delta(do, OUT, rows, valid, heads * D, NORMALISE)
    tl.store(DELTA + bh * n + rows, delta, mask=valid)
    inv_denom = tl.load(INV_DENOM + bh * n + rows, mask=valid, other=0.0)
    factor = inv_denom * (D**-0.5 / NUM_CURVES)
    q = common.feature_map(common.load_tile(Q, rows, valid, stride_n, D), FEATURES)[0]
    q = (q * factor[:, None]).to(dtype)  # q', [BLOCK, D]
    common.store_tile(PHI_Q, rows, valid, heads * D, q, D)
    dq = tl.zeros((BLOCK, D), tl.float32)
    sums = (tl.zeros((BLOCK,), tl.float32),) * (SIDES * NUM_CURVES)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = common.load_tile(PHI_K, columns, columns < n, heads * D, D)
        v = common.load_tile(V, columns, columns < n, stride_n, D)
        dw = common.dot(do, tl.trans(v)) - delta[:, None]
        g = common.dot(q, tl.trans(k)) * dw  # [BLOCK, BLOCK_N]
        mask = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        added = ()
        for c in tl.static_range(NUM_CURVES):
            x_j = tl.load(SUMS + c * sums_c + columns)
            y_j = tl.load(SUMS + c * sums_c + SIZE + columns)
            t = tl.minimum(xs[c][:, None] - x_j[None, :], y_j[None, :] - ys[c][:, None])
            m = tl.exp2(t)
            mask += m
            if TABLE is None:
                place = tl.load(PLACES + c * SIZE + columns)[None, :]
                earlier = tl.sum(tl.where(place < places[c][:, None], g * m, 0.0), 1)
                added += (sums[2 * c] + earlier, sums[2 * c + 1] + tl.sum(g * m, 1))
            else:
                added += (sums[c] + tl.sum(g * (m * t), 1),)
        sums = added
        if TABLE is not None:
            mask = common.round_to(mask, dtype)
        dq = common.dot((dw * mask).to(dtype), k, dq)  # [BLOCK, D]
    for c in tl.static_range(NUM_CURVES):
        of_curve = DLOG_MASK + (c * images * heads + bh) * 6 * SIZE + rows
        tl.store(of_curve, sums[SIDES * c], mask=valid)
        if TABLE is None:
            tl.store(of_curve + SIZE, sums[2 * c + 1] - sums[2 * c], mask=valid)
    if NORMALISE and FEATURES != "none":
        residual = tl.sum(q.to(tl.float32) * dq, 1) - eps * delta * inv_denom
        dq -= (residual / tl.maximum(tl.sum(q.to(tl.float32), 1), 1e-30))[:, None]
    dq = common.back_to_rows(Q, rows, valid, stride_n, dq * factor[:, None], D, FEATURES)
    common.store_tile(DQKV + row, rows, valid, stride_n, dq, D)


@triton.jit
def mix_bwd_dkv_kernel(
    QKV, PHI_Q, PHI_K, SUMS, TABLE, PLACES, VALID, DO, DELTA, DQKV, DLOG_MASK, n, heads, stride_n,
    sums_c, sums_b, D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_CURVES: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """dk and dv into DQKV, and, where there is no TABLE, each curve's sums of g_ij by key: with
    later queries, and with others. Products are keys by queries."""
    num_parts = tl.cdiv(n, BLOCK)
    part, bh, b, h, row, own = common.place(num_parts, heads, n, stride_n, D)
    images = tl.num_programs(0).to(tl.int64) // (num_parts * heads)
    K, DK = QKV + row + heads * D, DQKV + row + heads * D
    DO, PHI_Q, PHI_K, DELTA = DO + own, PHI_Q + own, PHI_K + own, DELTA + bh * n
    SUMS += b * sums_b + h * NUM_VECTORS * SIZE
    rows, _, valid = common.tile(0, n, part * BLOCK, None, BLOCK)
    xs, ys, places = common.sums_of(SUMS, PLACES, rows, sums_c, SIZE, NUM_CURVES)
    k = common.load_tile(PHI_K, rows, valid, heads * D, D)  # phi(k), [BLOCK, D]
    v = common.load_tile(K + heads * D, rows, valid, stride_n, D)
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    sums = (tl.zeros((BLOCK,), tl.float32),) * (2 * NUM_CURVES)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < n
        q = common.load_tile(PHI_Q, columns, there, heads * D, D)  # q', [BLOCK_N, D]
        do = common.load_tile(DO, columns, there, heads * D, D)
        delta = tl.load(DELTA + columns, mask=there, other=0.0)
        w = common.dot(k, tl.trans(q))  # [BLOCK, BLOCK_N]
        dw = common.dot(v, tl.trans(do)) - delta[None, :]  # [BLOCK, BLOCK_N]
        if TABLE is None:
            g = w * dw
            mask = tl.zeros((BLOCK, BLOCK_N), tl.float32)
            added = ()
            for c in tl.static_range(NUM_CURVES):
                x_i = tl.load(SUMS + c * sums_c + columns)
                y_i = tl.load(SUMS + c * sums_c + SIZE + columns)
                place = tl.load(PLACES + c * SIZE + columns)[None, :]
                m = common.decay_mask(x_i[None, :], y_i[None, :], xs[c][:, None], ys[c][:, None])
                mask += m
                later = tl.sum(tl.where(place > places[c][:, None], g * m, 0.0), 1)
                others = tl.sum(tl.where(place <= places[c][:, None], g * m, 0.0), 1)
                added += (sums[2 * c] + later, sums[2 * c + 1] + others)
            sums = added
        else:
            mask = common.sum_of_masks(SUMS, TABLE, h * SIZE + rows, columns, xs, ys, sums_c, SIZE)
        dv = common.dot((w * mask).to(k.dtype), do, dv)  # [BLOCK, D]
        dk = common.dot((dw * mask).to(k.dtype), q, dk)  # [BLOCK, D]
    if TABLE is None:
        for c in tl.static_range(NUM_CURVES):
            of_curve = DLOG_MASK + ((c * images * heads + bh) * 6 + 2) * SIZE + rows
            tl.store(of_curve, sums[2 * c], mask=valid)
            tl.store(of_curve + SIZE, sums[2 * c + 1], mask=valid)
    counts = common.key_mask(VALID, b * n, rows, valid)
    dk = common.back_to_rows(K, rows, valid, stride_n, dk, D, FEATURES)
    common.store_tile(DK, rows, valid, stride_n, tl.where(counts[:, None], dk, 0.0), D)
    common.store_tile(DK + heads * D, rows, valid, stride_n, dv, D)
