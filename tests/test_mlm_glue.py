"""Fine-tuning: metrics, the tasks of GLUE, transfer from MNLI, and bad files."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from transformers import AutoModelForSequenceClassification

from mlm import glue
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.settings import read_yaml, typed
from mlm.shards import load_tokenizer
from mlm.tasks import Task, read_examples, score

CONFIG = ROOT / "mlm" / "configs" / "glue.yaml"
TASKS = {n: typed(Task, v, n) for n, v in read_yaml(CONFIG)["tasks"].items()}
# The headers of GLUE's files: text columns and label stand at these places.
COLUMNS = {
    "MNLI": (12, (8, 9), 11),
    "QQP": (6, (3, 4), 5),
    "QNLI": (4, (1, 2), 3),
    "SST-2": (2, (0,), 1),
    "CoLA": (4, (3,), 1),
    "MRPC": (5, (3, 4), 0),
    "STS-B": (10, (7, 8), 9),
    "RTE": (4, (1, 2), 3),
}
GOOD = ["help", "list", "string", "define", "call"]
BAD = ["error", "raise", "exception", "fail", "break"]
WORDS = ["the", "a", "of", "python", "object", "function", "class", "module", "value", "is", "to"]


def example(generator: random.Random, positive: bool) -> str:
    words = generator.choices(WORDS, k=6) + generator.choices(GOOD if positive else BAD, k=3)
    generator.shuffle(words)
    return " ".join(words)


def write_task(folder: Path, name: str, count: int) -> None:
    """Files with the columns of a GLUE task; the label is told by the first text alone."""
    task, (width, texts, label) = TASKS[name], COLUMNS[name]
    header = [f"other{i}" for i in range(width)]
    for place, column in zip((*texts, label), (*task.text, task.label), strict=True):
        header[place] = column
    generator = random.Random(name)
    for file in (task.train, *task.eval):
        rows = [] if task.header else [header]
        for i in range(count):
            row = [f'"{i}'] * width  # a quote that is never closed
            for place in texts:
                row[place] = example(generator, i % 2 == 1)
            numbers = ("1.25", "4.75") if name == "STS-B" else ("no", "yes")
            row[label] = numbers[i % 2]
            rows.append(row)
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join("\t".join(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for name in TASKS:
        write_task(folder, name, 192)
    return folder


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(corpus / "tokenizer")
    torch.manual_seed(0)
    config = LionBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    LionBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(data: Path, model: Path, output: Path, *arguments: str) -> None:
    settings = (f"data={data}", f"output={output}", "device=cpu", "lr=0.005")
    glue.main([str(CONFIG), "--model", str(model), *settings, *arguments])


def test_settings_are_those_of_the_recipe():
    table = {n: (t.batch, t.epochs, t.weight_decay, len(t.seeds)) for n, t in TASKS.items()}
    assert table == {
        "MNLI": (48, 3, 5e-6, 1),
        "QQP": (16, 5, 3e-6, 1),
        "QNLI": (16, 10, 1e-6, 1),
        "SST-2": (16, 3, 3e-6, 3),
        "CoLA": (32, 10, 1e-6, 4),
        "MRPC": (32, 10, 8e-6, 5),
        "STS-B": (32, 8, 3e-6, 5),
        "RTE": (16, 2, 1e-11, 5),
    }
    assert {n for n, t in TASKS.items() if t.start == "MNLI"} == {"RTE", "MRPC", "STS-B"}
    assert TASKS["STS-B"].precision == "fp32"
    assert TASKS["STS-B"].regression


@pytest.mark.parametrize("name", TASKS)
def test_columns_of_every_task(name, data):
    task = TASKS[name]
    for file in (task.train, *task.eval):
        examples = read_examples(data, file, task, None)
        assert len(examples.labels) == 192
        assert len(examples.texts[0]) == len(task.text)
        assert examples.labels[:2] == ([1.25, 4.75] if name == "STS-B" else [0, 1])
        assert set(examples.texts[1][0].split()) & set(GOOD)


def task_with(*metrics: str) -> Task:
    return Task(train="", eval=[""], text=[""], label="", batch=1, epochs=1, weight_decay=0.0,
                seeds=[0], metrics=list(metrics))  # fmt: skip


def test_metrics_of_classes_by_their_definitions():
    labels, outputs = [1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0, 1, 0]
    tp, fp, fn, tn = 3, 1, 2, 2
    scores = score(task_with("accuracy", "f1", "matthews"), labels, outputs)
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert scores == pytest.approx({
        "accuracy": 100 * 5 / 8,
        "f1": 100 * 2 * tp / (2 * tp + fp + fn),
        "matthews": 100 * (tp * tn - fp * fn) / product**0.5,
    })  # fmt: skip


def test_spearman_by_its_definition():
    values, others = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 40.0]
    squares = 1 + 1  # of rank differences
    spearman = score(task_with("spearman"), values, others)["spearman"]
    assert spearman == pytest.approx(100 * (1 - 6 * squares / (4 * 15)))


SHORT = ("--tasks", "MNLI,STS-B,CoLA", "tasks.MNLI.batch=16", "tasks.MNLI.epochs=6",
         "tasks.STS-B.seeds=[1, 2]", "tasks.STS-B.epochs=4", "tasks.CoLA.seeds=[1]")  # fmt: skip


@pytest.fixture(scope="module")
def tuned(data, model, tmp_path_factory) -> Path:
    """The output of three tasks over two devices."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue, "devices_for", lambda _: ["cpu", "cpu"])
        call(data, model, folder, *SHORT)
    return folder


def rows_of(folder: Path) -> list[str]:
    return (folder / "results.md").read_text().splitlines()


