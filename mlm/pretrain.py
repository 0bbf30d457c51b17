"""Pre-trains an encoder: torchrun -m mlm.pretrain mlm/configs/lion-s-base.yaml data=FOLDER ..."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

import checkpoint
from commands import run_command
from compilation import compile_in_place
from engine import LOG_INTERVAL, autocast, require_finite
from errors import UserError, as_user_error
from files import remove
from journal import Journal, Mean, Progress, provenance, require_writable
from locking import only_run_in
from mlm.data import EndlessSampler, EvalSampler, MaskedWindows
from mlm.export import export
from mlm.fields import setting
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.settings import check, check_ranges, override, read_yaml, settings_parser, typed
from mlm.shards import Corpus, data_digest, load_tokenizer
from optimization import learning_rate, load_optimizer
from optimizer_step import OptimizerStep, Reading
from processes import Interrupted, Peers, StopSignal, World, init_distributed
from resuming import Rule, check_settings, tell_changes
from samplers import EpochSampler
from utils import digest, make_deterministic, seed_everything
from workers import worker_options

EVAL_SEED = 17  # for the masks in evaluation, the same in all runs
NODE_SETTINGS = ("data", "device", "workers")  # nodes may differ in these
# What happens if a setting changes when a run resumes.
RULES = {
    **dict.fromkeys(
        ("model", "length", "mask_share", "separate_documents", "global_batch", "steps", "lr",
         "min_lr_share", "warmup_share", "weight_decay", "betas", "eps", "seed"),
        Rule.RUN,
    ),
    **dict.fromkeys(
        ("data", "eval_mask_share", "eval_every", "micro_batch", "precision", "clip_grad"),
        Rule.TAKEN_UP,
    ),
    **dict.fromkeys(
        ("output", "save_every", "compile", "workers", "device", "resume", "overwrite",
         "deterministic"),
        Rule.FREE,
    ),
}  # fmt: skip
RANGES = {
    **dict.fromkeys(("length", "global_batch", "micro_batch", "steps"), "[1, inf)"),
    **dict.fromkeys(("eval_every", "save_every"), "[1, inf)"),
    **dict.fromkeys(("mask_share", "eval_mask_share"), "(0, 1)"),
    **dict.fromkeys(("warmup_share", "min_lr_share"), "[0, 1]"),
    **dict.fromkeys(("weight_decay", "eps", "workers"), "[0, inf)"),
    **dict.fromkeys(("lr", "clip_grad"), "(0, inf)"),
    "betas": "[0, 1)",
    "seed": "[0, 4294967296)",
}


@dataclass(frozen=True)
class Settings:
    """The recipe; by default that of M2-BERT."""

    data: str = setting("folder that mlm.prepare has written")
    lr: float = setting("peak learning rate")
    model: dict[str, Any] = setting("settings of the model, listed below")
    output: str = setting("folder for checkpoints and logs; none: nothing is kept", "")
    length: int = setting("tokens per window", 128)
    mask_share: float = setting("share of the tokens to predict in training", 0.3)
    eval_mask_share: float = setting("share of the tokens to predict in evaluation", 0.15)
    separate_documents: bool = setting("tokens attend to those of their own document alone", True)
    global_batch: int = setting("windows per optimiser step, over all processes", 4096)
    micro_batch: int = setting("windows per process and forward pass", 128)
    steps: int = setting("optimiser steps", 70_000)
    warmup_share: float = setting("share of the steps in which the learning rate rises", 0.06)
    min_lr_share: float = setting("learning rate at the end, as a share of the peak", 0.02)
    weight_decay: float = setting(
        "share of a weight lost in a step at the peak learning rate", 1e-5
    )
    betas: list = setting("decays of AdamW's two moments", factory=lambda: [0.9, 0.98])
    eps: float = setting("epsilon of AdamW", 1e-6)
    clip_grad: float | None = setting("largest gradient norm; null: no clipping", None)
    precision: str = setting("bf16 or fp32 on GPUs; CPUs compute in fp32", "bf16")
    deterministic: bool = setting(
        "equal runs on GPUs end with equal weights bit for bit; slower", False
    )
    compile: bool = setting("compile the encoder by torch.compile", False)
    workers: int = setting("loader processes per training process", 2)
    seed: int = setting("seed of weights, order, masks and dropout", 17)
    eval_every: int = setting("steps between evaluations, with a line in log.txt", 2000)
    save_every: int = setting("steps between checkpoints; evaluations write one, too", 1000)
    device: str = setting("auto, cpu, cuda or cuda:N", "auto")
    resume: str = setting("auto: go on with the run in output", "")
    overwrite: bool = setting("replace the run in output", False)

    def check(self) -> None:
        """Raises UserError for invalid values."""
        check_ranges(self, RANGES)
        if len(self.betas) != 2:
            raise UserError(f"betas must be two numbers, not {len(self.betas)}.")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision must be bf16 or fp32, not {self.precision!r}.")
        if self.resume not in ("", "auto"):
            raise UserError(f"resume must be auto or nothing, not {self.resume!r}.")
        if self.resume and not self.output:
            raise UserError("resume=auto needs the output of the run.")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then linear decay to `min_lr_share` of the peak."""
        warmup = round(self.steps * self.warmup_share)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        left = (self.steps - step) / max(self.steps - warmup, 1)
        return self.lr * (self.min_lr_share + (1 - self.min_lr_share) * left)


