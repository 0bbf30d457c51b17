"""Checkpoints that survive a kill at any moment, and that cannot run code when they are loaded."""

import argparse
import hashlib
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

logger = logging.getLogger(__name__)

_MAX_DIFFERENCES = 20


def save(state: dict, path: str | Path, *, keep_previous: bool = True) -> None:
    """Write `state` to `path` so that `path` is a whole checkpoint at every moment.

    With `keep_previous`, the checkpoint replaced stays as `<stem>.previous<suffix>`.

    Raises:
        RuntimeError: `state` cannot be written, or could not be loaded again; the checkpoint
            already at `path` stays.
    """
    path = Path(path)
    # Fixed names, so that a save also replaces what a killed one has left.
    temporary = path.with_name(f".{path.name}.saving")
    replaced = path.with_name(f".{path.name}.replaced")
    try:
        replaced.unlink(missing_ok=True)
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if refused := get_unsafe_globals_in_checkpoint(temporary):
            raise TypeError(f"it holds {', '.join(refused)}, which a safe load refuses")
        if keep_previous and path.exists():
            _link_or_copy(path, replaced)
        os.replace(temporary, path)
        if replaced.exists():
            os.replace(replaced, _previous(path))
        _sync_folder(path.parent)
    except Exception as error:
        # torch.save raises an internal error of its own over that of a failed write.
        hidden = isinstance(error, RuntimeError) and isinstance(error.__context__, OSError)
        reason = error.__context__ if hidden else error
        raise RuntimeError(f"cannot save the checkpoint {path}: {reason}") from error
    finally:
        for leftover in (temporary, replaced):
            with suppress(OSError):
                leftover.unlink()


def load(source: str | Path) -> dict:
    """Read the checkpoint at a path or http(s) URL to the CPU; `args` becomes a plain dict.

    Only tensors, plain values and `argparse.Namespace` (in files of DeiT) are accepted.

    Raises:
        ValueError: `source` is missing, truncated, corrupt, or holds anything else.
    """
    path = _download(str(source)) if _is_url(source) else Path(source)
    try:
        checkpoint = _read(path)
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:
        raise ValueError(
            f"cannot load the checkpoint {path}: it is truncated, corrupt, or holds objects other "
            "than weights and plain settings, which are refused because they could run code"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{source} holds a {type(checkpoint).__name__}, not a checkpoint")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def latest(folder: str | Path) -> tuple[dict, Path] | None:
    """Load the newest readable checkpoint of a run, with its path; None if the run has none.

    Raises:
        ValueError: there are checkpoints, but none is readable.
    """
    current = Path(folder) / "checkpoint.pth"
    candidates = (current, _previous(current))
    if not any(path.exists() for path in candidates):
        return None
    problems = []
    for path in candidates:
        try:
            checkpoint = load(path)
        except ValueError as error:
            logger.warning("%s", error)
            problems.append(str(error))
        else:
            if problems:
                logger.warning("falling back to the checkpoint before it, %s", path)
            return checkpoint, path
    raise ValueError("\n".join([f"no checkpoint in {folder} is readable:", *problems]))


def weights_of(checkpoint: dict, *, ema: bool = False, source: str | Path) -> dict:
    """The state dict in a checkpoint of this repository, DeiT or timm; a bare one is returned.

    Raises:
        ValueError: `checkpoint`, read from `source`, does not hold these weights.
    """
    keys = ("model_ema", "state_dict_ema") if ema else ("model", "state_dict")
    candidates = [checkpoint.get(key) for key in keys]
    if not ema:
        candidates.append(checkpoint)
    for state in candidates:
        if isinstance(state, dict) and state and all(map(torch.is_tensor, state.values())):
            return state
    kind = "EMA weights" if ema else "model weights"
    raise ValueError(f"{source} holds no {kind}, only: {', '.join(map(str, checkpoint))}")


def load_weights(model: nn.Module, state: dict, source: str | Path) -> None:
    """Load `state`, read from `source`, into `model`: every name and shape must agree.

    The name prefixes of DistributedDataParallel and torch.compile are dropped.

    Raises:
        ValueError: the differences, listed; the model is unchanged.
    """
    state = _bare_names(state)
    found, wanted = _shapes(state), _shapes(model.state_dict())
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
        raise ValueError("\n".join([summary, *lines]))
    model.load_state_dict(state)


def adapt_weights(model: nn.Module, state: dict, source: str | Path) -> list[str]:
    """Load what `state`, read from `source`, shares with `model`, to fine-tune it.

    A classifier of another class count stays as initialised, a position embedding is resampled to
    the model's grid and gains or loses the distillation token's entry. Returns a line for each
    kind of adaptation.

    Raises:
        ValueError: a shared weight has another shape, listed, or nothing is shared.
    """
    state, own = _bare_names(state), model.state_dict()
    notes = []
    for head in _classifiers(model):
        weight = state.get(f"{head}.weight")
        if weight is not None and f"{head}.weight" in own and len(weight) != model.num_classes:
            notes.append(
                f"{head} replaced: {len(weight)} classes in the file, {model.num_classes} here"
            )
            state = {name: v for name, v in state.items() if not name.startswith(f"{head}.")}
    if "pos_embed" in state and "pos_embed" in own:
        fitted = _fit_pos_embed(
            state["pos_embed"], model, prefix=1 + ("dist_token" in state), source=source
        )
        if fitted.shape != state["pos_embed"].shape:
            before, after = state["pos_embed"].shape[1], fitted.shape[1]
            notes.append(f"pos_embed resampled from {before} to {after} tokens")
        state = {**state, "pos_embed": fitted}
    shared = {name: value for name, value in state.items() if name in own}
    if not shared:
        raise ValueError(f"{source} shares no weight with the model: check --finetune and --model")
    for title, names in (
        ("not in the file, as initialised", [name for name in own if name not in state]),
        ("not in the model, left out", [name for name in state if name not in own]),
    ):
        if names:
            kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
            notes.append(f"{title}: {', '.join(kinds)}")
    load_weights(model, {**own, **shared}, source)
    return notes


def difference(saved: dict, wanted: dict, keys: Iterable[str]) -> list[str]:
    """One line for each setting of `keys` that both dicts hold with different values."""
    return [
        f"{key}: checkpoint {saved[key]}, now {wanted[key]}"
        for key in keys
        if key in saved and key in wanted and saved[key] != wanted[key]
    ]


def _bare_names(state: dict) -> dict:
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): v for name, v in state.items()}


