"""--finetune from every kind of checkpoint."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, TINY, VARIANT, refused, weights

import models_lion  # noqa: F401  (registers the models)
from checkpoint import adapt_weights

OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_classes": 3}


def model(name="lion_tiny", seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(f"{name}_patch16_224", **{**OPTIONS, **kwargs}).eval()


def images(size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pos_emb", [False, True])
def test_the_same_model_keeps_its_logits(pos_emb):
    options = {"mask_type": "Selective", "order": "S", "pos_emb": pos_emb}
    source, target = model(**options), model(seed=1, **options)
    assert adapt_weights(target, source.state_dict(), "file") == []
    assert torch.equal(target(images()), source(images()))


def test_a_published_state_dict_keeps_its_logits():
    data = np.load(ROOT / "tests" / "golden" / "selective_s_pos_cls.npz")
    data = {name: torch.from_numpy(data[name]) for name in data}
    target = model(img_size=32, embed_dim=48, num_classes=10, mask_type="Selective", order="S",
                   pos_emb=True, cls_tok=True)  # fmt: skip
    state = {n.removeprefix("state/"): v for n, v in data.items() if n.startswith("state/")}
    assert adapt_weights(target, {f"module.{n}": v for n, v in state.items()}, "file") == []
    assert (target(data["input"]) - data["logits"]).abs().max() < 1e-5


def test_torch_hub_finds_the_models():
    hub = torch.hub.load(str(ROOT), "lion_tiny_patch16_224", source="local", order="S", depth=1)
    assert len(hub.blocks) == 1
    assert hub.order == "S"


def test_another_class_count_replaces_the_head():
    source, target = model(), model(seed=1, num_classes=5)
    head = target.head.weight.clone()
    notes = adapt_weights(target, source.state_dict(), "file")
    assert notes[0] == "head replaced: 3 classes in the file, 5 here"
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.forward_features(images()), source.forward_features(images()))


def test_another_resolution_without_position_embedding_is_lossless():
    options = {"mask_type": "Selective", "order": "S"}
    source = model(**options, dynamic_img_size=True)
    target = model(seed=1, img_size=24, **options)
    assert adapt_weights(target, source.state_dict(), "file") == []
    assert torch.allclose(target(images(24)), source(images(24)), atol=1e-6)


def test_another_resolution_resamples_the_position_embedding():
    source, target = model(pos_emb=True), model(seed=1, img_size=24, pos_emb=True)
    notes = adapt_weights(target, source.state_dict(), "file")
    assert notes == ["pos_embed resampled from 17 to 37 tokens"]
    source.set_input_size((24, 24))
    assert torch.allclose(target(images(24)), source(images(24)), atol=1e-5)


def test_with_and_without_position_embedding():
    with_embedding, without = model(pos_emb=True), model(seed=1)
    notes = adapt_weights(without, with_embedding.state_dict(), "file")
    assert notes == ["not in the model, left out: pos_embed"]
    own = model(seed=2, pos_emb=True)
    before = own.pos_embed.clone()
    assert adapt_weights(own, without.state_dict(), "file") == [
        "not in the file, as initialised: pos_embed"
    ]
    assert torch.equal(own.pos_embed, before)


@pytest.mark.parametrize("pos_emb", [False, True])
def test_from_a_plain_to_a_distilled_model_and_back(pos_emb):
    options = {"mask_type": "Selective", "order": "S", "pos_emb": pos_emb}
    source = model(**options)
    distilled = model("lion_tiny_distilled", seed=1, **options)
    notes = adapt_weights(distilled, source.state_dict(), "file")
    added = "not in the file, as initialised: dist_token, head_dist.weight, head_dist.bias"
    assert notes[-1] == added
    back = model(seed=2, **options)
    notes = adapt_weights(back, distilled.state_dict(), "file")
    assert notes[-1] == "not in the model, left out: dist_token, head_dist.weight, head_dist.bias"
    assert torch.equal(back(images()), source(images()))


def test_from_deit_and_vit_into_lion():
    """What both have is loaded, the rest is named: LION's gates, and what LION has no use for."""
    for name, left_out in (
        ("vit_tiny", "pos_embed"),
        ("deit_tiny_distilled", "pos_embed, dist_token, head_dist.weight, head_dist.bias"),
    ):
        source, target = model(name, num_heads=3), model(seed=1, mask_type="Selective", order="S")
        missing, unused = adapt_weights(target, source.state_dict(), "file")
        assert missing == (
            "not in the file, as initialised: blocks.*.attn.a_i.weight, blocks.*.attn.a_i.bias, "
            "blocks.*.attn.a2_i.weight, blocks.*.attn.a2_i.bias"
        )
        assert sorted(unused.split(": ")[1].split(", ")) == sorted(left_out.split(", "))
        for own, shared in target.state_dict().items():
            if own in source.state_dict():
                assert torch.equal(shared, source.state_dict()[own]), own


