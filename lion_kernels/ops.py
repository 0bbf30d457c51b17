"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from lion_kernels.blocks import features_kernel, forward_kernel, key_grad_kernel, query_grad_kernel
from lion_kernels.registry import operator
from lion_kernels.states import added_kernel, carry_kernel, gates_kernel, sums_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Plan:
    """How a sequence is cut: tokens per block; rows, tiles and launch options of each kernel."""

    block: int
    carried: bool
    states: dict[str, int]
    forward: dict[str, int]
    queries: dict[str, int]
    keys: dict[str, int]


def make_plan(n: int, dim: int, itemsize: int, scans: int, unmasked: bool) -> Plan:
    """Short sequences are one block; without a mask there are no pairs, but one state.

    Two curves share the pairs of one block, but no states: it pays up to more tokens. In float32
    blocks are short, all rows of one program: sums of decays near closed gates are large and round
    the others, and what begins and ends inside a block has to cancel (`query_grad_kernel`).
    """
    half = itemsize == 2
    rows = 64 if half else 32
    longest = (320 if scans == 1 else 640) if half else rows
    carried = unmasked or n > longest
    block = (128 if half else rows) if carried else max(rows, triton.next_power_of_2(n))
    if unmasked:
        block = 512
    shape = {"ROWS": rows, "num_warps": 4 if dim < 128 else 8, "num_stages": 1}
    tiles = {**shape, "TILE": 32}
    if not (half and dim == 64):
        return Plan(block, carried, shape, tiles, tiles, tiles)
    # Measured on an H100.
    lean = {**tiles, "maxnreg": 128}
    if unmasked:
        return Plan(block, carried, {**shape, "num_stages": 3}, tiles, lean, lean)
    less = {**tiles, "maxnreg": 168}
    two = scans == 2 and not carried
    keys = {**less, "TILE": 16} if two else less
    return Plan(block, carried, {**shape, "ROWS": 128}, lean, less, keys)


