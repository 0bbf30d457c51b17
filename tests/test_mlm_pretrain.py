"""Pre-training: what it learns, that it resumes bit for bit, and what it refuses."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, Ranks, count_reduction, rendezvous, same, slow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForMaskedLM, AutoTokenizer

import checkpoint
from mlm import prepare, pretrain
from mlm.data import IGNORED, EvalSampler, MaskedWindows
from mlm.modeling import MIXERS, LionBertConfig, LionBertForMaskedLM
from mlm.settings import override, read_yaml, typed
from mlm.shards import HEADER, Corpus, load_tokenizer
from processes import World
from resuming import Rule

CONFIGS = ROOT / "mlm" / "configs"
TINY = CONFIGS / "tiny.yaml"
# Dropout and several epochs, so that a resumed run needs its seeds and its place.
SHORT = {"steps": 12, "length": 16, "micro_batch": 4, "global_batch": 8, "eval_every": 4,
         "save_every": 5, "model.hidden_size": 16, "model.intermediate_size": 16,
         "model.hidden_dropout_prob": 0.1, "model.num_hidden_layers": 1, "workers": 0}  # fmt: skip


def pretraining(corpus: Path, **settings: object) -> None:
    """mlm.pretrain with the tiny configuration."""
    values = {"data": corpus, "device": "cpu", **settings}
    where = ["--dist_url", values.pop("dist_url")] if "dist_url" in values else []
    pretrain.main([str(TINY), *(f"{name}={value}" for name, value in values.items()), *where])


def short(corpus: Path, output: Path, **settings: object) -> None:
    pretraining(corpus, output=output, **{**SHORT, **settings})


def rank(_rank: int, folder: Path, corpus: Path, output: Path, settings: dict) -> None:
    short(corpus, output, dist_url=rendezvous(folder), **settings)


def interrupted(monkeypatch, call: int, method: str = "_train_step") -> None:
    """SIGTERM comes in the given call of a method, counted from 1, to the loader's workers too."""
    original, calls = getattr(pretrain.Pretraining, method), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            for pid in (*(p.pid for p in multiprocessing.active_children()), os.getpid()):
                os.kill(pid, signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(pretrain.Pretraining, method, counted)


def interrupted_rank(
    _rank: int, folder: Path, corpus: Path, output: Path, settings: dict, at: tuple
) -> None:
    if _rank == 1:
        interrupted(pytest.MonkeyPatch(), *at)
    rank(_rank, folder, corpus, output, settings)


def counting_rank(_rank: int, folder: Path, corpus: Path, output: Path, settings: dict) -> None:
    distributed, calls = World.distributed, []

    def counted(self, model):
        model = distributed(self, model)
        model.register_comm_hook(calls, count_reduction)
        return model

    World.distributed = counted
    rank(_rank, folder, corpus, output, settings)
    (folder / f"averaged{_rank}").write_text(str(len(calls)))


def records(folder: Path) -> list[dict]:
    """log.txt without what depends on the clock."""
    lines = (folder / "log.txt").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in lines]  # fmt: skip


def assert_same_run(folder: Path, other: Path) -> None:
    saved, expected = (checkpoint.load(f / "checkpoint.pth") for f in (folder, other))
    assert all(same(saved[key], expected[key]) for key in ("model", "optimizer", "step", "meters"))
    assert records(folder) == records(other)
    loaded = AutoModelForMaskedLM.from_pretrained(folder / "model")
    assert same(loaded.state_dict(), saved["model"])


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    short(corpus, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["lion-d", "lion-s"])
def test_learns_more_than_the_unigram_entropy(mixer, corpus, tmp_path):
    pretraining(corpus, output=tmp_path, steps=150, eval_every=150, **{"model.mixer": mixer})
    tokens = np.concatenate(Corpus(corpus, "eval", 64).shards)
    share = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    entropy = -(share * np.log(share)).sum()  # of this text itself: no unigram model does better
    (record,) = records(tmp_path)
    assert record["eval_loss"] < entropy - 0.2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("help")["input_ids"][0] == tokenizer.cls_token_id


