"""Files of others: links in the place of ours, names that lead elsewhere, folders in a loop."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import checkpoint
from datasets import build_dataset
from errors import UserError
from files import inside, new_folder, replacing, require_place
from journal import Journal, require_writable, write_scores
from mlm.shards import Corpus, shard_writer
from processes import World

# Links in the place of temporary files


def save_checkpoint(folder: Path) -> None:
    checkpoint.save({"model": {"weight": torch.ones(2)}}, folder / "checkpoint.pth")


def write_shard(folder: Path) -> None:
    with shard_writer(folder / "train-0.bin", 64 * "0", 100) as add:
        add([1, 2])


def trim_log(folder: Path) -> None:
    (folder / "log.txt").write_text('{"epoch": 0}\n')
    Journal(folder, {}, 1)


WRITERS = {
    "checkpoint.pth.saving": save_checkpoint,
    "checkpoint.pth.replaced": save_checkpoint,
    "eval.json.saving": lambda folder: write_scores(folder, {}, ["a"], [[1, 1]]),
    "per_class.csv.saving": lambda folder: write_scores(folder, {}, ["a"], [[1, 1]]),
    "args.yaml.saving": lambda folder: Journal(folder, {}, 0),
    "log.txt.saving": trim_log,
    "train-0.bin.saving": write_shard,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(name, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("mine")
    (folder / f".{name}").symlink_to(victim)
    WRITERS[name](folder)
    assert victim.read_text() == "mine"
    assert not any(path.is_symlink() or path.name.startswith(".") for path in folder.iterdir())


def test_a_link_made_meanwhile_is_an_error(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    unlink = Path.unlink

    def unlink_and_lose_the_race(path, **options):
        unlink(path, **options)
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", unlink_and_lose_the_race)
    with pytest.raises(UserError, match="File exists"), replacing(tmp_path / "file") as file:
        file.write("ours")
    assert victim.read_text() == "mine"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as file:
            file.write("new")
            raise RuntimeError("no space is left")

    with pytest.raises(RuntimeError, match="no space is left"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_the_last_record_of_a_log_needs_no_line_feed(tmp_path):
    log = tmp_path / "log.txt"
    kept = 'a note\u2028of mine\n{"epoch": 0}'
    log.write_text(kept)
    Journal(tmp_path, {}, 1)
    assert log.read_text() == f"{kept}\n"


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    journal = Journal(tmp_path, {}, 0)
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*log.txt: .*No space left on device"):
        journal.write({"epoch": 0})


def test_a_full_disk_is_noticed_before_any_work(tmp_path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written to .File too large"):
            require_writable(tmp_path, World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Lists that name files elsewhere

OUTSIDE = ("/etc/hostname", "../secret.jpg", "a/../../secret.jpg", "..")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_their_folder(name):
    with pytest.raises(ValueError, match="list.json names '.*', which is outside of its folder"):
        inside("folder", name, "list.json")


@pytest.mark.parametrize("name", ["a.jpg", "a/b..jpg", "..a/b.jpg"])
def test_names_in_their_folder(name):
    assert inside("folder", name, "list.json") == f"folder/{name}"


@pytest.mark.parametrize("name", OUTSIDE)
def test_inaturalist_reads_nothing_outside_of_its_folder(name, tmp_path):
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 1, "name": "wolf"}]))
    listing = {
        "images": [{"id": 1, "file_name": name}],
        "annotations": [{"image_id": 1, "category_id": 1}],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match="train2018.json names .* outside of its folder"):
        build_dataset("INAT18", tmp_path, train=True)


def test_nested_json_without_end_is_an_error(tmp_path):
    (tmp_path / "categories.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="categories.json is missing or no json file"):
        build_dataset("INAT18", tmp_path, train=True)


def edited(corpus: Path, folder: Path, text: str) -> Path:
    shutil.copytree(corpus, folder)
    (folder / "manifest.json").write_text(text)
    return folder


def test_a_manifest_names_no_shards_outside_of_its_folder(corpus, tmp_path):
    """The shard that is named is whole, and of this tokeniser."""
    (shard,) = corpus.glob("train-*.bin")
    for number, name in enumerate((str(shard), f"../{shard.name}")):
        shutil.copy(shard, tmp_path)
        text = json.dumps({"splits": {"train": {"shards": [name]}, "eval": {"shards": []}}})
        folder = edited(corpus, tmp_path / f"edited{number}", text)
        with pytest.raises(ValueError, match="manifest.json names .* outside of its folder"):
            Corpus(folder, "train", 16)


@pytest.mark.parametrize("text", ["{}", "[]", '{"splits": {"train": 1}}', "{", "[" * 100_000])
def test_a_manifest_of_another_form_is_an_error(text, corpus, tmp_path):
    folder = edited(corpus, tmp_path / "edited", text)
    with pytest.raises(ValueError, match="cannot read .*manifest.json: .* make the folder with"):
        Corpus(folder, "train", 16)


# Folders in a loop


@pytest.fixture
def images(tmp_path) -> Path:
    for name in ("ant/1.png", "ant/deep/2.png", "bee/3.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path


def samples(root: Path) -> list[tuple[str, int]]:
    dataset, _ = build_dataset("IMNET", root, train=True)
    found = map(dataset.sample, range(len(dataset)))
    return [(str(Path(path).relative_to(root / "train")), label) for path, label in found]


@pytest.mark.parametrize("target", ["ant", "ant/deep", ".", "..", "bee/../ant"])
@pytest.mark.parametrize("link", ["ant/loop", "ant/deep/loop"])
def test_a_link_loop_adds_no_images(target, link, images):
    before = samples(images)
    assert before == [("ant/1.png", 0), ("ant/deep/2.png", 0), ("bee/3.png", 1)]
    (images / "train" / link).symlink_to((images / "train" / target).resolve())
    found = samples(images)
    assert [(Path(path).name, label) for path, label in found] == [
        (Path(path).name, label) for path, label in before
    ]


def test_links_to_other_folders_are_followed(images):
    elsewhere = images / "elsewhere"
    (images / "train" / "bee").rename(elsewhere)
    (elsewhere / "loop").symlink_to(elsewhere)
    (images / "train" / "bee").symlink_to(elsewhere)
    assert samples(images)[-1] == ("bee/3.png", 1)
    assert len(samples(images)) == 3


def test_a_class_folder_that_is_a_loop_is_an_error(images):
    (images / "train" / "loop").symlink_to(images / "train")
    with pytest.raises(ValueError, match="train/loop has no images .1 links to folders already"):
        samples(images)


MAKE = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "link to nothing": lambda path: path.symlink_to("absent/file"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", ["checkpoint.pth", ".checkpoint.pth.saving", "log.txt",
                                  "args.yaml", "results.md", "leases.jsonl"])  # fmt: skip
def test_what_is_no_file_is_not_written_over(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"holds {name}, which is no file: move it elsewhere"):
        require_writable(tmp_path, World())


@pytest.mark.parametrize("make", [Path.touch, *(MAKE[name] for name in MAKE if name != "folder")])
def test_what_is_no_folder_is_not_filled(make, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(ValueError, match="holds model, which is no folder: move it elsewhere"):
        require_writable(tmp_path, World())


def test_folders_whose_names_are_no_files_of_a_run(tmp_path):
    for name in ("model", ".model.saving", "images", "fine_tuned", "seed0,lr=1e-3"):
        (tmp_path / name).mkdir()
    require_writable(tmp_path, World())


@pytest.mark.parametrize("target", ["folder", "file"])
def test_a_link_in_the_place_of_a_new_folder_is_not_followed(target, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir() if target == "folder" else victim.touch()
    (tmp_path / ".model.saving").symlink_to(victim)
    with new_folder(tmp_path / "model") as new:
        (new / "ours").touch()
        assert victim.is_file() or not list(victim.iterdir())
        new.rename(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "victim"}


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    def fill() -> None:
        with new_folder(tmp_path / "model") as new:
            (new / "ours").touch()
            raise SafetensorError("I/O error: File too large (os error 27)")

    with pytest.raises(UserError, match="cannot write .*model: I/O error: File too large"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_would_break_a_line_is_told_in_one(tmp_path):
    message = r"^output '.*/a\\nb' is no plain UTF-8 in one line: choose another name.$"
    with pytest.raises(ValueError, match=message):
        require_writable(tmp_path / "a\nb", World(), "output")


@pytest.mark.parametrize(
    ("output", "message"),
    [("file/below", "There is no folder for --output .*below: make it first"),
     (".", "is a folder: name a file"),
     ("absent/file", "There is no folder for --output .*: make it first"),
     ("/proc/file", "--output /proc/file cannot be written .No such file")],
)  # fmt: skip
def test_places_that_cannot_be_written(output, message, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        require_place(tmp_path / output)
    require_place(tmp_path / "file")