@dataclass(frozen=True)
class Task:
    """A call of the operator: what the launches of its kernels share.

    Tensors and options are those of `lion_kernels.mix`; `projected` is contiguous.
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

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        return tuple(self.projected.shape)

    @cached_property
    def plan(self) -> Plan:
        itemsize = self.projected.element_size()
        return make_plan(self.sizes[1], self.dim, itemsize, self.scans, self.unmasked)

    @cached_property
    def blocks(self) -> int:
        return triton.cdiv(self.sizes[1], self.plan.block)

    @property
    def two(self) -> bool:
        """Both curves in one pass."""
        return self.scans == 2 and not self.plan.carried

    @property
    def gated(self) -> bool:
        return not self.lit and self.decay is None

    @property
    def unmasked(self) -> bool:
        return self.lit and self.documents is None

    @property
    def fast(self) -> bool:
        return self.projected.dtype == torch.bfloat16 and not INTERPRETED

    @property
    def precision(self) -> str:
        """Of products: three tf32 products in float32, but wide heads have no room for them."""
        if self.projected.dtype != torch.float32:
            return "tf32"
        return "tf32x3" if self.dim <= 64 else "ieee"

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.projected.new_empty(shape, dtype=dtype)

    def or_any(self, tensor: Tensor | None) -> Tensor:
        """A kernel takes any tensor in the place of one that it does not read."""
        if tensor is None:
            return self.projected
        tensor = tensor.contiguous()
        return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor

    def decays(self) -> dict[str, Any]:
        """How the kernels find the logits of a head's decays."""
        _, n, width = self.sizes
        by_token = {"DECAYS": "tokens", "decay_b": n * width, "decay_n": width, "decay_h": 1}
        by_head = {"DECAYS": "head", "decay_b": 0, "decay_n": 0, "decay_h": 1}
        options = by_token if self.gated else by_head
        prefix = self.prefix if self.gated else 0
        return {**options, "prefix": prefix} | ({"DECAYS": "none"} if self.lit else {})

    def logits(self) -> Tensor:
        return self.gates_in(self.projected) if self.gated else self.or_any(self.decay)

    def gates_in(self, projected: Tensor) -> Tensor:
        return projected[..., 3 * self.heads * self.dim :]

    def of_gates(self) -> dict[str, Any]:
        """Options of the kernels that read gates."""
        return {
            "n": self.sizes[1], "blocks": self.blocks, "heads": self.heads, **self.decays(),
            "BLOCK": self.plan.block,
            "PADDED": self.valid is not None, "CURVED": self.curves is not None,
            "BY_TOKEN": not self.plan.carried,
        }  # fmt: skip

    def sums(self) -> tuple[Tensor | None, Tensor]:
        """Sums of log2 decays `[2, C, B, H, blocks * block]`, and steps of tokens `[C, N]`."""
        steps = self.empty(self.scans, self.sizes[1], dtype=torch.int32)
        if self.unmasked:
            return None, steps
        alike = not self.gated and self.valid is None and self.documents is None
        images = 1 if alike else self.sizes[0]
        sums = self.empty(2, self.scans, images, self.heads, self.blocks * self.plan.block)
        sums_kernel[(self.blocks * self.scans * images * self.heads,)](
            self.logits(), *map(self.or_any, (self.curves, self.valid, self.documents)), *sums,
            steps, images=images, **self.of_gates(), PACKED=self.documents is not None,
            num_warps=1,
        )  # fmt: skip
        return sums.expand(-1, -1, self.sizes[0], -1, -1), steps

    @property
    def ready(self) -> bool:
        """Whether features are computed once, as several programs read each."""
        plan = self.plan
        return not plan.carried and plan.block > plan.forward["ROWS"] and self.features != "none"

    def like_output(self) -> Tensor:
        b, n, _ = self.sizes
        return self.empty(b, n, self.heads * self.dim, dtype=self.projected.dtype)

    def place_for_features(self) -> Tensor:
        """`[B, N, H * D]`, or any tensor."""
        return self.like_output() if self.ready else self.projected

    def key_features(self) -> Tensor:
        """The same, filled."""
        phi = self.place_for_features()
        if not self.ready:
            return phi
        b, n, width = self.sizes
        rows = self.plan.forward["ROWS"]
        features_kernel[(triton.cdiv(n, rows) * b * self.heads,)](
            self.projected, phi, n, self.heads, n * width, width, D=self.dim, ROWS=rows,
            FEATURES=self.features, FAST=self.fast,
        )  # fmt: skip
        return phi

    def passes(self, sums: Tensor | None):
        """For each launch, the number of its curve, its tensors and its options."""
        _, n, width = self.sizes
        options = {
            "n": n, "blocks": self.blocks, "heads": self.heads, "stride_b": n * width,
            "stride_n": width, "sums_b": 0 if sums is None else sums.stride(2),
            "scale": self.dim**-0.5, "weight": 1.0 if self.two else 1 / self.scans, "D": self.dim,
            "BLOCK": self.plan.block, "UNMASKED": self.unmasked, "FEATURES": self.features,
            "PADDED": self.valid is not None,
            "CURVED": self.curves is not None and self.plan.carried,
            "NORMALISE": self.normalise, "PRECISION": self.precision, "FAST": self.fast,
        }  # fmt: skip
        for c in range(1 if self.two else self.scans):
            x, y = (self.projected,) * 2 if sums is None else (sums[0, c], sums[1, c])
            curve = None if self.curves is None else self.curves[c]
            yield c, (x, y, *map(self.or_any, (curve, self.valid))), options

    def of_pairs(self, c: int, sums: Tensor | None) -> dict[str, Any]:
        """Further options of the kernels in `blocks`."""
        return {
            "sums_c": 0 if sums is None else sums.stride(1), "CARRIED": self.plan.carried,
            "TWO": self.two, "READY": self.ready, "ADD": c > 0,
            "unit": 1.0 if self.normalise else self.divisor,
        }  # fmt: skip

    @property
    def divisor(self) -> float:
        """Tokens that sums are divided by, as states of all tokens are means."""
        return float(self.blocks * self.plan.block) if self.unmasked else 1.0

    def states(self, tensors, options, out, row_sums, grad=None) -> tuple[Tensor, Tensor]:
        """States that enter each block, or of all tokens, and those of the row sums."""
        if not self.plan.carried:
            return self.projected, row_sums
        directions, groups = 1 if self.unmasked else 2, 1 if grad is None else 2
        kinds, heads = directions * groups, self.sizes[0] * self.heads
        places = (heads * self.blocks, kinds)
        dtype = torch.float32 if self.unmasked else self.projected.dtype  # those are few
        states = self.empty(*places, self.dim, self.dim, dtype=dtype)
        vectors = self.empty(*places, self.dim)
        for queries in range(groups):
            added_kernel[(self.blocks * heads,)](
                self.projected, *tensors, out, row_sums, self.or_any(grad), states, vectors,
                **options, QUERIES=queries, KINDS=kinds, **self.plan.states,
            )  # fmt: skip
        if self.blocks == 1 and self.unmasked:
            return states, vectors
        totals, vector_totals = states, vectors
        if self.unmasked:
            totals = torch.empty_like(states[:heads])
            vector_totals = torch.empty_like(vectors[:heads])
        part = min(self.dim**2, 1024)
        carry_kernel[(heads, kinds, self.dim**2 // part + 1)](
            states, vectors, totals, vector_totals, tensors[1], self.blocks, self.heads,
            options["sums_b"], D=self.dim, BLOCK=self.plan.block, PART=part,
            TURN=4, UNMASKED=self.unmasked, num_warps=4,
        )  # fmt: skip
        return totals, vector_totals

    def gate_grads(
        self, c: int, flux: Tensor, y: Tensor, states, dprojected: Tensor, ddecay: Tensor
    ) -> None:
        """Writes the gradients of the gates of curve `c`, or of its decays by image and block."""
        if self.gated:
            logits, grads = (
                self.gates_in(t)[..., c * self.heads :] for t in (self.projected, dprojected)
            )
        else:
            logits, grads = self.decay[c], ddecay[c]
        curve = None if self.curves is None else self.curves[c]
        gates_kernel[(self.blocks * self.sizes[0] * self.heads,)](
            flux[c], y, *states, logits, *map(self.or_any, (curve, self.valid)), grads,
            flux_side=flux.stride(1), sums_b=y.stride(0), D=self.dim,
            CARRIED=self.plan.carried, **self.of_gates(), num_warps=4 if self.plan.carried else 1,
        )  # fmt: skip


@operator("mix")
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
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected.contiguous(), decay, curves, valid, documents, *options)
    b, n, _ = task.sizes
    out, phi = task.like_output(), task.key_features()
    row_sums = task.empty(b, heads, n if normalise else 0)
    sums, _ = task.sums()
    for c, tensors, shared in task.passes(sums):
        states = task.states(tensors, shared, out, row_sums)
        forward_kernel[(triton.cdiv(n, task.plan.forward["ROWS"]) * b * heads,)](
            task.projected, phi, *tensors, *states, out, row_sums, eps=eps / task.divisor,
            **shared, **task.of_pairs(c, sums), **task.plan.forward,
        )  # fmt: skip
    return out, row_sums


