"""Trains and evaluates LION (and any timm model) on images, with DeiT's command line."""

import argparse
import difflib
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import checkpoint
import models_hydra  # noqa: F401  (these register the models)
import models_lion  # noqa: F401
import models_vim  # noqa: F401
from augment import build_batch_transform, build_eval_transform, build_train_transform
from datasets import (
    ALIASES,
    DATASETS,
    INAT_CATEGORIES,
    DeviceLoader,
    SeededDataset,
    build_dataset,
    ignore_signals,
)
from engine import Position, Run, evaluate, train_one_epoch
from losses import DistillationLoss, build_base_loss, load_teacher
from samplers import EpochSampler, ShardSampler
from utils import (
    BothSpellings,
    Interrupted,
    Journal,
    KeyValues,
    StopSignal,
    World,
    init_distributed,
    peak_memory,
    provenance,
    run_command,
    seed_everything,
    true_or_false,
    write_scores,
)

logger = logging.getLogger(__name__)

LION_ARGUMENTS = ("mask_type", "order", "format", "chunk_size", "pos_emb", "cls_tok")
RUN_FILES = ("log.txt", "checkpoint.pth", "checkpoint.previous.pth", "best_checkpoint.pth")


def get_args_parser() -> argparse.ArgumentParser:
    parser = BothSpellings("main.py", description=__doc__, allow_abbrev=False)
    add, switch = parser.add_argument, parser.add_switch
    add("--batch-size", default=64, type=int, help="images per process and accumulation step")
    add("--epochs", default=300, type=int)
    add("--grad-accum-steps", default=1, type=int, help="batches per optimiser step")
    add("--bce-loss", action="store_true", help="binary cross-entropy (DeiT III), unsmoothed")
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch size")
    # Model
    add("--model", default="deit_base_patch16_224", help="a LION, Hydra, Vim or any timm model")
    add("--input-size", default=224, type=int, help="pixels")
    add("--mask_type", default="Decay", choices=("Lit", "Decay", "Selective"))
    add("--order", default="Normal", choices=("Normal", "S"), help="S: two snake curves")
    add("--format", default="Attention", choices=("Attention", "RNN", "Chunk"))
    add("--chunk_size", default=32, type=int, help="tokens per chunk of --format Chunk")
    flag = {"type": true_or_false, "nargs": "?", "const": True, "default": False}
    add("--pos_emb", **flag, help="learned position embedding")
    add("--cls_tok", **flag, help="classify the class token, not the mean of all tokens")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="more arguments for the model, such as patch_size=4")  # fmt: skip
    add("--drop", default=0.0, type=float, help="dropout before the head")
    add("--drop-path", default=0.1, type=float, help="stochastic depth")
    switch("model-ema", True, "keep and evaluate an exponential moving average of the weights")
    add("--model-ema-decay", default=0.99996, type=float)
    add("--model-ema-force-cpu", action="store_true", help="keep the average in host memory")
    # Optimiser and schedule
    add("--opt", default="adamw")
    add("--opt-eps", default=1e-8, type=float)
    add("--opt-betas", default=None, type=float, nargs="+")
    add("--clip-grad", default=None, type=float, help="largest gradient norm")
    add("--momentum", default=0.9, type=float)
    add("--weight-decay", default=0.05, type=float)
    add("--layer-decay", default=None, type=float, help="learning rate factor per layer")
    add("--sched", default="cosine")
    add("--sched-on-updates", action="store_true", help="schedule by step instead of by epoch")
    add("--lr", default=5e-4, type=float, help="for an effective batch of 512, scaled to others")
    add("--lr-noise", default=None, type=float, nargs="+")
    add("--lr-noise-pct", default=0.67, type=float)
    add("--lr-noise-std", default=1.0, type=float)
    add("--warmup-lr", default=1e-6, type=float)
    add("--min-lr", default=1e-5, type=float)
    add("--decay-epochs", default=30, type=float)
    add("--warmup-epochs", default=5, type=int)
    add("--cooldown-epochs", default=10, type=int)
    add("--patience-epochs", default=10, type=int)
    add("--decay-rate", "--dr", default=0.1, type=float)
    # Augmentation
    add("--no-aug", action="store_true", help="train on the images as evaluation sees them")
    add("--color-jitter", default=0.3, type=float)
    add("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy, or none")
    add("--smoothing", default=0.1, type=float, help="label smoothing")
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"))
    switch("repeated-aug", True, "draw each image three times")
    switch("train-mode", True, "train mode of dropout and stochastic depth")
    add("--ThreeAugment", action="store_true", help="3-Augment (DeiT III)")
    add("--src", action="store_true", help="simple random crop (DeiT III)")
    add("--reprob", default=0.25, type=float, help="probability of random erasing")
    add("--remode", default="pixel")
    add("--recount", default=1, type=int)
    add("--resplit", action="store_true", help="accepted for DeiT's scripts; DeiT ignores it too")
    add("--mixup", default=0.8, type=float)
    add("--cutmix", default=1.0, type=float)
    add("--cutmix-minmax", default=None, type=float, nargs="+")
    add("--mixup-prob", default=1.0, type=float)
    add("--mixup-switch-prob", default=0.5, type=float)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--cosub", action="store_true", help="cooperative submodels")
    # Distillation and fine-tuning
    add("--teacher-model", default="regnety_160")
    add("--teacher-path", default="")
    add("--distillation-type", default="none", choices=("none", "soft", "hard"))
    add("--distillation-alpha", default=0.5, type=float)
    add("--distillation-tau", default=1.0, type=float)
    add("--finetune", default="", help="weights to start from")
    add("--attn-only", action="store_true", help="train the mixers and the head only")
    # Data
    add("--data-path", default="/datasets01/imagenet_full_size/061417/")
    add("--data-set", default="IMNET", choices=(*DATASETS, *ALIASES))
    add("--inat-category", default="name", choices=INAT_CATEGORIES)
    add("--eval-crop-ratio", default=0.875, type=float)
    add("--num_workers", default=10, type=int, help="at most one per CPU core is started")
    switch("pin-mem", True, "pinned host memory for faster copies to the GPU")
    # Run
    add("--output_dir", default="", help="folder for checkpoints and logs; empty for none")
    add("--overwrite", action="store_true", help="replace the run in --output_dir")
    add("--resume", default="", help="checkpoint (file or URL), or auto: that of --output_dir")
    add("--start_epoch", default=0, type=int)
    add("--eval", action="store_true", help="evaluate only")
    add("--use-ema", action="store_true", help="evaluate the moving average of --resume")
    add("--dist-eval", action="store_true", help="accepted for DeiT's scripts: always on, exact")
    add("--seed", default=0, type=int)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    switch("amp", True, "mixed precision on a GPU")
    add("--amp-dtype", default="bfloat16", choices=("bfloat16", "float16"))
    add("--torchcompile", nargs="?", const="inductor", default=None, metavar="BACKEND")
    add("--channels-last", action="store_true")
    add("--distributed", action="store_true", help="accepted for DeiT's scripts: torchrun decides")
    add("--world_size", default=1, type=int, help="accepted for DeiT's scripts: torchrun decides")
    add("--dist_url", default="env://", help="how processes find each other")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises ValueError for what can be told to be wrong before anything is read."""
    for name in ("batch_size", "epochs", "grad_accum_steps", "chunk_size", "input_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    for name in ("drop", "drop_path"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} must be in [0, 1), not {getattr(args, name)}.")
    for name in ("opt_betas", "cutmix_minmax"):
        if len(getattr(args, name) or (0, 0)) < 2:
            raise ValueError(f"--{name} takes two numbers, not one.")
    if args.start_epoch < 0:
        raise ValueError(f"--start_epoch must not be negative, but is {args.start_epoch}.")
    if args.sched == "plateau":
        raise ValueError("--sched plateau is deprecated in timm: use cosine, step or poly, say.")
    backends = (*torch._dynamo.list_backends(), "eager", "aot_eager")
    if args.torchcompile and args.torchcompile not in backends:
        raise ValueError(f"There is no compiler {args.torchcompile!r}: use --torchcompile alone.")
    check_model(args)
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    if mixes and args.batch_size % 2 and not args.eval:
        raise ValueError(
            f"Mixup and CutMix pair the images of a batch: --batch-size {args.batch_size} must be "
            "even, or use --mixup 0 --cutmix 0."
        )
    if args.distillation_type != "none" and not args.eval:
        if args.cosub:
            raise ValueError("--cosub and --distillation-type exclude each other: choose one.")
        if not args.teacher_path:
            raise ValueError(
                f"--distillation-type {args.distillation_type} needs --teacher-path: a checkpoint "
                "of --teacher-model (file or URL), or timm: for timm's pretrained weights."
            )
    if args.use_ema and not (args.eval and args.resume):
        raise ValueError("--use-ema goes with --eval --resume PATH.")
    if args.resume == "auto" and not args.output_dir:
        raise ValueError("--resume auto needs the --output_dir of the run.")
    if args.output_dir and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} is a file: choose a folder.")
    if args.output_dir and not (args.eval or args.resume or args.overwrite):
        found = [name for name in RUN_FILES if Path(args.output_dir, name).exists()]
        if found:
            raise ValueError(
                f"{args.output_dir} holds another run ({', '.join(found)}): go on with it by "
                "--resume auto, replace it by --overwrite, or choose another --output_dir."
            )


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError for an unknown --model, or one that has no use for LION's arguments."""
    if not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        hint = f": did you mean {' or '.join(close)}?" if close else "; see timm.list_models()."
        raise ValueError(f"There is no model {args.model!r}{hint}")
    default = get_args_parser().get_default
    given = [f"--{name}" for name in LION_ARGUMENTS if getattr(args, name) != default(name)]
    if given and not args.model.startswith("lion_"):
        raise ValueError(
            f"{args.model} takes no {', '.join(given)}: only lion_* models do; others have "
            "--model-kwargs."
        )


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    name = args.model
    if args.distillation_type != "none" and "distilled" not in name:
        name = name.replace("_patch16", "_distilled_patch16")
        if not timm.is_model(name) or name == args.model:
            raise ValueError(
                f"{args.model} has no distilled variant: use a lion_*, hydra_*, vim_* or deit_* "
                "model."
            )
        logger.info("Distillation needs a distillation token: building %s", name)
    options = {
        "num_classes": num_classes,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
    }
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = args.input_size
    if name.startswith("lion_"):
        options |= {name: getattr(args, name) for name in LION_ARGUMENTS}
    try:
        model = timm.create_model(name, **{**options, **args.model_kwargs})
    except (TypeError, AssertionError) as error:
        raise ValueError(
            f"{name} cannot be built with these arguments ({error}): "
            "check --model-kwargs and --input-size."
        ) from error
    if args.distillation_type != "none":
        model.set_distilled_training()
    return model


