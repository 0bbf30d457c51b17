"""Hydra's semiseparable product for GPUs: `lion::semiseparable_product` and its gradient.

A program has one head of one image and sweeps over chunks of tokens with the state between them in
registers. With the running sums s of the log2 decays inside a chunk and their total g,

    y_i = sum_(j<=i) 2^(s_i - s_j) (c_i . b_j) x_j + 2^(s_i) c_i S
    S <- 2^g S + sum_j 2^(g - s_j) b_j x_j^T

where every exponent is at most 0.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels.registry import operator

CHUNK = 64
WARPS = {"forward": 4, "backward": 4}

LOG2E = tl.constexpr(math.log2(math.e))
# A decay of 2^-32 is none, and larger sums would round those of the other tokens of a chunk.
LEAST = tl.constexpr(-32.0)


@triton.jit
def _rows(pointer, steps, n, stride, WIDTH: tl.constexpr):
    """`[CHUNK, WIDTH]`, zero beyond the last token."""
    address = pointer + steps[:, None] * stride + tl.arange(0, WIDTH)
    return tl.load(address, mask=steps[:, None] < n, other=0.0)


@triton.jit
def _store_rows(pointer, steps, n, stride, value, WIDTH: tl.constexpr):
    address = pointer + steps[:, None] * stride + tl.arange(0, WIDTH)
    tl.store(address, value.to(pointer.dtype.element_ty), mask=steps[:, None] < n)


@triton.jit
def _matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return pointer + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _decays(pointer, steps, n, stride):
    """The log2 decays of a chunk, summed up to each token, and their total."""
    log = tl.load(pointer + steps * stride, mask=steps < n, other=0.0).to(tl.float32)
    log = tl.maximum(log * LOG2E, LEAST)
    return tl.cumsum(log, 0), tl.sum(log, 0)


@triton.jit
def _between(later, earlier, causal):
    """What is left, at a later token, of an earlier one; 0 where the order is not causal."""
    return tl.exp2(tl.where(causal, later - earlier, float("-inf")))


@triton.jit
def _added(state, total, b, sums, x, PRECISION: tl.constexpr):
    """The state after a chunk."""
    left = (b * tl.exp2(total - sums)[:, None]).to(x.dtype)
    return state * tl.exp2(total) + tl.dot(tl.trans(left), x, input_precision=PRECISION)


@triton.jit
def forward_kernel(
    X, DECAY, B, C, Y, n, heads,
    WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    image, head = pid // heads, pid % heads
    X += (image * n * heads + head) * WIDTH
    Y += (image * n * heads + head) * WIDTH
    DECAY += image * n * heads + head
    B += image * n * STATES
    C += image * n * STATES
    order = tl.arange(0, CHUNK)
    state = tl.zeros((STATES, WIDTH), tl.float32)
    for first in range(0, n, CHUNK):
        steps = first + order
        x = _rows(X, steps, n, heads * WIDTH, WIDTH)
        b = _rows(B, steps, n, STATES, STATES)
        c = _rows(C, steps, n, STATES, STATES)
        sums, total = _decays(DECAY, steps, n, heads)
        weights = tl.dot(c, tl.trans(b), input_precision=PRECISION)
        weights *= _between(sums[:, None], sums[None, :], order[:, None] >= order[None, :])
        y = tl.dot(c, state.to(x.dtype), input_precision=PRECISION) * tl.exp2(sums)[:, None]
        y += tl.dot(weights.to(x.dtype), x, input_precision=PRECISION)
        _store_rows(Y, steps, n, heads * WIDTH, y, WIDTH)
        state = _added(state, total, b, sums, x, PRECISION)


@triton.jit
def backward_kernel(
    X, DECAY, B, C, DY, DX, DDECAY, DB, DC, SCRATCH, n, heads,
    WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    image, head = pid // heads, pid % heads
    X += (image * n * heads + head) * WIDTH
    DY += (image * n * heads + head) * WIDTH
    DX += (image * n * heads + head) * WIDTH
    DECAY += image * n * heads + head
    DDECAY += image * n * heads + head
    B += image * n * STATES
    C += image * n * STATES
    DB += pid * n * STATES
    DC += pid * n * STATES
    chunks = tl.cdiv(n, CHUNK)
    SCRATCH += pid * chunks * STATES * WIDTH
    dtype = X.dtype.element_ty
    order = tl.arange(0, CHUNK)
    state = tl.zeros((STATES, WIDTH), tl.float32)
    for m in range(0, chunks):  # the states before each chunk, as in the forward pass
        tl.store(_matrix(SCRATCH + m * STATES * WIDTH, STATES, WIDTH), state.to(dtype))
        steps = m * CHUNK + order
        x = _rows(X, steps, n, heads * WIDTH, WIDTH)
        b = _rows(B, steps, n, STATES, STATES)
        sums, total = _decays(DECAY, steps, n, heads)
        state = _added(state, total, b, sums, x, PRECISION)
    tl.debug_barrier()  # other threads stored what this one loads
    dstate = tl.zeros((STATES, WIDTH), tl.float32)  # of the state after the chunk
    for i in range(0, chunks):
        m = chunks - 1 - i
        steps = m * CHUNK + order
        x = _rows(X, steps, n, heads * WIDTH, WIDTH)
        dy = _rows(DY, steps, n, heads * WIDTH, WIDTH)
        b = _rows(B, steps, n, STATES, STATES)
        c = _rows(C, steps, n, STATES, STATES)
        sums, total = _decays(DECAY, steps, n, heads)
        before = tl.load(_matrix(SCRATCH + m * STATES * WIDTH, STATES, WIDTH))
        after = dstate.to(dtype)
        reached = tl.exp2(sums)[:, None]
        left = tl.exp2(total - sums)[:, None]
        # Rows are queries, columns keys.
        decay = _between(sums[:, None], sums[None, :], order[:, None] >= order[None, :])
        pairs = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * decay
        dc = tl.dot(dy, tl.trans(before), input_precision=PRECISION) * reached
        ends = tl.sum(c * dc, 1)
        dc += tl.dot(pairs.to(dtype), b, input_precision=PRECISION)
        _store_rows(DC, steps, n, STATES, dc, STATES)
        # Rows are keys, columns queries: a transposed product as an operand is miscompiled.
        decay = _between(sums[None, :], sums[:, None], order[:, None] <= order[None, :])
        weights = tl.dot(b, tl.trans(c), input_precision=PRECISION) * decay
        dx = tl.dot(b, after, input_precision=PRECISION) * left
        dx += tl.dot(weights.to(dtype), dy, input_precision=PRECISION)
        _store_rows(DX, steps, n, heads * WIDTH, dx, WIDTH)
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        db = tl.dot(x, tl.trans(after), input_precision=PRECISION) * left
        begins = tl.sum(b * db, 1)
        db += tl.dot((pairs * decay).to(dtype), c, input_precision=PRECISION)
        _store_rows(DB, steps, n, STATES, db, STATES)
        # A token's log decay meets every pair that has it after the key and up to the query.
        pairs *= weights
        meets = tl.cumsum(tl.sum(pairs, 0) - tl.sum(pairs, 1) + ends, 0, reverse=True)
        meets += tl.cumsum(begins, 0) - begins
        meets += tl.exp2(total) * tl.sum(tl.sum(before.to(tl.float32) * dstate, 1), 0)
        tl.store(DDECAY + steps * heads, meets, mask=steps < n)
        read = tl.trans((c * reached).to(dtype))
        dstate = dstate * tl.exp2(total) + tl.dot(read, dy, input_precision=PRECISION)


@operator("semiseparable_product")
def semiseparable_product(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As that of `state_space`: `x` `[B, N, H, P]`; `b`, `c` `[B, N, S]`; `log_decay` `[B, N, H]`.

    `x`, `b` and `c` are float32, bfloat16 or float16, all of one dtype, that of matrix products
    (float32: three tf32 products); sums and states are float32. P and S are 16, 32, 64 or 128.
    Bitwise repeatable, as are the gradients.
    """
    x, log_decay, b, c = (t.contiguous() for t in (x, log_decay, b, c))
    y = torch.empty_like(x)
    forward_kernel[_grid(x)](
        x, log_decay, b, c, y, **options(x, b), num_warps=WARPS["forward"], num_stages=1
    )
    return y


