"""The command line of main.py: its arguments, their ranges, and what can be refused at once."""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

import models_timm
from argument_parser import ArgumentParser, KeyValues, check_ranges, true_or_false
from compilation import check_compiler
from curves import ORDERS, check_order
from datasets import ALIASES, DATASETS, INAT_CATEGORIES
from decays import DECAY_INITS
from device_augment import RandAugment
from errors import UserError, as_user_error, told_as
from journal import RUN_FILES
from models_lion import FEATURE_MAPS, FORMATS
from models_lion_plus import PLUS
from optimization import create_optimizer, state_for
from preprocessing import CROPS, FILTERS, SMALL_IMAGE

DESCRIPTION = "Trains and evaluates LION (and any timm model) on images, with DeiT's command line."
OF_GATES = ("gate_lr_scale", "gate_weight_decay")
PREPROCESSING_ARGUMENTS = {  # of the fields of Preprocessing
    "crop_pct": "eval_crop_ratio",
    **{name: name for name in ("crop_mode", "interpolation", "mean", "std")},
}
HOW_MANY = {
    "opt_betas": (2, 3),
    "cutmix_minmax": (2, 2),
    "lr_noise": (1, 2),
}  # fewest, most numbers
WORDS = {1: "one", 2: "two", 3: "three"}
OVERRULED = {  # by an argument, and so without effect beside it
    "no_aug": ("aa", "color_jitter", "train_interpolation", "ThreeAugment", "src", "reprob",
               "remode", "recount"),
    "ThreeAugment": ("aa", "reprob", "remode", "recount"),
    "bce_loss": ("smoothing",),
}  # fmt: skip
NODE_ARGUMENTS = ("data_path", "device", "num_workers", "pin_mem")  # nodes may differ in these
Add = Callable[..., Any]


@cache  # making one takes milliseconds
def _parser() -> ArgumentParser:
    return get_args_parser()


def option(name: str) -> str:
    """The option of an argument, as --help spells it."""
    return _parser().names[name][0]


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(
        "main.py",
        usage="%(prog)s [options]",
        description=DESCRIPTION,
        epilog="Names may be written with dashes or underscores alike.",
        allow_abbrev=False,
    )
    for title, add_group in (
        ("LION", _add_lion),
        ("model", _add_model),
        ("data", _add_data),
        ("training", _add_training),
        ("optimiser", _add_optimizer),
        ("learning rate schedule", _add_schedule),
        ("augmentation", _add_augmentation),
        ("Mixup and CutMix", _add_mixup),
        ("distillation and fine-tuning", _add_transfer),
        ("run and evaluation", _add_run),
        ("device", _add_device),
        ("accepted for DeiT's scripts, without effect", _add_ignored),
    ):
        add_group(*parser.in_group(title))
    return parser


def _add_lion(add: Add, _: Add) -> None:
    add("--mask_type", default="Decay", choices=tuple(FEATURE_MAPS),
        help="no decay (LION-Lit), learned decays (LION-D), or gates (LION-S)")  # fmt: skip
    add("--order", default="Normal",
        help=f"of the patches: Normal, {', '.join(ORDERS)}, or several joined by +")  # fmt: skip
    add("--format", default="Attention", choices=tuple(FORMATS),
        help="how the same function is computed")  # fmt: skip
    add("--chunk_size", default=32, type=int, within="[1, inf)",
        help="tokens per chunk of --format Chunk")  # fmt: skip
    add("--decay-init", default="paper", choices=DECAY_INITS, help="how decays and gates start")
    add("--plus", nargs="+", default=[], choices=PLUS, help="what goes beyond the paper's LION")
    flag = {"type": true_or_false, "nargs": "?", "const": True, "default": False,
            "metavar": "True|False"}  # fmt: skip
    add("--pos_emb", **flag, help="learned position embedding")
    add("--cls_tok", **flag, help="classify the class token, not the mean of all tokens")
    add("--gate-lr-scale", default=1.0, type=float, within="[0, inf)",
        help="learning rate factor of decays and gates")  # fmt: skip
    add("--gate-weight-decay", default=None, type=float, within="[0, inf)",
        otherwise="as for all", help="weight decay of decays and gates")  # fmt: skip


