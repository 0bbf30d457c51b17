"""The distilled models, teachers, and DeiT's distillation commands."""

import http.server
import pickle
import threading
from functools import partial
from itertools import product

import pytest
import timm
import torch
from helpers import MODEL, TINY, Malicious, Ranks, refused, slow, weights
from timm.task import TokenDistillationTask
from torch import nn
from torch.nn import functional as F

import checkpoint
import models_lion  # noqa: F401  (registers the models)
from losses import DistillationLoss, MatchInput, load_teacher
from models_lion import FEATURE_MAPS, FORMATS

TEACHER = "test_resnet"
INPUT = {"input_size": 16, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def distilled_model(mask="Selective", order="S", **kwargs):
    torch.manual_seed(0)
    defaults = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_classes": 3}
    options = {"mask_type": mask, "order": order, **defaults, **kwargs}
    return timm.create_model("lion_tiny_distilled_patch16_224", **options)


def images(batch=2, height=16, width=16):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# The model


def test_a_pair_in_distilled_training_and_its_mean_elsewhere():
    model = distilled_model()
    assert model(images()).shape == (2, 3)
    model.set_distilled_training()
    pair = model(images())
    assert torch.allclose(model.eval()(images()), sum(pair) / 2, atol=1e-6)
    model.train().set_distilled_training(False)
    assert torch.allclose(model(images()), sum(pair) / 2, atol=1e-6)


@pytest.mark.parametrize("cls_tok", [False, True])
def test_each_head_reads_its_tokens(cls_tok):
    model = distilled_model(cls_tok=cls_tok)
    model.set_distilled_training()
    tokens = model.forward_features(images())
    read = tokens[:, 0] if cls_tok else torch.cat([tokens[:, :1], tokens[:, 2:]], 1).mean(1)
    logits, distilled = model.forward_head(tokens)
    assert torch.allclose(logits, model.head(read), atol=1e-6)
    assert torch.allclose(distilled, model.head_dist(tokens[:, 1]), atol=1e-6)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 24)


@pytest.mark.parametrize("pos_emb", [False, True])
@pytest.mark.parametrize("mask, order", list(product(FEATURE_MAPS, ("Normal", "S"))))
def test_formats_and_sizes_agree(mask, order, pos_emb):
    model = distilled_model(mask, order, pos_emb=pos_emb, dynamic_img_size=True).eval()
    for x in (images(), images(1, 8, 24)):
        expected = model(x)
        for format in FORMATS:
            model.set_format(format, chunk_size=5)
            assert torch.allclose(model(x), expected, atol=1e-5)


def test_both_prefix_tokens_come_first_and_do_not_decay():
    model = distilled_model()
    assert model.curves[:, :3].tolist() == [[0, 1, 2], [0, 1, 2]]
    decay = model.blocks[0].attn.log_decay(torch.randn(1, 18, 24))
    assert not decay[..., :2].any()
    assert (decay[..., 2:] < 0).all()


def test_names_are_those_of_deit():
    names = set(distilled_model(pos_emb=True).state_dict())
    assert {"cls_token", "dist_token", "pos_embed", "head_dist.weight"} <= names
    assert not {"reg_token"} & names
    assert "dist_token" in distilled_model().no_weight_decay()


def test_every_parameter_learns():
    model = distilled_model(pos_emb=True)
    model.set_distilled_training()
    sum(part.square().sum() for part in model(images())).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_reset_classifier_resets_both_heads():
    model = distilled_model()
    model.reset_classifier(7)
    assert model.head.out_features == model.head_dist.out_features == 7
    assert model.get_classifier() == (model.head, model.head_dist)


def test_size_of_base():
    with torch.device("meta"):
        plain, distilled = (
            sum(p.numel() for p in timm.create_model(f"lion_base{name}_patch16_224").parameters())
            for name in ("", "_distilled")
        )
    assert distilled - plain == 768 + 768 * 1000 + 1000


# The loss


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind, tau", [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
def test_loss_equals_that_of_timm(kind, tau, alpha):
    """timm averages the soft loss over images, DeiT over images and classes."""
    torch.manual_seed(0)
    student = distilled_model(drop_rate=0.0)
    teacher = timm.create_model(TEACHER, num_classes=3)
    labels = torch.tensor([0, 2])
    scale = 1 / 3 if kind == "soft" else 1
    task = TokenDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), distill_type=kind, temperature=tau,
        task_loss_weight=1 - alpha, distill_loss_weight=alpha * scale, verbose=False,
    )  # fmt: skip
    config = {"student": student.pretrained_cfg, "teacher": teacher.pretrained_cfg}
    matched = MatchInput(
        teacher,
        mean=config["student"]["mean"],
        std=config["student"]["std"],
        teacher_mean=config["teacher"]["mean"],
        teacher_std=config["teacher"]["std"],
    )
    loss = DistillationLoss(nn.CrossEntropyLoss(), matched, kind, alpha, tau)
    task.train()
    expected = task(images(), labels)["loss"]
    assert loss(images(), student(images()), labels).item() == pytest.approx(
        expected.item(), abs=1e-6
    )


