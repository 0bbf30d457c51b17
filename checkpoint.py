"""Checkpoints that survive a kill at any moment and cannot run code when loaded."""

import argparse
import errno
import logging
import math
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import hub
from errors import USED_UP, UserError
from files import replacing, require_file, writing
from urls import cached, is_url, without_secrets

logger = logging.getLogger(__name__)

RESULTS = ("best_checkpoint.pth", "model/model.safetensors")  # never before a checkpoint
# Types under these names in checkpoints of this repository, DeiT and timm; None counts as absent,
# except in a run's position and optimiser.
_TYPES: dict[str, tuple[type, ...]] = {
    "args": (dict,), "classes": (list,), "data_config": (dict,), "epoch": (int,),
    "max_accuracy": (float, int), "meters": (list,), "optimizer": (dict,), "scaler": (dict,),
    "step": (int,),
}  # fmt: skip
_ITEM_TYPES: dict[str, tuple[type, ...]] = {"classes": (str,), "meters": (dict, list, tuple)}
_NEEDED = ("epoch", "optimizer", "step")
# Errors unrelated to a file's content, such as missing permissions, open files or memory.
_OF_THE_SYSTEM = {*USED_UP, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ESTALE}
RETRAIN = "use the data of its training, or --finetune to learn new classes"
_MAX_DIFFERENCES = 20
_MAX_NAMES = 5


def save(state: dict, path: str | Path, *, keep_previous: bool = True) -> None:
    """Write `state` to `path` so that `path` is a complete checkpoint at every moment.

    With `keep_previous`, the replaced checkpoint is kept as `<stem>.previous<suffix>`.

    Raises:
        UserError: for example, the disk is full.
        RuntimeError: `state` cannot be written, or could not be loaded again.
        FloatingPointError: `state` holds a tensor that is not finite.

    On an error the checkpoint already at `path` stays.
    """
    path = Path(path)
    if names := list(_not_finite(state)):
        raise FloatingPointError(
            f"The checkpoint {path} is not replaced, as the new one would not be finite "
            f"({_first(names)}): go on from the one that is there, with a lower learning rate."
        )
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        with writing(path):
            replaced.unlink(missing_ok=True)
            with replacing(path, "xb") as file:
                _write(state, file)
                file.flush()
                if refused := get_unsafe_globals_in_checkpoint(file.name):
                    raise TypeError(f"it holds {', '.join(refused)}, which a safe load refuses")
                if keep_previous and path.exists():
                    _link_or_copy(path, replaced)
            if replaced.exists():
                os.replace(replaced, _previous(path))
            _sync_folder(path.parent)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"cannot save the checkpoint {path}: {error}") from error
    finally:
        with suppress(OSError):
            replaced.unlink()


def load(source: str | Path) -> dict:
    """Load a checkpoint to the CPU: a path, an http(s) URL, or `hf-hub:OWNER/NAME[@REVISION]`.

    A folder is one of timm's `save_for_hf`. `args` becomes a plain dict. Only tensors, plain values
    and `argparse.Namespace` (in files of DeiT) are accepted.

    Raises:
        UserError: `source` is missing, truncated, corrupt, or holds anything else.
    """
    if hub.is_hub(source):
        return _load_file(hub.download(str(source)), source)
    if is_url(source):
        folder = Path(torch.hub.get_dir(), "checkpoints")
        return cached(str(source), folder, partial(_load_file, source=without_secrets(source)))
    return _load_file(Path(source), source)


def latest(folder: str | Path) -> tuple[dict, Path] | None:
    """Load the newest readable checkpoint of a run, with its path; None if the run has none.

    Raises:
        UserError: there are checkpoints, but none is readable; or the newest may be complete but
            cannot be read at the moment; or there is one of the RESULTS without a checkpoint,
            which a new run would replace.
    """
    current = Path(folder) / "checkpoint.pth"
    candidates = (current, _previous(current))
    if not any(map(os.path.lexists, candidates)):  # a link to nothing does not mean a new run
        if left := [name for name in RESULTS if Path(folder, name).exists()]:
            raise UserError(
                f"{folder} holds {left[0]} of a run, but no checkpoint.pth to go on with: move it "
                "elsewhere, or put the checkpoint back."
            )
        return None
    problems = []
    for path in candidates:
        try:
            checkpoint = load(path)
        except UserError as error:
            if getattr(error.__cause__, "errno", None) in _OF_THE_SYSTEM:
                raise UserError(f"{error}: give the rights or means to read it.") from error
            logger.warning("%s", error)
            problems.append(str(error))
        else:
            if problems:
                logger.warning("falling back to the checkpoint before it, %s", path)
            return checkpoint, path
    raise UserError("\n".join([f"no checkpoint in {folder} is readable:", *problems]))