def _add_model(add: Add, switch: Add) -> None:
    add("--model", default="deit_base_patch16_224", metavar="NAME",
        help="a LION, Hydra, Vim or any timm model")  # fmt: skip
    add("--input-size", default=224, type=int, within="[1, inf)",
        otherwise="224, or that of --resume", help="pixels of an image's side")  # fmt: skip
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="more arguments for the model, such as patch_size=4")  # fmt: skip
    add("--drop", default=0.0, type=float, within="[0, 1)", help="dropout before the head")
    add("--drop-path", default=0.1, type=float, within="[0, 1)", help="stochastic depth")
    switch("train-mode", True, "train mode of dropout and stochastic depth")
    switch("model-ema", True, "keep and evaluate an exponential moving average of the weights")
    add("--model-ema-decay", default=0.99996, type=float, within="[0, 1]",
        help="share of the average that each step keeps")  # fmt: skip
    add("--model-ema-force-cpu", action="store_true", help="keep the average in host memory")


def _add_data(add: Add, switch: Add) -> None:
    add("--data-path", default="/datasets01/imagenet_full_size/061417/", metavar="FOLDER",
        help="folder of the images")  # fmt: skip
    add("--data-set", default="IMNET", choices=(*DATASETS, *ALIASES),
        help="IMNET: class folders; DEMO: no files; CIFAR is CIFAR100, INAT INAT18")  # fmt: skip
    add("--inat-category", default="name", choices=INAT_CATEGORIES,
        help="level of iNaturalist's taxonomy that the labels name")  # fmt: skip
    add("--holdout", default=0, type=int, within="[0, inf)",
        help="training images to leave out, and to evaluate on")  # fmt: skip
    own = {"default": None, "otherwise": "the checkpoint's, else the model's"}
    add("--eval-crop-ratio", "--crop-pct", **{**own, "default": 0.875}, type=float, within="(0, 1]",
        help="share of the shorter side that evaluation keeps, 0.875 in DeiT")  # fmt: skip
    add("--crop-mode", **own, choices=CROPS, help="crop of evaluation")
    add("--interpolation", **own, choices=FILTERS, help="filter by which evaluation resizes")
    add("--mean", **own, type=float, nargs=3, within="(-inf, inf)", help="means of the channels")
    add("--std", **own, type=float, nargs=3, within="(0, inf)",
        help="standard deviations of the channels")  # fmt: skip
    add("--cache", action="store_true",
        help="keep small images on the device and augment whole batches there")  # fmt: skip
    add("--num_workers", default=10, type=int, within="[0, inf)",
        help="processes that load images, at most one per CPU core")  # fmt: skip
    switch("pin-mem", True, "pinned host memory for faster copies to the GPU")


def _add_training(add: Add, _: Add) -> None:
    add("--batch-size", default=64, type=int, within="[1, inf)",
        help="images per process and accumulation step")  # fmt: skip
    add("--epochs", default=300, type=int, within="[1, inf)", help="passes over the images")
    add("--grad-accum-steps", default=1, type=int, within="[1, inf)",
        help="batches per optimiser step")  # fmt: skip
    add("--bce-loss", action="store_true", help="binary cross-entropy (DeiT III), unsmoothed")
    add("--smoothing", default=0.1, type=float, within="[0, 1)", help="label smoothing")
    add("--cosub", action="store_true", help="cooperative submodels")
    add("--seed", default=0, type=int, within="[0, 4294967296)",
        help="of weights, order, augmentation and dropout")  # fmt: skip


def _add_optimizer(add: Add, _: Add) -> None:
    add("--opt", default="adamw", metavar="NAME", help="optimiser, one of timm's")
    add("--opt-eps", default=1e-8, type=float, within="[0, inf)",
        help="epsilon of the optimiser")  # fmt: skip
    add("--opt-betas", default=None, type=float, within="[0, 1)", nargs="+",
        otherwise="the optimiser's own", help="decays of the optimiser's moments")  # fmt: skip
    add("--momentum", default=0.9, type=float, within="[0, 1)", help="of SGD and its kind")
    add("--weight-decay", default=0.05, type=float, within="[0, inf)", help="weight decay")
    add("--clip-grad", default=None, type=float, within="(0, inf)", help="largest gradient norm")
    add("--layer-decay", default=None, type=float, within="(0, 1]",
        help="learning rate factor per layer")  # fmt: skip