def build_criterion(args: argparse.Namespace, num_classes: int, world: World) -> nn.Module:
    teacher = None
    if args.distillation_type != "none":
        teacher = load_teacher(
            args.teacher_model,
            args.teacher_path,
            num_classes=num_classes,
            input_size=args.input_size,
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
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
    return 0.0 if args.bce_loss else args.smoothing  # it would make every class present


def train_transform(args: argparse.Namespace) -> Callable:
    if args.no_aug:
        return eval_transform(args)
    return build_train_transform(
        input_size=args.input_size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        color_jitter=args.color_jitter,
        aa=args.aa,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        three_augment=args.ThreeAugment,
        simple_random_crop=args.src,
    )


def eval_transform(args: argparse.Namespace) -> Callable:
    return build_eval_transform(
        input_size=args.input_size,
        crop_ratio=args.eval_crop_ratio,
    )


def build_train_loader(args: argparse.Namespace, world: World) -> tuple[DataLoader, int]:
    images, num_classes = find_images(args, world, train=True)
    sampler = EpochSampler(
        len(images),
        num_replicas=world.size,
        rank=world.rank,
        repeats=3 if args.repeated_aug else 1,
        seed=args.seed,
    )
    if len(sampler) < args.batch_size * args.grad_accum_steps:
        raise ValueError(
            f"One step draws {args.batch_size * args.grad_accum_steps} images per process, but an "
            f"epoch of {args.data_set} has only {len(sampler)}: lower --batch-size."
        )
    dataset = SeededDataset(images, train_transform(args), seed=args.seed)
    return DeviceLoader(dataset, args.batch_size, sampler=sampler, drop_last=True,
                        **loader_options(args, world)), num_classes  # fmt: skip


def build_eval_loader(args: argparse.Namespace, world: World) -> tuple[DataLoader, int]:
    images, num_classes = find_images(args, world, train=False, transform=eval_transform(args))
    sampler = ShardSampler(len(images), num_replicas=world.size, rank=world.rank)
    return DeviceLoader(images, int(1.5 * args.batch_size), sampler=sampler,
                        **loader_options(args, world)), num_classes  # fmt: skip


def find_images(args: argparse.Namespace, world: World, **kwargs: Any) -> tuple[Dataset, int]:
    with world.main_first():
        return build_dataset(
            args.data_set, args.data_path, inat_category=args.inat_category, **kwargs
        )


def loader_options(args: argparse.Namespace, world: World) -> dict[str, Any]:
    workers = min(args.num_workers, os.cpu_count() or 1)
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": args.pin_mem and world.device.type == "cuda",
        "worker_init_fn": ignore_signals,
        "device": world.device,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }


def read_checkpoint(args: argparse.Namespace) -> tuple[dict[str, Any], str] | None:
    """What --resume names, checked to be of the same kind of model; None if there is nothing."""
    if args.resume == "auto":
        found = checkpoint.latest(args.output_dir)
        if found is None:
            return None
        saved, source = found[0], str(found[1])
    else:
        saved, source = checkpoint.load(args.resume), args.resume
    # The weights' names and shapes tell most differences; not this one.
    differing = checkpoint.difference(saved.get("args") or {}, vars(args), ("cls_tok",))
    if differing and args.model.startswith("lion_"):
        raise ValueError(f"{source} is of another model: {'; '.join(differing)}.")
    return saved, source


def check_same_steps(
    args: argparse.Namespace, world: World, saved: dict[str, Any], source: str
) -> None:
    """Raises ValueError if a checkpoint from mid-epoch counts other steps than this run."""
    if not saved.get("step"):
        return
    names = ("batch_size", "grad_accum_steps", "repeated_aug", "seed")
    differing = checkpoint.difference(saved["args"], vars(args), names)
    if len(saved["meters"]) != world.size:
        differing.append(f"processes: checkpoint {len(saved['meters'])}, now {world.size}")
    if differing:
        raise ValueError(
            f"{source} was saved in the middle of an epoch, which has to end as it began "
            f"({'; '.join(differing)})."
        )