@pytest.mark.parametrize("workers", [(0, 0), slow((0, 2)), slow((2, 0))])
def test_an_interrupted_run_goes_on_bit_for_bit(
    workers, whole, corpus, ending, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupted(patch, 7)
        ended = ending(short, corpus, tmp_path / "run", workers=workers[0])
    assert ended.code == 128 + signal.SIGTERM
    assert "Stopped at step 7: go on by resume=auto\n" in ended.out
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pth")["step"] == 7
    ended = ending(short, corpus, tmp_path / "run", workers=workers[1], resume="auto")
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("call", "step"), [(2, 8), slow(3, 12)])
def test_a_stop_in_an_evaluation_does_not_wait_for_it(
    call, step, whole, corpus, ending, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        interrupted(patch, call, "evaluate")
        ended = ending(short, corpus, tmp_path)
    assert ended.code == 128 + signal.SIGTERM
    assert f"Stopped at step {step}: go on by resume=auto\n" in ended.out
    assert [record["step"] for record in records(tmp_path)] == [4, 8][: call - 1]
    ended = ending(short, corpus, tmp_path, resume="auto")
    assert ended.code == 0, ended.err
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("call", [2, slow(3)])
def test_an_evaluation_that_fails_costs_no_step(call, whole, corpus, ending, tmp_path, monkeypatch):
    evaluate, calls = pretrain.Pretraining.evaluate, []

    def failing(*args):
        calls.append(None)
        if len(calls) == call:
            raise OSError("a shard cannot be read")
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "evaluate", failing)
        with pytest.raises(OSError, match="a shard cannot be read"):
            short(corpus, tmp_path, save_every=100)
    assert checkpoint.load(tmp_path / "checkpoint.pth")["step"] == 4 * call
    assert ending(short, corpus, tmp_path, resume="auto").code == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_kill_after_an_evaluation_logs_it_once(whole, corpus, ending, tmp_path, monkeypatch):
    step = pretrain.Pretraining._train_step

    def dying(self, *args, **kwargs):
        if self.step == 8:
            raise OSError("the power fails")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_train_step", dying)
        with pytest.raises(OSError, match="the power fails"):
            short(corpus, tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [4, 8]
    # As two processes would have saved it.
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    ((total, count),) = saved["meters"]
    meters = [(2 * total, count), (0.0, count)]
    checkpoint.save({**saved, "meters": meters}, tmp_path / "checkpoint.pth")
    assert ending(short, corpus, tmp_path, resume="auto").code == 0
    assert_same_run(tmp_path, whole)


def test_every_setting_has_a_rule(whole, corpus, ending, tmp_path):
    assert set(pretrain.RULES) == {field.name for field in fields(pretrain.Settings)}
    folder = shutil.copytree(whole, tmp_path / "run")
    ended = ending(short, corpus, folder, resume="auto", micro_batch=2, eval_every=3, workers=1)
    assert ended.code == 0, ended.err
    said = re.findall(r"Going on from .* with another setting: (.*)", ended.out)
    assert said == ["eval_every: checkpoint 4, now 3", "micro_batch: checkpoint 4, now 2"]


def test_the_docs_name_what_is_taken_up():
    text = (ROOT / "docs" / "reliability.md").read_text()
    (sentence,) = re.findall(r"`mlm.pretrain` takes up (.*?), leaves", text, re.DOTALL)
    taken_up = {name for name, rule in pretrain.RULES.items() if rule is Rule.TAKEN_UP}
    assert set(re.findall(r"`(\w+)`", sentence)) == taken_up


def test_a_stopped_run_without_a_folder_promises_nothing(corpus, ending, monkeypatch):
    interrupted(monkeypatch, 2)
    ended = ending(pretraining, corpus, **SHORT)
    assert ended.code == 143
    assert "Stopped at step 2: unsaved, without output\n" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize("at", [(7,), (2, "evaluate")], ids=str)
def test_two_ranks_go_on_bit_for_bit(at, corpus, tmp_path):
    settings = {"workers": 0}
    ranks = Ranks(tmp_path, corpus, tmp_path / "whole", settings, function=rank)
    assert ranks.wait(180) == [0, 0], ranks.errors()
    ranks = Ranks(tmp_path, corpus, tmp_path / "run", settings, at, function=interrupted_rank)
    assert ranks.wait(180) == [143, 143], ranks.errors()
    settings = {"workers": 2, "resume": "auto"}
    ranks = Ranks(tmp_path, corpus, tmp_path / "run", settings, function=rank)
    assert ranks.wait(180) == [0, 0], ranks.errors()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_a_run_shows_and_leaves(corpus, ending, tmp_path):
    output = ending(short, corpus, tmp_path, steps=21).out
    eta = r"Step:  \[20/21\]  eta: 0:00:00  loss: \d+\.\d+  lr: \S+  "
    pace = r"tok/s: \d+\.\d \(mean \d+\.\d\)  data: \d+%\n"
    assert re.search(eta + pace, output)
    assert re.search(r"Step 20: train_loss .* eval_accuracy", output)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20, 21]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    events = EventAccumulator(str(tmp_path)).Reload()
    paces = {"tokens/per_second_last", "data/share", "hours/left"}
    assert paces < set(events.Tags()["scalars"])
    for name in ("train_loss", "eval_accuracy", "tokens_per_second"):
        scalars = events.Scalars(name.replace("_", "/", 1))
        logged = [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
        assert [(scalar.step, scalar.value) for scalar in scalars] == logged


def test_passes_and_ranks_share_one_loss(corpus, tmp_path):
    exact = {"model.hidden_dropout_prob": 0, "steps": 4, "eval_every": 4}
    short(corpus, tmp_path / "one", micro_batch=8, **exact)
    short(corpus, tmp_path / "passes", micro_batch=2, **exact)
    settings = {**exact, "micro_batch": 2}
    ranks = Ranks(tmp_path, corpus, tmp_path / "ranks", settings, function=counting_rank)
    assert ranks.wait() == [0, 0], ranks.errors()
    averaged = [(ranks.folder / f"averaged{number}").read_text() for number in (0, 1)]
    assert averaged == ["4", "4"], "gradients are averaged once a step, at its last pass"
    (expected,) = records(tmp_path / "one")
    for other in ("passes", "ranks"):
        (record,) = records(tmp_path / other)
        assert record == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("length", [1, 10, 11])
def test_evaluation_takes_every_window_once_over_ranks(length):
    shares = [EvalSampler(length, num_replicas=3, rank=number) for number in range(3)]
    assert sorted(key for share in shares for key in share) == [(i, i) for i in range(length)]
    assert [len(share) for share in shares] == [len(list(share)) for share in shares]


def test_masks_are_keyed_by_their_draw_alone(corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    windows = MaskedWindows(
        Corpus(corpus, "train", 128), tokenizer, share=0.3, seed=1, separate_documents=True
    )
    assert same(windows[3, 5], windows[3, 5])
    assert not same(windows[3, 5], windows[3, 6])
    items = [windows[i, i] for i in range(len(windows))]
    inputs, labels = (torch.cat([item[name] for item in items]) for name in ("input_ids", "labels"))
    original = torch.from_numpy(np.concatenate([windows.corpus[i] for i in range(len(windows))]))
    asked = labels != IGNORED
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert original[asked].equal(labels[asked])
    assert original[~asked].equal(inputs[~asked])
    assert not (asked & special).any()
    assert abs(asked[~special].double().mean() - 0.3) < 0.01
    assert abs((inputs[asked] == tokenizer.mask_token_id).double().mean() - 0.8) < 0.01
    assert abs((inputs[asked] == labels[asked]).double().mean() - 0.1) < 0.01
    documents = items[0]["document_ids"]
    starts = windows.corpus[0] == tokenizer.cls_token_id
    assert np.array_equal(np.diff(documents.numpy()) == 1, starts[1:])


def test_masks_of_evaluation_are_the_same_with_every_seed(corpus):
    settings = {"data": str(corpus), "lr": 1e-3, "model": {}, "workers": 0, "length": 16}
    tokenizer = load_tokenizer(corpus / "tokenizer")
    loaders = [
        pretrain.build_loaders(pretrain.Settings(**settings, seed=seed), World(), tokenizer, 0)
        for seed in (1, 2)
    ]
    first, second = (next(iter(evaluation)) for _, evaluation in loaders)
    assert same(first, second)
    assert not same(*(next(iter(train)) for train, _ in loaders))


def test_a_token_beyond_the_vocabulary_is_told(corpus):
    windows = MaskedWindows(Corpus(corpus, "train", 128), load_tokenizer(corpus / "tokenizer"),
                            share=0.3, seed=1, separate_documents=False)  # fmt: skip
    windows.words = int(windows.corpus[0].max())
    with pytest.raises(ValueError, match=f"{corpus} holds the token {windows.words}, beyond the"):
        windows[0, 0]


def test_gradients_are_clipped(corpus, tmp_path):
    """The optimiser is handed gradients of at most this norm."""
    norms = {}
    for limit in ("null", 0.01):
        seen = norms[limit] = []
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_, seen=seen: seen.append(
                torch.nn.utils.get_total_norm(
                    [p.grad for group in optimizer.param_groups for p in group["params"]]
                ).item()
            )
        )
        short(corpus, tmp_path / str(limit), steps=3, clip_grad=limit)
        hook.remove()
    assert min(norms["null"]) > 0.02
    assert norms[0.01] == pytest.approx([0.01] * 3, rel=1e-3)


def test_the_schedule_is_the_recipes():
    settings = pretrain.Settings(data="", lr=8e-4, model={})
    assert settings.lr_at(0) == pytest.approx(8e-4 / 4200)
    assert settings.lr_at(4199) == settings.lr_at(4200) == 8e-4
    assert settings.lr_at(37100) == pytest.approx(8e-4 * 0.51)
    assert settings.lr_at(70000) == pytest.approx(8e-4 * 0.02)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*-*.yaml")), ids=lambda path: path.stem)
def test_configs_build_what_they_name(path):
    settings = typed(pretrain.Settings, override(read_yaml(path), ["data=none"]), str(path))
    settings.check()
    name, size = path.stem.rsplit("-", 1)
    with torch.device("meta"):
        model = LionBertForMaskedLM(LionBertConfig(**settings.model))
        mixer = MIXERS["softmax" if name == "bert" else name](model.config)
    assert all(type(layer.attn) is type(mixer) for layer in model.lion.layers)
    masks = {getattr(layer.attn, "mask_type", None) for layer in model.lion.layers}
    assert masks == {getattr(mixer, "mask_type", None)}
    width, depth, heads = {"base": (768, 12, 12), "large": (1024, 24, 16)}[size]
    # words, types, norms and biases; then blocks; then the head with the decoder's bias
    count = 30522 * width + 2 * width + 2 * width + depth * (12 * width**2 + 13 * width)
    count += width**2 + width + 2 * width + 30522
    mixed = 2 * width + 4 * 64  # of Hydra: what its convolution of 7 tokens sees
    hydra = width * (2 * width + mixed + 4 * heads) + 8 * mixed + 6 * heads
    hydra += 2 * width * (2 * heads + 1 + width)
    extra = {"bert": 512 * width, "lion-lit": 512 * width, "lion-d": depth * heads,
             "lion-s": depth * heads * (width + 1),
             "hydra": depth * (hydra - 4 * width**2 - 4 * width)}  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == count + extra[name]
    assert settings.lr == {"base": 8e-4, "large": 2e-4}[size]
    assert settings.weight_decay / settings.lr == pytest.approx(
        {"base": 0.0125, "large": 0.05}[size]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stpes": 5}, r"Unknown key 'stpes' in .*tiny.yaml: did you mean steps\?"),
        ({"model.mixr": "lion-s"}, r"Unknown key 'mixr' in the section model: did you mean mixer"),
        ({"model.mixer": "lion"}, "Unknown mixer 'lion': choose one of"),
        ({"model.hidden_size": "wide"}, "hidden_size in the section model must be int, not 'wide'"),
        ({"model.hidden_size": 15}, "width 15 is not divisible by 2 heads"),
        ({"model.vocab_size": 30522}, "model has a vocabulary of 30522 words and the data one of"),
        ({"lr": "fast"}, "lr in .* must be float, not 'fast'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"global_batch": 33}, "global_batch 33 is no multiple of 32"),
        ({"mask_share": 2}, "mask_share must be between 0 and 1"),
        ({"lr": -1e-3}, "lr must be above 0, not -0.001"),
        ({"lr": ".nan"}, "lr must be a finite number, not nan"),
        ({"weight_decay": -1}, "weight_decay must not be negative, but is -1.0"),
        ({"betas": [0.9, 1.1]}, r"betas must be in \[0, 1\), not 1.1"),
        ({"betas": [0.9]}, "betas must be two numbers, not 1"),
        ({"betas": ["a", 0.9]}, "betas must hold numbers, not 'a'"),
        ({"clip_grad": 0}, "clip_grad must be above 0, not 0"),
        ({"eps": -1}, "eps must not be negative, but is -1"),
        ({"workers": -1}, "workers must not be negative, but is -1"),
        ({"seed": -1}, r"seed must be in \[0, 4294967296\), not -1"),
        ({"output": "/proc/run"}, r"output /proc/run cannot be written to \(.*\): choose another"),
        ({"data": "absent"}, "no tokeniser in absent/tokenizer: No such file"),
        ({"length": 10**6}, "split of .* has no window of 1000000 tokens"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"resume": "auto"}, "resume=auto needs the output"),
        ({"resume": "last"}, "resume must be auto or nothing, not 'last'"),
        ({"precision": "fp16"}, "precision must be bf16 or fp32, not 'fp16'"),
        ({"model.mixer": "softmax", "length": 513}, "length 513 is more than the 512 positions"),
        ({"lr.peak": 1}, "lr in 'lr.peak=1' is no section of settings"),
        ({"lr": "["}, r"The value in 'lr=\[' is no YAML: "),
    ],
    ids=str,
)
def test_bad_settings(settings, message, corpus, ending):
    refused(ending(pretraining, corpus, **settings), message)


