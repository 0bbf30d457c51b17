"""Fine-tunes on GLUE or other TSV files: python -m mlm.glue mlm/configs/glue.yaml --model PATH"""

import hashlib
import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import mlm.modeling  # noqa: F401  (registers the models)
from commands import open_streams, run_command, setup_logging
from engine import LOG_INTERVAL, autocast
from errors import UserError
from files import replacing
from journal import require_writable, to_json
from locking import only_run_in
from mlm.export import export
from mlm.fields import setting
from mlm.settings import check_ranges, override, read_yaml, settings_parser, typed
from mlm.shards import load_tokenizer
from mlm.tasks import Examples, Task, read_examples, score
from processes import Peers, World, init_distributed
from utils import seed_everything
from workers import end_with_parent

WARMUP_SHARE = 0.06
BETAS, EPS = (0.9, 0.98), 1e-6
EVAL_BATCH = 128


@dataclass(frozen=True)
class Settings:
    data: str = setting("folder of the TSV files")
    tasks: dict = setting("settings of each task by its name, listed below")
    output: str = setting("folder of the models and tables", "outputs/glue")
    length: int = setting("most tokens of an example; longer ones are cut", 128)
    lr: float = setting("peak learning rate", 1e-5)
    device: str = setting("auto, cpu, cuda or cuda:N; auto and cuda take all GPUs", "auto")


@dataclass(frozen=True)
class Job:
    """One task with one seed: what a process needs to do it."""

    name: str
    task: Task
    seed: int
    model: str  # where it starts
    data: str
    output: str
    length: int
    lr: float

    @property
    def folder(self) -> Path:
        return Path(self.output, f"{self.name}-{self.seed}")


# -------------------------------------------------------------------------------------- one job


def batches(
    examples: Examples,
    order: np.ndarray,
    size: int,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Padded batches with labels, in the given order."""
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        columns = zip(*(examples.texts[i] for i in chosen), strict=True)
        batch = tokenizer(
            *map(list, columns),
            truncation=True,
            max_length=length,
            padding=True,
            return_tensors="pt",
        )
        labels = torch.tensor([examples.labels[i] for i in chosen])
        yield {name: value.to(device) for name, value in {**batch, "labels": labels}.items()}


def fine_tune(job: Job, device: torch.device) -> dict[str, float]:
    """Trains, leaves the model in its folder, scores each evaluation file, and `result.json`.

    Returns the metrics by file and name. What an earlier call has done of the same job, of the same
    data and weights, is not done again. Raises FloatingPointError for a loss that is not finite.
    """
    facts, result = _facts(job), job.folder / "result.json"
    before = read_result(result)
    if not _is_same(before.get("job"), facts):
        before = {}
    if "scores" in before:
        return {k: math.nan if v is None else v for k, v in before["scores"].items()}
    task, folder = job.task, Path(job.data)
    dtype = torch.bfloat16 if task.precision == "bf16" and device.type == "cuda" else None
    train = read_examples(folder, task.train, task, None)
    seed_everything(job.seed)
    if before:
        model = AutoModelForSequenceClassification.from_pretrained(job.folder)
        nn.Module.to(model, device)
        tokenizer = load_tokenizer(job.folder)
    else:
        model, tokenizer = _load(job, train.classes)
        nn.Module.to(model, device)
        _train(model, job, train, tokenizer, device, dtype)
        result.unlink(missing_ok=True)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        export(model, tokenizer, job.folder)
        _write_json({"job": facts}, result)
    scores = {}
    for name in task.eval:
        examples = read_examples(folder, name, task, train.classes)
        outputs = predict(model, examples, tokenizer, job.length, device, dtype)
        for metric, value in score(task, examples.labels, outputs).items():
            scores[f"{Path(name).stem} {metric}"] = value
    _write_json({"scores": scores, "job": facts}, result)
    return scores


def _facts(job: Job) -> dict[str, Any]:
    """A job's settings, and digests of what it reads."""
    paths = {name: Path(job.data, name) for name in (job.task.train, *job.task.eval)}
    files = ("model.safetensors", "config.json", "tokenizer.json")
    paths |= {f"model's {name}": Path(job.model, name) for name in files}
    digests = {}
    for name, path in paths.items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {**asdict(job), "digests": digests}
    del facts["task"]["seeds"]  # others may have been added
    return facts


def _is_same(before: Any, facts: dict[str, Any]) -> bool:
    """Whether it is the same job, wherever its files were and are."""
    own = facts.keys() - {"model", "data", "output"}
    return isinstance(before, dict) and all(before.get(name) == facts[name] for name in own)


def read_result(path: Path) -> dict[str, Any]:
    """{} where there is none, or one that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(content: dict[str, Any], path: Path) -> None:
    with replacing(path) as file:
        file.write(to_json(content, indent=2) + "\n")


def _load(job: Job, classes: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model that a job starts from, with a new head if it has another one."""
    names = {"num_labels": 1, "problem_type": "regression"}
    if classes:
        names = {
            "id2label": dict(enumerate(classes)),
            "label2id": {name: number for number, name in enumerate(classes)},
            "problem_type": "single_label_classification",
        }
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model, ignore_mismatched_sizes=True, **names
    )
    return model, load_tokenizer(Path(job.model))


