"""Text that is never misread: tokenisers, vocabularies, what is no text, and text that changed."""

import gzip
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from helpers import ROOT, older
from pyarrow import parquet
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import checkpoint
from mlm import prepare, pretrain
from mlm.shards import Corpus, load_tokenizer
from mlm.vocabulary import WORDS, wordpiece

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
TEXTS = [f"document {'abcdefghij'[i % 10] * 5} of the text {'klm'[i // 10]}" for i in range(30)]


def call(*arguments: object) -> None:
    prepare.main([str(argument) for argument in arguments])


def refused(ended, message: str) -> None:
    assert ended.code == 2, ended
    assert re.match(rf"mlm\.prepare: error: .*{message}", ended.err.splitlines()[-1]), ended.err
    assert "Traceback" not in ended.err


def vocabulary(path: Path, *words: str) -> Path:
    path.write_bytes("\n".join([*WORDS, *words]).encode() + b"\n")
    return path


def write(path: Path, documents: list, field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in documents))
    return path


def documents(folder: Path, split: str = "train") -> list[list[int]]:
    """Tokens of each document, by the ends that must be there."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokens = np.concatenate(Corpus(folder, split, 2).shards)
    assert tokens[0] == tokenizer.cls_token_id
    assert tokens[-1] == tokenizer.sep_token_id
    ends = np.flatnonzero(tokens == tokenizer.sep_token_id) + 1
    return [part.tolist() for part in np.split(tokens, ends)[:-1]]


@pytest.fixture
def letters(tmp_path) -> Path:
    return vocabulary(tmp_path / "vocab.txt", *LETTERS)


# ------------------------------------------------------------------------------------- tokenisers


def saved_tokenizer(folder: Path, kind: str) -> Path:
    """A tokeniser as others save it, in a way that must not change what is written."""
    names = {"bert": WORDS, "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>")}
    words = names["roberta" if kind == "roberta" else "bert"]
    backend = wordpiece({word: i for i, word in enumerate([*words, *LETTERS])})
    backend.model.unk_token = words[1]
    cls, sep = words[2:4]
    if kind != "no ends":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}",
            special_tokens=[(cls, 2), (sep, 3)],
        )  # fmt: skip
    if kind == "truncates":
        backend.enable_truncation(6)
    if kind == "pads":
        backend.enable_padding(length=100)
    if kind in ("bare", "roberta"):  # tokenizer.json alone
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        return folder
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), words,
                     strict=True))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "truncates", "pads", "no ends", "bare", "roberta"])
def test_every_tokeniser_gives_whole_documents(kind, letters, tmp_path):
    text = write(tmp_path / "a.jsonl", TEXTS)
    call(text, "--output", tmp_path / "expected", "--tokenizer", letters)
    call(text, "--output", tmp_path / "out", "--tokenizer", saved_tokenizer(tmp_path / "t", kind))
    assert documents(tmp_path / "out") == documents(tmp_path / "expected")
    assert len(documents(tmp_path / "out")) == 30 - sum(prepare.held_out(t, 0.01) for t in TEXTS)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer")
    ids = tokenizer("abcdefghij" * 3)["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (32, 2, 3)
    assert tokenizer("a", "b")["input_ids"] == [2, 5, 3, 6, 3]


def test_names_of_special_tokens_in_a_text_are_text(letters, tmp_path):
    text = write(tmp_path / "a.jsonl", ["a [SEP] b [CLS] c [MASK]"])
    call(text, "--output", tmp_path / "out", "--tokenizer", letters, "--eval-share", 0)
    (ids,) = documents(tmp_path / "out")
    assert {2, 3, 4} & set(ids[1:-1]) == set()


@pytest.mark.parametrize("word", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_vocabularies_are_read_by_line_feeds_alone(word, tmp_path):
    path = vocabulary(tmp_path / "vocab.txt", word, "a", "b")
    text = write(tmp_path / "a.jsonl", ["a b"])
    call(text, "--output", tmp_path / "out", "--tokenizer", path, "--eval-share", 0)
    assert documents(tmp_path / "out") == [[2, 6, 7, 3]]
    assert len(load_tokenizer(tmp_path / "out" / "tokenizer")) == 8


def test_vocabularies_may_have_the_line_ends_of_other_systems(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*WORDS, "a", "é"]).encode("utf-8-sig"))
    text = write(tmp_path / "a.jsonl", ["a"])
    call(text, "--output", tmp_path / "out", "--tokenizer", path, "--eval-share", 0)
    assert documents(tmp_path / "out") == [[2, 5, 3]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "a"], "has the word 'a' 2 times: take out"),
        (["the", "The", "##S"], r"is cased \(##S, The, ...\), but text is lowercased: give --ca"),
    ],
    ids=["twice", "cased"],
)
def test_vocabularies_that_misread(words, message, ending, tmp_path):
    path = vocabulary(tmp_path / "vocab.txt", *words)
    arguments = (write(tmp_path / "a.jsonl", ["a"]), "--output", tmp_path / "out", "--tokenizer")
    refused(ending(call, *arguments, path), message)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tokeniser(ending, tmp_path):
    arguments = (write(tmp_path / "a.jsonl", ["a"]), "--output", tmp_path / "out", "--tokenizer")
    (tmp_path / "tokenizer.json").write_text("[]")
    refused(ending(call, *arguments, tmp_path), f"cannot load the tokeniser in {tmp_path}: ")
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    refused(ending(call, *arguments, tmp_path / "vocab.txt"), "cannot read the vocabulary .*txt: ")


def test_cased_vocabularies_keep_capitals(tmp_path, ending):
    path = vocabulary(tmp_path / "vocab.txt", "the", "The")
    arguments = (write(tmp_path / "a.jsonl", ["The the"]), "--output", tmp_path / "out")
    call(*arguments, "--tokenizer", path, "--cased", "--eval-share", 0)
    assert documents(tmp_path / "out") == [[2, 6, 5, 3]]
    other = ending(call, *arguments, "--tokenizer", tmp_path / "out" / "tokenizer", "--cased")
    refused(other, "--cased is for vocab.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: words.update(zebra=1000), "gives 'zebra' the id 1000, beyond its vocabul"),
        pytest.param(
            lambda words: words.update(zebra=7),
            "gives the id 7 to two words, '.' and 'zebra'",
            marks=pytest.mark.skipif(older("transformers", "5.21"), reason="it hides one of them"),
        ),
        (lambda words: words.pop("[MASK]"), "has no mask_token: name them in tokenizer_config"),
    ],
    ids=["beyond", "two", "mask"],
)
def test_tokenisers_with_wrong_ids(change, message, ending, tmp_path):
    folder = saved_tokenizer(tmp_path / "t", "bare")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    text = write(tmp_path / "a.jsonl", ["a"])
    refused(ending(call, text, "--output", tmp_path / "out", "--tokenizer", folder), message)


# ---------------------------------------------------------------------------------------- no text


DEEP = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
NO_TEXT = {
    "surrogate": (r'{"text": "a \ud800 b"}', r"holds the code '\ud800', which is no character"),
    "null": ('{"text": null}', "holds null, which is no text"),
    "number": ('{"text": 5}', "holds 5, which is no text"),
    "list": ('{"text": ["a"]}', 'holds ["a"], which is no text'),
    "deep": (DEEP, "is no JSON object with the field 'text'"),
    "field": ('{"body": "a"}', "is no JSON object with the field 'text'"),
    "cut": ('{"text": "a', "is no JSON object with the field 'text'"),
    "no object": ('"text"', "is no JSON object with the field 'text'"),
    "bytes": (b'{"text": "\xff"}', r"holds the code '\udcff', which is no character"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_left_out_and_told(kind, packed, letters, ending, tmp_path):
    content, reason = NO_TEXT[kind]
    content = content if isinstance(content, bytes) else content.encode()
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    data = b"\n".join([*lines[:2], content, b"", *lines[2:]])
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    arguments = (path, "--output", tmp_path / "out", "--tokenizer", letters, "--eval-share", 0)
    ended = ending(call, *arguments)
    assert ended.code == 0, ended.err
    assert f"Skipped: Line 3 of {path} {reason}.\n" in ended.out
    assert "skipped: 1 documents that are no text\n" in ended.out
    assert len(documents(tmp_path / "out")) == len(TEXTS)
    ended = ending(call, *arguments[:2], tmp_path / "strict", *arguments[3:], "--max-skipped", 0.03)
    refused(ended, rf"Line 3 of {re.escape(f'{path} {reason}')}, and in all 1 of 31 documents are")
    assert not list((tmp_path / "strict").glob(".*")) + list((tmp_path / "strict").glob("*.bin"))


def test_paragraphs_and_rows_that_are_no_text(letters, ending, tmp_path):
    good = [text.encode() for text in TEXTS]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join([*good, b"bytes \xff\xfe", b"a\xe2\x80\xa8b"]))
    parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), tmp_path / "b.parquet")
    ended = ending(call, tmp_path / "a.txt", tmp_path / "b.parquet", "--output", tmp_path / "out",
                   "--tokenizer", letters, "--eval-share", 0)  # fmt: skip
    assert ended.code == 0, ended.err
    assert f"Skipped: Line 61 of {tmp_path / 'a.txt'} holds the code" in ended.out
    assert f"Skipped: Row 31 of {tmp_path / 'b.parquet'} holds null" in ended.out
    assert len(documents(tmp_path / "out")) == 2 * len(TEXTS) + 1


def test_many_are_counted_and_few_are_told(letters, ending, tmp_path):
    path = write(tmp_path / "a.jsonl", [*TEXTS, *[None] * 20])
    ended = ending(call, path, "--output", tmp_path / "out", "--tokenizer", letters,
                   "--max-skipped", 0.5)  # fmt: skip
    assert ended.code == 0
    assert ended.out.count("Skipped: Line") == 5
    assert f"Skipped 20 documents of {path} in all" in ended.out


# --------------------------------------------------------------------------------- what is changed


def test_text_edited_to_the_same_size_is_read_again(letters, tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    arguments = (path, "--output", tmp_path / "out", "--tokenizer", letters, "--eval-share", 0)
    call(*arguments)
    before = documents(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    size = path.stat().st_size
    path.write_text(path.read_text().replace("aaaaa", "zzzzz"))
    assert path.stat().st_size == size
    call(*arguments)
    after = documents(tmp_path / "out")
    assert len(after) == len(before)
    assert after != before
    changed = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert changed["digest"] != manifest["digest"]
    assert changed["tokenizer"] == manifest["tokenizer"]


@pytest.mark.parametrize("change", ["size", "text", "case"])
def test_a_tokeniser_of_other_text_or_size_is_made_again(change, tmp_path):
    path = write(tmp_path / "a.jsonl", [text.title() for text in TEXTS])
    output = ("--output", tmp_path / "out", "--train-tokenizer")
    call(path, *output, 60)
    first = load_tokenizer(tmp_path / "out" / "tokenizer").get_vocab()
    stamp = (tmp_path / "out" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    call(path, *output, 60)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == stamp
    if change == "text":
        path.write_text(path.read_text().replace("Text", "Xylo"))
    call(path, *output, 90 if change == "size" else 60, *(["--cased"] if change == "case" else []))
    second = load_tokenizer(tmp_path / "out" / "tokenizer").get_vocab()
    expected = {"size": len(second) > len(first), "text": "##x" in second or "x" in second,
                "case": any(word[0].isupper() for word in second)}  # fmt: skip
    assert expected[change]
    assert set(second) != set(first)
    assert documents(tmp_path / "out")


def test_a_run_does_not_go_on_with_other_text(letters, ending, tmp_path):
    path, runs = tmp_path / "a.jsonl", tmp_path / "run"
    arguments = (path, "--output", tmp_path / "data", "--tokenizer", letters, "--eval-share", 0.3)
    settings = [f"data={tmp_path / 'data'}", f"output={runs}", "steps=2", "length=8",
                "micro_batch=2", "global_batch=2", "workers=0", "device=cpu"]  # fmt: skip
    command = [str(ROOT / "mlm" / "configs" / "tiny.yaml"), *settings]
    write(path, TEXTS)
    call(*arguments)
    assert ending(pretrain.main, command).code == 0
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    swapped = path.read_text().translate(str.maketrans("ab", "ba"))
    path.write_text(swapped)
    call(*arguments)
    ended = ending(pretrain.main, [*command, "resume=auto"])
    assert ended.code == 2
    assert "is of other text or another tokeniser than those in" in ended.err
    assert {file: file.read_bytes() for file in before} == before
    assert len(checkpoint.load(runs / "checkpoint.pth")["data"]) == 64
    path.write_text(swapped.translate(str.maketrans("ab", "ba")))
    call(*arguments)
    assert ending(pretrain.main, [*command, "resume=auto"]).code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["splits"]["train"]["shards"].append("../x.bin"),
            "names '../x.bin', which is outside of its folder",
        ),
        (
            lambda m: m["splits"].update(test={"shards": ["../x.bin"]}),
            "names '../x.bin', which is outside of its folder",
        ),
        (lambda m: m.pop("splits"), "cannot read .*manifest.json: KeyError 'splits'; make the f"),
        (lambda m: m["splits"].pop("eval"), "cannot read .*manifest.json: KeyError 'eval'; make"),
        (lambda m: m["splits"]["train"]["shards"].append(3), "TypeError a shard is called 3; make"),
        (lambda m: m["splits"].update(train=[]), "cannot read .*manifest.json: TypeError .*; make"),
    ],
    ids=["outside", "outside in another split", "unfinished", "one split", "number", "list"],
)
def test_manifests_that_are_wrong(change, message, letters, tmp_path):
    call(write(tmp_path / "a.jsonl", TEXTS), "--output", tmp_path, "--tokenizer", letters)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        Corpus(tmp_path, "train", 4)


# -------------------------------------------------------------------------------- what is left over


def test_nothing_in_the_making_stays_behind(letters, ending, tmp_path):
    """After an error in the middle of a file, and of a call that was killed."""
    good, cut = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "b.jsonl.gz"
    cut.write_bytes(gzip.compress(write(tmp_path / "b", TEXTS * 200).read_bytes())[:-20])
    out = tmp_path / "out"
    arguments = (good, cut, "--output", out, "--tokenizer", letters)
    refused(ending(call, *arguments), "cannot read the text .*b.jsonl.gz")
    assert [path for path in out.rglob("*") if ".saving" in path.name] == []
    (out / ".train-00000-12345678.bin.saving").touch()
    call(good, *arguments[2:])
    assert [path for path in out.rglob("*") if ".saving" in path.name] == []


def test_a_download_that_cannot_be_read_is_not_kept(letters, ending, tmp_path, monkeypatch):
    def download(_repository, name, repo_type, local_dir):
        (local_dir / name).parent.mkdir(parents=True)
        (local_dir / name).write_bytes(b"<html>")
        return str(local_dir / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ended = ending(call, "--c4", "0", "--output", tmp_path / "out", "--tokenizer", letters)
    refused(ended, "cannot read the text .*: Not a gzipped file")
    assert not (tmp_path / "out" / ".download").exists()


def test_an_output_that_cannot_be_written(letters, ending, tmp_path):
    path = write(tmp_path / "a.jsonl", TEXTS)
    refused(ending(call, path, "--output", path, "--tokenizer", letters), "--output .* is a file")
