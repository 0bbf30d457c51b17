"""Pairs of tokens inside a block, and the states that the other blocks hand in.

A program has one block. Sequences of one block are the quadratic form. Without a mask there are no
pairs: every token meets one state of all others.
"""

import triton
import triton.language as tl

from kernels.common import (
    counted,
    decay_mask,
    feature_map_grad,
    gate_logits,
    load_features,
    load_rows,
    load_square,
    output_grad,
    store_rows,
    visited,
)


@triton.jit
def _key_sums(X, Y, steps, counts):
    """x and y of keys; those that do not count get the weight 0 from every query."""
    return tl.load(X + steps, mask=counts, other=1e30), tl.load(Y + steps, mask=counts, other=-1e30)


@triton.jit
def forward_kernel(
    QKV, X, Y, CURVE, VALID, STATES, VECTORS, OUT, R,
    n, blocks, heads, stride_b, stride_n, sums_b, scale, weight, unit, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, UNMASKED: tl.constexpr, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    OUT += (b * n * heads + h) * D
    R += bh * n
    dims = tl.arange(0, D)
    inside = tl.arange(0, BLOCK)
    steps = place * BLOCK + inside
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    q = load_features(Q, rows, valid, stride_n, D, FEATURES, FAST) * scale
    q_t = q.to(dtype)
    state = bh if UNMASKED else (bh * blocks + place) * 2
    earlier = load_square(STATES + state * D * D, D)
    out = tl.dot(q_t, earlier, input_precision=PRECISION)
    r = tl.sum(q * tl.load(VECTORS + state * D + dims), 1)
    if not UNMASKED:
        X += b * sums_b + (h * blocks + place) * BLOCK
        Y += b * sums_b + (h * blocks + place) * BLOCK
        x_i, y_i = tl.load(X + inside), tl.load(Y + inside)
        fade = tl.exp2(x_i)
        out *= fade[:, None]
        r *= fade
        fade = tl.exp2(tl.load(Y + BLOCK - 1) - y_i)
        later = load_square(STATES + (state + 1) * D * D, D)
        out += tl.dot(q_t, later, input_precision=PRECISION) * fade[:, None]
        r += tl.sum(q * tl.load(VECTORS + (state + 1) * D + dims), 1) * fade
        k_t = load_features(K, rows, valid, stride_n, D, FEATURES, FAST).to(dtype)
        v = load_rows(V, rows, valid, stride_n, D)
        x_j, y_j = _key_sums(X, Y, inside, counted(VALID + b * n, rows, valid, PADDED))
        w = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
        w *= decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
        r += tl.sum(w, 1)
        out += tl.dot(w.to(dtype), v, input_precision=PRECISION)
    out *= weight
    r = (r + eps) * weight
    if ADD:  # the second curve adds to the first one's result
        before = load_rows(OUT, rows, valid, heads * D, D).to(tl.float32)
        if NORMALISE:
            r_before = tl.load(R + rows, mask=valid, other=1.0)
            before *= r_before[:, None]
            r += r_before
        out += before
    if NORMALISE:
        out *= (1 / r)[:, None]
        tl.store(R + rows, r, mask=valid)
    else:
        out *= unit
    store_rows(OUT, rows, valid, heads * D, out, D)


@triton.jit
def query_grad_kernel(
    QKV, X, Y, CURVE, VALID, STATES, VECTORS, OUT, R, DOUT, DQKV, FLUX,
    n, blocks, heads, stride_b, stride_n, sums_b, flux_side, scale, weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, UNMASKED: tl.constexpr, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of the queries; and to `FLUX`, for `key_grad_kernel`, dx, dy and the gradients of the row
    sums, `[3, B, H, blocks * BLOCK]`. Of dx and dy, the keys' part is missing where their queries
    are in other blocks."""
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    DQ = DQKV + b * stride_b + h * D
    dims = tl.arange(0, D)
    inside = tl.arange(0, BLOCK)
    steps = place * BLOCK + inside
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    grad, grad_r = output_grad(
        load_rows(DOUT + (b * n * heads + h) * D, rows, valid, heads * D, D),
        OUT + (b * n * heads + h) * D, R + bh * n, rows, valid, heads * D, weight, D, NORMALISE,
    )  # fmt: skip
    grad = grad.to(dtype)
    FLUX += (bh * blocks + place) * BLOCK + inside
    tl.store(FLUX + 2 * flux_side, grad_r)
    state = bh * 2 if UNMASKED else (bh * blocks + place) * 4
    STATES += state * D * D
    VECTORS += state * D
    dq = tl.dot(grad, tl.trans(load_square(STATES, D)), input_precision=PRECISION)
    dq += grad_r[:, None] * tl.load(VECTORS + dims)
    if not UNMASKED:
        X += b * sums_b + (h * blocks + place) * BLOCK
        Y += b * sums_b + (h * blocks + place) * BLOCK
        x_i, y_i = tl.load(X + inside), tl.load(Y + inside)
        x_j, y_j = _key_sums(X, Y, inside, counted(VALID + b * n, rows, valid, PADDED))
        q = (load_features(Q, rows, valid, stride_n, D, FEATURES, FAST) * scale).to(dtype)
        k = load_features(K, rows, valid, stride_n, D, FEATURES, FAST).to(dtype)
        v = load_rows(V, rows, valid, stride_n, D)
        dq *= tl.exp2(x_i)[:, None]
        dx = tl.sum(q * dq, 1)
        part = tl.dot(grad, tl.trans(load_square(STATES + D * D, D)), input_precision=PRECISION)
        part += grad_r[:, None] * tl.load(VECTORS + D + dims)
        part *= tl.exp2(tl.load(Y + BLOCK - 1) - y_i)[:, None]
        dy = -tl.sum(q * part, 1)
        dq += part
        dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION) + grad_r[:, None]
        dw *= decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
        pairs = tl.dot(q, tl.trans(k), input_precision=PRECISION) * dw
        below = tl.where(inside[:, None] > inside[None, :], pairs, 0.0)
        above = tl.where(inside[:, None] < inside[None, :], pairs, 0.0)
        dx += tl.sum(below, 1) - tl.sum(below, 0)
        dy += tl.sum(above, 0) - tl.sum(above, 1)
        tl.store(FLUX, dx)
        tl.store(FLUX + flux_side, dy)
        dq += tl.dot(dw.to(dtype), k, input_precision=PRECISION)
    q_in = load_rows(Q, rows, valid, stride_n, D).to(tl.float32)  # again: registers are few
    dq = feature_map_grad(q_in, dq * (scale * unit), FEATURES, FAST)
    if ADD:
        dq += load_rows(DQ, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DQ, rows, valid, stride_n, dq, D)


@triton.jit
def key_grad_kernel(
    QKV, X, Y, CURVE, VALID, STATES, VECTORS, R, DOUT, DQKV, FLUX, DECAY, DDECAY,
    n, blocks, heads, prefix, stride_b, stride_n, sums_b, flux_side, decay_b, decay_n, decay_h,
    scale, weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, UNMASKED: tl.constexpr, DECAYS: tl.constexpr,
    FEATURES: tl.constexpr, PADDED: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr,
    NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of the keys and the values, by transposed products, and of the decays' logits.

    A decay meets the pairs that it lies between. With the gradients dx and dy of its sums, and the
    pairs that cross the start of the block,

        dl_s = crossing - sum_(t<=s) dx_t - sum_(t<s) dy_t
    """
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    DK = DQKV + b * stride_b + (heads + h) * D
    DV = DK + heads * D
    dims = tl.arange(0, D)
    inside = tl.arange(0, BLOCK)
    steps = place * BLOCK + inside
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    counts = counted(VALID + b * n, rows, valid, PADDED)
    k = load_features(K, rows, valid, stride_n, D, FEATURES, FAST).to(dtype)
    v = load_rows(V, rows, valid, stride_n, D)
    state = bh * 2 if UNMASKED else (bh * blocks + place) * 4
    last: tl.constexpr = 1 if UNMASKED else 3
    STATES += state * D * D
    VECTORS += state * D
    late = load_square(STATES + last * D * D, D)
    dk = tl.dot(v, tl.trans(late), input_precision=PRECISION) + tl.load(VECTORS + last * D + dims)
    dv = tl.dot(k, late, input_precision=PRECISION)
    if not UNMASKED:
        X += b * sums_b + (h * blocks + place) * BLOCK
        Y += b * sums_b + (h * blocks + place) * BLOCK
        x_i, y_i = tl.load(X + inside), tl.load(Y + inside)
        x_j, y_j = _key_sums(X, Y, inside, counts)
        total = tl.load(Y + BLOCK - 1)
        FLUX += (bh * blocks + place) * BLOCK + inside
        fade = tl.where(counts, tl.exp2(total - x_i), 0.0)[:, None]
        dk *= fade
        dv *= fade
        from_later = tl.sum(k * dk, 1)
        early = load_square(STATES + 2 * D * D, D)
        fade = tl.where(counts, tl.exp2(y_i), 0.0)[:, None]
        part = tl.dot(v, tl.trans(early), input_precision=PRECISION)
        part = (part + tl.load(VECTORS + 2 * D + dims)) * fade
        from_earlier = tl.sum(k * part, 1)
        dk += part
        dv += tl.dot(k, early, input_precision=PRECISION) * fade
        q = (load_features(Q, rows, valid, stride_n, D, FEATURES, FAST) * scale).to(dtype)
        grad = load_rows(DOUT + (b * n * heads + h) * D, rows, valid, heads * D, D).to(tl.float32)
        if NORMALISE:
            grad *= (weight / tl.load(R + bh * n + rows, mask=valid, other=1.0))[:, None]
        else:
            grad *= weight
        grad = grad.to(dtype)
        mask = decay_mask(x_i[None, :], y_i[None, :], x_j[:, None], y_j[:, None])
        w = tl.dot(k, tl.trans(q), input_precision=PRECISION) * mask
        dv += tl.dot(w.to(dtype), grad, input_precision=PRECISION)
        dw = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dw = (dw + tl.load(FLUX + 2 * flux_side)[None, :]) * mask
        dk += tl.dot(dw.to(dtype), q, input_precision=PRECISION)
    dv *= unit
    if PADDED:
        dk, dv = tl.where(counts[:, None], dk, 0.0), tl.where(counts[:, None], dv, 0.0)
    if ADD:
        dv += load_rows(DV, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DV, rows, valid, stride_n, dv, D)
    k_in = load_rows(K, rows, valid, stride_n, D).to(tl.float32)
    dk = feature_map_grad(k_in, dk * unit, FEATURES, FAST)
    if ADD:
        dk += load_rows(DK, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DK, rows, valid, stride_n, dk, D)

    if DECAYS != "none":
        pairs = load_square(STATES, D).to(tl.float32) * load_square(STATES + 3 * D * D, D)
        pairs += load_square(STATES + D * D, D).to(tl.float32) * load_square(STATES + 2 * D * D, D)
        ends = tl.load(VECTORS + dims) * tl.load(VECTORS + 3 * D + dims)
        ends += tl.load(VECTORS + D + dims) * tl.load(VECTORS + 2 * D + dims)
        crossing = tl.exp2(total) * tl.sum(tl.sum(pairs, 1) + ends, 0)
        dx, dy = tl.load(FLUX), tl.load(FLUX + flux_side) + from_earlier
        crossing += tl.sum(dx + from_earlier, 0)  # the pairs inside cancel in dx
        dx -= from_later
        dl = crossing - tl.cumsum(dx + dy, 0) + dy
        z = gate_logits(DECAY + b * decay_b + h * decay_h, rows, valid, decay_n, DECAYS)
        dz = tl.where(counts & (rows >= prefix), -tl.sigmoid(z) * dl, 0.0)
        if DECAYS == "tokens":
            address = DDECAY + b * decay_b + h * decay_h + rows * decay_n
            tl.store(address, dz.to(DDECAY.dtype.element_ty), mask=valid)
        else:  # a logit of -w, for the decay sigmoid(w)
            tl.store(DDECAY + bh * blocks + place, -tl.sum(dz, 0))
