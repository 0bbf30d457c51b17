"""Pairs of tokens inside a block, and the states that the other blocks hand in.

A program has one block. Sequences of one block are the quadratic form. Without a mask there are no
pairs: every token meets one state of all others.
"""

import triton
import triton.language as tl

from kernels.common import (
    counted,
    feature_map,
    feature_map_grad,
    gate_logits,
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
def _decay_mask(x_i, y_i, x_j, y_j):
    """`M_ij = 2^min(x_i - x_j, y_j - y_i)` of sums that are broadcast against each other."""
    return tl.exp2(tl.minimum(x_i - x_j, y_j - y_i))


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
    q = feature_map(load_rows(Q, rows, valid, stride_n, D).to(tl.float32), FEATURES, FAST) * scale
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
        k_in = load_rows(K, rows, valid, stride_n, D).to(tl.float32)
        k_t = feature_map(k_in, FEATURES, FAST).to(dtype)
        v = load_rows(V, rows, valid, stride_n, D)
        x_j, y_j = _key_sums(X, Y, inside, counted(VALID + b * n, rows, valid, PADDED))
        w = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION)
        w *= _decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
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
def backward_kernel(
    QKV, X, Y, CURVE, VALID, STATES, VECTORS, OUT, R, DOUT, DQKV, DECAY, DDECAY,
    n, blocks, heads, prefix, stride_b, stride_n, sums_b, decay_b, decay_n, decay_h,
    scale, weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, UNMASKED: tl.constexpr, DECAYS: tl.constexpr,
    FEATURES: tl.constexpr, PADDED: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr,
    NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys, values and decays.

    The decay of a step lies between the pairs that begin before it and end after it. With what each
    step begins and ends, dx and dy, and the pairs that cross the end of the block,

        dl_s = sum_(t>s) dx_t + sum_(t>=s) dy_t + crossing
    """
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    DQ = DQKV + b * stride_b + h * D
    DK = DQ + heads * D
    DV = DK + heads * D
    dims = tl.arange(0, D)
    inside = tl.arange(0, BLOCK)
    steps = place * BLOCK + inside
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    counts = counted(VALID + b * n, rows, valid, PADDED)
    grad, grad_r = output_grad(
        load_rows(DOUT + (b * n * heads + h) * D, rows, valid, heads * D, D),
        OUT + (b * n * heads + h) * D, R + bh * n, rows, valid, heads * D, weight, D, NORMALISE,
    )  # fmt: skip
    grad = grad.to(dtype)
    q_in = load_rows(Q, rows, valid, stride_n, D)
    k_in = load_rows(K, rows, valid, stride_n, D)
    q = feature_map(q_in.to(tl.float32), FEATURES, FAST) * scale
    k = feature_map(k_in.to(tl.float32), FEATURES, FAST)
    v = load_rows(V, rows, valid, stride_n, D)
    q_t, k_t = q.to(dtype), k.to(dtype)

    # Of the queries: keys of earlier blocks, of later ones, of this one.
    state = bh * 2 if UNMASKED else (bh * blocks + place) * 4
    STATES += state * D * D
    VECTORS += state * D
    dq = tl.dot(grad, tl.trans(load_square(STATES, D)), input_precision=PRECISION)
    dq += grad_r[:, None] * tl.load(VECTORS + dims)
    if not UNMASKED:
        X += b * sums_b + (h * blocks + place) * BLOCK
        Y += b * sums_b + (h * blocks + place) * BLOCK
        x_i, y_i = tl.load(X + inside), tl.load(Y + inside)
        x_j, y_j = _key_sums(X, Y, inside, counts)
        total = tl.load(Y + BLOCK - 1)
        dq *= tl.exp2(x_i)[:, None]
        dx = tl.sum(q * dq, 1)
        part = tl.dot(grad, tl.trans(load_square(STATES + D * D, D)), input_precision=PRECISION)
        part += grad_r[:, None] * tl.load(VECTORS + D + dims)
        part *= tl.exp2(total - y_i)[:, None]
        dy = -tl.sum(q * part, 1)
        crossing = -tl.sum(dy, 0)
        dq += part
        mask = _decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
        dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        dw = (dw + grad_r[:, None]) * mask
        pairs = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * dw
        below = tl.where(inside[:, None] > inside[None, :], pairs, 0.0)
        above = tl.where(inside[:, None] < inside[None, :], pairs, 0.0)
        dx += tl.sum(below, 1) - tl.sum(below, 0)
        dy += tl.sum(above, 0) - tl.sum(above, 1)
        dq += tl.dot(dw.to(dtype), k_t, input_precision=PRECISION)
    dq = feature_map_grad(q_in.to(tl.float32), dq * (scale * unit), FEATURES, FAST)
    if ADD:
        dq += load_rows(DQ, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DQ, rows, valid, stride_n, dq, D)

    # Of the keys and the values, transposed: queries of later blocks, of earlier ones, of this one.
    last = 1 if UNMASKED else 3
    late = load_square(STATES + last * D * D, D)
    dk = tl.dot(v, tl.trans(late), input_precision=PRECISION) + tl.load(VECTORS + last * D + dims)
    dv = tl.dot(k_t, late, input_precision=PRECISION)
    if not UNMASKED:
        fade = tl.where(counts, tl.exp2(total - x_i), 0.0)[:, None]
        dk *= fade
        dv *= fade
        part_x = tl.sum(k * dk, 1)
        early = load_square(STATES + 2 * D * D, D)
        fade = tl.where(counts, tl.exp2(y_i), 0.0)[:, None]
        part = tl.dot(v, tl.trans(early), input_precision=PRECISION)
        part = (part + tl.load(VECTORS + 2 * D + dims)) * fade
        dx -= part_x
        dy += tl.sum(k * part, 1)
        crossing += tl.sum(part_x, 0)
        dk += part
        dv += tl.dot(k_t, early, input_precision=PRECISION) * fade
        mask = _decay_mask(x_i[None, :], y_i[None, :], x_j[:, None], y_j[:, None])
        w = tl.dot(k_t, tl.trans(q_t), input_precision=PRECISION) * mask
        dw = (tl.dot(v, tl.trans(grad), input_precision=PRECISION) + grad_r[None, :]) * mask
        dv += tl.dot(w.to(dtype), grad, input_precision=PRECISION)
        dk += tl.dot(dw.to(dtype), q_t, input_precision=PRECISION)
    dv *= unit
    if PADDED:
        dk, dv = tl.where(counts[:, None], dk, 0.0), tl.where(counts[:, None], dv, 0.0)
    dk = feature_map_grad(k_in.to(tl.float32), dk * unit, FEATURES, FAST)
    if ADD:
        dk += load_rows(DK, rows, valid, stride_n, D).to(tl.float32)
        dv += load_rows(DV, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DK, rows, valid, stride_n, dk, D)
    store_rows(DV, rows, valid, stride_n, dv, D)

    if DECAYS != "none":  # of their logits
        across = load_square(STATES, D).to(tl.float32) * load_square(STATES + 3 * D * D, D)
        across += load_square(STATES + D * D, D).to(tl.float32) * load_square(STATES + 2 * D * D, D)
        ends = tl.load(VECTORS + dims) * tl.load(VECTORS + 3 * D + dims)
        ends += tl.load(VECTORS + D + dims) * tl.load(VECTORS + 2 * D + dims)
        ends += tl.sum(across, 1)
        crossing += tl.exp2(total) * tl.sum(ends, 0)
        dl = tl.sum(dx + dy, 0) - tl.cumsum(dx + dy, 0) + dy + crossing
        z = gate_logits(DECAY + b * decay_b + h * decay_h, rows, valid, decay_n, DECAYS)
        dz = tl.where(counts & (rows >= prefix), -tl.sigmoid(z) * dl, 0.0)
        if DECAYS == "tokens":
            address = DDECAY + b * decay_b + h * decay_h + rows * decay_n
            tl.store(address, dz.to(DDECAY.dtype.element_ty), mask=valid)
        else:  # a logit of -w, for the decay sigmoid(w)
            tl.store(DDECAY + bh * blocks + place, -tl.sum(dz, 0))
