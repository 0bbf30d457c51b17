"""scripts/visualize.py shows what the model computes, not something like it."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models_lion_plus  # noqa: F401  (these register the models)
import models_masked_softmax  # noqa: F401
import pretrained
from scripts import pictures, visualize
from scripts.traces import Choice, trace

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2,
         "num_classes": 3}  # fmt: skip


@pytest.fixture
def call(ending, trained, data_path, tmp_path):
    def call(*arguments: object, checkpoint: object = trained):
        image = data_path / "val" / "class0" / "0.png"
        words = (image, "--checkpoint", checkpoint, "--output", tmp_path / "out", *arguments)
        return ending(visualize.main, list(map(str, words)))

    return call


@pytest.fixture
def found(trained):
    loaded = pretrained.load(trained)
    return trace(loaded, torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lion", {"mask_type": "Lit"}),
        ("lion", {"mask_type": "Decay", "format": "Chunk"}),
        ("lion", {"mask_type": "Selective", "order": "S", "format": "RNN"}),
        ("lion_plus", {"mask_type": "Selective", "order": "S", "plus": ["rope"]}),
        ("lion_softmax", {"mask_type": "Decay", "order": "S"}),
    ],
)
def test_weights_times_values_are_what_the_mixer_computes(name, options):
    torch.manual_seed(0)
    model = timm.create_model(f"{name}_tiny_patch16_224", **SMALL, **options).eval()
    mixed = []

    def check(mixer, inputs, named, output):
        tokens, curves = inputs[0], named["attn_mask"]
        weights = mixer.attention_weights(tokens, curves)
        values = mixer.qkv(tokens)[..., -16:].unflatten(-1, (2, 8)).transpose(1, 2)
        expected = mixer.proj((weights @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
        mixed.append(weights.sum(-1))

    for block in model.blocks:
        block.attn.register_forward_hook(check, with_kwargs=True)
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert len(mixed) == 2
    if options.get("plus") is None:  # rotated products need not be positive
        torch.testing.assert_close(torch.stack(mixed), torch.ones(2, 2, 2, 17), atol=1e-3, rtol=0)


def test_a_trace_is_of_the_patches(found, trained):
    model = pretrained.load(trained).model
    assert found.weights.shape == (2, 2, 17, 17)
    assert found.decays.shape == (2, 2, 2, 16)
    assert found.grid == (4, 4)
    assert found.prefix == 1
    shown = found.attention_of(2, 1, (3, 2))
    assert shown.equal(found.weights[1, 0, 1 + 2 * 4 + 1, 1:].view(4, 4))
    assert found.curves.tolist()[0] == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11, 15, 14, 13, 12]
    seen = []
    model.blocks[1].attn.a2_i.register_forward_hook(lambda *a: seen.append(a[2]))
    pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(pixels[None])
    torch.testing.assert_close(found.decays[1, 1], 1 - seen[0][0, 1:].sigmoid().T)


def test_pictures_hold_the_numbers_of_the_trace(found):
    choice = Choice(layers=[2], heads=[2, 1], query=(3, 2))
    figure = pictures.attention(found, choice)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for head, array in zip(choice.heads, shown[1:3], strict=True):
        np.testing.assert_allclose(array, found.attention_of(2, head, (3, 2)))
    figure = pictures.gates(found, choice)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 1 + 4
    assert not np.allclose(shown[1], shown[2])
    np.testing.assert_allclose(shown[4], found.decays[1, 1, 0].view(4, 4))
    table = pictures.decays(found, choice).axes[0].images[0].get_array()
    np.testing.assert_allclose(table[1], found.decays[1].mean(-1).T.flatten(), rtol=1e-5)
    lines = pictures.curves(found, choice).axes[0].collections[0].get_segments()
    assert len(lines) == 15
    assert lines[3].tolist() == [[3.5, 0.5], [3.5, 1.5]]


def test_an_overview_is_of_the_chosen_heads(found):
    def drawn(heads):
        figure = pictures.overview(found, Choice(layers=[2], heads=heads, query=(3, 2)))
        titles = [axes.get_title().partition("head ")[2] for axes in figure.subfigs[1].axes]
        return [title for title in titles if title]

    assert drawn([2]) == ["2", "2, curve 1", "2, curve 2"]
    first, second, *gates = drawn([2, 1])
    assert (first, second) == ("2", "1")
    assert len(gates) == 3
    assert gates == sorted(gates)


def test_an_overview_has_no_empty_panels(found):
    choice = Choice(layers=[2], heads=[1, 2], query=(3, 2))
    figure = pictures.overview(replace(found, decays=None, selective=False), choice)
    assert all(axes.axison and axes.has_data() for axes in figure.axes)


def test_every_picture_is_written(call, tmp_path):
    ended = call("--query", "1", "4", "--layers", "2", "--heads", "1")
    assert ended.code == 0, ended.err
    files = sorted(path.stem for path in (tmp_path / "out").iterdir())
    assert files == sorted(visualize.PICTURES)
    for path in (tmp_path / "out").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10
        assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("mask", "left_out"),
    [("Lit", {"decays": "has no decays", "gates": "has no decays"}),
     ("Decay", {"gates": "do not depend on the image"})],
)  # fmt: skip
def test_what_a_model_does_not_have_is_said(mask, left_out, call, tmp_path):
    model = timm.create_model("lion_tiny_patch16_224", mask_type=mask, **SMALL)
    args = {"model": "lion_tiny_patch16_224", "mask_type": mask, "data_set": "IMNET",
            "input_size": 16, "model_kwargs": {k: SMALL[k] for k in list(SMALL)[1:5]}}  # fmt: skip
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "model.pth")
    ended = call(checkpoint=tmp_path / "model.pth")
    assert ended.code == 0, ended.err
    for name in visualize.PICTURES:
        assert (tmp_path / "out" / f"{name}.png").exists() != (name in left_out)
        if name in left_out:
            assert f"no {name}.png: LION-{mask[:3] if mask == 'Lit' else 'D'}" in ended.out
            assert left_out[name] in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1", "3"], "--layers counts from 1 to 2 in this model, so not 3"),
        (["--heads", "0"], "--heads counts from 1 to 2 in this model, so not 0"),
        (["--query", "1", "5"], "--query COLUMN counts from 1 to 4 in this model, so not 5"),
        (["--checkpoint", "missing.pth"], "cannot read the checkpoint missing.pth"),
        (["--pictures", "map"], "invalid choice: 'map'"),
    ],
)
def test_bad_input(arguments, message, call, tmp_path):
    ended = call(*arguments)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "out").exists()


def test_other_models_and_files_are_refused(call, ending, trained, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "r.pth")
    ended = call("--model", "test_resnet", checkpoint=tmp_path / "r.pth")
    assert ended.code == 2
    assert "r.pth is a test_resnet: name one of a LION model" in ended.err
    (tmp_path / "broken.png").write_bytes(b"")
    words = [str(tmp_path / "broken.png"), "--checkpoint", str(trained)]
    ended = ending(visualize.main, words)
    assert ended.code == 2
    assert "Cannot read the image" in ended.err
