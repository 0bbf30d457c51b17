"""Pairs of tokens inside a block, and the states that other blocks hand in.

A program has some rows of a block, queries or keys, and goes through the tiles of their partners.
A short sequence is one block, the quadratic form. Off the rows themselves the mask is a product of
what decays on either side of an edge of the rows: `M_ij = 2^(x_i - x_e) 2^(x_e - x_j)` for earlier
keys, `2^(y_e - y_i) 2^(y_j - y_e)` for later ones, with every exponent at most 0. `TWO` averages
two curves in one pass, over one block in the order of tokens, with the mask as it stands.

Where a row is in many tiles, its features are `READY`: those of keys come from `features_kernel`,
those of queries, in the backward pass, from `query_grad_kernel`.

With `CARRIED`, states come in from the earlier and the later blocks of the curve; LION-Lit has
nothing but one state, of all tokens.

`FLUX`, for `gates_kernel`, holds sums of `dw_ij w_ij` by step: in the block, of queries with
earlier (0) and later keys (1), of keys with later (2) and earlier queries (3), of which 0 and 3
include other blocks; then with later blocks alone, of keys (4) and of queries (5).
"""

import triton
import triton.language as tl

from lion_kernels.common import (
    counted,
    decay_mask,
    feature_map,
    feature_map_grad,
    key_sums,
    load_features,
    load_rows,
    load_square,
    my_part,
    row_sum_grad,
    store_rows,
    visited,
)