def discard(folder: str | Path) -> None:
    """Remove the checkpoints of a run that another one replaces."""
    current = Path(folder) / "checkpoint.pth"
    for path in (_previous(current), current):
        path.unlink(missing_ok=True)


def weights_of(checkpoint: dict, *, ema: bool = False, source: str | Path) -> dict:
    """The state dict in a checkpoint of this repository, DeiT or timm; a bare one is returned.

    Raises:
        UserError: `checkpoint`, read from `source`, does not hold these weights.
    """
    keys = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    candidates = [checkpoint.get(key) for key in keys]
    if not ema:
        candidates.append(checkpoint)
    for state in candidates:
        if not isinstance(state, dict) or not state:
            continue
        if all(isinstance(n, str) and torch.is_tensor(value) for n, value in state.items()):
            return state
    kind = "EMA weights" if ema else "model weights"
    raise UserError(f"{source} holds no {kind}, only: {', '.join(map(str, checkpoint))}")


def load_weights(model: nn.Module, state: dict, source: str | Path) -> None:
    """Load `state`, read from `source`, into `model`: every name and shape must agree.

    The name prefixes of DistributedDataParallel and torch.compile are dropped.

    Raises:
        UserError: the differences, listed, or weights that are not finite; the model is unchanged.
    """
    state = bare_names(state)
    own = model.state_dict()
    found, wanted = _shapes(state), _shapes(own)
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [name for name in wanted if name in found and found[name] != wanted[name]]
    lines = [f"missing in the file: {name} {wanted[name]}" for name in missing]
    lines += [f"not in the model: {name} {found[name]}" for name in unexpected]
    lines += [f"shape of {n}: file {found[n]}, model {wanted[n]}" for n in reshaped]
    if lines:
        if len(lines) > _MAX_DIFFERENCES:
            lines[_MAX_DIFFERENCES:] = [f"... and {len(lines) - _MAX_DIFFERENCES} more"]
        summary = (
            f"{source} is of another model: {len(missing)} weights missing, {len(unexpected)} "
            f"unexpected, {len(reshaped)} of another shape; build the model with its settings"
        )
        raise UserError("\n".join([summary, *lines]))
    if names := [n for n, value in state.items() if _kind(value) != _kind(own[n])]:
        raise UserError(
            f"{source} holds {_kind(state[names[0]])} where the model has {_kind(own[names[0]])} "
            f"({_first(names)}): it is damaged, or quantised by other software."
        )
    if names := list(_not_finite(state)):
        raise UserError(
            f"{source} holds weights that are not finite ({_first(names)}): use an earlier "
            "checkpoint."
        )
    model.load_state_dict(state)


def adapt_weights(
    model: nn.Module, state: dict, source: str | Path, *, keep_head: bool = True
) -> list[str]:
    """Load the weights that `state`, read from `source`, shares with `model`, to fine-tune it.

    A classifier with another class count, or for other classes (`keep_head=False`), stays as
    initialised. A position embedding is resampled to the model's grid, with entries for the
    model's prefix tokens. Other weights of another shape are converted as timm does for this
    family. Returns a line for each kind of adaptation.

    Raises:
        UserError: a shared weight has another shape, listed, or nothing is shared.
    """
    own = model.state_dict()
    state = _names_of_timm(bare_names(state), own)
    state, notes = _without_foreign_heads(model, state, keep_head)
    if "pos_embed" in state and "pos_embed" in own:
        state, changes = _fit_pos_embed(state, model, source)
        notes += changes
    state, changes = _converted_by_timm(model, state)
    notes += changes
    shared = {name: value for name, value in state.items() if name in own}
    if not shared:
        raise UserError(f"{source} shares no weight with the model: check --finetune and --model")
    for title, names in (
        ("not in the file, as initialised", [name for name in own if name not in state]),
        ("not in the model, left out", [name for name in state if name not in own]),
    ):
        if names:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            notes.append(f"{title}: {', '.join(kinds)}")
    load_weights(model, {**own, **shared}, source)
    return notes


def check_classes(
    saved: dict, classes: Sequence[str], source: str | Path, remedy: str = RETRAIN
) -> None:
    """Raises UserError if a checkpoint, read from `source`, is for other classes."""
    if differing := differing_classes(saved, classes):
        raise UserError(f"{source} is of other classes than the data ({differing}): {remedy}.")


