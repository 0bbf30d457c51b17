"""What the kernels share: feature maps, their gradients, and loads of rows.

Masks are kept as two running sums of the log2 decays along a curve, `x` (exclusive) and `y`
(inclusive): `M_ij = 2^min(x_i - x_j, y_j - y_i)`.
"""

import triton
import triton.language as tl


@triton.jit
def feature_map(t, LIT: tl.constexpr):
    """phi of float32 rows `[R, D]`: elu + 1, or silu + 0.5 normalised over D."""
    if LIT:
        return tl.where(t > 0, t + 1, tl.exp(tl.minimum(t, 0.0)))
    f = t * tl.sigmoid(t) + 0.5
    return f * tl.rsqrt(tl.maximum(tl.sum(f * f, 1), 1e-24))[:, None]


@triton.jit
def feature_map_grad(t, grad, LIT: tl.constexpr):
    """Gradient with respect to `t` of `sum(feature_map(t) * grad)`."""
    if LIT:
        return grad * tl.where(t > 0, 1.0, tl.exp(tl.minimum(t, 0.0)))
    s = tl.sigmoid(t)
    f = t * s + 0.5
    inverse = tl.rsqrt(tl.maximum(tl.sum(f * f, 1), 1e-24))[:, None]
    unit = f * inverse
    return (grad - unit * tl.sum(unit * grad, 1)[:, None]) * inverse * s * (1 + t * (1 - s))


@triton.jit
def load_rows(pointer, rows, valid, stride, D: tl.constexpr):
    """Rows `[R, D]` of a matrix, zero where not valid."""
    columns = tl.arange(0, D)
    return tl.load(pointer + rows[:, None] * stride + columns, mask=valid[:, None], other=0.0)


@triton.jit
def store_rows(pointer, rows, valid, stride, value, D: tl.constexpr):
    columns = tl.arange(0, D)
    address = pointer + rows[:, None] * stride + columns
    tl.store(address, value.to(pointer.dtype.element_ty), mask=valid[:, None])


@triton.jit
def visited(CURVE, steps, valid, CURVED: tl.constexpr):
    """Tokens visited at the steps of a curve."""
    if CURVED:
        return tl.load(CURVE + steps, mask=valid, other=0).to(tl.int32)
    return steps


@triton.jit
def output_grad(
    DOUT, OUT, R, rows, valid, stride, weight, D: tl.constexpr, NORMALISE: tl.constexpr
):
    """Gradients `[R, D]` of the numerators and `[R]` of the denominators, both float32."""
    grad = load_rows(DOUT, rows, valid, stride, D).to(tl.float32)
    if NORMALISE:
        out = load_rows(OUT, rows, valid, stride, D).to(tl.float32)
        scale = weight / tl.load(R + rows, mask=valid, other=1.0)
        return grad * scale[:, None], -tl.sum(grad * out, 1) * scale
    return grad * weight, tl.zeros_like(rows).to(tl.float32)
