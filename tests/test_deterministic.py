"""--deterministic: runs on GPUs end with the same bits, stopped and resumed or not."""

import signal
from pathlib import Path

import pytest
import torch
from helpers import TINY, Ranks, assert_same_run, same, wait_for, weights
from test_mlm_pretrain import short

from utils import digest

RECIPE = (*TINY, "--device", "cuda", "--deterministic", "--epochs", "3", "--lr", "0.05",
          "--warmup-epochs", "1", "--drop-path", "0.3", "--model-ema-decay", "0.9",
          "--model-kwargs", "patch_size=4", "embed_dim=64", "depth=2", "num_heads=2")  # fmt: skip


@pytest.fixture
def restored():
    yield
    torch.use_deterministic_algorithms(False)


def test_the_option_reaches_torch(restored, run, data_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    arguments = (*TINY, "--data-path", data_path, "--eval")
    assert run(*arguments).code == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert run(*arguments, "--deterministic").code == 0
    assert torch.are_deterministic_algorithms_enabled()


def test_the_setting_reaches_torch(restored, corpus, tmp_path, ending):
    assert ending(short, corpus, tmp_path, steps=1, deterministic=True).code == 0
    assert torch.are_deterministic_algorithms_enabled()


def test_a_digest_changes_with_any_bit():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    before = digest(model)
    assert len(before) == 8
    assert digest(model) == before
    model[1].num_batches_tracked += 1
    assert digest(model) != before


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        ("--mask_type", "Selective", "--order", "S"),
        ("--mask_type", "Decay"),
        ("--mask_type", "Lit", "--format", "Chunk"),
        ("--model", "deit_tiny_patch16_224"),
    ],
    ids=["S", "D", "Lit", "DeiT"],
)
def test_stopped_and_resumed_runs_on_gpus(options, size, data_path, tmp_path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    arguments = (*RECIPE, *options, "--data-path", data_path, "--resume", "auto", "--output_dir")
    whole, run = tmp_path / "whole", tmp_path / "run"
    finish(tmp_path, *arguments, whole, size=size)
    ranks = Ranks(tmp_path, *arguments, run, size=size)
    wait_for(lambda: "Epoch: [1]" in ranks.printed(), 120)
    ranks.processes[0].terminate()
    assert ranks.wait(120) == [128 + signal.SIGTERM] * size, ranks.errors()
    assert unwarned(ranks)
    finish(tmp_path, *arguments, run, size=size)
    assert_same_run(run, whole)
    assert same(weights(run, "model_ema"), weights(whole, "model_ema"))


def finish(root: Path, *arguments: object, size: int) -> None:
    ranks = Ranks(root, *arguments, size=size)
    assert ranks.wait(240) == [0] * size, ranks.errors()
    assert unwarned(ranks)


def unwarned(ranks: Ranks) -> bool:
    """Whether NCCL has neither guessed a device nor been left without a word."""
    errors = "".join(ranks.errors(rank) for rank in range(len(ranks.processes)))
    return "destroy_process_group" not in errors and "device" not in errors.lower()
