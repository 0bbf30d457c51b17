"""What speed and memory are aimed at, on a GPU and on a CPU: each test measures and compares.

They run by `-m long` on a machine that does nothing else, and tell by how much a target is missed.
"""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch

from processes import init_distributed
from scripts import benchmark
from scripts.bench.cases import BACKWARD, FORWARD, INFERENCE, LIONS, TRAINING, Case

pytestmark = pytest.mark.long
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PIXELS = (224, 384, 512, 1024)
STEP_RATIOS = {  # of the ViT's step, by PIXELS; compiled, at 224 pixels
    "LION-Lit": ((0.90, 0.86, 0.80, 0.60), 0.95),
    "LION-D": ((0.94, 0.95, 0.88, 0.68), 1.00),
    "LION-S": ((0.95, 0.96, 0.89, 0.68), 1.02),
    "LION-D♮": ((0.97, 1.10, 1.03, 0.78), 1.03),
    "LION-S♮": ((1.01, 1.12, 1.05, 0.80), 1.08),
}
ONE_CURVE = ("LION-Lit", "LION-D", "LION-S")


@cache
def measured(device: str, arguments: str) -> list[Case]:
    """The cases of a benchmark's command."""
    options = benchmark.get_args_parser().parse_args(arguments.split())
    cases = benchmark.choose_cases(options, init_distributed(device).device)
    return benchmark.measured(cases, options, None)


def fastest(cases: list[Case], quantity: str, wanted: Callable[[Case], bool]) -> float:
    found = [case for case in cases if wanted(case) and not case.note]
    best = min(found, key=lambda case: case.seconds, default=None)
    return getattr(best, quantity) if best else math.nan


def over_vit(cases: list[Case], step: str, model: str, quantity: str = "seconds") -> float:
    mine, vit = (fastest(cases, quantity, lambda c, m=m: (c.step, c.model) == (step, m))
                 for m in (model, "ViT"))  # fmt: skip
    return mine / vit


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("model", STEP_RATIOS)
@pytest.mark.parametrize("pixels", PIXELS)
def test_training_step(model, pixels):
    cases = measured("cuda", f"--preset training --sizes {pixels} --seconds 1")
    assert over_vit(cases, TRAINING, model) <= STEP_RATIOS[model][0][PIXELS.index(pixels)]


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("model", STEP_RATIOS)
def test_compiled_training_step(model):
    cases = measured("cuda", "--preset training --sizes 224 --compile blocks --seconds 1")
    assert over_vit(cases, TRAINING, model) <= STEP_RATIOS[model][1]


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("model", LIONS)
def test_memory_of_a_training_step(model):
    cases = measured("cuda", "--preset training --sizes 224 --seconds 1")
    assert over_vit(cases, TRAINING, model, "bytes") <= 1


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "step", "tokens", "most"),
    [
        *((model, BACKWARD, 197, 1) for model in ONE_CURVE),
        *((model, BACKWARD, tokens, 1 / n) for model in LIONS
          for tokens, n in ((1025, 2), (4097, 4), (16385, 10))),
        *((model, FORWARD, 24337, 1 / 10) for model in LIONS),
    ],
)  # fmt: skip
def test_mixer(model, step, tokens, most):
    cases = measured("cuda", f"--preset mixer --sizes {tokens} --seconds 0.4")
    assert over_vit(cases, step, model) <= most


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("model", LIONS)
def test_inference(model):
    cases = measured("cuda", "--preset inference --sizes 224 --formats Attention --seconds 1")
    assert over_vit(cases, INFERENCE, model) <= (1.05 if model in ONE_CURVE else 1.10)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("pixels", "gigabytes"), [(224, 0.62), (1024, 8.25), (2496, 49.0)])
def test_recurrence(pixels, gigabytes):
    cases = measured("cuda", f"--preset inference --sizes {pixels} --models LION-D --seconds 1")
    by_form = {case.form: case for case in cases if case.model == "LION-D"}
    assert by_form["RNN"].seconds <= 3 * by_form["Chunk"].seconds
    assert by_form["RNN"].bytes <= gigabytes * 1e9


def test_formats_on_a_cpu():
    arguments = "--device cpu --preset inference --models LION-D --seconds 14 --repeats 5"
    cases = measured("cpu", arguments)
    at = {(case.tokens, case.form): case for case in cases if case.model == "LION-D"}
    assert at[4097, "Attention"].seconds >= 4 * at[4097, "Chunk"].seconds
    assert at[4097, "Chunk"].seconds <= 5 * at[1025, "Chunk"].seconds
    assert at[4097, "RNN"].bytes <= 0.25 * at[4097, "Attention"].bytes