def start_from(source: str, model: nn.Module) -> None:
    """Loads what a checkpoint (--finetune) shares with the model, and says what it does not."""
    weights = checkpoint.weights_of(checkpoint.load(source), source=source)
    for note in checkpoint.adapt_weights(model, weights, source):
        logger.info("Fine-tuning from %s: %s", source, note)


def build_run(
    args: argparse.Namespace, world: World, model: nn.Module, steps: int
) -> tuple[Run, Callable[[int, int], None]]:
    """The state of a run and `set_lr(epoch, step)`."""
    ema = None
    if args.model_ema:
        device = "cpu" if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, decay=args.model_ema_decay, device=device)
    batch = args.batch_size * world.size * args.grad_accum_steps
    lr = args.lr if args.unscale_lr else args.lr * batch / 512
    logger.info(
        "Effective batch size %d (%d per process x %d processes x %d accumulation steps), "
        "learning rate %.4g",
        batch, args.batch_size, world.size, args.grad_accum_steps, lr,
    )  # fmt: skip
    if args.attn_only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".attn." in name or name.startswith(("head", "pos_embed"))
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), "lr": lr})
    schedule = {**scheduler_kwargs(args), "updates_per_epoch": steps}
    scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    if scheduler is None and args.sched != "none":  # timm < 1.0.31 does not mind
        raise ValueError(f"Unknown scheduler {args.sched!r}.")
    scaler = torch.amp.GradScaler(
        world.device.type, enabled=amp_dtype(args, world) is torch.float16
    )

    def set_lr(epoch: int, step: int) -> None:
        if scheduler is None:
            return
        if args.sched_on_updates:
            scheduler.step_update(epoch * steps + step)
        elif step == 0:
            scheduler.step(epoch)

    return Run(model, ema, optimizer, scheduler, scaler, Position(args.start_epoch)), set_lr


