"""What the kernels share: tiles of tokens, feature maps and their gradients, the decay mask."""

import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def place(num_parts, heads, n=0, stride_n=0, D: tl.constexpr = 1):
    """Which part of which sequence a program has, of which image and head, and where the head's
    columns begin in the image's rows of QKV and of OUT. The grid's first dimension may be long."""
    pid = tl.program_id(0)
    bh = (pid // num_parts).to(tl.int64)
    b, h = bh // heads, bh % heads
    return pid % num_parts, bh, b, h, b * n * stride_n + h * D, (b * n * heads + h) * D


@triton.jit
def dot(a, b, acc=None):
    """`acc + a b`; in float32 three tf32 products, but wide tiles have no room for them."""
    WIDE: tl.constexpr = a.shape[1] > 64 or b.shape[1] > 64
    return tl.dot(a, b, acc, input_precision="ieee" if WIDE else "tf32x3")


@triton.jit
def round_to(w, dtype):
    """float32 as `dtype` holds it; bfloat16 by its bits, as a conversion back is slow."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        bits = w.to(tl.int32, bitcast=True) + 0x8000
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    return w.to(dtype).to(tl.float32)


@triton.jit
def narrow(t, dtype):
    """float32 in `dtype`. Queries over a row sum of almost 0 are beyond the range of float16: there
    they stay finite, as a gradient of 0 times infinity would be NaN."""
    if dtype == tl.float16:
        t = tl.clamp(t, -65504.0, 65504.0)
    return t.to(dtype)


@triton.jit
def feature_map(t, FEATURES: tl.constexpr):
    """phi of rows `[R, D]`, float32: elu + 1, silu + 0.5 normalised over D, or the rows themselves;
    and the slope that the gradient below needs."""
    FAST: tl.constexpr = t.dtype == tl.bfloat16 and not INTERPRETED
    t = t.to(tl.float32)
    slope = tl.full(t.shape, 1.0, tl.float32)
    if FEATURES == "elu":
        slope = tl.exp(tl.minimum(t, 0.0))
        t = tl.where(t > 0, t + 1, slope)
    if FEATURES == "silu":
        if FAST:  # the hardware's tanh, right to 2^-11: enough for bfloat16
            asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
            s = tl.inline_asm_elementwise(asm, "=f,f", [0.5 * t], tl.float32, is_pure=True, pack=1)
            s = 0.5 * s + 0.5
        else:
            s = tl.sigmoid(t)
        silu = t * s
        f = silu + 0.5
        inv_norm = tl.rsqrt(tl.maximum(tl.sum(f * f, 1), 1e-24))[:, None]
        slope = (s + silu - silu * s) * inv_norm
        t = f * inv_norm
    return t, slope


@triton.jit
def feature_map_grad(phi, slope, grad, FEATURES: tl.constexpr):
    """Gradient of rows `[R, D]` from that of phi."""
    if FEATURES == "silu":
        grad -= phi * tl.sum(phi * grad, 1)[:, None]
    return grad * slope


@triton.jit
def back_to_rows(pointer, rows, valid, stride, grad, D: tl.constexpr, FEATURES: tl.constexpr):
    """Gradient of rows that `load_tile` finds, from that of phi. These are loaded again: registers
    are few, and phi must not be rounded, as the gradient along it cancels."""
    phi, slope = feature_map(load_tile(pointer, rows, valid, stride, D), FEATURES)
    return feature_map_grad(phi, slope, grad, FEATURES)


@triton.jit
def load_tile(pointer, rows, valid, stride, D: tl.constexpr):
    """Rows `[R, D]` of a matrix, zero where not valid."""
    columns = tl.arange(0, D)
    return tl.load(pointer + rows[:, None] * stride + columns, mask=valid[:, None], other=0.0)


@triton.jit
def store_tile(pointer, rows, valid, stride, value, D: tl.constexpr, ADD: tl.constexpr = False):
    """ADD adds to what is there."""
    if ADD:
        value += load_tile(pointer, rows, valid, stride, D).to(tl.float32)
    tl.store(pointer + rows[:, None] * stride + tl.arange(0, D), value, mask=valid[:, None])


@triton.jit
def load_delta(do, OUT, tokens, valid, stride, NORMALISE: tl.constexpr):
    """`delta_i = dO_i . out_i` of rows dO `[R, D]`; 0 without denominators."""
    if NORMALISE:
        out = load_tile(OUT, tokens, valid, stride, do.shape[1])
        return tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    return tl.zeros((do.shape[0],), tl.float32)


@triton.jit
def load_state(pointer, D: tl.constexpr):
    """`[D, D]`, a state of keys (or queries) by values (or output gradients)."""
    return tl.load(pointer + tl.arange(0, D)[:, None] * D + tl.arange(0, D))


@triton.jit
def store_state(STATES, VECTORS, index, state, vector, D: tl.constexpr):
    dims = tl.arange(0, D)
    tl.store(STATES + index * D * D + dims[:, None] * D + dims, state)
    tl.store(VECTORS + index * D + dims, vector)


@triton.jit
def token_at(CURVE, steps, valid, start=0):
    """Tokens that a curve, from `start` on in CURVE, visits at some steps; None is token order."""
    if CURVE is not None:
        return tl.load(CURVE + start + steps, mask=valid, other=0).to(tl.int32)
    return steps


@triton.jit
def tile(start, size, first, CURVE, ROWS: tl.constexpr):
    """ROWS steps from `first` on inside a chunk of `size` steps, which is at `start` on the curve;
    their tokens, and which of them are there."""
    inside = first + tl.arange(0, ROWS)
    valid = inside < size
    return inside, token_at(CURVE, start + inside, valid), valid


@triton.jit
def key_mask(VALID, start, tokens, valid):
    """Which tokens of the image from `start` on count as keys: those there that no VALID denies."""
    if VALID is not None:
        return valid & (tl.load(VALID + start + tokens, mask=valid, other=0) != 0)
    return valid


@triton.jit
def decay_mask(x_i, y_i, x_j, y_j):
    """`M_ij = 2^min(x_i - x_j, y_j - y_i)` of sums that are broadcast against each other."""
    return tl.exp2(tl.minimum(x_i - x_j, y_j - y_i))


@triton.jit
def sums_of(SUMS, PLACES, rows, stride, SIZE: tl.constexpr, NUM_CURVES: tl.constexpr):
    """x, y and, where PLACES are given, steps `[R]` of some rows: of each a tuple by curve."""
    xs, ys, places = (), (), ()
    for c in tl.static_range(NUM_CURVES):
        xs += (tl.load(SUMS + c * stride + rows),)
        ys += (tl.load(SUMS + c * stride + SIZE + rows),)
        if PLACES is not None:
            places += (tl.load(PLACES + c * SIZE + rows),)
    return xs, ys, places


@triton.jit
def sum_of_masks(SUMS, TABLE, rows, columns, xs, ys, stride, SIZE: tl.constexpr):
    """M `[R, C]` of queries, of x and y by curve, and columns of keys, summed over the curves; from
    the TABLE `[H * SIZE, SIZE]`, if there is one, which is symmetric, at `rows`."""
    if TABLE is not None:
        return tl.load(TABLE + rows[:, None] * SIZE + columns).to(tl.float32)
    mask = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for c in tl.static_range(len(xs)):
        x_j = tl.load(SUMS + c * stride + columns)
        y_j = tl.load(SUMS + c * stride + SIZE + columns)
        mask += decay_mask(xs[c][:, None], ys[c][:, None], x_j[None, :], y_j[None, :])
    return mask