def _train(
    model: PreTrainedModel,
    job: Job,
    train: Examples,
    tokenizer: PreTrainedTokenizerFast,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    task, count = job.task, len(train.labels)
    optimizer = torch.optim.AdamW(
        model.parameters(), job.lr, BETAS, EPS, weight_decay=task.weight_decay / job.lr
    )
    steps = task.epochs * math.ceil(count / task.batch)
    warmup = max(round(WARMUP_SHARE * steps), 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1)),
    )
    model.train()
    step, finite = 0, torch.ones((), dtype=torch.bool, device=device)
    bar = tqdm(desc=f"{job.name} seed {job.seed}", total=steps, unit="step", mininterval=5)
    for epoch in range(task.epochs):
        order = np.random.default_rng((job.seed, epoch)).permutation(count)
        for batch in batches(train, order, task.batch, tokenizer, job.length, device):
            with autocast(device, dtype):
                loss = model(**batch).loss
            finite &= loss.isfinite()
            if device.type == "cpu" or step % LOG_INTERVAL == 0:
                _require_finite(finite, step)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            step += 1
    bar.close()
    for parameter in model.parameters():
        finite &= parameter.isfinite().all()
    _require_finite(finite, step)


def _require_finite(finite: Tensor, step: int) -> None:
    if not finite:
        raise FloatingPointError(
            f"its loss is not finite (step {step}): nothing of it is saved, try a lower lr."
        )


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    examples: Examples,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[float]:
    """The class of each example, or the value of a regression.

    Raises FloatingPointError if there is none, as the outputs are not finite.
    """
    model.eval()
    outputs = []
    order = np.arange(len(examples.labels))
    for batch in batches(examples, order, EVAL_BATCH, tokenizer, length, device):
        with autocast(device, dtype):
            logits = model(**batch).logits.float()
        if not logits.isfinite().all():
            raise FloatingPointError("its outputs are not finite: try a lower lr.")
        outputs += (logits.argmax(1) if examples.classes else logits[:, 0]).tolist()
    return outputs


# ------------------------------------------------------------------------------------- all jobs

_device = torch.device("cpu")  # of this process of the pool


def _take_device(free: Any) -> None:
    global _device
    end_with_parent()
    _device = free.get()
    open_streams()
    setup_logging(is_main=False)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _run(job: Job) -> dict[str, float]:
    try:
        return fine_tune(job, _device)
    except FloatingPointError as error:
        raise FloatingPointError(f"{job.name}, seed {job.seed}: {error}") from error


def run_jobs(jobs: list[Job], devices: list[str]) -> list[dict[str, float]]:
    """The scores of all jobs, spread over devices; those with a `start` come after the others."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once: what is done is kept
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for device in devices:
        free.put(torch.device(device))
    results: dict[tuple[str, int], dict[str, float]] = {}
    with ProcessPoolExecutor(len(devices), context, _take_device, (free,)) as pool:
        for second in (False, True):
            turn = [job for job in jobs if bool(job.task.start) is second]
            results |= zip(((j.name, j.seed) for j in turn), pool.map(_run, turn), strict=True)
    signal.signal(signal.SIGINT, before)
    return [results[job.name, job.seed] for job in jobs]


def table(jobs: list[Job], scores: list[dict[str, float]]) -> tuple[str, dict[str, float]]:
    """A markdown table, and each task's mean over metrics and seeds with the mean over tasks."""
    means, lines = {}, ["| task | seeds | metrics | score | ± |", "|---|--:|---|--:|--:|"]
    for name in dict.fromkeys(job.name for job in jobs):
        own = [s for job, s in zip(jobs, scores, strict=True) if job.name == name]
        by_seed = [float(np.mean(list(s.values()))) for s in own]
        means[name] = float(np.mean(by_seed))
        metrics = ", ".join(f"{m} {np.mean([s[m] for s in own]):.2f}" for m in own[0])
        lines.append(
            f"| {name} | {len(own)} | {metrics} | {means[name]:.2f} | {np.std(by_seed):.2f} |"
        )
    means["mean"] = float(np.mean(list(means.values())))
    lines.append(f"| mean | | | {means['mean']:.2f} | |")
    return "\n".join(lines), means