def test_position_embedding_of_a_distilled_deit():
    source = model("deit_tiny_distilled", num_heads=3)
    target = model("lion_tiny_distilled", seed=1, pos_emb=True)
    adapt_weights(target, source.state_dict(), "file")
    assert torch.equal(target.pos_embed, source.pos_embed)
    plain = model(seed=1, pos_emb=True)
    adapt_weights(plain, source.state_dict(), "file")
    assert torch.equal(plain.pos_embed, source.pos_embed[:, [0, *range(2, 18)]])


@pytest.mark.parametrize("distilled", ["", "_distilled"])
def test_a_position_embedding_without_the_class_token(distilled):
    """DeiT III adds none to it, which is to add zero; a distillation token is not in the file."""
    source = model("deit3_small", embed_dim=24, num_heads=3)
    assert source.pos_embed.shape == (1, 16, 24)
    target = model(f"lion_tiny{distilled}", seed=1, pos_emb=True)
    own = target.pos_embed.clone()
    prefix = target.num_prefix_tokens
    notes = adapt_weights(target, source.state_dict(), "file")
    assert f"pos_embed fitted from 16 to {16 + prefix} tokens" in notes
    assert any("blocks.*.ls1.gamma" in note for note in notes if "left out" in note)
    assert not target.pos_embed[:, 0].any()
    assert torch.equal(target.pos_embed[:, 1:prefix], own[:, 1:prefix])
    assert torch.equal(target.pos_embed[:, prefix:], source.pos_embed)


def test_a_position_embedding_without_the_class_token_at_another_resolution():
    source = model("deit3_small", embed_dim=24, num_heads=3)
    target = model(seed=1, pos_emb=True, img_size=24)
    adapt_weights(target, source.state_dict(), "file")
    source.set_input_size((24, 24))
    assert torch.allclose(target.pos_embed[:, 1:], source.pos_embed, atol=1e-6)


def test_into_a_model_that_adds_no_position_to_the_class_token():
    """What the class token had is kept: the same function comes out."""
    options = {"num_heads": 3, "depth": 0, "init_values": None}
    source = model("vit_tiny", **options)
    target = model("deit3_small", seed=1, embed_dim=24, **options)
    assert adapt_weights(target, source.state_dict(), "file") == [
        "pos_embed fitted from 17 to 16 tokens"
    ]
    assert torch.allclose(target(images()), source(images()), atol=1e-6)


def test_deit_iii_as_its_authors_publish_it():
    source = model("deit3_small", embed_dim=24, num_heads=3)
    with torch.no_grad():
        for block in source.blocks:
            block.ls1.gamma.uniform_(), block.ls2.gamma.uniform_()
    state = {n.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v
             for n, v in source.state_dict().items()}  # fmt: skip
    target = model("deit3_small", seed=1, embed_dim=24, num_heads=3)
    assert adapt_weights(target, {"module." + n: v for n, v in state.items()}, "file") == []
    assert torch.equal(target(images()), source(images()))


def test_registers_have_no_position():
    options = {"num_heads": 3, "reg_tokens": 4}
    source, target = (model("vit_tiny", seed=i, no_embed_class=True, **options) for i in (0, 1))
    assert adapt_weights(target, source.state_dict(), "file") == []
    assert torch.equal(target(images()), source(images()))
    plain = model(seed=1, pos_emb=True)
    adapt_weights(plain, source.state_dict(), "file")
    assert torch.equal(plain.pos_embed[:, 1:], source.pos_embed)


def test_what_timm_resamples_for_a_family():
    """Windows and patches have shapes of their own at another resolution, or patch size."""
    options = {"num_classes": 3, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 8}
    source, target = (
        timm.create_model("swin_tiny_patch4_window7_224", img_size=8 * side, window_size=side,
                          **options)
        for side in (7, 12)
    )  # fmt: skip
    notes = adapt_weights(target, source.state_dict(), "file")
    assert [note.split(".attn.")[1] for note in notes] == [
        f"relative_position_bias_table resampled from [169, {heads}] to [529, {heads}]"
        for heads in (1, 2)
    ]
    target = model(seed=1, patch_size=8)
    notes = adapt_weights(target, model().state_dict(), "file")
    assert notes == ["patch_embed.proj.weight resampled from [24, 3, 4, 4] to [24, 3, 8, 8]"]


