"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import math
from collections.abc import Iterator
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

# Of every operator of the mixer: the fields of `Call`.
ARGUMENTS = (
    "Tensor projected, Tensor? decay, Tensor? curves, Tensor? valid, Tensor? documents, "
    "SymInt heads, SymInt dim, SymInt num_curves, SymInt prefix, bool lit, str features, "
    "bool normalise, float eps"
)


@dataclass
class Call:
    """One call of an operator: its arguments, which are those of `lion_kernels.mix`."""

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

    def __post_init__(self):
        for name in ("qkv", "decay", "curves", "valid", "documents"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.contiguous())

    @cached_property
    def plan(self) -> tuning.Plan:
        no_decay = self.lit and self.documents is None
        n, size = self.qkv.shape[1], self.qkv.element_size()
        return tuning.make_plan(n, self.dim, size, self.num_curves, no_decay)

    @cached_property
    def num_chunks(self) -> int:
        return triton.cdiv(self.qkv.shape[1], self.plan.chunk)

    @cached_property
    def sequences(self) -> int:
        return self.qkv.shape[0] * self.heads

    @cached_property
    def grid(self) -> tuple[int]:
        """A program for each chunk of each sequence."""
        return (self.sequences * self.num_chunks,)

    @property
    def grid_of_tiles(self) -> tuple[int]:
        return (self.sequences * self.num_chunks * (self.plan.size // self.plan.block),)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.qkv.new_empty(shape, dtype=dtype)

    def like_out(self, *leading: int) -> Tensor:
        """`[B, N, H * D]` in the dtype of `qkv`."""
        b, n, _ = self.qkv.shape
        return self.qkv.new_empty(*leading, b, n, self.heads * self.dim)

    def like_rows(self) -> Tensor:
        """A number for each query: float32 `[B, H, N]`."""
        b, n, _ = self.qkv.shape
        return self.empty(b, self.heads, n)

    def like_outputs(self) -> tuple[Tensor, Tensor]:
        return self.like_out(), self.like_rows()

    def like_inputs(self) -> tuple[Tensor, Tensor]:
        """`qkv`, and log decays `[C, B, N, H]` or logits for each chunk, `[C, B, H, chunks]`."""
        shape = (0,) if self.decay is None else self.decay.shape
        if len(shape) == 2:
            shape = (self.num_curves, self.qkv.shape[0], self.heads, self.num_chunks)
        return torch.empty_like(self.qkv), self.empty(*shape)

    def of_curve(self, c: int, qkv: Tensor, decay: Tensor | None) -> Tensor:
        """Where curve `c` has its decays, or their gradients, in tensors like these."""
        return qkv[..., (3 * self.dim + c) * self.heads :] if self.decay is None else decay[c]

    @cached_property
    def decays(self) -> tuple[str, int, int, int]:
        """DECAYS of the kernels, and the strides over curves, images and tokens."""
        b, n, width = self.qkv.shape
        if self.lit:
            return "none", 0, 0, 0
        if self.decay is None:
            return "gates", self.heads, n * width, width
        if self.decay.dim() == 2:
            return "head", self.heads, 0, 0
        return "logs", b * n * self.heads, n * self.heads, self.heads

    @cached_property
    def values(self) -> dict[str, Any]:
        """What kernels have as arguments, by name; absent inputs are None. It grows by results."""
        _, n, width = self.qkv.shape
        kind, decay_c, decay_b, decay_n = self.decays
        return {
            "QKV": self.qkv, "n": n, "stride_n": width, "heads": self.heads, "D": self.dim,
            "DECAY": self.qkv if self.lit else self.of_curve(0, self.qkv, self.decay),
            "DECAYS": kind, "decay_c": decay_c, "decay_b": decay_b, "decay_n": decay_n,
            "prefix": self.prefix if kind == "gates" else 0, "CURVE": self.curves,
            "VALID": None if self.valid is None else self.valid.view(torch.uint8),
            "DOCUMENTS": self.documents, "STATES": None, "VECTORS": None,
            "NUM_CURVES": self.num_curves, "curve_weight": 1 / self.num_curves, "eps": self.eps,
            "CHUNK": self.plan.chunk, "BLOCK": self.plan.block, "SIZE": self.plan.size,
            "TABLE": None, "tiles": self.plan.size // self.plan.block,
            "FEATURES": self.features, "NORMALISE": self.normalise,
        }  # fmt: skip

    def launch(
        self, kernel: triton.JITFunction, grid: tuple[int, ...], options: tuning.Options, **own: Any
    ) -> None:
        """The kernel takes from `values` what is not its `own`; `options` go before them."""
        own = {**options, **own}
        shared = {name: self.values[name] for name in kernel.arg_names if name not in own}
        kernel[grid](**shared, **own)

    def sum_decays(self) -> None:
        """SUMS `[C, B, H, chunks, NUM_VECTORS, size]`, a stride of 0 where images are alike; if
        they are by token, also PLACES `[C, size]`, each token's step on the curves, and TABLE."""
        b, size, by_token = self.qkv.shape[0], self.plan.size, self.plan.backward == "pairs"
        alike = self.decays[0] in ("head", "none") and self.valid is None and self.documents is None
        images = 1 if alike else b
        shape = (self.num_curves, images, self.heads, self.num_chunks)
        sums = self.empty(*shape, NUM_VECTORS.value, size)
        places = self.empty(self.num_curves, size, dtype=torch.int32) if by_token else None
        self.launch(
            decay_cumsum_kernel, (math.prod(shape),), {"num_warps": 1},
            SUMS=sums, PLACES=places, images=images,
        )  # fmt: skip
        sums = sums.expand(-1, b, -1, -1, -1, -1)
        strides = {"sums_c": sums.stride(0), "sums_b": sums.stride(1)}
        self.values.update(SUMS=sums, PLACES=places, BY_TOKEN=by_token, TABLE=None, **strides)
        if by_token and alike:
            self.values["TABLE"] = self.qkv.new_empty(self.heads, size, size)
            grid = (self.heads * size // self.plan.block,)
            self.launch(pairs.mask_table_kernel, grid, {})

    def along_curves(self) -> Iterator[int]:
        """One curve after the other, which `values` then has."""
        sums = self.values["SUMS"]
        for c in range(self.num_curves):
            curve = None if self.curves is None else self.curves[c]
            last = c == self.num_curves - 1
            self.values.update(SUMS=sums[c], CURVE=curve, ADD=c > 0, LAST=last, NUM_CURVES=1)
            yield c


# ---------------------------------------------------------------- along one curve after the other


def _enter_states(call: Call, num_states: int) -> None:
    """States that enter each chunk: two of keys, and two of queries if there shall be four."""
    if call.num_chunks == 1:
        return
    if call.values["STATES"] is None:
        shape = (*call.grid, num_states, call.dim)
        states = call.empty(*shape, call.dim, dtype=call.qkv.dtype)
        call.values.update(STATES=states, VECTORS=call.empty(*shape), NUM_STATES=num_states)
    for of_queries in range(num_states // 2):
        call.launch(chunk_state_kernel, call.grid, call.plan.state, OF_QUERIES=of_queries > 0)
    part = min(call.dim**2, 1024)
    grid = (call.sequences, num_states, call.dim**2 // part + 1)
    call.launch(state_passing_kernel, grid, {}, PART=part, GROUP=4)


def _chunks_forward(call: Call) -> None:
    call.sum_decays()
    if call.values["BY_TOKEN"]:  # along all curves at once
        call.launch(chunks.mix_fwd_kernel, call.grid, call.plan.fwd, CURVE=None, ADD=False)
        return
    for _ in call.along_curves():
        _enter_states(call, 2)
        call.launch(chunks.mix_fwd_kernel, call.grid, call.plan.fwd)


def _chunks_backward(call: Call, ddecay: Tensor) -> None:
    call.sum_decays()
    call.values.update(
        PHI_Q=call.like_out(), PHI_K=call.like_out(), DELTA=call.like_rows(),
        DQ_RESIDUAL=call.like_rows(), DLOG_MASK=call.empty(*call.grid, 6, call.plan.size),
    )  # fmt: skip
    for c in call.along_curves():
        _enter_states(call, 4)
        call.launch(chunks.mix_bwd_dq_kernel, call.grid, call.plan.dq)
        call.launch(chunks.mix_bwd_dkv_kernel, call.grid_of_tiles, call.plan.dkv)
        _gate_gradients(call, c, ddecay)


def _gate_gradients(call: Call, c: int, ddecay: Tensor) -> None:
    """Gradients of curve `c`'s gates, into DQKV, or of its decays, into `ddecay`."""
    if call.lit:
        return
    call.launch(
        gate_bwd_kernel, call.grid, {"num_warps": 1 if call.num_chunks == 1 else 4},
        DECAY=call.of_curve(c, call.qkv, call.decay),
        GRAD=call.of_curve(c, call.values["DQKV"], ddecay),
    )  # fmt: skip


# ------------------------------------------------------------------------- several curves at once


def _pairs_forward(call: Call) -> None:
    call.sum_decays()
    call.values.update(PHI_K=call.like_out())
    call.launch(pairs.key_feature_kernel, call.grid_of_tiles, {})
    call.launch(pairs.mix_fwd_kernel, call.grid_of_tiles, call.plan.fwd)


def _pairs_backward(call: Call, ddecay: Tensor) -> None:
    call.sum_decays()
    phi = call.like_out(2)
    dlog_mask = call.empty(call.num_curves, call.sequences, 6, call.plan.size)
    call.values.update(PHI=phi, PHI_K=phi[1], DELTA=call.like_rows(), DLOG_MASK=dlog_mask)
    call.launch(pairs.key_feature_kernel, call.grid_of_tiles, {})
    call.launch(pairs.mix_bwd_dq_kernel, call.grid_of_tiles, call.plan.dq)
    call.launch(pairs.mix_bwd_dkv_kernel, call.grid_of_tiles, call.plan.dkv)
    if call.values["TABLE"] is not None:
        _logit_gradients(call, dlog_mask[:, :, 0, : call.qkv.shape[1]], ddecay)
        return
    for c in call.along_curves():
        call.values.update(DLOG_MASK=dlog_mask[c])
        _gate_gradients(call, c, ddecay)


def _logit_gradients(call: Call, sums: Tensor, ddecay: Tensor) -> None:
    """Gradients of heads' logits by image, `[C, B, H, 1]`, from sums of g_ij t_ij by token."""
    logits = call.decay[:, None, :, None]
    log_decay = F.logsigmoid(logits) / math.log(2)
    # Nothing but rounding errors comes through a decay below 2^-23.
    trained = (logits > -16) & (log_decay < 0)
    slope = torch.where(trained, torch.sigmoid(-logits) / log_decay, 0.0)
    torch.mul(sums.sum(-1).view(ddecay.shape), slope, out=ddecay)


# ----------------------------------------------------------------------------------------- no decay


def _sum_keys(call: Call) -> None:
    """The state of the keys, a mean over this many tokens."""
    tokens = float(call.num_chunks * call.plan.chunk)
    shape = (*call.grid, call.dim)
    call.values.update(
        STATES=call.empty(*shape, call.dim), VECTORS=call.empty(*shape), eps=call.eps / tokens,
        out_scale=1.0 if call.normalise else tokens,
    )  # fmt: skip
    call.launch(linear.key_state_kernel, call.grid, call.plan.state)


def _linear_forward(call: Call) -> None:
    _sum_keys(call)
    call.launch(linear.mix_fwd_kernel, call.grid, call.plan.fwd)


def _linear_backward(call: Call, ddecay: Tensor) -> None:
    _sum_keys(call)
    for name in ("STATES", "VECTORS"):
        call.values[f"QUERY_{name}"] = torch.empty_like(call.values[name])
    call.launch(linear.mix_bwd_dq_kernel, call.grid, call.plan.dq)
    call.launch(linear.mix_bwd_dkv_kernel, call.grid, call.plan.dkv)


FORWARD = {"chunks": _chunks_forward, "pairs": _pairs_forward, "linear": _linear_forward}
BACKWARD = {"chunks": _chunks_backward, "pairs": _pairs_backward, "linear": _linear_backward}

# ------------------------------------------------------------------------------------ the operators


@operator("mix", lambda *a: Call(*a).like_outputs(), f"({ARGUMENTS}) -> (Tensor, Tensor)")
def mix_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and 1 / (denominator + eps), float32 `[B, H, N]`."""
    call = Call(*arguments)
    out, inv_denom = call.like_outputs()
    if not call.normalise:
        inv_denom.fill_(1.0)
    call.values.update(OUT=out, INV_DENOM=inv_denom, DO=None)
    FORWARD[call.plan.forward](call)
    return out, inv_denom


@operator(
    "mix_backward", lambda grad, out, inv_denom, *a: Call(*a).like_inputs(),
    f"(Tensor grad, Tensor out, Tensor inv_denom, {ARGUMENTS}) -> (Tensor, Tensor)",
)  # fmt: skip
def mix_backward(
    grad: Tensor, out: Tensor, inv_denom: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of `projected` and, as `Call.like_inputs` has it, of `decay`."""
    call = Call(*arguments)
    dqkv, ddecay = call.like_inputs()
    written = 3 * call.dim + (call.num_curves if call.decays[0] == "gates" else 0)
    dqkv[..., written * call.heads :] = 0
    call.values.update(OUT=out, INV_DENOM=inv_denom, DO=grad.contiguous(), DQKV=dqkv)
    BACKWARD[call.plan.backward](call, ddecay)
    return dqkv, ddecay


def _save(ctx, inputs, output):
    ctx.options = inputs[5:]
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    decay = ctx.saved_tensors[3]
    dprojected, ddecay = mix_backward(grad, *ctx.saved_tensors, *ctx.options)
    if decay is not None:
        ddecay = ddecay.sum((1, 3)) if decay.dim() == 2 else ddecay
        decay = ddecay.to(decay.dtype)
    return dprojected, decay, *(None,) * 11


torch.library.register_autograd("lion::mix", _gradients, setup_context=_save)
