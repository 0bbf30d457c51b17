"""Cumulative sums of log decays, and the gradients of gates through them.

Inside a chunk, x and y are the exclusive and the inclusive sums of log2 decays l along the curve
("Definition" in `docs/kernels.md`).
"""

import triton
import triton.language as tl

from lion_kernels import common

NUM_VECTORS = tl.constexpr(4)  # x, y, and the factors of keys before and after the queries


@triton.jit
def _load(DECAY, tokens, valid, stride, DECAYS: tl.constexpr):
    """By token "logs" of decays, or z of "gates" `1 - sigmoid(z)`; -w of a head's `sigmoid(w)`."""
    if DECAYS == "head":
        return tl.zeros_like(tokens).to(tl.float32) - tl.load(DECAY)
    return tl.load(DECAY + tokens * stride, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def _log_decay(z):
    """`log(1 - sigmoid(z))`; log(1 + u) of a small u by its series, as 1 + u would round it."""
    u = tl.exp(-tl.abs(z))
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u / 5))))
    return -tl.maximum(z, 0.0) - tl.where(u < 0.05, series, tl.log(1 + u))


@triton.jit
def decay_cumsum(
    DECAY, CURVE, VALID, DOCUMENTS, curve, image, steps, valid, prefix, stride, DECAYS: tl.constexpr
):
    """A run of steps' tokens, which of them count as keys, and x and y, all `[R]`.

    DECAYS is "none" or as in `_load`. Padding and the first `prefix` tokens
    have a decay of 1. For the clamp and the fall between documents see "Definition".
    """
    tokens = common.token_at(CURVE, steps, valid, curve)
    counts = common.key_mask(VALID, image, tokens, valid)
    log_decay = tl.zeros_like(steps).to(tl.float32)
    if DECAYS != "none":
        natural = _load(DECAY, tokens, valid, stride, DECAYS)
        if DECAYS != "logs":
            natural = _log_decay(natural)
        natural = tl.where(counts & (tokens >= prefix), natural * common.LOG2_E, 0.0)
        log_decay += tl.where(natural < -32.0, -32.0, natural)  # a NaN stays one
    y = tl.cumsum(log_decay, 0)
    if DOCUMENTS is not None:
        inside = valid & (steps > 0)
        own = tl.load(DOCUMENTS + image + steps, mask=inside, other=0)
        begins = own != tl.load(DOCUMENTS + image + steps - 1, mask=inside, other=0)
        y -= 48.0 * tl.cumsum(begins.to(tl.float32), 0)
    return tokens, counts, y - log_decay, y


