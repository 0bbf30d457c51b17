import gc
import logging
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels run on the CPU
    if find_spec("triton"):
        import faster_interpreter

        faster_interpreter.install()

from helpers import IMPORTED, TINY, VARIANT, call_main, make_image_folder, processes, write_image

from mlm import prepare
from processes import STOP_SIGNALS

gc.disable()  # while test modules are imported


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes takes more than seconds: -m 'not slow' leaves it out, too."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """There is one fork server, and modules that tests import choose what it imports, too.

    Modules stay, too: the garbage collector need not look through half a million objects each time.
    """
    processes.set_forkserver_preload(IMPORTED)
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors on a busy machine: threads that wait for each other take many times as long."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def image_folder(tmp_path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.png", 100 * label + i)
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data_path) -> Path:
    """The checkpoint of a run of main.py, a few steps long."""
    folder = tmp_path_factory.mktemp("trained")
    call_main(*TINY, *VARIANT, "--data-path", data_path, "--output_dir", folder, "--lr", "0.1",
              "--warmup-epochs", "0")  # fmt: skip
    return folder / "checkpoint.pth"


@pytest.fixture
def run(ending) -> Callable[..., SimpleNamespace]:
    """`run(*arguments)` is main.py in this process: its exit code and what it printed."""
    return partial(ending, call_main)


@pytest.fixture
def ending(capsys) -> Iterator[Callable[..., SimpleNamespace]]:
    """`ending(command, *arguments)` calls a command: its exit code and what it printed."""
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(
        command: Callable[..., None], *arguments: object, **options: object
    ) -> SimpleNamespace:
        code, message = 0, ""
        try:
            command(*arguments, **options)
        except SystemExit as ended:
            code, message = (1, ended.code) if isinstance(ended.code, str) else (ended.code, "")
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err + message)

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Token shards of Python's own help texts."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "topics.txt").write_text("\n\n".join(topics.values()))
    arguments = ("--output", folder / "shards", "--train-tokenizer", 2000, "--eval-share", 0.05)
    prepare.main([str(a) for a in (folder / "topics.txt", *arguments)])
    return folder / "shards"
