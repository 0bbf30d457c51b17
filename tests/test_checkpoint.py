import argparse
import errno
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count

import numpy as np
import pytest
import torch
from helpers import Malicious
from torch import Tensor, nn

import checkpoint
from errors import UserError


def state(step: int) -> dict:
    # By NumPy, as a fork of a process whose torch has started its threads cannot use them.
    return {"step": step, "model": {"weight": torch.from_numpy(np.full(100_000, step))}}


def is_whole(loaded: dict) -> bool:
    return torch.equal(loaded["model"]["weight"], state(loaded["step"])["model"]["weight"])


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Unpicklable:
    def __reduce__(self):
        raise pickle.PicklingError("this fails in the middle")


@pytest.fixture
def path(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "checkpoint.pth"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of `tmp_path`, with a download cache of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_round_trip_and_previous(path):
    for step in range(3):
        checkpoint.save(state(step), path)
    previous = path.with_name("checkpoint.previous.pth")
    assert checkpoint.load(path)["step"] == 2
    assert checkpoint.load(str(previous))["step"] == 1
    checkpoint.save(state(3), path, keep_previous=False)
    assert checkpoint.load(previous)["step"] == 1
    assert names(path.parent) == [previous.name, path.name]


def test_previous_without_hard_links(path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for step in range(2):
        checkpoint.save(state(step), path)
    assert checkpoint.load(path.with_name("checkpoint.previous.pth"))["step"] == 0


def save_for_ever(path, first: int) -> None:
    for step in count(first):
        checkpoint.save(state(step), path)


@pytest.mark.slow
def test_killed_while_saving(path):
    fork = multiprocessing.get_context("fork")
    delays = random.Random(0)
    step, unfinished = 0, 0
    checkpoint.save(state(step), path)
    for _ in range(40):
        child = fork.Process(target=save_for_ever, args=(path, step + 1))
        child.start()
        time.sleep(delays.uniform(0.02, 0.2))
        child.kill()
        child.join()
        unfinished += any(name.startswith(".") for name in names(path.parent))
        loaded = checkpoint.load(path)
        assert loaded["step"] >= step
        assert is_whole(loaded)
        step = loaded["step"]
        previous = path.with_name("checkpoint.previous.pth")
        assert not previous.exists() or is_whole(checkpoint.load(previous))
    assert step > 40
    assert unfinished > 0, "the kills did not hit a save"
    checkpoint.save(state(step + 1), path)
    assert names(path.parent) == ["checkpoint.previous.pth", "checkpoint.pth"]


def test_a_reader_finds_a_whole_checkpoint_at_every_moment(path):
    """It looks after each call of a C function, as those of the operating system are."""
    previous = path.with_name("checkpoint.previous.pth")
    small = {"model": {"weight": torch.ones(3)}}
    for step in range(2):
        checkpoint.save(small | {"step": step}, path)
    before = {file: file.read_bytes() for file in (path, previous)}
    seen = {path: set(), previous: set()}

    def look(_frame, event, _argument):
        if event in ("c_return", "c_exception"):
            for file, contents in seen.items():
                contents.add(file.read_bytes() if file.exists() else "nothing")

    sys.setprofile(look)
    try:
        checkpoint.save(small | {"step": 2}, path)
    finally:
        sys.setprofile(None)
    assert seen[path] == {before[path], path.read_bytes()}
    assert seen[previous] == {before[previous], before[path]}
    assert previous.read_bytes() == before[path]


def test_a_save_is_on_the_disk_before_it_is_renamed(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    checkpoint.save(state(0), path)
    assert calls == [
        ("fsync", ".checkpoint.pth.saving"),
        ("replace", "checkpoint.pth"),
        ("fsync", "run"),
    ]


def assert_save_fails(new: dict, path, message: str, kind: type = RuntimeError) -> None:
    old = path.read_bytes()
    with pytest.raises(kind, match=f"(?s){re.escape(str(path))}.*{message}"):
        checkpoint.save(new, path)
    assert path.read_bytes() == old
    assert names(path.parent) == [path.name]


def test_exception_while_saving(path):
    checkpoint.save(state(0), path)
    assert_save_fails(state(1) | {"last": Unpicklable()}, path, "fails in the middle")


def test_full_disk(path):
    checkpoint.save(state(0), path)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert_save_fails(state(1), path, "File too large.*Make room", UserError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_failed_rename(path, monkeypatch):
    def refuse(*_):
        raise OSError("no rename here")

    checkpoint.save(state(0), path)
    monkeypatch.setattr(os, "replace", refuse)
    assert_save_fails(state(1), path, "no rename here", UserError)


@pytest.mark.parametrize("value", [np.float64(1.0), argparse.Namespace()])
def test_refuses_to_save_what_could_not_be_loaded(path, value):
    checkpoint.save(state(0), path)
    assert_save_fails(state(1) | {"value": value}, path, "which a safe load refuses")


def test_bad_folder(tmp_path):
    with pytest.raises(UserError, match="absent/checkpoint.pth: .*No such file"):
        checkpoint.save(state(0), tmp_path / "absent/checkpoint.pth")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/checkpoint.pth: .*Not a directory"):
        checkpoint.save(state(0), tmp_path / "file/checkpoint.pth")


@pytest.mark.parametrize("name", ["best_checkpoint.pth", "model/model.safetensors"])
def test_a_result_without_its_checkpoint_is_not_replaced(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds {name} of a run, but no checkpoint.pth"):
        checkpoint.latest(tmp_path)


def test_a_link_to_nothing_is_not_taken_for_the_beginning_of_a_run(tmp_path):
    (tmp_path / "checkpoint.pth").symlink_to("unmounted")
    with pytest.raises(UserError, match="checkpoint.pth: No such file"):
        checkpoint.latest(tmp_path)


def truncate(path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_text(path) -> None:
    path.write_text("not a checkpoint")


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, write_text])
def test_damaged_file(path, damage):
    checkpoint.save(state(0), path)
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: it is truncated, corrupt"):
        checkpoint.load(path)


def test_a_file_that_was_cut_off_anywhere(path):
    checkpoint.save(state(0), path)
    whole = path.read_bytes()
    for size in range(1, len(whole), len(whole) // 60):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="it is truncated, corrupt"):
            checkpoint.load(path)


def test_missing_file(path):
    with pytest.raises(ValueError, match="checkpoint.pth: No such file or directory: check its"):
        checkpoint.load(path)


def test_a_pipe_is_not_waited_for(path):
    os.mkfifo(path)
    with pytest.raises(ValueError, match="checkpoint.pth: it is no file"):
        checkpoint.load(path)


def test_not_a_dict(path):
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds a list, not a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("epoch", "3", "str and no int"), ("epoch", True, "True and no int"),
     ("epoch", -2, "-2 and no int"), ("epoch", None, "NoneType and no int"),
     ("step", 1e30, "1e+30 and no int"), ("optimizer", None, "NoneType and no dict"),
     ("classes", 1000, "1000 and no list"), ("args", ["lr"], "list and no dict"),
     ("max_accuracy", "best", "str and no float"), ("meters", {}, "dict and no list"),
     ("meters", [1.5], "1.5 and no dict"), ("classes", [["ant"]], "list and no str"),
     ("args", {"model_kwargs": "depth"}, "str and no dict")],
)  # fmt: skip
def test_values_of_another_kind(path, name, value, said):
    torch.save({"model": {"weight": torch.ones(2)}, name: value}, path)
    part = r"(\[0\]|\.model_kwargs)?"
    message = rf"damaged checkpoint, whose {name}{part} is {re.escape(said)}"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(path)


def test_values_that_stand_for_nothing(path):
    saved = {"model": {"weight": torch.ones(2)}, "args": None, "scaler": None, "classes": None,
             "epoch": -1, "max_accuracy": 50}  # fmt: skip
    torch.save(saved, path)
    assert checkpoint.load(path).keys() == saved.keys()


def test_latest(path, caplog):
    assert checkpoint.latest(path.parent) is None
    for step in range(2):
        checkpoint.save(state(step), path)
    loaded, source = checkpoint.latest(path.parent)
    assert (loaded["step"], source) == (1, path)
    assert not caplog.records

    truncate(path)
    previous = path.with_name("checkpoint.previous.pth")
    with caplog.at_level(logging.WARNING):
        loaded, source = checkpoint.latest(path.parent)
    assert (loaded["step"], source) == (0, previous)
    assert str(path) in caplog.text
    assert f"falling back to the checkpoint before it, {previous}" in caplog.text

    truncate(previous)
    with pytest.raises(ValueError, match="(?s)no checkpoint in .*checkpoint.pth.*previous.pth"):
        checkpoint.latest(path.parent)


@pytest.mark.parametrize(
    ("problem", "told"),
    [(PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
     (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
     (MemoryError(), "Cannot allocate memory")],
)  # fmt: skip
def test_a_checkpoint_that_may_be_whole_is_not_passed_over(problem, told, path, monkeypatch):
    for step in range(2):
        checkpoint.save(state(step), path)

    def read(file):
        if file == path:
            raise problem
        return torch.load(file)

    monkeypatch.setattr(checkpoint, "_read", read)
    with pytest.raises(UserError, match=rf"checkpoint.pth: {told}: give the rights or means"):
        checkpoint.latest(path.parent)


def save_as_pickle(value: object, path) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [torch.save, save_as_pickle])
@pytest.mark.parametrize("by_url", [False, True])
def test_malicious_file_runs_nothing(path, server, write, by_url, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof = path.with_name("proof")
    write({"model": {}, "args": Malicious(proof)}, path)
    with pytest.raises(ValueError, match="checkpoint.pth: .* because they could run code"):
        checkpoint.load(f"{server}/run/checkpoint.pth" if by_url else path)
    assert not proof.exists()


def test_urls_of_the_same_name_are_kept_apart(path, server):
    for step, folder in enumerate(("run", "other")):
        path.parent.with_name(folder).mkdir(exist_ok=True)
        checkpoint.save(state(step), path.parent.with_name(folder) / path.name)
    assert checkpoint.load(f"{server}/run/checkpoint.pth")["step"] == 0
    assert checkpoint.load(f"{server}/other/checkpoint.pth")["step"] == 1


@pytest.mark.parametrize("name", ["absent.pth", "teacher-01234567.pth"])
def test_bad_url(path, server, name):
    checkpoint.save(state(0), path.with_name("teacher-01234567.pth"))
    with pytest.raises(ValueError, match=f"cannot download .*{name}: .*(404|hash)"):
        checkpoint.load(f"{server}/run/{name}")


def test_old_deit_file(path):
    args = argparse.Namespace(model="deit_tiny_patch16_224", lr=5e-4, opt_betas=None)
    torch.save({"model": {"weight": torch.ones(2)}, "args": args}, path)
    assert checkpoint.load(path)["args"] == vars(args)


def test_load_weights():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = {f"module._orig_mod.{name}": value for name, value in other.state_dict().items()}
    checkpoint.load_weights(model, wrapped, "run.pth")
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_load_weights_lists_the_differences():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = {
        "0.weight": torch.ones(2, 3),
        "0.bias": torch.ones(4),
        "1.weight": torch.ones(2, 2),
        "2.bias": torch.ones(5),
    }
    with pytest.raises(ValueError, match="^run.pth is of another model: ") as raised:
        checkpoint.load_weights(model, wrong, "run.pth")
    summary, *lines = str(raised.value).splitlines()
    assert summary.startswith(
        "run.pth is of another model: 1 weights missing, 1 unexpected, 1 of another shape"
    )
    assert lines == [
        "missing in the file: 1.bias [2]",
        "not in the model: 2.bias [5]",
        "shape of 0.bias: file [4], model [2]",
    ]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [(Tensor.long, "torch.int64 where the model has real numbers"),
     (Tensor.bool, "torch.bool where"), (lambda w: w + 0j, "torch.complex64 where"),
     (Tensor.to_sparse, "torch.float32 without plain values (cpu, torch.sparse_coo)"),
     (lambda w: w.to("meta"), "torch.float32 without plain values (meta, torch.strided)")],
    ids=["int", "bool", "complex", "sparse", "meta"],
)  # fmt: skip
def test_weights_that_are_no_plain_real_numbers(change, said):
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    state = {"weight": change(torch.ones(2, 3)), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match=re.escape(f"run.pth holds {said}")):
        checkpoint.load_weights(model, state, "run.pth")
    assert model.weight.equal(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision(dtype):
    model, state = nn.Linear(3, 2), {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    checkpoint.load_weights(model, {n: v.to(dtype) for n, v in state.items()}, "run.pth")
    assert model.weight.equal(state["weight"])
    assert model.weight.dtype == torch.float32


def test_load_weights_cuts_a_long_list():
    extra = {f"blocks.{i}.attn.a_i": torch.ones(3) for i in range(32)}
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="^run.pth is of another model: ") as raised:
        checkpoint.load_weights(model, model.state_dict() | extra, "run.pth")
    lines = str(raised.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "... and 12 more"


def test_weights_of():
    plain, ema = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    ours = {"model": plain, "model_ema": ema, "epoch": 3}
    timms = {"state_dict": plain, "state_dict_ema": ema, "arch": "vit"}
    for saved in (ours, timms):
        assert checkpoint.weights_of(saved, source="run.pth") is plain
        assert checkpoint.weights_of(saved, ema=True, source="run.pth") is ema
    assert checkpoint.weights_of(plain, source="run.pth") is plain
    for saved in (plain, {"model": plain, "model_ema": None}):
        with pytest.raises(ValueError, match="run.pth holds no EMA weights"):
            checkpoint.weights_of(saved, ema=True, source="run.pth")
    for saved in ({}, {"epoch": 3}, {"model": {"w": 3}}, {"model": {1: torch.ones(1)}}):
        with pytest.raises(ValueError, match="run.pth holds no model weights"):
            checkpoint.weights_of(saved, source="run.pth")


def test_difference():
    saved = {"mask_type": "Decay", "order": "S", "lr": 1e-3, "old": 1}
    now = {"mask_type": "Selective", "order": "S", "lr": 5e-4, "new": 1}
    assert checkpoint.difference(saved, now, ["mask_type", "order", "old", "new"]) == [
        "mask_type: checkpoint Decay, now Selective"
    ]
