"""What goes beyond the paper's model: off by default, alike in every format, and trained."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import timm
import torch
from helpers import TINY, refused, weights

import models_lion
from models_lion import FEATURE_MAPS, FORMATS, Masks
from models_lion_plus import PLUS, LionPlusAttention, Place
from models_masked_softmax import MaskedSoftmaxAttention

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 5}


def build(*plus: str, family: str = "lion_plus", **kwargs):
    torch.manual_seed(0)
    options = {"plus": plus} if family == "lion_plus" else {}
    options |= {"mask_type": "Selective", "order": "S", "chunk_size": 5, **SMALL, **kwargs}
    return timm.create_model(f"{family}_tiny_patch16_224", **options).eval()


def images(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_without_anything_it_is_lion():
    plus, lion = build(), build(family="lion")
    assert plus.state_dict().keys() == lion.state_dict().keys()
    plus.load_state_dict(lion.state_dict())
    assert plus(images()).equal(lion(images()))


@pytest.mark.parametrize("mask, plus", [*product(FEATURE_MAPS, PLUS), ("Selective", "all")])
def test_formats_agree_and_all_is_trained(mask, plus):
    plus = PLUS if plus == "all" else (plus,)
    model = build(*plus, mask_type=mask, dynamic_img_size=True, pos_emb=True)
    plain = build(mask_type=mask, dynamic_img_size=True, pos_emb=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    for size in ((32, 32), (24, 40)):
        results = []
        for format in FORMATS:
            model.set_format(format)
            model.zero_grad()
            y = model(images(*size))
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert torch.allclose(a, b, atol=1e-5, rtol=1e-3)
        assert all(gradient.abs().sum() > 0 for gradient in results[0])
        assert (results[0][0] - plain(images(*size))).abs().max() > 1e-4


def mixer(*plus: str, **kwargs) -> LionPlusAttention:
    torch.manual_seed(0)
    options = {"mask_type": "Decay", **kwargs}
    return LionPlusAttention(16, 2, plus=plus, **options).double()


def test_convolution_adds_what_is_around_each_patch():
    layer, plain = mixer("conv"), mixer()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    expected = torch.zeros(1, 13, 16, dtype=torch.float64)
    kernel, bias = layer.conv.weight[:, 0], layer.conv.bias
    for row in range(3):
        for column in range(4):
            total = bias.clone()
            for dy, dx in product((-1, 0, 1), repeat=2):
                r, c = row + dy, column + dx
                if 0 <= r < 3 and 0 <= c < 4:
                    total = total + kernel[:, dy + 1, dx + 1] * x[0, 1 + 4 * r + c]
            expected[0, 1 + 4 * row + column] = total
    place = Place(None, (3, 4), None)
    added = layer(x, place) - plain(x, place)
    assert torch.allclose(added, expected @ layer.proj.weight.T)


def test_gate_scales_what_is_projected():
    layer, plain = mixer("gate", proj_bias=False), mixer(proj_bias=False)
    layer.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.zeros_(layer.gate.weight)
    torch.nn.init.zeros_(layer.gate.bias)
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    assert torch.allclose(layer(x), plain(x) / 2)
    torch.nn.init.constant_(layer.gate.bias, 50)
    assert torch.allclose(layer(x), plain(x))


def test_rotary_embedding_is_of_the_numerator_alone():
    """Of equal values the mean is no longer that value, but sums of weights are as without it."""
    model, plain = (
        build("rope", mask_type="Lit", order="Normal"),
        build(mask_type="Lit", order="Normal"),
    )
    plain.load_state_dict(model.state_dict())
    place = model._curves_for(images())
    layer, bare = model.blocks[0].attn, plain.blocks[0].attn
    x = torch.randn(2, 17, 24)
    q, k, v = (torch.rand(2, 3, 17, 8) + 0.1 for _ in range(3))
    masks = Masks(None, place)
    denominator = (q @ k.mT).sum(-1, keepdim=True)
    rotated = layer._rotated(q, place.angles)
    scores = rotated @ layer._rotated(k, place.angles).mT
    assert torch.allclose(
        layer._attend(q, k, v, masks), scores @ v / (denominator + 1e-6), atol=1e-5
    )
    assert rotated[:, :, 0].equal(q[:, :, 0])  # the class token has no place
    lengths = [t.norm(dim=-1) for t in (q, rotated)]
    assert torch.allclose(*lengths)
    assert not torch.allclose(layer(x, place), bare(x, place), atol=1e-3)


def test_scores_of_the_rotary_embedding_depend_on_the_distance():
    model = build("rope")
    angles = model._curves_for(images()).angles
    rotate = model.blocks[0].attn._rotated
    q, k = (torch.rand(8).expand(1, 1, 17, 8) for _ in range(2))
    scores = (rotate(q, angles) @ rotate(k, angles).mT)[0, 0, 1:, 1:].view(4, 4, 4, 4)
    assert torch.allclose(scores[0, 0, 1, 2], scores[2, 1, 3, 3], atol=1e-5)
    assert torch.allclose(scores[1, 1, 1, 3], scores[3, 0, 3, 2], atol=1e-5)
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-4  # rows are not columns


def test_checkpointed_blocks_compute_again_on_their_own_grid():
    results = []
    for saving in (False, True):
        model = build(*PLUS, dynamic_img_size=True)
        model.set_grad_checkpointing(saving)
        sum(model(images(h, w)).square().sum() for h, w in ((16, 64), (64, 16))).backward()
        results.append([p.grad for p in model.parameters()])
    for plain, saved in zip(*results, strict=True):
        assert torch.allclose(plain, saved, atol=1e-5)


def test_threads_with_images_of_other_shapes():
    model = build(*PLUS, dynamic_img_size=True)
    shapes = [(16, 64), (64, 16), (32, 32), (24, 40)] * 8
    with torch.inference_mode():
        expected = [model(images(*shape)) for shape in shapes[:4]]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda shape: model(images(*shape)), shapes))
    for i, y in enumerate(found):
        assert torch.allclose(y, expected[i % 4], atol=1e-6)


def test_gradient_checkpointing_and_inference_before_training():
    model = build(*PLUS)
    with torch.inference_mode():
        model(images())
    y = model(images())
    y.sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images()).sum().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"plus": ("x",)}, "Unknown plus 'x': choose some of conv, gate, rope"),
        ({"plus": ("rope",), "num_heads": 4}, "heads of a multiple of 4 wide, not 6"),
        ({"plus": ("conv",), "order": "Normal", "patch_drop_rate": 0.5}, "need every patch"),
    ],
)
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("lion_plus_tiny_patch16_224", **SMALL, **kwargs)


def test_command_line(run, data_path, tmp_path):
    options = (*TINY, "--plus", "conv", "rope", "gate", "--data-path", data_path)
    assert run(*options, "--output_dir", tmp_path).code == 0
    names = weights(tmp_path)
    assert "blocks.1.attn.conv.weight" in names
    assert "blocks.1.attn.gate.weight" in names
    checkpoint = tmp_path / "checkpoint.pth"
    assert run(*options, "--eval", "--resume", checkpoint, "--format", "Chunk").code == 0


OF_OTHERS = r"--plus is of lion_base_patch16_224, .*, and not of"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model vit_tiny_patch16_224", "vit_tiny_patch16_224 takes no --plus: only lion"),
        ("--model lion_softmax_tiny_patch16_224", f"{OF_OTHERS} lion_softmax_tiny_patch16_224"),
        ("--model lion_tiny_distilled_patch16_224", f"{OF_OTHERS} lion_tiny_distilled"),
        ("--distillation-type hard --teacher-path x.pth", f"{OF_OTHERS} lion_tiny_distilled"),
    ],
)
def test_models_without(options, message, run, tmp_path):
    arguments = (*TINY, *options.split(), "--plus", "conv", "--output_dir", tmp_path / "run")
    refused(run(*arguments, "--data-path", tmp_path / "absent"), message, tmp_path / "run")


def test_kernels_are_for_what_they_compute(monkeypatch):
    monkeypatch.setattr(models_lion, "_has_kernel", lambda *_: True)  # as on a GPU
    x = torch.randn(1, 13, 16)
    assert mixer("conv", "gate")._has_kernel(x)
    assert not mixer("rope")._has_kernel(x)
    assert not MaskedSoftmaxAttention(16, 2)._has_kernel(x)
