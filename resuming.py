"""Going on with a run: what it may change of its settings, and what it must share with before."""

import logging
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

import checkpoint
import models_timm
import preprocessing
from errors import UserError

logger = logging.getLogger(__name__)

Found = tuple[dict[str, Any], str]  # a checkpoint and where it was read


class Rule(Enum):
    """What a setting may do when a run goes on."""

    FREE = "may change"
    TAKEN_UP = "may change, is logged, and counts from the next step on"
    BETWEEN_EPOCHS = "may change after a whole epoch, is logged, but may not within one"
    OPTIMIZER = "is what the optimiser's state belongs to, and may not change"
    MODEL = "is what the weights belong to, and may not change"
    RUN = "is what the run is, and may not change"


REFUSALS = {
    Rule.MODEL: "{source} is of another model: {differences}.",
    Rule.RUN: "{source} is of another run: {differences}.",
    Rule.OPTIMIZER: "The optimiser state of {source} does not fit ({differences}): resume with the "
    "--opt and the arguments of its run, or start from its weights with --finetune.",
    Rule.BETWEEN_EPOCHS: "{source} was saved in the middle of an epoch, which has to end as it "
    "began ({differences}).",
}
# Of every argument of main.py, and of what a checkpoint holds beside them.
RULES = {
    **dict.fromkeys(
        ("model", "mask_type", "order", "pos_emb", "cls_tok", "plus", "model_kwargs"),
        Rule.MODEL,
    ),
    **dict.fromkeys(
        ("opt", "layer_decay", "attn_only", "gate_lr_scale", "gate_weight_decay"), Rule.OPTIMIZER
    ),
    **dict.fromkeys(
        ("batch_size", "grad_accum_steps", "repeated_aug", "seed", "data_set", "inat_category",
         "holdout", "images", "processes"),
        Rule.BETWEEN_EPOCHS,
    ),
    **dict.fromkeys(
        ("epochs", "lr", "unscale_lr", "sched", "sched_on_updates", "lr_noise", "lr_noise_pct",
         "lr_noise_std", "warmup_lr", "min_lr", "decay_epochs", "decay_milestones", "warmup_epochs",
         "cooldown_epochs", "patience_epochs", "decay_rate"),
        Rule.TAKEN_UP,
    ),
    **dict.fromkeys(
        ("opt_eps", "opt_betas", "clip_grad", "momentum", "weight_decay", "bce_loss", "smoothing",
         "cosub", "drop", "drop_path", "train_mode", "model_ema", "model_ema_decay", "format",
         "chunk_size", "amp", "amp_dtype", "distillation_type", "distillation_alpha",
         "distillation_tau", "teacher_model", "teacher_path"),
        Rule.TAKEN_UP,
    ),
    **dict.fromkeys(
        ("data_path", "cache", "input_size", "eval_crop_ratio", "crop_mode", "interpolation",
         "mean", "std", "no_aug", "color_jitter", "aa", "train_interpolation", "ThreeAugment",
         "src", "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax", "mixup_prob",
         "mixup_switch_prob", "mixup_mode"),
        Rule.TAKEN_UP,
    ),
    **dict.fromkeys(
        ("decay_init", "deterministic", "eval_interval", "model_ema_force_cpu", "resplit",
         "finetune", "num_workers", "pin_mem", "output_dir", "overwrite", "resume", "start_epoch",
         "eval", "use_ema", "dist_eval", "device", "torchcompile", "torchcompile_mode",
         "channels_last", "distributed", "world_size", "dist_url"),
        Rule.FREE,
    ),
}  # fmt: skip

# What an accuracy depends on beside the weights.
SCORED_BY = ("data_set", "inat_category", "holdout", "input_size", "eval_crop_ratio", "crop_mode",
             "interpolation", "mean", "std")  # fmt: skip


def read(source: str, folder: str | Path) -> Found | None:
    """The checkpoint at a path or URL, or with `auto` the newest of `folder`; None without one."""
    if not source:
        return None
    if source != "auto":
        return checkpoint.load(source), source
    found = checkpoint.latest(folder)
    return found and (found[0], str(found[1]))


def settings_of(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint of main.py, DeiT or timm: those that count.

    These are its arguments, with what was derived from them in their place: the model that is built
    and what its images become. Empty for weights alone.
    """
    args = saved.get("args") or {}
    if not isinstance(args.get("model"), str):
        return {}
    images = preprocessing.of_checkpoint(saved, args["model"], "the checkpoint")
    derived = images.state() if images else {}
    if images:
        derived["eval_crop_ratio"] = derived.pop("crop_pct")
    built = models_timm.built_name(args["model"], args.get("distillation_type", "none"))
    facts = {name: saved[name] for name in ("images", "processes") if name in saved}
    return {**args, **derived, **facts, "model": built}


def check_settings(
    saved: dict[str, Any], now: dict[str, Any], rules: dict[str, Rule], source: str, *kept: Rule
) -> None:
    """Raises UserError where a setting whose rule is among `kept` differs from a checkpoint's.

    Settings that only one of them has are not compared.
    """
    for rule in kept:
        if differing := differences(saved, now, rules, rule):
            reasons = "; ".join(differing)
            raise UserError(REFUSALS[rule].format(source=source, differences=reasons))


def check_evaluation(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raises UserError for another model, or for held-out images that were trained on."""
    check_settings(saved, now, RULES, source, Rule.MODEL)
    check_holdout(saved, now, source)


def check_holdout(saved: dict[str, Any], now: dict[str, Any], source: str) -> None:
    """Raises UserError if images that are held out now were trained on."""
    if known := _known_holdout(saved, now["holdout"], source):
        raise UserError(f"{known}: hold out no more than that.")


def _known_holdout(saved: dict[str, Any], holdout: int, source: str) -> str:
    """What is wrong with a --holdout, if anything: fewer images are among those that were more."""
    trained = saved.get("holdout")
    if trained is None or holdout <= trained:
        return ""
    return (
        f"{source} was trained with --holdout {trained}, so it knows images that --holdout "
        f"{holdout} holds out"
    )


def scores_alike(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether an accuracy of the checkpoint can be compared with one to come."""
    return not checkpoint.difference(saved, now, SCORED_BY)


def tell_changes(
    saved: dict[str, Any], now: dict[str, Any], rules: dict[str, Rule], source: str
) -> None:
    """Says which settings from now on differ from a checkpoint's."""
    for rule in (Rule.TAKEN_UP, Rule.BETWEEN_EPOCHS):
        for line in differences(saved, now, rules, rule):
            logger.info("Going on from %s with another setting: %s", source, line)


def differences(
    saved: dict[str, Any], now: dict[str, Any], rules: dict[str, Rule], rule: Rule
) -> list[str]:
    return checkpoint.difference(saved, now, [name for name in rules if rules[name] is rule])


def start_from(found: Found, model: nn.Module, classes: list[str], holdout: int) -> None:
    """Loads what a checkpoint (--finetune) shares with the model, and says what it does not.

    Warns if it is of the same classes and knows images that are held out now.
    """
    saved, source = found
    weights = checkpoint.weights_of(saved, source=source)
    keep_head = not checkpoint.differing_classes(saved, classes)
    if keep_head and (known := _known_holdout(settings_of(saved), holdout, source)):
        logger.warning("%s, if it was trained on this data.", known)
    for note in checkpoint.adapt_weights(model, weights, source, keep_head=keep_head):
        logger.info("Fine-tuning from %s: %s", source, note)
