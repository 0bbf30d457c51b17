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
        tl.store(TABLE + (h * SIZE + rows[:, None]) * SIZE + columns, mask)


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
def _masks(
    of_rows, columns, g, sums, SIZE: tl.constexpr, EXPONENTS: tl.constexpr, KEYS: tl.constexpr
):
    """M `[BLOCK, BLOCK_N]` summed over the curves, and `sums` with what g_ij adds to them."""
    SUMS, PLACES, xs, ys, places, stride = of_rows
    mask, added = tl.zeros(g.shape, tl.float32), ()
    for c in tl.static_range(len(xs)):
        x_j = tl.load(SUMS + c * stride + (SIZE if KEYS else 0) + columns)
        y_j = tl.load(SUMS + c * stride + (0 if KEYS else SIZE) + columns)
        t = tl.minimum(xs[c][:, None] - x_j[None, :], y_j[None, :] - ys[c][:, None])
        m = tl.exp2(t)
        mask += m
        if not EXPONENTS:
            place = tl.load(PLACES + c * SIZE + columns)[None, :]
            apart = place > places[c][:, None] if KEYS else place < places[c][:, None]
            others = tl.sum(tl.where(apart, 0.0, g * m) if KEYS else g * m, 1)
            added += (
                sums[2 * c] + tl.sum(tl.where(apart, g * m, 0.0), 1),
                sums[2 * c + 1] + others,
            )
        else:
            added += (sums[2 * c] + tl.sum(g * (m * t), 1), sums[2 * c + 1])
    return mask, added


@triton.jit
def mix_bwd_kernel(
    QKV, PHI_Q, PHI_K, SUMS, TABLE, PLACES, VALID, OUT, INV_DENOM, DO, DELTA, DQKV, DLOG_MASK,
    n, heads, stride_n, sums_c, sums_b, eps,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_CURVES: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq into DQKV, q' into PHI_Q and DELTA `[B, H, N]`; or, of KEYS, dk and dv from these.

    Rows are queries, phi being q' and v dO, or keys; columns are their partners, and M of keys by
    queries has x and y exchanged. Where there is no TABLE, each curve has sums of g_ij by row, with
    earlier keys, or later queries, and with others; with a TABLE, by query those of g_ij t_ij.
    """
    num_parts = tl.cdiv(n, BLOCK)
    part, bh, b, h, row, own = common.place(num_parts, heads, n, stride_n, D)
    images = tl.num_programs(0).to(tl.int64) // (num_parts * heads)
    V = QKV + row + 2 * heads * D
    OUT, DO, PHI_Q, PHI_K, DELTA = OUT + own, DO + own, PHI_Q + own, PHI_K + own, DELTA + bh * n
    SUMS += b * sums_b + h * NUM_VECTORS * SIZE
    rows, _, valid = common.tile(0, n, part * BLOCK, None, BLOCK)
    xs, ys, places = common.sums_of(SUMS, PLACES, rows, sums_c, SIZE, NUM_CURVES)
    if KEYS:
        xs, ys = ys, xs
        phi = common.load_tile(PHI_K, rows, valid, heads * D, D)  # [BLOCK, D]
        v = common.load_tile(V, rows, valid, stride_n, D)
    else:
        v = common.load_tile(DO, rows, valid, heads * D, D)
        delta = common.load_delta(v, OUT, rows, valid, heads * D, NORMALISE)
        tl.store(DELTA + rows, delta, mask=valid)
        inv_denom = tl.load(INV_DENOM + bh * n + rows, mask=valid, other=0.0)
        factor = inv_denom * (D**-0.5 / NUM_CURVES)
        phi = common.feature_map(common.load_tile(QKV + row, rows, valid, stride_n, D), FEATURES)[0]
        phi = common.narrow(phi * factor[:, None], v.dtype)  # [BLOCK, D]
        common.store_tile(PHI_Q, rows, valid, heads * D, phi, D)
    dphi, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    sums = (tl.zeros((BLOCK,), tl.float32),) * (2 * NUM_CURVES)
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        there = columns < n
        if KEYS:
            phi_j = common.load_tile(PHI_Q, columns, there, heads * D, D)  # [BLOCK_N, D]
            v_j = common.load_tile(DO, columns, there, heads * D, D)
            minus = tl.load(DELTA + columns, mask=there, other=0.0)[None, :]
        else:
            phi_j = common.load_tile(PHI_K, columns, there, heads * D, D)  # [BLOCK_N, D]
            v_j = common.load_tile(V, columns, there, stride_n, D)
            minus = delta[:, None]
        w = common.dot(phi, tl.trans(phi_j))  # [BLOCK, BLOCK_N]
        dw = common.dot(v, tl.trans(v_j)) - minus  # [BLOCK, BLOCK_N]
        if KEYS and TABLE is not None:
            mask = common.sum_of_masks(SUMS, TABLE, h * SIZE + rows, columns, xs, ys, sums_c, SIZE)
        else:
            of_rows = (SUMS, PLACES, xs, ys, places, sums_c)
            mask, sums = _masks(of_rows, columns, w * dw, sums, SIZE, TABLE is not None, KEYS)
            if TABLE is not None:
                mask = common.round_to(mask, v.dtype)
        if KEYS:
            dv = common.dot((w * mask).to(v.dtype), v_j, dv)  # [BLOCK, D]
        dphi = common.dot((dw * mask).to(v.dtype), phi_j, dphi)  # [BLOCK, D]
    for c in tl.static_range(NUM_CURVES):
        of_curve = DLOG_MASK + ((c * images * heads + bh) * 6 + (2 if KEYS else 0)) * SIZE + rows
        if TABLE is None or not KEYS:
            tl.store(of_curve, sums[2 * c], mask=valid)
        if TABLE is None:
            others = sums[2 * c + 1] if KEYS else sums[2 * c + 1] - sums[2 * c]
            tl.store(of_curve + SIZE, others, mask=valid)
    if KEYS:
        row += heads * D
        common.store_tile(DQKV + row + heads * D, rows, valid, stride_n, dv, D)
    else:
        if NORMALISE and FEATURES != "none":
            residual = tl.sum(phi.to(tl.float32) * dphi, 1) - eps * delta * inv_denom
            dphi -= (residual / tl.maximum(tl.sum(phi.to(tl.float32), 1), 1e-30))[:, None]
        dphi *= factor[:, None]
    dphi = common.back_to_rows(QKV + row, rows, valid, stride_n, dphi, D, FEATURES)
    if KEYS:
        dphi = tl.where(common.key_mask(VALID, b * n, rows, valid)[:, None], dphi, 0.0)
    common.store_tile(DQKV + row, rows, valid, stride_n, dphi, D)
