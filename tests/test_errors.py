"""What users did wrong is told in a sentence; what is wrong in the program keeps its traceback."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT, TINY, refused, slow

import loaders
from commands import run_command
from errors import UserError, as_user_error
from mlm import pretrain
from models_lion import LionAttention

CONFIG = str(ROOT / "mlm" / "configs" / "lion-s-base.yaml")
SMALL = ("model.hidden_size=16", "model.intermediate_size=16", "model.num_hidden_layers=1",
         "model.num_attention_heads=2")  # fmt: skip
COMMAND = """
from errors import UserError
from commands import run_command

def fail(*_):
    raise {kind}("invalid literal")

build = {build}
run_command("command", build)
"""


def fail(*_: object, **__: object) -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("kind", "code", "first", "last"),
    [
        ("UserError", 2, "command: error: invalid literal", "command: error: invalid literal"),
        slow("ValueError", 1, "Traceback (most recent call last):", "ValueError: invalid literal"),
    ],
)
@pytest.mark.parametrize("build", ["fail", "lambda peers: fail"], ids=["set-up", "work"])
def test_the_ends_of_a_command(build, kind, code, first, last):
    done = subprocess.run([sys.executable, "-c", COMMAND.format(kind=kind, build=build)], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    lines = done.stderr.splitlines()
    assert (done.returncode, lines[0], lines[-1]) == (code, first, last), done.stderr


def unpack(*_: object, **__: object) -> None:
    _one, _other = [1]


@pytest.mark.parametrize("method", ["reset_parameters", "forward"])
def test_a_bug_of_a_model_is_not_the_users(method, run, data_path, monkeypatch):
    monkeypatch.setattr(LionAttention, method, unpack)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        run(*TINY, "--data-path", data_path)


def test_a_bug_of_a_language_model_is_not_the_users(ending, corpus, monkeypatch):
    monkeypatch.setattr(LionAttention, "reset_parameters", unpack)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        ending(pretrain.main, [CONFIG, f"data={corpus}", "device=cpu", *SMALL])


@pytest.mark.parametrize("option", ["num_heads=7", "proj_drop_rate=3", "mlp_ratio=-1"])
def test_what_a_model_or_a_library_refuses_is_the_users(option, run, data_path):
    ended = run(*TINY, "--data-path", data_path, "--model-kwargs", option)
    refused(ended, "cannot be built with these arguments")


@pytest.mark.parametrize("evaluation", [(), ("--eval",)], ids=["training", "evaluation"])
def test_a_bug_in_the_set_up_is_not_the_users(evaluation, run, data_path, monkeypatch):
    monkeypatch.setattr(loaders, "build_eval_loader", fail)
    with pytest.raises(ValueError, match="^a bug$"):
        run(*TINY, "--data-path", data_path, *evaluation)


def test_a_bug_in_the_set_up_of_pretraining(ending, corpus, monkeypatch):
    monkeypatch.setattr(pretrain, "build_loaders", fail)
    with pytest.raises(ValueError, match="^a bug$"):
        ending(pretrain.main, [CONFIG, f"data={corpus}", "device=cpu", *SMALL])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.mixer=nonsense", "Unknown mixer 'nonsense': choose one of"),
        ("lr=[1", r"The value in 'lr=\[1' is no YAML: "),
        ("lr=2020-13-45", "The value in 'lr=2020-13-45' is no YAML: month must be in 1..12"),
    ],
)
def test_bad_settings(setting, message, ending, corpus):
    ended = ending(pretrain.main, [CONFIG, f"data={corpus}", "device=cpu", setting])
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert re.search(message, ended.err)


def test_a_librarys_refusal_of_an_order_is_the_users(run, data_path):
    refused(run(*TINY, "--data-path", data_path, "--order", "nonsense"), "Unknown order 'nonsense'")


def test_only_value_errors_of_a_library_become_the_users():
    with pytest.raises(UserError, match="^no such order$") as caught, as_user_error():
        raise ValueError("no such order")
    assert caught.value.__cause__ is not None
    with pytest.raises(TypeError), as_user_error():
        raise TypeError
    with pytest.raises(UserError) as caught, as_user_error():
        raise UserError("as it is")
    assert caught.value.__cause__ is None


SAID = [
    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    "DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.",
]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("during", ["set-up", "work"])
def test_shared_memory_that_is_used_up_is_a_sentence(during, said, ending):
    def raise_it(*_: object) -> None:
        raise RuntimeError(said)

    build = raise_it if during == "set-up" else lambda _: raise_it
    ended = ending(run_command, "command", build)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("command: error: The processes that load data are out of shared")


CHATTY = """
import logging, pathlib, sys
from commands import run_command

def build(peers):
    def work():
        for _ in range(3):
            print("x" * 10**6, flush=True)
            logging.info("y" * 10**6)
            sys.stderr.write("z" * 10**6)
        pathlib.Path(sys.argv[1]).touch()
    return work

run_command("chatty", build)
"""


@pytest.mark.parametrize(
    "redirection", [slow(">&-"), slow(">&- 2>&- <&-"), slow("> /dev/full 2>&1"), "2>&1 | true"]
)
def test_work_goes_on_where_nobody_reads_it(redirection, tmp_path):
    done = tmp_path / "done"
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" "$2" {redirection}']
    ended = subprocess.run([*command, sys.executable, CHATTY, done], cwd=ROOT)
    assert ended.returncode == 0
    assert done.exists()


@pytest.mark.parametrize(
    ("redirection", "told"),
    [("> /dev/full", r"Standard output is lost from here on \(.* No space left on device\).\n"),
     slow("| true", "")],
)  # fmt: skip
def test_output_that_is_lost_is_told_once(redirection, told, tmp_path):
    quiet = CHATTY.replace('sys.stderr.write("z" * 10**6)', "")
    command = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" "$2" {redirection}']
    ended = subprocess.run([*command, sys.executable, quiet, tmp_path / "done"], cwd=ROOT,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(told, ended.stderr), ended.stderr


FIRST_FILE = """
import os, pathlib, sys
from commands import run_command

def build(peers):
    path = pathlib.Path(sys.argv[1])
    def work():
        with path.open("w") as file:
            os.write(1, b"of a library")
            os.write(2, b"of a library")
            file.write("ours")
    return work

run_command("first", build)
"""


def test_no_file_gets_the_number_of_a_stream_that_is_closed(tmp_path):
    file = tmp_path / "file"
    command = ["bash", "-c", '"$0" -c "$1" "$2" >&- 2>&- <&-', sys.executable, FIRST_FILE, file]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert file.read_text() == "ours"
