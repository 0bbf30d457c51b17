"""Hydra and Vim: the models of the paper's table beside timm's ViT and LION."""

import copy
import json
import re
import runpy

import pytest
import reference_baselines as reference
import timm
import torch
from helpers import ROOT, TINY, Ranks, weights
from torch import Tensor
from torch.autograd.functional import jacobian

import state_space
from models_hydra import HydraMixer
from models_vim import VimMixer

MODELS = ("hydra", "vim")
PARAMETERS = {
    "hydra_tiny": 7_304_320,
    "hydra_small": 27_079_960,
    "hydra_base": 104_121_928,
    "vim_tiny": 7_148_008,
    "vim_small": 25_796_584,
    "vim_base": 97_598_440,
}


def small_model(name: str, kind: str = "tiny", **kwargs):
    """Two blocks on a 4 x 4 grid of patches."""
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.create_model(
        f"{name}_{kind}_patch16_224", **{**defaults, "num_classes": 5, **kwargs}
    ).eval()


def small_mixer(name: str):
    """In float64, every parameter drawn at random, so that none hides another."""
    torch.manual_seed(0)
    mixer = HydraMixer(8, num_heads=2, state_size=3) if name == "hydra" else VimMixer(8)
    for parameter in mixer.double().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def random(*shape: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(batch=2, height=32, width=32):
    return random(batch, 3, height, width, dtype=torch.float32)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = timm.create_model(f"{name}_patch16_224")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


# The recurrences


def product_inputs(n: int) -> list[Tensor]:
    """For `semiseparable_product`: decays from almost 1 to nothing."""
    log_decay = -random(2, n, 3, seed=2).mul(4).exp()
    return [random(2, n, 3, 5), log_decay, random(2, n, 4, seed=3), random(2, n, 4, seed=4)]


def scan_inputs(n: int) -> list[Tensor]:
    """For `selective_scan`."""
    delta, a = random(2, n, 6, seed=2).mul(2).exp(), -random(6, 3, seed=5).mul(2).exp()
    return [random(2, n, 6), delta, a, random(2, n, 3, seed=3), random(2, n, 3, seed=4)]


INPUTS = {"semiseparable_product": product_inputs, "selective_scan": scan_inputs}


@pytest.mark.parametrize("n, chunk_size", [(1, 4), (2, 1), (7, 7), (13, 5), (33, 64), (67, 16)])
@pytest.mark.parametrize("name", INPUTS)
def test_recurrences_equal_their_definition(name, n, chunk_size):
    inputs = [t.requires_grad_() for t in INPUTS[name](n)]
    y = getattr(state_space, name)(*inputs, chunk_size=chunk_size)
    expected = getattr(reference, name)(*inputs)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-10)
    given = random(*y.shape, seed=6)
    found, wanted = (
        torch.autograd.grad(t, inputs, given, retain_graph=True) for t in (y, expected)
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", INPUTS)
def test_recurrences_are_causal(name):
    x, *rest = INPUTS[name](9)
    rest[0] = rest[0] / 100  # decays near 1, so that no influence dies out
    reach = influence(lambda x: getattr(state_space, name)(x, *rest, chunk_size=4), x)
    assert torch.equal(reach, torch.ones(9, 9, dtype=torch.bool).tril())


@pytest.mark.parametrize("name", INPUTS)
def test_recurrences_accept_strong_decay_in_float32(name):
    inputs = [t.float() for t in INPUTS[name](70)]
    inputs[1] = inputs[1] * 1e4
    leaves = [t.requires_grad_() for t in inputs]
    y = getattr(state_space, name)(*leaves)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in leaves)


@pytest.mark.parametrize("name", INPUTS)
def test_memory_for_backward_is_linear(name):
    saved = [saved_for_backward(name, n) for n in (128, 512)]
    assert saved[1] <= 4.1 * saved[0]


def test_the_scan_saves_no_states_for_backward():
    n = 96
    given = sum(t.numel() for t in INPUTS["selective_scan"](n))
    assert saved_for_backward("selective_scan", n) < 1.1 * given


