"""Hydra's semiseparable product for GPUs: `lion::semiseparable_product` and its gradient.

A program has one head of one image and sweeps over chunks of tokens with the state between them in
registers. With the running sums s of the log2 decays inside a chunk and their total g,

    y_i = sum_(j<=i) 2^(s_i - s_j) (c_i . b_j) x_j + 2^(s_i) c_i S
    S <- 2^g S + sum_j 2^(g - s_j) b_j x_j^T

where every exponent is at most 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lion_kernels import common
from lion_kernels.decay import decay_cumsum
from lion_kernels.launches import operator

CHUNK = 64


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _chunk(
    X, DECAY, B, first, n, heads, WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr
):
    """A chunk's steps, which are there, x, b, the sums of log2 decays up to each, and the total."""
    steps = first + tl.arange(0, CHUNK)
    valid = steps < n
    x = common.load_tile(X, steps, valid, heads * WIDTH, WIDTH)
    b = common.load_tile(B, steps, valid, STATES, STATES)
    _, _, _, sums = decay_cumsum(DECAY, None, None, None, 0, 0, steps, valid, 0, heads, "logs")
    return steps, valid, x, b, sums, tl.min(sums, 0)


@triton.jit
def _between(later, earlier, causal):
    """What is left, at a later token, of an earlier one; 0 where the order is not causal."""
    return tl.exp2(tl.where(causal, later - earlier, float("-inf")))


@triton.jit
def _added(state, total, b, sums, x):
    """The state after a chunk."""
    left = (b * tl.exp2(total - sums)[:, None]).to(x.dtype)
    return state * tl.exp2(total) + _dot(tl.trans(left), x)


