"""The custom operator `lion::mix` and its gradient: what `torch.compile` and export see."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lion_kernels import chunks, decay, linear, pairs, tuning
from lion_kernels.launches import Launches, operator

# Of every operator of the mixer, as in `lion_kernels.mix`: tensors, then options.
ARGUMENTS = (
    "Tensor projected, Tensor? decay, Tensor? curves, Tensor? valid, Tensor? documents, "
    "SymInt heads, SymInt dim, SymInt num_curves, SymInt prefix, bool lit, str features, "
    "bool normalise, float eps"
)
NUM_TENSORS = 5


class Call(Launches):
    """One call of an operator: how it is cut, and what its launches have in common."""

    def __init__(self, tensors: Sequence[Tensor | None], options: tuple[Any, ...]):
        super().__init__(tensors, options)
        self.qkv, self.decay, self.curves, valid, documents, *results = tensors
        heads, dim, num_curves, prefix, lit, features, normalise, eps = options
        self.heads, self.dim, self.num_curves = heads, dim, num_curves
        b, n, width = self.qkv.shape
        if n * width >= 2**31:  # offsets in a sequence are int32
            raise ValueError(f"{n} tokens of {width} columns are too many for the kernels: give "
                             "sequences of less than 2**31 numbers.")  # fmt: skip
        no_decay = lit and documents is None
        self.plan = tuning.make_plan(n, dim, self.qkv.element_size(), num_curves, no_decay)
        self.num_chunks, self.sequences = triton.cdiv(n, self.plan.chunk), b * heads
        self.chunks = (self.sequences * self.num_chunks,)  # as a grid: programs of one each
        self.tiles = (self.chunks[0] * (self.plan.size // self.plan.block),)
        rank = 0 if self.decay is None else self.decay.dim()
        kind = "none" if lit else {0: "gates", 2: "head", 4: "logs"}[rank]
        strides = {"gates": (heads, n * width, width), "logs": (b * n * heads, n * heads, heads)}
        strides = strides.get(kind, (heads, 0, 0))
        self.by_token = self.plan.backward == "pairs"
        self.alike = kind in ("head", "none") and valid is None and documents is None
        # Arguments of kernels by name; it grows by results.
        self.values = {
            "QKV": self.qkv, "n": n, "stride_n": width, "heads": heads, "D": dim,
            "DECAY": self.qkv if lit else self.of_curve(0, self.qkv, self.decay),
            "DECAYS": kind, **dict(zip(("decay_c", "decay_b", "decay_n"), strides, strict=True)),
            "prefix": prefix if kind == "gates" else 0, "CURVE": self.curves,
            "VALID": None if valid is None else valid.view(torch.uint8),
            "DOCUMENTS": documents, "STATES": None, "VECTORS": None, "TABLE": None,
            "NUM_CURVES": num_curves, "curve_weight": 1 / num_curves, "eps": eps,
            "CHUNK": self.plan.chunk, "BLOCK": self.plan.block, "SIZE": self.plan.size,
            "tiles": self.plan.size // self.plan.block,
            "FEATURES": features, "NORMALISE": normalise, "DO": None, "PLACES": None,
        }  # fmt: skip
        self.values.update(zip(("OUT", "INV_DENOM", "DO", "DQKV", "DDECAY"), results, strict=False))

    def like_out(self) -> Tensor:
        """`[B, N, H * D]` in the dtype of `qkv`."""
        b, n, _ = self.qkv.shape
        return self.empty(b, n, self.heads * self.dim, dtype=self.qkv.dtype)

    def of_curve(self, c: int, qkv: Tensor, decay: Tensor | None) -> Tensor:
        """Where curve `c` has its decays, or their gradients, in tensors like these."""
        return qkv[..., (3 * self.dim + c) * self.heads :] if decay is None else decay[c]

    def launch(self, kernel: triton.JITFunction, grid: tuple, options: dict, **own: Any) -> None:
        """The kernel takes from `values` what is not its `own`; `options` go before them."""
        own = {**options, **own}
        shared = {name: self.values[name] for name in kernel.arg_names if name not in own}
        super().launch(kernel, grid, **shared, **own)

    def sum_decays(self) -> None:
        """SUMS `[C, B, H, chunks, NUM_VECTORS, size]`, a stride of 0 where images are alike; if
        they are by token, also PLACES `[C, size]`, each token's step on the curves, and TABLE."""
        b, size = self.qkv.shape[0], self.plan.size
        shape = (self.num_curves, 1 if self.alike else b, self.heads, self.num_chunks)
        sums = self.empty(*shape, decay.NUM_VECTORS.value, size)
        if self.by_token:
            self.values["PLACES"] = self.empty(self.num_curves, size, dtype=torch.int32)
        own = {"SUMS": sums, "images": shape[1]}
        self.launch(decay.decay_cumsum_kernel, (math.prod(shape),), {"num_warps": 1}, **own)
        sums = sums.expand(-1, b, -1, -1, -1, -1)
        self.values.update(SUMS=sums, sums_c=sums.stride(0), sums_b=sums.stride(1))
        if self.by_token and self.alike:
            self.values["TABLE"] = self.empty(self.heads, size, size, dtype=self.qkv.dtype)
            self.launch(pairs.mask_table_kernel, (self.heads * size // self.plan.block,), {})

    def along_curves(self) -> Iterator[int]:
        """One curve after the other, which `values` then has."""
        sums = self.values["SUMS"]
        for c in range(self.num_curves):
            curve = None if self.curves is None else self.curves[c]
            last = c == self.num_curves - 1
            self.values.update(SUMS=sums[c], CURVE=curve, ADD=c > 0, LAST=last, NUM_CURVES=1)
            yield c


def _enter_states(call: Call, num_states: int) -> None:
    """States that enter each chunk: two of keys, and two of queries if there shall be four."""
    if call.num_chunks == 1:
        return
    if call.values["STATES"] is None:
        shape = (*call.chunks, num_states, call.dim)
        entering = call.empty(*shape, call.dim, dtype=call.qkv.dtype)
        call.values.update(STATES=entering, VECTORS=call.empty(*shape), NUM_STATES=num_states)
    for of_queries in (False, True)[: num_states // 2]:
        call.launch(chunks.chunk_state_kernel, call.chunks, call.plan.state, OF_QUERIES=of_queries)
    part = min(call.dim**2, 1024)
    grid = (call.sequences, num_states, call.dim**2 // part + 1)
    call.launch(chunks.state_passing_kernel, grid, {}, PART=part, GROUP=4)


def _sum_keys(call: Call) -> None:
    """The state of the keys, a mean over this many tokens."""
    tokens = float(call.num_chunks * call.plan.chunk)
    call.values.update(
        STATES=call.empty(*call.chunks, call.dim, call.dim),
        VECTORS=call.empty(*call.chunks, call.dim), eps=call.values["eps"] / tokens,
        out_scale=1.0 if call.values["NORMALISE"] else tokens,
    )  # fmt: skip
    call.launch(linear.key_state_kernel, call.chunks, call.plan.state)


def _gate_gradients(call: Call, parts: Tensor, c: int, curves: int) -> None:
    """Gradients of gates, or logs, of `curves` curves from `c` on, or `parts` of those of heads."""
    if call.values["DECAYS"] == "none":
        return
    into = {"gates": None, "head": parts, "logs": call.values["DDECAY"]}[call.values["DECAYS"]]
    grad = call.of_curve(c, call.values["DQKV"], into)
    options = {"num_warps": 1 if call.num_chunks == 1 else 4}
    own = {"DECAY": call.of_curve(c, call.qkv, call.decay), "GRAD": grad, "width": grad.shape[-1],
           "filled": (call.num_curves - c) * call.heads}  # fmt: skip
    call.launch(decay.gate_bwd_kernel, (*call.chunks, curves), options, **own)


def _forward(call: Call) -> None:
    if call.plan.forward == "linear":
        _sum_keys(call)
        call.launch(linear.mix_fwd_kernel, call.chunks, call.plan.fwd)
        return
    call.sum_decays()
    if call.plan.forward == "pairs":
        call.values.update(PHI_K=call.like_out())
        call.launch(pairs.key_feature_kernel, call.tiles, {})
        call.launch(pairs.mix_fwd_kernel, call.tiles, call.plan.fwd)
    elif call.by_token:  # along all curves at once
        call.launch(chunks.mix_fwd_kernel, call.chunks, call.plan.fwd, CURVE=None, ADD=False)
    else:
        for _ in call.along_curves():
            _enter_states(call, 2)
            call.launch(chunks.mix_fwd_kernel, call.chunks, call.plan.fwd)


def _backward(call: Call) -> None:
    if call.plan.backward == "linear":
        _sum_keys(call)
        for name in ("STATES", "VECTORS"):
            call.values[f"QUERY_{name}"] = call.empty(*call.values[name].shape)
        call.launch(linear.mix_bwd_dq_kernel, call.chunks, call.plan.dq)
        call.launch(linear.mix_bwd_dkv_kernel, call.chunks, call.plan.dkv)
        return
    call.sum_decays()
    rows = (call.sequences, call.qkv.shape[1])
    parts = call.empty(call.num_curves, *call.chunks)
    call.values.update(PHI_Q=call.like_out(), PHI_K=call.like_out(), DELTA=call.empty(*rows))
    if call.plan.backward == "pairs":
        call.values["DLOG_MASK"] = call.empty(*parts.shape, 6, call.plan.size)
        call.launch(pairs.key_feature_kernel, call.tiles, {})
        call.launch(pairs.mix_bwd_kernel, call.tiles, call.plan.dq, KEYS=False)
        call.launch(pairs.mix_bwd_kernel, call.tiles, call.plan.dkv, KEYS=True)
        if call.values["TABLE"] is None:
            _gate_gradients(call, parts, 0, call.num_curves)
    else:
        call.values["DLOG_MASK"] = call.empty(*call.chunks, 6, call.plan.size)
        call.values["DQ_RESIDUAL"] = call.empty(*rows)
        for c in call.along_curves():
            _enter_states(call, 4)
            call.launch(chunks.mix_bwd_dq_kernel, call.chunks, call.plan.dq)
            call.launch(chunks.mix_bwd_dkv_kernel, call.tiles, call.plan.dkv)
            _gate_gradients(call, parts, c, 1)
    if call.values["DECAYS"] == "head":
        own = {"PARTS": parts, "length": call.num_chunks, "stride": call.num_chunks}
        if call.values["TABLE"] is not None:  # sums of g_ij t_ij by query
            parts, stride = call.values["DLOG_MASK"], 6 * call.plan.size
            own = {"PARTS": parts, "length": rows[1], "stride": stride}
        grid = (call.num_curves * call.heads,)
        call.launch(decay.head_bwd_kernel, grid, {}, images=call.qkv.shape[0], **own)


def like_outputs(projected: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    (b, n, _), (heads, dim) = projected.shape, arguments[NUM_TENSORS - 1 :][:2]
    rows = projected.new_empty((b, heads, n), dtype=torch.float32)
    return projected.new_empty((b, n, heads * dim)), rows


def like_inputs(projected: Tensor, decay: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    ddecay = projected.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    return projected.new_empty(projected.shape), ddecay


@operator(
    "mix_backward", lambda grad, out, inv_denom, *arguments: like_inputs(*arguments),
    f"(Tensor grad, Tensor out, Tensor inv_denom, {ARGUMENTS}) -> (Tensor, Tensor)",
)  # fmt: skip
def mix_backward(
    grad: Tensor, out: Tensor, inv_denom: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of `projected` and, if there is one, of `decay`."""
    dqkv, ddecay = like_inputs(*arguments)
    if not dqkv.numel():
        ddecay.zero_()
    tensors = (*arguments[:NUM_TENSORS], out, inv_denom, grad, dqkv, ddecay)
    Call.run(_backward, tensors, arguments[NUM_TENSORS:])
    return dqkv, ddecay


@operator(
    "mix", like_outputs, f"({ARGUMENTS}) -> (Tensor, Tensor)", mix_backward, NUM_TENSORS, slice(2)
)
def mix_operator(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H * D]` and 1 / (denominator + eps), float32 `[B, H, N]`."""
    out, inv_denom = like_outputs(*arguments)
    if not arguments[-2]:  # normalise
        inv_denom.fill_(1.0)
    tensors = (*arguments[:NUM_TENSORS], out, inv_denom)
    Call.run(_forward, tensors, arguments[NUM_TENSORS:])
    return out, inv_denom