def _add_schedule(add: Add, _: Add) -> None:
    add("--lr", default=5e-4, type=float, within="[0, inf)",
        help="learning rate for an effective batch of 512, scaled to others")  # fmt: skip
    add("--unscale-lr", action="store_true", help="take --lr as it is, whatever the batch size")
    add("--sched", default="cosine", metavar="NAME", help="schedule, one of timm's, or none")
    add("--sched-on-updates", action="store_true", help="schedule by step instead of by epoch")
    add("--warmup-epochs", default=5, type=int, within="[0, inf)",
        help="epochs in which the rate rises from --warmup-lr")  # fmt: skip
    add("--warmup-lr", default=1e-6, type=float, within="[0, inf)", help="rate at the start")
    add("--min-lr", default=1e-5, type=float, within="[0, inf)", help="rate at the end")
    add("--decay-epochs", default=30, type=float, within="(0, inf)",
        help="epochs between two decays of --sched step")  # fmt: skip
    add("--decay-milestones", default=[90, 180, 270], type=int, within="[1, inf)", nargs="+",
        help="epochs of the decays of --sched multistep")  # fmt: skip
    add("--decay-rate", "--dr", default=0.1, type=float, within="(0, inf)",
        help="factor of each decay of --sched step, multistep and poly")  # fmt: skip
    add("--lr-noise", default=None, type=float, within="[0, 1]", nargs="+",
        help="share of the epochs from which, or between which, the rate is noisy")  # fmt: skip
    add("--lr-noise-pct", default=0.67, type=float, within="(0, 1]",
        help="largest change of the rate by noise")  # fmt: skip
    add("--lr-noise-std", default=1.0, type=float, within="[0, inf)",
        help="standard deviation of that noise")  # fmt: skip


def _add_augmentation(add: Add, switch: Add) -> None:
    add("--no-aug", action="store_true", help="train on the images as evaluation sees them")
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY",
        help="policy of RandAugment or AutoAugment, or none")  # fmt: skip
    add("--color-jitter", default=0.3, type=float, within="[0, inf)",
        help="strength, without --aa or with --ThreeAugment")  # fmt: skip
    add("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"),
        otherwise="that of evaluation", help="filter by which training resizes")  # fmt: skip
    switch("repeated-aug", True, "draw each image three times")
    add("--ThreeAugment", action="store_true", help="3-Augment (DeiT III)")
    add("--src", action="store_true", help="simple random crop (DeiT III)")
    add("--reprob", default=0.25, type=float, within="[0, 1]", help="probability of random erasing")
    add("--remode", default="pixel", metavar="MODE",
        help="what erased regions hold: const, rand or pixel")  # fmt: skip
    add("--recount", default=1, type=int, within="[1, inf)", help="most regions erased of an image")


def _add_mixup(add: Add, _: Add) -> None:
    add("--mixup", default=0.8, type=float, within="[0, inf)", help="alpha of Mixup; 0 for none")
    add("--cutmix", default=1.0, type=float, within="[0, inf)", help="alpha of CutMix; 0 for none")
    add("--cutmix-minmax", default=None, type=float, within="[0, 1]", nargs="+",
        help="least and largest share of a side that CutMix pastes")  # fmt: skip
    add("--mixup-prob", default=1.0, type=float, within="[0, 1]",
        help="probability that a batch is mixed")  # fmt: skip
    add("--mixup-switch-prob", default=0.5, type=float, within="[0, 1]",
        help="probability of CutMix where both are on")  # fmt: skip
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"),
        help="what is mixed alike: the batch, pairs or single images")  # fmt: skip


