"""Tables of language models: searched, fine-tuned, resumed, and reported by held-out loss."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT

from scripts import compare
from scripts.comparing.recipes import Run, read_recipe
from scripts.comparing.report import best_of_families, by_model, draw
from scripts.comparing.scheduling import Scheduler, Started

SMALL = ("mlm/configs/tiny.yaml data=$DATA/shards steps=4 eval_every=2 length=16 global_batch=8 "
         "micro_batch=8 workers=0 model.hidden_size=16 model.num_hidden_layers=1")  # fmt: skip
FINE_TUNE = "mlm/configs/mr.yaml data=$DATA/mr tasks.MR.seeds=[1] tasks.MR.epochs=1"
RECIPE = {"program": "mlm.pretrain", "arguments": SMALL, "seeds": [17], "plateau": 25,
          "models": {"rope": "model.mixer=softmax-rope", "s": ""}}  # fmt: skip


def recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory) -> Path:
    """What get_text.sh and mlm.prepare leave."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "shards").symlink_to(corpus)
    (folder / "mr").mkdir()
    for name in ("train", "dev"):
        rows = "text\tlabel\n" + "a good one\t1\na bad one\t0\n" * 8
        (folder / "mr" / f"{name}.tsv").write_text(rows)
    return folder


def log_of(run: Run, losses: list[float], accuracies: list[float]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    steps = [run.length * (i + 1) // len(losses) for i in range(len(losses))]
    lines = [
        {"step": step, "eval_loss": loss, "eval_accuracy": accuracy, "tokens_per_second": 1000 * i,
         "n_parameters": 1234}
        for i, (step, loss, accuracy) in enumerate(zip(steps, losses, accuracies, strict=True))
    ]  # fmt: skip
    (run.folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lease = {"steps": run.length, "seconds": 90, "at_once": 2}
    (run.folder / "leases.jsonl").write_text(json.dumps(lease) + "\n")
    facts = dict.fromkeys(("device", "torch", "timm", "commit"), "known")
    (run.folder / "args.yaml").write_text(yaml.safe_dump(facts))


def test_other_fine_tuning_is_another_run(tmp_path):
    run = read_recipe(recipe(tmp_path, fine_tune=FINE_TUNE), tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "arguments.txt").write_text(run.description)
    read_recipe(recipe(tmp_path, fine_tune=FINE_TUNE), tmp_path)
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        read_recipe(recipe(tmp_path, fine_tune=f"{FINE_TUNE} length=32"), tmp_path)


def test_an_edited_configuration_is_another_run(tmp_path, monkeypatch):
    config, words = ROOT / "mlm/configs/tiny.yaml", f"{tmp_path}/tiny.yaml data=$DATA/shards"
    (tmp_path / "tiny.yaml").write_text(config.read_text())
    path = recipe(tmp_path, arguments=words, models={"s": ""})
    (run,) = read_recipe(path, tmp_path)
    monkeypatch.setattr(type(run.program), "next_command", lambda *_: ["true"])
    Scheduler([run], "", concurrent=1, seconds=100).start(run, 0)
    kept = yaml.safe_load((run.folder / "settings.yaml").read_text())
    assert kept == {**yaml.safe_load(config.read_text()), "data": "$DATA/shards"}
    read_recipe(path, tmp_path)
    (tmp_path / "tiny.yaml").write_text(f"{config.read_text()}\neps: 1.0e-7\n")
    with pytest.raises(ValueError, match="holds a run with other settings .settings.yaml.: choose"):
        read_recipe(path, tmp_path)


def test_what_every_run_is_given_is_no_argument(tmp_path):
    with pytest.raises(ValueError, match="compare.py itself gives runs their seed"):
        read_recipe(recipe(tmp_path), tmp_path, more=("seed=3",))


def test_every_combination_of_what_varies_is_a_model(tmp_path):
    vary = {"lr": [0.001, 0.002]}
    path = recipe(tmp_path, vary=vary, fine_tune=FINE_TUNE)
    runs = read_recipe(path, tmp_path)
    names = ["rope,lr=0.001", "s,lr=0.001", "rope,lr=0.002", "s,lr=0.002"]
    assert [run.model for run in runs] == names
    assert runs[0].family == "rope"
    assert runs[3].arguments == (*shlex.split(SMALL), "lr=0.002")
    assert runs[0].length == 4
    assert runs[0].plateau == 25
    assert runs[0].fine_tune == tuple(shlex.split(FINE_TUNE))
    more = read_recipe(path, tmp_path, models=["s"], more=["eps=1e-5"],
                       vary=[("lr", "3e-4"), ("warmup_share", "0.1", "0.2")])  # fmt: skip
    assert [run.model for run in more] == [
        "s,lr=3e-4,warmup_share=0.1", "s,lr=3e-4,warmup_share=0.2"
    ]  # fmt: skip
    assert more[1].arguments[-3:] == ("eps=1e-5", "lr=3e-4", "warmup_share=0.2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": "mlm.train"}, "has no program 'mlm.train': choose one of main.py, mlm.pretr"),
        ({"tune": "x"}, "unknown key tune.*it needs arguments, seeds and models"),
        ({"arguments": f"{SMALL} stpes=5"}, r"Unknown key 'stpes' .*did you mean steps\?"),
        ({"arguments": f"{SMALL} model.norm=middle"}, "Unknown norm 'middle'"),
        ({"arguments": f"{SMALL} model.hidden_size=15"}, "width 15 is not divisible by 2 heads"),
        ({"arguments": f"{SMALL} lr=-1"}, "lr must be above 0"),
        ({"arguments": "mlm/configs/tiny.yaml"}, "tiny.yaml lacks data: give data=VALUE"),
        ({"arguments": "mlm/configs/none.yaml"}, "cannot read the settings .*none.yaml: No such"),
        ({"arguments": "steps=5"}, "'steps=5 .*' must begin with a file such as mlm/configs/tiny"),
        ({"fine_tune": f"{FINE_TUNE} lrr=1"}, "Unknown key 'lrr' in mlm/configs/mr.yaml"),
        ({"fine_tune": f"{FINE_TUNE} tasks.MR.metrics=[bleu]"}, "Unknown metrics .'bleu'. of MR"),
        ({"program": "main.py", "arguments": "--epochs 1", "models": {"a": ""}, "fine_tune": "x"},
         "main.py has no fine_tune"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_recipes_are_refused_before_any_work(changes, message, tmp_path, ending, text):
    command = [str(recipe(tmp_path, **changes)), "--output", str(tmp_path / "out"),
               "--data-path", str(text)]  # fmt: skip
    ended = ending(compare.main, command)
    assert ended.code == 2
    assert not (tmp_path / "out").exists()
    assert ended.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe(tmp_path, **changes), tmp_path / "out")


@pytest.mark.parametrize("data", [[], ["--data-path", "absent"], ["--data-path", "{text}/shards"]])
def test_text_that_is_not_there_is_told_before_any_work(data, tmp_path, ending, text):
    data = [word.format(text=text) for word in data]
    path = recipe(tmp_path, fine_tune=FINE_TUNE)
    ended = ending(compare.main, [str(path), "--output", str(tmp_path / "out"), *data])
    assert ended.code == 2
    assert not (tmp_path / "out").exists()
    assert "needs --data-path, the folder of get_text.sh: no " in ended.err


def test_a_run_is_trained_then_fine_tuned_then_finished(tmp_path):
    (run, _) = read_recipe(recipe(tmp_path, fine_tune=FINE_TUNE), tmp_path)
    trains = run.program.next_command(run, "text", "cuda:1")
    assert trains[2:5] == ["mlm.pretrain", str(ROOT / "mlm/configs/tiny.yaml"), "data=text/shards"]
    assert trains[-4:] == [f"output={run.folder}", "device=cuda:1", "seed=17", "resume=auto"]
    log_of(run, [6, 5], [10, 30])
    assert run.program.next_command(run, "text", "cuda:1") == trains, "its model is lost"
    (run.folder / "model").mkdir()
    tunes = run.program.next_command(run, "text", "")
    assert tunes[2:5] == ["mlm.glue", str(ROOT / "mlm/configs/mr.yaml"), "data=text/mr"]
    assert tunes[-3:] == [f"output={run.folder}/fine_tuned", "--model", f"{run.folder}/model"]
    assert not run.is_finished
    (run.folder / "fine_tuned").mkdir()
    (run.folder / "fine_tuned" / "results.json").write_text('{"MR": 80.0, "mean": 80.0}')
    assert run.is_finished
    run.program.tidy(run)
    assert run.is_finished
    assert not (run.folder / "model").exists()


def test_a_stage_that_changes_nothing_is_a_failure(tmp_path, capsys):
    """It would be started again and again."""
    runs = read_recipe(recipe(tmp_path, fine_tune=FINE_TUNE), tmp_path)
    scheduler = Scheduler(runs, "", concurrent=1, seconds=100)
    log_of(runs[0], [6, 5], [10, 30])
    (runs[0].folder / "checkpoint.pth").touch()
    ended = SimpleNamespace(poll=lambda: 0, returncode=0)
    scheduler.started.append(Started(runs[0], ended, 0, done=0))
    assert scheduler.collect() == [(runs[0], 0)]  # trained, and goes on to fine-tuning
    scheduler.started.append(Started(runs[0], ended, 0, done=4))
    assert scheduler.collect() == []
    assert scheduler.failed == [runs[0]]


def test_the_best_of_each_model_comes_first(tmp_path, ending):
    vary = {"lr": [0.001, 0.002]}
    path = recipe(tmp_path, vary=vary)
    runs = read_recipe(path, tmp_path)
    for run, last in zip(runs, ([5.5, 20], [3, 50], [5.2, 24], [3.5, 45]), strict=True):
        log_of(run, [6, 5.8, last[0]], [10, 26 if last[1] > 25 else 16, last[1]])
    assert list(best_of_families(by_model(runs))) == ["rope,lr=0.002", "s,lr=0.001"]
    assert ending(compare.main, [str(path), "--output", str(tmp_path), "--report"]).code == 0
    best, everything = (tmp_path / "comparison.md").read_text().split("All of them:")
    assert "4 of 4 runs, 4 steps" in best
    assert "| held-out loss | accuracy, % | above 25 % from step | tokens/s | minutes |" in best
    assert "| rope,lr=0.002 | 1,234 | 5.20 | 24.00 | never | 1,000 | 1.5 |" in best
    assert "| s,lr=0.001 | 1,234 | 3.00 | 50.00 | 2 | 1,000 | 1.5 |" in best
    assert "rope,lr=0.001" not in best
    assert everything.count("\n| rope") == 2
    (axes,) = draw(best_of_families(by_model(runs)), "2 steps; CPU").axes
    assert axes.get_title(loc="left") == "2 steps; CPU"
    assert [list(line.get_ydata()) for line in axes.lines] == [[6, 5.8, 5.2], [6, 5.8, 3]]


@pytest.mark.long
def test_runs_from_text_to_the_table(tmp_path, text, ending, monkeypatch):
    """In whatever folder it is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    path = recipe(tmp_path, fine_tune=FINE_TUNE, models={"rope": "model.mixer=softmax-rope"})
    out = Path("out")
    command = [str(path), "--output", str(out), "--data-path", str(text)]
    ended = ending(compare.main, command)
    assert ended.code == 0, ended.out
    assert "rope, seed 17: from step 0\nrope, seed 17: from step 4\n" in ended.out
    assert "rope, seed 17: finished, held-out loss " in ended.out
    assert not [*out.rglob("*.pth"), *out.rglob("*.safetensors")]
    assert ending(compare.main, command).out == "1 of 1 runs are finished\n"
    assert ending(compare.main, [*command, "--report"]).code == 0
    assert "| MR, % |" in (out / "comparison.md").read_text()
