"""LION: bidirectional linear attention (arXiv 2502.16249) and its vision transformers.

One mixer, `y_i = sum_j M_ij (q_i . k_j) v_j / (sum_j M_ij (q_i . k_j) + eps)`, in three formats
that give the same result: `attention` (quadratic, parallel), `recurrence` (one state per direction)
and `chunk` (quadratic within a chunk, states carried between chunks).

All three share one signature:

    format(q, k, v, log_decay=None, curves=None, documents=None, *, chunk_size)
        -> (numerator, denominator)

- `q`, `k`: `[B, H, N, D]`, feature maps applied and `q` scaled; `v`: `[B, H, N, E]`.
- `log_decay`: log of the decay `a` in (0, 1] of each token, `[C, B or 1, H, N]` for C curves, in
  token order, float32 or wider; None means `a = 1` (LION-Lit), where curves have no effect.
- `curves`: int64 `[C, N]`, the token visited at each step (see `curves.py`); None is token order.
- `documents`: integers `[B, N]`, equal within a document; different documents do not mix. The
  tokens of a document must be contiguous on every curve. None means one document.
- numerator `[B, H, N, E]` and denominator `[B, H, N, 1]`, averaged over the C curves.

With positions counted along a curve, `M_ij = a_j ... a_(i-1)` for i > j, its mirror image
`a_(i+1) ... a_j` for i < j, and 1 on the diagonal.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import (
    Attention,
    Block,
    VisionTransformer,
    checkpoint_filter_fn,
)
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import lion_kernels
from curves import check_order, inverse, num_curves, scan_curves
from decays import DECAY_INITS, decay_logits, start_exponents

# Products of decays are clamped at exp(LEAST_LOG): negligible beside a token's own weight 1,
# but far from subnormal numbers, for which a CPU's exp and matrix products are 100 times slower.
LEAST_LOG = -64.0

# ------------------------------------------------------------------------------------ the formats


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    curves: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """The formula evaluated directly: time and memory quadratic in N; `chunk_size` is not used."""
    weights = q @ k.transpose(2, 3)
    if log_decay is not None:
        weights = weights * decay_mask(log_decay, curves).to(weights.dtype)
    if documents is not None:
        weights = weights * _same(documents[:, None])
    denominator = weights.sum(-1, keepdim=True, dtype=_state_dtype(v))
    return weights @ v, denominator


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    curves: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """One pass over the tokens, with both directions of every curve in parallel.

    Without gradients it holds one `[D, E + 1]` state per direction and curve and one output per
    token; `chunk_size` is not used.
    """
    n, dtype = q.shape[2], _state_dtype(v)
    if curves is None:
        curves = torch.arange(n, device=q.device)[None]
    steps = torch.cat([curves, curves.flip(1)]).T  # [N, S]: S = 2C scans, the forward ones first
    state = q.new_zeros(*q.shape[:2], steps.shape[1], q.shape[3], v.shape[3] + 1, dtype=dtype)
    out = q.new_zeros(*v.shape[:3], v.shape[3] + 1, dtype=dtype)
    following = steps.roll(-1, 0)
    # Gathering copies tokens, so do a few at a time; but a gather's gradient has the size of its
    # source, so do all at once when gradients are needed.
    parts: Iterable[tuple[Tensor, Tensor]] = [(steps, following)]
    if not torch.is_grad_enabled() and not _varies(n):
        parts = zip(steps.split(16), following.split(16), strict=True)
    for tokens, after in parts:  # [T, S]
        gathered = (x.index_select(2, tokens.flatten()).to(dtype) for x in (q, k, v))
        q_t, k_t, v_t = (x.unflatten(2, tokens.shape) for x in gathered)  # [B, H, T, S, D]
        v_t = _with_ones(v_t)
        decays = _decays_at(tokens, after, log_decay, documents)
        inputs = (q_t, k_t, v_t) if decays is None else (q_t, k_t, v_t, decays)
        state, reads = _scan(_visit, state, inputs)
        own = (q_t * k_t).sum(-1, keepdim=True) / 2 * v_t  # half of the diagonal per direction
        seen = reads.squeeze(4) + own
        for s, visited in enumerate(tokens.unbind(1)):
            out.index_add_(2, visited, seen[:, :, :, s])
    out = out / curves.shape[0]
    return out[..., :-1], out[..., -1:]


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    curves: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Chunk-parallel: time and memory linear in N at a fixed `chunk_size`, backward included."""
    if log_decay is None and documents is None:  # every query reads the same state
        out = q @ (k.transpose(2, 3) @ _with_ones(v))
        return out[..., :-1], out[..., -1:]
    if log_decay is None:
        log_decay = q.new_zeros(1, 1, 1, q.shape[2], dtype=_state_dtype(q))
    if curves is None:
        out = _chunk_scan(q, k, v, log_decay[0], documents, chunk_size)
    else:
        scans = []
        for curve, decay in zip(curves.unbind(0), log_decay.unbind(0), strict=True):
            q_c, k_c, v_c, decay_c = (x.index_select(2, curve) for x in (q, k, v, decay))
            parts = None if documents is None else documents.index_select(1, curve)
            scan = _chunk_scan(q_c, k_c, v_c, decay_c, parts, chunk_size)
            scans.append(scan.index_select(2, inverse(curve)))
        out = sum(scans[1:], scans[0]) / len(scans)
    return out[..., :-1], out[..., -1:]


FORMATS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "Attention": attention,
    "RNN": recurrence,
    "Chunk": chunk,
}


