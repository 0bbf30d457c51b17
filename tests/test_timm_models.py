"""Models of timm's families are built, learn, and start from their own weights.

Quick: a few families that were awkward; long: every family.
"""

import gc
import subprocess
import sys

import pytest
import timm
import torch
from helpers import ROOT, TINY, older, refused, slow

import main
import models_timm
from arguments import get_args_parser
from checkpoint import adapt_weights

AWKWARD = {  # with arguments that make them smaller
    "repghostnet_050": {},  # no stochastic depth
    "hrnet_w18_small": {},  # the same, which it says in other words
    "volo_d1_224": {},  # position embedding [1, H, W, C]
    "deit3_small_patch16_224": {"depth": 1},  # no entry for the class token in it
    "cait_xxs24_224": {"depth": 2},  # no class token before the last blocks
    "efficientformer_l1": {},  # two heads
    "crossvit_tiny_240": {},  # two branches
    "convit_tiny": {"depth": 3, "local_up_to_layer": 2},
    "xcit_nano_12_p8_224": {"depth": 2},
    "swin_s3_tiny_224": {"depths": (1, 1, 1, 1)},
    "cs3darknet_s": {},  # 256 pixels
    "test_vit": {},
    "test_efficientnet": {},
}
# What a family's smallest model is called, the smallest first.
SMALL = (
    *("test_", "atto", "femto", "pico", "nano", "xx", "xs", "tiny", "x_small", "small", "_t", "_s"),
    *("mini", "050", "35", "b0", "m0", "s0", "18", "lite", "t0", "88m", "base", "b"),
)
# Families of large models only: fewer blocks do.
SHORTER = {name: {"depth": 1} for name in ("deepseek_vit", "gemma4_vit", "qwen3_vit")}
# Families that do not take images of 128 pixels, though their configuration fixes no size.
WHOLE = ("byoanet", "deepseek_vit")


COMPUTE_IN_INIT = ("csatv2", "gemma4_vit_167m", "regnetx_004_tv")


def smallest(family: str) -> str:
    def rank(name: str) -> tuple:
        size = max(timm.get_pretrained_cfg_value(name, "input_size") or (224,))
        kind = next((i for i, part in enumerate(SMALL) if part in name), len(SMALL))
        return size > 256, kind, size, len(name), name

    return min(timm.list_models(module=family), key=rank)


def own_size(name: str) -> int:
    return timm.get_pretrained_cfg_value(name, "input_size")[-1]


def small_size(family: str) -> int:
    name = smallest(family)
    fixed = family in WHOLE or timm.get_pretrained_cfg_value(name, "fixed_input_size")
    return own_size(name) if fixed else 128


def built(name: str, seed: int, size: int, **kwargs) -> torch.nn.Module:
    """As main.py builds it for three classes."""
    args = get_args_parser().parse_args(["--model", name])
    args.model_kwargs = kwargs
    torch.manual_seed(seed)
    return main.build_model(args, 3, size)


def learns_and_starts_from_itself(name: str, size: int, **kwargs) -> None:
    source, target = (built(name, seed, size, **kwargs) for seed in (0, 1))
    images = torch.randn(2, 3, size, size)
    torch.nn.functional.cross_entropy(source.train()(images), torch.tensor([0, 2])).backward()
    assert all(p.grad.isfinite().all() for p in source.parameters() if p.grad is not None)
    assert adapt_weights(target, source.state_dict(), "file") == []
    with torch.no_grad():
        assert torch.equal(target.eval()(images[:1]), source.eval()(images[:1]))


@pytest.mark.parametrize("name", [slow(n) if "volo" in n else n for n in AWKWARD])
def test_a_model_learns_and_starts_from_its_own_weights(name):
    learns_and_starts_from_itself(name, own_size(name), **AWKWARD[name])


@pytest.mark.parametrize("name", ["vgg11", *map(smallest, timm.list_modules())])
def test_one_model_of_every_family_is_built(name):
    if older("timm", "1.0.31") and name in COMPUTE_IN_INIT:
        pytest.skip("timm 1.0.31 builds it without memory")
    with torch.device("meta"):  # without memory, and without the time to fill it
        assert built(name, 0, own_size(name)).num_classes == 3


def test_what_a_family_does_not_have_is_left_out_and_said(run, data_path):
    arguments = (*TINY, "--model", "repghostnet_050", "--model-kwargs", "--data-path", data_path,
                 "--input-size", "32", "--batch-size", "40")  # fmt: skip
    ended = run(*arguments)
    assert ended.code == 0, ended.err
    assert "repghostnet_050 has no --drop-path: built without" in ended.out
    assert "built without" not in run(*arguments, "--drop-path", "0").out
    refused(run(*arguments, "--drop-path", "0.2"), "repghostnet_050 has no --drop-path: leave it")


@pytest.mark.parametrize("evaluation", [(), ("--eval",)], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        # An encoder without a head, as all of timm's that end in _enc
        pytest.param(
            ("qwen3_vit_88m_enc", "--model-kwargs", "depth=1"),
            r"is no classifier .* is \[2, 4, 1024\]",
            marks=pytest.mark.skipif(older("timm", "1.0.31"), reason="timm 1.0.31 has it"),
        ),
        (("test_resnet", "--model-kwargs", "num_classes=5"), r"is no classifier of .* is \[2, 5\]"),
        # Attention between the patches of 224 pixels alone
        (
            ("efficientformer_l1", "--model-kwargs"),
            "cannot read images of 64x64 pixels .*: use another",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_makes_no_logits_of_the_images_is_refused(
    options, message, evaluation, run, data_path, tmp_path
):
    ended = run(*TINY, *evaluation, "--data-path", data_path, "--input-size", "64",
                "--output_dir", tmp_path / "run", "--model", *options)  # fmt: skip
    refused(ended, f"{options[0]} {message}", tmp_path / "run")


@pytest.mark.parametrize("kwargs", [{"patch_size": 0}, {"depth": "two"}, {"nonsense": 1}])
def test_arguments_that_no_model_can_be_built_with(kwargs):
    with pytest.raises(
        ValueError, match="^test_vit cannot be built with these arguments .*: check"
    ):
        models_timm.create("test_vit", input_size=160, **kwargs)


@pytest.mark.long
@pytest.mark.parametrize("family", timm.list_modules())
def test_every_family(family):
    name, size = smallest(family), small_size(family)
    learns_and_starts_from_itself(name, size, **SHORTER.get(family, {}))
    gc.collect()


@pytest.mark.slow
def test_a_fresh_process_knows_all_families():
    families = ("lion", "lion_plus", "lion_softmax", "hydra", "vim")
    names = [f"{family}_tiny_patch16_224" for family in families]
    code = f"import models_timm; print(*map(models_timm.check_name, {names}))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.split() == ["None"] * len(names), ended.stderr
