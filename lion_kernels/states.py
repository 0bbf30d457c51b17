"""States that chunks of tokens hand on, along one curve, as "Definition" in `docs/kernels.md` has
them; those of q' and dO likewise, with x and y exchanged.

Beside each state `[D, D]` goes a vector `[D]`, the same sum with 1 in the place of values, delta in
that of dO.
"""

import triton
import triton.language as tl

from lion_kernels import common
from lion_kernels.decay import NUM_VECTORS


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
            x, y = y, x
        else:
            a = common.load_tile(Q + heads * D, tokens, valid, stride_n, D)
            b_tile = common.load_tile(Q + 2 * heads * D, tokens, valid, stride_n, D)
            weight = tl.full((BLOCK,), 1.0, tl.float32)
            counts = common.key_mask(VALID, b * n, tokens, valid)
            factor = tl.where(counts, 1.0, 0.0)
        phi = common.feature_map(a, FEATURES)[0] * factor[:, None]  # [BLOCK, D]
        scaled = (phi * tl.exp2(total - x)[:, None]).to(dtype)
        later = common.dot(tl.trans(scaled), b_tile, later)  # [D, D]
        later_vector += tl.sum(scaled.to(tl.float32) * weight[:, None], 0)
        scaled = (phi * tl.exp2(y)[:, None]).to(dtype)
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
            entering = state.to(STATES.dtype.element_ty)
            tl.store(places[t], entering, mask=first + t < num_chunks)
            state = state * fades[t] + added[t].to(tl.float32)


@triton.jit
def state_passing_kernel(
    STATES, VECTORS, SUMS, n, heads, sums_b,
    D: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr,
    NUM_STATES: tl.constexpr,
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
