"""Orders of any number of curves, and starts of decays, in every format and in the kernels."""

import pytest
import timm
import torch
from helpers import TINY, refused
from kernel_cases import DEVICE
from reference import dense
from test_formats import RUNS, assert_close, outputs_and_gradients
from test_models import images, small_model

import models_masked_softmax  # noqa: F401, registers models
from curves import ORDERS, num_curves, scan_curves
from decays import DECAY_INITS, decay_logits, start_exponents
from models_lion import FEATURE_MAPS, FORMATS, LionAttention, Masks

MANY = "Snakes+Diagonal+Hilbert"  # eight curves


@pytest.mark.parametrize("order", [*ORDERS, MANY])
@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_formats_agree_with_the_dense_formula(mask, order):
    generator = torch.Generator().manual_seed(0)
    curves = scan_curves(order, (3, 5), num_prefix=1)
    q, k = (torch.rand(2, 2, 16, 4, generator=generator).double() + 0.1 for _ in range(2))
    v = torch.randn(2, 2, 16, 4, generator=generator).double()
    shape = (num_curves(order), 1, 2, 1) if mask == "Decay" else (num_curves(order), 2, 2, 16)
    logits = torch.randn(shape, generator=generator).double()
    log_decay = torch.nn.functional.logsigmoid(logits).expand(-1, -1, -1, 16).contiguous()
    tensors = [q, k, v, log_decay]
    expected = outputs_and_gradients(dense, tensors, curves, torch.float64)
    for format, size in RUNS[:4]:
        actual = outputs_and_gradients(
            FORMATS[format], tensors, curves, torch.float64, chunk_size=size
        )
        assert_close(actual, expected, 1e-10, f"{format} {size}")


@pytest.mark.parametrize("order", ["Snakes", "Hilbert", MANY])
@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_kernels_take_any_number_of_curves(mask, order):
    torch.manual_seed(0)
    layer = LionAttention(32, 2, mask_type=mask, order=order).to(DEVICE)
    x = torch.randn(1, 13, 32, device=DEVICE)
    curves = scan_curves(order, (3, 4), num_prefix=1, device=DEVICE)
    with torch.no_grad():
        by_kernel = layer._mix_by_kernel(x, curves, None, None)
        plain = layer._mix(layer.qkv(x), Masks(layer.log_decay(x), curves))
    assert (by_kernel - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize("family", ["lion", "lion_softmax"])
@pytest.mark.parametrize("order", [*ORDERS, MANY])
@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_gradients_reach_the_decays_of_every_curve(mask, order, family):
    torch.manual_seed(0)
    model = timm.create_model(
        f"{family}_tiny_patch16_224", mask_type=mask, order=order, img_size=16, patch_size=4,
        embed_dim=24, depth=2, num_classes=5, decay_init="multiscale",
    )  # fmt: skip
    names = model.blocks[0].attn.gate_names
    assert names[:2] == ("a_i", "a2_i")
    assert len(names) == num_curves(order)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("order", ["Diagonal", MANY])
def test_models_take_other_grids_and_agree_in_every_format(order):
    model = small_model("Selective", order, dynamic_img_size=True)
    outputs = []
    with torch.no_grad():
        for format in FORMATS:
            model.set_format(format)
            outputs.append(model(images(height=24, width=40)))
    assert all(torch.allclose(y, outputs[0], atol=1e-5) for y in outputs[1:])
    for block in model.blocks:  # the curves count
        block.attn.a2_i.bias.data += 3
    with torch.no_grad():
        assert (model(images(height=24, width=40)) - outputs[0]).abs().max() > 1e-4


def test_unknown_order_is_refused(run, data_path, tmp_path):
    ended = run(*TINY, "--order", "S+Z", "--data-path", data_path, "--output_dir", tmp_path / "x")
    refused(ended, r"Unknown order 'S\+Z'", tmp_path / "x")


def test_an_order_of_several_trains(run, data_path):
    options = ("--order", "S+Hilbert", "--decay-init", "multiscale", "--data-path", data_path)
    assert run(*TINY, *options).code == 0


# ------------------------------------------------------------------------------ starts of decays


def decays(model, layer: int = 0) -> torch.Tensor:
    """Decays of the first curve `[H]`, without what a gate makes of its input."""
    gate = model.blocks[layer].attn.a_i
    return (
        (-gate.bias).sigmoid() if model.blocks[0].attn.mask_type == "Selective" else gate.sigmoid()
    )


def test_exponents():
    assert start_exponents("multiscale", 6, 0, 1).tolist() == [1, 2, 3, 4, 5, 6]
    assert [start_exponents("layers", 2, i, 6).tolist() for i in (0, 5)] == [[1, 1], [6, 6]]
    assert start_exponents("long", 2, 0, 1).tolist() == [6, 6]
    assert torch.allclose(
        decay_logits(torch.tensor([1.0, 6.0])).sigmoid(), torch.tensor([0.5, 1 - 1 / 64])
    )


@pytest.mark.parametrize("weight_init", ["", "reset", "jax", "moco"])
@pytest.mark.parametrize("init", DECAY_INITS[1:])
@pytest.mark.parametrize("mask", ["Decay", "Selective"])
def test_decays_start_as_asked(mask, init, weight_init):
    model = small_model(mask, "S", decay_init=init, depth=3, weight_init=weight_init)
    for _ in range(2):
        for layer, block in enumerate(model.blocks):
            expected = 1 - 2.0 ** -start_exponents(init, 3, layer, 3)
            assert torch.allclose(decays(model, layer), expected)
            for gate in block.attn._gates() if mask == "Selective" else ():
                assert 0.003 < gate.weight.std() < 0.009
        model.init_weights()


@pytest.mark.parametrize("mask", FEATURE_MAPS)
def test_the_start_of_the_paper_is_the_default(mask):
    default, paper = small_model(mask, "S"), small_model(mask, "S", decay_init="paper")
    assert all(
        a.equal(b)
        for a, b in zip(default.state_dict().values(), paper.state_dict().values(), strict=True)
    )
    if mask == "Selective":
        assert torch.allclose(decays(default), torch.tensor(0.5))
    elif mask == "Decay":
        gates = torch.cat([block.attn.a_i.data for block in small_model(mask, depth=100).blocks])
        assert abs(gates.mean()) < 0.2
        assert abs(gates.std() - 1) < 0.15


def test_a_start_changes_no_names_and_no_shapes():
    states = [small_model("Selective", "S", decay_init=i).state_dict() for i in DECAY_INITS]
    shapes = [{name: t.shape for name, t in state.items()} for state in states]
    assert all(shape == shapes[0] for shape in shapes)


def test_unknown_start():
    with pytest.raises(ValueError, match="Unknown decay_init 'x': choose one of paper, multiscale"):
        small_model(decay_init="x")