def decay_mask(log_decay: Tensor, curves: Tensor | None = None) -> Tensor:
    """Dense mask M, the mean over curves: `[C, B or 1, H, N]` -> `[B or 1, H, N, N]`.

    With sums `x[t] = sum_(s<t) l[s]` and `y[t] = sum_(s<=t) l[s]` of the log decays along a curve,
    `log M_ij = min(x_i - x_j, y_j - y_i)` for every pair.
    """
    masks = []
    for c, decay in enumerate(log_decay.unbind(0)):
        if curves is None:
            x, y = _running_sums(decay)
        else:
            sums = _running_sums(decay.index_select(2, curves[c]))
            x, y = (s.index_select(2, inverse(curves[c])) for s in sums)
        masks.append(_local_mask(x, y))
    return sum(masks[1:], masks[0]) / len(masks)


def _chunk_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, documents: Tensor | None, chunk_size: int
) -> Tensor:
    """`sum_j M_ij (q_i . k_j) [v_j, 1]` along one curve; `log_decay` is `[B or 1, H, N]`."""
    n = q.shape[2]
    if _varies(n):  # always pad, as an export would fix whether it is needed
        size, padding = chunk_size, chunk_size - n % chunk_size
    else:
        size = min(chunk_size, n)
        padding = -n % size
    start = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3] + 1, dtype=log_decay.dtype)
    # Padded keys are zero and their decay is 1: they change nothing.
    q, k = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, size)) for x in (q, k))
    v = F.pad(v, (0, 1, 0, padding), value=1.0).unflatten(2, (-1, size))
    x, y = _running_sums(F.pad(log_decay, (0, padding)).unflatten(2, (-1, size)))
    total = y[..., -1:]
    weights, to_later, to_earlier = _local_mask(x, y), _exp(total - x), _exp(y)
    of_earlier, of_later = _exp(x), _exp(total - y)
    forwards = backwards = _exp(total)  # the decay of a state that crosses the chunk
    if documents is not None:
        parts = F.pad(documents, (0, padding), value=-1)[:, None].unflatten(2, (-1, size))
        first, last = parts[..., :1], parts[..., -1:]
        # No state enters before the first chunk or after the last one: any value will do.
        before, after = last.roll(1, 2), first.roll(-1, 2)
        weights = weights * _same(parts)
        to_later, forwards = to_later * (parts == last), forwards * (before == last)
        to_earlier, backwards = to_earlier * (parts == first), backwards * (after == first)
        of_earlier, of_later = of_earlier * (parts == before), of_later * (parts == after)

    def scaled(features: Tensor, factors: Tensor) -> Tensor:
        return features * factors.unsqueeze(-1).to(features.dtype)

    from_earlier = _carry(start, scaled(k, to_later).transpose(3, 4) @ v, forwards)
    from_later = _carry(start, scaled(k, to_earlier).transpose(3, 4) @ v, backwards, reverse=True)
    out = ((q @ k.transpose(3, 4)) * weights.to(q.dtype)) @ v
    out += scaled(q, of_earlier) @ from_earlier.to(q.dtype)
    out += scaled(q, of_later) @ from_later.to(q.dtype)
    return out.flatten(2, 3)[:, :, :n]


def _decays_at(
    tokens: Tensor, following: Tensor, log_decay: Tensor | None, documents: Tensor | None
) -> Tensor | None:
    """Decay of the states after each of T steps, `[B or 1, H or 1, T, S, 1, 1]`.

    It is that of the tokens `[T, S]` visited, and 0 where a document ends, that is where the
    `following` tokens `[T, S]` belong to another.
    """
    remains = None
    if log_decay is not None:
        scans = torch.cat([log_decay, log_decay]).movedim(0, 3)  # [B or 1, H, N, S]
        remains = scans.gather(2, tokens.expand(*scans.shape[:2], -1, -1)).exp()
    if documents is not None:
        goes_on = (documents[:, tokens] == documents[:, following]).unsqueeze(1)
        remains = goes_on if remains is None else remains * goes_on
    return None if remains is None else remains[..., None, None]


