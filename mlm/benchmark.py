"""Speed and memory of training: python -m mlm.benchmark mlm/configs/bert-base.yaml ...

Each model takes steps on random windows of one document, a model and a length in a process of its
own. On a GPU softmax attention is measured with each of PyTorch's fused kernels; speeds are also
given as shares of the first model's, with the fastest of them.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from commands import run_command
from engine import autocast
from errors import UserError, as_user_error
from journal import provenance
from memory import peak_memory
from mlm.data import IGNORED
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.pretrain import Settings, amp_dtype, build_optimizer
from mlm.settings import check, override, read_yaml, typed
from processes import Peers, init_distributed
from workers import end_with_parent

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION")  # of softmax on GPUs

# Forks processes from one that has imported the libraries and done nothing else.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["mlm.pretrain"])


@dataclass(frozen=True)
class Case:
    """A model, a length, and what came out."""

    name: str
    settings: Settings
    config: LionBertConfig
    windows: int
    backend: str | None = None
    speed: float = math.nan  # tokens/s
    bytes: int = 0
    failure: str = ""

    @property
    def length(self) -> int:
        return self.settings.length


def make_cases(paths: list[str], values: list[str], lengths: list[int], tokens: int) -> list[Case]:
    """Raises UserError for bad settings."""
    cases = []
    for length, path in product(lengths, paths):
        given = {"data": "unused", **override(read_yaml(path), values), "length": length}
        settings = typed(Settings, given, path)
        settings.check()
        options = check(LionBertConfig.__annotations__, settings.model, "the section model")
        with as_user_error():
            config = LionBertConfig(**{**options, "max_position_embeddings": length})
        device = init_distributed(settings.device).device
        kernels = BACKENDS if (config.mixer, device.type) == ("softmax", "cuda") else (None,)
        case = Case(Path(path).stem, settings, config, max(tokens // length, 1))
        cases += [replace(case, backend=kernel) for kernel in kernels]
    return cases


def measure(case: Case, seconds: float, threads: int) -> Case:
    """The case with its speed over about `seconds`, and its peak memory."""
    torch.set_num_threads(threads)
    device = init_distributed(case.settings.device).device
    chosen = sdpa_kernel(getattr(SDPBackend, case.backend)) if case.backend else nullcontext()
    try:
        with peak_memory(device) as peak, chosen:
            step = _training(case, device)
            step()
            each = _seconds(step, 1, device)
            steps = max(round(seconds / each), 1)
            each = _seconds(step, steps, device) / steps
    except torch.OutOfMemoryError:
        return replace(case, failure="out of memory")
    except RuntimeError as error:  # a kernel that the device or the build lacks
        return replace(case, failure=str(error).splitlines()[0])
    return replace(case, speed=case.windows * case.length / each, bytes=peak.bytes)


def _training(case: Case, device: torch.device) -> Callable[[], None]:
    """A function that takes one step."""
    torch.manual_seed(0)
    settings, dtype = case.settings, amp_dtype(case.settings, device)
    model = LionBertForMaskedLM(case.config).train()
    nn.Module.to(model, device)
    if settings.compile:
        model.lion.compile()
    optimizer = build_optimizer(settings, model, device)
    ids = torch.randint(case.config.vocab_size, (case.windows, case.length), device=device)
    labels: Tensor = ids.where(torch.rand(ids.shape, device=device) < settings.mask_share, IGNORED)

    def step() -> None:
        with autocast(device, dtype):
            loss = model(ids, labels=labels, targets_only=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _seconds(step: Callable[[], None], count: int, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return time.perf_counter() - start


def row(case: Case, first: list[Case]) -> str:
    """A line of the table; `first` are the results of the first model at this length."""
    kernel = f" ({case.backend.lower().replace('_', ' ')})" if case.backend else ""
    result = f"{case.failure} | | "
    if not case.failure:
        share = case.speed / max((c.speed for c in first if not c.failure), default=math.nan)
        result = f"{case.speed:,.0f} | {share:.2f} | {case.bytes / 2**30:.2f}"
    return f"| {case.length:,} | {case.windows} | {case.name}{kernel} | {result} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("mlm.benchmark", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="of mlm.pretrain, with key=value for all: python -m mlm.pretrain --help",
    )
    add("--lengths", nargs="+", type=int, default=[128, 4096, 16384], help="tokens of a window")
    add("--tokens", type=int, default=2**16, help="of a step; a window is the least")
    add("--seconds", type=float, default=5, help="for each case")
    add("--threads", type=int, default=1, help="of a CPU")
    args = parser.parse_intermixed_args(arguments)

    def build(_: Peers) -> Callable[[], None]:
        values = [word for word in args.configs if "=" in word]
        paths = [word for word in args.configs if "=" not in word]
        if not paths or min(args.tokens, args.threads, *args.lengths) < 1:
            raise UserError("Give a config, and at least 1 token, thread and length.")
        cases = make_cases(paths, values, args.lengths, args.tokens)

        def work() -> None:
            facts = provenance()
            print("; ".join(f"{name}: {facts[name]}" for name in ("device", "torch", "commit")))
            print(f"\n| length | windows | model | tokens/s | / {cases[0].name} | peak GiB |")
            print("|--:|--:|---|--:|--:|--:|", flush=True)
            first = []
            for case in cases:
                with ProcessPoolExecutor(1, processes, end_with_parent) as fresh:
                    case = fresh.submit(measure, case, args.seconds, args.threads).result()
                if case.name == cases[0].name:
                    first.append(case)
                print(row(case, [c for c in first if c.length == case.length]), flush=True)

        return work

    run_command("mlm.benchmark", build)


if __name__ == "__main__":
    main()
