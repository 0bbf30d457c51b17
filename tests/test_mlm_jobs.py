"""Fine-tuning's jobs: what is checked before them, what they leave, and how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, is_running, wait_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mlm import glue, pretrain
from mlm.export import export
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.shards import load_tokenizer

TASK = {"train": "train.tsv", "eval": ["dev.tsv"], "text": ["text"], "label": "label",
        "metrics": ["accuracy"], "batch": 4, "epochs": 1, "weight_decay": 0.0,
        "seeds": [1]}  # fmt: skip
ROWS = [("help the list", "yes"), ("raise an error", "no")] * 6


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    tokenizer = load_tokenizer(corpus / "tokenizer")
    torch.manual_seed(0)
    config = LionBertConfig(
        mixer="softmax", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    export(LionBertForMaskedLM(config), tokenizer, folder)
    return folder


def write(folder: Path, rows: list = ROWS, dev: list | None = None) -> Path:
    for name, part in (("train", rows), ("dev", rows if dev is None else dev)):
        lines = ["text\tlabel", *("\t".join(row) for row in part)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def config(folder: Path, task: dict) -> str:
    path = folder / "tasks.yaml"
    path.write_text(json.dumps({"data": str(folder), "tasks": {"T": {**TASK, **task}}}))
    return str(path)


def call(folder: Path, model: Path, *arguments: str, **task: object) -> None:
    settings = (f"output={folder / 'out'}", "device=cpu", "length=16", "lr=0.001")
    glue.main([config(folder, task), "--model", str(model), *settings, *arguments])


def job(folder: Path, model: Path, **task: object) -> glue.Job:
    return glue.Job("T", glue.Task(**{**TASK, **task}), 1, str(model), str(folder),
                    str(folder / "out"), 16, 1e-3)  # fmt: skip


def refused(ended, message: str) -> None:
    assert ended.code == 2, ended
    assert re.match(rf"mlm\.glue: error: .*{message}", ended.err.splitlines()[-1]), ended.err


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ([("a", "x"), ("b", "y"), ("c", "z")], {"metrics": ["accuracy", "f1"]},
         r"f1 is a metric of two classes, and .*train.tsv has 3 \(x, y, z\): choose accuracy"),
        ([("a", "1"), ("b", "nan")], {"metrics": ["spearman"]}, "'nan', which is no finite number"),
        ([("a", "1"), ("b", "-inf")], {"metrics": ["spearman"]}, "'-inf', which is no finite"),
        ([("a", "1"), ("b", "1")], {"metrics": ["spearman"]}, "has no two different labels"),
        ([("a", "x"), ("b", "x")], {}, "has examples of one class alone, 'x'"),
        (ROWS, {"metrics": ["spearman", "accuracy"]}, "mix those of values and those of classes"),
        (ROWS, {"seeds": [1, 1]}, "seeds of T must differ"),
        (ROWS, {"eval": ["a/dev.tsv", "b/dev.tsv"]}, "eval of T must differ in their names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_can_be_known_is_checked_before(rows, task, message, model, ending, tmp_path):
    refused(ending(call, write(tmp_path, rows), model, **task), message)
    assert not (tmp_path / "out").exists()


def test_a_dev_file_of_equal_labels_has_no_correlation(model, ending, tmp_path):
    numbers = [("a", "1"), ("b", "2")]
    ended = ending(call, write(tmp_path, numbers, numbers[:1] * 2), model, metrics=["spearman"])
    refused(ended, "dev.tsv has no two different labels")


@pytest.mark.parametrize(
    ("task", "message"),
    [("tasks.T=null", "the task T of .* is no mapping of keys to values"),
     ("tasks.T.eval=[1]", "eval in the task T of .* must be a list of str, not of 1"),
     ("tasks.T.metrics=[[accuracy]]", "metrics .* must be a list of str, not of ..accuracy"),
     ("tasks.T.header=[1, 2]", "header in the task T of .* must be a list of str, not of 1"),
     ("tasks.T.seeds=[1.5]", "seeds in the task T of .* must be a list of int, not of 1.5"),
     ("tasks.T.seeds=[true]", "seeds in the task T of .* must be a list of int, not of True"),
     ("length=2", "length must be at least 3 for the texts of T")],
)  # fmt: skip
def test_settings_of_tasks_are_checked(task, message, model, ending, tmp_path):
    refused(ending(call, write(tmp_path), model, task), message)


def test_names_of_tasks_are_names_of_folders(model, ending, tmp_path):
    (tmp_path / "tasks.yaml").write_text(json.dumps(
        {"data": str(write(tmp_path)), "tasks": {"../out": TASK}, "output": str(tmp_path / "o")}
    ))  # fmt: skip
    ended = ending(glue.main, [str(tmp_path / "tasks.yaml"), "--model", str(model), "length=16"])
    refused(ended, "The task '../out' is no name of a folder: rename it")


def test_models_that_cannot_be_used(model, ending, tmp_path):
    write(tmp_path)
    refused(
        ending(call, tmp_path, model, "length=65"), "length 65 is more than the 64 positions of"
    )
    refused(ending(call, tmp_path, model, "tasks=[]"), "has no section tasks with a task")
    refused(ending(call, tmp_path, model, "output="), "output must name a folder")
    copies = {name: (model / name).read_bytes() for name in os.listdir(model)}
    for name, content in (("model.safetensors", copies["model.safetensors"][:100]),
                          ("config.json", b"[]"), ("config.json", b"")):  # fmt: skip
        broken = tmp_path / "broken"
        broken.mkdir(exist_ok=True)
        for other in copies:
            (broken / other).write_bytes(content if other == name else copies[other])
        refused(ending(call, tmp_path, broken), "cannot load the model in .*broken: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["names", "num_hidden_layers", "hidden_size", "fewer"])
def test_an_encoder_that_would_start_anew_is_refused(change, model, ending, tmp_path):
    """Transformers draws what it lacks at random, and says so in a log that nobody reads."""
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    if change == "names":
        weights = {f"module.{name}": value for name, value in weights.items()}
    elif change == "fewer":
        del weights["lion.layers.0.norm1.weight"]
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, change: 2 * config[change]}))
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    message = r"of another model than its config.json: \d+ are missing or of another shape"
    refused(ending(call, write(tmp_path), other), message)
    assert not (tmp_path / "out").exists()


def test_weights_are_saved_before_they_are_scored(model, tmp_path, monkeypatch):
    this = job(write(tmp_path), model)
    with monkeypatch.context() as patch:
        patch.setattr(glue, "predict", lambda *_: [].pop())
        with pytest.raises(IndexError):
            glue.fine_tune(this, torch.device("cpu"))
    before = (this.folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(glue, "_train", lambda *_: pytest.fail("trained again"))
    scores = glue.fine_tune(this, torch.device("cpu"))
    assert scores.keys() == {"dev accuracy"}
    assert (this.folder / "model.safetensors").read_bytes() == before
    assert glue.fine_tune(this, torch.device("cpu")) == scores


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"scores": 1}', "[" * 10**5])
def test_a_damaged_result_is_done_again(content, model, tmp_path):
    this = job(write(tmp_path), model)
    scores = glue.fine_tune(this, torch.device("cpu"))
    (this.folder / "result.json").write_text(content)
    assert glue.fine_tune(this, torch.device("cpu")) == scores
    assert json.loads((this.folder / "result.json").read_text())["scores"] == scores
    assert not list(this.folder.glob(".*"))


def test_a_job_is_the_same_where_its_files_are_elsewhere(model, tmp_path, monkeypatch):
    this = job(write(tmp_path), model)
    scores = glue.fine_tune(this, torch.device("cpu"))
    copies = {"model": shutil.copytree(model, tmp_path / "model"),
              "data": shutil.copytree(this.data, tmp_path / "data", ignore=lambda *_: ["data"]),
              "output": shutil.copytree(this.output, tmp_path / "moved")}  # fmt: skip
    monkeypatch.setattr(glue, "_train", lambda *_: pytest.fail("trained again"))
    moved = replace(this, **{name: str(path) for name, path in copies.items()})
    assert glue.fine_tune(moved, torch.device("cpu")) == scores


@pytest.mark.parametrize("file", ["train.tsv", "dev.tsv"])
def test_other_data_of_the_same_size_is_another_job(file, model, tmp_path, monkeypatch):
    this = job(write(tmp_path), model)
    glue.fine_tune(this, torch.device("cpu"))
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(text.replace("help", "fail"))
    trained, train = [], glue._train
    monkeypatch.setattr(glue, "_train", lambda *args: trained.append(1) or train(*args))
    glue.fine_tune(this, torch.device("cpu"))
    assert trained == [1]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_another_configuration_or_tokeniser_is_another_job(file, model, tmp_path, monkeypatch):
    own = shutil.copytree(model, tmp_path / "model")
    this = job(write(tmp_path), own)
    glue.fine_tune(this, torch.device("cpu"))
    (own / file).write_text((own / file).read_text() + "\n")
    trained, train = [], glue._train
    monkeypatch.setattr(glue, "_train", lambda *args: trained.append(1) or train(*args))
    glue.fine_tune(this, torch.device("cpu"))
    assert trained == [1]


def test_names_of_classes_and_the_length_are_saved(model, tmp_path):
    this = job(write(tmp_path), model)
    glue.fine_tune(this, torch.device("cpu"))
    loaded = AutoModelForSequenceClassification.from_pretrained(this.folder)
    assert loaded.config.id2label == {0: "no", 1: "yes"}
    assert loaded.config.label2id == {"no": 0, "yes": 1}
    assert loaded.config.problem_type == "single_label_classification"
    (found,) = pipeline("text-classification", model=str(this.folder), device="cpu")("help")
    assert found["label"] in ("yes", "no")
    numbers = job(write(tmp_path, [("a", "1.5"), ("b", "2")] * 4), model, metrics=["spearman"])
    glue.fine_tune(numbers, torch.device("cpu"))
    loaded = AutoModelForSequenceClassification.from_pretrained(this.folder)
    assert (loaded.config.num_labels, loaded.config.problem_type) == (1, "regression")


@pytest.mark.parametrize(("length", "expected"), [(16, 512), (600, 600)])
def test_pretraining_saves_what_the_tokeniser_cuts_at(length, expected, corpus, tmp_path):
    tiny = str(ROOT / "mlm" / "configs" / "tiny.yaml")
    small = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.intermediate_size=16"]
    small += ["steps=1", "micro_batch=1", "global_batch=1", "workers=0", "device=cpu"]
    pretrain.main([tiny, f"data={corpus}", f"output={tmp_path}", f"length={length}", *small])
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == expected


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_saves_nothing(what, model, tmp_path, ending, monkeypatch):
    write(tmp_path)
    this = job(tmp_path, model)
    if what == "loss":
        weights = load_file(model / "model.safetensors")
        broken = tmp_path / "broken"
        broken.mkdir()
        for name in os.listdir(model):
            (broken / name).write_bytes((model / name).read_bytes())
        weights["lion.layers.0.norm1.weight"][0] = torch.nan
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        this = job(tmp_path, broken)
    else:  # of the last step, whose loss was still finite
        original, calls = torch.optim.AdamW.step, []

        def stepping(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                self.param_groups[0]["params"][0].grad.fill_(torch.nan)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    step = 0 if what == "loss" else 3
    message = rf"T, seed 1: its loss is not finite \(step {step}\): nothing of it is saved"
    with pytest.raises(FloatingPointError, match=message):
        glue._run(this)
    assert not this.folder.exists()
    monkeypatch.setattr(glue, "run_jobs", lambda *_: glue._run(this))
    if what == "loss":
        ended = ending(call, tmp_path, model)
        assert ended.code == 1
        assert "try a lower lr" in ended.err
        assert "Traceback" not in ended.err


PARENT = """
import sys, time
from mlm import glue

