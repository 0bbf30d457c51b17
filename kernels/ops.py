"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.blocks import forward_kernel, key_grad_kernel, query_grad_kernel
from kernels.states import states_kernel, sums_kernel

# Of heads of at most 64 columns in half precision, measured on an H100.
TUNED = {
    "states": {"num_warps": 4},
    "forward": {"num_warps": 4},
    "queries": {"num_warps": 4},
    "keys": {"num_warps": 4},
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def block_size(dim: int, itemsize: int) -> int:
    """Tokens of a block: as many as a program has room for, by their bytes."""
    row = dim * itemsize
    return 64 if row <= 256 else 32 if row <= 512 else 16


@dataclass(frozen=True)
class Task:
    """A call of the operator: what the launches of its kernels share.

    Tensors and options are those of `kernels.mix`; `projected` is contiguous.
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
    def block(self) -> int:
        return block_size(self.dim, self.projected.element_size())

    @cached_property
    def blocks(self) -> int:
        return triton.cdiv(self.sizes[1], self.block)

    @property
    def gated(self) -> bool:
        return not self.lit and self.decay is None

    @property
    def unmasked(self) -> bool:
        return self.lit and self.documents is None

    @property
    def fast(self) -> bool:
        return self.projected.dtype != torch.float32 and not INTERPRETED

    @property
    def precision(self) -> str:
        """Of products: three tf32 products in float32, but wide heads have no room for them."""
        if self.projected.dtype != torch.float32:
            return "tf32"
        return "tf32x3" if self.dim <= 64 else "ieee"

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.projected.new_empty(shape, dtype=dtype)

    def tuned(self, kernel: str) -> dict[str, int]:
        small = self.dim <= 64 and self.projected.element_size() == 2
        return TUNED[kernel] if small else {"num_warps": 4 if self.dim <= 64 else 8}

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

    def sums(self) -> Tensor | None:
        """Sums of log2 decays `[2, C, B or 1, H, blocks * block]`."""
        if self.unmasked:
            return None
        alike = not self.gated and self.valid is None and self.documents is None
        images = 1 if alike else self.sizes[0]
        sums = self.empty(2, self.scans, images, self.heads, self.blocks * self.block)
        sums_kernel[(self.blocks, self.scans * images * self.heads)](
            self.logits(), *map(self.or_any, (self.curves, self.valid, self.documents)), *sums,
            self.sizes[1], images, self.heads, **self.decays(), BLOCK=self.block,
            PADDED=self.valid is not None, PACKED=self.documents is not None,
            CURVED=self.curves is not None, num_warps=1,
        )  # fmt: skip
        return sums

    def scan(self, c: int, sums: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Tensors and options that the kernels take for curve `c`."""
        _, n, width = self.sizes
        alike = sums is None or sums.shape[2] == 1
        x, y = (self.projected,) * 2 if sums is None else (sums[0, c], sums[1, c])
        curve = None if self.curves is None else self.curves[c]
        options = {
            "n": n, "blocks": self.blocks, "heads": self.heads, "stride_b": n * width,
            "stride_n": width, "sums_b": 0 if alike else self.heads * self.blocks * self.block,
            "scale": self.dim**-0.5, "weight": 1 / self.scans, "D": self.dim,
            "BLOCK": self.block, "UNMASKED": self.unmasked, "FEATURES": self.features,
            "PADDED": self.valid is not None, "CURVED": curve is not None,
            "NORMALISE": self.normalise, "PRECISION": self.precision, "FAST": self.fast,
            "num_stages": 1,
        }  # fmt: skip
        return (self.projected, x, y, *map(self.or_any, (curve, self.valid))), options

    def unit(self) -> float:
        """States of all tokens are means, and so are numerators; see `states_kernel`."""
        return float(self.sizes[1]) if self.unmasked and not self.normalise else 1.0

    def states(self, tensors, options, out, row_sums, grad=None) -> tuple[Tensor, Tensor]:
        """States that enter each block, or of all tokens, and those of the row sums."""
        directions = 1 if self.unmasked else 2
        kinds = directions * (1 if grad is None else 2)
        heads = self.sizes[0] * self.heads
        places = heads if self.unmasked else heads * self.blocks
        states = self.empty(places, kinds, self.dim, self.dim, dtype=self.projected.dtype)
        vectors = self.empty(places, kinds, self.dim)
        for queries in range(1 if grad is None else 2):
            states_kernel[(heads, directions)](
                *tensors, out, row_sums, self.or_any(grad), states, vectors, **options,
                QUERIES=queries, KINDS=kinds, **self.tuned("states"),
            )  # fmt: skip
        return states, vectors


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
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected.contiguous(), decay, curves, valid, documents, *options)
    b, n, _ = task.sizes
    out = task.empty(b, n, heads * dim, dtype=projected.dtype)
    row_sums = task.empty(b, heads, n if normalise else 0)
    sums = task.sums()
    for c in range(scans):
        tensors, shared = task.scan(c, sums)
        states = task.states(tensors, shared, out, row_sums)
        forward_kernel[(task.blocks, b * heads)](
            *tensors, *states, out, row_sums, unit=task.unit(), ADD=c > 0,
            eps=eps / n if task.unmasked else eps, **shared, **task.tuned("forward"),
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
    options = (heads, dim, scans, prefix, lit, features, normalise)
    task = Task(projected.contiguous(), decay, curves, valid, documents, *options)
    grad = grad.contiguous()
    b = task.sizes[0]
    sums = task.sums()
    dprojected = torch.empty_like(task.projected)
    task.gates_in(dprojected)[..., scans * heads if task.gated else 0 :] = 0
    flux = task.empty(3, b, heads, task.blocks * task.block)
    ddecay = task.empty(scans, b, heads, 0 if decay is None else task.blocks)
    for c in range(scans):
        tensors, shared = task.scan(c, sums)
        states = task.states(tensors, shared, out, row_sums, grad)
        if task.gated:
            gates = tuple(task.gates_in(t)[..., c * heads :] for t in (task.projected, dprojected))
        else:
            gates = (task.or_any(None if decay is None else decay[c]), ddecay[c])
        grid, options = (task.blocks, b * heads), {"unit": task.unit(), "ADD": c > 0, **shared}
        options["flux_side"] = flux.stride(0)
        query_grad_kernel[grid](
            *tensors, *states, out, row_sums, grad, dprojected, flux, **options,
            **task.tuned("queries"),
        )  # fmt: skip
        key_grad_kernel[grid](
            *tensors, *states, row_sums, grad, dprojected, flux, *gates,
            **task.decays(), **options, **task.tuned("keys"),
        )  # fmt: skip
    return dprojected, ddecay


@mix_backward.register_fake
def _(grad, projected, decay, curves, valid, documents, out, row_sums, heads, dim, scans, *_):
    b, n, _ = projected.shape
    blocks = 0 if decay is None else -(-n // block_size(dim, projected.element_size()))
    ddecay = projected.new_empty(scans, b, heads, blocks, dtype=torch.float32)
    return torch.empty_like(projected), ddecay


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
        decay = ddecay.sum((1, 3)).to(decay.dtype)
    return dprojected, decay, *(None,) * 11


mix_operator.register_autograd(_gradients, setup_context=_save)
