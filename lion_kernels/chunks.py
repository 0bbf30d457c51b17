"""LION along one curve: pairs inside a chunk of tokens, and the states that chunks hand on.

A short sequence is one chunk. Names, formulas and what is resident are in "Definition", "Gradients"
and "Algorithms" of `docs/kernels.md`; q' is scale phi(q) / r there, and g_ij the gradient of log
M_ij, of which gates need sums. Beside each state `[D, D]` of keys goes a vector `[D]`, the same sum
with 1 in the place of values; q' and dO have them likewise, with delta, and x and y exchanged.
"""

import triton
import triton.language as tl

from lion_kernels import common
from lion_kernels.decay import NUM_VECTORS


@triton.jit
def _resident_keys(
    Q, CURVE, VALID, PHI_K, image, start, size, heads, stride_n,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Tiles `[BLOCK, D]`, the last one shorter, of phi(k), 0 where no key counts, and of values.
    PHI_K, if not None, gets a copy of phi(k)."""
    K, V = Q + heads * D, Q + 2 * heads * D
    keys, values = (), ()
    for t in tl.static_range((CHUNK + BLOCK - 1) // BLOCK):
        _, tokens, valid = common.tile(
            start, size, t * BLOCK, CURVE, BLOCK if t < CHUNK // BLOCK else CHUNK % BLOCK
        )
        counts = common.key_mask(VALID, image, tokens, valid)
        k = common.load_tile(K, tokens, valid, stride_n, D)
        phi = tl.where(counts[:, None], common.feature_map(k, FEATURES)[0], 0.0).to(k.dtype)
        if PHI_K is not None:
            common.store_tile(PHI_K, tokens, valid, heads * D, phi, D)
        keys += (phi,)
        values += (common.load_tile(V, tokens, valid, stride_n, D),)
    return keys, values


@triton.jit
def _mask_tile(
    SUMS, x_i, y_i, i, t: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """M `[BLOCK, C]` of queries of tile i and keys of tile t (see `decay.py`)."""
    columns = t * BLOCK + tl.arange(0, C)
    if t == i:
        x_j, y_j = tl.load(SUMS + columns), tl.load(SUMS + SIZE + columns)
        mask = common.decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
    else:
        begin = tl.load(SUMS + t * BLOCK)
        end = tl.load(SUMS + SIZE + t * BLOCK + C - 1)
        row = tl.exp2(tl.where(t < i, x_i - end, begin - y_i))
        column = tl.load(SUMS + tl.where(t < i, 2, 3) * SIZE + columns)
        mask = row[:, None] * column[None, :]
    return mask


@triton.jit
def mix_fwd_kernel(
    QKV, SUMS, TABLE, CURVE, VALID, STATES, VECTORS, OUT, INV_DENOM,
    n, heads, stride_n, sums_c, sums_b, eps, curve_weight,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, NUM_CURVES: tl.constexpr,
    FEATURES: tl.constexpr, NORMALISE: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """OUT `[B, N, H, D]` and 1 / r `[B, H, N]` of QKV `[B, N, 3, H, D]`. ADD adds a curve to those
    that are there. One chunk can go along NUM_CURVES at once, with TABLE as in `pairs.py`."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    dtype = QKV.dtype.element_ty
    Q, OUT, INV_DENOM = QKV + row, OUT + own, INV_DENOM + bh * n
    SUMS += b * sums_b + (h * num_chunks + chunk) * NUM_VECTORS * SIZE
    start, size = chunk * CHUNK, tl.minimum(CHUNK, n - chunk * CHUNK)
    keys, values = _resident_keys(
        Q, CURVE, VALID, None, b * n, start, size, heads, stride_n, D, CHUNK, BLOCK, FEATURES
    )
    if STATES is not None:
        STATES += (bh * num_chunks + chunk) * 2 * D * D
        VECTORS += (bh * num_chunks + chunk) * 2 * D + tl.arange(0, D)
        earlier, later = common.load_state(STATES, D), common.load_state(STATES + D * D, D)
        total = tl.load(SUMS + SIZE + CHUNK - 1)
    for i in range(0, tl.cdiv(size, BLOCK)):
        inside, tokens, valid = common.tile(start, size, i * BLOCK, CURVE, BLOCK)
        xs, ys, _ = common.sums_of(SUMS, None, inside, sums_c, SIZE, NUM_CURVES)
        q = common.feature_map(common.load_tile(Q, tokens, valid, stride_n, D), FEATURES)[0]
        q = (q * D**-0.5).to(dtype)  # [BLOCK, D]
        out = tl.zeros((BLOCK, D), tl.float32)
        denom, rounding = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        if STATES is not None:
            fade = tl.exp2(xs[0])
            out = common.dot(q, earlier) * fade[:, None]
            denom = tl.sum(q.to(tl.float32) * tl.load(VECTORS), 1) * fade
            fade = tl.exp2(total - ys[0])
            out += common.dot(q, later) * fade[:, None]
            denom += tl.sum(q.to(tl.float32) * tl.load(VECTORS + D), 1) * fade
        for t in tl.static_range(SIZE // BLOCK):
            if NUM_CURVES > 1:
                rows, columns = h * SIZE + inside, t * BLOCK + tl.arange(0, keys[t].shape[0])
                mask = common.sum_of_masks(SUMS, TABLE, rows, columns, xs, ys, sums_c, SIZE)
            else:
                mask = _mask_tile(SUMS, xs[0], ys[0], i, t, keys[t].shape[0], SIZE, BLOCK)
            w = common.dot(q, tl.trans(keys[t])) * mask  # [BLOCK, C]
            rounded = common.round_to(w, dtype)
            denom += tl.sum(w, 1)
            rounding += tl.sum(rounded - w, 1)
            out = common.dot(rounded.to(dtype), values[t], out)  # [BLOCK, D]
        out *= curve_weight
        if NORMALISE:
            denom = (denom + NUM_CURVES * eps) * curve_weight
            if ADD:
                before = 1 / tl.load(INV_DENOM + tokens, mask=valid, other=1.0)
                out_before = common.load_tile(OUT, tokens, valid, heads * D, D).to(tl.float32)
                out += out_before * before[:, None]
                denom += before
            tl.store(INV_DENOM + tokens, 1 / denom, mask=valid)
            # Rounded weights sum to 1 as well.
            out *= (1 / (denom + rounding * curve_weight))[:, None]
        common.store_tile(OUT, tokens, valid, heads * D, out, D, ADD and not NORMALISE)


@triton.jit
def mix_bwd_dq_kernel(
    QKV, SUMS, CURVE, VALID, STATES, VECTORS, OUT, INV_DENOM, DO, PHI_Q, PHI_K, DELTA, DQ_RESIDUAL,
    DQKV, DLOG_MASK, n, heads, stride_n, sums_b, eps, curve_weight, D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
    ADD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """dq into DQKV, sums of g_ij by query, and what `mix_bwd_dkv_kernel` reads: DELTA `[B, H, N]`,
    q' and phi(k) in PHI_Q and PHI_K `[B, N, H, D]`. "Residual of dq" is that over all curves."""
    SIZE: tl.constexpr = (CHUNK + BLOCK - 1) // BLOCK * BLOCK
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    Q, DQ = QKV + row, DQKV + row
    SUMS += b * sums_b + (h * num_chunks + chunk) * NUM_VECTORS * SIZE
    OUT, DO, PHI_Q, PHI_K = OUT + own, DO + own, PHI_Q + own, PHI_K + own
    DLOG_MASK += (bh * num_chunks + chunk) * 6 * SIZE
    start, size = chunk * CHUNK, tl.minimum(CHUNK, n - chunk * CHUNK)
    keys, values = _resident_keys(
        Q, CURVE, VALID, PHI_K, b * n, start, size, heads, stride_n, D, CHUNK, BLOCK, FEATURES
    )
    if STATES is not None:
        STATES += (bh * num_chunks + chunk) * 4 * D * D
        VECTORS += (bh * num_chunks + chunk) * 4 * D + tl.arange(0, D)
        earlier, later = common.load_state(STATES, D), common.load_state(STATES + D * D, D)
        total = tl.load(SUMS + SIZE + CHUNK - 1)
    for i in range(0, tl.cdiv(size, BLOCK)):
        inside, tokens, valid = common.tile(start, size, i * BLOCK, CURVE, BLOCK)
        x_i, y_i = tl.load(SUMS + inside), tl.load(SUMS + SIZE + inside)
        do = common.load_tile(DO, tokens, valid, heads * D, D)
        delta = common.load_delta(do, OUT, tokens, valid, heads * D, NORMALISE)
        tl.store(DELTA + bh * n + tokens, delta, mask=valid)
        inv_denom = tl.load(INV_DENOM + bh * n + tokens, mask=valid, other=0.0)
        factor = inv_denom * (curve_weight * D**-0.5)
        q = common.feature_map(common.load_tile(Q, tokens, valid, stride_n, D), FEATURES)[0]
        q = common.narrow(q * factor[:, None], do.dtype)  # q', [BLOCK, D]
        common.store_tile(PHI_Q, tokens, valid, heads * D, q, D)
        dq = tl.zeros((BLOCK, D), tl.float32)
        of_earlier = tl.zeros((BLOCK,), tl.float32)
        if STATES is not None:
            part = common.dot(do, tl.trans(later))
            part = (part - delta[:, None] * tl.load(VECTORS + D)) * tl.exp2(total - y_i)[:, None]
            of_later = tl.sum(q.to(tl.float32) * part, 1)
            tl.store(DLOG_MASK + 5 * SIZE + inside, of_later, mask=valid)
            dq = common.dot(do, tl.trans(earlier))
            dq = (dq - delta[:, None] * tl.load(VECTORS)) * tl.exp2(x_i)[:, None]
        for t in tl.static_range(SIZE // BLOCK):
            mask = _mask_tile(SUMS, x_i, y_i, i, t, keys[t].shape[0], SIZE, BLOCK)
            dw = common.dot(do, tl.trans(values[t]))
            dw = (dw - delta[:, None]) * mask  # [BLOCK, C]
            if t == i:
                before = tl.arange(0, BLOCK)[:, None] > tl.arange(0, dw.shape[1])[None, :]
                dw_before = tl.where(before, dw, 0.0).to(do.dtype)
                dq = common.dot(dw_before, keys[t], dq)
                of_earlier = tl.sum(q.to(tl.float32) * dq, 1)
                dw = tl.where(before, 0.0, dw)
            dq = common.dot(dw.to(do.dtype), keys[t], dq)  # [BLOCK, D]
        along = tl.sum(q.to(tl.float32) * dq, 1)
        tl.store(DLOG_MASK + inside, of_earlier, mask=valid)
        tl.store(DLOG_MASK + SIZE + inside, along - of_earlier, mask=valid)
        if STATES is not None:
            dq += part
            along += of_later
        if NORMALISE and FEATURES != "none":
            if ADD:
                along += tl.load(DQ_RESIDUAL + bh * n + tokens, mask=valid, other=0.0)
            if LAST:
                along -= eps * delta * inv_denom
                dq -= (along / tl.maximum(tl.sum(q.to(tl.float32), 1), 1e-30))[:, None]
            else:
                tl.store(DQ_RESIDUAL + bh * n + tokens, along, mask=valid)
        dq = common.back_to_rows(Q, tokens, valid, stride_n, dq * factor[:, None], D, FEATURES)
        common.store_tile(DQ, tokens, valid, stride_n, dq, D, ADD)


@triton.jit
def _dkv_tile(
    dk, dv, keys, queries, row, edge, start,
    SIDE: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Adds BLOCK_N queries, from `start` on, to dk and dv of a tile of keys that they are "before",
    "in" or "after". Returns also the sums of g_ij of queries in it up to each key."""
    k, v, x_j, y_j, own = keys
    PHI_Q, DO, DELTA, CURVE, SUMS, stride_o, end = queries
    D: tl.constexpr = k.shape[1]
    steps = start + tl.arange(0, BLOCK_N)
    there = steps < end
    tokens = common.token_at(CURVE, steps, there)
    q = common.load_tile(PHI_Q, tokens, there, stride_o, D)  # q', [BLOCK_N, D]
    do = common.load_tile(DO, tokens, there, stride_o, D)
    delta = tl.load(DELTA + tokens, mask=there, other=0.0)
    if SIDE == "before":
        mask = row[:, None] * tl.exp2(edge - tl.load(SUMS + SIZE + steps))[None, :]
    elif SIDE == "after":
        mask = row[:, None] * tl.exp2(tl.load(SUMS + steps) - edge)[None, :]
    else:
        x_i, y_i = tl.load(SUMS + steps), tl.load(SUMS + SIZE + steps)
        mask = common.decay_mask(x_i[None, :], y_i[None, :], x_j[:, None], y_j[:, None])
    dw = (common.dot(v, tl.trans(do)) - delta[None, :]) * mask  # [BLOCK, BLOCK_N]
    dk = common.dot(dw.to(k.dtype), q, dk)  # [BLOCK, D]
    w = common.dot(k, tl.trans(q))  # [BLOCK, BLOCK_N]
    until = tl.zeros((k.shape[0],), tl.float32)
    if SIDE == "in":
        g = w * common.round_to(dw, k.dtype)
        until = tl.sum(tl.where(steps[None, :] <= own[:, None], g, 0.0), 1)
    dv = common.dot((w * mask).to(k.dtype), do, dv)  # [BLOCK, D]
    return dk, dv, until


@triton.jit
def mix_bwd_dkv_kernel(
    QKV, SUMS, CURVE, VALID, STATES, VECTORS, DO, PHI_Q, PHI_K, DELTA, DQKV, DLOG_MASK, n, heads,
    stride_n, sums_b, tiles, D: tl.constexpr, CHUNK: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, FEATURES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk and dv into DQKV, and sums of g_ij by key. Products are keys by queries. A chunk
    has `tiles` of keys: as a constant, that number made threads spill."""
    num_chunks = tl.cdiv(n, CHUNK)
    part, bh, b, h, row, rows = common.place(num_chunks * tiles, heads, n, stride_n, D)
    chunk = part // tiles
    low, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n)
    first = low + part % tiles * BLOCK
    K, DK = QKV + row + heads * D, DQKV + row + heads * D
    V, DV = K + heads * D, DK + heads * D
    SUMS += b * sums_b + (h * num_chunks + chunk) * NUM_VECTORS * SIZE - low
    DLOG_MASK += (bh * num_chunks + chunk) * 6 * SIZE - low
    DO, PHI_Q, PHI_K, DELTA = DO + rows, PHI_Q + rows, PHI_K + rows, DELTA + bh * n
    own, tokens, valid = common.tile(0, end, first, CURVE, BLOCK)
    x_j, y_j = tl.load(SUMS + own), tl.load(SUMS + SIZE + own)
    k = common.load_tile(PHI_K, tokens, valid, heads * D, D)  # phi(k), [BLOCK, D]
    v = common.load_tile(V, tokens, valid, stride_n, D)
    dk, dv = tl.zeros((BLOCK, D), tl.float32), tl.zeros((BLOCK, D), tl.float32)
    if STATES is not None:
        STATES += (bh * num_chunks + chunk) * 4 * D * D
        VECTORS += (bh * num_chunks + chunk) * 4 * D + tl.arange(0, D)
        later = common.load_state(STATES + 3 * D * D, D)
        fade = tl.exp2(tl.load(SUMS + low + SIZE + CHUNK - 1) - x_j)[:, None]
        dv = common.dot(k, later) * fade
        part_later = common.dot(v, tl.trans(later))
        part_later = (part_later - tl.load(VECTORS + 3 * D)) * fade
        to_later = tl.sum(k.to(tl.float32) * part_later, 1)
        tl.store(DLOG_MASK + 4 * SIZE + own, to_later, mask=valid)
        earlier = common.load_state(STATES + 2 * D * D, D)
        fade = tl.exp2(y_j)[:, None]
        dv += common.dot(k, earlier) * fade
        dk = common.dot(v, tl.trans(earlier))
        dk = (dk - tl.load(VECTORS + 2 * D)) * fade
    keys = (k, v, x_j, y_j, own)
    queries = (PHI_Q, DO, DELTA, CURVE, SUMS, heads * D, end)
    edge = tl.load(SUMS + first)
    row = tl.exp2(y_j - edge)
    for start in range(low, first, BLOCK_N):
        dk, dv, until = _dkv_tile(dk, dv, keys, queries, row, edge, start, "before", BLOCK_N, SIZE)
    to_earlier = tl.sum(k.to(tl.float32) * dk, 1)
    for start in range(first, first + BLOCK, BLOCK_N):
        dk, dv, until = _dkv_tile(dk, dv, keys, queries, row, edge, start, "in", BLOCK_N, SIZE)
        to_earlier += until
    edge = tl.load(SUMS + SIZE + first + BLOCK - 1)
    row = tl.exp2(edge - x_j)
    for start in range(first + BLOCK, end, BLOCK_N):
        dk, dv, until = _dkv_tile(dk, dv, keys, queries, row, edge, start, "after", BLOCK_N, SIZE)
    along = tl.sum(k.to(tl.float32) * dk, 1)
    tl.store(DLOG_MASK + 2 * SIZE + own, along - to_earlier, mask=valid)
    tl.store(DLOG_MASK + 3 * SIZE + own, to_earlier, mask=valid)
    if STATES is not None:
        dk += part_later
    dk = common.back_to_rows(K, tokens, valid, stride_n, dk, D, FEATURES)
    dk = tl.where(common.key_mask(VALID, b * n, tokens, valid)[:, None], dk, 0.0)
    if ADD:  # both loads before the stores: fewer registers spill
        dk += common.load_tile(DK, tokens, valid, stride_n, D).to(tl.float32)
        dv += common.load_tile(DV, tokens, valid, stride_n, D).to(tl.float32)
    common.store_tile(DK, tokens, valid, stride_n, dk, D)
    common.store_tile(DV, tokens, valid, stride_n, dv, D)


@triton.jit
def chunk_state_kernel(
    QKV, SUMS, CURVE, VALID, OUT, INV_DENOM, DO, STATES, VECTORS, n, heads, stride_n, sums_b,
    curve_weight,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, NUM_STATES: tl.constexpr,
    OF_QUERIES: tl.constexpr, FEATURES: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to its states, `[B, H, chunks, NUM_STATES, D, D]`, of keys for later (0)
    and earlier (1) chunks, or, OF_QUERIES, of queries for later (2) and earlier (3) ones."""
    num_chunks = tl.cdiv(n, CHUNK)
    chunk, bh, b, h, row, own = common.place(num_chunks, heads, n, stride_n, D)
    Q = QKV + row
    dtype = QKV.dtype.element_ty
    SUMS += b * sums_b + (h * num_chunks + chunk) * NUM_VECTORS * CHUNK
    later, earlier = tl.zeros((D, D), tl.float32), tl.zeros((D, D), tl.float32)
    later_vector, earlier_vector = tl.zeros((D,), tl.float32), tl.zeros((D,), tl.float32)
    total = tl.load(SUMS + 2 * CHUNK - 1)
    start, size = chunk * CHUNK, tl.minimum(CHUNK, n - chunk * CHUNK)
    for first in range(0, size, BLOCK):
        inside, tokens, valid = common.tile(start, size, first, CURVE, BLOCK)
        x, y = tl.load(SUMS + inside), tl.load(SUMS + CHUNK + inside)
        if OF_QUERIES:
            a = common.load_tile(Q, tokens, valid, stride_n, D)
            b_tile = common.load_tile(DO + own, tokens, valid, heads * D, D)
            weight = common.load_delta(b_tile, OUT + own, tokens, valid, heads * D, NORMALISE)
            inv_denom = tl.load(INV_DENOM + bh * n + tokens, mask=valid, other=0.0)
            factor = inv_denom * (curve_weight * D**-0.5)
            to_later, to_earlier = tl.exp2(total - y), tl.exp2(x)
        else:
            a = common.load_tile(Q + heads * D, tokens, valid, stride_n, D)
            b_tile = common.load_tile(Q + 2 * heads * D, tokens, valid, stride_n, D)
            weight = tl.full((BLOCK,), 1.0, tl.float32)
            counts = common.key_mask(VALID, b * n, tokens, valid)
            factor = tl.where(counts, 1.0, 0.0)
            to_later, to_earlier = tl.exp2(total - x), tl.exp2(y)
        phi = common.feature_map(a, FEATURES)[0] * factor[:, None]  # [BLOCK, D]
        scaled = common.narrow(phi * to_later[:, None], dtype)
        later = common.dot(tl.trans(scaled), b_tile, later)  # [D, D]
        later_vector += tl.sum(scaled.to(tl.float32) * weight[:, None], 0)
        scaled = common.narrow(phi * to_earlier[:, None], dtype)
        earlier = common.dot(tl.trans(scaled), b_tile, earlier)  # [D, D]
        earlier_vector += tl.sum(scaled.to(tl.float32) * weight[:, None], 0)
    index = (bh * num_chunks + chunk) * NUM_STATES + (2 if OF_QUERIES else 0)
    common.store_state(STATES, VECTORS, index, later, later_vector, D)
    common.store_state(STATES, VECTORS, index + 1, earlier, earlier_vector, D)


@triton.jit
def _pass_on(
    STATES, TOTALS, num_chunks, kind, elements, LENGTH: tl.constexpr, NUM_STATES: tl.constexpr,
    CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Some elements of states of a LENGTH; a GROUP of chunks is loaded at once."""
    state = tl.zeros_like(elements).to(tl.float32)
    for first in range(0, num_chunks, GROUP):
        places, added, fades = (), (), ()
        for t in tl.static_range(GROUP):
            there = first + t < num_chunks
            chunk = tl.where(kind % 2 == 1, num_chunks - 1 - first - t, first + t)
            total = tl.load(TOTALS + chunk * NUM_VECTORS * CHUNK, mask=there, other=0.0)
            fades += (tl.exp2(total),)
            places += (STATES + (chunk * NUM_STATES + kind) * LENGTH + elements,)
            added += (tl.load(places[t], mask=there, other=0.0),)
        for t in tl.static_range(GROUP):
            tl.store(places[t], state, mask=first + t < num_chunks)
            state = state * fades[t] + added[t].to(tl.float32)


@triton.jit
def state_passing_kernel(
    STATES, VECTORS, SUMS, n, heads, sums_b, D: tl.constexpr, CHUNK: tl.constexpr,
    PART: tl.constexpr, GROUP: tl.constexpr, NUM_STATES: tl.constexpr,
):  # fmt: skip
    """Replaces what each chunk adds by the state that enters it, in place: 0 and 2 from earlier
    chunks, 1 and 3 from later ones. A program has a PART of a state; the last one the vectors."""
    num_chunks = tl.cdiv(n, CHUNK)
    bh, kind, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    SUMS += bh // heads * sums_b + bh % heads * num_chunks * NUM_VECTORS * CHUNK
    TOTALS = SUMS + 2 * CHUNK - 1  # y of each chunk's last step
    if part == tl.num_programs(2) - 1:
        VECTORS += bh * num_chunks * NUM_STATES * D
        _pass_on(VECTORS, TOTALS, num_chunks, kind, tl.arange(0, D), D, NUM_STATES, CHUNK, GROUP)
    else:
        STATES += bh * num_chunks * NUM_STATES * D * D
        elements = part * PART + tl.arange(0, PART)
        _pass_on(STATES, TOTALS, num_chunks, kind, elements, D * D, NUM_STATES, CHUNK, GROUP)
