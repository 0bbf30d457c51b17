"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.blocks import forward_kernel, key_grad_kernel, query_grad_kernel
from kernels.states import (
    carry_kernel,
    crossing_kernel,
    gates_kernel,
    local_states_kernel,
    sums_kernel,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Plan:
    """How a sequence is cut: tokens per block; rows, tiles and warps of each kernel."""

    block: int
    carried: bool
    states: dict[str, int]
    forward: dict[str, int]
    queries: dict[str, int]
    keys: dict[str, int]


def make_plan(n: int, dim: int, itemsize: int, unmasked: bool) -> Plan:
    """Short sequences are one block; without a mask there are no pairs, but one state.

    Blocks are short in float32: sums of decays near closed gates are large and round the others.
    """
    size = 64 if dim * itemsize <= 256 else 32 if dim * itemsize <= 512 else 16
    carried = unmasked or n > (256 if itemsize == 2 else 64)
    if not carried:
        block = triton.cdiv(n, size) * size
    elif unmasked:
        block = 256
    else:
        block = 128 if itemsize == 2 else 64
    warps = 4 if dim < 128 else 8
    tiles = {"ROWS": size, "TILE": size, "num_warps": warps, "num_stages": 1}
    return Plan(block, carried, {"ROWS": size, "num_warps": warps}, tiles, tiles, tiles)


@dataclass(frozen=True)
class Task:
    """A call of the operator: what the launches of its kernels share.

    - `projected`: `[B, N, W]`, W at least 3 * H * D: queries, keys and values, then, if `gated`,
      the logits of C gates per head.
    - `decay`: `[C, H]`, LION-D's logits, or None.
    - `curves`: int64 `[C, N]`, or None.
    - `valid`: bool `[B, N]`, or None. `documents`: integers `[B, N]`, or None.
    """

    projected: Tensor
    decay: Tensor | None
    curves: Tensor | None
    valid: Tensor | None
    documents: Tensor | None
    heads: int
    dim: int
    scans: int
    prefix: int
    lit: bool
    features: str
    normalise: bool

    def __post_init__(self) -> None:
        b, n, width = self.projected.shape
        unmasked = self.lit and self.documents is None
        plan = make_plan(n, self.dim, self.projected.element_size(), unmasked)
        blocks = triton.cdiv(n, plan.block)
        derived = {"b": b, "n": n, "width": width, "plan": plan, "blocks": blocks,
                   "length": blocks * plan.block, "unmasked": unmasked,
                   "gated": not self.lit and self.decay is None,
                   "curved": self.curves is not None and not self.lit,
                   "by_token": not plan.carried}  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.projected.new_empty(shape, dtype=dtype)

    def logits(self) -> tuple[Tensor, dict[str, Any]]:
        """Where the gates' logits are, and arguments of the kernels that read them."""
        options = {
            "n": self.n, "block": self.plan.block, "heads": self.heads, "prefix": self.prefix,
            "stride_b": self.n * self.width, "stride_n": self.width,
            "curve_c": self.n if self.curved else 0, "GATED": self.gated, "CURVED": self.curved,
            "PADDED": self.valid is not None, "BY_TOKEN": self.by_token,
            "WIDTH": triton.next_power_of_2(self.plan.block),
            "num_warps": 1 if self.plan.block <= 256 else 4,
        }  # fmt: skip
        if self.gated:
            return self.projected[..., 3 * self.heads * self.dim :], options
        return self.projected if self.lit else self.decay, {**options, "prefix": 0}

    def sums(self) -> tuple[Tensor | None, Tensor]:
        """Sums of log2 decays `[2, C, B or 1, H, blocks * block]`, and steps of tokens `[C, N]`."""
        steps = self.empty(self.scans, self.n, dtype=torch.int32)
        if self.unmasked:
            return None, steps
        alike = not self.gated and self.valid is None and self.documents is None
        images = 1 if alike else self.b
        sums = self.empty(2, self.scans, images, self.heads, self.length)
        logits, options = self.logits()
        sums_kernel[(self.blocks, self.scans * images * self.heads)](
            logits, self.curves if self.curved else sums, *self.keys(), *sums, steps, images=images,
            DECAYS=not self.lit, PACKED=self.documents is not None, **options,
        )  # fmt: skip
        return sums, steps

    def keys(self) -> tuple[Tensor, Tensor]:
        """The key mask and the documents, or what takes their places."""
        valid = self.projected if self.valid is None else self.valid.contiguous().view(torch.uint8)
        documents = self.projected if self.documents is None else self.documents.contiguous()
        return valid, documents

    def launches(self, sums: Tensor | None):
        """For each launch, the number of its curve, its tensors and its arguments."""
        launches = self.scans if self.plan.carried and not self.unmasked else 1
        per_image = 0 if sums is None or sums.shape[2] == 1 else self.heads * self.length
        options = {
            "n": self.n, "block": self.plan.block, "heads": self.heads,
            "stride_b": self.n * self.width, "stride_n": self.width, "sums_b": per_image,
            "scale": self.dim**-0.5, "weight": 1 / launches, "D": self.dim,
            "LIT": self.unmasked, "FEATURES": self.features, "PADDED": self.valid is not None,
            "CURVED": self.curved and self.plan.carried, "NORMALISE": self.normalise,
            "PRECISION": self.precision(), "FAST": self.fast(),
        }  # fmt: skip
        for c in range(launches):
            x, y = (self.projected,) * 2 if sums is None else (sums[0, c], sums[1, c])
            curve = self.curves[c] if self.curved else x
            yield c, (self.projected, x, y, curve, self.keys()[0]), options

    def of_pairs(self, c: int, sums: Tensor | None) -> dict[str, Any]:
        """Further arguments of the kernels in `blocks`."""
        return {
            "sums_c": 0 if sums is None else sums.stride(1),
            "unit": float(self.n) if self.unmasked and not self.normalise else 1.0,
            "CARRIED": self.plan.carried, "ADD": c > 0,
            "TWO": not self.plan.carried and self.scans == 2,
        }  # fmt: skip

    def states(self, tensors, options, out, row_sums, grad=None) -> tuple[Tensor, Tensor]:
        """States that enter each block (LION-Lit: of all tokens), and those of the row sums."""
        if not self.plan.carried:
            return self.projected, row_sums
        sides, programs = 1 if self.unmasked else 2, 1 if grad is None else 2
        kinds, grid = sides * programs, (self.blocks, self.b * self.heads)
        states = self.empty(*grid, kinds, self.dim, self.dim, dtype=self.projected.dtype)
        vectors = self.empty(*grid, kinds, self.dim)
        totals, vector_totals = states, vectors
        if self.unmasked:
            totals = states.new_empty(self.b * self.heads, kinds, self.dim, self.dim)
            vector_totals = vectors.new_empty(self.b * self.heads, kinds, self.dim)
        local_states_kernel[(*grid, programs)](
            *tensors, out, row_sums, out if grad is None else grad, states, vectors,
            **options, **self.plan.states,
        )  # fmt: skip
        part = min(self.dim**2, 1024)
        carry_kernel[(self.b * self.heads, kinds, self.dim**2 // part + 1)](
            states, vectors, totals, vector_totals, tensors[2], self.plan.block, self.blocks,
            self.heads, options["sums_b"], D=self.dim, PART=part, LIT=self.unmasked, num_warps=4,
        )  # fmt: skip
        return totals, vector_totals

    def fast(self) -> bool:
        return self.projected.dtype != torch.float32 and not INTERPRETED

    def precision(self) -> str:
        """Of products: three tf32 products in float32, but wide heads have no room for them."""
        if self.projected.dtype != torch.float32:
            return "tf32"
        return "tf32x3" if self.dim <= 64 else "ieee"


@torch.library.custom_op("lion::mix", mutates_args=())
def mix_operator(
    projected: Tensor,
    decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    heads: int,
    dim: int,
    scans: int,
    prefix: int,
    lit: bool,
    features: str,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and the row sums plus eps, float32 `[B, H, N]`."""
    projected = projected.contiguous()
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected, decay, curves, valid, documents, *options)
    out = task.empty(task.b, task.n, heads * dim, dtype=projected.dtype)
    row_sums = task.empty(task.b, heads, task.n if normalise else 0)
    sums, _ = task.sums()
    for c, tensors, options in task.launches(sums):
        states = task.states(tensors, options, out, row_sums)
        forward_kernel[(triton.cdiv(task.n, task.plan.forward["ROWS"]), task.b * heads)](
            *tensors, *states, out, row_sums, eps=eps / task.n if task.unmasked else eps,
            **options, **task.of_pairs(c, sums), **task.plan.forward,
        )  # fmt: skip
    return out, row_sums


@mix_operator.register_fake
def _(projected, decay, curves, valid, documents, heads, dim, scans, prefix, lit, *options):
    b, n, _ = projected.shape
    normalise = options[1]
    row_sums = projected.new_empty(b, heads, n if normalise else 0, dtype=torch.float32)
    return projected.new_empty(b, n, heads * dim), row_sums


@torch.library.custom_op("lion::mix_backward", mutates_args=())
def mix_backward(
    grad: Tensor,
    projected: Tensor,
    decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    out: Tensor,
    row_sums: Tensor,
    heads: int,
    dim: int,
    scans: int,
    prefix: int,
    lit: bool,
    features: str,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `projected`, and of `decay` by image and block `[C, B, H, blocks]`."""
    projected, grad = projected.contiguous(), grad.contiguous()
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected, decay, curves, valid, documents, *options)
    plan, b = task.plan, task.b
    sums, steps = task.sums()
    dprojected = torch.empty_like(projected)
    used = 3 * heads * dim + (scans * heads if task.gated else 0)
    dprojected[..., used:] = 0
    flux = task.empty(scans, 4, 0 if task.unmasked else b, heads, task.length)
    grad_sums = task.empty(b, heads, task.n)
    crossing = flux.new_zeros(scans, b, heads, task.blocks)
    sides = {"flux_side": flux.stride(1), "flux_c": flux.stride(0)}
    for c, tensors, options in task.launches(sums):
        states = task.states(tensors, options, out, row_sums, grad)
        for kernel, tiles in ((query_grad_kernel, plan.queries), (key_grad_kernel, plan.keys)):
            kernel[(triton.cdiv(task.n, tiles["ROWS"]), b * heads)](
                *tensors, steps, *states, out, row_sums, grad, grad_sums, dprojected,
                flux[c],
                **sides, **options, **task.of_pairs(c, sums), **tiles,
            )  # fmt: skip
        if plan.carried and not task.unmasked:
            crossing_kernel[(task.blocks, b * heads)](*states, crossing[c], D=dim, num_warps=4)
    ddecay = task.empty(*(crossing.shape if decay is not None else (0,)))
    if not lit:
        logits, options = task.logits()
        gate_grads = dprojected[..., 3 * heads * dim :] if task.gated else ddecay
        gates_kernel[(task.blocks, scans * b * heads)](
            flux, crossing, logits, curves if task.curved else flux, task.keys()[0],
            gate_grads, images=b,
            **sides, **options,
        )  # fmt: skip
    return dprojected, ddecay


@mix_backward.register_fake
def _(grad, projected, decay, curves, valid, documents, out, row_sums, heads, dim, scans, *_):
    b, n, _ = projected.shape
    plan = make_plan(n, dim, projected.element_size(), unmasked=False)  # its blocks do not matter
    shape = (0,) if decay is None else (scans, b, heads, -(-n // plan.block))
    return torch.empty_like(projected), projected.new_empty(shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.options = inputs[5:-1]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    projected, decay, *others = ctx.saved_tensors
    dprojected, ddecay = mix_backward(grad, projected, decay, *others, *ctx.options)
    if decay is not None:
        ddecay = ddecay.sum((1, 3)).to(decay.dtype)
    return dprojected, ddecay if decay is not None else None, *(None,) * 11


mix_operator.register_autograd(_gradients, setup_context=_save)