def _shapes(state: dict) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classifiers, as timm records them."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _fit_pos_embed(
    saved: torch.Tensor, model: nn.Module, *, prefix: int, source: str | Path
) -> torch.Tensor:
    """`saved` `[1, T, dim]`, whose first `prefix` entries are no patches, on the model's grid."""
    grid, patches = model.patch_embed.grid_size, saved[:, prefix:]
    if patches.shape[1] != grid[0] * grid[1]:
        side = math.isqrt(patches.shape[1])
        if side**2 != patches.shape[1]:
            raise ValueError(
                f"The position embedding in {source} has {patches.shape[1]} patches, no square "
                "grid to resample: use --input-size of its training"
            )
        patches = resample_abs_pos_embed(
            patches, new_size=list(grid), old_size=[side, side], num_prefix_tokens=0
        )
    kept = min(prefix, model.num_prefix_tokens)
    added = model.pos_embed.detach()[:, kept : model.num_prefix_tokens]
    return torch.cat([saved[:, :kept], added, patches], dim=1)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _link_or_copy(source: Path, target: Path) -> None:
    with suppress(OSError):  # a file system without hard links
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_url(source: str | Path) -> bool:
    return urlsplit(str(source)).scheme in ("http", "https")


def _download(url: str) -> Path:
    """The file of `url` in the cache of torch.hub, verified if its name ends in a hash."""
    name = Path(urlsplit(url).path).name
    hashed = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if not hashed:
        # Many a URL ends in checkpoint.pth: one of them must not be taken for another.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hashed and hashed[1])
    except Exception as error:
        raise ValueError(f"cannot download the checkpoint {url}: {error}") from error
    return path


def _read(path: Path) -> object:
    # torch.load does not verify the checksums in the archive.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    # The files of DeiT keep their settings as a Namespace.
    with safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
