"""Running sums of decays, and the states that blocks of tokens hand on.

Inside a block, x and y are the exclusive and the inclusive sums of log2 decays along the curve, and
g is the total. A state of pairs (a_j, b_j) is carried

    from earlier blocks  S <- 2^g S + sum_j 2^(g - x_j) a_j b_j^T
    from later blocks    S <- 2^g S + sum_j 2^(y_j) a_j b_j^T

for keys and values; for queries and output gradients x and y change places. Every exponent is at
most 0.
"""

import triton
import triton.language as tl

from kernels.common import counted, decay_sums, feature_map, load_rows, output_grad, visited


@triton.jit
def sums_kernel(
    DECAY, CURVE, VALID, DOCUMENTS, X, Y, n, images, heads, prefix, decay_b, decay_n, decay_h,
    BLOCK: tl.constexpr, DECAYS: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr,
    CURVED: tl.constexpr,
):  # fmt: skip
    """x and y of each block, `[C, images, H, blocks * BLOCK]`."""
    cbh = tl.program_id(1).to(tl.int64)
    c, b, h = cbh // (images * heads), cbh // heads % images, cbh % heads
    steps = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = steps < n
    tokens = visited(CURVE + c * n, steps, valid, CURVED)
    x, y = decay_sums(
        DECAY + b * decay_b + (c * heads + h) * decay_h, DOCUMENTS + b * n, steps, tokens, valid,
        counted(VALID + b * n, tokens, valid, PADDED), prefix, decay_n, DECAYS, PACKED,
    )  # fmt: skip
    places = cbh * tl.num_programs(0) * BLOCK + steps
    tl.store(X + places, x)
    tl.store(Y + places, y)


@triton.jit
def _load_block(
    A, B, CURVE, place, n, stride_a, stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, CURVED: tl.constexpr,
):  # fmt: skip
    """Rows of two matrices; nothing beyond the first and the last block."""
    steps = place * BLOCK + tl.arange(0, BLOCK)
    there = (steps >= 0) & (steps < n)
    tokens = visited(CURVE, steps, there, CURVED)
    a = load_rows(A, tokens, there, stride_a, D)
    return a, load_rows(B, tokens, there, stride_b, D)


@triton.jit
def states_kernel(
    QKV, X, Y, CURVE, VALID, OUT, R, DOUT, STATES, VECTORS,
    n, blocks, heads, stride_b, stride_n, sums_b, scale, weight,
    D: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, KINDS: tl.constexpr,
    UNMASKED: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr, CURVED: tl.constexpr,
    NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """States of keys and values, or of queries and output gradients, that enter each block.

    Kinds are: keys from earlier (0) and later (1) blocks, queries from earlier (2) and later (3)
    ones. Without a mask there is one state of all keys (0) and one of all queries (1), each divided
    by n, for float16 would overflow. A program carries one state through the sequence, and loads
    each block a turn ahead of its use: it waits for no memory.
    """
    bh, reverse = tl.program_id(0).to(tl.int64), tl.program_id(1) == 1
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    VALID += b * n
    OUT += (b * n * heads + h) * D
    DOUT += (b * n * heads + h) * D
    R += bh * n
    X += b * sums_b + h * blocks * BLOCK
    Y += b * sums_b + h * blocks * BLOCK
    if QUERIES:
        A, B, stride = Q, DOUT, heads * D
    else:
        A, B, stride = Q + heads * D, Q + 2 * heads * D, stride_n
    kind = QUERIES if UNMASKED else QUERIES * 2 + tl.program_id(1)
    dims = tl.arange(0, D)
    square = dims[:, None] * D + dims
    state = tl.zeros((D, D), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    direction = tl.where(reverse, -1, 1)
    place = tl.where(reverse, blocks - 1, 0)
    a_next, b_next = _load_block(A, B, CURVE, place, n, stride_n, stride, D, BLOCK, CURVED)
    for _ in range(blocks):
        a_in, b_in = a_next, b_next
        a_next, b_next = _load_block(
            A, B, CURVE, place + direction, n, stride_n, stride, D, BLOCK, CURVED
        )
        steps = place * BLOCK + tl.arange(0, BLOCK)
        valid = steps < n
        tokens = visited(CURVE, steps, valid, CURVED)
        if QUERIES:
            factor = tl.where(valid, scale, 0.0)
            grad, grad_r = output_grad(b_in, OUT, R, tokens, valid, stride, weight, D, NORMALISE)
            second = grad.to(dtype)
        else:
            factor = tl.where(counted(VALID, tokens, valid, PADDED), 1.0, 0.0)
            grad_r = tl.full((BLOCK,), 1.0, tl.float32)
            second = b_in
        if UNMASKED:
            factor /= n
        else:
            entry = (bh * blocks + place) * KINDS + kind
            tl.store(STATES + entry * D * D + square, state.to(dtype))
            tl.store(VECTORS + entry * D + dims, vector)
            x, y = tl.load(X + steps), tl.load(Y + steps)
            if QUERIES:
                x, y = y, x
            total = tl.load(Y + place * BLOCK + BLOCK - 1)
            factor *= tl.exp2(tl.where(reverse, y, total - x))
            fade = tl.exp2(total)
            state *= fade
            vector *= fade
        a = feature_map(a_in.to(tl.float32), FEATURES, FAST) * factor[:, None]
        vector += tl.sum(a * grad_r[:, None], 0)
        state += tl.dot(tl.trans(a.to(dtype)), second, input_precision=PRECISION)
        place += direction
    if UNMASKED:
        entry = bh * KINDS + kind
        tl.store(STATES + entry * D * D + square, state.to(dtype))
        tl.store(VECTORS + entry * D + dims, vector)
