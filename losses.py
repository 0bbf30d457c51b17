"""Training losses, all called as `criterion(samples, outputs, targets)`."""

import logging
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import checkpoint
import models_timm
import preprocessing
from errors import UserError
from pretrained import model_of

logger = logging.getLogger(__name__)


class BinaryCrossEntropy(nn.Module):
    """One sigmoid per class (DeiT's `--bce-loss`): any class with a positive target counts as 1."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.ndim == 1:
            targets = F.one_hot(targets, outputs.shape[-1])
        return F.binary_cross_entropy_with_logits(outputs, targets.gt(0).to(outputs.dtype))


class CosubLoss(nn.Module):
    """Cooperative submodels (arXiv 2212.04884): two drawn from stochastic depth teach each other.

    `outputs` `[2B, K]` holds the logits of both submodels for the same batch, `targets` `[B, K]`
    soft labels, or `[B]` class indices, which are smoothed here; with `binary` any positive label
    counts as 1.
    """

    def __init__(self, binary: bool = False, smoothing: float = 0.0) -> None:
        super().__init__()
        self.binary, self.smoothing = binary, smoothing

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        first, second = outputs.chunk(2)
        if targets.ndim == 1:
            classes = outputs.shape[-1]
            hot = F.one_hot(targets, classes).to(outputs.dtype)
            targets = hot * (1 - self.smoothing) + self.smoothing / classes
        loss = F.binary_cross_entropy_with_logits
        labels = (targets.gt(0) if self.binary else targets).to(outputs.dtype)
        own = loss(first, labels) + loss(second, labels)
        mutual = loss(first, second.detach().sigmoid()) + loss(second, first.detach().sigmoid())
        return (own + mutual) / 4


def build_base_loss(*, mixed: bool, smoothing: float, bce: bool, cosub: bool) -> nn.Module:
    """DeiT's choice of a loss `(outputs [B, K], targets)`.

    `mixed` says that targets are soft labels `[B, K]` of Mixup (smoothed there); else they are
    class indices `[B]`, smoothed here.
    """
    if cosub:
        return CosubLoss(binary=bce, smoothing=0.0 if mixed else smoothing)
    if bce:
        return BinaryCrossEntropy()
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """The base loss, mixed with what a teacher says of the same samples (arXiv 2012.12877).

    With a teacher the student returns a pair, of which the second learns from the teacher:

        (1 - alpha) * base(outputs, targets) + alpha * distillation(outputs_dist, teacher(samples))

    `soft`: Kullback-Leibler divergence at temperature `tau`, times tau**2, averaged over all
    elements `B * K` as DeiT does; `hard`: cross-entropy with the teacher's decision; `none`: the
    base loss alone, no teacher needed.
    """

    def __init__(
        self,
        base: nn.Module,
        teacher: nn.Module | None = None,
        kind: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
    ) -> None:
        super().__init__()
        if kind not in ("none", "soft", "hard"):
            raise ValueError(f"Unknown distillation type {kind!r}: choose none, soft or hard.")
        self.base, self.kind, self.alpha, self.tau = base, kind, alpha, tau
        self.teacher = None
        if kind != "none":
            if teacher is None:
                raise ValueError(f"Distillation of type {kind} needs a teacher.")
            self.teacher = teacher.eval().requires_grad_(False)

    def forward(
        self, samples: Tensor, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor
    ) -> Tensor:
        if self.teacher is None:
            return self.base(outputs, targets)
        if not isinstance(outputs, tuple):
            raise ValueError(
                "Distillation needs a model that returns a pair in training: "
                "use a distilled one and call set_distilled_training()."
            )
        student, student_dist = outputs
        with torch.no_grad():
            teacher = self.teacher(samples)
        if self.kind == "hard":
            distillation = F.cross_entropy(student_dist, teacher.argmax(dim=1))
        else:
            log_student = F.log_softmax(student_dist.float() / self.tau, dim=1)
            log_teacher = F.log_softmax(teacher.float() / self.tau, dim=1)
            divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
            distillation = divergence * self.tau**2 / student_dist.numel()
        return (1 - self.alpha) * self.base(student, targets) + self.alpha * distillation


class MatchInput(nn.Module):
    """A teacher that gets the student's samples in the normalisation and size it was trained with.

    `mean`, `std` of either are per channel; `size` is what the teacher needs, the side in pixels or
    height and width, None for any.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        teacher: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        teacher_mean: Sequence[float],
        teacher_std: Sequence[float],
        size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.teacher, self.size = teacher, (size, size) if isinstance(size, int) else size
        centre, width, teacher_centre, teacher_width = (
            torch.tensor(values).view(3, 1, 1) for values in (mean, std, teacher_mean, teacher_std)
        )
        shift = (centre - teacher_centre) / teacher_width
        self.register_buffer("scale", width / teacher_width, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        samples = samples * self.scale + self.shift
        if self.size and samples.shape[-2:] != self.size:
            samples = F.interpolate(samples, self.size, mode="bicubic", antialias=True)
        return self.teacher(samples)


def load_teacher(
    name: str,
    path: str,
    *,
    num_classes: int,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
) -> nn.Module:
    """A timm model that judges samples of `input_size` pixels normalised by `mean` and `std`.

    `path` is a checkpoint (file or URL), or `timm:` for timm's pretrained weights. Samples are
    converted to the normalisation and size that the checkpoint was trained with, else to those of
    timm's weights; where neither tells, a teacher that takes any size sees the samples' own. A
    checkpoint of main.py tells the model's options, too.

    Raises UserError for an unknown model, a file that is not of it, or other classes.
    """
    models_timm.check_name(name, "teacher model")
    if path == "timm:":
        teacher, used = _pretrained_teacher(name, num_classes), preprocessing.of_model(name)
        fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
        size = used.size if fixed else input_size
    else:
        saved = checkpoint.load(path)
        if classes is not None:
            checkpoint.check_classes(
                saved, classes, f"the teacher {path}", remedy="use one of the same"
            )
        known = preprocessing.of_checkpoint(saved, name, path)
        used = known or preprocessing.of_model(name)
        name, options = model_of(saved.get("args") or {}, name, f"the teacher {path}")
        sizes = [known.size] if known else [input_size, used.size]
        options = {"num_classes": num_classes, **options}
        teacher, size = _teacher_of(name, saved, path, options, sizes)
    logger.info("The teacher %s gets %s pixels, mean %s, std %s", name, size, used.mean, used.std)
    return MatchInput(
        teacher, mean=mean, std=std, teacher_mean=used.mean, teacher_std=used.std, size=size
    )


def _pretrained_teacher(name: str, num_classes: int) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    if config is None or config.num_classes != num_classes:
        raise UserError(
            f"timm's {name} is not trained on these {num_classes} classes: "
            "name a checkpoint of your own by --teacher-path."
        )
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many types
        raise UserError(f"cannot get timm's weights of {name}: {error}") from error


def _teacher_of(
    name: str,
    saved: dict,
    path: str,
    options: dict[str, Any],
    sizes: Sequence[int | tuple[int, int]],
) -> tuple[nn.Module, int | tuple[int, int]]:
    """The model with the weights of a file, built for the first of `sizes` that they fit."""
    weights = checkpoint.weights_of(saved, source=path)
    problems = []
    for size in sizes:
        teacher = models_timm.create(name, input_size=size, **options)
        try:
            checkpoint.load_weights(teacher, weights, f"the teacher {path}")
        except UserError as error:
            problems.append(error)
        else:
            return teacher, size
    raise problems[0]
