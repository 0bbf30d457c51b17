"""Running sums of decays, the states that blocks of tokens hand on, and the gates' gradients.

Inside a block, x and y are the exclusive and the inclusive sums of log2 decays along the curve, and
g is the total. A state of pairs (a_j, b_j) is carried

    from earlier blocks  S <- 2^g S + sum_j 2^(g - x_j) a_j b_j^T
    from later blocks    S <- 2^g S + sum_j 2^(y_j) a_j b_j^T

for keys and values; for queries and output gradients x and y change places. Every exponent is at
most 0.
"""

import triton
import triton.language as tl

from kernels.common import (
    counted,
    decay_sums,
    feature_map,
    gate_logits,
    load_rows,
    load_square,
    output_grad,
    visited,
)


@triton.jit
def sums_kernel(
    DECAY, CURVE, VALID, DOCUMENTS, X, Y, STEPS, n, images, heads, prefix,
    decay_b, decay_n, decay_h,
    BLOCK: tl.constexpr, DECAYS: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr,
    CURVED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """x and y of each block, `[C, images, H, blocks * BLOCK]`, by step or by token; then `STEPS`,
    `[C, N]`, is where the curves visit a token."""
    cbh = tl.program_id(1).to(tl.int64)
    c, b, h = cbh // (images * heads), cbh // heads % images, cbh % heads
    steps = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = steps < n
    tokens = visited(CURVE + c * n, steps, valid, CURVED)
    x, y = decay_sums(
        DECAY + b * decay_b + (c * heads + h) * decay_h, DOCUMENTS + b * n, steps, tokens, valid,
        counted(VALID + b * n, tokens, valid, PADDED), prefix, decay_n, DECAYS, PACKED,
    )  # fmt: skip
    places = cbh * tl.num_programs(0) * BLOCK
    places += tl.where(valid, tokens, steps) if BY_TOKEN else steps
    tl.store(X + places, x)
    tl.store(Y + places, y)
    if CURVED and BY_TOKEN:
        tl.store(STEPS + c * n + tokens, steps, mask=valid & (cbh % (images * heads) == 0))


@triton.jit
def _load_rows_of_two(
    A, B, CURVE, place, n, stride_a, stride_b,
    D: tl.constexpr, ROWS: tl.constexpr, CURVED: tl.constexpr,
):  # fmt: skip
    """Some rows of two matrices; nothing before the first and beyond the last token."""
    steps = place * ROWS + tl.arange(0, ROWS)
    there = (steps >= 0) & (steps < n)
    tokens = visited(CURVE, steps, there, CURVED)
    a = load_rows(A, tokens, there, stride_a, D)
    return a, load_rows(B, tokens, there, stride_b, D)


@triton.jit
def states_kernel(
    QKV, X, Y, CURVE, VALID, OUT, R, DOUT, STATES, VECTORS,
    n, blocks, heads, stride_b, stride_n, sums_b, scale, weight,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    KINDS: tl.constexpr, UNMASKED: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr,
    CURVED: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """States of keys and values, or of queries and output gradients, that enter each block.

    Kinds are: keys from earlier (0) and later (1) blocks, queries from earlier (2) and later (3)
    ones. Without a mask there is one state of all keys (0) and one of all queries (1), each divided
    by n, for float16 would overflow. A program carries one state through the sequence, and loads
    rows a turn ahead of their use: it waits for no memory.
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
    total = 0.0
    direction = tl.where(reverse, -1, 1)
    turns = tl.cdiv(n, ROWS) if UNMASKED else blocks * (BLOCK // ROWS)
    place = tl.where(reverse, turns - 1, 0)
    a_next, b_next = _load_rows_of_two(A, B, CURVE, place, n, stride_n, stride, D, ROWS, CURVED)
    for turn in range(turns):
        a_in, b_in = a_next, b_next
        a_next, b_next = _load_rows_of_two(
            A, B, CURVE, place + direction, n, stride_n, stride, D, ROWS, CURVED
        )
        steps = place * ROWS + tl.arange(0, ROWS)
        valid = steps < n
        tokens = visited(CURVE, steps, valid, CURVED)
        if QUERIES:
            factor = tl.where(valid, scale, 0.0)
            grad, grad_r = output_grad(b_in, OUT, R, tokens, valid, stride, weight, D, NORMALISE)
            second = grad.to(dtype)
        else:
            factor = tl.where(counted(VALID, tokens, valid, PADDED), 1.0, 0.0)
            grad_r = tl.full((ROWS,), 1.0, tl.float32)
            second = b_in
        if UNMASKED:
            factor /= n
        else:
            if turn % (BLOCK // ROWS) == 0:  # at the door of a block
                block = place * ROWS // BLOCK
                entry = (bh * blocks + block) * KINDS + kind
                tl.store(STATES + entry * D * D + square, state.to(dtype))
                tl.store(VECTORS + entry * D + dims, vector)
                total = tl.load(Y + block * BLOCK + BLOCK - 1)
                fade = tl.exp2(total)
                state *= fade
                vector *= fade
            x, y = tl.load(X + steps), tl.load(Y + steps)
            if QUERIES:
                x, y = y, x
            factor *= tl.exp2(tl.where(reverse, y, total - x))
        a = feature_map(a_in.to(tl.float32), FEATURES, FAST) * factor[:, None]
        vector += tl.sum(a * grad_r[:, None], 0)
        state += tl.dot(tl.trans(a.to(dtype)), second, input_precision=PRECISION)
        place += direction
    if UNMASKED:
        entry = bh * KINDS + kind
        tl.store(STATES + entry * D * D + square, state.to(dtype))
        tl.store(VECTORS + entry * D + dims, vector)


@triton.jit
def gates_kernel(
    FLUX, STATES, VECTORS, DECAY, CURVE, VALID, GRAD,
    n, heads, prefix, flux_side, decay_b, decay_n, decay_h,
    D: tl.constexpr, BLOCK: tl.constexpr, DECAYS: tl.constexpr, PADDED: tl.constexpr,
    CURVED: tl.constexpr, CARRIED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates' logits, in their place, or of a head's logit by image and block.

    A step's log decay l meets every pair that it lies between: with what begins and ends at each
    step of the block, dx and dy, and the pairs that cross its end,

        dl_s = sum_(t>s) dx_t + sum_(t>=s) dy_t + crossing

    The sum over blocks of what begins and ends there would be the same, but for rounding errors,
    which grow with the number of blocks.
    """
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    b, h = bh // heads, bh % heads
    inside = tl.arange(0, BLOCK)
    steps = place * BLOCK + inside
    valid = steps < n
    tokens = visited(CURVE, steps, valid, CURVED)
    FLUX += bh * blocks * BLOCK
    FLUX += tokens if BY_TOKEN else steps
    dx = tl.load(FLUX, mask=valid, other=0.0)
    dx -= tl.load(FLUX + 2 * flux_side, mask=valid, other=0.0)
    dy = tl.load(FLUX + 3 * flux_side, mask=valid, other=0.0)
    dy -= tl.load(FLUX + flux_side, mask=valid, other=0.0)
    dl = tl.sum(dx + dy, 0) - tl.cumsum(dx + dy, 0) + dy
    if CARRIED and place < blocks - 1:
        entry = (bh * blocks + place) * 4
        dims = tl.arange(0, D)
        ends = tl.zeros((D,), tl.float32)
        for side in tl.static_range(2):
            ahead, behind = entry + 4 + 2 * side, entry + 3 - 2 * side
            pairs = load_square(STATES + ahead * D * D, D).to(tl.float32)
            ends += tl.sum(pairs * load_square(STATES + behind * D * D, D), 1)
            ends += tl.load(VECTORS + ahead * D + dims) * tl.load(VECTORS + behind * D + dims)
        dl += tl.sum(ends, 0)
    z = gate_logits(DECAY + b * decay_b + h * decay_h, tokens, valid, decay_n, DECAYS)
    counts = counted(VALID + b * n, tokens, valid, PADDED) & (tokens >= prefix)
    counts &= z < 16  # through a decay of 2^-23 comes nothing but the rounding of these sums
    dz = tl.where(counts, -tl.sigmoid(z) * dl, 0.0)
    if DECAYS == "tokens":
        address = GRAD + b * decay_b + h * decay_h + tokens * decay_n
        tl.store(address, dz.to(GRAD.dtype.element_ty), mask=valid)
    else:  # a logit of -w, for the decay sigmoid(w)
        tl.store(GRAD + bh * blocks + place, -tl.sum(dz, 0))
