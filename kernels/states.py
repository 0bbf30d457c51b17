"""Running sums of decays along a curve, the states that blocks hand on, and the gates' gradients.

With block-local sums x, y of log2 decays and their total g, a state of pairs (a_j, b_j) is carried

    from earlier blocks  S <- 2^g S + sum_j 2^(g - x_j) a_j b_j^T
    from later blocks    S <- 2^g S + sum_j 2^(y_j) a_j b_j^T

for keys and values; for queries and output gradients x and y change places. Every exponent is at
most 0.
"""

import triton
import triton.language as tl

from kernels.common import counted, load_features, load_rows, load_square, output_grad, visited


@triton.jit
def _logits(DECAY, c, b, h, tokens, valid, stride_b, stride_n, heads, GATED: tl.constexpr):
    """The gates' logits of a head: `[B, N, C * H]` columns, or one per curve and head, `[C, H]`."""
    if GATED:
        address = DECAY + b * stride_b + tokens * stride_n + c * heads + h
        return tl.load(address, mask=valid, other=0.0).to(tl.float32)
    return tl.zeros_like(tokens).to(tl.float32) - tl.load(DECAY + c * heads + h)


@triton.jit
def _log1p(u):
    """`log(1 + u)` of u in [0, 1], small ones by their series: 1 + u would round them."""
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u / 5))))
    return tl.where(u < 0.05, series, tl.log(1 + u))