def test_a_file_of_another_size_or_of_nothing_shared():
    with pytest.raises(
        ValueError, match=r"shape of cls_token: file \[1, 1, 48\], model \[1, 1, 24"
    ):
        adapt_weights(model(), model(embed_dim=48).state_dict(), "file")
    with pytest.raises(ValueError, match="file shares no weight with the model"):
        adapt_weights(model(), {"conv.weight": torch.zeros(1)}, "file")
    state = {**model(pos_emb=True).state_dict(), "pos_embed": torch.zeros(1, 18, 24)}
    with pytest.raises(ValueError, match="17 patches, no square grid"):
        adapt_weights(model(pos_emb=True), state, "file")


def test_the_command_line_starts_from_the_file(data_path, tmp_path, run):
    kwargs = {"embed_dim": 16, "num_heads": 2, "num_classes": 7}
    source = model(**kwargs)
    torch.save({"model": source.state_dict()}, tmp_path / "published.pth")
    done = run(*TINY, "--finetune", tmp_path / "published.pth", "--lr", 1e-9, "--warmup-lr", 1e-9,
               "--min-lr", 1e-9, "--data-path", data_path,
               "--output_dir", tmp_path / "run")  # fmt: skip
    assert done.code == 0
    assert "head replaced: 7 classes in the file, 3 here" in done.out
    trained = weights(tmp_path / "run")
    for name, weight in source.state_dict().items():
        if not name.startswith("head"):
            assert torch.allclose(trained[name], weight, atol=1e-5), name


def test_a_run_that_goes_on_needs_no_more_what_it_started_from(trained, data_path, tmp_path, run):
    start = tmp_path / "start.pth"
    shutil.copy(trained, start)
    arguments = (*TINY, *VARIANT, "--data-path", data_path, "--finetune", start,
                 "--output_dir", tmp_path / "run", "--resume", "auto")  # fmt: skip
    assert run(*arguments).code == 0
    start.unlink()
    assert run(*arguments, "--epochs", "2").code == 0


@pytest.mark.parametrize(
    "options", [("--finetune",), ("--distillation-type", "hard", "--teacher-path")]
)
def test_what_a_run_starts_from_is_not_replaced_by_it(options, trained, data_path, tmp_path, run):
    start = tmp_path / "best_checkpoint.pth"
    shutil.copy(trained, start)
    ended = run(*TINY, *VARIANT, "--data-path", data_path, "--output_dir", tmp_path, "--overwrite",
                *options, start)  # fmt: skip
    refused(ended, f"{options[-1]} {start} is a file of the run that --overwrite would replace")
    assert start.exists()


def test_fine_tuning_with_distillation(data_path, tmp_path, run):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "t.pth")
    torch.save(model(embed_dim=16, num_heads=2).state_dict(), tmp_path / "plain.pth")
    done = run(*TINY, "--finetune", tmp_path / "plain.pth", "--distillation-type", "soft",
               "--teacher-model", "test_resnet", "--teacher-path", tmp_path / "t.pth",
               "--data-path", data_path)  # fmt: skip
    assert done.code == 0
    assert "as initialised: dist_token" in done.out


def test_layer_decay_lowers_the_learning_rate_towards_the_input(data_path, tmp_path, run):
    done = run(*TINY, "--layer-decay", 0.5, "--data-path", data_path,
               "--output_dir", tmp_path / "run")  # fmt: skip
    assert done.code == 0
    groups = weights(tmp_path / "run", "optimizer")["param_groups"]
    assert sorted({group["lr_scale"] for group in groups}) == [0.125, 0.25, 0.5, 1.0]
    logged = json.loads((tmp_path / "run" / "log.txt").read_text())["train_lr"]
    assert logged == pytest.approx(groups[-1]["lr"] / groups[-1]["lr_scale"])  # the run's


def test_scores_per_class(data_path, tmp_path, run):
    folder = tmp_path / "run"
    assert run(*TINY, "--data-path", data_path, "--output_dir", folder).code == 0
    scored = run(*TINY, "--eval", "--resume", folder / "checkpoint.pth", "--data-path", data_path,
                 "--output_dir", tmp_path / "scores")  # fmt: skip
    assert scored.code == 0
    facts = json.loads((tmp_path / "scores" / "eval.json").read_text())
    with (tmp_path / "scores" / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["class0", "class1", "class2"]
    assert sum(int(row["images"]) for row in rows) == facts["images"] == 21
    correct = sum(int(row["correct"]) for row in rows)
    assert 100 * correct / 21 == pytest.approx(facts["acc1"])
