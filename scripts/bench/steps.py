"""How a case runs: its tensors and models, and one step of them as a function."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import isqrt

import timm
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.optim import AdamW, Optimizer

import lion_kernels
import models_hydra  # noqa: F401, registers models, as the next does
import models_lion
import models_vim  # noqa: F401
from compilation import CUDA_GRAPHS, begin_step, compile_in_place
from curves import scan_curves
from scripts.bench import cases
from scripts.bench.cases import BACKENDS, MODELS, Case

torch._functorch.config.enable_autograd_cache = False  # its key does not tell the backend
DIM = 64  # of every head
HEADS = {scale: heads for scale, (_, heads) in models_lion.SIZES.items()}
Prepared = tuple[Callable[[], object], list[Tensor]]  # a step, and what is held between two


@dataclass
class Step:
    """A step of a case, and the turns that it has taken, in seconds."""

    case: Case
    run: Callable[[], object]
    context: Callable[[], AbstractContextManager]  # in which it runs
    held: int  # bytes between two runs
    taken: list[float] = field(default_factory=list)

    def fits(self, budget: float) -> bool:
        """Whether there is time for another turn; the first run tells how long that takes."""
        turn = self.taken[-1] if self.taken else self.case.seconds * self.case.iterations
        return not self.case.note and sum(self.taken) + turn <= budget


def prepare(case: Case) -> Step:
    """Builds what the case needs, on its device, and counts its parameters."""
    context = partial(sdpa_kernel, BACKENDS[case.form]) if case.form in BACKENDS else nullcontext
    run, tensors = STEPS[case.step](case)
    case.parameters = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
    return Step(case, run, context, sum(t.nbytes for t in tensors))


# --------------------------------------------------------------------------------- the mixer alone


def mixer_step(case: Case) -> Prepared:
    """From what the Linear layer writes to what `proj` takes, and back."""
    width = HEADS[case.scale] * DIM
    if case.model in cases.SOFTMAX:
        mix, leaves = partial(attend, case), [random(case, 3 * width)]
    else:
        mix, leaves = lion_mixer(case)
    if case.step == cases.FORWARD:
        return torch.inference_mode()(partial(mix, *leaves)), leaves
    return backward_step(partial(mix, *leaves), leaves, random(case, width))


def backward_step(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> Prepared:
    """Forward, and the gradients of `leaves`."""
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(forward(), leaves, grad), [*leaves, grad]


def attend(case: Case, projected: Tensor) -> Tensor:
    """PyTorch's on strided views `[B, H, N, D]`, as timm's attention hands them on."""
    q, k, v = projected.unflatten(2, (3, HEADS[case.scale], DIM)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def lion_mixer(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`mix(projected)`, or `mix(projected, decay)` of LION-D; see `lion_kernels.mix`.

    The snake curves are those of the grid of N - 1 patches that is nearest to a square.
    """
    options = MODELS[case.model][1]
    mask, order = options["mask_type"], options.get("order", "Normal")
    patches, heads = case.tokens - 1, HEADS[case.scale]
    height = max((h for h in range(1, isqrt(patches) + 1) if patches % h == 0), default=0)
    grid = (height, patches // max(height, 1))
    curves = scan_curves(order, grid, num_prefix=1, device=case.device)
    scans = 1 if curves is None else 2
    gates = lion_kernels.padded_gates(scans * heads) if mask == "Selective" else 0
    leaves = [random(case, 3 * heads * DIM + gates)]
    if mask == "Decay":
        leaves.append(torch.randn(scans, heads, device=case.device))
    features = "elu" if mask == "Lit" else "silu"
    mix = partial(lion_kernels.mix, curves=curves, heads=heads, dim=DIM, scans=scans, prefix=1,
                  lit=mask == "Lit", features=features)  # fmt: skip
    return mix, leaves


def random(case: Case, width: int) -> Tensor:
    """`[B, N, width]`, in the dtype of what a Linear layer writes."""
    dtype = torch.float32 if case.precision == "float32" else torch.bfloat16
    return torch.randn(case.batch, case.tokens, width, device=case.device, dtype=dtype)


# ------------------------------------------------------------------------------------ whole models


class NoMixing(nn.Module):
    """timm's attention without its mixing: qkv and proj, and every token's own value."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.qkv, self.proj = attn.qkv, attn.proj

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        v = self.qkv(x).flatten(0, 1)[:, -x.shape[2] :]
        return self.proj(v).view_as(x)


def build(case: Case) -> nn.Module:
    """With random weights, made for the size and on the device."""
    name, options = case.in_timm
    with torch.device(case.device):
        model = timm.create_model(name, img_size=case.pixels, drop_path_rate=case.drop_path,
                                  **options)  # fmt: skip
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = case.form != cases.EXPLICIT
    for block in model.blocks if case.model == cases.NO_MIXING else ():
        block.attn = NoMixing(block.attn)
    model.to(torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
    torch._dynamo.config.recompile_limit = 64  # the models of a group share their code
    if case.compiled:
        mode = CUDA_GRAPHS[0] if case.compiled == cases.GRAPHS else None
        compile_in_place(model, mode=mode, dynamic=False)
    return model


def layer_step(case: Case) -> Prepared:
    """A call of the first block's attention layer in training, forward or with its gradients."""
    model = build(case)
    x, grad = (random(case, HEADS[case.scale] * DIM) for _ in range(2))
    layer = model.blocks[0].attn
    forward = partial(layer, x, attn_mask=getattr(model, "curves", None))
    run, tensors = backward_step(forward, [x, *layer.parameters()], grad)
    return (forward if case.step == cases.LAYER_FORWARD else run), tensors


@lru_cache(maxsize=1)
def images(batch: int, pixels: int, device: str, dtype: torch.dtype) -> Tensor:
    """Random ones; the cases of a group share them, for they can take gigabytes."""
    return torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)


def amp(case: Case) -> torch.autocast:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "amp")


def image_step(case: Case) -> Prepared:
    """Inference, or forward, backward and fused AdamW, on random images."""
    model = build(case)
    x = images(case.batch, case.pixels, case.device, next(model.parameters()).dtype)
    if case.step == cases.TRAINING:
        labels = torch.randint(1000, (case.batch,), device=case.device)
        optimizer = AdamW(model.train().parameters(), lr=0.0, fused=True)
        loss = lambda: F.cross_entropy(model(x), labels)  # noqa: E731
        return training_step(case, optimizer, loss, [x, labels, *model.buffers()])
    model.eval()

    def run() -> Tensor:
        with torch.inference_mode(), amp(case):
            return model(x)

    return run, [x, *model.parameters(), *model.buffers()]


def text_step(case: Case) -> Prepared:
    from scripts.bench import text  # its libraries take seconds to import

    return training_step(case, *text.pretraining(case))


def training_step(
    case: Case, optimizer: Optimizer, loss_of_batch: Callable[[], Tensor], batch: Sequence[Tensor]
) -> Prepared:
    """A step, the same each time if the learning rate is 0; and all that is held between two."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:  # so that the optimizer has its state
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def run() -> None:
        begin_step()
        with amp(case):
            loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    state = [t for values in optimizer.state.values() for t in values.values()]
    return run, [*batch, *parameters, *filter(torch.is_tensor, state)]


STEPS = {**dict.fromkeys(cases.MIXER, mixer_step), **dict.fromkeys(cases.LAYER, layer_step),
         cases.TRAINING: image_step, cases.INFERENCE: image_step,
         cases.TEXT: text_step}  # fmt: skip
