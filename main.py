"""Trains and evaluates LION (and any timm model) on images, with DeiT's command line."""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.optim import optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

import checkpoint
import loaders
import models_timm
import preprocessing
import resuming
from arguments import (
    PREPROCESSING_ARGUMENTS,
    check_args,
    check_no_other_run,
    check_optimizer,
    check_same_optimizer,
    get_args_parser,
    goes_on,
    shared_arguments,
)
from augment import build_batch_transform
from cached_images import CachedLoader
from commands import run_command
from compilation import compile_in_place
from engine import Position, Run, autocast, evaluate, require_same, train_one_epoch
from errors import UserError
from journal import RUN_FILES, Journal, provenance, require_writable, write_scores
from loaders import DeviceLoader, ImageLoading
from locking import only_run_in
from losses import DistillationLoss, build_base_loss, load_teacher
from optimization import MovingAverage, create_optimizer, set_apart
from preprocessing import Preprocessing
from pretrained import named_model
from processes import Interrupted, Peers, StopSignal, World, init_distributed
from resuming import Found, Rule
from utils import make_deterministic, peak_memory, seed_everything

logger = logging.getLogger(__name__)


def choose_preprocessing(
    args: argparse.Namespace, found: Found | None, *, keep_size: bool
) -> Preprocessing:
    """How images are preprocessed: by the checkpoint `found`, else the model; arguments override.

    With `keep_size` the default of --input-size is ignored.
    """
    given = {key: name for key, name in PREPROCESSING_ARGUMENTS.items() if name in args.given}
    chosen, origin = preprocessing.choose(
        args.model,
        found,
        new_training=not args.eval,
        size=args.input_size if "input_size" in args.given or not keep_size else None,
        **{key: getattr(args, name) for key, name in given.items()},
    )
    told = "".join(f", --{name}" for name in given.values())
    logger.info("Images: %s (by %s%s)", chosen, origin, told)
    return chosen


def build_model(
    args: argparse.Namespace, num_classes: int, input_size: int | tuple[int, int]
) -> nn.Module:
    name, own = named_model(vars(args))
    if args.distillation_type != "none" and "distilled" not in args.model:
        logger.info("Distillation needs a distillation token: building %s", name)
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    given = {"drop_rate": "drop", "drop_path_rate": "drop_path"}
    model: Any = models_timm.create(
        name,
        input_size=input_size,
        required=[option for option, argument in given.items() if argument in args.given],
        **{"num_classes": num_classes, **rates, **own},
    )
    if args.distillation_type != "none":
        model.set_distilled_training()
    return model


def build_criterion(
    args: argparse.Namespace, classes: list[str], world: World, images: Preprocessing
) -> nn.Module:
    teacher = None
    if args.distillation_type != "none":
        teacher = load_teacher(
            args.teacher_model,
            args.teacher_path,
            num_classes=len(classes),
            input_size=images.size,
            mean=images.mean,
            std=images.std,
            classes=classes,
        ).to(world.device)
    base = build_base_loss(
        mixed=args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None,
        smoothing=label_smoothing(args),
        bce=args.bce_loss,
        cosub=args.cosub,
    )
    kind, alpha, tau = args.distillation_type, args.distillation_alpha, args.distillation_tau
    return DistillationLoss(base, teacher, kind, alpha, tau)


def label_smoothing(args: argparse.Namespace) -> float:
    return 0.0 if args.bce_loss else args.smoothing  # smoothing would make every class present


def image_loading(args: argparse.Namespace) -> ImageLoading:
    return ImageLoading(
        args.data_set,
        args.data_path,
        inat_category=args.inat_category,
        holdout=args.holdout,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem,
        cached=args.cache,
        compiler=args.torchcompile,
    )


def augmentation(args: argparse.Namespace) -> dict[str, Any] | None:
    if args.no_aug:
        return None
    given = "train_interpolation" in args.given
    return {
        "color_jitter": args.color_jitter,
        "aa": args.aa,
        "three_augment": args.ThreeAugment,
        "simple_random_crop": args.src,
        **({"interpolation": args.train_interpolation} if given else {}),
    }


def erasing(args: argparse.Namespace) -> dict[str, Any]:
    probability = 0.0 if args.no_aug or args.ThreeAugment else args.reprob
    return {"reprob": probability, "remode": args.remode, "recount": args.recount}


def build_train_loader(
    args: argparse.Namespace, world: World, images: Preprocessing
) -> tuple[DeviceLoader | CachedLoader, list[str]]:
    """Batches for training, and the names of the classes."""
    return loaders.build_train_loader(
        image_loading(args),
        world,
        images,
        augmentation=augmentation(args),
        erasing=erasing(args),
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
        accumulate=args.grad_accum_steps,
    )


