"""What the kernels share: rows of tokens, feature maps, gates, and the gradients of all three."""

import triton
import triton.language as tl


@triton.jit
def my_part(parts):
    """Which part of which sequence a program has. The grid's first dimension alone is long."""
    pid = tl.program_id(0)
    return pid % parts, (pid // parts).to(tl.int64)


@triton.jit
def _sigmoid(t, FAST: tl.constexpr):
    """`FAST` is the hardware's tanh, right to 2^-11: enough for half precision."""
    if FAST:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * t], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * tanh + 0.5
    return tl.sigmoid(t)


@triton.jit
def feature_map(t, FEATURES: tl.constexpr, FAST: tl.constexpr):
    """phi of float32 rows `[R, D]`: elu + 1, silu + 0.5 normalised over D, or the rows."""
    if FEATURES == "none":
        return t
    if FEATURES == "elu":
        return tl.where(t > 0, t + 1, tl.exp(tl.minimum(t, 0.0)))
    f = t * _sigmoid(t, FAST) + 0.5
    return f * tl.rsqrt(tl.maximum(tl.sum(f * f, 1), 1e-24))[:, None]


@triton.jit
def feature_map_grad(t, grad, FEATURES: tl.constexpr, FAST: tl.constexpr):
    """Gradient with respect to `t` of `sum(feature_map(t) * grad)`."""
    if FEATURES == "none":
        return grad
    if FEATURES == "elu":
        return grad * tl.where(t > 0, 1.0, tl.exp(tl.minimum(t, 0.0)))
    s = _sigmoid(t, FAST)
    f = t * s + 0.5
    inverse = tl.rsqrt(tl.maximum(tl.sum(f * f, 1), 1e-24))
    along = tl.sum(f * grad, 1) * inverse * inverse
    return (grad - f * along[:, None]) * inverse[:, None] * (s + t * (s - s * s))


@triton.jit
def load_rows(pointer, rows, valid, stride, D: tl.constexpr):
    """Rows `[R, D]` of a matrix, zero where not valid."""
    columns = tl.arange(0, D)
    return tl.load(pointer + rows[:, None] * stride + columns, mask=valid[:, None], other=0.0)


@triton.jit
def load_features(
    pointer, rows, valid, stride, D: tl.constexpr, FEATURES: tl.constexpr, FAST: tl.constexpr
):
    """phi of rows `[R, D]` in float32."""
    return feature_map(load_rows(pointer, rows, valid, stride, D).to(tl.float32), FEATURES, FAST)


@triton.jit
def store_rows(pointer, rows, valid, stride, value, D: tl.constexpr):
    columns = tl.arange(0, D)
    address = pointer + rows[:, None] * stride + columns
    tl.store(address, value.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def load_square(pointer, D: tl.constexpr):
    return tl.load(pointer + tl.arange(0, D)[:, None] * D + tl.arange(0, D))


@triton.jit
def visited(CURVE, steps, valid, CURVED: tl.constexpr):
    """Tokens visited at the steps of a curve."""
    if CURVED:
        return tl.load(CURVE + steps, mask=valid, other=0).to(tl.int32)
    return steps


@triton.jit
def counted(VALID, tokens, there, PADDED: tl.constexpr):
    """Which tokens count as keys: those that are there and not padding."""
    if PADDED:
        return there & (tl.load(VALID + tokens, mask=there, other=0) != 0)
    return there


@triton.jit
def key_sums(X, Y, CURVE, VALID, steps, end, CURVED: tl.constexpr, PADDED: tl.constexpr):
    """Sums of keys; padding and what lies beyond the end get the weight 0 from every query."""
    there = steps < end
    if PADDED:
        there = counted(VALID, visited(CURVE, steps, there, CURVED), there, PADDED)
    return tl.load(X + steps, mask=there, other=1e30), tl.load(Y + steps, mask=there, other=-1e30)


@triton.jit
def decay_mask(x_i, y_i, x_j, y_j):
    """`M_ij = 2^min(x_i - x_j, y_j - y_i)` of sums that are broadcast against each other."""
    return tl.exp2(tl.minimum(x_i - x_j, y_j - y_i))


@triton.jit
def row_sum_grad(
    grad, OUT, R, rows, valid, stride, weight, D: tl.constexpr, NORMALISE: tl.constexpr
):
    """`-dO_i . O_i` and `weight / r_i`, float32 `[R]`: gradients of weights are, of each query,
    `dw_ij = weight / r_i (dO_i . v_j - dO_i . O_i)`, where equal terms cancel without a rest."""
    if NORMALISE:
        out = load_rows(OUT, rows, valid, stride, D).to(tl.float32)
        share = weight / tl.load(R + rows, mask=valid, other=1.0)
        return -tl.sum(grad.to(tl.float32) * out, 1), share
    zeros = tl.zeros_like(rows).to(tl.float32)
    return zeros, zeros + weight


@triton.jit
def gate_logits(DECAY, tokens, valid, stride, DECAYS: tl.constexpr):
    """Logits z of decays `1 - sigmoid(z)`: one for each of the "tokens", or one for the "head"."""
    if DECAYS == "tokens":
        return tl.load(DECAY + tokens * stride, mask=valid, other=0.0).to(tl.float32)
    return tl.zeros_like(tokens).to(tl.float32) - tl.load(DECAY)


@triton.jit
def _log1p(u):
    """`log(1 + u)` of u in [0, 1], small ones by their series: 1 + u would round them."""
    series = u * (1 - u * (1 / 2 - u * (1 / 3 - u * (1 / 4 - u / 5))))
    return tl.where(u < 0.05, series, tl.log(1 + u))


@triton.jit
def decay_sums(
    DECAY, DOCUMENTS, steps, tokens, valid, counts, prefix, stride,
    DECAYS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Exclusive and inclusive sums of log2 decays.

    The decay of padding is 1, and so is that of the first `prefix` tokens. A decay of 2^-32 is
    none, and larger sums would round those of the open gates beside it. Between documents both sums
    fall by 48: 2^-48 is none even beside the eps of the row sums.
    """
    decay = tl.zeros_like(steps).to(tl.float32)
    if DECAYS != "none":
        z = gate_logits(DECAY, tokens, valid, stride, DECAYS)
        softplus = tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
        log2 = tl.maximum(softplus * -1.4426950408889634, -32.0)
        decay += tl.where(counts & (tokens >= prefix), log2, 0.0)
    y = tl.cumsum(decay, 0)
    if PACKED:
        inside = valid & (steps > 0)
        own = tl.load(DOCUMENTS + steps, mask=inside, other=0)
        begins = own != tl.load(DOCUMENTS + steps - 1, mask=inside, other=0)
        y -= 48.0 * tl.cumsum(begins.to(tl.float32), 0)
    return y - decay, y