def _add_transfer(add: Add, _: Add) -> None:
    add("--distillation-type", default="none", choices=("none", "soft", "hard"),
        help="learn the teacher's probabilities (soft) or its decisions (hard)")  # fmt: skip
    add("--teacher-model", default="regnety_160", metavar="NAME", help="the teacher, a timm model")
    add("--teacher-path", default="", metavar="PATH",
        help="its checkpoint (file, URL or hf-hub:NAME), or timm: for timm's weights")  # fmt: skip
    add("--distillation-alpha", default=0.5, type=float, within="[0, 1]",
        help="weight of the teacher in the loss")  # fmt: skip
    add("--distillation-tau", default=1.0, type=float, within="(0, inf)",
        help="temperature of soft distillation")  # fmt: skip
    add("--finetune", default="", metavar="PATH",
        help="weights to start from (file, URL or hf-hub:NAME)")  # fmt: skip
    add("--attn-only", action="store_true", help="train mixers, head and position embedding only")


def _add_run(add: Add, _: Add) -> None:
    add("--output_dir", default="", metavar="FOLDER", help="folder for checkpoints and logs")
    add("--overwrite", action="store_true", help="replace the run in --output_dir")
    add("--resume", default="", metavar="PATH",
        help="checkpoint (file, URL or hf-hub:NAME), or auto: that of --output_dir")  # fmt: skip
    add("--start_epoch", default=0, type=int, within="[0, inf)",
        help="epoch to begin with; --resume sets it itself")  # fmt: skip
    add("--eval-interval", default=1, type=int, within="[1, inf)",
        help="epochs between evaluations, each of which ends with a checkpoint")  # fmt: skip
    add("--eval", action="store_true", help="evaluate only")
    add("--use-ema", action="store_true", help="evaluate the moving average of --resume")


def _add_device(add: Add, switch: Add) -> None:
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    switch("amp", True, "mixed precision on a GPU")
    add("--amp-dtype", default="bfloat16", choices=("bfloat16", "float16"),
        help="the lower of the two precisions")  # fmt: skip
    add("--deterministic", action="store_true",
        help="on GPUs: equal runs end with equal weights bit for bit; slower")  # fmt: skip
    add("--torchcompile", nargs="?", const="inductor", default=None, metavar="BACKEND",
        help="compile the model and what is done to whole batches, in training (backend: "
        "inductor)")  # fmt: skip
    add("--torchcompile-mode", default=None, metavar="MODE",
        help="of --torchcompile, such as reduce-overhead: CUDA graphs")  # fmt: skip
    add("--channels-last", action="store_true", help="memory format of the weights, for CNNs")
    add("--dist_url", default="env://", metavar="URL", help="how processes find each other")


def _add_ignored(add: Add, _: Add) -> None:
    add("--dist-eval", action="store_true", help="evaluation is always distributed, and exact")
    add("--distributed", action="store_true", help="torchrun decides")
    add("--world_size", default=1, type=int, within="[1, inf)", help="torchrun decides")
    add("--cooldown-epochs", default=10, type=int, within="[0, inf)",
        help="timm counts them behind --epochs; training ends there")  # fmt: skip
    add("--patience-epochs", default=10, type=int, within="[0, inf)",
        help="of --sched plateau, which is refused")  # fmt: skip
    add("--resplit", action="store_true", help="DeiT ignores it, too")


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that are invalid without any I/O."""
    check_ranges(_parser(), args)
    check_numbers(args)
    check_compiler(args.torchcompile, args.torchcompile_mode)
    check_model(args)
    if not args.eval:
        check_training(args)
    if args.use_ema and not (args.eval and args.resume):
        raise UserError("--use-ema goes with --eval --resume PATH.")
    if args.eval and args.finetune and not args.resume:
        raise UserError("--eval scores --resume, not --finetune: give the weights to --resume.")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs the --output_dir of the run.")


def shared_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What all processes of a run must be given alike."""
    given = sorted(set(args.given) - set(NODE_ARGUMENTS))
    values = {name: value for name, value in vars(args).items() if name not in NODE_ARGUMENTS}
    return {f"--{name}": value for name, value in values.items() if name != "given"} | {
        "the arguments given": " ".join(given)
    }


def check_no_other_run(args: argparse.Namespace) -> None:
    """Raises UserError if training would mix with another run in --output_dir."""
    found = [name for name in RUN_FILES if Path(args.output_dir, name).exists()]
    if not found or args.eval or goes_on(args):
        return
    if not args.overwrite:
        raise UserError(
            f"{args.output_dir} holds another run ({', '.join(found)}): go on with it by "
            "--resume auto, replace it by --overwrite, or choose another --output_dir."
        )
    for name, source in (("finetune", args.finetune), ("teacher-path", args.teacher_path)):
        if _is_of_run(args, source):
            raise UserError(
                f"--{name} {source} is a file of the run that --overwrite would replace: choose "
                "another --output_dir."
            )