@triton.jit
def forward_kernel(
    X, DECAY, B, C, Y, n, heads, WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Y `[B, N, H, WIDTH]` of X; B and C `[B, N, STATES]`, DECAY `[B, N, H]`."""
    pid = tl.program_id(0).to(tl.int64)
    image, own = pid // heads, pid // heads * n * heads + pid % heads
    X, Y, DECAY = X + own * WIDTH, Y + own * WIDTH, DECAY + own
    B, C = B + image * n * STATES, C + image * n * STATES
    order = tl.arange(0, CHUNK)
    state = tl.zeros((STATES, WIDTH), tl.float32)
    for first in range(0, n, CHUNK):
        steps, valid, x, b, sums, total = _chunk(X, DECAY, B, first, n, heads, WIDTH, STATES, CHUNK)
        c = common.load_tile(C, steps, valid, STATES, STATES)
        weights = _dot(c, tl.trans(b))  # [CHUNK, CHUNK]
        weights *= _between(sums[:, None], sums[None, :], order[:, None] >= order[None, :])
        y = _dot(c, state.to(x.dtype)) * tl.exp2(sums)[:, None]  # [CHUNK, WIDTH]
        y += _dot(weights.to(x.dtype), x)
        common.store_tile(Y, steps, valid, heads * WIDTH, y, WIDTH)
        state = _added(state, total, b, sums, x)


@triton.jit
def backward_kernel(
    X, DECAY, B, C, DY, DX, DDECAY, DB, DC, SCRATCH, n, heads,
    WIDTH: tl.constexpr, STATES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """DX, DDECAY, and of each head DB and DC `[B, H, N, STATES]`; SCRATCH has a state by chunk."""
    pid = tl.program_id(0).to(tl.int64)
    image, own = pid // heads, pid // heads * n * heads + pid % heads
    X, DY, DX = X + own * WIDTH, DY + own * WIDTH, DX + own * WIDTH
    DECAY, DDECAY = DECAY + own, DDECAY + own
    B, C = B + image * n * STATES, C + image * n * STATES
    DB, DC = DB + pid * n * STATES, DC + pid * n * STATES
    chunks = tl.cdiv(n, CHUNK)
    SCRATCH += pid * chunks * STATES * WIDTH
    SCRATCH += tl.arange(0, STATES)[:, None] * WIDTH + tl.arange(0, WIDTH)
    dtype = X.dtype.element_ty
    order = tl.arange(0, CHUNK)
    state = tl.zeros((STATES, WIDTH), tl.float32)
    for m in range(0, chunks):  # the states before each chunk, as in the forward pass
        tl.store(SCRATCH + m * STATES * WIDTH, state.to(dtype))
        _, _, x, b, sums, total = _chunk(X, DECAY, B, m * CHUNK, n, heads, WIDTH, STATES, CHUNK)
        state = _added(state, total, b, sums, x)
    tl.debug_barrier()  # other threads stored what this one loads
    dstate = tl.zeros((STATES, WIDTH), tl.float32)  # of the state after the chunk
    for i in range(0, chunks):
        m = chunks - 1 - i
        first = m * CHUNK
        steps, valid, x, b, sums, total = _chunk(X, DECAY, B, first, n, heads, WIDTH, STATES, CHUNK)
        dy = common.load_tile(DY, steps, valid, heads * WIDTH, WIDTH)
        c = common.load_tile(C, steps, valid, STATES, STATES)
        before = tl.load(SCRATCH + m * STATES * WIDTH)
        after = dstate.to(dtype)
        reached = tl.exp2(sums)[:, None]
        left = tl.exp2(total - sums)[:, None]
        # Rows are queries, columns keys.
        decay = _between(sums[:, None], sums[None, :], order[:, None] >= order[None, :])
        pairs = _dot(dy, tl.trans(x)) * decay  # [CHUNK, CHUNK]
        dc = _dot(dy, tl.trans(before)) * reached  # [CHUNK, STATES]
        ends = tl.sum(c * dc, 1)
        dc += _dot(pairs.to(dtype), b)
        common.store_tile(DC, steps, valid, STATES, dc, STATES)
        # Rows are keys, columns queries: a transposed product as an operand is miscompiled.
        decay = _between(sums[None, :], sums[:, None], order[:, None] <= order[None, :])
        weights = _dot(b, tl.trans(c)) * decay  # [CHUNK, CHUNK]
        dx = _dot(b, after) * left  # [CHUNK, WIDTH]
        dx += _dot(weights.to(dtype), dy)
        common.store_tile(DX, steps, valid, heads * WIDTH, dx, WIDTH)
        pairs = _dot(x, tl.trans(dy))  # [CHUNK, CHUNK]
        db = _dot(x, tl.trans(after)) * left  # [CHUNK, STATES]
        begins = tl.sum(b * db, 1)
        db += _dot((pairs * decay).to(dtype), c)
        common.store_tile(DB, steps, valid, STATES, db, STATES)
        # A token's log decay meets every pair that has it after the key and up to the query.
        pairs *= weights
        meets = tl.cumsum(tl.sum(pairs, 0) - tl.sum(pairs, 1) + ends, 0, reverse=True)
        meets += tl.cumsum(begins, 0) - begins
        meets += tl.exp2(total) * tl.sum(tl.sum(before.to(tl.float32) * dstate, 1), 0)
        tl.store(DDECAY + steps * heads, meets, mask=valid)
        read = tl.trans((c * reached).to(dtype))
        dstate = dstate * tl.exp2(total) + _dot(read, dy)  # [STATES, WIDTH]


@operator("semiseparable_backward", lambda _, *inputs: tuple(t.new_empty(t.shape) for t in inputs))
def semiseparable_backward(
    grad: Tensor, x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs, in their dtypes; those of `b` and `c` are sums over heads."""
    images, n, heads, width = x.shape
    inputs = _inputs(x, log_decay, b, c)
    dx, ddecay = (torch.empty_like(inputs[name]) for name in ("X", "DECAY"))
    db, dc = (x.new_empty(images, heads, n, b.shape[2]) for _ in range(2))
    scratch = x.new_empty(images, heads, triton.cdiv(n, inputs["CHUNK"]), b.shape[2], width)
    outputs = {"DX": dx, "DDECAY": ddecay, "DB": db, "DC": dc, "SCRATCH": scratch}
    backward_kernel[(images * heads,)](**inputs, DY=grad.contiguous(), **outputs)
    return dx, ddecay, db.sum(1), dc.sum(1)


@operator(
    "semiseparable_product", lambda x, *_: x.new_empty(x.shape),
    backward=semiseparable_backward, tensors=4,
)  # fmt: skip
def semiseparable_product(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As that of `state_space`: `x` `[B, N, H, P]`; `b`, `c` `[B, N, S]`; `log_decay` `[B, N, H]`.

    `x`, `b` and `c` are float32, bfloat16 or float16, all of one dtype, that of matrix products
    (float32: three tf32 products); sums and states are float32. P and S are 16, 32, 64 or 128.
    Bitwise repeatable, as are the gradients.
    """
    inputs = _inputs(x, log_decay, b, c)
    y = torch.empty_like(inputs["X"])
    forward_kernel[(x.shape[0] * x.shape[2],)](**inputs, Y=y)
    return y


def _inputs(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor) -> dict:
    """What both launches have in common."""
    _, n, heads, width = x.shape
    large = max(width, b.shape[2]) > 64 or x.dtype == torch.float32  # for the registers
    return {
        "X": x.contiguous(), "DECAY": log_decay.contiguous(), "B": b.contiguous(),
        "C": c.contiguous(), "n": n, "heads": heads, "WIDTH": width, "STATES": b.shape[2],
        "CHUNK": CHUNK // 2 if large else CHUNK, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip
