"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from lion_kernels import chunks, linear, pairs, tuning
from lion_kernels.decay import NUM_VECTORS, decay_cumsum_kernel, gate_bwd_kernel
from lion_kernels.registry import operator
from lion_kernels.states import chunk_state_kernel, state_passing_kernel


@dataclass(frozen=True)
class Call:
    """One call of the operator: what the launches of its kernels share.

    Tensors and options are those of `lion_kernels.mix`; `qkv` is `projected`, contiguous.
    """

    qkv: Tensor
    decay: Tensor | None
    curves: Tensor | None
    valid: Tensor | None
    documents: Tensor | None
    heads: int
    dim: int
    num_curves: int
    prefix: int
    lit: bool
    features: str
    normalise: bool
    eps: float

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.qkv.shape)

    @cached_property
    def plan(self) -> tuning.Plan:
        no_decay = self.lit and self.documents is None
        size = self.qkv.element_size()
        return tuning.make_plan(self.shape[1], self.dim, size, self.num_curves, no_decay)

    @cached_property
    def num_chunks(self) -> int:
        return triton.cdiv(self.shape[1], self.plan.chunk)

    @property
    def sequences(self) -> int:
        return self.shape[0] * self.heads

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.qkv.new_empty(shape, dtype=dtype)

    def like_out(self, *leading: int) -> Tensor:
        """`[B, N, H * D]` in the dtype of `qkv`."""
        b, n, _ = self.shape
        return self.qkv.new_empty(*leading, b, n, self.heads * self.dim)

    def pointer(self, tensor: Tensor | None) -> Tensor:
        """A tensor for a kernel; a dummy pointer for an absent input."""
        if tensor is None:
            return self.qkv
        tensor = tensor.contiguous()
        return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor

    def gates(self, tensor: Tensor) -> Tensor:
        """The columns behind queries, keys and values."""
        return tensor[..., 3 * self.heads * self.dim :]

    @cached_property
    def decays(self) -> dict[str, Any]:
        """How kernels find decays: DECAY and its strides over curves, images and tokens."""
        _, n, width = self.shape
        if self.lit:
            found = ("none", self.qkv, 0, 0, 0)
        elif self.decay is None:
            found = ("gates", self.gates(self.qkv), self.heads, n * width, width)
        elif self.decay.dim() == 2:
            found = ("head", self.decay.contiguous(), self.heads, 0, 0)
        else:
            own = n * self.heads
            found = ("logs", self.decay.contiguous(), self.shape[0] * own, own, self.heads)
        names = ("DECAYS", "DECAY", "decay_c", "decay_b", "decay_n")
        prefix = self.prefix if found[0] == "gates" else 0
        return {**dict(zip(names, found, strict=True)), "prefix": prefix}

    @property
    def by_token(self) -> bool:
        return self.plan.backward == "pairs"

    @cached_property
    def alike(self) -> bool:
        """Whether all images have the same decays."""
        by_head = self.decays["DECAYS"] in ("head", "none")
        return by_head and self.valid is None and self.documents is None

    @property
    def sequence_options(self) -> dict[str, Any]:
        """Arguments of every kernel that goes over tokens."""
        return {
            "n": self.shape[1], "heads": self.heads, "stride_n": self.shape[2], "D": self.dim,
            "BLOCK": self.plan.block, "FEATURES": self.features,
        }  # fmt: skip

    def cumulative_decays(self) -> tuple[Tensor, Tensor]:
        """SUMS `[C, B, H, chunks, NUM_VECTORS, size]`, a stride of 0 where images are alike; and,
        by token, steps on the curves `[C, size]`."""
        b, n, _ = self.shape
        images = 1 if self.alike else b
        size = self.plan.size
        sums = self.empty(
            self.num_curves, images, self.heads, self.num_chunks, NUM_VECTORS.value, size
        )
        places = self.empty(self.num_curves if self.by_token else 0, size, dtype=torch.int32)
        decay_cumsum_kernel[(self.num_chunks * self.num_curves * images * self.heads,)](
            **self.decays, CURVE=self.pointer(self.curves), VALID=self.pointer(self.valid),
            DOCUMENTS=self.pointer(self.documents), SUMS=sums, PLACES=places, n=n,
            images=images, heads=self.heads, CHUNK=self.plan.chunk, SIZE=size,
            RANGE=triton.next_power_of_2(size), BLOCK=self.plan.block,
            PADDED=self.valid is not None, PACKED=self.documents is not None,
            CURVED=self.curves is not None, BY_TOKEN=self.by_token, num_warps=1,
        )  # fmt: skip
        return sums.expand(-1, b, -1, -1, -1, -1), places


# ---------------------------------------------------------------- along one curve after the other


def _inputs(call: Call, sums: Tensor, c: int) -> dict[str, Any]:
    """Arguments that the kernels of `chunks.py` and `states.py` share, along curve `c`."""
    curve = None if call.curves is None or call.by_token else call.curves[c]
    return {
        "QKV": call.qkv, "SUMS": sums[c], "CURVE": call.pointer(curve),
        "VALID": call.pointer(call.valid), "sums_b": sums.stride(1), "CURVED": curve is not None,
        "PADDED": call.valid is not None, "CHUNK": call.plan.chunk, **call.sequence_options,
    }  # fmt: skip


def _states(call: Call, inputs: dict[str, Any], **of_queries: Tensor) -> dict[str, Any]:
    """States that enter each chunk: of keys, and of queries too if their tensors are given."""
    if call.num_chunks == 1:
        return {"STATES": call.qkv, "VECTORS": call.qkv, "CHUNKED": False}
    num_states = 4 if of_queries else 2
    shape = (call.sequences * call.num_chunks, num_states, call.dim)
    states = call.empty(*shape, call.dim, dtype=call.qkv.dtype)
    vectors = call.empty(*shape)
    absent = dict.fromkeys(("OUT", "INV_DENOM", "DO"), call.qkv)
    for queries in range(num_states // 2):
        chunk_state_kernel[(call.sequences * call.num_chunks,)](
            **{**inputs, **absent, **of_queries, **call.plan.state}, STATES=states,
            VECTORS=vectors, NUM_STATES=num_states, OF_QUERIES=queries > 0,
            NORMALISE=call.normalise, curve_weight=1 / call.num_curves,
        )  # fmt: skip
    part = min(call.dim**2, 1024)
    state_passing_kernel[(call.sequences, num_states, call.dim**2 // part + 1)](
        STATES=states, VECTORS=vectors, SUMS=inputs["SUMS"], n=inputs["n"], heads=call.heads,
        sums_b=inputs["sums_b"], D=call.dim, CHUNK=call.plan.chunk, PART=part, GROUP=4,
        NUM_STATES=num_states,
    )  # fmt: skip
    return {"STATES": states, "VECTORS": vectors, "CHUNKED": True}


def _chunks_forward(call: Call, out: Tensor, inv_denom: Tensor) -> None:
    sums, _ = call.cumulative_decays()
    table = _mask_table(call, sums) if call.by_token else {"TABLE": call.qkv, "TABULATED": False}
    for c in range(1 if call.by_token else call.num_curves):
        inputs = _inputs(call, sums, c)
        chunks.mix_fwd_kernel[(call.sequences * call.num_chunks,)](
            **inputs, **_states(call, inputs), **table, OUT=out, INV_DENOM=inv_denom,
            sums_c=sums.stride(0), eps=call.eps, curve_weight=1 / call.num_curves,
            NUM_CURVES=call.num_curves if call.by_token else 1, NORMALISE=call.normalise,
            ADD=c > 0, **call.plan.fwd,
        )  # fmt: skip


def _chunks_backward(
    call: Call, out: Tensor, inv_denom: Tensor, grad: Tensor, dqkv: Tensor, ddecay: Tensor
) -> None:
    sums, _ = call.cumulative_decays()
    delta, dq_residual = torch.empty_like(inv_denom), torch.empty_like(inv_denom)
    dlog_mask = call.empty(6, call.sequences * call.num_chunks, call.plan.size)
    shared = {"DO": grad, "PHI_Q": call.like_out(), "PHI_K": call.like_out(),
              "DELTA": delta, "DQKV": dqkv, "DLOG_MASK": dlog_mask,
              "side": dlog_mask.stride(0)}  # fmt: skip
    for c in range(call.num_curves):
        inputs = _inputs(call, sums, c)
        states = _states(call, inputs, OUT=out, INV_DENOM=inv_denom, DO=grad)
        chunks.mix_bwd_dq_kernel[(call.sequences * call.num_chunks,)](
            **inputs, **states, **shared, OUT=out, INV_DENOM=inv_denom, DQ_RESIDUAL=dq_residual,
            eps=call.eps, curve_weight=1 / call.num_curves, NORMALISE=call.normalise, ADD=c > 0,
            LAST=c == call.num_curves - 1, **call.plan.dq,
        )  # fmt: skip
        tiles = call.plan.size // call.plan.block
        chunks.mix_bwd_dkv_kernel[(call.sequences * call.num_chunks * tiles,)](
            **inputs, **states, **shared, tiles=tiles, SIZE=call.plan.size, ADD=c > 0,
            **call.plan.dkv,
        )  # fmt: skip
        _gate_gradients(call, c, sums, dlog_mask, dqkv, ddecay, states)


def _gate_gradients(
    call: Call, c: int, sums: Tensor, dlog_mask: Tensor, dqkv: Tensor, ddecay: Tensor,
    states: dict[str, Any],
) -> None:  # fmt: skip
    """Gradients of curve `c`'s gates, into `dqkv`, or of its decays, into `ddecay`."""
    if call.lit:
        return
    decays = dict(call.decays)
    del decays["decay_c"]
    gated = decays["DECAYS"] == "gates"
    first = c * call.heads
    decays["DECAY"] = decays["DECAY"][..., first:] if gated else decays["DECAY"][c]
    grad = call.gates(dqkv)[..., first:] if gated else ddecay[c]
    _, n, width = call.shape
    curve = None if call.curves is None else call.curves[c]
    gate_bwd_kernel[(call.sequences * call.num_chunks,)](
        **decays, **states, DLOG_MASK=dlog_mask, SUMS=sums[c], CURVE=call.pointer(curve),
        VALID=call.pointer(call.valid), GRAD=grad, n=n, heads=call.heads,
        side=dlog_mask.stride(0), sums_b=sums.stride(1),
        grad_b=n * (width if gated else call.heads), grad_n=width if gated else call.heads,
        D=call.dim, CHUNK=call.plan.chunk, SIZE=call.plan.size,
        RANGE=triton.next_power_of_2(call.plan.size), PADDED=call.valid is not None,
        CURVED=curve is not None, BY_TOKEN=call.by_token,
        num_warps=4 if states["CHUNKED"] else 1,
    )  # fmt: skip


# ------------------------------------------------------------------------- several curves at once


def _mask_table(call: Call, sums: Tensor) -> dict[str, Any]:
    """The masks' sum by head, where all images have the same."""
    if not call.alike:
        return {"TABLE": call.qkv, "TABULATED": False}
    size = call.plan.size
    table = call.qkv.new_empty(call.heads, size, size)
    pairs.mask_table_kernel[(call.heads * size // call.plan.block,)](
        SUMS=sums, TABLE=table, sums_c=sums.stride(0), SIZE=size, BLOCK=call.plan.block,
        NUM_CURVES=call.num_curves,
    )  # fmt: skip
    return {"TABLE": table, "TABULATED": True}


def _pair_inputs(call: Call, sums: Tensor) -> dict[str, Any]:
    return {
        **_mask_table(call, sums),
        "QKV": call.qkv, "SUMS": sums, "sums_c": sums.stride(0), "sums_b": sums.stride(1),
        "NUM_CURVES": call.num_curves, "SIZE": call.plan.size, **call.sequence_options,
    }  # fmt: skip


def _key_features(call: Call, phi_k: Tensor) -> None:
    tiles = call.plan.size // call.plan.block
    pairs.key_feature_kernel[(call.sequences * tiles,)](
        QKV=call.qkv, VALID=call.pointer(call.valid), PHI_K=phi_k, PADDED=call.valid is not None,
        **call.sequence_options,
    )  # fmt: skip


def _pairs_forward(call: Call, out: Tensor, inv_denom: Tensor) -> None:
    shared = _pair_inputs(call, call.cumulative_decays()[0])
    phi_k = call.like_out()
    _key_features(call, phi_k)
    pairs.mix_fwd_kernel[(call.sequences * call.plan.size // call.plan.block,)](
        **shared, PHI_K=phi_k, OUT=out,
        INV_DENOM=inv_denom, eps=call.eps, NORMALISE=call.normalise, **call.plan.fwd,
    )  # fmt: skip


def _pairs_backward(
    call: Call, out: Tensor, inv_denom: Tensor, grad: Tensor, dqkv: Tensor, ddecay: Tensor
) -> None:
    (sums, places), phi = call.cumulative_decays(), call.like_out(2)
    _key_features(call, phi[1])
    size = call.plan.size
    dlog_mask = call.empty(call.num_curves, 6, call.sequences, size)
    shared = {
        **_pair_inputs(call, sums), "PHI": phi, "PLACES": places, "DO": grad,
        "DELTA": torch.empty_like(inv_denom), "DQKV": dqkv, "DLOG_MASK": dlog_mask,
        "side": dlog_mask.stride(1),
    }  # fmt: skip
    grid = (call.sequences * size // call.plan.block,)
    table = shared.pop("TABLE")
    pairs.mix_bwd_dq_kernel[grid](
        **shared, OUT=out, INV_DENOM=inv_denom, eps=call.eps, NORMALISE=call.normalise,
        **call.plan.dq,
    )  # fmt: skip
    pairs.mix_bwd_dkv_kernel[grid](
        **shared,
        TABLE=table,
        VALID=call.pointer(call.valid),
        PADDED=call.valid is not None,
        **call.plan.dkv,
    )
    if shared["TABULATED"]:
        _logit_gradients(call, dlog_mask[:, 0, :, : call.shape[1]], ddecay)
        return
    states = {"STATES": call.qkv, "VECTORS": call.qkv, "CHUNKED": False}
    for c in range(call.num_curves):
        _gate_gradients(call, c, sums, dlog_mask[c], dqkv, ddecay, states)


def _logit_gradients(call: Call, sums: Tensor, ddecay: Tensor) -> None:
    """Gradients of heads' logits by image, `[C, B, H, 1]`, from sums of g_ij t_ij by token."""
    logits = call.decay[:, None, :, None]
    log_decay = F.logsigmoid(logits) / math.log(2)
    slope = torch.where(logits > -16, torch.sigmoid(-logits) / log_decay, 0.0)
    sums = sums.sum(-1).view(ddecay.shape)
    ddecay.copy_(torch.where(log_decay < 0, sums * slope, 0.0))


# ----------------------------------------------------------------------------------------- no decay


def _linear_state(call: Call) -> dict[str, Tensor]:
    shape = (call.sequences * call.num_chunks, call.dim)
    return {"STATES": call.empty(*shape, call.dim), "VECTORS": call.empty(*shape)}


def _linear_inputs(call: Call) -> dict[str, Any]:
    """Arguments of every kernel of `linear.py`."""
    return {"QKV": call.qkv, "CHUNK": call.plan.chunk, **call.sequence_options}


def _linear_key_state(call: Call) -> dict[str, Tensor]:
    states = _linear_state(call)
    linear.key_state_kernel[(call.sequences * call.num_chunks,)](
        **{**_linear_inputs(call), **call.plan.state}, **states, VALID=call.pointer(call.valid),
        PADDED=call.valid is not None,
    )  # fmt: skip
    return states


def _linear_scales(call: Call) -> dict[str, float]:
    """States are means over this many tokens."""
    tokens = float(call.num_chunks * call.plan.chunk)
    return {"eps": call.eps / tokens, "out_scale": 1.0 if call.normalise else tokens}


def _linear_forward(call: Call, out: Tensor, inv_denom: Tensor) -> None:
    linear.mix_fwd_kernel[(call.sequences * call.num_chunks,)](
        **{**_linear_inputs(call), **call.plan.fwd}, **_linear_key_state(call),
        **_linear_scales(call), OUT=out, INV_DENOM=inv_denom, NORMALISE=call.normalise,
    )  # fmt: skip


def _linear_backward(
    call: Call, out: Tensor, inv_denom: Tensor, grad: Tensor, dqkv: Tensor, ddecay: Tensor
) -> None:
    grid, inputs, scales = (
        (call.sequences * call.num_chunks,),
        _linear_inputs(call),
        _linear_scales(call),
    )
    of_queries = {f"QUERY_{name}": tensor for name, tensor in _linear_state(call).items()}
    linear.mix_bwd_dq_kernel[grid](
        **{**inputs, **call.plan.dq}, **_linear_key_state(call), **of_queries, **scales, OUT=out,
        INV_DENOM=inv_denom, DO=grad, DQKV=dqkv, NORMALISE=call.normalise,
    )  # fmt: skip
    linear.mix_bwd_dkv_kernel[grid](
        **{**inputs, **call.plan.dkv}, **of_queries, out_scale=scales["out_scale"], DQKV=dqkv,
        VALID=call.pointer(call.valid), PADDED=call.valid is not None,
    )  # fmt: skip


FORWARD = {"chunks": _chunks_forward, "pairs": _pairs_forward, "linear": _linear_forward}
BACKWARD = {"chunks": _chunks_backward, "pairs": _pairs_backward, "linear": _linear_backward}

# ------------------------------------------------------------------------------------ the operators


@operator("mix")
def mix_operator(
    projected: Tensor,
    decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    heads: int,
    dim: int,
    num_curves: int,
    prefix: int,
    lit: bool,
    features: str,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and 1 / (denominator + eps), float32 `[B, H, N]`."""
    options = (heads, dim, num_curves, prefix, lit, features, normalise, eps)
    call = Call(projected.contiguous(), decay, curves, valid, documents, *options)
    b, n, _ = call.shape
    out = call.like_out()
    inv_denom = (
        call.empty(b, heads, n)
        if normalise
        else projected.new_ones(b, heads, n, dtype=torch.float32)
    )
    FORWARD[call.plan.forward](call, out, inv_denom)
    return out, inv_denom


@torch.library.register_fake("lion::mix")
def _(projected, decay, curves, valid, documents, heads, dim, *_):
    b, n, _ = projected.shape
    inv_denom = projected.new_empty(b, heads, n, dtype=torch.float32)
    return projected.new_empty(b, n, heads * dim), inv_denom


@operator("mix_backward")
def mix_backward(
    grad: Tensor,
    projected: Tensor,
    decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    out: Tensor,
    inv_denom: Tensor,
    heads: int,
    dim: int,
    num_curves: int,
    prefix: int,
    lit: bool,
    features: str,
    normalise: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `projected`, and of `decay`: logits' `[C, B, H, chunks]`, log decays' whole."""
    options = (heads, dim, num_curves, prefix, lit, features, normalise, eps)
    call = Call(projected.contiguous(), decay, curves, valid, documents, *options)
    dprojected = torch.empty_like(call.qkv)
    written = num_curves * heads if call.decays["DECAYS"] == "gates" else 0
    call.gates(dprojected)[..., written:] = 0
    ddecay = call.empty(*_ddecay_shape(projected, decay, heads, call.num_chunks))
    BACKWARD[call.plan.backward](call, out, inv_denom, grad.contiguous(), dprojected, ddecay)
    return dprojected, ddecay


def _ddecay_shape(
    projected: Tensor, decay: Tensor | None, heads: int, num_chunks: int
) -> tuple[int, ...]:
    if decay is None:
        return (0,)
    if decay.dim() == 2:
        return (decay.shape[0], projected.shape[0], heads, num_chunks)
    return tuple(decay.shape)


@torch.library.register_fake("lion::mix_backward")
def _(grad, projected, decay, curves, valid, documents, out, inv_denom, heads, dim, num_curves, *_):
    n, size = projected.shape[1], projected.element_size()
    plan = tuning.make_plan(n, dim, size, num_curves, no_decay=False)
    shape = _ddecay_shape(projected, decay, heads, -(-n // plan.chunk))
    return torch.empty_like(projected), projected.new_empty(shape, dtype=torch.float32)


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
        ddecay = ddecay.sum((1, 3)) if decay.dim() == 2 else ddecay
        decay = ddecay.to(decay.dtype)
    return dprojected, decay, *(None,) * 11


torch.library.register_autograd("lion::mix", _gradients, setup_context=_save)
