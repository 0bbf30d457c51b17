"""What a pre-training leaves is whole and its own, wherever a kill or another run comes between."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, same
from transformers import AutoModelForMaskedLM, AutoTokenizer

import checkpoint
from mlm import pretrain
from mlm.export import export
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.shards import load_tokenizer

RUN = {"steps": 4, "length": 16, "micro_batch": 4, "global_batch": 4, "eval_every": 4,
       "save_every": 2, "model.hidden_size": 16, "model.intermediate_size": 16,
       "model.num_hidden_layers": 1, "workers": 0, "device": "cpu"}  # fmt: skip


def call(corpus: Path, output: Path, **settings: object) -> None:
    values = {"data": corpus, "output": output, **RUN, **settings}
    tiny = str(ROOT / "mlm" / "configs" / "tiny.yaml")
    pretrain.main([tiny, *(f"{name}={value}" for name, value in values.items())])


class Killed(BaseException):
    """What no handler of errors catches."""


def killed_at_save(monkeypatch, number: int, *, before: bool = False) -> None:
    """The process ends right after (or before) a checkpoint is written."""
    save, calls = checkpoint.save, 0

    def saving(*args, **options):
        nonlocal calls
        calls += 1
        if not (before and calls == number):
            save(*args, **options)
        if calls == number:
            raise Killed

    monkeypatch.setattr(checkpoint, "save", saving)


def killed_at_change(number: int, function, *args) -> bool:
    """Calls a function in a process that is killed at a change of the file system, counted from 0.

    Returns whether it was; otherwise the function has ended.
    """
    child = os.fork()
    if child == 0:
        left = number

        def watch(event: str, args: tuple) -> None:
            nonlocal left
            changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
            if event in changes or (event == "open" and args[1] in ("w", "wb")):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(watch)
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_a_model_folder_is_whole_at_every_kill(corpus, tmp_path):
    tokenizer = load_tokenizer(corpus / "tokenizer")
    config = LionBertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                            num_attention_heads=2, intermediate_size=16)  # fmt: skip
    old, new = LionBertForMaskedLM(config), LionBertForMaskedLM(config)
    folder, kills = tmp_path / "model", 0
    export(old, tokenizer, folder)
    (folder / "README.md").write_text("by hand")
    expected = {path.name: path.stat().st_size for path in folder.iterdir()}
    while killed_at_change(kills, export, new, tokenizer, folder):
        kills += 1
        assert {path.name: path.stat().st_size for path in folder.iterdir()} == expected
        found = AutoModelForMaskedLM.from_pretrained(folder).state_dict()
        assert same(found, old.state_dict()) or same(found, new.state_dict())
    assert kills > 5
    assert same(AutoModelForMaskedLM.from_pretrained(folder).state_dict(), new.state_dict())
    assert os.listdir(tmp_path) == ["model"]
    assert (folder / "README.md").read_text() == "by hand"


@pytest.mark.parametrize("number", [1, 2])
def test_resuming_renews_a_model_that_is_behind_its_checkpoint(
    number, corpus, ending, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        killed_at_save(patch, number)
        with pytest.raises(Killed):
            call(corpus, tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")["model"]
    if number == 2:  # the last one: nothing is left to be trained
        stale = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
        assert not same(stale, saved)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_: None)
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        assert ending(call, corpus, tmp_path, resume="auto", steps=4).code == 0
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    assert same(loaded, saved)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").mask_token == "[MASK]"


def test_resuming_a_finished_run_renews_a_model_that_is_lost(corpus, ending, tmp_path):
    """As after two kills between a checkpoint and its model at the last step."""
    assert ending(call, corpus, tmp_path).code == 0
    shutil.rmtree(tmp_path / "model")
    assert ending(call, corpus, tmp_path, resume="auto").code == 0
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").state_dict()
    assert same(loaded, checkpoint.load(tmp_path / "checkpoint.pth")["model"])


def test_overwriting_leaves_nothing_to_be_resumed_by_mistake(corpus, ending, tmp_path, monkeypatch):
    assert ending(call, corpus, tmp_path).code == 0
    before = checkpoint.load(tmp_path / "checkpoint.pth")
    with monkeypatch.context() as patch:
        killed_at_save(patch, 1, before=True)
        with pytest.raises(Killed):
            call(corpus, tmp_path, overwrite="true", seed=3)
    assert not list(tmp_path.glob("checkpoint*"))
    assert not (tmp_path / "model").exists()
    ended = ending(call, corpus, tmp_path, resume="auto")
    assert ended.code == 0
    assert "Step: [0/4]" in ended.out.replace("  ", " ")
    assert same(checkpoint.load(tmp_path / "checkpoint.pth")["model"], before["model"])


@pytest.mark.parametrize(
    ("part", "make"),
    [("checkpoint.pth", Path.touch), ("checkpoint.previous.pth", Path.touch),
     ("model", Path.mkdir)],
)  # fmt: skip
def test_a_folder_with_a_part_of_a_run_is_taken(part, make, corpus, ending, tmp_path):
    make(tmp_path / part)
    ended = ending(call, corpus, tmp_path)
    assert ended.code == 2
    assert "holds another run: go on with it by resume=auto" in ended.err