def goes_on(args: argparse.Namespace) -> bool:
    """Whether --resume names the run in --output_dir, not another."""
    return args.resume == "auto" or _is_of_run(args, args.resume)


def _is_of_run(args: argparse.Namespace, source: str) -> bool:
    own = [Path(args.output_dir, name) for name in RUN_FILES]
    return Path(source).is_file() and any(p.exists() and p.samefile(source) for p in own)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UserError for too few or too many numbers, or those that contradict each other."""
    for name, (fewest, most) in HOW_MANY.items():
        count = len(getattr(args, name) or ()) or fewest
        if not fewest <= count <= most:
            wanted = fewest if count < fewest else most
            raise UserError(
                f"{option(name)} takes {WORDS[wanted]} numbers, not {WORDS.get(count, count)}."
            )
    for name in ("cutmix_minmax", "lr_noise", "decay_milestones"):
        if sorted(numbers := getattr(args, name) or []) != numbers:
            raise UserError(f"{option(name)} takes the lower number first, not {numbers}.")
    if args.start_epoch >= args.epochs and not args.eval:
        raise UserError(
            f"--start_epoch {args.start_epoch} leaves nothing to do of --epochs {args.epochs}."
        )
    if args.sched in ("step", "multistep") and args.decay_rate > 1:
        raise UserError(f"--decay_rate must be in (0, 1], not {args.decay_rate}.")


def check_training(args: argparse.Namespace) -> None:
    """Raises UserError for arguments of training that exclude or need each other."""
    if args.sched == "plateau":
        raise UserError("--sched plateau is deprecated in timm: use cosine, step or poly, say.")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    if mixes and args.batch_size % 2:
        raise UserError(
            f"Mixup and CutMix pair the images of a batch: --batch-size {args.batch_size} must be "
            "even, or use --mixup 0 --cutmix 0."
        )
    check_effects(args)
    if args.cache:
        check_cache(args)
    if args.cosub and not (args.train_mode and args.drop_path + args.drop > 0):
        raise UserError(
            "--cosub draws its submodels by stochastic depth: give --drop-path above 0, and leave "
            "--no-train-mode out."
        )
    if args.distillation_type != "none":
        if args.cosub:
            raise UserError("--cosub and --distillation-type exclude each other: choose one.")
        if not args.train_mode:
            raise UserError("--no-train-mode has no distillation: leave one of them out.")
        if not args.teacher_path:
            raise UserError(
                f"--distillation-type {args.distillation_type} needs --teacher-path: a checkpoint "
                "of --teacher-model (file, URL or hf-hub:NAME), or timm: for timm's pretrained "
                "weights."
            )
        models_timm.check_name(args.teacher_model, "teacher model")
    elif args.teacher_path and "distillation_type" not in args.given:
        raise UserError("--teacher-path has no effect without --distillation-type: add it.")


def check_effects(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that were given, to be on, but are overruled by another."""
    for name, others in OVERRULED.items():
        given = [other for other in others if other in args.given]
        idle = [option(n) for n in given if getattr(args, n) not in (0, "", "none")]
        if getattr(args, name) and idle:
            raise UserError(
                f"{option(name)} leaves {' and '.join(idle)} without effect: leave out one or the "
                "other."
            )


def check_cache(args: argparse.Namespace) -> None:
    """Raises UserError for what --cache, whose augmentation is for whole batches, cannot do."""
    if args.input_size > SMALL_IMAGE:
        raise UserError(
            f"--cache is for images of up to {SMALL_IMAGE} pixels, not {args.input_size}: lower "
            "--input-size or leave --cache out."
        )
    if args.no_aug:
        return
    jitters = args.aa.lower() in ("none", "") and args.color_jitter > 0
    refused = {
        "ThreeAugment": args.ThreeAugment,
        "src": args.src,
        "color_jitter": jitters,
        "train_interpolation": "train_interpolation" in args.given,
    }
    if wrong := [option(name) for name, given in refused.items() if given]:
        raise UserError(
            f"--cache has no {' and no '.join(wrong)}: leave one of them out"
            f"{' (--color-jitter 0)' if jitters else ''}."
        )
    RandAugment.parse(args.aa)