def amp_dtype(args: argparse.Namespace, world: World) -> torch.dtype | None:
    return getattr(torch, args.amp_dtype) if args.amp and world.device.type == "cuda" else None


def evaluate_only(args: argparse.Namespace, world: World) -> Callable[[], None]:
    """Reads and checks all that --eval needs; the returned function does the work."""
    loader, num_classes = build_eval_loader(args, world)
    model = build_model(args, num_classes)
    if args.resume and (found := read_checkpoint(args)):
        saved, source = found
        state = checkpoint.weights_of(saved, ema=args.use_ema, source=source)
        checkpoint.load_weights(model, state, source)
    model.to(world.device)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)

    def work() -> None:
        images = len(loader.dataset)
        per_class = torch.zeros(num_classes, 2, dtype=torch.float64, device=world.device)
        with peak_memory(world.device) as memory:
            stats, images_per_second = evaluate(
                model,
                loader,
                world=world,
                images=images,
                amp_dtype=amp_dtype(args, world),
                per_class=per_class,
            )
        logger.info("Accuracy of the network on the %d test images: %.1f%%", images, stats["acc1"])
        logger.info(
            "Evaluation took %.2f s (%.1f images/s), peak memory %.0f MiB",
            images / images_per_second, images_per_second, memory.bytes / 2**20,
        )  # fmt: skip
        if args.output_dir and world.is_main:
            facts = {**stats, "images": images, "args": vars(args), **provenance()}
            write_scores(Path(args.output_dir), facts, loader.dataset.classes, per_class.tolist())

    return work