@triton.jit
def features_kernel(
    QKV, PHI_K, n, heads, stride_b, stride_n,
    D: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """phi of the keys, `[B, N, H, D]`."""
    number, bh = my_part(tl.cdiv(n, ROWS))
    b, h = bh // heads, bh % heads
    rows = number * ROWS + tl.arange(0, ROWS)
    K = QKV + b * stride_b + (heads + h) * D
    k = load_features(K, rows, rows < n, stride_n, D, FEATURES, FAST)
    store_rows(PHI_K + (b * n * heads + h) * D, rows, rows < n, heads * D, k, D)


@triton.jit
def _features_of(PHI, rows, stride, first, heads, D: tl.constexpr, READY: tl.constexpr):
    """Where features are, `[.., H, D]` from a `first` row, or rows to compute them from; and their
    stride."""
    if READY:
        return PHI + first * D, heads * D
    return rows, stride


@triton.jit
def _add_sides(before, after, flux, i, j):
    """Adds row sums of `flux` over the pairs on either side of the diagonal: i > j and i < j."""
    before += tl.sum(tl.where(i > j, flux, 0.0), 1)
    return before, after + tl.sum(tl.where(i < j, flux, 0.0), 1)


@triton.jit
def _add_flux(before, after, flux, first, start, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The same for rows from `first` and a tile from `start`, most of which are on one side."""
    if start + TILE <= first:
        before += tl.sum(flux, 1)
    elif start >= first + ROWS:
        after += tl.sum(flux, 1)
    else:
        rows, columns = first + tl.arange(0, ROWS), start + tl.arange(0, TILE)
        before, after = _add_sides(before, after, flux, rows[:, None], columns[None, :])
    return before, after


@triton.jit
def _store_sides(FLUX, flux, i, j, flux_side):
    """Column sums of `flux`, i > j, and of i < j one side further."""
    tl.store(FLUX, tl.sum(tl.where(i > j, flux, 0.0), 0))
    tl.store(FLUX + flux_side, tl.sum(tl.where(i < j, flux, 0.0), 0))


@triton.jit
def forward_kernel(
    QKV, PHI_K, X, Y, CURVE, VALID, STATES, VECTORS, OUT, R,
    n, blocks, heads, stride_b, stride_n, sums_b, sums_c, eps, scale, weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNMASKED: tl.constexpr, FEATURES: tl.constexpr, READY: tl.constexpr, PADDED: tl.constexpr,
    CARRIED: tl.constexpr, TWO: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr,
    NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    MAP: tl.constexpr = "none" if READY else FEATURES
    number, bh = my_part(tl.cdiv(n, ROWS))
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    K, stride_k = _features_of(PHI_K, K, stride_n, b * n * heads + h, heads, D, READY)
    VALID += b * n
    X += b * sums_b + h * blocks * BLOCK
    Y += b * sums_b + h * blocks * BLOCK
    OUT += (b * n * heads + h) * D
    R += bh * n
    first = number * ROWS
    place = first // BLOCK
    low, high = place * BLOCK, tl.minimum(place * BLOCK + BLOCK, n)
    steps = first + tl.arange(0, ROWS)
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    q_t = (load_features(Q, rows, valid, stride_n, D, FEATURES, FAST) * scale).to(dtype)
    out = tl.zeros((ROWS, D), tl.float32)
    r = tl.zeros((ROWS,), tl.float32)
    if not UNMASKED:
        x_i, y_i = tl.load(X + steps), tl.load(Y + steps)
    if CARRIED:
        dims, q = tl.arange(0, D), q_t.to(tl.float32)
        state = bh if UNMASKED else (bh * blocks + place) * 2
        earlier = load_square(STATES + state * D * D, D).to(dtype)
        out += tl.dot(q_t, earlier, input_precision=PRECISION)
        r += tl.sum(q * tl.load(VECTORS + state * D + dims), 1)
        if not UNMASKED:
            fade = tl.exp2(x_i)
            out *= fade[:, None]
            r *= fade
            fade = tl.exp2(tl.load(Y + low + BLOCK - 1) - y_i)
            later = load_square(STATES + (state + 1) * D * D, D)
            out += tl.dot(q_t, later, input_precision=PRECISION) * fade[:, None]
            r += tl.sum(q * tl.load(VECTORS + (state + 1) * D + dims), 1) * fade
    if not UNMASKED:
        if TWO:  # 2^-1 M of each curve
            x_2, y_2 = tl.load(X + sums_c + steps) - 1.0, tl.load(Y + sums_c + steps) + 1.0
            x_i, y_i = x_i - 1.0, y_i + 1.0
        x_e, y_e = tl.load(X + first), tl.load(Y + first + ROWS - 1)
        from_earlier, from_later = tl.exp2(x_i - x_e), tl.exp2(y_e - y_i)
        inside = tl.arange(0, TILE)
        for start in range(low, high, TILE):
            keys = start + inside
            tokens = visited(CURVE, keys, keys < high, CURVED)
            k = load_features(K, tokens, keys < high, stride_k, D, MAP, FAST).to(dtype)
            v = load_rows(V, tokens, keys < high, stride_n, D)
            w = tl.dot(q_t, tl.trans(k), input_precision=PRECISION)
            x_j, y_j = key_sums(X, Y, CURVE, VALID, keys, high, CURVED, PADDED)
            if TWO:
                mask = decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
                x_j, y_j = key_sums(
                    X + sums_c, Y + sums_c, CURVE, VALID, keys, high, CURVED, PADDED
                )
                w *= mask + decay_mask(x_2[:, None], y_2[:, None], x_j[None, :], y_j[None, :])
            elif start + TILE <= first:
                w *= from_earlier[:, None] * tl.exp2(x_e - x_j)[None, :]
            elif start >= first + ROWS:
                w *= from_later[:, None] * tl.exp2(y_j - y_e)[None, :]
            else:
                w *= decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
            w = w.to(dtype)
            r += tl.sum(w.to(tl.float32), 1)  # so weights sum to 1, rounded ones as well
            out += tl.dot(w, v, input_precision=PRECISION)
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
    QKV, PHI_Q, PHI_K, X, Y, CURVE, VALID, STEPS, STATES, VECTORS, OUT, R, DOUT, DELTA, REST, DQKV,
    FLUX, n, blocks, heads, stride_b, stride_n, sums_b, sums_c, flux_side, flux_c, eps, scale,
    weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNMASKED: tl.constexpr, FEATURES: tl.constexpr, READY: tl.constexpr, PADDED: tl.constexpr,
    CARRIED: tl.constexpr, TWO: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr,
    LAST: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of the queries, and `DELTA` for `key_grad_kernel`.

    Over all curves `dq_i . q_i = -eps DELTA_i` but for rounding errors. Most of these are along the
    mean of the keys, whose features are positive: they are taken off along ones.

    With WHOLE the rows are all of the block, and the flux of its keys is summed here, too: it has
    the same rounding, and cancels where a gate is closed.
    """
    WHOLE: tl.constexpr = ROWS == BLOCK
    MAP: tl.constexpr = "none" if READY else FEATURES
    number, bh = my_part(tl.cdiv(n, ROWS))
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    exact = FLUX.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    K, stride_k = _features_of(PHI_K, K, stride_n, b * n * heads + h, heads, D, READY)
    DQ = DQKV + b * n * stride_n + h * D
    VALID += b * n
    X += b * sums_b + h * blocks * BLOCK
    Y += b * sums_b + h * blocks * BLOCK
    FLUX += bh * blocks * BLOCK
    first = number * ROWS
    place = first // BLOCK
    low, high = place * BLOCK, tl.minimum(place * BLOCK + BLOCK, n)
    steps = first + tl.arange(0, ROWS)
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    q = load_features(Q, rows, valid, stride_n, D, FEATURES, FAST)
    if READY:
        store_rows(PHI_Q + (b * n * heads + h) * D, rows, valid, heads * D, q, D)
    q *= scale
    q_t = q.to(dtype)
    grad = load_rows(DOUT + (b * n * heads + h) * D, rows, valid, heads * D, D)
    delta, share = row_sum_grad(
        grad, OUT + (b * n * heads + h) * D, R + bh * n, rows, valid, heads * D, weight,
        D, NORMALISE,
    )  # fmt: skip
    tl.store(DELTA + bh * n + rows, delta, mask=valid)
    dq = tl.zeros((ROWS, D), tl.float32)
    below = tl.zeros((ROWS,), exact)
    above = tl.zeros((ROWS,), exact)
    if not UNMASKED:
        x_i, y_i = tl.load(X + steps), tl.load(Y + steps)
        shares = share.to(exact)
    if CARRIED:
        dims = tl.arange(0, D)
        state = bh * 2 if UNMASKED else (bh * blocks + place) * 4
        earlier = load_square(STATES + state * D * D, D)
        rounded = earlier.to(dtype)
        dq += tl.dot(grad, tl.trans(rounded), input_precision=PRECISION)
        if UNMASKED and dtype != tl.float32:  # most of this sum cancels with delta
            remainder = (earlier - rounded).to(dtype)
            dq += tl.dot(grad, tl.trans(remainder), input_precision=PRECISION)
        dq += delta[:, None] * tl.load(VECTORS + state * D + dims)
        if not UNMASKED:
            dq *= tl.exp2(x_i)[:, None]
            below += tl.sum(q * dq, 1).to(exact)
            later = load_square(STATES + (state + 1) * D * D, D)
            part = tl.dot(grad, tl.trans(later), input_precision=PRECISION)
            part += delta[:, None] * tl.load(VECTORS + (state + 1) * D + dims)
            part *= tl.exp2(tl.load(Y + low + BLOCK - 1) - y_i)[:, None]
            of_later = tl.sum(q * part, 1) * share
            tl.store(FLUX + 5 * flux_side + steps, of_later.to(exact))
            dq += part
    if not UNMASKED:
        if TWO:
            x_2, y_2 = tl.load(X + sums_c + steps) - 1.0, tl.load(Y + sums_c + steps) + 1.0
            x_i, y_i = x_i - 1.0, y_i + 1.0
            below_2 = tl.zeros((ROWS,), exact)
            above_2 = tl.zeros((ROWS,), exact)
            i = tl.load(STEPS + steps, mask=valid, other=0)
            i_2 = tl.load(STEPS + n + steps, mask=valid, other=0)
        x_e, y_e = tl.load(X + first), tl.load(Y + first + ROWS - 1)
        from_earlier, from_later = tl.exp2(x_i - x_e), tl.exp2(y_e - y_i)
        inside = tl.arange(0, TILE)
        for start in range(low, high, TILE):
            keys = start + inside
            tokens = visited(CURVE, keys, keys < high, CURVED)
            k = load_features(K, tokens, keys < high, stride_k, D, MAP, FAST).to(dtype)
            v = load_rows(V, tokens, keys < high, stride_n, D)
            s = tl.dot(q_t, tl.trans(k), input_precision=PRECISION)
            dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION) + delta[:, None]
            x_j, y_j = key_sums(X, Y, CURVE, VALID, keys, high, CURVED, PADDED)
            of_keys = FLUX + 2 * flux_side + keys
            if TWO:
                mask = decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
                s *= dw
                flux = (s * mask).to(exact)
                j = tl.load(STEPS + keys, mask=keys < n, other=0)
                below, above = _add_sides(below, above, flux, i[:, None], j[None, :])
                if WHOLE:
                    flux *= shares[:, None]
                    _store_sides(of_keys, flux, i[:, None], j[None, :], flux_side)
                x_j, y_j = key_sums(
                    X + sums_c, Y + sums_c, CURVE, VALID, keys, high, CURVED, PADDED
                )
                mask_2 = decay_mask(x_2[:, None], y_2[:, None], x_j[None, :], y_j[None, :])
                flux = (s * mask_2).to(exact)
                j = tl.load(STEPS + n + keys, mask=keys < n, other=0)
                below_2, above_2 = _add_sides(below_2, above_2, flux, i_2[:, None], j[None, :])
                if WHOLE:
                    flux *= shares[:, None]
                    _store_sides(of_keys + flux_c, flux, i_2[:, None], j[None, :], flux_side)
                dw *= mask + mask_2
            else:
                if start + TILE <= first:
                    mask = from_earlier[:, None] * tl.exp2(x_e - x_j)[None, :]
                elif start >= first + ROWS:
                    mask = from_later[:, None] * tl.exp2(y_j - y_e)[None, :]
                else:
                    mask = decay_mask(x_i[:, None], y_i[:, None], x_j[None, :], y_j[None, :])
                dw *= mask
                flux = (s * dw).to(exact)
                below, above = _add_flux(below, above, flux, first, start, ROWS, TILE)
                if WHOLE:
                    flux *= shares[:, None]
                    _store_sides(of_keys, flux, steps[:, None], keys[None, :], flux_side)
            dq += tl.dot(dw.to(dtype), k, input_precision=PRECISION)
        FLUX += steps
        tl.store(FLUX, below * shares)
        tl.store(FLUX + flux_side, above * shares)
        if TWO:
            tl.store(FLUX + flux_c, below_2 * shares)
            tl.store(FLUX + flux_c + flux_side, above_2 * shares)
    q_in = load_rows(Q, rows, valid, stride_n, D).to(tl.float32)  # again: registers are few
    if NORMALISE and FEATURES != "none":
        q = feature_map(q_in, FEATURES, FAST) * scale
        rest = tl.sum(q * dq, 1) + eps * delta
        if ADD:
            rest += tl.load(REST + bh * n + rows, mask=valid, other=0.0)
        if LAST:
            dq -= (rest / tl.sum(q, 1))[:, None]
        else:
            tl.store(REST + bh * n + rows, rest, mask=valid)
    dq = feature_map_grad(q_in, dq * (share * scale * unit)[:, None], FEATURES, FAST)
    if ADD:
        dq += load_rows(DQ, rows, valid, stride_n, D).to(tl.float32)
    store_rows(DQ, rows, valid, stride_n, dq, D)


@triton.jit
def key_grad_kernel(
    QKV, PHI_Q, PHI_K, X, Y, CURVE, VALID, STEPS, STATES, VECTORS, OUT, R, DOUT, DELTA, REST, DQKV,
    FLUX, n, blocks, heads, stride_b, stride_n, sums_b, sums_c, flux_side, flux_c, eps, scale,
    weight, unit,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    UNMASKED: tl.constexpr, FEATURES: tl.constexpr, READY: tl.constexpr, PADDED: tl.constexpr,
    CARRIED: tl.constexpr, TWO: tl.constexpr, CURVED: tl.constexpr, ADD: tl.constexpr,
    LAST: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Of the keys and of the values; all products are transposed, `[keys, queries]`."""
    WHOLE: tl.constexpr = ROWS == BLOCK
    MAP: tl.constexpr = "none" if READY else FEATURES
    number, bh = my_part(tl.cdiv(n, ROWS))
    b, h = bh // heads, bh % heads
    dtype = QKV.dtype.element_ty
    exact = FLUX.dtype.element_ty
    Q = QKV + b * stride_b + h * D
    K = Q + heads * D
    V = K + heads * D
    DK = DQKV + b * n * stride_n + (heads + h) * D
    DV = DK + heads * D
    DOUT += (b * n * heads + h) * D
    R += bh * n
    DELTA += bh * n
    VALID += b * n
    X += b * sums_b + h * blocks * BLOCK
    Y += b * sums_b + h * blocks * BLOCK
    FLUX += bh * blocks * BLOCK
    first = number * ROWS
    place = first // BLOCK
    low, high = place * BLOCK, tl.minimum(place * BLOCK + BLOCK, n)
    steps = first + tl.arange(0, ROWS)
    valid = steps < n
    rows = visited(CURVE, steps, valid, CURVED)
    counts = counted(VALID, rows, valid, PADDED)
    Q, stride = _features_of(PHI_Q, Q, stride_n, b * n * heads + h, heads, D, READY)
    K_MAP, _ = _features_of(PHI_K, K, stride_n, b * n * heads + h, heads, D, READY)
    k = load_features(K_MAP, rows, valid, stride, D, MAP, FAST)
    k_t = k.to(dtype)
    v = load_rows(V, rows, valid, stride_n, D)
    dk = tl.zeros((ROWS, D), tl.float32)
    dv = tl.zeros((ROWS, D), tl.float32)
    below = tl.zeros((ROWS,), tl.float32)
    above = tl.zeros((ROWS,), tl.float32)
    if not UNMASKED:
        x_j, y_j = tl.load(X + steps), tl.load(Y + steps)
    if CARRIED:
        dims = tl.arange(0, D)
        state = bh * 2 + 1 if UNMASKED else (bh * blocks + place) * 4 + 3
        late = load_square(STATES + state * D * D, D).to(dtype)
        dk += tl.dot(v, tl.trans(late), input_precision=PRECISION)
        dk += tl.load(VECTORS + state * D + dims)
        dv += tl.dot(k_t, late, input_precision=PRECISION)
        if not UNMASKED:
            fade = tl.exp2(tl.load(Y + low + BLOCK - 1) - x_j)[:, None]
            dk *= fade
            dv *= fade
            of_later = tl.where(counts, tl.sum(k * dk, 1), 0.0)
            tl.store(FLUX + 4 * flux_side + steps, of_later.to(exact))
            early = load_square(STATES + (state - 1) * D * D, D)
            fade = tl.exp2(y_j)[:, None]
            part = tl.dot(v, tl.trans(early), input_precision=PRECISION)
            part = (part + tl.load(VECTORS + (state - 1) * D + dims)) * fade
            above += tl.sum(k * part, 1)
            dk += part
            dv += tl.dot(k_t, early, input_precision=PRECISION) * fade
    if not UNMASKED:
        # The scale of the queries is a factor of the mask.
        shift = tl.log2(scale)
        if TWO:
            shift -= 1.0
            x_2, y_2 = tl.load(X + sums_c + steps) - shift, tl.load(Y + sums_c + steps) + shift
            below_2 = tl.zeros((ROWS,), tl.float32)
            above_2 = tl.zeros((ROWS,), tl.float32)
            j = tl.load(STEPS + steps, mask=valid, other=0)
            j_2 = tl.load(STEPS + n + steps, mask=valid, other=0)
        x_j, y_j = x_j - shift, y_j + shift
        x_e, y_e = tl.load(X + first), tl.load(Y + first + ROWS - 1)
        to_earlier, to_later = tl.exp2(y_j - x_e), tl.exp2(y_e - x_j)
        inside = tl.arange(0, TILE)
        for start in range(low, high, TILE):
            queries = start + inside
            there = queries < high
            tokens = visited(CURVE, queries, there, CURVED)
            q = load_features(Q, tokens, there, stride, D, MAP, FAST).to(dtype)
            grad = load_rows(DOUT, tokens, there, heads * D, D)
            delta = tl.load(DELTA + tokens, mask=there, other=0.0)
            share = tl.zeros((TILE,), tl.float32) + weight
            if NORMALISE:
                share /= tl.load(R + tokens, mask=there, other=1.0)
            x_i, y_i = tl.load(X + queries), tl.load(Y + queries)
            s = tl.dot(k_t, tl.trans(q), input_precision=PRECISION)
            dw = tl.dot(v, tl.trans(grad), input_precision=PRECISION) + delta[None, :]
            if TWO:
                mask = decay_mask(x_i[None, :], y_i[None, :], x_j[:, None], y_j[:, None])
                if not WHOLE:
                    flux = s * dw * share[None, :]
                    i = tl.load(STEPS + queries, mask=there, other=0)
                    below, above = _add_sides(below, above, flux * mask, i[None, :], j[:, None])
                x_i, y_i = tl.load(X + sums_c + queries), tl.load(Y + sums_c + queries)
                mask_2 = decay_mask(x_i[None, :], y_i[None, :], x_2[:, None], y_2[:, None])
                if not WHOLE:
                    i = tl.load(STEPS + n + queries, mask=there, other=0)
                    below_2, above_2 = _add_sides(
                        below_2, above_2, flux * mask_2, i[None, :], j_2[:, None]
                    )
                mask = (mask + mask_2) * share[None, :]
                s *= mask
            else:
                if start + TILE <= first:
                    mask = to_earlier[:, None] * (tl.exp2(x_e - y_i) * share)[None, :]
                elif start >= first + ROWS:
                    mask = to_later[:, None] * (tl.exp2(x_i - y_e) * share)[None, :]
                else:
                    mask = decay_mask(x_i[None, :], y_i[None, :], x_j[:, None], y_j[:, None])
                    mask *= share[None, :]
                s *= mask
                if not WHOLE:
                    above, below = _add_flux(above, below, s * dw, first, start, ROWS, TILE)
            dw *= mask
            dv += tl.dot(s.to(dtype), grad, input_precision=PRECISION)
            dk += tl.dot(dw.to(dtype), q, input_precision=PRECISION)
        FLUX += 2 * flux_side + steps
        below, above = tl.where(counts, below, 0.0), tl.where(counts, above, 0.0)
        if not WHOLE:
            tl.store(FLUX, below)
            tl.store(FLUX + flux_side, above)
            if TWO:
                tl.store(FLUX + flux_c, tl.where(counts, below_2, 0.0))
                tl.store(FLUX + flux_c + flux_side, tl.where(counts, above_2, 0.0))
        elif CARRIED:
            tl.store(FLUX + flux_side, tl.load(FLUX + flux_side) + above)
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
