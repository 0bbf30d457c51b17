import math

import pytest
import torch
from torch import nn

from losses import BinaryCrossEntropy, DistillationLoss, build_base_loss

LABELS = torch.tensor([0, 3, 1])
ONE_HOT = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
MIXED = torch.tensor([[0.3, 0, 0.7, 0], [0, 0, 0, 1], [0.5, 0.5, 0, 0]])
PRESENT = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])


def logits(seed: int, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, 4, generator=generator)).requires_grad_()


def mean_over(term, *tensors: torch.Tensor) -> float:
    """Mean of `term(*numbers)` over all elements, without torch."""
    columns = (tensor.flatten().tolist() for tensor in tensors)
    terms = [term(*numbers) for numbers in zip(*columns, strict=True)]
    return sum(terms) / len(terms)


def mean_binary(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return mean_over(
        lambda x, t: t * math.log1p(math.exp(-x)) + (1 - t) * math.log1p(math.exp(x)),
        outputs,
        targets,
    )


def softmax(outputs: torch.Tensor, tau: float = 1.0) -> torch.Tensor:
    rows = [[math.exp(x / tau) for x in row] for row in outputs.tolist()]
    return torch.tensor([[x / sum(row) for x in row] for row in rows])


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    classes = outputs.shape[1]
    return classes * mean_over(lambda p, t: -t * math.log(p), softmax(outputs), targets)


@pytest.mark.parametrize(
    ("targets", "present"),
    [(LABELS, ONE_HOT), (MIXED, PRESENT)],
    ids=["labels", "mixed"],
)
def test_binary_cross_entropy_takes_every_class_in_the_mix_as_present(targets, present):
    loss = BinaryCrossEntropy()(logits(0), targets)
    assert loss.item() == pytest.approx(mean_binary(logits(0), present), rel=1e-5)


@pytest.mark.parametrize(
    ("binary", "targets", "soft"),
    [(False, LABELS, ONE_HOT), (False, MIXED, MIXED), (True, MIXED, PRESENT)],
    ids=["labels", "mixed", "binary"],
)
def test_cosub_learns_from_the_targets_and_from_each_other(binary, targets, soft):
    outputs = logits(1, batch=6)
    criterion = build_base_loss(mixed=True, smoothing=0.1, bce=binary, cosub=True)
    loss = criterion(outputs, targets)
    first, second = outputs[:3], outputs[3:]
    expected = [
        mean_binary(first, soft),
        mean_binary(second, soft),
        mean_binary(first, second.sigmoid()),
        mean_binary(second, first.sigmoid()),
    ]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)
    # No gradient through what the other one is taught: d BCE(x, t) / dx = sigmoid(x) - t.
    (gradient,) = torch.autograd.grad(loss, outputs)
    one, two = first.sigmoid(), second.sigmoid()
    expected = torch.cat([2 * one - soft - two, 2 * two - soft - one]) / 4 / soft.numel()
    assert torch.allclose(gradient, expected, atol=1e-7)


def test_cosub_smooths_labels_that_mixup_does_not():
    smoothed = 0.9 * ONE_HOT + 0.1 / 4
    loss = build_base_loss(mixed=False, smoothing=0.1, bce=False, cosub=True)
    assert torch.equal(loss(logits(1, batch=6), LABELS), loss(logits(1, batch=6), smoothed))


def test_label_smoothing():
    loss = build_base_loss(mixed=False, smoothing=0.1, bce=False, cosub=False)
    expected = cross_entropy(logits(2), 0.9 * ONE_HOT + 0.1 / 4)
    assert loss(logits(2), LABELS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("choice", "targets", "expected"),
    [
        ({}, LABELS, cross_entropy(logits(3), ONE_HOT)),
        ({"mixed": True, "smoothing": 0.1}, MIXED, cross_entropy(logits(3), MIXED)),
        ({"bce": True, "smoothing": 0.1}, LABELS, mean_binary(logits(3), ONE_HOT)),
        ({"bce": True, "mixed": True}, MIXED, mean_binary(logits(3), MIXED.gt(0))),
    ],
    ids=["plain", "mixed", "bce", "bce mixed"],
)
def test_choice_of_the_base_loss(choice, targets, expected):
    defaults = {"mixed": False, "smoothing": 0.0, "bce": False, "cosub": False}
    loss = build_base_loss(**{**defaults, **choice})
    assert loss(logits(3), targets).item() == pytest.approx(expected, rel=1e-5)


# Distillation


class Teacher(nn.Module):
    """Returns the logits it is given as samples, times a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.weight * samples


@pytest.mark.parametrize("tau", [1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind, alpha, tau):
    teacher, said = Teacher(), logits(4).detach()
    student, student_dist = logits(5), logits(6)
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)
    loss = criterion(said, (student, student_dist), LABELS)
    if kind == "soft":
        divergence = mean_over(
            lambda p, q: p * math.log(p / q), softmax(said, tau), softmax(student_dist, tau)
        )
        distillation = tau**2 * divergence
    else:
        distillation = cross_entropy(student_dist, torch.eye(4)[said.argmax(1)])
    expected = (1 - alpha) * cross_entropy(student, ONE_HOT) + alpha * distillation
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert teacher.weight.grad is None
    assert bool(student.grad.any()) == (alpha < 1)
    assert bool(student_dist.grad.any()) == (alpha > 0)


def test_without_distillation_no_teacher_is_asked():
    criterion = DistillationLoss(nn.CrossEntropyLoss())
    expected = cross_entropy(logits(7), ONE_HOT)
    assert criterion(None, logits(7), LABELS).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_without_a_second_output_is_an_error(kind):
    criterion = DistillationLoss(nn.CrossEntropyLoss(), Teacher(), kind)
    with pytest.raises(ValueError, match="needs a model that returns a pair"):
        criterion(logits(8), logits(8), LABELS)


def test_unknown_kind_of_distillation():
    with pytest.raises(ValueError, match="'firm': choose none, soft or hard"):
        DistillationLoss(nn.CrossEntropyLoss(), kind="firm")