@pytest.mark.slow
def test_the_table_has_seeds_and_metrics_of_each_file(tuned):
    rows = rows_of(tuned)
    assert re.match(r"\| MNLI \| 1 \| dev_matched accuracy \d+\.\d+, dev_mismatched acc", rows[2])
    assert re.match(r"\| STS-B \| 2 \| dev spearman", rows[3])


@pytest.mark.slow
def test_all_tasks_are_learnt_and_averaged(tuned):
    means = json.loads((tuned / "results.json").read_text())
    assert means["MNLI"] > 90
    assert means["STS-B"] > 80
    assert means["CoLA"] > 80
    assert means["mean"] == pytest.approx(np.mean([means[n] for n in ("MNLI", "STS-B", "CoLA")]))


@pytest.mark.slow
def test_transfer_starts_from_the_first_task(tuned):
    job = json.loads((tuned / "STS-B-2" / "result.json").read_text())["job"]
    assert job["model"] == str(tuned / "MNLI-19")


@pytest.mark.slow
def test_a_regression_has_one_output(tuned):
    loaded = AutoModelForSequenceClassification.from_pretrained(tuned / "STS-B-2")
    assert loaded.config.num_labels == 1


@pytest.mark.slow
def test_what_is_done_stays(tuned, data, model, ending, tmp_path):
    folder = shutil.copytree(tuned, tmp_path / "tuned")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")}
    rows = rows_of(folder)
    assert ending(call, data, model, folder, *SHORT).out.endswith("\n".join(rows) + "\n")
    assert ending(call, data, model, folder, *SHORT, "tasks.STS-B.seeds=[2]").code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture(scope="module")
def twice(data, model, tmp_path_factory) -> list[tuple[dict[str, float], list[list[int]]]]:
    """Scores, and the orders of the examples in each epoch and in evaluation, of the same job."""
    runs, batches = [], glue.batches
    for _ in range(2):
        orders = []

        def recorded(examples, order, *rest, orders=orders):
            orders.append(order.tolist())
            return batches(examples, order, *rest)

        output = str(tmp_path_factory.mktemp("twice"))
        job = glue.Job("SST-2", TASKS["SST-2"], 1, str(model), str(data), output, 32, 1e-3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(glue, "batches", recorded)
            runs.append((glue.fine_tune(job, torch.device("cpu")), orders))
    return runs


def test_training_is_repeatable(twice):
    assert twice[0] == twice[1]


def test_every_epoch_is_shuffled_anew(twice):
    _, orders = twice[0]
    for order in orders[:3]:
        assert sorted(order) == list(range(192)) != order
    assert orders[0] != orders[1]


def test_evaluation_is_in_order(twice):
    _, orders = twice[0]
    assert orders[3:] == [list(range(192))]


def refused(ended, message: str) -> None:
    assert ended.code == 2, ended
    assert re.match(rf"mlm\.glue: error: .*{message}", ended.err.splitlines()[-1]), ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tstars\nx\t1\n", "SST-2/train.tsv has no column 'label', only: sentence, stars"),
        ("sentence\tlabel\nx\nx\t1\n", "train.tsv has 1 whole examples in 2 rows"),
        ("sentence\tlabel\n", "has 0 whole examples in 0 rows"),
        ("", "train.tsv is empty"),
        ("sentence\tlabel\nx\tyes\n", "dev.tsv has labels that the training file lacks: no"),
        (None, "cannot read the examples .*train.tsv: No such file"),
    ],
    ids=["column", "rows", "header", "empty", "labels", "absent"],
)
def test_bad_tsv(content, message, model, ending, tmp_path):
    write_task(tmp_path, "SST-2", 8)
    path = tmp_path / "SST-2" / "train.tsv"
    path.unlink() if content is None else path.write_text(content)
    output = tmp_path / "output"
    refused(ending(call, tmp_path, model, output, "--tasks", "SST-2"), message)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "WNLI"), "has no task WNLI"),
        (("--tasks", "RTE"), "RTE starts from MNLI, which must be a"),
        (("tasks.RTE.seed=1",), "Unknown key 'seed' in the task RTE of"),
        (("tasks.RTE.metrics=[x]",), r"Unknown metrics \['x'\] of RTE"),
        (("tasks.RTE.text=[a, b, c]",), "one or two text columns, not 3"),
        (("tasks.RTE.precision=fp16",), "precision of RTE must be bf16 or"),
        (("tasks.RTE.seeds=[]",), "eval and seeds of RTE must not be"),
        (("lr=-1",), "lr must be above 0, not -1.0"),
        (("tasks.RTE.weight_decay=-1",), "weight_decay of RTE must not be"),
        (("tasks.RTE.batch=0",), "batch of RTE must be at least 1, not 0"),
        (("tasks.RTE.seeds=[-1]",), "seeds of RTE must be in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_settings(arguments, message, data, model, ending, tmp_path):
    output = tmp_path / "output"
    refused(ending(call, data, model, output, *arguments), message)
    assert not output.exists()


def test_an_output_that_cannot_be_written_to(data, model, ending):
    refused(ending(call, data, model, "/proc/run"), "output /proc/run cannot be written to")


def test_a_folder_without_a_model(data, ending, tmp_path):
    refused(ending(call, data, tmp_path, tmp_path / "output"), "There is no model in")
    assert not (tmp_path / "output").exists()


def test_a_model_and_a_tokeniser_that_do_not_belong_together(data, model, ending, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    message = r"has a vocabulary of 7 words and its tokeniser one of \d+: they do not belong"
    refused(ending(call, data, other, tmp_path / "output"), message)
    assert not (tmp_path / "output").exists()