def slow(job, device):
    open(job.output, "w").write(str(__import__("os").getpid()))
    time.sleep(60)

glue.fine_tune = slow
if __name__ == "__main__":
    task = glue.Task(**eval(sys.argv[1]))
    glue.run_jobs([glue.Job("T", task, 1, "", "", sys.argv[2], 16, 1e-3)], ["cpu"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_jobs_end_with_their_parent(number, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    path = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pid = tmp_path / "pid"
    command = [sys.executable, tmp_path / "parent.py", repr(TASK), pid]
    parent = subprocess.Popen(command, env=path, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: pid.exists() and pid.read_text(), 120)
        child = int(pid.read_text())
        parent.send_signal(number)
        assert parent.wait(20) == -number
        wait_for(lambda: not is_running(child), 20)
    finally:
        parent.kill()


ODD = {"OMP_NUM_THREADS": "many", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.slow
def test_letters_and_threads_of_an_odd_environment(model, tmp_path):
    rows = [("schön", "très"), ("naïve", "ça")] * 6
    command = [sys.executable, "-m", "mlm.glue", config(write(tmp_path, rows), {}), "--model",
               model, f"output={tmp_path / 'out'}", "device=cpu", "length=16"]  # fmt: skip
    done = subprocess.run(command, env={**os.environ, **ODD}, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert "| ± |" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_constant_outputs_correlate_by_nothing():
    task = glue.Task(**{**TASK, "metrics": ["spearman"]})
    with pytest.warns(Warning, match="constant"):
        assert glue.score(task, [1.0, 2.0], [3.0, 3.0]) == {"spearman": 0.0}
