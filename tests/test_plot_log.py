import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import plot_log


def record(epoch: int, **others: float) -> dict:
    return {
        "train_loss": 2.0 / (epoch + 1),
        "train_lr": 1e-3,
        "test_loss": 1.0 / (epoch + 1),
        "test_acc1": 10.0 * epoch,
        "test_acc5": 50.0,
        "epoch": epoch,
        "n_parameters": 5_686_540,
        **others,
    }


def write_log(folder: Path, *records: dict, end: str = "") -> Path:
    folder.mkdir(parents=True)
    path = folder / "log.txt"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return path


def test_a_name_that_looks_like_a_formula(tmp_path):
    figure = plot_log.draw({"a$_{x$b": [{"epoch": 0, "train_loss": 1.0}]})
    figure.savefig(tmp_path / "curves.png")


def test_draws_several_runs(tmp_path):
    with_ema = write_log(tmp_path / "a", record(0, test_ema_acc1=1.0), record(1, test_ema_acc1=9.0))
    half_written = write_log(tmp_path / "b", record(0), end='{"train_loss": 0.')
    output = tmp_path / "curves.png"
    plot_log.main([str(with_ema), str(half_written), "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(tmp_path):
    log = write_log(tmp_path / "run", *(record(e, test_ema_acc1=5.0 * e) for e in range(4)))
    figure = plot_log.draw({"run": plot_log.read_log(log)})
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(plot_log.PANELS["epoch"])
    test, ema = figure.axes[1].get_lines()
    assert list(test.get_ydata()) == [0, 10, 20, 30]
    assert test.get_linestyle() == "-"
    assert list(ema.get_ydata()) == [0, 5, 10, 15]
    assert ema.get_linestyle() == "--"
    (legend,) = figure.legends
    assert legend.get_texts()[0].get_text() == "run, 5.7 M parameters, best top-1 30.0 %"


def test_a_repeated_epoch_counts_once(tmp_path):
    log = write_log(tmp_path / "run", record(0), record(1), record(1, test_acc1=7.0), record(2))
    epochs = plot_log.read_log(log)
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    assert epochs[1]["test_acc1"] == 7.0


def text_record(step: int) -> dict:
    """As mlm.pretrain writes it."""
    return {"step": step, "train_loss": 9.0 - step / 100, "train_lr": 1e-3,
            "eval_loss": 8.0 - step / 100, "eval_accuracy": step / 10,
            "tokens_per_second": 5e4, "peak_memory_gib": 8.7}  # fmt: skip


def test_runs_of_mlm_pretrain(tmp_path):
    """The second comes before the first, which a resumed run repeated."""
    log = write_log(tmp_path / "lion-s", text_record(200), text_record(100), text_record(200))
    figure = plot_log.draw({"lion-s": plot_log.read_log(log)})
    train, held_out = figure.axes[0].get_lines()
    assert list(train.get_xdata()) == [100, 200]
    assert list(train.get_ydata()) == [8, 7]
    assert list(held_out.get_ydata()) == [7, 6]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [10, 20]
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert figure.legends[0].get_texts()[0].get_text() == "lion-s, best accuracy 20.0 %"


def test_folders_are_runs(tmp_path):
    write_log(tmp_path / "a", text_record(100))
    assert plot_log.read_log(tmp_path / "a") == [text_record(100)]
    assert plot_log.run_names([tmp_path / "a", tmp_path / "b" / "log.txt"]) == ["a", "b"]


def test_runs_of_both_are_drawn_apart(tmp_path, capsys):
    folders = [tmp_path / "images", tmp_path / "text"]
    for folder, line in zip(folders, (record(0), text_record(100)), strict=True):
        write_log(folder, line)
    with pytest.raises(SystemExit) as stopped:
        plot_log.main([*map(str, folders), "--output", str(tmp_path / "curves.png")])
    assert stopped.value.code == 2
    assert "draw them apart" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"), [(5_686_540, "5.7 M"), (41_234, "41.2 k"), (999, "999")]
)
def test_small_models_have_parameters(count, text):
    assert plot_log.label("a", [record(0, n_parameters=count)]).startswith(f"a, {text} parameters")


def test_names():
    distinct = [Path("runs/a/log.txt"), Path("runs/b/log.txt")]
    assert plot_log.run_names(distinct) == ["a", "b"]
    alike = [Path("first/a/log.txt"), Path("second/a/log.txt")]
    assert plot_log.run_names(alike) == ["first/a/log.txt", "second/a/log.txt"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "error: cannot read .*log.txt: No such file or directory"),
        ("", "error: .*log.txt holds no finished epoch or step yet"),
        ('{"epoch": 0, "tra', "error: .*log.txt holds no finished epoch or step yet"),
        ('oops\n{"epoch": 0}\n', "error: line 1 of .*log.txt is not the JSON of an epoch .*"),
        (
            '{"lr": 0}\n{"epoch": 0}\n',
            "error: line 1 of .*log.txt is not the JSON of an epoch .*",
        ),
        (
            '{"step": 9}\n{"epoch": 0}\n',
            "error: .*log.txt has lines of main.py and of mlm.pretrain: .*",
        ),
    ],
)
def test_bad_log(tmp_path, capsys, lines, message):
    log = tmp_path / "log.txt"
    if lines is not None:
        log.write_text(lines)
    with pytest.raises(SystemExit) as stopped:
        plot_log.main([str(log)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"{message}\n", error)


def test_as_a_script(tmp_path):
    write_log(tmp_path / "run", record(0))
    script = Path(plot_log.__file__).resolve()
    subprocess.run([sys.executable, script, "run/log.txt"], cwd=tmp_path, check=True)
    assert (tmp_path / "curves.png").exists()


def test_what_is_no_log_and_no_picture(tmp_path, ending):
    log, other = tmp_path / "log.txt", tmp_path / "model.pth"
    log.write_text('{"epoch": 0, "train_loss": 1.0}\n')
    other.write_bytes(b"\x80\n\x81\n")
    for words, message in (
        ([other], f"line 1 of {other} is not the JSON of an epoch or step"),
        ([log, "--output", tmp_path / "a.xyz"], "Format 'xyz' is not supported"),
    ):
        ended = ending(plot_log.main, list(map(str, words)))
        assert ended.code == 2, ended
        assert ended.err.startswith(f"error: {message}"), ended