@torch.library.register_fake("lion::semiseparable_product")
def _(x, log_decay, b, c):
    return x.new_empty(x.shape)


@operator("semiseparable_backward")
def semiseparable_backward(
    grad: Tensor, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, in their dtypes; those of `b` and `c` are sums over heads."""
    grad, x, log_decay, b, c = (t.contiguous() for t in (grad, x, log_decay, b, c))
    images, n, heads, width = x.shape
    dx, ddecay = torch.empty_like(x), torch.empty_like(log_decay)
    db, dc = (x.new_empty(images, heads, n, b.shape[2]) for _ in range(2))
    sizes = options(x, b)
    scratch = x.new_empty(images, heads, triton.cdiv(n, sizes["CHUNK"]), b.shape[2], width)
    backward_kernel[_grid(x)](
        x, log_decay, b, c, grad, dx, ddecay, db, dc, scratch, **sizes,
        num_warps=WARPS["backward"], num_stages=1,
    )  # fmt: skip
    return dx, ddecay, db.sum(1), dc.sum(1)


@torch.library.register_fake("lion::semiseparable_backward")
def _(grad, x, log_decay, b, c):
    return tuple(t.new_empty(t.shape) for t in (x, log_decay, b, c))


def options(x: Tensor, b: Tensor) -> dict[str, int | str]:
    """The kernels' sizes for `x` `[B, N, H, P]` and `b` `[B, N, S]`."""
    large = max(x.shape[3], b.shape[2]) > 64 or x.dtype == torch.float32  # for the registers
    return {
        "n": x.shape[1],
        "heads": x.shape[2],
        "WIDTH": x.shape[3],
        "STATES": b.shape[2],
        "CHUNK": CHUNK // 2 if large else CHUNK,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }


def _grid(x: Tensor) -> tuple[int]:
    return (x.shape[0] * x.shape[2],)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return semiseparable_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("lion::semiseparable_product", _gradients, setup_context=_save)
