"""Carried-state chunk kernels: one program per image and head sweeps the chunks twice.

The first sweep goes forward and stores the state before each chunk, the second goes backward,
carries the other direction's state and writes the results. With chunk-local sums x, y of log2
decays and their total g, a state of pairs (a_j, b_j) is

    from earlier chunks  S <- 2^g S + sum_j 2^(g - x_j) a_j b_j^T
    from later chunks    S <- 2^g S + sum_j 2^(y_j) a_j b_j^T

for keys and values; for queries and output gradients x and y change places. Every exponent is at
most 0. Without decay (LION-Lit) both directions are one sum and nothing is quadratic.
"""

import triton
import triton.language as tl

from kernels.common import (
    feature_map,
    feature_map_grad,
    load_rows,
    output_grad,
    store_rows,
    visited,
)


@triton.jit
def _matrix(pointer, D: tl.constexpr):
    return pointer + tl.arange(0, D)[:, None] * D + tl.arange(0, D)


@triton.jit
def _decays(X, Y, steps, BLOCK: tl.constexpr):
    """Local sums of a chunk, and their total; steps beyond the last one repeat its total."""
    x = tl.load(X + steps)
    y = tl.load(Y + steps)
    return x, y, tl.min(y, 0)


@triton.jit
def forward_kernel(
    QKV, X, Y, CURVE, STATES, VECTORS, OUT, R, n, heads, stride_b, stride_n, sums_b, eps, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, LIT: tl.constexpr, DECAY: tl.constexpr,
    CURVED: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // heads, pid % heads
    chunks = tl.cdiv(n, BLOCK)
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    X += b * sums_b + h * chunks * BLOCK
    Y += b * sums_b + h * chunks * BLOCK
    STATES += pid * chunks * D * D
    VECTORS += pid * chunks * D
    OUT += (b * n * heads + h) * D
    R += pid * n
    state = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for m in range(0, chunks):
        steps = m * BLOCK + tl.arange(0, BLOCK)
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        k = feature_map(load_rows(K, rows, valid, stride_n, D).to(tl.float32), LIT)
        k = tl.where(valid[:, None], k, 0.0)
        v = load_rows(V, rows, valid, stride_n, D)
        if DECAY:
            tl.store(_matrix(STATES + m * D * D, D), state.to(dtype))
            tl.store(VECTORS + m * D + tl.arange(0, D), vector)
            x, y, g = _decays(X, Y, steps, BLOCK)
            k *= tl.exp2(g - x)[:, None]
            state *= tl.exp2(g)
            vector *= tl.exp2(g)
        state += tl.dot(tl.trans(k.to(dtype)), v, input_precision=PRECISION)
        vector += tl.sum(k, 0)
    if DECAY:
        tl.debug_barrier()  # other threads stored what this one loads
        state = tl.zeros((D, D), tl.float32)
        later = tl.zeros((D,), tl.float32)
    else:
        total = (state / n).to(dtype)
    for i in range(0, chunks):
        m = chunks - 1 - i
        steps = m * BLOCK + tl.arange(0, BLOCK)
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        q = feature_map(load_rows(Q, rows, valid, stride_n, D).to(tl.float32), LIT) * scale
        if DECAY:
            k = feature_map(load_rows(K, rows, valid, stride_n, D).to(tl.float32), LIT)
            k = tl.where(valid[:, None], k, 0.0)
            v = load_rows(V, rows, valid, stride_n, D)
            x, y, g = _decays(X, Y, steps, BLOCK)
            from_earlier = tl.load(_matrix(STATES + m * D * D, D))
            earlier = tl.load(VECTORS + m * D + tl.arange(0, D))
            out = tl.dot(q.to(dtype), from_earlier, input_precision=PRECISION)
            out *= tl.exp2(x)[:, None]
            back = tl.dot(q.to(dtype), state.to(dtype), input_precision=PRECISION)
            out += back * tl.exp2(g - y)[:, None]
            r = tl.exp2(x) * tl.sum(q * earlier, 1) + tl.exp2(g - y) * tl.sum(q * later, 1)
            mask = tl.minimum(x[:, None] - x[None, :], y[None, :] - y[:, None])
            w = tl.dot(q.to(dtype), tl.trans(k.to(dtype)), input_precision=PRECISION)
            w *= tl.exp2(mask)
            r += tl.sum(w, 1)
            out += tl.dot(w.to(dtype), v, input_precision=PRECISION)
            k *= tl.exp2(y)[:, None]
            state *= tl.exp2(g)
            state += tl.dot(tl.trans(k.to(dtype)), v, input_precision=PRECISION)
            later = later * tl.exp2(g) + tl.sum(k, 0)
        else:
            out = tl.dot(q.to(dtype), total, input_precision=PRECISION) * n
            r = tl.sum(q * vector, 1)
        out *= WEIGHT
        r = r * WEIGHT + eps * WEIGHT
        if ADD:  # the second curve adds to the first one's result
            first = load_rows(OUT, rows, valid, heads * D, D).to(tl.float32)
            if NORMALISE:
                before = tl.load(R + rows, mask=valid, other=1.0)
                first *= before[:, None]
                r += before
            out += first
        if NORMALISE:
            out /= r[:, None]
            tl.store(R + rows, r, mask=valid)
        store_rows(OUT, rows, valid, heads * D, out, D)


@triton.jit
def backward_kernel(
    QKV, X, Y, CURVE, STATES, VECTORS, OUT, R, DOUT, DQKV, FLUX,
    n, heads, stride_b, stride_n, sums_b, scale,
    D: tl.constexpr, BLOCK: tl.constexpr, LIT: tl.constexpr, DECAY: tl.constexpr,
    CURVED: tl.constexpr, ADD: tl.constexpr, WEIGHT: tl.constexpr, NORMALISE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // heads, pid % heads
    chunks = tl.cdiv(n, BLOCK)
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    DQ = DQKV + (b * n * 3 * heads + h) * D
    DK = DQ + heads * D
    DV = DK + heads * D
    X += b * sums_b + h * chunks * BLOCK
    Y += b * sums_b + h * chunks * BLOCK
    STATES += pid * chunks * D * D * 2
    VECTORS += pid * chunks * D * 2
    OUT += (b * n * heads + h) * D
    DOUT += (b * n * heads + h) * D
    R += pid * n
    FLUX += pid * n
    columns = tl.arange(0, D)
    # Lit's row sums grow with n: without this factor its gradients would underflow in float16.
    weight = WEIGHT if DECAY or not NORMALISE else WEIGHT * n
    f_kv = tl.zeros((D, D), tl.float32)
    f_k = tl.zeros((D,), tl.float32)
    f_qg = tl.zeros((D, D), tl.float32)
    f_q = tl.zeros((D,), tl.float32)
    for m in range(0, chunks):
        steps = m * BLOCK + tl.arange(0, BLOCK)
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        q = feature_map(load_rows(Q, rows, valid, stride_n, D).to(tl.float32), LIT) * scale
        k = feature_map(load_rows(K, rows, valid, stride_n, D).to(tl.float32), LIT)
        k = tl.where(valid[:, None], k, 0.0)
        v = load_rows(V, rows, valid, stride_n, D)
        go, gd = output_grad(DOUT, OUT, R, rows, valid, heads * D, weight, D, NORMALISE)
        if DECAY:
            tl.store(_matrix(STATES + m * D * D * 2, D), f_kv.to(dtype))
            tl.store(_matrix(STATES + m * D * D * 2 + D * D, D), f_qg.to(dtype))
            tl.store(VECTORS + m * D * 2 + columns, f_k)
            tl.store(VECTORS + m * D * 2 + D + columns, f_q)
            x, y, g = _decays(X, Y, steps, BLOCK)
            k *= tl.exp2(g - x)[:, None]
            q *= tl.exp2(g - y)[:, None]
            f_kv *= tl.exp2(g)
            f_k *= tl.exp2(g)
            f_qg *= tl.exp2(g)
            f_q *= tl.exp2(g)
        f_kv += tl.dot(tl.trans(k.to(dtype)), v, input_precision=PRECISION)
        f_qg += tl.dot(tl.trans(q.to(dtype)), go.to(dtype), input_precision=PRECISION)
        f_k += tl.sum(k, 0)
        f_q += tl.sum(q * gd[:, None], 0)
    if DECAY:
        tl.debug_barrier()  # other threads stored what this one loads
        l_kv = tl.zeros((D, D), tl.float32)
        l_k = tl.zeros((D,), tl.float32)
        l_qg = tl.zeros((D, D), tl.float32)
        l_q = tl.zeros((D,), tl.float32)
    else:
        total_kv = (f_kv / n).to(dtype)
        total_qg = (f_qg / n).to(dtype)
    for i in range(0, chunks):
        m = chunks - 1 - i
        steps = m * BLOCK + tl.arange(0, BLOCK)
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        q_in = load_rows(Q, rows, valid, stride_n, D).to(tl.float32)
        k_in = load_rows(K, rows, valid, stride_n, D).to(tl.float32)
        q = feature_map(q_in, LIT) * scale
        k = tl.where(valid[:, None], feature_map(k_in, LIT), 0.0)
        v = load_rows(V, rows, valid, stride_n, D)
        go, gd = output_grad(DOUT, OUT, R, rows, valid, heads * D, weight, D, NORMALISE)
        q_t, k_t, g_t = q.to(dtype), k.to(dtype), go.to(dtype)
        if DECAY:
            x, y, g = _decays(X, Y, steps, BLOCK)
            e_kv = tl.load(_matrix(STATES + m * D * D * 2, D))
            e_qg = tl.load(_matrix(STATES + m * D * D * 2 + D * D, D))
            e_k = tl.load(VECTORS + m * D * 2 + columns)
            e_q = tl.load(VECTORS + m * D * 2 + D + columns)
            # What crosses the whole chunk, in either direction.
            through = tl.sum(tl.sum(e_kv.to(tl.float32) * l_qg + e_qg.to(tl.float32) * l_kv, 1), 0)
            through = tl.exp2(g) * (through + tl.sum(e_k * l_q + e_q * l_k, 0))
            mask = tl.exp2(tl.minimum(x[:, None] - x[None, :], y[None, :] - y[:, None]))
            w = tl.dot(q_t, tl.trans(k_t), input_precision=PRECISION) * mask
            dw = tl.dot(g_t, tl.trans(v), input_precision=PRECISION) + gd[:, None]
            pairs = w * dw
            below = tl.where(steps[:, None] > steps[None, :], pairs, 0.0)
            above = pairs - below
            dq = tl.dot(g_t, tl.trans(e_kv), input_precision=PRECISION) + gd[:, None] * e_k
            dq *= tl.exp2(x)[:, None]
            late = tl.sum(below, 1) - tl.sum(below, 0) + tl.sum(q * dq, 1)
            part = tl.dot(g_t, tl.trans(l_kv.to(dtype)), input_precision=PRECISION)
            part = (part + gd[:, None] * l_k) * tl.exp2(g - y)[:, None]
            until = tl.sum(q * part, 1)
            dq += part
            dq += tl.dot((dw * mask).to(dtype), k_t, input_precision=PRECISION)
            # The transposed products anew: a transposed product as an operand is miscompiled.
            mask = tl.exp2(tl.minimum(x[None, :] - x[:, None], y[:, None] - y[None, :]))
            w = tl.dot(k_t, tl.trans(q_t), input_precision=PRECISION) * mask
            dw = tl.dot(v, tl.trans(g_t), input_precision=PRECISION) + gd[None, :]
            dk = tl.dot(v, tl.trans(l_qg.to(dtype)), input_precision=PRECISION) + l_q
            dk *= tl.exp2(g - x)[:, None]
            early = tl.sum(k * dk, 1)
            part = tl.dot(v, tl.trans(e_qg), input_precision=PRECISION) + e_q
            part *= tl.exp2(y)[:, None]
            since = tl.sum(above, 0) - tl.sum(above, 1) + tl.sum(k * part, 1)
            dk += part
            dk += tl.dot((dw * mask).to(dtype), q_t, input_precision=PRECISION)
            dv = tl.dot(k_t, l_qg.to(dtype), input_precision=PRECISION) * tl.exp2(g - x)[:, None]
            dv += tl.dot(k_t, e_qg, input_precision=PRECISION) * tl.exp2(y)[:, None]
            dv += tl.dot(w.to(dtype), g_t, input_precision=PRECISION)
            # A step's log decay meets every pair that it lies between: four sums along the chunk.
            flux = through + tl.sum(late + since, 0)
            flux += tl.cumsum(early + until - late - since, 0) + since - until
            tl.store(FLUX + rows, flux, mask=valid)
            k *= tl.exp2(y)[:, None]
            q *= tl.exp2(x)[:, None]
            l_kv *= tl.exp2(g)
            l_kv += tl.dot(tl.trans(k.to(dtype)), v, input_precision=PRECISION)
            l_k = l_k * tl.exp2(g) + tl.sum(k, 0)
            l_qg *= tl.exp2(g)
            l_qg += tl.dot(tl.trans(q.to(dtype)), g_t, input_precision=PRECISION)
            l_q = l_q * tl.exp2(g) + tl.sum(q * gd[:, None], 0)
        else:
            unit = n * 1.0 if NORMALISE else 1.0
            dq = tl.dot(g_t, tl.trans(total_kv), input_precision=PRECISION) * n
            dq = (dq + gd[:, None] * f_k) / unit
            dk = tl.dot(v, tl.trans(total_qg), input_precision=PRECISION) * n
            dk = (dk + f_q) / unit
            dv = tl.dot(k_t, total_qg, input_precision=PRECISION) * (n / unit)
        dq = feature_map_grad(q_in, dq * scale, LIT)
        dk = feature_map_grad(k_in, dk, LIT)
        if ADD:
            dq += load_rows(DQ, rows, valid, 3 * heads * D, D).to(tl.float32)
            dk += load_rows(DK, rows, valid, 3 * heads * D, D).to(tl.float32)
            dv += load_rows(DV, rows, valid, 3 * heads * D, D).to(tl.float32)
        store_rows(DQ, rows, valid, 3 * heads * D, dq, D)
        store_rows(DK, rows, valid, 3 * heads * D, dk, D)
        store_rows(DV, rows, valid, 3 * heads * D, dv, D)
