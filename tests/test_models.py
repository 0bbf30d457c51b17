import copy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import slow_except

import models_lion  # noqa: F401  (registers the models)
from models_lion import FEATURE_MAPS, FORMATS, LionVisionTransformer

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
MASKS_ORDERS = list(product(FEATURE_MAPS, ("Normal", "S")))
VARIANTS = list(product(FEATURE_MAPS, ("Normal", "S"), FORMATS))
TRACED = slow_except(
    [("Lit", "Normal", "Chunk"), ("Decay", "Normal", "RNN"), ("Selective", "S", "Attention")],
    VARIANTS,
)
# Not the loop over tokens, all of whose steps are compiled.
COMPILED = slow_except([("Lit", "Normal", "Chunk"), ("Selective", "S", "Attention")], VARIANTS)


def small_model(mask="Decay", order="Normal", format="Attention", **kwargs):
    """Two blocks on a 4 x 4 grid of patches."""
    torch.manual_seed(0)
    defaults = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 5}
    return timm.create_model(
        "lion_tiny_patch16_224",
        mask_type=mask,
        order=order,
        format=format,
        chunk_size=5,
        **{**defaults, **kwargs},
    ).eval()


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_published_outputs_are_reproduced(path, format):
    mask, order, *options = path.stem.split("_")
    model = LionVisionTransformer(
        img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=10,
        mask_type=mask.capitalize(), order={"normal": "Normal", "s": "S"}[order],
        pos_emb="pos" in options, cls_tok="cls" in options, format=format,
    ).eval()  # fmt: skip
    data = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    state = {n.removeprefix("state/"): t for n, t in data.items() if n.startswith("state/")}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert (model(data["input"]) - data["logits"]).abs().max() < 1e-5
    assert len(GOLDEN) == 8


PARAMETERS = {
    "tiny": (5_679_592, 5_679_664, 5_686_540, 5_693_488),
    "small": (21_975_016, 21_975_160, 22_002_736, 22_030_456),
    "base": (86_416_360, 86_416_648, 86_527_096, 86_637_832),
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    kinds = (("Lit", "Normal"), ("Decay", "S"), ("Selective", "Normal"), ("Selective", "S"))
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in timm.create_model(
                f"lion_{size}_patch16_224", mask_type=mask, order=order).parameters())
            for mask, order in kinds
        ]  # fmt: skip
    assert tuple(counts) == PARAMETERS[size]


def test_pretrained_configuration_is_imagenet():
    cfg = timm.create_model("lion_tiny_patch16_224", depth=1).pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406)
    assert cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["input_size"] == (3, 224, 224)
    assert cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_every_parameter_gets_a_finite_nonzero_gradient(mask, order, format):
    model = small_model(mask, order, format).train()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("mask, order", MASKS_ORDERS)
def test_formats_switch_on_a_built_model(mask, order):
    model = small_model(mask, order)
    expected = model(images())
    for format, size in (("RNN", None), ("Chunk", 1), ("Chunk", 7), ("Chunk", 64)):
        model.set_format(format, chunk_size=size)
        assert torch.allclose(model(images()), expected, atol=1e-5), format


@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_any_image_size_and_shape_and_batch_one(mask, order, format):
    fixed = small_model(mask, order, format, img_size=(24, 40))
    dynamic = small_model(mask, order, format, dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    x = images(1, 24, 40)
    assert torch.allclose(dynamic(x), fixed(x), atol=1e-6)
    resized = small_model(mask, order, format)
    resized.load_state_dict(fixed.state_dict())
    resized.set_input_size((24, 40))
    assert torch.equal(resized(x), fixed(x))


@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_a_batch_of_no_images(mask, order, format):
    """As timm's models take it: the last batch of a shard may be one."""
    model = small_model(mask, order, format, pos_emb=True, dynamic_img_size=True)
    out = model(images(0))
    out.sum().backward()
    assert out.shape == (0, 5)
    assert model(images(0, 40, 24)).shape == (0, 5)
    assert model.forward_features(images(0)).shape == (0, 17, 24)


@pytest.mark.parametrize("mask, order", MASKS_ORDERS)
def test_timm_features(mask, order):
    model = small_model(mask, order)
    x = images()
    final, maps = model.forward_intermediates(x)
    assert torch.allclose(final, model.forward_features(x), atol=1e-6)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 2
    features = small_model(mask, order, features_only=True, out_indices=2)
    assert torch.allclose(features(x)[-1], maps[-1], atol=1e-6)
    assert model.forward_head(final, pre_logits=True).shape == (2, 24)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "token")
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


def test_pooling_of_all_tokens_or_the_class_token():
    mean, token = small_model(), small_model(cls_tok=True)
    tokens = mean.forward_features(images())
    assert torch.allclose(mean(images()), mean.head(tokens.mean(1)), atol=1e-6)
    assert torch.allclose(token(images()), token.head(tokens[:, 0]), atol=1e-6)


@pytest.mark.parametrize("mask, order, format", VARIANTS)
def test_gradient_checkpointing_changes_nothing(mask, order, format):
    plain = small_model(mask, order, format, dynamic_img_size=True).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    losses = []
    for model in (plain, saving):
        # Two grids of as many tokens before one backward: each recomputation needs its own curves.
        loss = sum(model(images(2, h, w)).square().sum() for h, w in ((16, 64), (64, 16)))
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


@pytest.mark.parametrize("mask, order, format", COMPILED)
def test_compiles_without_graph_breaks(mask, order, format):
    torch.compiler.reset()
    model = small_model(mask, order, format, depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    compiled(images()).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        compiled(images())


@pytest.mark.slow
def test_compiles_with_inductor():
    torch.compiler.reset()
    model = small_model("Selective", "S", "Chunk", depth=1)
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)


@pytest.mark.parametrize("mask, order, format", TRACED)
def test_exports_with_a_dynamic_batch(mask, order, format):
    model = small_model(mask, order, format, depth=1)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    assert torch.allclose(exported.module()(images(7)), model(images(7)), atol=1e-5)


def test_state_dict_loads_through_timm(tmp_path):
    model = small_model("Selective", "S", pos_emb=True)
    torch.save({"model": model.state_dict()}, tmp_path / "published.pth")
    loaded = small_model(
        "Selective", "S", pos_emb=True, checkpoint_path=str(tmp_path / "published.pth")
    )
    assert torch.equal(loaded(images()), model(images()))


def test_saved_folder_builds_the_same_model(tmp_path):
    options = {"mask_type": "Selective", "order": "S", "img_size": 32, "patch_size": 8}
    model = timm.create_model("lion_tiny_patch16_224", depth=1, num_classes=5, **options).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"depth": 1, **options})
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(images()), model(images()))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": "Lion"}, "Unknown mask_type 'Lion': choose one of Lit, Decay, Selective"),
        ({"order": "Z"}, "Unknown order 'Z': choose one of Normal, S"),
        ({"order": 3}, "Unknown order 3: choose one of Normal, S"),
        ({"format": "Fast"}, "Unknown format 'Fast': choose one of Attention, RNN, Chunk"),
        ({"embed_dim": 25}, "The width 25 is not divisible by 3 heads"),
        ({"qk_norm": True}, "LION has no qk_norm"),
        ({"order": "S", "patch_drop_rate": 0.5}, "leave patch_drop_rate at 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_model(**options)


def test_chunk_size_below_one():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        small_model().set_format("Chunk", chunk_size=0)
