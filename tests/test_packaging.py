"""The installed package loads saved models anywhere, and stands in no other package's way."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from transformers import AutoModelForMaskedLM

from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from scripts.lowest import lowest

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 16}  # fmt: skip
LOAD = """
import os, sys, torch
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification
folder, again = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
print(sys.modules["models_lion"].__file__, sys.modules["mlm.modeling"].__file__)
other = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True)
assert type(other).__name__ == "LionBertForTokenClassification"
model.save_pretrained(again)
assert set(os.listdir(again)) == set(os.listdir(folder))  # no copy of the classes' files
model = AutoModelForMaskedLM.from_pretrained(again, trust_remote_code=True).eval()
import mlm.modeling
assert type(AutoModelForMaskedLM.from_pretrained(again, trust_remote_code=True)) is type(model)
assert type(AutoModelForMaskedLM.from_pretrained(again)) is mlm.modeling.LionBertForMaskedLM
torch.save(model(torch.arange(20)[None]).logits, again + "/logits.pth")
"""
TRAIN = """
import os, sys, torch
from accelerate.data_loader import prepare_data_loader
from transformers import Trainer, TrainingArguments
import mlm.glue, mlm.prepare, mlm.pretrain
from mlm.modeling import LionBertConfig, LionBertForSequenceClassification

class Rows(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return {"input_ids": torch.arange(6) + index, "labels": index % 2}

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([Rows()[i] for i in range(4)])

model = LionBertForSequenceClassification(LionBertConfig(**eval(sys.argv[1])))
arguments = TrainingArguments(output_dir=sys.argv[2], max_steps=1, report_to=[], use_cpu=True,
                              save_strategy="no")
for rows in (Rows(), Stream()):
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.train().global_step == 1 and trainer.evaluate()["eval_loss"] > 0
for rows in (Rows(), Stream()):  # as one of two processes has them
    loader = torch.utils.data.DataLoader(rows, batch_size=1)
    assert len(list(prepare_data_loader(loader, num_processes=2, process_index=0))) == 2
print("datasets", sys.modules["datasets"].__file__)
"""


def run(code: str, *arguments: object, cwd: Path, path: list[Path], **variables: str):
    """Python in a folder, with these folders on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)),
                   "HF_MODULES_CACHE": str(cwd / "cache") if cwd != ROOT else "",
                   "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}  # fmt: skip
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def install(*arguments: object) -> None:
    """`pip install` without dependencies and network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", *map(str, arguments)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "source"
    left = shutil.ignore_patterns(".*", "__pycache__", "build", "outputs", "*.egg-info", "tests")
    return shutil.copytree(ROOT, folder, ignore=left, symlinks=True)


@pytest.fixture(scope="module")
def site(source, tmp_path_factory) -> Path:
    """Where `pip install .` puts the package."""
    folder = tmp_path_factory.mktemp("install") / "site"
    install("--target", folder, source)
    return folder


def requirements(*names: str) -> list[Requirement]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    stripped = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(line) for line in stripped if line]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    LionBertForMaskedLM(LionBertConfig(**SMALL)).save_pretrained(folder)
    return folder


def test_the_models_alone_are_installed(site):
    names = {path.name.partition(".")[0] for path in site.iterdir() if path.suffix != ".dist-info"}
    models = {path.stem for path in ROOT.glob("models_*.py")} - {"models_timm"}  # main.py's
    others = {"curves", "decays", "lion_kernels", "mlm", "state_space"}
    assert names - {"__pycache__"} == models | others
    parts = {path.stem for path in (site / "mlm").glob("*.py")}
    assert parts == {"__init__", "card", "encoder", "fields", "mixers", "modeling"}


def test_an_editable_install_shows_the_same_modules(source, tmp_path):
    install("--prefix", tmp_path, "--editable", source)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    code = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
names = ("models_lion", "mlm.modeling", "lion_kernels", "datasets", "utils", "errors", "main")
print(*[name for name in names if importlib.util.find_spec(name)])
"""
    done = run(code, site, cwd=tmp_path, path=[])
    assert done.stdout.split() == ["models_lion", "mlm.modeling", "lion_kernels"], done.stderr


def test_the_extras_are_the_requirements(site):
    (facts,) = site.glob("*.dist-info/METADATA")
    needed = re.findall("^Requires-Dist: (.*)$", facts.read_text(), re.M)
    found = {"": set(), "mlm": set(), "dev": set()}
    for line in needed:
        text, _, extra = line.partition("; extra == ")
        found[extra.strip("\"'")].add(str(Requirement(text)))
    both = ("requirements.txt", "mlm/requirements.txt")
    assert found["mlm"] == {str(each) for each in requirements("mlm/requirements.txt")}
    assert found["dev"] == {str(each) for each in requirements(*both)}
    assert found[""] < found["dev"], "the models need what training needs, and no other version"


def test_the_lowest_versions():
    lines = ["torch>=2.11", "transformers>=5.17,<6", "", "# tools", "ruff~=0.17.6  # note"]
    assert lowest(lines) == ["torch==2.11", "transformers==5.17", "ruff==0.17.6"]
    for name in ("requirements.txt", "mlm/requirements.txt"):
        pinned = lowest((ROOT / name).read_text().splitlines())
        assert len(pinned) == len(requirements(name)), "each has a lower bound"


def test_the_workflow_runs_the_tests_on_every_python():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert matrix["include"] == [{"python": "3.11", "versions": "lowest"}]
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.slow
def test_a_saved_model_is_loaded_with_the_package_alone(site, saved, tmp_path):
    done = run(LOAD, saved, tmp_path / "again", cwd=tmp_path, path=[site])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{site}/models_lion.py", f"{site}/mlm/modeling.py"]
    expected = AutoModelForMaskedLM.from_pretrained(saved).eval()(torch.arange(20)[None]).logits
    assert torch.load(tmp_path / "again" / "logits.pth").equal(expected)


@pytest.mark.slow
def test_without_the_package_it_is_told_how_to_get_it(saved, tmp_path):
    done = run(LOAD, saved, tmp_path / "again", cwd=tmp_path, path=[])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: This model needs LION: run `pip install .` in LION's rep")
    card = (saved / "README.md").read_text()
    assert "pip install ." in card
    assert "AutoModelForMaskedLM.from_pretrained" in card
    assert "trust_remote_code=True" in card


def test_a_card_that_was_written_by_hand_stays(saved, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    LionBertForMaskedLM(LionBertConfig(**SMALL)).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["repository", "package"])
def test_the_package_datasets_and_the_module_stand_each_other(first, tmp_path):
    """All commands and the Trainer work with Hugging Face's package before or behind ours."""
    package = tmp_path / "site"
    (package / "datasets").mkdir(parents=True)
    names = "class Dataset: pass\nclass IterableDataset: pass\n"
    (package / "datasets" / "__init__.py").write_text(names)
    facts = package / "datasets-5.0.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 5.0.0\n")
    path = [ROOT, package] if first == "repository" else [package, ROOT]
    done = run(TRAIN, SMALL, tmp_path / "out", cwd=ROOT, path=path, PYTHONSAFEPATH="1",
               HF_MODULES_CACHE=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = package / "datasets" / "__init__.py" if first == "package" else ROOT / "datasets.py"
    assert f"datasets {found}" in done.stdout
