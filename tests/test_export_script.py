"""scripts/export.py writes files that compute what the model does."""

import re
import shutil

import pytest
import timm
import torch
from helpers import long, older, same, slow

import checkpoint
import pretrained
from pretrained import Pretrained
from scripts import export

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2,
         "num_classes": 3}  # fmt: skip


@pytest.fixture
def call(ending, trained):
    def call(kind: str, output: object, *arguments: object, checkpoint: object = trained):
        words = ("--checkpoint", checkpoint, "--to", kind, "--output", output, *arguments)
        return ending(export.main, list(map(str, words)))

    return call


def saved_model(folder, name="lion_tiny_patch16_224", **options):
    """The checkpoint of a model with random weights, larger than they are drawn."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **options)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(5)
    kept = {k: v for k, v in SMALL.items() if k not in ("img_size", "num_classes")}
    args = {"model": name, "data_set": "IMNET", "input_size": 16, "model_kwargs": kept | options}
    torch.save({"model": model.state_dict(), "args": args}, folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize("name", ["checkpoint.pth", "best_checkpoint.pth"])
def test_no_file_of_a_run_is_replaced(name, call, trained, tmp_path):
    shutil.copy(trained, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    ended = call("checkpoint", tmp_path / name)
    assert ended.code == 2
    assert f"{name} is a file of a run: choose another" in ended.err
    assert (tmp_path / name).read_bytes() == before


def test_a_failed_export_leaves_the_file_before(call, tmp_path, monkeypatch):
    (tmp_path / "model.pt2").write_text("before")
    monkeypatch.setattr(export, "to_torch", lambda *_: lambda images: images)
    ended = call("torch", tmp_path / "model.pt2")
    assert ended.code == 1
    assert "cannot be exported to torch" in ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


@pytest.mark.parametrize(
    ("kind", "format"),
    [slow("torch", "Attention"), long("torch", "Chunk"), long("torch", "RNN"),
     slow("onnx", "Attention"), long("onnx", "Chunk"), long("onnx", "RNN")],
)  # fmt: skip
def test_any_batch_and_size(kind, format, call, trained, tmp_path):
    if kind == "torch" and older("timm", "1.0.31"):
        pytest.skip("timm 1.0.31 exports positions of any size")
    path = tmp_path / f"model{export.SUFFIXES[kind]}"
    ended = call(kind, path, "--format", format, "--chunk-size", "5")
    assert ended.code == 0, ended.err
    tried = "2x3x20x24, 2x3x16x16, 1x3x16x16, 3x3x16x16, 1x3x32x32"
    assert f"agrees with the model for {tried}\nwrote {path}\n" in ended.out
    images = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(3))
    if kind == "torch":
        actual = torch.export.load(path).module()(images)
    else:
        import onnxruntime

        (actual,) = onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})
    model = pretrained.load(trained, options={"dynamic_img_size": True}).model
    torch.testing.assert_close(torch.as_tensor(actual), model(images), atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lion_tiny_patch16_224", {"mask_type": "Decay", "order": "Hilbert"}),
        ("lion_tiny_patch16_224", {"mask_type": "Selective", "order": "S+Morton"}),
        long("vim_tiny_patch16_224", {}),
        ("hydra_tiny_patch16_224", {}),
    ],
)
def test_one_size_where_loops_or_the_architecture_settle_it(name, options, call, tmp_path):
    source = saved_model(tmp_path, name, **options)
    ended = call("torch", tmp_path / "model.pt2", checkpoint=source)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("It takes images of one size alone")
    assert "for 2x3x16x16, 1x3x16x16, 3x3x16x16\n" in ended.out


@pytest.mark.parametrize(
    ("mask", "order"),
    [
        ("Lit", "Normal"),
        slow("Decay", "Normal"),
        slow("Decay", "Diagonal"),
        slow("Selective", "Snakes"),
    ],
)
def test_every_mask_and_open_order(mask, order, call, tmp_path):
    source = saved_model(tmp_path, mask_type=mask, order=order)
    ended = call("torch", tmp_path / "model.pt2", checkpoint=source)
    assert ended.code == 0, ended.err
    assert "1x3x32x32" in ended.out, ended.err


def test_a_checkpoint_is_read_once(trained, monkeypatch):
    read, load = [], checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda source: read.append(source) or load(source))
    words = ("--checkpoint", trained, "--to", "torch", "--output", "m.pt2")
    assert export.parse(list(map(str, words))).trained.model.dynamic_img_size
    assert read == [str(trained)]


@pytest.mark.slow
def test_a_fixed_size(call, tmp_path):
    ended = call("torch", tmp_path / "model.pt2", "--fixed-size")
    assert ended.code == 0
    assert ended.out.startswith("agrees with the model for 2x3x16x16, 1x3x16x1")


def test_a_file_that_computes_something_else_is_not_left(trained, tmp_path, monkeypatch):
    def wrong(model, example, varying, path):
        path.write_text("")
        return lambda images: model(images) + 1

    monkeypatch.setattr(export, "to_torch", wrong)
    with pytest.raises(RuntimeError, match="cannot be exported to torch: Tensor-likes are not cl"):
        export.export(pretrained.load(trained), "torch", tmp_path / "m.pt2", any_size=False)
    assert not (tmp_path / "m.pt2").exists()


def test_a_model_that_no_exporter_takes_is_told(call, trained, tmp_path, monkeypatch):
    load = export.trained_model.load

    def odd(*arguments, **more) -> Pretrained:
        found = load(*arguments, **more)
        found.model.register_forward_hook(lambda m, i, y: y * float(y.sum()))
        return found

    monkeypatch.setattr(export.trained_model, "load", odd)
    ended = call("torch", tmp_path / "m.pt2")
    last = ended.err.splitlines()[-1]  # PyTorch prints the graph before it
    assert ended.code == 1
    assert last.startswith("error: This model cannot be exported to torch: ")


def test_weights_alone(call, trained, tmp_path):
    assert call("checkpoint", tmp_path / "half.pth", "--half").code == 0
    small = checkpoint.load(tmp_path / "half.pth")
    assert {v.dtype for v in small["model"].values()} == {torch.float16}
    large = checkpoint.load(trained)
    large["model"]["head.bias"][0] = 70_000.0
    checkpoint.save(large, tmp_path / "large.pth")
    ended = call(
        "checkpoint", tmp_path / "no.pth", "--half", "--checkpoint", tmp_path / "large.pth"
    )
    assert ended.code == 1
    assert "head.bias has values beyond float16's 65,504" in ended.err
    assert not (tmp_path / "no.pth").exists()
    assert call("safetensors", tmp_path / "folder", "--use-ema").code == 0
    average = checkpoint.load(trained)["model_ema"]
    assert same(dict(checkpoint.load(tmp_path / "folder")["model"]), dict(average))


@pytest.mark.parametrize(
    ("kind", "output", "arguments", "message"),
    [
        ("onnx", "model.pt", [], "--to onnx writes a file: --output must end in .onnx"),
        ("torch", "nowhere/model.pt2", [], "There is no folder for --output .*nowhere/model.pt2"),
        ("checkpoint", "m.pth", ["--format", "RNN"], "are of --to onnx and torch: leave them out"),
        ("onnx", "m.onnx", ["--half"], "--half is of --to checkpoint: leave it out"),
        ("torch", "m.pt2", ["--chunk-size", "-1"], "chunk_size must be at least 1, not -1"),
        ("torch", "m.pt2", ["--chunk-size", "0"], "chunk_size must be at least 1, not 0"),
        ("torch", "m.pt2", ["--checkpoint", "no.pth"], "cannot read the checkpoint no.pth"),
    ],
)
def test_bad_input(kind, output, arguments, message, call, tmp_path):
    ended = call(kind, tmp_path / output, *arguments)
    assert ended.code == 2, ended.err
    assert re.search(message, ended.err), ended.err
    assert not list(tmp_path.iterdir())


def test_onnx_tells_what_it_needs(call, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "NEEDED", ("onnx", "no_such_package"))
    ended = call("onnx", tmp_path / "m.onnx")
    assert ended.code == 2
    assert "needs no_such_package: pip install no_such_package" in ended.err
