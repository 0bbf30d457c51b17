"""Vim's selective scan for GPUs: the custom operator `lion::selective_scan` and its gradient.

A program has a block of channels of one image and walks the tokens in chunks. What belongs to a
token stays in registers, one vector over the channels for each; the states, of which no two meet,
take turns. The backward pass computes states again from those that the forward pass stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lion_kernels import common
from lion_kernels.launches import operator

CHUNK = tl.constexpr(8)  # tokens
BLOCK = tl.constexpr(64)  # channels of a program, one warp: its sums over channels cross no other


@triton.jit
def _tokens(pointer, first, n, stride, inside, factors=None):
    """For each token of a chunk the vector over the channels, float32, times that of `factors`, if
    given; 0 beyond the last token."""
    vectors = ()
    for t in tl.static_range(CHUNK):
        valid = inside & (first + t < n)
        vector = tl.load(pointer + (first + t) * stride, mask=valid, other=0.0).to(tl.float32)
        vectors += (vector if factors is None else factors[t] * vector,)
    return vectors


@triton.jit
def _zeros():
    """For each token of a chunk zeros over the channels."""
    vectors = ()
    for _ in tl.static_range(CHUNK):
        vectors += (tl.zeros((BLOCK,), tl.float32),)
    return vectors


@triton.jit
def _scalars(pointer):
    """For each token of a chunk its number."""
    numbers = ()
    for t in tl.static_range(CHUNK):
        numbers += (tl.load(pointer + t),)
    return numbers


@triton.jit
def forward_kernel(X, DELTA, A, B, C, STATES, Y, n, channels, states, kept):
    """Y `[B, N, C]` and, of the last `kept` chunks, the STATES `[B, kept, S, C]` after each."""
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    chunks = tl.cdiv(n, CHUNK)
    rows = image * n * channels + column
    X, DELTA, Y, A = X + rows, DELTA + rows, Y + rows, A + column
    numbers = image * states * chunks * CHUNK
    B, C = B + numbers, C + numbers
    STATES += image * kept * states * channels + column
    for m in range(0, chunks):
        first = m * CHUNK
        before = STATES + (m - 1) % kept * states * channels
        after = STATES + m % kept * states * channels
        deltas = _tokens(DELTA, first, n, channels, inside)
        inputs = _tokens(X, first, n, channels, inside, deltas)
        outputs = _zeros()
        for s in range(0, states):
            a = tl.load(A + s * channels, mask=inside, other=0.0) * common.LOG2_E
            b = _scalars(B + s * chunks * CHUNK + first)
            c = _scalars(C + s * chunks * CHUNK + first)
            state = tl.load(before + s * channels, mask=inside & (m > 0), other=0.0)
            sums = ()
            for t in tl.static_range(CHUNK):
                state = tl.exp2(deltas[t] * a) * state + inputs[t] * b[t]
                sums += (outputs[t] + state * c[t],)
            outputs = sums
            tl.store(after + s * channels, state, mask=inside)
        for t in tl.static_range(CHUNK):
            tl.store(Y + (first + t) * channels, outputs[t], mask=inside & (first + t < n))
        tl.debug_barrier()  # the next chunk loads states that other threads may have stored


@triton.jit
def backward_kernel(
    X, DELTA, A, B, C, STATES, DY, DX, DDELTA, DA, DB, DC, DSTATE, n, channels, states
):  # fmt: skip
    """DX, DDELTA `[B, N, C]`; DA `[B, S, C]` and DB, DC by block of channels, to be summed."""
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    chunks = tl.cdiv(n, CHUNK)
    rows = image * n * channels + column
    X, DELTA, DY, DX, DDELTA = X + rows, DELTA + rows, DY + rows, DX + rows, DDELTA + rows
    numbers = image * states * chunks * CHUNK
    B, C = B + numbers, C + numbers
    of_block = (tl.program_id(0) * tl.num_programs(1) + image) * states * chunks * CHUNK
    DB, DC = DB + of_block, DC + of_block
    of_states = image * states * channels + column
    A, DA, DSTATE = A + column, DA + of_states, DSTATE + of_states
    STATES += image * chunks * states * channels + column
    for i in range(0, chunks):
        m = chunks - 1 - i
        first = m * CHUNK
        deltas = _tokens(DELTA, first, n, channels, inside)
        inputs = _tokens(X, first, n, channels, inside, deltas)
        grads = _tokens(DY, first, n, channels, inside)
        dinputs, ddeltas = _zeros(), _zeros()
        for s in range(0, states):
            a = tl.load(A + s * channels, mask=inside, other=0.0)
            b = _scalars(B + s * chunks * CHUNK + first)
            c = _scalars(C + s * chunks * CHUNK + first)
            before = STATES + ((m - 1) * states + s) * channels
            state = tl.load(before, mask=inside & (m > 0), other=0.0)
            decays, decayed = (), ()  # and what each token leaves of the state before it
            for t in tl.static_range(CHUNK):
                decays += (tl.exp2(deltas[t] * (a * common.LOG2_E)),)
                decayed += (decays[t] * state,)
                state = decayed[t] + inputs[t] * b[t]
            dstate = tl.load(DSTATE + s * channels, mask=inside & (i > 0), other=0.0)
            da = tl.load(DA + s * channels, mask=inside & (i > 0), other=0.0)
            dinput_sums, ddelta_sums = (), ()
            row = s * chunks * CHUNK + first
            for t in tl.static_range(CHUNK - 1, -1, -1):
                dc = tl.sum(grads[t] * (decayed[t] + inputs[t] * b[t]), 0)
                dstate += grads[t] * c[t]
                db = tl.sum(dstate * inputs[t], 0)
                tl.store(DB + row + t, db)
                tl.store(DC + row + t, dc)
                dlog = dstate * decayed[t]
                da += dlog * deltas[t]
                dinput_sums = (dinputs[t] + dstate * b[t],) + dinput_sums
                ddelta_sums = (ddeltas[t] + dlog * a,) + ddelta_sums
                dstate *= decays[t]
            dinputs, ddeltas = dinput_sums, ddelta_sums
            tl.store(DSTATE + s * channels, dstate, mask=inside)
            tl.store(DA + s * channels, da, mask=inside)
        xs = _tokens(X, first, n, channels, inside)
        for t in tl.static_range(CHUNK):
            valid = inside & (first + t < n)
            row = (first + t) * channels
            tl.store(DX + row, dinputs[t] * deltas[t], mask=valid)
            tl.store(DDELTA + row, ddeltas[t] + dinputs[t] * xs[t], mask=valid)
        tl.debug_barrier()  # as in the forward pass, for the gradient of the state


def selective_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As that of `state_space`: `x`, `delta` `[B, N, C]`; `a` `[C, S]`; `b`, `c` `[B, N, S]`.

    Each of them may be float32, bfloat16 or float16; states and sums are float32. Returns
    `[B, N, C]` in the dtype of `x`; bitwise repeatable, as are the gradients.
    """
    inputs = (x, delta, a, b, c)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return scan_operator(*inputs, keep)[0]