def go_on(args: argparse.Namespace, world: World, run: Run, found: Found) -> None:
    """Restores a run; raises UserError if it cannot resume with these arguments."""
    saved, source = found
    before, now = (resuming.settings_of(x) for x in (saved, {"args": vars(args), **run.facts}))
    resuming.check_settings(before, now, resuming.RULES, source, Rule.MODEL)
    if "optimizer" in saved and "epoch" in saved:
        kept = [Rule.OPTIMIZER, *([Rule.BETWEEN_EPOCHS] if saved.get("step") else [])]
        resuming.check_settings(before, now, resuming.RULES, source, *kept)
        resuming.check_holdout(before, now, source)
        check_same_optimizer(args, before, world.device, source)
        if saved["epoch"] + 1 > args.epochs:
            raise UserError(
                f"{source} has {saved['epoch'] + 1} epochs behind it: raise --epochs {args.epochs}."
            )
    run.restore(saved, source)
    if not (goes_on(args) and resuming.scores_alike(before, now)):
        run.max_accuracy = 0.0  # best_checkpoint.pth is the best of this folder and evaluation
    resuming.tell_changes(before, now, resuming.RULES, source)


def build_run(
    args: argparse.Namespace, world: World, model: Any, steps: int, facts: dict[str, Any]
) -> Run:
    """The initial state of a run."""
    ema = None
    if args.model_ema:
        device = "cpu" if args.model_ema_force_cpu else None
        ema = MovingAverage(model, decay=args.model_ema_decay, device=device)
    batch = args.batch_size * world.size * args.grad_accum_steps
    lr = args.lr if args.unscale_lr else args.lr * batch / 512
    logger.info(
        "Effective batch size %d (%d per process x %d processes x %d accumulation steps), "
        "learning rate %.4g",
        batch, args.batch_size, world.size, args.grad_accum_steps, lr,
    )  # fmt: skip
    if args.attn_only:
        models_timm.train_attention_alone(model, args.model)
    optimizer = create_optimizer(model, world.device, **{**optimizer_kwargs(args), "lr": lr})
    if args.gate_lr_scale != 1 or args.gate_weight_decay is not None:
        set_apart(optimizer, model.decay_parameters(), lr_scale=args.gate_lr_scale,
                  weight_decay=args.gate_weight_decay)  # fmt: skip
    schedule = {**scheduler_kwargs(args), "updates_per_epoch": steps}
    scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    if scheduler is None:  # which would scale the rates of layers and gates
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    scaler = torch.amp.GradScaler(
        world.device.type, enabled=amp_dtype(args, world) is torch.float16
    )

    position = Position(args.start_epoch)
    return Run(model, ema, optimizer, scheduler, scaler, position, facts)


def amp_dtype(args: argparse.Namespace, world: World) -> torch.dtype | None:
    return getattr(torch, args.amp_dtype) if args.amp and world.device.type == "cuda" else None


def require_logits(
    args: argparse.Namespace, world: World, model: nn.Module, classes: list[str],
    images: Preprocessing,
) -> None:  # fmt: skip
    """Raises UserError if the model does not give a logit for every class."""
    with autocast(world.device, amp_dtype(args, world)):
        models_timm.require_logits(model, args.model, len(classes), images.input_size)