def check_model(args: argparse.Namespace) -> None:
    """Raises UserError for an unknown --model, or one that has no use for LION's arguments."""
    models_timm.check_name(args.model)
    models_timm.check_options(args.model_kwargs)
    with as_user_error():
        check_order(args.order)
    own = {name: option(name) for name in (*models_timm.LION_OPTIONS, "plus")}
    own |= {name: models_timm.OPTIONAL[name] for name in ("drop_path_rate", "drop_rate")}
    if both := [name for name in args.model_kwargs if name in own]:
        raise UserError(f"{both[0]} in --model-kwargs has an argument: give {own[both[0]]}.")
    default = _parser().get_default
    names = (*models_timm.LION_OPTIONS, *OF_GATES, "plus")
    given = [option(name) for name in names if getattr(args, name) != default(name)]
    if given and not args.model.startswith("lion_"):
        raise UserError(
            f"{args.model} takes no {', '.join(given)}: only lion_* models do; others have "
            "--model-kwargs."
        )
    idle = [spelt for spelt in map(option, ("decay_init", *OF_GATES)) if spelt in given]
    if args.mask_type == "Lit" and idle:
        raise UserError(f"--mask_type Lit has no gates: leave {' and '.join(idle)} out.")
    built = models_timm.built_name(args.model, args.distillation_type)
    distilled = "distilled" in built and timm.is_model(built)
    if args.distillation_type != "none" and not distilled:
        raise UserError(
            f"{args.model} has no distilled variant: lion_SIZE, hydra_SIZE, vim_SIZE and deit_SIZE "
            "have, of tiny, small and base."
        )
    if args.plus and not timm.is_model(models_timm.plus_name(built)):
        known = [name.replace("_plus", "") for name in timm.list_models("lion_plus_*")]
        raise UserError(f"--plus is of {', '.join(known)}, and not of {built}: leave it out.")


def check_optimizer(args: argparse.Namespace, device: torch.device) -> None:
    """Tries the optimiser and the schedule on a small model: many need what is not there.

    Raises UserError that names the one which cannot be built or cannot make a step.
    """
    what = f"--opt {args.opt} cannot run here with these arguments"
    with told_as(what, "mend them, or choose another, such as adamw"):
        optimizer = optimizer_of_probe(args, device)
        optimizer.step()
    with told_as(f"--sched {args.sched} cannot run with these arguments",
                 "choose another, such as cosine"):  # fmt: skip
        scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
        if scheduler is None and args.sched != "none":  # timm < 1.0.31 does not mind
            raise ValueError(f"Unknown scheduler {args.sched!r}.")
        if scheduler is not None:
            scheduler.step(0)


def check_same_optimizer(
    args: argparse.Namespace, before: dict[str, Any], device: torch.device, source: str
) -> None:
    """Raises UserError if the optimiser cannot go on from its state under other arguments.

    `before` are those of the checkpoint read from `source`. Tried on a small model: each optimiser
    keeps what its arguments ask for, and weight decay decides how the weights are grouped.
    """
    what = f"--opt {args.opt} cannot go on from {source} with these arguments"
    with told_as(what, "give --momentum, --opt-betas and --weight-decay of its run"):
        earlier = optimizer_of_probe(argparse.Namespace(**{**vars(args), **before}), device)
        earlier.step()
        optimizer = optimizer_of_probe(args, device)
        optimizer.load_state_dict(state_for(optimizer, earlier.state_dict()))
        optimizer.step()


def optimizer_of_probe(args: argparse.Namespace, device: torch.device) -> torch.optim.Optimizer:
    """Of a small model, whose gradients are there."""
    probe = nn.Linear(2, 2, device=device)
    probe(torch.ones(1, 2, device=device)).sum().backward()
    options = {**optimizer_kwargs(args), "layer_decay": None}  # that is the model's
    return create_optimizer(probe, device, **options)