def differing_classes(saved: dict, classes: Sequence[str]) -> str:
    """How the classes named by a checkpoint differ from `classes`; "" if it names none."""
    named = saved.get("classes")
    if named is None or list(named) == list(classes):
        return ""
    sides = (("checkpoint", named, classes), ("data", classes, named))
    parts = []
    for title, ours, theirs in sides:
        alone = [name for name in ours if name not in set(theirs)]
        if alone:
            parts.append(f"only in the {title}: {_first(alone)}")
    return "; ".join(parts) or "the same in another order"


def difference(saved: dict, wanted: dict, keys: Iterable[str]) -> list[str]:
    """One line for each setting in `keys` that both dicts hold with different values."""
    saved, wanted = without_secrets(saved), without_secrets(wanted)
    return [
        f"{key}: checkpoint {saved[key]}, now {wanted[key]}"
        for key in keys
        if key in saved and key in wanted and saved[key] != wanted[key]
    ]


def _kind(value: torch.Tensor) -> str:
    """What a tensor holds, regardless of precision: all real dtypes are one kind."""
    if value.is_meta or value.is_quantized or value.layout is not torch.strided:
        return f"{value.dtype} without plain values ({value.device}, {value.layout})"
    return "real numbers" if value.is_floating_point() else str(value.dtype)


def _first(names: list) -> str:
    return ", ".join(map(str, names[:_MAX_NAMES])) + ", ..." * (len(names) > _MAX_NAMES)


def _not_finite(value: object, name: str = "") -> Iterator[str]:
    """Names of the tensors in nested containers that hold NaN or infinity.

    A single number may be infinite: some models have such bounds in their buffers.
    """
    if torch.is_tensor(value):
        if (value.isnan() if value.dim() == 0 else ~value.isfinite()).any():
            yield name
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{name}.{key}" if name else str(key))


def bare_names(state: Mapping[str, Any]) -> dict:
    """Without the prefixes of DistributedDataParallel and torch.compile."""
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state.items()}


def _shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classifiers, as timm records them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _names_of_timm(state: dict, own: dict) -> dict:
    """Renames layer scale, which DeiT III's own files name differently."""
    renamed = {name: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name) for name in state}
    return {renamed[name] if renamed[name] in own else name: v for name, v in state.items()}


def _without_foreign_heads(
    model: nn.Module, state: dict, keep_head: bool
) -> tuple[dict, list[str]]:
    notes = []
    for head in _classifiers(model):
        weight = state.get(f"{head}.weight")
        if weight is None:
            continue
        if len(weight) != model.num_classes:
            notes.append(
                f"{head} replaced: {len(weight)} classes in the file, {model.num_classes} here"
            )
        elif not keep_head:
            notes.append(f"{head} replaced: it tells apart other classes")
        else:
            continue
        state = {name: v for name, v in state.items() if not name.startswith(f"{head}.")}
    return state, notes


def _converted_by_timm(model: nn.Module, state: dict) -> tuple[dict, list[str]]:
    """`state`, passed through the checkpoint filter of the model's family if shapes differ."""
    own = _shapes(model.state_dict())
    before = _shapes(state)
    family = sys.modules[type(model).__module__]
    convert = getattr(family, "checkpoint_filter_fn", None)
    if convert is None or all(before[name] == own[name] for name in before if name in own):
        return state, []
    try:
        state = convert(state, model)
    except Exception:  # filters expect weights of their family; load_weights lists what differs
        return state, []
    notes = [
        f"{name} resampled from {before[name]} to {shape}"
        for name, shape in _shapes(state).items()
        if before.get(name, shape) != shape
    ]
    return state, notes