@torch.library.register_fake("lion::mix")
def _(projected, decay, curves, valid, documents, heads, dim, scans, prefix, lit, *options):
    b, n, _ = projected.shape
    normalise = options[1]
    row_sums = projected.new_empty(b, heads, n if normalise else 0, dtype=torch.float32)
    return projected.new_empty(b, n, heads * dim), row_sums


@operator("mix_backward")
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
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `projected`, and of `decay` by image and block `[C, B, H, blocks]`."""
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected.contiguous(), decay, curves, valid, documents, *options)
    grad, plan = grad.contiguous(), task.plan
    b, n, _ = task.sizes
    sums, steps = task.sums()
    dprojected = torch.empty_like(task.projected)
    task.gates_in(dprojected)[..., scans * heads if task.gated else 0 :] = 0
    exact = torch.float64 if projected.dtype == torch.float32 else torch.float32
    places = 0 if task.unmasked else task.blocks * plan.block
    flux = task.empty(scans, 6 if plan.carried else 4, b, heads, places, dtype=exact)
    grad_sums, rests = (task.empty(b, heads, n) for _ in range(2))
    ddecay = task.empty(scans, b, heads, 0 if decay is None else task.blocks)
    phi = task.place_for_features(), task.key_features()
    for c, tensors, shared in task.passes(sums):
        states = task.states(tensors, shared, out, row_sums, grad)
        for kernel, tiles in ((query_grad_kernel, plan.queries), (key_grad_kernel, plan.keys)):
            kernel[(triton.cdiv(n, tiles["ROWS"]) * b * heads,)](
                task.projected, *phi, *tensors, steps, *states, out, row_sums, grad, grad_sums,
                rests, dprojected, flux[c], flux_side=flux.stride(1), flux_c=flux.stride(0),
                eps=eps / task.divisor, LAST=task.two or c == scans - 1,
                **shared, **task.of_pairs(c, sums), **tiles,
            )  # fmt: skip
        for gates in range(scans if task.two else 1) if not lit else ():
            task.gate_grads(c + gates, flux, sums[1, c + gates], states, dprojected, ddecay)
    return dprojected, ddecay


@torch.library.register_fake("lion::mix_backward")
def _(grad, projected, decay, curves, valid, documents, out, row_sums, heads, dim, scans, *_):
    b, n, _ = projected.shape
    plan = make_plan(n, dim, projected.element_size(), scans, unmasked=False)
    blocks = 0 if decay is None else -(-n // plan.block)
    ddecay = projected.new_empty(scans, b, heads, blocks, dtype=torch.float32)
    return torch.empty_like(projected), ddecay


def _save(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    projected, decay, *others = ctx.saved_tensors
    dprojected, ddecay = mix_backward(grad, projected, decay, *others, *ctx.options)
    if decay is not None:
        decay = ddecay.sum((1, 3)).to(decay.dtype)
    return dprojected, decay, *(None,) * 11


torch.library.register_autograd("lion::mix", _gradients, setup_context=_save)