# The teacher


def test_a_teacher_of_another_normalisation_and_size_sees_its_own_pixels():
    pixels = torch.rand(2, 3, 16, 16)
    mean, std, own_mean, own_std = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    )
    options = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), teacher_mean=(0.1, 0.2, 0.3),
                   teacher_std=(0.5, 0.6, 0.7))  # fmt: skip
    seen = MatchInput(nn.Identity(), **options)((pixels - mean) / std)
    assert torch.allclose(seen, (pixels - own_mean) / own_std, atol=1e-6)
    seen = MatchInput(nn.Identity(), size=24, **options)((pixels - mean) / std)
    larger = F.interpolate((pixels - own_mean) / own_std, (24, 24), mode="bicubic", antialias=True)
    assert torch.allclose(seen, larger, atol=1e-5)


@pytest.mark.parametrize("key", ["model", None])
def test_a_teacher_loads_from_a_file(tmp_path, key):
    """Weights alone: with the normalisation of timm's weights, at the size of the samples."""
    expected = timm.create_model(TEACHER, num_classes=3).eval()
    state = expected.state_dict()
    torch.save({key: state} if key else state, tmp_path / "teacher.pth")
    config = timm.get_pretrained_cfg(TEACHER)
    own = {"input_size": 16, "mean": config.mean, "std": config.std}
    teacher = load_teacher(TEACHER, str(tmp_path / "teacher.pth"), num_classes=3, **own).eval()
    assert torch.equal(teacher(images()), expected(images()))
    teacher = load_teacher(TEACHER, str(tmp_path / "teacher.pth"), num_classes=3, **INPUT).eval()
    mean, std = (torch.tensor(INPUT[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = images() * std + mean
    own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    assert torch.allclose(teacher(images()), expected((pixels - own_mean) / own_std), atol=1e-5)


def test_a_teacher_of_fixed_size_is_built_for_the_students(tmp_path):
    torch.save(timm.create_model("test_vit", img_size=16, num_classes=3).state_dict(),
               tmp_path / "vit.pth")  # fmt: skip
    teacher = load_teacher("test_vit", str(tmp_path / "vit.pth"), num_classes=3, **INPUT)
    assert teacher(images()).shape == (2, 3)


def test_a_teacher_has_the_options_of_its_checkpoint(tmp_path):
    """Those that change no shape, too: a class token, heads."""
    options = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 4}
    more = {"mask_type": "Selective", "order": "S", "cls_tok": True}
    name, path = "lion_tiny_patch16_224", tmp_path / "teacher.pth"
    expected = timm.create_model(name, img_size=16, num_classes=3, **options, **more).eval()
    args = {"model": name, **more, "model_kwargs": options}
    torch.save({"model": expected.state_dict(), "args": args}, path)
    mean, std = timm.get_pretrained_cfg(name).mean, timm.get_pretrained_cfg(name).std
    own = {"num_classes": 3, "input_size": 16, "mean": mean, "std": std}
    teacher = load_teacher(name, str(path), **own).eval()
    assert torch.allclose(teacher(images()), expected(images()), atol=1e-6)
    with pytest.raises(ValueError, match=f"teacher .* is of {name}, not of {TEACHER}: name that"):
        load_teacher(TEACHER, str(path), **own)


# The command line


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save({"model": timm.create_model(TEACHER, num_classes=3).state_dict()}, path)
    return path


@pytest.mark.slow
def test_the_arguments_of_deit_over_two_processes(data_path, teacher_file, tmp_path):
    options = (*TINY, "--distillation-type", "hard", "--teacher-model", TEACHER,
               "--teacher-path", teacher_file, "--data-path", data_path,
               "--output_dir", tmp_path / "run")  # fmt: skip
    ranks = Ranks(tmp_path, *options)
    assert ranks.wait() == [0, 0], ranks.errors()
    assert "building lion_tiny_distilled_patch16_224" in ranks.printed()
    assert {"dist_token", "head_dist.weight"} <= set(weights(tmp_path / "run"))


@pytest.mark.parametrize("kind", [slow("soft"), "hard"])
def test_a_distilled_run_is_resumed_and_scored(kind, data_path, teacher_file, tmp_path, run):
    options = (*TINY, "--distillation-type", kind, "--teacher-model", TEACHER, "--teacher-path",
               teacher_file, "--data-path", data_path, "--distillation-tau", 2)  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "parts"
    assert run(*options, "--epochs", 2, "--sched", "none", "--output_dir", whole).code == 0
    assert run(*options, "--epochs", 1, "--sched", "none", "--output_dir", folder).code == 0
    again = (*options, "--epochs", 2, "--sched", "none", "--output_dir", folder)
    assert run(*again, "--resume", "auto").code == 0
    assert all(a.equal(weights(whole)[name]) for name, a in weights(folder).items())
    scored = run(*MODEL, "--model", "lion_tiny_distilled_patch16_224", "--eval", "--resume",
                 folder / "checkpoint.pth", "--input-size", 16, "--data-path", data_path,
                 "--num_workers", 0, "--device", "cpu")  # fmt: skip
    assert scored.code == 0
    assert "* Acc@1" in scored.out


def test_a_hard_teacher_is_followed(data_path, tmp_path, run):
    """With alpha 1 the student learns nothing but the teacher's one answer."""
    teacher = timm.create_model(TEACHER, num_classes=3)
    with torch.no_grad():
        teacher.fc.bias[1] += 100
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    options = ("--teacher-model", TEACHER, "--teacher-path", tmp_path / "teacher.pth",
               "--distillation-type", "hard", "--distillation-alpha", 1, "--unscale-lr",
               "--lr", 1e-2, "--epochs", 2, "--warmup-epochs", 0, "--data-path", data_path,
               "--output_dir", tmp_path / "run")  # fmt: skip
    assert run(*TINY, *options).code == 0
    model = timm.create_model("lion_tiny_distilled_patch16_224", img_size=16, patch_size=4,
                              embed_dim=16, depth=2, num_heads=2, num_classes=3)  # fmt: skip
    model.load_state_dict(weights(tmp_path / "run"))
    model.set_distilled_training()
    assert (model(images(8))[1].argmax(1) == 1).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "needs --teacher-path"),
        (("--teacher-path", "absent.pth"), "absent.pth"),
        (("--teacher-path", "x.pth", "--teacher-model", "no_net"), "no teacher model 'no_net'"),
        (("--teacher-path", "timm:"), "not trained on these 3 classes"),
        (("--teacher-path", "x.pth", "--cosub"), "exclude each other"),
        (("--teacher-path", "x.pth", "--no-train-mode"), "--no-train-mode has no distillation"),
        (("--teacher-path", "x.pth", "--model", "vit_tiny_patch16_224"), "no distilled variant"),
        (("--teacher-path", "x.pth", "--model", "lion_softmax_tiny_patch16_224"), "no distilled"),
    ],
)
def test_what_is_wrong_with_the_teacher_is_said(options, message, data_path, tmp_path, run):
    arguments = (*TINY, "--distillation-type", "hard", "--data-path", data_path,
                 "--teacher-model", TEACHER, "--output_dir", tmp_path / "run")  # fmt: skip
    ended = run(*arguments, *options)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "run").exists()