def _fit_pos_embed(state: dict, model: nn.Module, source: str | Path) -> tuple[dict, list[str]]:
    """`state` with its `pos_embed` `[1, T, dim]` on the model's grid, for the model's tokens.

    If the embedding has no entries for prefix tokens (like DeiT III's), they become zeros; if the
    model has no such entries, they are added to the tokens themselves.
    """
    saved, own = state["pos_embed"], model.state_dict()["pos_embed"]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if saved.ndim != 3 or own.ndim != 3 or grid is None or own.shape[1] < grid[0] * grid[1]:
        return state, []
    tokens = [name for name in ("cls_token", "dist_token", "reg_token") if name in state]
    entries = sum(state[name].shape[1] for name in tokens)
    prefix = _prefix_entries(saved.shape[1], entries, grid, source)
    wanted = own.shape[1] - grid[0] * grid[1]
    if wanted == 0 and prefix > 0:
        state = _added_to_tokens(state, tokens, saved)
    kept = saved[:, : min(prefix, wanted)]
    added = own[:, kept.shape[1] : wanted].clone()
    if prefix == 0:
        added[:, :entries] = 0
    patches, side = saved[:, prefix:], math.isqrt(saved.shape[1] - prefix)
    if resampled := patches.shape[1] != grid[0] * grid[1]:
        patches = resample_abs_pos_embed(
            patches, new_size=list(grid), old_size=[side, side], num_prefix_tokens=0
        )
    fitted = torch.cat([kept, added, patches], dim=1)
    notes = []
    if fitted.shape != saved.shape:
        change = "resampled" if resampled else "fitted"
        notes = [f"pos_embed {change} from {saved.shape[1]} to {fitted.shape[1]} tokens"]
    return {**state, "pos_embed": fitted}, notes


def _prefix_entries(length: int, tokens: int, grid: Sequence[int], source: str | Path) -> int:
    """How many of the `length` entries of a position embedding belong to prefix tokens.

    The file has `tokens` prefix tokens; all of them, only the first, or none have entries. The
    other entries are patches of the model's grid, or of a square.
    """
    candidates = range(tokens, -1, -1)
    for prefix in candidates:
        if length - prefix == grid[0] * grid[1]:
            return prefix
    for prefix in candidates:
        if length > prefix and math.isqrt(length - prefix) ** 2 == length - prefix:
            return prefix
    raise UserError(
        f"The position embedding in {source} has {length - tokens} patches, no square "
        "grid to resample: use --input-size of its training"
    )


def _added_to_tokens(state: dict, tokens: list[str], pos_embed: torch.Tensor) -> dict:
    """`state` with the position entries of its prefix tokens added to these tokens."""
    widths = [state[name].shape[1] for name in tokens]
    entries = pos_embed[:, : sum(widths)].split(widths, dim=1)
    sums = {name: state[name] + entry for name, entry in zip(tokens, entries, strict=True)}
    return {**state, **sums}


def _write(state: dict, file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # an internal error that hides that of a failed write
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _link_or_copy(source: Path, target: Path) -> None:
    with suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    with source.open("rb") as old, target.open("xb") as copy:
        shutil.copyfileobj(old, copy)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_file(path: Path, source: str | Path) -> dict:
    """The checkpoint in a file; errors name its `source`."""
    try:
        checkpoint = _read(path)
    except Exception as error:
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        # In a truncated file PyTorch may seek to before its start: EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            reason = error.strerror or error
            raise UserError(f"cannot read the checkpoint {source}: {reason}") from error
        raise UserError(
            f"cannot load the checkpoint {source}: it is truncated, corrupt, or holds objects "
            "other than weights and plain settings, which are refused because they could run code"
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{source} holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    _check_types(checkpoint, source)
    return checkpoint


def _check_types(checkpoint: dict, source: str | Path) -> None:
    for name, value, types in _typed_parts(checkpoint):
        fits = isinstance(value, types) and not isinstance(value, bool)
        if name in ("epoch", "step"):
            fits = fits and value >= -1  # -1: no epoch finished
        if not fits and (value is not None or name in _NEEDED):
            said = repr(value) if isinstance(value, bool | int | float) else type(value).__name__
            raise UserError(
                f"{source} is a damaged checkpoint, whose {name} is {said} and no "
                f"{types[0].__name__}: use an earlier one."
            )


def _typed_parts(checkpoint: dict) -> Iterator[tuple[str, Any, tuple[type, ...]]]:
    """Name, value and allowed types of each part of a checkpoint whose types are known."""
    for name in filter(checkpoint.__contains__, _TYPES):
        value = checkpoint[name]
        yield name, value, _TYPES[name]
        if name in _ITEM_TYPES and isinstance(value, list):
            yield from ((f"{name}[{i}]", item, _ITEM_TYPES[name]) for i, item in enumerate(value))
        if name == "args" and isinstance(value, dict) and "model_kwargs" in value:
            yield "args.model_kwargs", value["model_kwargs"], (dict,)


def _read(path: Path) -> object:
    if path.is_dir():
        return hub.read_folder(path)
    require_file(path)
    # torch.load does not verify the checksums in the archive.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    # DeiT's files keep their settings as a Namespace.
    with safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
