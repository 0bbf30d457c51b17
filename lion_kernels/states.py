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

from lion_kernels.common import (
    counted,
    decay_sums,
    gate_logits,
    load_features,
    load_rows,
    load_square,
    my_part,
    row_sum_grad,
    visited,
)


@triton.jit
def sums_kernel(
    DECAY, CURVE, VALID, DOCUMENTS, X, Y, STEPS, n, blocks, images, heads, prefix,
    decay_b, decay_n, decay_h,
    BLOCK: tl.constexpr, DECAYS: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr,
    CURVED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """x and y of each block, `[C, images, H, blocks * BLOCK]`, by step or by token; then `STEPS`,
    `[C, N]`, is where the curves visit a token."""
    place, cbh = my_part(blocks)
    c, b, h = cbh // (images * heads), cbh // heads % images, cbh % heads
    steps = place * BLOCK + tl.arange(0, BLOCK)
    valid = steps < n
    tokens = visited(CURVE + c * n, steps, valid, CURVED)
    x, y = decay_sums(
        DECAY + b * decay_b + (c * heads + h) * decay_h, DOCUMENTS + b * n, steps, tokens, valid,
        counted(VALID + b * n, tokens, valid, PADDED), prefix, decay_n, DECAYS, PACKED,
    )  # fmt: skip
    places = cbh * blocks * BLOCK
    places += tl.where(valid, tokens, steps) if BY_TOKEN else steps
    tl.store(X + places, x)
    tl.store(Y + places, y)
    if CURVED and BY_TOKEN:
        tl.store(STEPS + c * n + tokens, steps, mask=valid & (cbh % (images * heads) == 0))


@triton.jit
def _store_state(STATES, VECTORS, entry, state, vector, D: tl.constexpr):
    dims = tl.arange(0, D)
    square = STATES + entry * D * D + dims[:, None] * D + dims
    tl.store(square, state.to(STATES.dtype.element_ty))
    tl.store(VECTORS + entry * D + dims, vector)


@triton.jit
def added_kernel(
    QKV, X, Y, CURVE, VALID, OUT, R, DOUT, STATES, VECTORS,
    n, blocks, heads, stride_b, stride_n, sums_b, scale, weight,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    KINDS: tl.constexpr, UNMASKED: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr,
    CURVED: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What each block adds to states of keys and values, or of queries and output gradients.

    Kinds are: keys for later (0) and earlier (1) blocks, queries for later (2) and earlier (3)
    ones. Without a mask there is one of all keys (0) and one of all queries (1), each a mean over
    BLOCK tokens, for sums would overflow in float16.
    """
    place, bh = my_part(blocks)
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    OUT += (b * n * heads + h) * D
    DOUT += (b * n * heads + h) * D
    X += b * sums_b + (h * blocks + place) * BLOCK
    Y += b * sums_b + (h * blocks + place) * BLOCK
    later = tl.zeros((D, D), tl.float32)
    later_sum = tl.zeros((D,), tl.float32)
    earlier = tl.zeros((D, D), tl.float32)
    earlier_sum = tl.zeros((D,), tl.float32)
    for first in range(0, tl.minimum(BLOCK, n - place * BLOCK), ROWS):
        inside = first + tl.arange(0, ROWS)
        steps = place * BLOCK + inside
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        if QUERIES:
            a = load_features(Q, rows, valid, stride_n, D, FEATURES, FAST)
            second = load_rows(DOUT, rows, valid, heads * D, D)
            second_r, share = row_sum_grad(
                second, OUT, R + bh * n, rows, valid, heads * D, weight, D, NORMALISE
            )
            share = tl.where(valid, share * scale, 0.0)
        else:
            a = load_features(K, rows, valid, stride_n, D, FEATURES, FAST)
            second = load_rows(V, rows, valid, stride_n, D)
            second_r = tl.full((ROWS,), 1.0, tl.float32)
            share = tl.where(counted(VALID + b * n, rows, valid, PADDED), 1.0, 0.0)
        if not UNMASKED:
            x, y = tl.load(X + inside), tl.load(Y + inside)
            if QUERIES:
                x, y = y, x
            back = (a * (share * tl.exp2(y))[:, None]).to(dtype)
            earlier += tl.dot(tl.trans(back), second, input_precision=PRECISION)
            earlier_sum += tl.sum(back.to(tl.float32) * second_r[:, None], 0)
            share *= tl.exp2(tl.load(Y + BLOCK - 1) - x)
        a = (a * share[:, None]).to(dtype)
        later += tl.dot(tl.trans(a), second, input_precision=PRECISION)
        later_sum += tl.sum(a.to(tl.float32) * second_r[:, None], 0)
    if UNMASKED:
        entry = (bh * blocks + place) * KINDS + QUERIES
        _store_state(STATES, VECTORS, entry, later / BLOCK, later_sum / BLOCK, D)
    else:
        entry = (bh * blocks + place) * KINDS + QUERIES * 2
        _store_state(STATES, VECTORS, entry, later, later_sum, D)
        _store_state(STATES, VECTORS, entry + 1, earlier, earlier_sum, D)


@triton.jit
def _carry(
    STATES, TOTALS, Y, blocks, elements, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    TURN: tl.constexpr, UNMASKED: tl.constexpr,
):  # fmt: skip
    """Some elements of states of a SIZE; blocks of one turn are loaded at once."""
    bh, kind, kinds = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    STATES += (bh * blocks * kinds + kind) * SIZE + elements
    state = tl.zeros_like(elements).to(tl.float32)
    for first in range(0, blocks, TURN):
        places, added, fades = (), (), ()
        for t in tl.static_range(TURN):
            there = first + t < blocks
            place = first + t
            if not UNMASKED:
                place = tl.where(kind % 2 == 1, blocks - 1 - place, place)
                end = tl.load(Y + place * BLOCK + BLOCK - 1, mask=there, other=0.0)
                fades = fades + (tl.exp2(end),)
            places = places + (STATES + place * kinds * SIZE,)
            added = added + (tl.load(places[t], mask=there, other=0.0),)
        for t in tl.static_range(TURN):
            if not UNMASKED:
                entering = state.to(STATES.dtype.element_ty)
                tl.store(places[t], entering, mask=first + t < blocks)
                state *= fades[t]
            state += added[t].to(tl.float32)
    if UNMASKED:
        mean = (state / blocks).to(TOTALS.dtype.element_ty)
        tl.store(TOTALS + (bh * kinds + kind) * SIZE + elements, mean)


@triton.jit
def carry_kernel(
    STATES, VECTORS, TOTALS, VECTOR_TOTALS, Y, blocks, heads, sums_b,
    D: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, TURN: tl.constexpr,
    UNMASKED: tl.constexpr,
):  # fmt: skip
    """Replaces what each block adds by the state that enters it; without a mask, the mean of all.

    A program carries some elements of one state; the last one has the row sums.
    """
    bh, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    Y += bh // heads * sums_b + bh % heads * blocks * BLOCK
    if part == tl.num_programs(2) - 1:
        dims = tl.arange(0, D)
        _carry(VECTORS, VECTOR_TOTALS, Y, blocks, dims, D, BLOCK, TURN, UNMASKED)
    else:
        elements = part * PART + tl.arange(0, PART)
        _carry(STATES, TOTALS, Y, blocks, elements, D * D, BLOCK, TURN, UNMASKED)


@triton.jit
def gates_kernel(
    FLUX, Y, STATES, VECTORS, DECAY, CURVE, VALID, GRAD,
    n, blocks, heads, prefix, flux_side, sums_b, decay_b, decay_n, decay_h,
    D: tl.constexpr, BLOCK: tl.constexpr, DECAYS: tl.constexpr, PADDED: tl.constexpr,
    CURVED: tl.constexpr, CARRIED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates' logits, in their place, or of a head's logit by image and block.

    A step's log decay l meets every pair that it lies between. With what begins and ends at each
    step, dx and dy, these are of pairs inside the block, or with a key or query in it

        dl_s = sum_(t>s) dx_t + sum_(t>=s) dy_t,  sum_(t<=s) to_later_t + sum_(t<s) from_later_t

    and the pairs around it, whose states enter from either side. Little comes through a closed
    gate beside what begins and ends at other steps: of pairs inside the block, dx and dy take off
    what they add, and those over its edges are summed from the side on which they cross the gate.
    """
    place, bh = my_part(blocks)
    b, h = bh // heads, bh % heads
    Y += b * sums_b + h * blocks * BLOCK
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
    if CARRIED:
        to_later = tl.load(FLUX + 4 * flux_side, mask=valid, other=0.0)
        from_later = tl.load(FLUX + 5 * flux_side, mask=valid, other=0.0)
        dl += tl.cumsum(to_later + from_later, 0) - from_later
        entry = (bh * blocks + place) * 4
        dims = tl.arange(0, D)
        around = tl.zeros((D,), tl.float32)
        for side in tl.static_range(2):
            ahead, behind = entry + side, entry + 3 - side
            pairs = load_square(STATES + ahead * D * D, D).to(tl.float32)
            around += tl.sum(pairs * load_square(STATES + behind * D * D, D), 1)
            around += tl.load(VECTORS + ahead * D + dims) * tl.load(VECTORS + behind * D + dims)
        fade = tl.exp2(tl.load(Y + place * BLOCK + BLOCK - 1))
        dl += tl.sum(around, 0) * fade
    z = gate_logits(DECAY + b * decay_b + h * decay_h, tokens, valid, decay_n, DECAYS)
    counts = counted(VALID + b * n, tokens, valid, PADDED) & (tokens >= prefix)
    if FLUX.dtype.element_ty == tl.float32:
        counts &= z < 16  # through a decay of 2^-23 comes nothing but the rounding of these sums
    dz = tl.where(counts, -tl.sigmoid(z) * dl, 0.0)
    if DECAYS == "tokens":
        address = GRAD + b * decay_b + h * decay_h + tokens * decay_n
        tl.store(address, dz.to(GRAD.dtype.element_ty), mask=valid)
    else:  # a logit of -w, for the decay sigmoid(w)
        tl.store(GRAD + bh * blocks + place, -tl.sum(dz, 0))
