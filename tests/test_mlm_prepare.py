"""Text files of every kind become the same shards; what is done is not done again."""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mlm import prepare
from mlm.shards import Corpus, load_tokenizer

TEXTS = [f"The first line of {i}.\nIts second line, {'é' * (i % 3)} and no more.\n"
         for i in range(60)]  # fmt: skip


def call(*arguments: object) -> None:
    prepare.main([str(argument) for argument in arguments])


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    """The texts as a file of the kind that the name says."""
    lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    content = ("\n\n".join(texts) if ".txt" in path.name else lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate(Corpus(folder, split, 4).shards)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    path = write(folder / "a.txt")
    call(path, "--output", folder / "out", "--train-tokenizer", 120, "--eval-share", 0.3)
    return folder / "out"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.json.gz"])
def test_kinds_of_files(name, expected, tmp_path):
    call(write(tmp_path / name), "--output", tmp_path / "out", "--tokenizer",
         expected / "tokenizer", "--eval-share", 0.3)  # fmt: skip
    for split in ("train", "eval"):
        assert np.array_equal(tokens(tmp_path / "out", split), tokens(expected, split))


def test_parquet(expected, tmp_path):
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    call(tmp_path / "a.parquet", "--output", tmp_path / "out", "--tokenizer",
         expected / "tokenizer", "--eval-share", 0.3, "--text-field", "body")  # fmt: skip
    assert np.array_equal(tokens(tmp_path / "out", "train"), tokens(expected, "train"))


def test_shards_hold_the_documents(expected):
    tokenizer = load_tokenizer(expected / "tokenizer")
    parts = {}
    for split in ("train", "eval"):
        ids = tokens(expected, split)
        ends = np.flatnonzero(ids == tokenizer.sep_token_id) + 1
        parts[split] = [part.tolist() for part in np.split(ids, ends)[:-1]]
    held_out = [prepare.held_out(text.strip() + "\n", 0.3) for text in TEXTS]
    assert 5 < sum(held_out) < 35
    for split, wanted in (("train", False), ("eval", True)):
        texts = [text for text, held in zip(TEXTS, held_out, strict=True) if held is wanted]
        assert parts[split] == tokenizer(texts)["input_ids"]
    manifest = json.loads((expected / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents"] == held_out.count(False)
    assert manifest["vocab_size"] == len(tokenizer) <= 120


def test_vocabulary_file_is_berts_tokeniser(tmp_path):
    words = [*prepare.WORDS, "hello", "wor", "##ld", "!", *"abc"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    call(write(tmp_path / "a.txt", ["Hello wORld!"]), "--output", tmp_path / "out",
         "--tokenizer", tmp_path / "vocab.txt")  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer("Hello wÖRld! zzz")["input_ids"] == [2, 5, 6, 7, 8, 1, 3]
    pair = tokenizer("hello", "!")
    assert (pair["input_ids"], pair["token_type_ids"]) == ([2, 5, 3, 8, 3], [0, 0, 0, 1, 1])


def test_goes_on_at_the_first_file_that_is_not_done(tmp_path, monkeypatch):
    files = [write(tmp_path / f"{i}.txt", TEXTS[20 * i : 20 * i + 20]) for i in range(3)]
    arguments = (*files, "--output", tmp_path / "out", "--train-tokenizer", 120)
    call(*arguments)
    whole = tokens(tmp_path / "out", "train")
    shards = sorted((tmp_path / "out").glob("train-*"))
    assert len(shards) == 3
    shards[1].write_bytes(shards[1].read_bytes()[:-4])
    (tmp_path / "out" / "manifest.json").unlink()
    written, write_shards = [], prepare.write_shards
    monkeypatch.setattr(
        prepare,
        "write_shards",
        lambda documents, *rest: written.append(documents.path) or write_shards(documents, *rest),
    )
    call(*arguments)
    assert written == files[1:2]
    assert np.array_equal(tokens(tmp_path / "out", "train"), whole)


def test_c4_is_streamed_file_by_file(expected, tmp_path, monkeypatch):
    """A file is loaded once, even over two calls, and on the disk only while it is read."""
    asked, broken = [], True

    def download(repository, name, repo_type, local_dir):
        asked.append((repository, name, repo_type))
        if broken and len(asked) == 2:
            raise ConnectionError("lost")
        assert not list(local_dir.rglob("*.json.gz"))
        (local_dir / name).parent.mkdir(parents=True)
        return str(write(local_dir / name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    arguments = ("--c4", "7-8", "--output", tmp_path / "out", "--tokenizer", expected / "tokenizer")
    with pytest.raises(SystemExit, match="2"):
        call(*arguments)
    broken = False
    call(*arguments)
    names = [f"en/c4-train.0000{i}-of-01024.json.gz" for i in (7, 8, 8)]
    assert asked == [("allenai/c4", name, "dataset") for name in names]
    assert len(list((tmp_path / "out").glob("train-*.bin"))) == 2
    assert not list((tmp_path / "out").rglob("*.json.gz"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.txt",), "The text absent.txt does not exist"),
        (("{bad}.doc",), "is no .txt, .json, .jsonl"),
        ((), "Give files of text, or --c4"),
        (("--c4", "9-2"), "--c4 takes FIRST-LAST of 0 to 1023, not '9-2'"),
        (("{line}",), r"Line 2 of .*line.jsonl is no JSON object with the field 'text'"),
        (("{good}", "--text-field", "body"), "Line 1 of .* the field 'body'"),
        (("{cut}",), "cannot read the text .*cut.jsonl.gz: "),
        (("{good}", "--eval-share", "2"), r"--eval-share must be in \[0, 1\), not 2.0"),
        (("{good}", "--tokenizer", "absent"), "The tokeniser absent does not exist"),
        (("{good}", "--train-tokenizer", "5"), "--train-tokenizer must be above 5"),
        (("{good}", "--tokenizer", "{words}"), r"vocabulary .*words.txt lacks \[PAD\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(arguments, message, ending, tmp_path):
    good = write(tmp_path / "good.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(write(tmp_path / "whole.jsonl.gz").read_bytes()[:-20])
    shutil.copy(good, tmp_path / "line.jsonl")
    (tmp_path / "line.jsonl").write_text('{"text": "x"}\n{"text"\n')
    (tmp_path / "words.txt").write_text("a\nb\n")
    places = {"good": good, "cut": cut, "bad": tmp_path / "bad", "line": tmp_path / "line.jsonl",
              "words": tmp_path / "words.txt"}  # fmt: skip
    arguments = [argument.format(**places) for argument in arguments]
    if not {"--tokenizer", "--train-tokenizer"} & set(arguments):
        arguments += ["--train-tokenizer", "100"]
    ended = ending(call, *arguments, "--output", tmp_path / "out")
    assert ended.code == 2, ended
    assert re.match(rf"mlm\.prepare: error: .*{message}", ended.err.splitlines()[-1]), ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_evaluation_split_that_comes_out_empty(ending, tmp_path):
    """Is an error where its share was given, and is said where that is the default."""
    text = write(tmp_path / "few.txt", TEXTS[:3])
    arguments = (text, "--train-tokenizer", "100", "--output", tmp_path / "out")
    message = "None of 3 documents is held out: give a larger --eval-share than "
    ended = ending(call, *arguments, "--eval-share", "0.001")
    assert ended.code == 2
    assert f"mlm.prepare: error: {message}0.001.\n" in ended.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    ended = ending(call, *arguments)
    assert ended.code == 0
    assert f"{message}0.01.\n" in ended.out
    assert message not in ending(call, *arguments, "--eval-share", "0").out


@pytest.mark.parametrize("text", ["", " \n\n \n"])
def test_files_without_text(text, ending, tmp_path):
    (tmp_path / "blank.txt").write_text(text)
    arguments = (tmp_path / "blank.txt", "--train-tokenizer", "100", "--output", tmp_path / "out")
    ended = ending(call, *arguments)
    assert ended.code == 2
    assert "There is no document in blank.txt: give files" in ended.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_parquet_without_pyarrow(ending, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    ended = ending(call, tmp_path / "a.parquet", "--output", tmp_path / "out", "--train-tokenizer",
                   100)  # fmt: skip
    assert ended.code == 2
    assert "a.parquet needs pyarrow: pip install pyarrow." in ended.err


@pytest.mark.parametrize("content", ["no parquet", "another column"])
def test_parquet_that_cannot_be_read(content, ending, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_text(content)
    if content == "another column":
        parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    ended = ending(call, path, "--output", tmp_path / "out", "--train-tokenizer", 100)
    assert ended.code == 2
    assert ended.err.startswith(f"mlm.prepare: error: cannot read 'text' of {path}")