def train(args: argparse.Namespace, world: World) -> Callable[[], None]:
    """Reads and checks all that training needs; the returned function does the work."""
    train_loader, num_classes = build_train_loader(args, world)
    eval_loader, _ = build_eval_loader(args, world)
    seed_everything(args.seed)
    model = build_model(args, num_classes)
    if args.finetune:
        start_from(args.finetune, model)
    model.to(world.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    steps = len(train_loader.sampler) // (args.batch_size * args.grad_accum_steps)
    run, set_lr = build_run(args, world, model, steps)
    if args.resume and (found := read_checkpoint(args)):
        check_same_steps(args, world, *found)
        run.restore(*found)
    batch_transform = build_batch_transform(
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
    one_epoch = partial(
        train_one_epoch,
        criterion=build_criterion(args, num_classes, world),
        loader=train_loader,
        optimizer=run.optimizer,
        world=world,
        steps=steps,
        set_lr=set_lr,
        images_per_step=args.batch_size * args.grad_accum_steps * world.size,
        batch_transform=batch_transform,
        scaler=run.scaler,
        amp_dtype=amp_dtype(args, world),
        accumulate=args.grad_accum_steps,
        clip_grad=args.clip_grad,
        after_step=partial(run.ema.update, model) if run.ema else (lambda: None),
        train_mode=args.train_mode,
        seed=args.seed,
    )
    return partial(fit, args, world, run, one_epoch, train_loader.sampler, eval_loader)


def fit(
    args: argparse.Namespace,
    world: World,
    run: Run,
    one_epoch: Callable[..., tuple[dict[str, float], float]],
    sampler: EpochSampler,
    eval_loader: DataLoader,
) -> None:
    """The epochs that are left: train, evaluate, log, save. Saves before leaving on a signal."""
    stop, position = StopSignal(), run.position
    folder = Path(args.output_dir) if args.output_dir and world.is_main else None
    if folder and args.overwrite and not args.resume:
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
    facts = {"args": vars(args), "world_size": world.size, **provenance()}
    journal = Journal(folder, facts, position.epoch)
    model = distributed_and_compiled(args, world, run.model)
    n_parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    logger.info("number of params: %d", n_parameters)
    logger.info("Start training for %d epochs", args.epochs - position.epoch)
    began = time.perf_counter()
    while position.epoch < args.epochs:
        sampler.set_epoch(position.epoch, position.step * args.batch_size * args.grad_accum_steps)
        try:
            train_stats, images_per_second = one_epoch(model, position=position, stop=stop)
            test_stats = evaluate_weights(args, world, run, eval_loader, stop)
        except Interrupted:
            if folder:
                checkpoint.save(run.state(vars(args)), folder / "checkpoint.pth")
            logger.info("Stopped at epoch %d, step %d: go on by --resume auto", position.epoch,
                        position.step)  # fmt: skip
            sys.exit(stop.exit_code)
        is_best = test_stats["acc1"] >= run.max_accuracy
        run.max_accuracy = max(run.max_accuracy, test_stats["acc1"])
        logger.info("Max accuracy: %.2f%%", run.max_accuracy)
        stats = {
            **{f"train_{name}": value for name, value in train_stats.items()},
            **{f"test_{name}": value for name, value in test_stats.items()},
            "epoch": position.epoch,
            "n_parameters": n_parameters,
        }
        run.position = position = Position(position.epoch + 1)
        if folder:  # the checkpoint last: a run killed in between repeats the epoch
            state = run.state(vars(args))
            if is_best:
                checkpoint.save(state, folder / "best_checkpoint.pth", keep_previous=False)
            journal.write(stats, train_images_per_second=images_per_second)
            checkpoint.save(state, folder / "checkpoint.pth")
    logger.info("Training time %s", timedelta(seconds=int(time.perf_counter() - began)))


def distributed_and_compiled(
    args: argparse.Namespace, world: World, model: nn.Module
) -> Callable[..., Any]:
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices)
    return torch.compile(model, backend=args.torchcompile) if args.torchcompile else model


def evaluate_weights(
    args: argparse.Namespace, world: World, run: Run, loader: DataLoader, stop: StopSignal
) -> dict[str, float]:
    """Test statistics of the weights, and as `ema_*` of their moving average."""
    if world.size > 1:  # running averages of batch normalisation differ between processes
        distribute_bn(run.model, world.size)
    images = len(loader.dataset)
    score = partial(evaluate, loader=loader, world=world, images=images,
                    amp_dtype=amp_dtype(args, world), stop=stop)  # fmt: skip
    stats, _ = score(run.model)
    logger.info("Accuracy of the network on the %d test images: %.1f%%", images, stats["acc1"])
    if run.ema:
        average = run.ema.module.to(world.device)
        ema_stats, _ = score(average)
        if args.model_ema_force_cpu:
            average.to("cpu")
        logger.info("Accuracy of the EMA on the %d test images: %.1f%%", images, ema_stats["acc1"])
        stats |= {f"ema_{name}": value for name, value in ema_stats.items()}
    return stats


def main(args: argparse.Namespace) -> None:
    def build() -> Callable[[], None]:
        check_args(args)
        world = init_distributed(args.device, args.dist_url)
        return (evaluate_only if args.eval else train)(args, world)

    run_command("main.py", build)


if __name__ == "__main__":
    main(get_args_parser().parse_args())
