"""Numbers that are not finite end a run before they are saved, scored or logged."""

import json
import math
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import TINY
from test_engine import CPU, StopAt, batches, score, small_model, train
from test_mlm_pretrain import interrupted, short
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

import checkpoint
import main
import optimizer_step
from engine import EpochMeans, Position
from journal import Journal, to_json, write_scores
from mlm import glue, pretrain
from mlm.shards import load_tokenizer
from mlm.tasks import Examples
from optimizer_step import LEAST_SCALE
from processes import Interrupted, World


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps are looked at only where it is asked for."""
    monkeypatch.setattr(optimizer_step, "looks_every_step", lambda device: False)


def break_gradients(model: nn.Module, *calls: int) -> nn.Module:
    """In these steps, counted from 0, a gradient is NaN though the loss is finite."""
    step = count()
    parameter = next(model.parameters())
    parameter.register_hook(lambda grad: grad * math.nan if next(step) in calls else grad)
    return model


def is_finite(model: nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())


# Steps


def test_a_gradient_that_is_not_finite_ends_training_before_the_step():
    model, position = break_gradients(small_model(), 2), Position()
    with pytest.raises(FloatingPointError, match="norm nan is not finite .epoch 0, step 2"):
        train(model, position=position)
    assert position.step == 2
    assert is_finite(model)


def test_an_epoch_does_not_end_before_its_steps_were_looked_at(as_on_a_gpu):
    model = break_gradients(small_model(), 1)
    with pytest.raises(FloatingPointError, match="is not finite .epoch 0, step 3"):
        train(model)


class BrokenOnce(nn.Module):
    """Cross-entropy, that is NaN in the second call, with a gradient that is finite."""

    def __init__(self):
        super().__init__()
        self.step = count()

    def forward(self, samples, outputs, targets):
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss + math.nan if next(self.step) == 1 else loss


def test_a_look_sees_the_steps_before_it(as_on_a_gpu):
    with pytest.raises(FloatingPointError, match="is not finite .epoch 0, step 3"):
        train(small_model(), criterion=BrokenOnce())


def test_a_signal_does_not_come_before_the_steps_were_looked_at(as_on_a_gpu):
    model, position = break_gradients(small_model(), 1), Position()
    with pytest.raises(FloatingPointError, match="is not finite .epoch 0, step 3"):
        train(model, position=position, stop=StopAt(2))


class Operations(TorchDispatchMode):
    """The operations of its block, each of which is a kernel or more on a GPU."""

    def __init__(self):
        super().__init__()
        self.called = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.called[operation] += 1
        return operation(*args, **(kwargs or {}))


def operations_of_steps(steps: int) -> Counter:
    with Operations() as operations:
        train(small_model(), steps=steps, loader=batches(CPU) * 4, clip_grad=1.0)
    return operations.called


def test_between_looks_the_host_reads_nothing(as_on_a_gpu):
    """On a GPU it would wait there. Looks are at the steps 0 and 10, and at the last."""
    read = torch.ops.aten._local_scalar_dense.default
    assert operations_of_steps(9)[read] == operations_of_steps(3)[read]


def test_a_step_has_few_operations_beside_those_of_the_model(as_on_a_gpu):
    model, (samples, targets) = small_model(), batches(CPU)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(samples), targets).backward()
    optimizer.step()  # the first one makes the momentum
    optimizer.zero_grad()
    with Operations() as bare:
        nn.functional.cross_entropy(model(samples), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = (operations_of_steps(9) - operations_of_steps(3)).total() / 6
    assert steps - bare.called.total() <= 11


@pytest.mark.parametrize("calls", [0, 7])
def test_means_are_those_of_all_steps_wherever_they_are_looked_at(calls, monkeypatch):
    """Also where a run was interrupted in between, at a look."""
    loader = batches(CPU) * 4
    each, _ = train(small_model(), steps=13, loader=loader)
    monkeypatch.setattr(optimizer_step, "looks_every_step", lambda device: False)
    model, position = small_model(), Position()
    with suppress(Interrupted):
        train(model, position=position, steps=13, loader=loader, stop=StopAt(calls or math.inf))
    if calls:
        assert position.step == 11, "a signal is seen at the next look"
        momentum = torch.optim.SGD(model.parameters(), lr=0.1)
        train(model, position=position, steps=13, loader=loader[11:], optimizer=momentum)
    assert position.meters[0]["loss"][1] == 13
    if not calls:
        assert position.meters[0]["loss"][0] == each["loss"] * 13


def test_a_norm_that_is_not_finite_is_no_part_of_the_mean():
    means = EpochMeans(Position(), CPU)
    means.update(0.1, [(2.0, 3.0), (4.0, math.inf)])
    assert means.over_processes() == {"lr": 0.1, "loss": 3.0, "grad_norm": 3.0}
    assert means.last["grad_norm"] == math.inf


# Loss scaling


def test_a_scaler_that_skips_every_step_ends_training():
    """Also where an epoch has fewer steps: 20 of 32 in the first one."""
    scaler = torch.amp.GradScaler("cpu")
    model = break_gradients(small_model(), *range(100))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = batches(CPU) * 5
    train(model, scaler=scaler, steps=20, loader=loader)
    position = Position(1)
    with pytest.raises(FloatingPointError, match="not finite at a loss scale of 1.53e-05 .epoch 1"):
        train(model, position=position, scaler=scaler, steps=20, loader=loader)
    assert 20 + position.step == 32
    assert scaler.get_scale() == LEAST_SCALE
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_scaler_may_skip_some_steps():
    scaler = torch.amp.GradScaler("cpu")
    model = break_gradients(small_model(), *range(6))
    stats, _ = train(model, scaler=scaler, steps=8, loader=batches(CPU) * 2)
    assert scaler.get_scale() == 2.0**10
    assert math.isfinite(stats["loss"])
    assert is_finite(model)


def test_a_run_goes_on_at_its_loss_scale():
    runs = [main.Run(nn.Linear(2, 2), None, torch.optim.SGD([torch.ones(1)]), None,
                     torch.amp.GradScaler("cpu", init_scale=scale), Position())
            for scale in (2.0**7, 2.0**16)]  # fmt: skip
    runs[1].restore(runs[0].state({}), "run.pth")
    assert runs[1].scaler.state_dict() == runs[0].scaler.state_dict()
    assert runs[1].scaler.get_scale() == 2.0**7


# Weights


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["model", "model_ema", "optimizer"])
def test_nothing_that_is_not_finite_is_saved(where, value, tmp_path):
    path = tmp_path / "checkpoint.pth"
    state = {
        "model": {"weight": torch.ones(3), "count": torch.tensor(1)},
        "model_ema": {"weight": torch.ones(3)},
        "optimizer": {"state": {0: {"weight": torch.ones(3)}}},
    }
    checkpoint.save(state, path)
    before = path.read_bytes()
    broken = state[where]["state"][0] if where == "optimizer" else state[where]
    broken["weight"] = torch.tensor([1, value, 1])
    with pytest.raises(FloatingPointError, match=rf"checkpoint.pth is not .*\({where}\..*weight\)"):
        checkpoint.save(state, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_not_loaded():
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {"weight": torch.ones(2, 3), "bias": torch.tensor([1, math.nan])}
    with pytest.raises(ValueError, match=r"run.pth holds weights that are not finite \(bias\)"):
        checkpoint.load_weights(model, state, "run.pth")
    assert model.weight.equal(before)


@pytest.fixture(scope="module")
def broken(data_path, tmp_path_factory) -> Path:
    """A checkpoint whose weights and moving average are NaN in one place each."""
    folder = tmp_path_factory.mktemp("run")
    arguments = (*TINY, "--data-path", data_path, "--output_dir", folder, "--batch-size", "40")
    main.main(main.get_args_parser().parse_args([str(argument) for argument in arguments]))
    saved = checkpoint.load(folder / "checkpoint.pth")
    for key in ("model", "model_ema"):
        path = folder / f"{key}.pth"
        torch.save({**saved, key: {**saved[key], "head.bias": torch.full((3,), math.nan)}}, path)
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model", ("--eval", "--resume")),
        ("model_ema", ("--eval", "--use-ema", "--resume")),
        ("model", ("--resume",)),
        ("model_ema", ("--resume",)),
        ("model", ("--finetune",)),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_refused(name, options, broken, run, data_path):
    path = broken / f"{name}.pth"
    ended = run(*TINY, "--data-path", data_path, *options, path)
    assert ended.code == 2
    assert f"main.py: error: {path} holds weights that are not finite (head.bias)" in ended.err


def test_a_moving_average_that_is_not_finite_ends_the_run(run, data_path, tmp_path, monkeypatch):
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path, "--batch-size", "40")
    assert run(*arguments).code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*") if path.is_file()}

    def update(self, model):
        next(self.module.parameters()).data.fill_(math.nan)

    monkeypatch.setattr(main.MovingAverage, "update", update)
    ended = run(*arguments, "--epochs", "2", "--resume", "auto")
    assert ended.code == 1
    assert ended.err.startswith("main.py: error: The")
    for name in ("checkpoint.pth", "best_checkpoint.pth", "log.txt"):
        assert (tmp_path / name).read_bytes() == before[name]


def test_a_score_that_is_not_finite_is_an_error():
    model = small_model()
    model.head.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss of the evaluation is nan"):
        score(model, 8)


# Language models


def break_pretraining(monkeypatch, *calls: int) -> None:
    distributed = World.distributed

    def broken(self, model):
        break_gradients(model, *(2 * call for call in calls))  # two passes a step
        return distributed(self, model)

    monkeypatch.setattr(World, "distributed", broken)


def test_pretraining_ends_before_a_step_that_is_not_finite(corpus, ending, tmp_path, monkeypatch):
    break_pretraining(monkeypatch, 7)
    ended = ending(short, corpus, tmp_path)
    assert ended.code == 1
    assert "gradient norm nan is not finite (step 7, rank 0" in ended.err
    assert checkpoint.load(tmp_path / "checkpoint.pth")["step"] == 5


@pytest.mark.parametrize(
    ("settings", "step"), [({"eval_every": 12}, 4), ({"save_every": 12}, 3), ({"steps": 3}, 2)]
)
def test_pretraining_looks_before_it_saves_or_logs(
    settings, step, corpus, ending, tmp_path, monkeypatch, as_on_a_gpu
):
    break_pretraining(monkeypatch, 1)
    ended = ending(short, corpus, tmp_path, **settings)
    assert ended.code == 1
    assert f"is not finite (step {step}, rank 0" in ended.err
    assert not (tmp_path / "checkpoint.pth").exists()
    assert not (tmp_path / "log.txt").exists()


def test_pretraining_looks_before_it_saves_on_a_signal(
    corpus, ending, tmp_path, monkeypatch, as_on_a_gpu
):
    break_pretraining(monkeypatch, 1)
    interrupted(monkeypatch, 3)
    ended = ending(short, corpus, tmp_path)
    assert ended.code == 1
    assert "is not finite (step 3, rank 0" in ended.err
    assert not (tmp_path / "checkpoint.pth").exists()


def test_a_score_of_pretraining_that_is_not_finite_is_an_error(
    corpus, ending, tmp_path, monkeypatch
):
    evaluate = pretrain.Pretraining.evaluate

    def broken(self, stop):
        next(self.model.parameters()).data.fill_(math.nan)
        return evaluate(self, stop)

    monkeypatch.setattr(pretrain.Pretraining, "evaluate", broken)
    ended = ending(short, corpus, tmp_path)
    assert ended.code == 1
    assert "loss of the evaluation is nan" in ended.err
    assert not (tmp_path / "log.txt").exists()
    checkpoint.load(tmp_path / "checkpoint.pth")  # of before the evaluation


@pytest.mark.parametrize("classes", [["no", "yes"], []], ids=["classes", "values"])
def test_no_class_or_value_is_taken_from_outputs_that_are_not_finite(classes, corpus):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=8, num_labels=2)  # fmt: skip
    model = BertForSequenceClassification(config)
    examples = Examples([("help",), ("list",)], [0, 1], classes)
    arguments = (model, examples, tokenizer, 16, torch.device("cpu"), None)
    assert len(glue.predict(*arguments)) == 2
    model.classifier.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="its outputs are not finite"):
        glue.predict(*arguments)


# JSON


def strictly(text: str) -> object:
    """What every reader of JSON takes: NaN and Infinity are none."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"bare {name}"))


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path):
    value = {"a": [math.nan, 1.5, (math.inf, {"b": -math.inf})], "c": "NaN", "d": True, "e": None}
    expected = {"a": [None, 1.5, [None, {"b": None}]], "c": "NaN", "d": True, "e": None}
    assert strictly(to_json(value)) == expected
    Journal(tmp_path, {}, 0).write({"epoch": 0, "train_grad_norm": math.inf})
    assert strictly((tmp_path / "log.txt").read_text()) == {"epoch": 0, "train_grad_norm": None}
    write_scores(tmp_path, {"loss": math.nan}, [], [])
    assert strictly((tmp_path / "eval.json").read_text()) == {"loss": None}