@triton.jit
def decay_sums(
    DECAY, DOCUMENTS, c, b, h, steps, tokens, valid, counts, heads, prefix, stride_b, stride_n,
    DECAYS: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Exclusive and inclusive sums of the log2 decays of the tokens at some steps.

    A decay is `1 - sigmoid(z)` of its logit z, and 1 for padding and, if gated, prefix tokens.
    Between documents both sums fall by 48: 2^-48 is none even beside the eps of the row sums.
    """
    decay = tl.zeros_like(steps).to(tl.float32)
    if DECAYS:
        z = _logits(DECAY, c, b, h, tokens, valid, stride_b, stride_n, heads, GATED)
        softplus = tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
        # A decay of 2^-32 is none, and larger sums would round those of the open gates beside it.
        least = tl.maximum(softplus * -1.4426950408889634, -32.0)
        decay += tl.where(counts & (tokens >= prefix), least, 0.0)
    y = tl.cumsum(decay, 0)
    if PACKED:
        same = tl.load(DOCUMENTS + steps, mask=valid, other=0)
        same = same == tl.load(DOCUMENTS + steps - 1, mask=valid & (steps > 0), other=0)
        y -= 48.0 * tl.cumsum((valid & (steps > 0) & ~same).to(tl.float32), 0)
    return y - decay, y


@triton.jit
def sums_kernel(
    DECAY, CURVE, VALID, DOCUMENTS, X, Y, STEPS, n, block, images, heads, prefix,
    stride_b, stride_n, curve_c,
    WIDTH: tl.constexpr, DECAYS: tl.constexpr, GATED: tl.constexpr, PADDED: tl.constexpr,
    PACKED: tl.constexpr, CURVED: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Exclusive and inclusive sums of log2 decays inside each block, by step or by token."""
    cbh = tl.program_id(1).to(tl.int64)
    c, b, h = cbh // (images * heads), cbh // heads % images, cbh % heads
    inside = tl.arange(0, WIDTH)
    steps = tl.program_id(0) * block + inside
    valid = (inside < block) & (steps < n)
    tokens = visited(CURVE + c * curve_c, steps, valid, CURVED)
    counts = counted(VALID + b * n, tokens, valid, PADDED)
    x, y = decay_sums(
        DECAY, DOCUMENTS + b * n, c, b, h, steps, tokens, valid, counts, heads, prefix,
        stride_b, stride_n, DECAYS, GATED, PACKED,
    )  # fmt: skip
    places = cbh * tl.num_programs(0) * block
    places += tl.where(valid, tokens, steps) if BY_TOKEN else steps
    tl.store(X + places, x, mask=inside < block)
    tl.store(Y + places, y, mask=inside < block)
    if CURVED and BY_TOKEN:
        tl.store(STEPS + c * n + tokens, steps, mask=valid & (cbh % (images * heads) == 0))


@triton.jit
def local_states_kernel(
    QKV, X, Y, CURVE, VALID, OUT, R, DOUT, STATES, VECTORS,
    n, block, heads, stride_b, stride_n, sums_b, scale, weight,
    D: tl.constexpr, ROWS: tl.constexpr, LIT: tl.constexpr, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, CURVED: tl.constexpr,
    NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What a block adds to the states: of keys and values (0 forwards, 1 backwards), and with a
    second program of queries and output gradients (2 and 3). LION-Lit has one of each."""
    place, bh, of_queries = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    b, h = bh // heads, bh % heads
    blocks = tl.num_programs(0)
    kinds = tl.num_programs(2)
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    A = Q + tl.where(of_queries, 0, heads * D)
    X += b * sums_b + (h * blocks + place) * block
    Y += b * sums_b + (h * blocks + place) * block
    total = 0.0
    if not LIT:
        total += tl.load(Y + block - 1)
    scaled = tl.where(of_queries, scale, 1.0)
    SIDES: tl.constexpr = 1 if LIT else 2
    forwards = tl.zeros((D, D), tl.float32)
    forwards_sum = tl.zeros((D,), tl.float32)
    backwards = tl.zeros((D, D), tl.float32)
    backwards_sum = tl.zeros((D,), tl.float32)
    for first in range(0, tl.minimum(block, n - place * block), ROWS):
        inside = first + tl.arange(0, ROWS)
        steps = place * block + inside
        valid = steps < n
        rows = visited(CURVE, steps, valid, CURVED)
        a = load_features(A, rows, valid, stride_n, D, FEATURES, FAST)
        counts = valid
        if not of_queries:
            counts = counted(VALID + b * n, rows, valid, PADDED)
        share = tl.where(counts, scaled, 0.0)
        if of_queries:
            grad, grad_r = output_grad(
                DOUT + (b * n * heads + h) * D, OUT + (b * n * heads + h) * D, R + bh * n,
                rows, valid, heads * D, weight, D, NORMALISE,
            )  # fmt: skip
            v = grad.to(dtype)
        else:
            v = load_rows(Q + 2 * heads * D, rows, valid, stride_n, D)
            grad_r = tl.full((ROWS,), 1.0, tl.float32)
        if LIT:
            a *= share[:, None]
        else:
            x, y = tl.load(X + inside), tl.load(Y + inside)
            back = a * (share * tl.exp2(tl.where(of_queries, x, y)))[:, None]
            a *= (share * tl.exp2(total - tl.where(of_queries, y, x)))[:, None]
            backwards += tl.dot(tl.trans(back.to(dtype)), v, input_precision=PRECISION)
            backwards_sum += tl.sum(back * grad_r[:, None], 0)
        forwards += tl.dot(tl.trans(a.to(dtype)), v, input_precision=PRECISION)
        forwards_sum += tl.sum(a * grad_r[:, None], 0)
    dims = tl.arange(0, D)
    square = dims[:, None] * D + dims
    state = ((bh * blocks + place) * kinds + tl.program_id(2)) * SIDES
    if LIT:  # without the factor 1 / n float16 would overflow
        forwards /= n
        forwards_sum /= n
    tl.store(STATES + state * D * D + square, forwards.to(dtype))
    tl.store(VECTORS + state * D + dims, forwards_sum)
    if not LIT:
        tl.store(STATES + (state + 1) * D * D + square, backwards.to(dtype))
        tl.store(VECTORS + (state + 1) * D + dims, backwards_sum)


@triton.jit
def carry_kernel(
    STATES, VECTORS, TOTALS, VECTOR_TOTALS, Y, block, blocks, heads, sums_b,
    D: tl.constexpr, PART: tl.constexpr, LIT: tl.constexpr,
):  # fmt: skip
    """Replaces what each block adds by the state that enters it; of LION-Lit, sums all blocks.

    A program carries some elements of one state; the last one has the row sums.
    """
    bh, kind, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    kinds, parts = tl.num_programs(1), tl.num_programs(2)
    Y += bh // heads * sums_b + bh % heads * blocks * block
    reverse = (kind % 2 == 1) & (not LIT)
    elements = part * PART + tl.arange(0, PART)
    dims = tl.arange(0, D)
    state = tl.zeros((PART,), tl.float32)
    vector = tl.zeros((D,), tl.float32)
    for i in range(0, blocks):
        place = tl.where(reverse, blocks - 1 - i, i)
        entry = (bh * blocks + place) * kinds + kind
        fade = 1.0
        if not LIT:
            fade = tl.exp2(tl.load(Y + place * block + block - 1))
        if part == parts - 1:
            added = tl.load(VECTORS + entry * D + dims)
            if not LIT:
                tl.store(VECTORS + entry * D + dims, vector)
            vector = vector * fade + added
        else:
            added = tl.load(STATES + entry * D * D + elements).to(tl.float32)
            if not LIT:
                tl.store(STATES + entry * D * D + elements, state.to(STATES.dtype.element_ty))
            state = state * fade + added
    if LIT:
        entry = bh * kinds + kind
        if part == parts - 1:
            tl.store(VECTOR_TOTALS + entry * D + dims, vector)
        else:
            tl.store(TOTALS + entry * D * D + elements, state.to(TOTALS.dtype.element_ty))


@triton.jit
def crossing_kernel(STATES, VECTORS, CROSSING, D: tl.constexpr):
    """What the pairs that meet across the end of each block contribute to a gradient of its decays.

    The sum over blocks of what begins and ends there would be the same, but for rounding errors,
    which grow with the number of blocks.
    """
    place, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    entry = (bh * blocks + place) * 4
    dims = tl.arange(0, D)
    crossing = 0.0
    if place < blocks - 1:
        pairs = tl.zeros((D, D), tl.float32)
        for side in tl.static_range(2):
            ahead, behind = entry + 4 + 2 * side, entry + 3 - 2 * side
            pairs += load_square(STATES + ahead * D * D, D).to(tl.float32) * load_square(
                STATES + behind * D * D, D
            )
            sums = tl.load(VECTORS + ahead * D + dims) * tl.load(VECTORS + behind * D + dims)
            crossing += tl.sum(sums, 0)
        crossing += tl.sum(tl.sum(pairs, 1), 0)
    tl.store(CROSSING + bh * blocks + place, crossing)


@triton.jit
def gates_kernel(
    FLUX, CROSSING, DECAY, CURVE, VALID, GRAD, n, block, images, heads, prefix, flux_side, flux_c,
    stride_b, stride_n, curve_c,
    WIDTH: tl.constexpr, GATED: tl.constexpr, PADDED: tl.constexpr, CURVED: tl.constexpr,
    BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates' logits, in their place, or of a head's logit by image and block.

    A step's log decay l meets every pair that it lies between: with what pairs begin and end at
    each step of the block, dx and dy, `dl_s = sum_(t>s) dx_t + sum_(t>=s) dy_t + crossing`.
    """
    place, cbh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    c, b, h = cbh // (images * heads), cbh // heads % images, cbh % heads
    inside = tl.arange(0, WIDTH)
    steps = place * block + inside
    valid = (inside < block) & (steps < n)
    tokens = visited(CURVE + c * curve_c, steps, valid, CURVED)
    FLUX += c * flux_c + (b * heads + h) * blocks * block
    FLUX += tokens if BY_TOKEN else steps
    dx = tl.load(FLUX, mask=valid, other=0.0)
    dx -= tl.load(FLUX + 2 * flux_side, mask=valid, other=0.0)
    dy = tl.load(FLUX + 3 * flux_side, mask=valid, other=0.0)
    dy -= tl.load(FLUX + flux_side, mask=valid, other=0.0)
    grad = tl.sum(dx + dy, 0) - tl.cumsum(dx + dy, 0) + dy
    grad += tl.load(CROSSING + cbh * blocks + place)
    z = _logits(DECAY, c, b, h, tokens, valid, stride_b, stride_n, heads, GATED)
    counts = counted(VALID + b * n, tokens, valid, PADDED) & (tokens >= prefix)
    grad = tl.where(counts, -tl.sigmoid(z) * grad, 0.0)
    if GATED:
        address = GRAD + b * n * stride_n + tokens * stride_n + c * heads + h
        tl.store(address, grad.to(GRAD.dtype.element_ty), mask=valid)
    else:  # a logit of -w, for the decay sigmoid(w)
        tl.store(GRAD + cbh * blocks + place, -tl.sum(grad, 0))
