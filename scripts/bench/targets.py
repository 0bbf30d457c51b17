"""What the measurements are meant to show, and whether they do."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scripts.bench.cases import (
    BACKWARD,
    FORWARD,
    NO_MIXING,
    SOFTMAX,
    VARIANTS,
    Case,
)

ANY = object()


@dataclass(frozen=True)
class Target:
    """A range for a quantity of the cases with the values `of`.

    It is divided by that of the case which differs from them in the values `to`, the fastest of
    several; None divides by `unit` instead.
    """

    of: dict[str, object]
    to: dict[str, object] | None
    text: str  # what the quotient is in
    high: float
    low: float = 0
    quantity: str = "seconds"
    unit: float = 1


VIT = {"variant": SOFTMAX, "format": ANY}
BASE = {"device": "cuda", "scale": "base"}
ONE_MASK = ("Lit", "Decay-Normal", "Selective-Normal")
STEP_RATIOS = {
    "Lit": (0.90, 0.86, 0.80, 0.60),
    "Decay-Normal": (0.94, 0.95, 0.88, 0.68),
    "Selective-Normal": (0.95, 0.96, 0.89, 0.68),
    "Decay-S": (0.97, 1.10, 1.03, 0.78),
    "Selective-S": (1.01, 1.12, 1.05, 0.80),
}
COMPILED_RATIOS = {  # at 224 pixels
    "Lit": 0.95, "Decay-Normal": 1.00, "Selective-Normal": 1.02, "Decay-S": 1.03,
    "Selective-S": 1.08,
}  # fmt: skip
FLOORS = (0.84, 0.80, 0.75, 0.62)  # measured once: what else differs is not the mixer's
PIXELS = (224, 384, 512, 1024)


def training_targets() -> Iterator[Target]:
    step = BASE | {"step": "training"}
    text = "time of the ViT's step"
    for variant, ratios in STEP_RATIOS.items():
        of = step | {"variant": variant}
        for pixels, high in zip(PIXELS, ratios, strict=True):
            yield Target(of | {"pixels": pixels, "compiled": ""}, VIT, text, high)
        compiled = of | {"pixels": 224, "compiled": "blocks"}
        yield Target(compiled, VIT, text, COMPILED_RATIOS[variant])
    for pixels, floor in zip(PIXELS, FLOORS, strict=True):
        of = step | {"variant": NO_MIXING, "pixels": pixels, "compiled": ""}
        yield Target(of, VIT, text, floor + 0.03, floor - 0.03)
    for variant in VARIANTS:
        of = {"device": "cuda", "step": "training", "variant": variant}
        yield Target(of, VIT, "memory of the ViT's step", 1, quantity="bytes")


def mixer_targets() -> Iterator[Target]:
    text = "time of the fastest softmax attention"
    for tokens, high in ((197, 1), (1025, 1 / 2), (4097, 1 / 4), (16385, 1 / 10)):
        for variant in ONE_MASK if tokens == 197 else VARIANTS:
            of = BASE | {"step": BACKWARD, "tokens": tokens, "variant": variant}
            yield Target(of, VIT, text, high)
    for variant in VARIANTS:
        of = BASE | {"step": FORWARD, "tokens": 24337, "variant": variant}
        yield Target(of, VIT, text, 1 / 10)


def inference_targets() -> Iterator[Target]:
    for variant in VARIANTS:
        of = BASE | {"step": "inference", "pixels": 224, "variant": variant, "format": "Attention"}
        yield Target(of, VIT, "time of the ViT", 1.10 if variant.endswith("-S") else 1.05)
    rnn = BASE | {"step": "inference", "format": "RNN"}
    yield Target(rnn, {"format": "Chunk"}, "time of Chunk", 3)
    for pixels, high in ((224, 0.62), (1024, 8.25), (2496, 49.0)):
        of = rnn | {"pixels": pixels, "batch": 64}
        yield Target(of, None, "peak GB", high, quantity="bytes", unit=1e9)


def cpu_targets() -> Iterator[Target]:
    def at(tokens: int, format: str) -> dict[str, object]:
        return {"device": "cpu", "step": "inference", "tokens": tokens, "format": format}

    yield Target(at(4097, "Attention"), {"format": "Chunk"}, "time of Chunk", math.inf, 4)
    growth = {"tokens": 1025, "pixels": ANY}
    yield Target(at(4097, "Chunk"), growth, "time at 1,025 tokens", 5)
    attention = {"format": "Attention"}
    text = "memory of Attention"
    yield Target(at(4097, "RNN"), attention, text, 0.25, quantity="bytes")


TARGETS = (*training_targets(), *mixer_targets(), *inference_targets(), *cpu_targets())
IDENTITY = ("device", "step", "scale", "pixels", "tokens", "batch", "variant", "format", "compiled")


@dataclass(frozen=True)
class Verdict:
    case: Case
    target: Target
    value: float

    @property
    def met(self) -> bool:
        return self.target.low <= self.value <= self.target.high

    def __str__(self) -> str:
        low, high = self.target.low, self.target.high
        bounds = [f"≥ {low:.3g}"] if low else []
        bounds += [f"≤ {high:.3g}"] if math.isfinite(high) else []
        return f"{self.value:.4g} ({', '.join(bounds)})"


def matches(case: Case, values: dict[str, object]) -> bool:
    return not case.note and all(
        value is ANY or getattr(case, name) == value for name, value in values.items()
    )


def fastest(cases: Sequence[Case], values: dict[str, object]) -> Case | None:
    found = [case for case in cases if matches(case, values)]
    return min(found, key=lambda case: case.seconds, default=None)


def verdicts(cases: Sequence[Case]) -> list[Verdict]:
    """Of every target whose cases were measured."""
    found = []
    for target in TARGETS:
        for case in (case for case in cases if matches(case, target.of)):
            divisor = target.unit
            if target.to is not None:
                same = {name: getattr(case, name) for name in IDENTITY}
                other = fastest(cases, same | target.to)
                divisor = getattr(other, target.quantity) if other else 0
            if divisor:
                found.append(Verdict(case, target, getattr(case, target.quantity) / divisor))
    return found