def check_no_other_run(settings: Settings) -> None:
    """Raises UserError if training would mix with another run in the output."""
    parts = ("checkpoint.pth", "checkpoint.previous.pth", "model")
    taken = settings.output and any(Path(settings.output, part).exists() for part in parts)
    if taken and not (settings.resume or settings.overwrite):
        raise UserError(
            f"{settings.output} holds another run: go on with it by resume=auto, replace it by "
            "overwrite=true, or choose another output."
        )


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LionBertForMaskedLM:
    """Raises UserError for an unknown key, a value of the wrong type or another vocabulary."""
    options = check(LionBertConfig.__annotations__, settings.model, "the section model")
    if options.setdefault("pad_token_id", tokenizer.pad_token_id) != tokenizer.pad_token_id:
        raise UserError(
            f"The model pads with {options['pad_token_id']} and the data's tokeniser with "
            f"{tokenizer.pad_token_id}: leave out pad_token_id."
        )
    words = options.setdefault("vocab_size", len(tokenizer))
    if words != len(tokenizer):
        raise UserError(
            f"The model has a vocabulary of {words} words and the data one of {len(tokenizer)}: "
            "leave out vocab_size, or prepare the data with the model's tokeniser."
        )
    with as_user_error():
        config = LionBertConfig(**options)
    if config.position_embeddings and settings.length > config.max_position_embeddings:
        raise UserError(
            f"length {settings.length} is more than the {config.max_position_embeddings} positions "
            "of the model: raise model.max_position_embeddings."
        )
    with as_user_error():
        return LionBertForMaskedLM(config)


def build_optimizer(
    settings: Settings, model: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay / settings.lr,
        fused=device.type == "cuda",
    )


def amp_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    return torch.bfloat16 if settings.precision == "bf16" and device.type == "cuda" else None