def test_a_teacher_without_distillation_is_refused(data_path, run):
    options = ("--data-path", data_path, "--teacher-path", "x.pth")
    refused(run(*TINY, *options), "--teacher-path has no effect without --distillation-type")


def test_a_teacher_of_other_classes_or_a_corrupt_one(data_path, tmp_path, run):
    torch.save(timm.create_model(TEACHER, num_classes=4).state_dict(), tmp_path / "four.pth")
    (tmp_path / "broken.pth").write_bytes((tmp_path / "four.pth").read_bytes()[:1000])
    for name, message in (("four", "shape of fc.bias: file [4], model [3]"), ("broken", "corrupt")):
        ended = run(*TINY, "--distillation-type", "soft", "--data-path", data_path,
                    "--teacher-model", TEACHER,
                    "--teacher-path", tmp_path / f"{name}.pth")  # fmt: skip
        assert ended.code == 2
        assert message in ended.err


@pytest.mark.parametrize("option", ["--teacher-path", "--finetune", "--resume"])
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_code_in_a_file_never_runs(scheme, option, data_path, tmp_path, run, monkeypatch):
    victim = tmp_path / "victim"
    torch.save({"model": Malicious(victim)}, tmp_path / "evil.pth")
    pickle.dump(Malicious(victim), (tmp_path / "evil.pkl").open("wb"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"), raising=False)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = tmp_path if scheme == "file" else f"http://127.0.0.1:{server.server_port}"
        for name in ("evil.pth", "evil.pkl"):
            teaching = ("--distillation-type", "hard") if option == "--teacher-path" else ()
            ended = run(*TINY, "--data-path", data_path, *teaching, "--teacher-model", TEACHER,
                        option, f"{where}/{name}")  # fmt: skip
            assert ended.code == 2
            assert "could run code" in ended.err
        server.shutdown()
    assert not victim.exists()


def test_teacher_weights_are_verified_by_the_hash_in_their_name(tmp_path, monkeypatch):
    torch.save(timm.create_model(TEACHER, num_classes=3).state_dict(), tmp_path / "t-00000000.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"), raising=False)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/t-00000000.pth"
        with pytest.raises(ValueError, match=f"cannot download {url}: its hash is"):
            checkpoint.load(url)
        server.shutdown()
