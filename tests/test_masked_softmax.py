"""The control: softmax attention with LION's mask, against its formula."""

from itertools import product

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY, refused
from reference import curves_for, dense_mask

import models_masked_softmax  # noqa: F401, registers models
from models_lion import FEATURE_MAPS
from models_masked_softmax import MaskedSoftmaxAttention

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("mask, order", [("Decay", "Normal"), ("Decay", "S"), ("Selective", "S")])
def test_weights_are_a_softmax_of_scores_and_log_mask(mask, order):
    torch.manual_seed(0)
    layer = MaskedSoftmaxAttention(8, 1, mask_type=mask, order=order, num_prefix_tokens=1).double()
    x, curves = torch.randn(1, 13, 8, dtype=torch.float64), curves_for(order, 13)
    q, k, v = layer.qkv(x)[0].split(8, -1)
    decays = layer.log_decay(x)[:, 0, 0].exp()
    along = torch.arange(13)[None] if curves is None else curves
    masks = []
    for curve, decay in zip(along, decays, strict=True):
        masks.append(torch.empty(13, 13, dtype=torch.float64))
        masks[-1][curve[:, None], curve[None]] = dense_mask(decay[curve])
    weights = sum(masks) / len(masks) * (q @ k.T / 8**0.5).exp()
    expected = layer.proj(weights / weights.sum(-1, keepdim=True) @ v)
    assert torch.allclose(layer(x, curves)[0], expected, atol=1e-6)


def test_without_decays_it_is_plain_attention():
    torch.manual_seed(0)
    layer, x = MaskedSoftmaxAttention(16, 2, mask_type="Lit"), torch.randn(2, 9, 16)
    q, k, v = layer.qkv(x).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x), layer.proj(expected), atol=1e-6)


@pytest.mark.parametrize("mask, order", list(product(FEATURE_MAPS, ("Normal", "S"))))
def test_gradients_reach_every_parameter(mask, order):
    torch.manual_seed(0)
    options = {"mask_type": mask, "order": order, "pos_emb": True, **SMALL}
    model = timm.create_model("lion_softmax_tiny_patch16_224", **options)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    lion = timm.create_model("lion_tiny_patch16_224", **options)
    assert model.state_dict().keys() == lion.state_dict().keys()


def test_far_tokens_behind_closed_gates_stay_finite():
    layer = MaskedSoftmaxAttention(8, 1, mask_type="Decay", order="Normal")
    torch.nn.init.constant_(layer.a_i, -80.0)
    layer(torch.randn(1, 300, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_other_formats_are_refused(run, data_path, tmp_path):
    options = ("--model", "lion_softmax_tiny_patch16_224", "--format", "RNN")
    ended = run(*TINY, *options, "--data-path", data_path, "--output_dir", tmp_path / "run")
    refused(ended, "no format RNN: use Attention", tmp_path / "run")