def refused(ended, message: str, command: str = "mlm.pretrain") -> None:
    assert ended.code == 2, ended
    sentence = ended.err.splitlines()[-1]
    assert re.match(rf"{command}: error: .*({message})", sentence), ended.err
    assert "Traceback" not in ended.err
    assert ended.err.count("error:") == 1


def test_bad_files(corpus, ending, tmp_path):
    refused(ending(pretrain.main, ["absent.yaml"]), "cannot read the settings absent.yaml: No such")
    (tmp_path / "list.yaml").write_text("- 1")
    refused(ending(pretrain.main, [str(tmp_path / "list.yaml")]), "no mapping of keys to values")
    refused(ending(pretrain.main, [str(TINY)]), "tiny.yaml lacks data: give data=VALUE")
    refused(ending(pretrain.main, [str(TINY), "steps"]), "given as key=value, not 'steps'")
    refused(ending(pretrain.main, [str(TINY), "steps=" + "[" * 1000]), "The value in .* is no YAML")
    (tmp_path / "twice.yaml").write_text("lr: 1\nlr: 2\n")
    refused(ending(pretrain.main, [str(tmp_path / "twice.yaml")]), "the key lr is there twice")
    (tmp_path / "deep.yaml").write_text("[" * 1000)
    refused(ending(pretrain.main, [str(tmp_path / "deep.yaml")]), "cannot read the settings .*deep")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.pop("meters"), "no checkpoint of mlm.pretrain, as it has no meters"),
        (lambda saved: saved.update(optimizer={}), "The optimiser state of .* does not fit"),
    ],
)
def test_checkpoints_of_something_else(change, message, corpus, ending, tmp_path):
    assert ending(short, corpus, tmp_path, steps=1).code == 0
    path = tmp_path / "checkpoint.pth"
    saved = torch.load(path)
    change(saved)
    torch.save(saved, path)
    before = path.read_bytes()
    refused(ending(short, corpus, tmp_path, resume="auto", steps=1), message)
    assert path.read_bytes() == before