@triton.jit
def decay_cumsum_kernel(
    DECAY, CURVE, VALID, DOCUMENTS, SUMS, PLACES, n, images, heads, prefix, decay_c, decay_b,
    decay_n, CHUNK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """SUMS `[C, images, H, chunks, NUM_VECTORS, SIZE]`, by step; or by token, if there is PLACES
    `[C, SIZE]` for each token's step on the curves. After the last token the sums stay."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, cbh, cb, h, _, _ = common.place(num_chunks, heads)
    c, b = cb // images, cb % images
    inside = tl.arange(0, triton.next_power_of_2(SIZE))
    steps = chunk * CHUNK + inside
    valid = (inside < CHUNK) & (steps < n)
    DECAY += c * decay_c + b * decay_b + h
    tokens, _, x, y = decay_cumsum(
        DECAY, CURVE, VALID, DOCUMENTS, c * n, b * n, steps, valid, prefix, decay_n, DECAYS
    )
    SUMS += (cbh * num_chunks + chunk) * NUM_VECTORS * SIZE
    places = inside if PLACES is None else tl.where(valid, tokens, inside)
    stored = inside < SIZE
    tl.store(SUMS + places, x, mask=stored)
    tl.store(SUMS + SIZE + places, y, mask=stored)
    if PLACES is not None:
        once = cbh % (images * heads) == 0
        tl.store(PLACES + c * SIZE + places, inside, mask=stored & once)
    else:
        tl.debug_barrier()  # other threads stored what this one loads
        first = inside // BLOCK * BLOCK
        last = tl.minimum(first + BLOCK, CHUNK) - 1
        begin = tl.load(SUMS + first, mask=stored, other=0.0)
        end = tl.load(SUMS + SIZE + last, mask=stored, other=0.0)
        tl.store(SUMS + 2 * SIZE + inside, tl.exp2(end - x), mask=stored)
        tl.store(SUMS + 3 * SIZE + inside, tl.exp2(y - begin), mask=stored)


@triton.jit
def gate_bwd_kernel(
    DLOG_MASK, SUMS, PLACES, STATES, VECTORS, DECAY, CURVE, VALID, GRAD,
    n, heads, prefix, sums_b, decay_c, decay_b, decay_n, filled, width,
    D: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr, DECAYS: tl.constexpr,
):  # fmt: skip
    """Gradients, into GRAD, of what DECAY has, with its strides; a head's by image and chunk. Rows
    of gates are filled up with at most 64 zeros, from column `filled` of GRAD to `width`.

    DLOG_MASK `[C, B, H, chunks, 6, SIZE]`, by step or by token, has the sums (0) to (5) of g_ij in
    "Gradients" of `docs/kernels.md`. Pairs around the chunk come from the states that enter it.
    """
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, _, _ = common.place(num_chunks, heads)
    c = tl.program_id(1)
    part = c * tl.num_programs(0) + bh * num_chunks + chunk
    start, size = chunk * CHUNK, tl.minimum(CHUNK, n - chunk * CHUNK)
    if CURVE is not None:
        CURVE += c * n
    inside, tokens, valid = common.tile(start, size, 0, CURVE, triton.next_power_of_2(SIZE))
    DLOG_MASK += part * 6 * SIZE + (inside if PLACES is None else tokens)
    dx = tl.load(DLOG_MASK, mask=valid, other=0.0)
    dx -= tl.load(DLOG_MASK + 2 * SIZE, mask=valid, other=0.0)
    dy = tl.load(DLOG_MASK + 3 * SIZE, mask=valid, other=0.0)
    dy -= tl.load(DLOG_MASK + SIZE, mask=valid, other=0.0)
    dl = tl.sum(dx + dy, 0) - tl.cumsum(dx + dy, 0) + dy
    if STATES is not None:
        to_later = tl.load(DLOG_MASK + 4 * SIZE, mask=valid, other=0.0)
        of_later = tl.load(DLOG_MASK + 5 * SIZE, mask=valid, other=0.0)
        dl += tl.cumsum(to_later + of_later, 0) - of_later
        STATES += (bh * num_chunks + chunk) * 4 * D * D
        VECTORS += (bh * num_chunks + chunk) * 4 * D + tl.arange(0, D)
        around = tl.zeros((D,), tl.float32)
        for keys in tl.static_range(2):  # of one side with queries of the other
            of_keys = common.load_state(STATES + keys * D * D, D).to(tl.float32)
            of_queries = common.load_state(STATES + (3 - keys) * D * D, D).to(tl.float32)
            around += tl.sum(of_keys * of_queries, 1)
            around -= tl.load(VECTORS + keys * D) * tl.load(VECTORS + (3 - keys) * D)
        SUMS += b * sums_b + (h * num_chunks + chunk) * NUM_VECTORS * SIZE
        dl += tl.sum(around, 0) * tl.exp2(tl.load(SUMS + SIZE + CHUNK - 1))
    counts = common.key_mask(VALID, b * n, tokens, valid) & (tokens >= prefix)
    own = c * decay_c + b * decay_b + h
    z = _load(DECAY + own, tokens, valid, decay_n, DECAYS)
    if DECAYS == "logs":
        z = -z
    else:
        dl *= -tl.sigmoid(z)
    # Nothing but rounding errors comes through a decay below 2^-23.
    dl = tl.where(counts & (z < 16), dl, 0.0)
    if DECAYS == "head":  # z = -w
        tl.store(GRAD + part, -tl.sum(dl, 0))
    else:
        tl.store(GRAD + own + tokens * decay_n, dl.to(GRAD.dtype.element_ty), mask=valid)
    if DECAYS == "gates":  # of which every head fills up a part
        columns = filled + tl.arange(0, 64)
        for row in range(16 * (c * heads + h), size, 16 * heads * tl.num_programs(1)):
            rows = row + tl.arange(0, 16)[:, None]
            place = GRAD + b * decay_b + (start + rows) * decay_n + columns
            tl.store(place, 0.0, mask=(rows < size) & (columns < width))


@triton.jit
def head_bwd_kernel(PARTS, DECAY, TABLE, DDECAY, images, heads, length, stride):
    """Gradients of the heads' logits w, `[C, H]`: sums of PARTS `[C, B, H, stride]` over images and
    `length`; where there was a TABLE, those of g_ij t_ij (see `pairs.py`)."""
    BLOCK: tl.constexpr = 4096
    pid = tl.program_id(0)
    c, h = pid // heads, pid % heads
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, images * length, BLOCK):
        part = start + tl.arange(0, BLOCK)
        sequence = ((c * images + part // length) * heads + h).to(tl.int64)
        there = part < images * length
        total += tl.load(PARTS + sequence * stride + part % length, mask=there, other=0.0)
    dw = tl.sum(total, 0)
    if TABLE is not None:
        z = -tl.load(DECAY + pid)
        log_decay = _log_decay(z) * common.LOG2_E
        dw *= tl.where((z < 16) & (log_decay < 0), tl.sigmoid(z) / log_decay, 0.0)
    tl.store(DDECAY + pid, dw.to(DDECAY.dtype.element_ty))