def _visit(state: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """One step of every scan: the next state, and what the query reads from this one."""
    query, key, value, *decay = inputs
    read = query.unsqueeze(3) @ state
    state = state + key.unsqueeze(4) * value.unsqueeze(3)
    return (state * decay[0] if decay else state), read


def _hand_on(state: Tensor, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One chunk: the state after it and the state before it."""
    decay, added = inputs
    return torch.addcmul(added, decay, state), state


def _carry(state: Tensor, added: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """State before each chunk, `[B, H, M, D, E]`: `S_(m+1) = decay_m S_m + added_m` from `state`.

    `reverse` goes from the last chunk to the first.
    """
    return _scan(_hand_on, state, (decay.unsqueeze(-1), added.to(state.dtype)), reverse)[1]


def _scan(
    step: Callable[..., tuple[Tensor, Tensor]],
    state: Tensor,
    inputs: tuple[Tensor, ...],
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`state, read = step(state, inputs_t)` along dimension 2: the last state, and all reads."""
    if _varies(inputs[0].shape[2]):

        def separate(state: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            state, read = step(state, inputs)
            return state, read.clone()  # the operator's outputs must not alias

        # Copies, as the operator compiles `step`, and guards on views break the next export.
        tensors = [x.clone() for x in (state, *(x.movedim(2, 0) for x in inputs))]
        if torch.onnx.is_in_onnx_export():  # which cannot convert the gradient of the operator
            tensors = [x.detach() for x in tensors]
        state, reads = scan(separate, tensors[0], tuple(tensors[1:]), reverse=reverse)
        return state, reads.movedim(0, 2)
    along = list(zip(*(x.unbind(2) for x in inputs), strict=True))
    reads = []
    for now in reversed(along) if reverse else along:
        state, read = step(state, now)
        reads.append(read)
    return state, torch.stack(reads[::-1] if reverse else reads, dim=2)


def _varies(length: int | torch.SymInt) -> bool:
    """Whether a length is dynamic in an export, where a loop would fix it."""
    return isinstance(length, torch.SymInt) and torch.compiler.is_exporting()


def _running_sums(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Exclusive and inclusive sums over the last dimension."""
    y = log_decay.cumsum(-1)
    return F.pad(y[..., :-1], (1, 0)), y


def _local_mask(x: Tensor, y: Tensor) -> Tensor:
    forward = x.unsqueeze(-1) - x.unsqueeze(-2)
    backward = y.unsqueeze(-2) - y.unsqueeze(-1)
    return torch.minimum(forward, backward).clamp_(min=LEAST_LOG).exp_()


def _same(documents: Tensor) -> Tensor:
    """Which pairs of tokens belong to one document: `[..., N]` -> `[..., N, N]`."""
    return documents.unsqueeze(-1) == documents.unsqueeze(-2)


def _exp(log_product: Tensor) -> Tensor:
    return log_product.clamp(min=LEAST_LOG).exp()


def _with_ones(v: Tensor) -> Tensor:
    """Appends a column of ones, so that numerator and denominator come from one product."""
    return F.pad(v, (0, 1), value=1.0)


def _state_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ------------------------------------------------------------------------------------ the function


def lion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    curves: Tensor | None = None,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    normalise: bool = True,
    eps: float = 1e-6,
    format: str = "Attention",
    chunk_size: int = 32,
) -> Tensor:
    """Bidirectional linear attention for other models, in kernels where available.

    `y_i = sum_j M_ij s_ij v_j / (sum_j M_ij s_ij + eps)` with `s_ij = scale q_i . k_j`, and M the
    mask of decays defined at the top of this file; without `normalise`, only the numerator.

    - `q`, `k`: `[B, N, H, D]`, feature maps applied. If `normalise`, every `q_i . k_j` must be
      positive, as with positive features. `v`: `[B, N, H, E]`. All three have the same dtype,
      float16, bfloat16, float32 or float64, and finite, padding included.
    - `log_decay`: log of the decay of each token, at most 0 (not checked), float32 or float64
      `[B, N, H]`, or `[C, B, N, H]` for C curves; None means no decay.
    - `curves`: int64 `[C, N]`, each row a permutation of the tokens (not checked): the token
      visited at each step. None means token order, C = 1. The masks of the curves are averaged.
    - `valid`: bool `[B, N]`, False for padding: keys that count nowhere, with a decay of 1.
    - `documents`: int32 or int64 `[B, N]`, equal within a document; documents do not mix, and each
      must be contiguous (not checked). Not supported with curves.
    - `scale`: factor of the products, by default `D**-0.5`.
    - `format`, `chunk_size`: how the same function is computed, "Attention", "RNN" or "Chunk", and
      the tokens per chunk. In kernels "Attention" and "Chunk" are the same, with their own chunk.

    Kernels run on a CUDA device, for E = D of 16, 32, 64 or 128, in float16 and bfloat16, and in
    float32 without gradients; "RNN" only without gradients. Autocast changes no dtype in here.

    Returns `[B, N, H, E]` in the dtype of `v`, with gradients for `q`, `k`, `v` and `log_decay`.
    Raises ValueError for shapes, dtypes and devices that do not fit, for documents along curves, an
    unknown format, and a chunk_size below 1.
    """
    _check_format(format, chunk_size)
    _check_tokens(q, k, v)
    _check_masks(q, log_decay, curves, valid, documents)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if log_decay is None:
        curves = None
    elif log_decay.dim() == 3:
        log_decay = log_decay[None]
    leaves = (q, k, v) if log_decay is None else (q, k, v, log_decay)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
    tensors = (q, k, v, log_decay, curves, valid, documents)
    options: dict[str, Any] = {"format": format, "normalise": normalise, "eps": eps}
    if v.shape == q.shape and _has_kernel(format, q.device, q.dtype, q.shape[3], trained):
        return _attend_by_kernel(*tensors, scale=scale, **options)
    return _attend_by_format(*tensors, scale=scale, chunk_size=chunk_size, **options)


def _attend_by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    *,
    scale: float,
    format: str,
    normalise: bool,
    eps: float,
) -> Tensor:
    """As `lion_attention`; log decays are `[C, B, N, H]`."""
    heads, dim = q.shape[2:]
    if scale != dim**-0.5:  # the scale built into the kernels
        q = q * (scale * dim**0.5)
    y = lion_kernels.mix(
        torch.stack((q, k, v), dim=2).flatten(2),
        None if log_decay is None else log_decay.float(),
        curves,
        valid,
        documents,
        heads=heads,
        dim=dim,
        scans=1 if log_decay is None else log_decay.shape[0],
        lit=log_decay is None,
        features="none",
        normalise=normalise,
        eps=eps,
        recurrent=format == "RNN",
    )
    return y.unflatten(2, (heads, dim))


def _attend_by_format(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *tensors: Any, scale: float,
    **options: Any,
) -> Tensor:  # fmt: skip
    """As `_attend_by_kernel`, with an output as wide as `v`."""
    q, k, v = (t.transpose(1, 2) for t in (q * scale, k, v))
    if log_decay is not None:  # clamped, as a decay of 0 has no finite sums
        log_decay = log_decay.to(_state_dtype(v)).clamp(min=LEAST_LOG).transpose(2, 3)
    with torch.autocast(q.device.type, enabled=False):
        return _mix_by_format(q, k, v, log_decay, *tensors, **options).transpose(1, 2)


def _mix_by_format(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
    *,
    format: str,
    chunk_size: int,
    normalise: bool,
    eps: float,
) -> Tensor:
    """`[B, H, N, E]` in the dtype of `v`, without kernels; tensors are those of the formats."""
    dtype = v.dtype
    if dtype == torch.float16:  # its range ends below 1 / eps, the gradient of rows without keys
        q, k, v = q.float(), k.float(), v.float()
    if valid is not None:
        k = k * valid[:, None, :, None]
        log_decay = log_decay if log_decay is None else log_decay * valid[:, None]
    numerator, denominator = FORMATS[format](
        q, k, v, log_decay, curves, documents, chunk_size=chunk_size
    )
    y = numerator / (denominator + eps) if normalise else numerator
    return y.to(dtype)


def _has_kernel(
    format: str, device: torch.device, dtype: torch.dtype, dim: int, trained: bool
) -> bool:
    """Whether a format runs in kernels; the kernel of RNN has no gradients."""
    if format == "RNN" and trained:
        return False
    return lion_kernels.available(device, dtype, dim, trained)


def _check_format(format: str, chunk_size: int | None) -> None:
    check_choice("format", format, FORMATS)
    if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 1):
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size!r}: give whole tokens.")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises ValueError if `value` is none of the choices, which it names."""
    if value not in choices:
        names = ", ".join(choice or "''" for choice in choices)
        raise ValueError(f"Unknown {name} {value!r}: choose one of {names}.")


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    given = ", ".join(str(list(t.shape)) for t in (q, k, v))
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q and k must be [B, N, H, D] and v [B, N, H, E], not {given}.")
    if 0 in (*q.shape[1:], *v.shape[1:]):
        raise ValueError(f"q, k and v must not be empty: their shapes are {given}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (*lion_kernels.DTYPES, torch.float64):
        dtypes = ", ".join(str(t.dtype) for t in (q, k, v))
        raise ValueError(f"q, k and v must have one floating-point dtype, not {dtypes}: cast them.")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must be on one device, not {q.device}, {k.device}, {v.device}."
        )


def _check_masks(
    q: Tensor,
    log_decay: Tensor | None,
    curves: Tensor | None,
    valid: Tensor | None,
    documents: Tensor | None,
) -> None:
    if documents is not None and curves is not None:
        raise ValueError("Documents go with token order alone: give no curves.")
    batch, n, heads, _ = q.shape
    scans = len(curves) if curves is not None and curves.dim() == 2 else 1
    without = " without curves" if curves is None else ""
    decays: tuple[int, ...] = (batch, n, heads)
    if log_decay is not None and (log_decay.dim() == 4 or scans != 1):
        decays = (max(scans, 1), *decays)
    for name, tensor, shape, dtypes in (
        ("curves", curves, (max(scans, 1), n), (torch.int64,)),
        (f"log_decay{without}", log_decay, decays, (torch.float32, torch.float64)),
        ("valid", valid, (batch, n), (torch.bool,)),
        ("documents", documents, (batch, n), (torch.int32, torch.int64)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype not in dtypes:
            asked = " or ".join(map(str, dtypes))
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} must be {asked} of shape {list(shape)}, not {given}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, not on {tensor.device}.")


# --------------------------------------------------------------------------------------- the mixer


def elu_plus_one(x: Tensor) -> Tensor:
    """`elu(x) + 1` without the cancellation that rounds it to 0 for large negative `x`."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def normalized_silu(x: Tensor) -> Tensor:
    """`f / |f|_2` over the last dimension, `f = silu(x) + 0.5` (always positive)."""
    return F.normalize(F.silu(x) + 0.5, dim=-1)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Lit": elu_plus_one,
    "Decay": normalized_silu,
    "Selective": normalized_silu,
}
SPREAD_GATES_STD = 0.006  # for weights of gates whose biases start spread out; timm's is 0.02
FEATURE_NAMES: dict[Callable[[Tensor], Tensor] | None, str] = {  # in the kernels
    elu_plus_one: "elu",
    normalized_silu: "silu",
    None: "none",
}


class Masks(NamedTuple):
    """What the mask of a mixer call depends on; all but the first as `forward` takes them."""

    log_decay: Tensor | None
    attn_mask: Any
    valid: Tensor | None = None
    documents: Tensor | None = None


class LionAttention(nn.Module):
    """Token mixer with the interface and parameter names of timm's attention.

    Decay parameters: `a_i` (and `a2_i`, `a3_i`, ... for further curves of the order) is `[H]` for
    `Decay`, a Linear(dim, H) for `Selective`, absent for `Lit`. The first `num_prefix_tokens`
    tokens keep a decay of 1 in `Selective`. `decay_init` is one of `decays.DECAY_INITS`; `paper`
    draws LION-D's decays and leaves gates to their layers' initialisation.

    `qkv`, `proj` and the gates may be wrapped or replaced (LoRA, hooks, quantised, sharded layers):
    anything but a bare Linear is called as a module. Where no kernel runs, a bare gate computes in
    float32, a wrapped one in the dtype of its parameters.

    Without `normalise` the output is only the numerator, followed in `Lit` by a LayerNorm (`norm`),
    because its sums grow with the tokens; without `feature_map` queries and keys are used as they
    are. The published language models have neither.
    """

    eps = 1e-6

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mask_type: str = "Decay",
        order: str = "Normal",
        format: str = "Attention",
        chunk_size: int = 32,
        decay_init: str = "paper",
        num_prefix_tokens: int = 1,
        normalise: bool = True,
        feature_map: bool = True,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_choice("mask_type", mask_type, FEATURE_MAPS)
        check_order(order)
        check_choice("decay_init", decay_init, DECAY_INITS)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"The width {dim} is not divisible by {num_heads} heads.")
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.mask_type = mask_type
        self.decay_init = decay_init
        self.num_prefix_tokens = num_prefix_tokens
        self.normalise = normalise
        self.feature_map = FEATURE_MAPS[mask_type] if feature_map else None
        self.set_format(format, chunk_size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **placed)
        grows = mask_type == "Lit" and not normalise
        self.norm = nn.LayerNorm(dim, **placed) if grows else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **placed)
        self.proj_drop = nn.Dropout(proj_drop)
        names = ("a_i", *(f"a{c}_i" for c in range(2, num_curves(order) + 1)))
        self.gate_names = () if mask_type == "Lit" else names
        for name in self.gate_names:
            if mask_type == "Decay":
                setattr(self, name, nn.Parameter(torch.empty(num_heads, **placed)))
            else:
                setattr(self, name, nn.Linear(dim, num_heads, **placed))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the decays; the layers' own `reset_parameters` come first."""
        if self.mask_type == "Decay" and self.decay_init == "paper":
            for gate in self._gates():
                nn.init.normal_(gate)
        self.spread_decays()

    @torch.no_grad()
    def spread_decays(self, layer: int = 0, depth: int = 1) -> None:
        """Initialises decays of layer `layer` of `depth` by `decay_init`; no effect for `paper`."""
        if self.decay_init == "paper":
            return
        logits = decay_logits(start_exponents(self.decay_init, self.num_heads, layer, depth))
        for gate in self._gates():
            if self.mask_type == "Decay":
                gate.copy_(logits)
            else:
                nn.init.trunc_normal_(gate.weight, std=SPREAD_GATES_STD)
                gate.bias.copy_(-logits)

    def set_format(self, format: str, chunk_size: int | None = None) -> None:
        """Chooses how the same function is computed; None keeps the chunk size."""
        _check_format(format, chunk_size)
        if chunk_size is not None:
            self.chunk_size = chunk_size
        self.format = format

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Log decays `[C, B or 1, H, N]` of `[B, N, dim]`, at least float32; None for Lit."""
        if self.mask_type == "Lit":
            return None
        if self.mask_type == "Decay":
            gates = torch.stack(self._gates())
            decay = F.logsigmoid(gates.to(_state_dtype(gates)))
            return decay[:, None, :, None].expand(-1, 1, -1, x.shape[1])
        logits = rearrange(self._gate_logits(x), "b n (c h) -> c b h n", h=self.num_heads)
        prefix = self.num_prefix_tokens
        return F.pad(F.logsigmoid(-logits[..., prefix:]), (prefix, 0))

    def forward(
        self,
        x: Tensor,
        attn_mask: Any = None,
        is_causal: bool = False,
        *,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Mixes tokens `[B, N, dim]`; timm passes the curves `[C, N]` as `attn_mask`.

        `valid`, bool `[B, N]`, is False for padding: keys that count nowhere, with a decay of 1.
        `documents`, integers `[B, N]`, keeps packed documents apart, as in the formats.
        """
        if is_causal:
            raise ValueError("LION reads in both directions: leave is_causal at False.")
        curves = self._curves(attn_mask)
        if self._has_kernel(x) and (curves is None or documents is None):
            y = self._mix_by_kernel(x, curves, valid, documents)
        else:
            qkv = self.qkv(x)
            with torch.autocast(x.device.type, enabled=False):  # gates and sums keep float32
                y = self._mix(qkv, Masks(self.log_decay(x), attn_mask, valid, documents))
        return self.proj_drop(self.proj(self._completed(self.norm(y), x, attn_mask)))

    def attention_weights(self, x: Tensor, attn_mask: Any = None) -> Tensor:
        """Effective attention `[B, H, N, N]` of tokens `[B, N, dim]`, masked and normalised.

        Row i holds the weights of the values in the output for token i, before `norm` and `proj`.
        `attn_mask` is as in `forward`. Memory is quadratic in N.
        """
        with torch.autocast(x.device.type, enabled=False):
            q, k, _ = self._features(self.qkv(x))
            each_token = torch.eye(x.shape[1], dtype=q.dtype, device=q.device).expand(
                *q.shape[:2], -1, -1
            )
            return self._attend(q, k, each_token, Masks(self.log_decay(x), attn_mask))

    def _curves(self, attn_mask: Any) -> Tensor | None:
        """The curves `[C, N]` in the argument of `forward`; None means token order."""
        return None if self.mask_type == "Lit" else attn_mask

    def _completed(self, y: Tensor, x: Tensor, attn_mask: Any) -> Tensor:
        """The input of `proj`, from the mixed tokens `y` and the input `x`, both `[B, N, dim]`."""
        return y

    def _gates(self) -> list[Any]:
        """`a_i`, and one more for each further curve: parameters in `Decay`, else layers."""
        return [getattr(self, name) for name in self.gate_names]

    def _gate_logits(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` -> `[B, N, C * H]`, at least float32; call it outside autocast."""
        gates, dtype = self._gates(), _state_dtype(x)
        if all(map(_is_bare, gates)):
            return _in_one_product(gates, x.to(dtype))
        return torch.cat([gate(x.to(_dtype_of(gate))).to(dtype) for gate in gates], dim=-1)

    def _has_kernel(self, x: Tensor) -> bool:
        trained = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        device = x.device.type
        amp = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if amp else x.dtype
        return _has_kernel(self.format, x.device, dtype, self.head_dim, trained)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys, values and gate logits, concatenated as the kernels take them."""
        if self.mask_type != "Selective":
            return self.qkv(x)
        layers = [self.qkv, *self._gates()]
        count = (len(layers) - 1) * self.num_heads
        padding = lion_kernels.padded_gates(count) - count
        if all(map(_is_bare, layers)):
            return _in_one_product(layers, x, padding)
        qkv, *logits = (layer(x) for layer in layers)
        logits = [part.to(qkv.dtype) for part in logits]
        return torch.cat([qkv, *logits, qkv.new_zeros(*x.shape[:2], padding)], dim=-1)

    def _kernel_inputs(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`projected` and `decay` of `lion_kernels.mix`; those of a subclass are logs."""
        if type(self).log_decay is LionAttention.log_decay:
            decays = torch.stack(self._gates()).float() if self.mask_type == "Decay" else None
            return self._project(x), decays
        with torch.autocast(x.device.type, enabled=False):
            logs = self.log_decay(x)
        if logs is not None:
            logs = logs.float().transpose(2, 3).expand(-1, len(x), -1, -1)
        return self.qkv(x), logs

    def _mix_by_kernel(
        self, x: Tensor, curves: Tensor | None, valid: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        projected, decay = self._kernel_inputs(x)
        return lion_kernels.mix(
            projected,
            decay,
            curves,
            valid,
            documents,
            heads=self.num_heads,
            dim=self.head_dim,
            scans=max(1, len(self.gate_names)),
            prefix=self.num_prefix_tokens,
            lit=self.mask_type == "Lit" and decay is None,
            features=FEATURE_NAMES[self.feature_map],
            normalise=self.normalise,
            eps=self.eps,
            recurrent=self.format == "RNN",
        )

    def _mix(self, qkv: Tensor, masks: Masks) -> Tensor:
        y = self._attend(*self._features(qkv), masks)
        return rearrange(y, "b h n d -> b n (h d)")

    def _features(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs of the formats, each `[B, H, N, D]`: scaled queries, keys, and values."""
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        scale = q.shape[-1] ** -0.5
        if self.feature_map:
            q, k = (self.feature_map(t.to(_state_dtype(t))) for t in (q, k))
        return (q * scale).to(v.dtype), k.to(v.dtype), v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: Masks, *, normalise: bool | None = None
    ) -> Tensor:
        """`[B, H, N, E]` without kernels, from the inputs of the formats."""
        return _mix_by_format(
            q,
            k,
            v,
            masks.log_decay,
            self._curves(masks.attn_mask),
            masks.valid,
            masks.documents,
            format=self.format,
            chunk_size=self.chunk_size,
            normalise=self.normalise if normalise is None else normalise,
            eps=self.eps,
        )


def _is_bare(layer: nn.Module) -> bool:
    """Whether calling a layer multiplies by its weight and does nothing else."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
        and "forward" not in layer.__dict__
        and not is_traceable_wrapper_subclass(layer.weight)
        and not _has_any_global_hook()
    )


def _in_one_product(layers: list[nn.Linear], x: Tensor, padding: int = 0) -> Tensor:
    """Concatenated outputs of bare layers, `[B, N, dim]` -> `[B, N, W]`, with rows padded by
    at most `padding` of the first columns again, from which no gradient reaches their weights."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [
        layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        for layer in layers
    ]
    if padding:  # repeating existing rows takes the host half the time of zeros
        weights.append(weights[0].detach()[:padding])
        biases.append(biases[0].detach()[:padding])
    return F.linear(x, torch.cat(weights).to(x.dtype), torch.cat(biases).to(x.dtype))


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of its parameters; float32 if it has none, as in quantised layers."""
    dtypes = (p.dtype for p in layer.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


# -------------------------------------------------------------------------- the vision transformer


class LionBlock(Block):
    """timm's pre-norm block around a LION mixer; checkpoints itself, curves included."""

    mixer_class = LionAttention
    grad_checkpointing = False

    def __init__(self, dim: int, num_heads: int, *, mixer: dict[str, Any], **kwargs: Any):
        refused = [name for name in ("qk_norm", "attn_drop", "scale_attn_norm") if kwargs.get(name)]
        if kwargs.get("attn_layer", Attention) not in (Attention, "attn"):
            refused.append("attn_layer")
        if refused:
            raise ValueError(f"LION has no {', '.join(refused)}: leave it at its default.")
        shared = ("qkv_bias", "proj_bias", "proj_drop", "device", "dtype")
        options = {name: kwargs[name] for name in shared if name in kwargs}
        attn = self.mixer_class(dim, num_heads, **options, **mixer)
        super().__init__(dim, num_heads, **kwargs)
        self.attn = attn

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._mixed, x, attn_mask)
        return self._mixed(x, attn_mask)

    def _mixed(self, x: Tensor, attn_mask: Any) -> Tensor:
        return super().forward(x, attn_mask)


POOLS = ("avg", "avgmax", "max", "token", "map", "prr", "")
WEIGHT_INITS = ("", "skip", "reset", "jax", "jax_nlhb", "moco")


class LionVisionTransformer(VisionTransformer):
    """DeiT-shaped vision transformer with LION mixers.

    `cls_tok=False` averages all tokens after the final norm, class token included; `cls_tok=True`
    reads the class token. `pos_emb` adds a learned position embedding. All other arguments are
    those of timm's VisionTransformer, with LION's defaults: `global_pool` overrides `cls_tok`, and
    `pos_embed` ("learn" or "none") `pos_emb`; None is the default. `more_of_mixer` are arguments
    for the mixers of subclasses.

    Raises ValueError for an unknown mask_type, order, format or decay_init, a chunk_size below 1,
    and for timm arguments that have no meaning with these mixers.
    """

    block_class = LionBlock
    blocks: Any  # of block_class

    def __init__(
        self,
        *args: Any,
        mask_type: str = "Decay",
        order: str = "Normal",
        format: str = "Attention",
        chunk_size: int = 32,
        decay_init: str = "paper",
        pos_emb: bool = False,
        cls_tok: bool = False,
        more_of_mixer: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        given = inspect.signature(VisionTransformer).bind_partial(*args, **kwargs).arguments
        options = {
            "global_pool": "token" if cls_tok else "avg",
            "pool_include_prefix": True,
            "fc_norm": False,
            "pos_embed": "learn" if pos_emb else "none",
            "norm_layer": partial(nn.LayerNorm, eps=1e-6),
            **{name: value for name, value in given.items() if value is not None},
        }
        _check_options(order, **options)
        mixer = {"mask_type": mask_type, "order": order, "format": format,
                 "chunk_size": chunk_size, "decay_init": decay_init,
                 **(more_of_mixer or {})}  # fmt: skip
        block_fn: Any = partial(self.block_class, mixer=mixer)
        super().__init__(**options, block_fn=block_fn)
        for block in self.blocks:
            block.attn.num_prefix_tokens = self.num_prefix_tokens
        if options.get("patch_drop_rate"):
            self.patch_drop.ordered = True  # decays depend on the order of the patches
        self.order = order
        self.register_buffer("curves", None, persistent=False)
        self.init_non_persistent_buffers()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        for layer, block in enumerate(self.blocks):
            block.attn.spread_decays(layer, len(self.blocks))

    def init_non_persistent_buffers(self) -> None:
        """Curves over the grid of the model's own input size."""
        device = next(self.parameters()).device
        grid = tuple(self.patch_embed.grid_size)
        self.curves = scan_curves(self.order, grid, self.num_prefix_tokens, device)

    def _apply(self, *args: Any, **kwargs: Any) -> "LionVisionTransformer":
        """Moves or empties the parameters; curves are rebuilt, so `to_empty` keeps them."""
        self.curves = None
        super()._apply(*args, **kwargs)
        self.init_non_persistent_buffers()
        return self

    def set_format(self, format: str, chunk_size: int | None = None) -> None:
        """Switches every block to `Attention`, `RNN` or `Chunk`; the weights serve all three."""
        for block in self.blocks:
            block.attn.set_format(format, chunk_size)

    def decay_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the decays and gates of all blocks, by name."""
        return {
            f"blocks.{i}.attn.{name}": parameter
            for i, block in enumerate(self.blocks)
            for name, parameter in block.attn.named_parameters()
            if name.split(".")[0] in block.attn.gate_names
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        super().set_grad_checkpointing(enable)
        self.grad_checkpointing = False  # blocks checkpoint themselves, curves included
        for block in self.blocks:
            block.grad_checkpointing = enable

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self.init_non_persistent_buffers()

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Like timm's, with a distillation token if there is one; also accepts an empty batch."""
        grid = x.shape[1:3]
        tokens = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
        prefix = [t.expand(x.shape[0], -1, -1) for t in tokens if t is not None]
        x = torch.cat([*prefix, x.flatten(1, -2)], dim=1)
        if self.pos_embed is None:
            return x
        position: Tensor = self.pos_embed
        if self.dynamic_img_size:
            embedded = 0 if self.no_embed_class else self.num_prefix_tokens
            own_grid = self.patch_embed.grid_size
            position = resample_abs_pos_embed(position, list(grid), list(own_grid), embedded)
        if self.no_embed_class:
            position = F.pad(position, (0, 0, self.num_prefix_tokens, 0))
        return self.pos_drop(x + position)

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        _check_no_mask(attn_mask, is_causal)
        return super().forward_features(x, attn_mask=self._curves_for(x))

    def forward_intermediates(
        self,
        x: Tensor,
        *args: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        _check_no_mask(attn_mask, is_causal)
        options = {**kwargs, "attn_mask": self._curves_for(x)}
        return super().forward_intermediates(x, *args, **options)

    def _curves_for(self, x: Tensor) -> Any:
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        known = self.curves is not None and self.curves.device == x.device
        varies = any(isinstance(side, torch.SymInt) for side in grid)  # in an export: do not ask
        if known and not varies and grid == tuple(self.patch_embed.grid_size):
            return self.curves
        return scan_curves(self.order, grid, self.num_prefix_tokens, x.device)


def _check_options(order: str, **options: Any) -> None:
    """Raises ValueError for arguments of timm's VisionTransformer that LION cannot follow."""
    check_choice("global_pool", options["global_pool"], POOLS)
    check_choice("pos_embed", options["pos_embed"], ("learn", "none", ""))
    check_choice("weight_init", options.get("weight_init", ""), WEIGHT_INITS)
    if "block_fn" in options:
        raise ValueError("LION has its own blocks: give no block_fn.")
    check_class_token(**options)
    if options["pos_embed"] != "learn" and options.get("pos_drop_rate"):
        raise ValueError("pos_drop_rate needs a position embedding: add pos_emb=True.")
    if not 0 <= options.get("patch_drop_rate", 0) < 1:
        raise ValueError("patch_drop_rate is a share of the patches: give 0 or more, below 1.")
    if order != "Normal" and options.get("patch_drop_rate"):
        raise ValueError(f"Order {order} needs every patch: leave patch_drop_rate at 0.")


def check_class_token(global_pool: str = "token", class_token: bool = True, **_: Any) -> None:
    """Raises ValueError if the class token, which timm reads by default, is missing."""
    if global_pool == "token" and not class_token:
        raise ValueError(
            "There is no class token to read: leave class_token at True, or choose another "
            "global_pool."
        )


def _check_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("LION has its own masks: give no attn_mask and no is_causal.")


class LionVisionTransformerDistilled(LionVisionTransformer):
    """Adds DeiT's distillation token, after the class token and with decay 1, and its head.

    Returns `(logits, logits of head_dist)`, each `[B, K]`, in training after
    `set_distilled_training()`, else their mean. `global_pool=""` returns all tokens, without heads.
    """

    def __init__(self, *args: Any, reg_tokens: int = 0, weight_init: str = "", **kwargs: Any):
        check_choice("weight_init", weight_init, WEIGHT_INITS)
        super().__init__(*args, reg_tokens=1 + reg_tokens, weight_init="skip", **kwargs)
        both = cast(Tensor, self.reg_token)
        tokens = both.detach().split((1, reg_tokens), dim=1)
        self.dist_token = nn.Parameter(tokens[0].clone())  # the name of DeiT's checkpoints
        self.reg_token = nn.Parameter(tokens[1].clone()) if reg_tokens else None
        self.num_reg_tokens = reg_tokens
        self.distilled_training = False
        _check_classifies_pooled(self.num_classes, self.global_pool)
        self._reset_head_dist()
        self.weight_init_mode = cast(Any, "reset" if weight_init == "skip" else weight_init)
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        super().init_weights(mode, needs_reset)

    def set_distilled_training(self, enable: bool = True) -> None:
        self.distilled_training = enable

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        pool = self.global_pool if global_pool is None else global_pool
        _check_classifies_pooled(num_classes, pool)
        super().reset_classifier(num_classes, global_pool)
        self._reset_head_dist()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        groups = super().group_matcher(coarse)
        return {**groups, "stem": groups["stem"] + "|dist_token"}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        if not self.global_pool:
            return super().forward_head(x, pre_logits)
        place = int(self.has_class_token)
        distillation = self.head_drop(self.fc_norm(x[:, place]))
        if self.pool_include_prefix:
            x = torch.cat([x[:, :place], x[:, place + 1 :]], dim=1)
        x = self.head_drop(self.fc_norm(self.pool(x)))
        if pre_logits:
            return (x + distillation) / 2
        x, distillation = self.head(x), self.head_dist(distillation)
        if self.training and self.distilled_training:
            return x, distillation
        return (x + distillation) / 2

    def _reset_head_dist(self) -> None:
        self.head_dist = copy.deepcopy(self.head)
        if isinstance(self.head_dist, nn.Linear):
            nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
            nn.init.zeros_(self.head_dist.bias)


def _check_classifies_pooled(num_classes: int, global_pool: str) -> None:
    if num_classes and not global_pool:
        raise ValueError(
            "A distilled model classifies pooled tokens: set global_pool or ask for num_classes=0."
        )


def imagenet_cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }


SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # width, heads

default_cfgs = generate_default_cfgs(
    {
        **{f"lion_{size}_patch16_224": imagenet_cfg() for size in SIZES},
        **{
            f"lion_{size}_distilled_patch16_224": imagenet_cfg(classifier=("head", "head_dist"))
            for size in SIZES
        },
    }
)


Model = TypeVar("Model", bound=LionVisionTransformer)


def create_variant(
    model_class: type[Model], variant: str, pretrained: bool, **kwargs: Any
) -> Model:
    """The model registered as `variant`, whose name contains one of `SIZES`."""
    embed_dim, num_heads = next(SIZES[size] for size in SIZES if f"_{size}_" in variant)
    defaults = {"patch_size": 16, "embed_dim": embed_dim, "depth": 12, "num_heads": num_heads}
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**defaults, **kwargs},
    )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Any:
    distilled = "distilled" in variant
    model_class = LionVisionTransformerDistilled if distilled else LionVisionTransformer
    return create_variant(model_class, variant, pretrained, **kwargs)


@register_model
def lion_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LionVisionTransformer:
    return _create("lion_tiny_patch16_224", pretrained, **kwargs)


@register_model
def lion_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LionVisionTransformer:
    return _create("lion_small_patch16_224", pretrained, **kwargs)


@register_model
def lion_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> LionVisionTransformer:
    return _create("lion_base_patch16_224", pretrained, **kwargs)


@register_model
def lion_tiny_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionVisionTransformerDistilled:
    return _create("lion_tiny_distilled_patch16_224", pretrained, **kwargs)


@register_model
def lion_small_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionVisionTransformerDistilled:
    return _create("lion_small_distilled_patch16_224", pretrained, **kwargs)


@register_model
def lion_base_distilled_patch16_224(
    pretrained: bool = False, **kwargs: Any
) -> LionVisionTransformerDistilled:
    return _create("lion_base_distilled_patch16_224", pretrained, **kwargs)