def test_another_run_is_neither_replaced_nor_mixed(whole, corpus, ending):
    before = (whole / "checkpoint.pth").read_bytes()
    refused(ending(short, corpus, whole), "holds another run: go on with it by resume=auto")
    ended = ending(short, corpus, whole, resume="auto", seed=3, lr=1)
    refused(ended, r"is of another run: lr: checkpoint 0.005, now 1.0; seed: checkpoint 17, now 3")
    assert (whole / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-2], r"shard .*train-.* is truncated or damaged \(\d+ bytes, not"),
        (lambda data: data[:20], "is no token shard, or cut off"),
        (lambda data: data[:8] + bytes(32) + data[40:], "was written with another tokeniser"),
    ],
    ids=["truncated", "header", "tokeniser"],
)
def test_bad_shard(damage, message, corpus, ending, tmp_path):
    for path in corpus.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(corpus)
            target.parent.mkdir(exist_ok=True)
            data = path.read_bytes()
            target.write_bytes(damage(data) if path.name.startswith("train-") else data)
    refused(ending(pretraining, tmp_path), message)


def test_a_loss_that_is_not_finite_ends_the_run(corpus, ending, tmp_path):
    ended = ending(short, corpus, tmp_path, lr=1e30, warmup_share=0)
    assert ended.code == 1
    assert re.search("norm nan is not finite .step 1", ended.err)


def test_header_is_64_bytes_and_says_what_it_holds(corpus):
    (path,) = corpus.glob("train-*.bin")
    magic, _, documents, tokens, width = struct.unpack("<8s32sQQB7x", path.read_bytes()[:64])
    assert (HEADER.size, magic, width) == (64, b"LIONMLM1", 2)
    manifest = json.loads((corpus / "manifest.json").read_text())["splits"]["train"]
    assert (manifest["documents"], manifest["tokens"]) == (documents, tokens)
    assert tokens * width + 64 == path.stat().st_size
    assert prepare.read_header(path, json.loads(
        (corpus / "manifest.json").read_text())["tokenizer"]) == (documents, tokens, 2)  # fmt: skip