def build_jobs(settings: Settings, source: str, model: str) -> list[Job]:
    """Raises UserError for what is wrong without any training."""
    check_model(model, settings.length)
    tasks = {
        name: typed(Task, values, f"the task {name} of {source}")
        for name, values in settings.tasks.items()
    }
    jobs = []
    for name, task in tasks.items():
        task.check(name)
        if settings.length < (least := 1 + 2 * len(task.text)):  # [CLS], and a token and [SEP] each
            raise UserError(f"length must be at least {least} for the texts of {name}.")
        folder = Path(settings.data)
        examples = {task.train: read_examples(folder, task.train, task, None)}
        for file in task.eval:
            examples[file] = read_examples(folder, file, task, examples[task.train].classes)
        for file in examples:
            task.check_labels(examples[file], folder / file)
        start = model
        if task.start:
            if task.start not in tasks or tasks[task.start].start:
                raise UserError(
                    f"{name} starts from {task.start}, which must be a task of its own without a "
                    f"start: add it, or give tasks.{name}.start=null."
                )
            first = tasks[task.start].seeds[0]
            start = str(Path(settings.output, f"{task.start}-{first}"))
        jobs += [
            Job(name, task, seed, start, settings.data, settings.output, settings.length,
                settings.lr)
            for seed in task.seeds
        ]  # fmt: skip
    return jobs


def check_model(model: str, length: int) -> None:
    """Raises UserError if there is no encoder for `length` tokens, or of another vocabulary."""
    if not Path(model, "model.safetensors").exists():
        raise UserError(f"There is no model in {model}: give the folder model of a pre-training.")
    words = len(load_tokenizer(Path(model)))
    with _loading(model):
        config = AutoConfig.from_pretrained(model)
        vocabulary = config.vocab_size
    if vocabulary != words:
        raise UserError(
            f"The model in {model} has a vocabulary of {vocabulary} words and its tokeniser "
            f"one of {words}: they do not belong together."
        )
    if getattr(config, "position_embeddings", True) and length > config.max_position_embeddings:
        raise UserError(
            f"length {length} is more than the {config.max_position_embeddings} positions of the "
            f"model in {model}: give a lower length."
        )
    logging.set_verbosity_error()  # that a classifier is new is no news
    logging.disable_progress_bar()
    with _loading(model):
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            model, ignore_mismatched_sizes=True, output_loading_info=True
        )
    lost = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    own = [name for name in lost if name.startswith(f"{loaded.base_model_prefix}.")]
    if own := sorted(name for name in own if "pooler" not in name):
        raise UserError(
            f"The weights in {model} are of another model than its config.json: {len(own)} are "
            f"missing or of another shape, such as {own[0]}."
        )


@contextmanager
def _loading(model: str) -> Iterator[None]:
    """Errors of any kind are the user's: the files may hold anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot load the model in {model}: {error}") from error


def devices_for(device: str) -> list[str]:
    """All GPUs for auto and cuda where there are any, else the one device."""
    chosen = init_distributed(device).device
    if chosen.type == "cuda" and device in ("auto", "cuda"):
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [str(chosen)]


def main(arguments: list[str] | None = None) -> None:
    sections = {"": Settings, "tasks.TASK.": Task}
    parser = settings_parser("mlm.glue", __doc__, "mlm/configs/glue.yaml", sections)
    parser.add_argument("--model", required=True, help="folder of a pre-trained model")
    parser.add_argument("--tasks", metavar="TASK,TASK", help="only these")
    args = parser.parse_intermixed_args(arguments)

    held = ExitStack()

    def build(_: Peers) -> Callable[[], None]:
        values = override(read_yaml(args.config), args.settings)
        known = values.get("tasks")
        if not (known and isinstance(known, dict)):
            raise UserError(f"{args.config} has no section tasks with a task.")
        chosen = args.tasks.split(",") if args.tasks else known
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UserError(
                f"{args.config} has no task {', '.join(unknown)}: it has {', '.join(known)}."
            )
        values["tasks"] = {name: known[name] for name in chosen}
        settings = typed(Settings, values, args.config)
        check_ranges(settings, {"length": "[1, inf)", "lr": "(0, inf)"})
        if not settings.output:
            raise UserError("output must name a folder: the models are saved there.")
        jobs = build_jobs(settings, args.config, args.model)
        devices = devices_for(settings.device)
        require_writable(Path(settings.output), World(), "output")
        held.enter_context(only_run_in(Path(settings.output), World(), "output"))

        def work() -> None:
            text, means = table(jobs, run_jobs(jobs, devices))
            print(text)
            folder = Path(settings.output)
            with replacing(folder / "results.md") as file:
                file.write(text + "\n")
            _write_json(means, folder / "results.json")

        return work

    with held:
        run_command("mlm.glue", build)


if __name__ == "__main__":
    main()