def saved_for_backward(name: str, n: int) -> int:
    """Elements of all tensors that autograd keeps."""
    sizes = []
    inputs = [t.requires_grad_() for t in INPUTS[name](n)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        getattr(state_space, name)(*inputs)
    return sum(sizes)


# The mixers


@pytest.mark.parametrize("n", [1, 2, 6, 9, 67])
@pytest.mark.parametrize("name", MODELS)
def test_mixers_equal_their_definition(name, n):
    mixer = small_mixer(name)
    x = random(2, n, 8).requires_grad_()
    y = mixer(x)
    wanted = torch.stack([getattr(reference, f"{name}_mixer")(mixer, tokens) for tokens in x])
    assert torch.allclose(y, wanted, rtol=1e-10, atol=1e-10)
    leaves = [x, *mixer.parameters()]
    given = random(*y.shape, seed=6)
    gradients = [
        torch.autograd.grad(t, leaves, given, allow_unused=True, materialize_grads=True)
        for t in (y, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_mixers_see_both_sides(name):
    assert influence(small_mixer(name), random(1, 11, 8)).all()


def test_one_scan_of_vim_sees_one_side():
    scan = small_mixer("vim").forward_scan
    x, z = random(1, 9, 16), random(1, 9, 16, seed=2)
    assert torch.equal(influence(lambda x: scan(x, z), x), torch.ones(9, 9).tril().bool())


def influence(function, x: Tensor) -> Tensor:
    """`[N, N]`: whether output token i depends on input token j."""
    change = jacobian(function, x)  # the shape of the output, then that of x
    others = [d for d in range(2 * x.ndim) if d not in (1, x.ndim + 1)]
    return change.abs().amax(others) > 0


# The models

GOLDEN = {
    "hydra": [
        [1.0227426, -1.5324737, 1.3721794, -0.9271651, 1.075318],
        [1.0224781, -1.5322169, 1.3719309, -0.9269252, 1.0750871],
    ],
    "vim": [
        [0.588424, -0.6166603, 0.1165384, 0.0008716, 0.5077268],
        [0.6407839, -0.6722241, 0.1752141, -0.0608188, 0.5723298],
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_golden_logits(name):
    """Of weights given by a formula, so that no random number generator is pinned as well."""
    model = small_model(name).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 1.7 + i)
            parameter.copy_(0.4 * wave.view_as(parameter))
        pixels = torch.cos(torch.arange(2 * 3 * 32 * 32, dtype=torch.float64) ** 2 * 1e-3)
        logits = model(pixels.view(2, 3, 32, 32))
    assert torch.allclose(logits, torch.tensor(GOLDEN[name], dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "tiny_distilled"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_finite_nonzero_gradient(name, kind):
    model = small_model(name, kind).train()
    if "distilled" in kind:
        model.set_distilled_training()
    outputs = model(images())
    sum(logits.square().sum() for logits in outputs).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_initial_decays_and_steps(name):
    mixer = small_model(name, embed_dim=192, depth=1).blocks[0].attn
    if name == "hydra":
        steps = torch.nn.functional.softplus(mixer.dt_bias)
        assert not mixer.A_log.any()
    else:
        scan = mixer.backward_scan
        steps = torch.nn.functional.softplus(scan.dt_proj.bias)
        assert torch.allclose(scan.A_log.exp(), torch.arange(1.0, 17.0).expand(384, 16))
        assert 0.25 < scan.dt_proj.weight.abs().max() <= 12**-0.5
    assert (steps > 9.9e-4).all()
    assert (steps < 0.101).all()
    assert steps.max() > 2 * steps.min()


@pytest.mark.parametrize("name", MODELS)
def test_timm_features(name):
    model = small_model(name, dynamic_img_size=True)
    x = images()
    final, maps = model.forward_intermediates(x)
    assert torch.allclose(final, model.forward_features(x), atol=1e-6)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2
    assert torch.allclose(model(x), model.head(final[:, 0]), atol=1e-6)
    resized = copy.deepcopy(model)
    resized.set_input_size((24, 40))
    assert torch.allclose(model(images(1, 24, 40)), resized(images(1, 24, 40)), atol=1e-6)
    model.reset_classifier(3, "avg")
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("name", ["hydra", "vim", "lion_softmax", "lion_plus"])
def test_torch_hub_finds_the_models(name):
    hub = torch.hub.load(str(ROOT), f"{name}_tiny_patch16_224", source="local", depth=1)
    assert len(hub.blocks) == 1


def test_torch_hub_offers_nothing_but_models():
    hubconf = runpy.run_path(str(ROOT / "hubconf.py"))
    offered = {name for name, value in hubconf.items() if callable(value) and name[0] != "_"}
    families = ("lion_*", "hydra_*_patch16_224", "vim_*_patch16_224")
    assert offered == {"trained", *timm.list_models(families)}


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name):
    plain = small_model(name).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        model(images()).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_compiles_without_graph_breaks(name):
    torch.compiler.reset()
    model = small_model(name, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    compiled(images()).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_stays_close(name):
    model = small_model(name, embed_dim=48)
    exact, stream = model.forward_features(images()), []
    model.blocks[-1].register_forward_hook(lambda *seen: stream.append(seen[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.forward_features(images())
    assert stream == [torch.float32]
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hydra", {"embed_dim": 25}, "width 25 is not divisible by 3 heads"),
        ("hydra", {"qk_norm": True}, "Hydra has no qk_norm"),
        ("hydra", {"class_token": False}, "no class token to read: leave class_token at True, or"),
        ("vim", {"class_token": False}, "no class token to read: leave class_token at True, or"),
        ("vim", {"init_values": 1e-4, "attn_drop_rate": 0.1}, "Vim has no attn_drop, init_values"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        small_model(name, **options)


# The command line

DEMO = (
    "--data-set", "DEMO", "--input-size", "28", "--batch-size", "50", "--epochs", "1",
    "--num_workers", "0", "--device", "cpu", "--no-repeated-aug", "--no-aug", "--mixup", "0",
    "--cutmix", "0", "--warmup-epochs", "0", "--lr", "4e-3", "--unscale-lr", "--model-kwargs",
    "patch_size=7", "embed_dim=16", "depth=1", "num_heads=2",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_learn_the_demo(name, tmp_path):
    arguments = ("--model", f"{name}_tiny_patch16_224", *DEMO, "--output_dir", tmp_path / "run")
    ranks = Ranks(tmp_path, *arguments)
    assert ranks.wait(120) == [0, 0], ranks.errors()
    (epoch,) = map(json.loads, (tmp_path / "run" / "log.txt").read_text().splitlines())
    assert epoch["test_acc1"] > 50, "of ten classes"


@pytest.mark.parametrize("name", MODELS)
def test_resume_fine_tune_and_distil(name, run, data_path, tmp_path):
    shared = (*TINY, "--batch-size", "40", "--data-path", data_path)
    plain = (*shared, "--model", f"{name}_tiny_patch16_224", "--layer-decay", "0.7")
    for folder, epochs in (("whole", "2"), ("parts", "1"), ("parts", "2")):
        resume = () if epochs == "1" or folder == "whole" else ("--resume", "auto")
        given = ("--sched", "none", "--epochs", epochs, "--output_dir", tmp_path / folder)
        assert run(*plain, *given, *resume).code == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(whole[key].equal(parts[key]) for key in whole)
    teacher = timm.create_model("test_resnet", num_classes=3)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    tuned = run(
        *shared, "--model", f"{name}_tiny_patch16_224", "--input-size", "24", "--attn-only",
        "--finetune", tmp_path / "whole" / "checkpoint.pth", "--distillation-type", "hard",
        "--teacher-model", "test_resnet", "--teacher-path", tmp_path / "teacher.pth",
    )  # fmt: skip
    assert tuned.code == 0, tuned.err
    assert f"building {name}_tiny_distilled_patch16_224" in tuned.out
    assert "pos_embed resampled from 17 to 38 tokens" in tuned.out


@pytest.mark.parametrize("name", [*MODELS, "vit"])
def test_arguments_of_lion_are_refused(name, run):
    ended = run(*TINY, "--model", f"{name}_tiny_patch16_224", "--order", "S", "--format", "RNN")
    assert ended.code == 2
    assert re.match(rf"main.py: error: {name}_tiny\S* takes no --order, --format: only", ended.err)


@pytest.mark.parametrize("name", MODELS)
def test_states_have_no_weight_decay(name):
    model = small_model(name)
    groups = timm.optim.param_groups_weight_decay(
        model, no_weight_decay_list=model.no_weight_decay()
    )
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    named = dict(model.named_parameters())
    names = {name for name, parameter in named.items() if id(parameter) in decayed}
    assert names == {n for n, p in named.items() if n.endswith("weight") and p.ndim > 1}