def build_loaders(
    settings: Settings, world: World, tokenizer: PreTrainedTokenizerFast, step: int
) -> tuple[DataLoader, DataLoader]:
    """An endless loader of training windows from `step` on, and a loader for evaluation."""
    ranks: dict[str, Any] = {"num_replicas": world.size, "rank": world.rank}
    corpora = {split: Corpus(settings.data, split, settings.length) for split in ("train", "eval")}
    shares = {"train": settings.mask_share, "eval": settings.eval_mask_share}
    windows = {
        split: MaskedWindows(
            corpus,
            tokenizer,
            share=shares[split],
            seed=settings.seed if split == "train" else EVAL_SEED,
            separate_documents=settings.separate_documents,
        )
        for split, corpus in corpora.items()
    }
    epochs = EpochSampler(len(windows["train"]), seed=settings.seed, **ranks)
    samplers = {
        "train": EndlessSampler(epochs, step * settings.global_batch // world.size),
        "eval": EvalSampler(len(windows["eval"]), **ranks),
    }
    train, evaluation = (
        DataLoader(
            windows[split],
            settings.micro_batch,
            sampler=samplers[split],
            pin_memory=world.device.type == "cuda",
            **worker_options(settings.workers if split == "train" else 0),
        )
        for split in ("train", "eval")
    )
    return train, evaluation


class Pretraining:
    """A run: what a checkpoint saves and restores, and the steps."""

    def __init__(self, settings: Settings, world: World) -> None:
        settings.check()
        check_no_other_run(settings)
        self.settings, self.world = settings, world
        per_pass = settings.micro_batch * world.size
        if settings.global_batch % per_pass:
            raise UserError(
                f"global_batch {settings.global_batch} is no multiple of {per_pass} (micro_batch "
                f"{settings.micro_batch} x {world.size} processes)."
            )
        self.accumulate = settings.global_batch // per_pass
        self.tokenizer = load_tokenizer(Path(settings.data, "tokenizer"))
        self.data = data_digest(Path(settings.data))
        seed_everything(settings.seed)
        model: Any = build_model(settings, self.tokenizer)
        self.model = model.to(world.device)
        most = self.model.config.max_position_embeddings  # where the tokeniser truncates if asked
        self.tokenizer.model_max_length = max(settings.length, most)
        self.optimizer = build_optimizer(settings, self.model, world.device)
        self.step, self.restored = 0, False
        self.saved_meters: list[tuple[float, int]] = []
        if settings.resume:
            self._restore()
        self.loader, self.eval_loader = build_loaders(settings, world, self.tokenizer, self.step)
        self.dtype = amp_dtype(settings, world.device)
        self._require_same()

    def _require_same(self) -> None:
        """Raises UserError if the processes differ in data, weights or position."""
        if self.world.size == 1:
            return
        facts = {"their step": self.step, "their weights": digest(self.model)}
        loaders: dict[str, Any] = {"training": self.loader, "evaluation": self.eval_loader}
        for name, loader in loaders.items():
            facts[f"their {name} data"] = loader.dataset.corpus.description()
        self.world.peers.agree(facts, "give them the same data and checkpoints")

    def _restore(self) -> None:
        found = checkpoint.latest(self.settings.output)
        if found is None:
            return
        saved, source = found[0], str(found[1])
        needed = ("model", "optimizer", "step", "meters")
        if missing := [name for name in needed if name not in saved]:
            raise UserError(
                f"{source} is no checkpoint of mlm.pretrain, as it has no {missing[0]}: choose "
                "another output."
            )
        before, now = saved.get("args") or {}, asdict(self.settings)
        check_settings(before, now, RULES, source, Rule.RUN)
        tell_changes(before, now, RULES, source)
        if saved.get("data", self.data) != self.data:
            raise UserError(
                f"{source} is of other text or another tokeniser than those in "
                f"{self.settings.data}: give the data of its training, or another output."
            )
        checkpoint.load_weights(self.model, checkpoint.weights_of(saved, source=source), source)
        load_optimizer(self.optimizer, saved["optimizer"], source)
        self.step, self.saved_meters = saved["step"], saved["meters"]
        self._set_lr(self.step - 1)  # for an outstanding line of log.txt
        self.restored = True

    def save(self, meter: Mean) -> None:
        """Saves the checkpoint, and model and tokeniser in Hugging Face's format."""
        meters = self.world.gather(meter.state())
        if not (self.settings.output and self.world.is_main):
            return
        folder = Path(self.settings.output)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "meters": meters,
            "data": self.data,
            "args": asdict(self.settings),
        }
        checkpoint.save(state, folder / "checkpoint.pth")
        export(self.model, self.tokenizer, folder / "model")

    def _open_output(self) -> None:
        """Removes a run to be overwritten; repairs output that a kill left out of date.

        A model folder that is missing, or one save older than the checkpoint, is written again.
        """
        if not (self.settings.output and self.world.is_main):
            return
        folder = Path(self.settings.output)
        if self.restored:
            export(self.model, self.tokenizer, folder / "model")
        elif self.settings.overwrite:
            remove(folder / "model")
            checkpoint.discard(folder)

    def fit(self) -> None:
        """Runs the remaining steps. Saves before leaving on a signal."""
        settings, world, stop = self.settings, self.world, StopSignal()
        facts = {"args": asdict(settings), "world_size": world.size, **provenance()}
        self._open_output()
        folder = settings.output if world.is_main else None
        model = world.distributed(self.model)
        if settings.compile:
            compile_in_place(self.model.lion)
        take_step = OptimizerStep(
            model, self.optimizer, world, seed=settings.seed, accumulate=self.accumulate,
            clip_grad=settings.clip_grad, stop=stop, advice="Try a lower lr.",
        )  # fmt: skip
        meter = self._restored_meter()
        # An outstanding evaluation.
        outstanding = bool(meter.count) and self._line_due(self.step)
        journal = Journal(folder, facts, self.step + (not outstanding), clock="step")
        tokens = settings.global_batch * settings.length
        progress = Progress("Step:", settings.steps, tokens, start=self.step, unit="tok",
                            interval=LOG_INTERVAL, show=world.is_main)  # fmt: skip
        parts = self._parts_of_steps(progress.waiting_for(self.loader))
        try:
            while self.step < settings.steps or meter.count:
                if not outstanding:
                    due = progress.due(self.step)
                    written = self._line_due(self.step + 1) or self._save_due(self.step + 1)
                    for loss, _ in self._train_step(take_step, parts, look=due or written):
                        meter.update(loss)
                    progress.update(self.step, **({"loss": loss, "lr": self._lr()} if due else {}))
                    self.step += 1
                    if take_step.stopping:
                        raise Interrupted
                    outstanding = self._line_due(self.step)
                    if outstanding or self._save_due(self.step):
                        with progress.paused():
                            self.save(meter)
                if outstanding:
                    speeds = progress.lap(self.step, "tokens")
                    with progress.paused():
                        journal.write(self._record(meter, speeds, stop), **speeds)
                    meter, outstanding = Mean(), False
                    if self.step == settings.steps:
                        self.save(meter)
        except Interrupted:
            progress.close()
            self.save(meter)
            left = "go on by resume=auto" if settings.output else "unsaved, without output"
            print(f"Stopped at step {self.step}: {left}", flush=True)
            sys.exit(stop.exit_code)
        progress.close()

    def _restored_meter(self) -> Mean:
        """This process's share of the losses since the last evaluation."""
        saved, world = self.saved_meters, self.world
        if len(saved) in (0, world.size):
            return Mean(*(saved[world.rank] if saved else ()))
        totals, counts = zip(*saved, strict=True)  # of another number of processes
        return Mean(sum(totals) / len(totals), counts[0])

    def _line_due(self, step: int) -> bool:
        return step % self.settings.eval_every == 0 or step == self.settings.steps

    def _save_due(self, step: int) -> bool:
        return step % self.settings.save_every == 0 or step == self.settings.steps

    def _set_lr(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(step)

    def _lr(self) -> float:
        return learning_rate(self.optimizer)

    def _parts_of_steps(self, batches: Iterator[dict]) -> Iterator[tuple[dict, Tensor]]:
        """Batches on the device, each with the number of masked tokens that divides its loss.

        Averaged over processes, the loss is the mean over the masked tokens of the global batch.
        """
        while True:
            parts = [self._moved(next(batches)) for _ in range(self.accumulate)]
            count = torch.stack([(part["labels"] >= 0).sum() for part in parts]).sum()
            # Gradients are averaged over processes.
            count = self.world.reduce(count).clamp(min=1) / self.world.size
            yield from ((part, count) for part in parts)

    def _train_step(
        self, take_step: OptimizerStep, parts: Iterator[tuple[dict, Tensor]], look: bool
    ) -> list[Reading]:
        """One optimiser step at its learning rate."""

        def loss_of(part: tuple[dict[str, Tensor], Tensor]) -> Tensor:
            batch, count = part
            with autocast(self.world.device, self.dtype):
                return take_step.model(**batch, num_items_in_batch=count, targets_only=True).loss

        take_step.model.train()
        self._set_lr(self.step)
        return take_step(parts, loss_of, look=look, step=self.step)

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}

    def _record(self, meter: Mean, speeds: dict[str, float], stop: StopSignal) -> dict[str, float]:
        """A line of log.txt: losses, accuracy, memory, and speed since the previous line.

        Raises Interrupted on all processes together when `stop` was signalled to any.
        """
        memory = 0
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.world.device)
        scores = self.evaluate(stop)
        record = {
            "step": self.step,
            "train_loss": meter.over(self.world),
            "train_lr": self._lr(),
            **{f"eval_{name}": value for name, value in scores.items()},
            "tokens_per_second": speeds["tokens_per_second"],
            "peak_memory_gib": memory / 2**30,
            "n_parameters": self.model.num_parameters(),
        }
        if self.world.is_main:
            shown = ("train_loss", "eval_loss", "eval_accuracy")
            print(f"Step {self.step}: " + "  ".join(f"{k} {record[k]:.4f}" for k in shown))
        return record

    @torch.inference_mode()
    def evaluate(self, stop: StopSignal) -> dict[str, float]:
        """Loss and accuracy (in %) over the masked tokens of the evaluation split.

        Raises, on all processes together, Interrupted when `stop` was signalled to any, and
        FloatingPointError if the loss is not finite.
        """
        self.model.eval()
        # loss, hits, masked tokens, stopped
        sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)
        for batch in self.eval_loader:
            if stop:
                break
            batch = self._moved(batch)
            with autocast(self.world.device, self.dtype):
                result = self.model(**batch, num_items_in_batch=1, targets_only=True)
            labels = batch["labels"][batch["labels"] >= 0]
            hits = (result.logits.argmax(1) == labels).sum()
            sums[:3] += torch.stack([result.loss, hits, labels.new_tensor(len(labels))]).double()
        sums[3] = bool(stop)
        loss, hits, count, stopped = self.world.reduce(sums).tolist()
        if stopped:
            raise Interrupted
        require_finite(loss)
        return {"loss": loss / max(count, 1), "accuracy": 100 * hits / max(count, 1)}


def main(arguments: list[str] | None = None) -> None:
    sections = {"": Settings, "model.": LionBertConfig}
    example = "mlm/configs/lion-s-base.yaml"
    parser = settings_parser("mlm.pretrain", __doc__, example, sections)
    parser.add_argument("--dist_url", default="env://", help="how processes find each other")
    args = parser.parse_intermixed_args(arguments)
    logging.disable_progress_bar()

    held = ExitStack()

    def build(peers: Peers) -> Callable[[], None]:
        values = override(read_yaml(args.config), args.settings)
        settings = typed(Settings, values, args.config)
        shared = {name: v for name, v in asdict(settings).items() if name not in NODE_SETTINGS}
        peers.agree(shared, "give them the same settings")
        if settings.deterministic:
            make_deterministic()
        world = init_distributed(settings.device, peers)
        if settings.output:
            require_writable(Path(settings.output), world, "output")
            held.enter_context(only_run_in(Path(settings.output), world, "output"))
        return Pretraining(settings, world).fit

    with held:
        run_command("mlm.pretrain", build, args.dist_url)


if __name__ == "__main__":
    main()