def _like_inputs(grad, states, x, delta, a, b, c, keep):
    dx, ddelta = (t.new_empty(t.shape) for t in (x, delta))
    return dx, ddelta, *(t.mT.new_empty(t.mT.shape).mT for t in (a, b, c))


@operator("selective_scan_backward", _like_inputs)
def scan_backward(
    grad: Tensor, states: Tensor, x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the five inputs, in their dtypes."""
    grid, inputs = _launch(x, delta, a, b, c)
    dx, ddelta = (torch.empty_like(inputs[name]) for name in ("X", "DELTA"))
    da, dstate = (inputs["A"].new_empty(x.shape[0], *a.mT.shape) for _ in range(2))
    db, dc = (inputs["B"].new_empty(grid[0], *inputs["B"].shape) for _ in range(2))
    outputs = {"DX": dx, "DDELTA": ddelta, "DA": da, "DB": db, "DC": dc, "DSTATE": dstate}
    backward_kernel[grid](**inputs, STATES=states, DY=grad.contiguous(), **outputs)
    db, dc = (t.sum(0).mT[:, : x.shape[1]].to(b.dtype) for t in (db, dc))
    return dx, ddelta, da.sum(0).mT.to(a.dtype), db, dc


def _like_outputs(x, delta, a, b, c, keep):
    chunks = triton.cdiv(x.shape[1], CHUNK.value) if keep else 1
    states = x.new_empty(x.shape[0], chunks, *a.mT.shape, dtype=torch.float32)
    return x.new_empty(x.shape), states


@operator("selective_scan", _like_outputs, backward=scan_backward, tensors=5, saved=slice(1, 2))
def scan_operator(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Outputs, and the states after each chunk, `[B, M, S, C]`, which gradients need; M is 1, for
    scratch, unless `keep`."""
    y, states = _like_outputs(x, delta, a, b, c, keep)
    grid, inputs = _launch(x, delta, a, b, c)
    forward_kernel[grid](**inputs, STATES=states, Y=y, kept=states.shape[1])
    return y, states


def _launch(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[tuple, dict]:
    """What both launches have in common: A `[S, C]`, B and C `[B, S, M * CHUNK]`, whole chunks."""
    padded = (F.pad(t, (0, 0, 0, -t.shape[1] % CHUNK.value)) for t in (b, c))
    a, b, c = (t.float().mT.contiguous() for t in (a, *padded))
    tensors = {"X": x.contiguous(), "DELTA": delta.contiguous(), "A": a, "B": b, "C": c}
    sizes = {"n": x.shape[1], "channels": x.shape[2], "states": len(a)}
    return (triton.cdiv(x.shape[2], BLOCK.value), x.shape[0]), {**tensors, **sizes, "num_warps": 1}