class Evaluation:
    """An --eval run: construction reads and checks all it needs."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        found = resuming.read(args.resume, args.output_dir)
        if args.resume and not found:
            raise UserError(
                f"{args.output_dir} holds no checkpoint to evaluate: give --resume PATH."
            )
        self.images = choose_preprocessing(args, found, keep_size=True)
        self.loader = loaders.build_eval_loader(image_loading(args), world, self.images)
        self.classes = self.loader.dataset.classes
        if found:
            saved, source = found
            checkpoint.check_classes(saved, self.classes, source)
            before, now = (resuming.settings_of(x) for x in (saved, {"args": vars(args)}))
            resuming.check_evaluation(before, now, source)
        trained = preprocessing.of_checkpoint(found[0], args.model, found[1]) if found else None
        size = (trained or self.images).size
        self.model = build_model(args, len(self.classes), size)
        if found:
            state = checkpoint.weights_of(saved, ema=args.use_ema, source=source)
            checkpoint.load_weights(self.model, state, source)
            if self.images.size != size:
                models_timm.resize(self.model, self.images.size)
        else:
            logger.warning("No --resume: these are the weights that %s is built with.", args.model)
        require_same(world, {"test": self.loader.dataset}, self.model)
        self.model.to(world.device)
        require_logits(args, world, self.model, self.classes, self.images)

    def run(self) -> None:
        args, world = self.args, self.world
        count, device = len(self.loader.dataset), world.device
        per_class = torch.zeros(len(self.classes), 2, dtype=torch.float64, device=device)
        with peak_memory(device) as memory:
            stats, images_per_second = evaluate(
                self.model,
                self.loader,
                world=world,
                images=count,
                amp_dtype=amp_dtype(args, world),
                per_class=per_class,
            )
        logger.info("Accuracy of the network on the %d test images: %.1f%%", count, stats["acc1"])
        logger.info(
            "Evaluation took %.2f s (%.1f images/s), peak memory %.0f MiB",
            count / images_per_second, images_per_second, memory.bytes / 2**20,
        )  # fmt: skip
        if args.output_dir and world.is_main:
            facts = {**stats, "images": count, "classes": self.classes,
                     "data_config": self.images.state(), "args": vars(args),
                     **provenance()}  # fmt: skip
            write_scores(Path(args.output_dir), facts, self.classes, per_class.tolist())


class Training:
    """A training run: construction reads and checks all it needs; `fit` runs the epochs."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        check_optimizer(args, world.device)
        self.args, self.world = args, world
        found = resuming.read(args.resume, args.output_dir)
        fresh = args.finetune and not found  # a resumed run has it in its weights
        basis = (checkpoint.load(args.finetune), args.finetune) if fresh else None
        images = choose_preprocessing(args, found or basis, keep_size=bool(found))
        self.loader, classes = build_train_loader(args, world, images)
        self.eval_loader = loaders.build_eval_loader(image_loading(args), world, images)
        if found:
            checkpoint.check_classes(found[0], classes, found[1])
        seed_everything(args.seed)
        model = self._build_model(classes, images, basis)
        self.steps = len(self.loader.sampler) // (args.batch_size * args.grad_accum_steps)
        facts = {"data_config": images.state(), "classes": classes, "steps": self.steps,
                 "images": len(self.loader.dataset), "processes": world.size}  # fmt: skip
        self.run = build_run(args, world, model, self.steps, facts)
        if found:
            go_on(args, world, self.run, found)
            # The rates of the step before: an evaluation that is left saves the same as it would.
            self._set_lr(self.run.position.epoch, max(self.run.position.step - 1, 0))
        data = {"training": self.loader.dataset.dataset, "test": self.eval_loader.dataset}
        require_same(world, data, model, self.run.position)
        self.batch_transform = batch_transform(args, len(classes))
        self.criterion = build_criterion(args, classes, world, images)

    def _build_model(
        self, classes: list[str], images: Preprocessing, basis: Found | None
    ) -> nn.Module:
        args, world = self.args, self.world
        model = build_model(args, len(classes), images.size)
        if basis:
            resuming.start_from(basis, model, classes, args.holdout)
        model.to(world.device)
        require_logits(args, world, model, classes, images)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        return model

    def fit(self) -> None:
        """Runs the remaining epochs: train, save, evaluate, log, save. A signal saves, too."""
        args, world, run = self.args, self.world, self.run
        self.stop = StopSignal()
        journal = self._open_journal()
        self.eval_loader.start()
        model = world.distributed(run.model)
        if args.torchcompile:
            compile_in_place(run.model, args.torchcompile, args.torchcompile_mode)
        n_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        logger.info("number of params: %d", n_parameters)
        logger.info("Start training for %d epochs", args.epochs - run.position.epoch)
        began = time.perf_counter()
        while (epoch := run.position.epoch) < args.epochs:
            due = (epoch + 1) % args.eval_interval == 0 or epoch + 1 == args.epochs
            try:
                train_stats, speeds = self._train_epoch(model, save_at_end=due)
                test_stats = self._evaluate() if due else {}
            except Interrupted:
                self._leave()
            is_best = due and test_stats["acc1"] >= run.max_accuracy
            if due:
                run.max_accuracy = max(run.max_accuracy, test_stats["acc1"])
                logger.info("Max accuracy: %.2f%%", run.max_accuracy)
            stats = {
                **{f"train_{name}": value for name, value in train_stats.items()},
                **{f"test_{name}": value for name, value in test_stats.items()},
                "epoch": epoch,
                "n_parameters": n_parameters,
            }
            run.position = Position(epoch + 1)
            if is_best:
                self._save("best_checkpoint.pth", keep_previous=False)
            journal.write(stats, **{f"train_{name}": value for name, value in speeds.items()})
            if due:
                self._save(keep_previous=False)  # last: a run killed in between evaluates again
        logger.info("Training time %s", timedelta(seconds=int(time.perf_counter() - began)))

    def _train_epoch(
        self, model: nn.Module, *, save_at_end: bool
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Trains the rest of the epoch; saves if interrupted and, if asked, at the end."""
        args, world, run = self.args, self.world, self.run
        position, begun = run.position, run.position.step
        images_per_process = args.batch_size * args.grad_accum_steps
        self.loader.sampler.set_epoch(position.epoch, begun * images_per_process)
        try:
            result = train_one_epoch(
                model,
                self.criterion,
                self.loader,
                run.optimizer,
                position,
                world=world,
                steps=self.steps,
                epochs=args.epochs,
                images_per_step=images_per_process * world.size,
                set_lr=self._set_lr,
                batch_transform=self.batch_transform,
                scaler=run.scaler,
                amp_dtype=amp_dtype(args, world),
                accumulate=args.grad_accum_steps,
                clip_grad=args.clip_grad,
                after_step=partial(run.ema.update, run.model) if run.ema else (lambda: None),
                train_mode=args.train_mode,
                seed=args.seed,
                stop=self.stop,
            )
        except Interrupted:
            self._save()
            raise
        if save_at_end and position.step > begun:  # so that a failing evaluation costs no epoch
            self._save()
        return result

    def _set_lr(self, epoch: int, step: int) -> None:
        if self.run.scheduler is None:
            return
        if self.args.sched_on_updates:
            self.run.scheduler.step_update(epoch * self.steps + step)
        else:
            self.run.scheduler.step(epoch)

    def _evaluate(self) -> dict[str, float]:
        """Test statistics of the weights and, as `ema_*`, of their moving average."""
        run, images = self.run, len(self.eval_loader.dataset)
        score = partial(evaluate, loader=self.eval_loader, world=self.world, images=images,
                        amp_dtype=amp_dtype(self.args, self.world), stop=self.stop)  # fmt: skip
        stats, _ = score(run.model)
        accuracy = "Accuracy of the %s on the %d test images: %.1f%%"
        logger.info(accuracy, "network", images, stats["acc1"])
        if run.ema:
            average = run.ema.module.to(self.world.device)
            ema_stats, _ = score(average)
            if self.args.model_ema_force_cpu:
                average.to("cpu")
            logger.info(accuracy, "EMA", images, ema_stats["acc1"])
            stats |= {f"ema_{name}": value for name, value in ema_stats.items()}
        return stats

    def _folder(self) -> Path | None:
        """Where this process writes."""
        return Path(self.args.output_dir) if self.args.output_dir and self.world.is_main else None

    def _open_journal(self) -> Journal:
        folder = self._folder()
        if folder and self.args.overwrite and not goes_on(self.args):
            for name in RUN_FILES:
                (folder / name).unlink(missing_ok=True)
        facts = {"args": vars(self.args), "data_config": self.run.facts["data_config"],
                 "world_size": self.world.size, **provenance()}  # fmt: skip
        return Journal(folder, facts, self.run.position.epoch)

    def _save(self, name: str = "checkpoint.pth", **options: bool) -> None:
        if folder := self._folder():
            checkpoint.save(self.run.state(vars(self.args)), folder / name, **options)

    def _leave(self) -> NoReturn:
        position = self.run.position
        left = "go on by --resume auto" if self.args.output_dir else "unsaved, without --output_dir"
        logger.info("Stopped at epoch %d, step %d: %s", position.epoch, position.step, left)
        sys.exit(self.stop.exit_code)


def batch_transform(args: argparse.Namespace, num_classes: int) -> Callable:
    return build_batch_transform(
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        smoothing=label_smoothing(args),
        num_classes=num_classes,
        cosub=args.cosub,
    )


def main(args: argparse.Namespace) -> None:
    held = ExitStack()

    def build(peers: Peers) -> Callable[[], None]:
        peers.agree(shared_arguments(args), "give them the same arguments")
        check_args(args)
        if args.deterministic:
            make_deterministic()
        world = init_distributed(args.device, peers)
        if args.output_dir:
            require_writable(Path(args.output_dir), world)
            if not args.eval:
                held.enter_context(only_run_in(Path(args.output_dir), world))
            check_no_other_run(args)
        return Evaluation(args, world).run if args.eval else Training(args, world).fit

    with held:
        run_command("main.py", build, args.dist_url)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
