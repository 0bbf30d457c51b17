"""Loaders of labelled images for training, whose augmentation is seeded, and for evaluation."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from augment import build_eval_transform, build_train_transform
from cached_images import CachedLoader
from compilation import compile_augmentation
from datasets import LabelledImages, Split, Transform, build_dataset
from device_augment import build_device_transform, build_normalization
from errors import UserError
from preprocessing import Preprocessing
from processes import World
from samplers import EpochSampler, ShardSampler
from utils import seed_host
from workers import worker_options

logger = logging.getLogger(__name__)


class SeededDataset(Dataset):
    """Training samples whose augmentation depends on (seed, draw) alone.

    Indexed by `(index, draw)` as `EpochSampler` yields them, so the stream of samples is the same
    for any number of processes and workers. An image that cannot be read is replaced by the next
    readable one, logged and counted.

    Args:
        dataset: yields (PIL image, label), and raises OSError for an unreadable image.
        transform: may use the random states of Python, numpy and torch (CPU).
        seed: non-negative int.
        max_corrupt: different unreadable images to put up with.

    Raises:
        UserError: on access, with more than `max_corrupt` unreadable images, or all of them.
    """

    def __init__(
        self, dataset: LabelledImages, transform: Transform, *, seed: int, max_corrupt: int = 100
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.max_corrupt = min(max_corrupt, len(dataset) - 1)
        # One flag an image: a file met in every epoch counts once, and no lock is needed.
        self._corrupt = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    @property
    def corrupt_count(self) -> int:
        """Different unreadable images met so far, by all workers of this process."""
        return int(self._corrupt.sum())

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, draw = key
        # A worker's random states serve nothing else; the training process needs its own.
        with nullcontext() if get_worker_info() else _random_states_restored():
            seed_host(self.seed, draw)
            image, label = self._readable(index)
            return self.transform(image), label

    def __len__(self) -> int:
        return len(self.dataset)

    def _readable(self, index: int) -> tuple[Image.Image, int]:
        while True:
            try:
                return self.dataset[index]
            except OSError as error:
                self._note_corrupt(index, error)
            index = (index + 1) % len(self)

    def _note_corrupt(self, index: int, error: OSError) -> None:
        if not self._corrupt[index]:
            self._corrupt[index] = True
            logger.warning("Training goes on without image %d: %s", index, error)
        if self.corrupt_count > self.max_corrupt:
            raise UserError(
                f"{self.corrupt_count} of {len(self)} training images cannot be read, more than "
                f"the {self.max_corrupt} allowed: mend the data set (last: {error})."
            ) from error


class DeviceLoader(DataLoader):
    """Batches of images and labels, of which the images are moved to `device` and made floats.

    The workers write bytes, and the training process copies them: a quarter as much. They lie as
    Pillow has them, `[B, H, W, 3]`, until they are on the device.

    Args:
        device: of the images; labels stay on the CPU.
        transform: bytes `[B, 3, H, W]` on the device -> what is to be yielded.
    """

    dataset: Any
    sampler: Any

    def __init__(
        self,
        *args: Any,
        device: torch.device,
        transform: Callable[[Tensor], Tensor],
        **options: Any,
    ) -> None:
        options["collate_fn"] = _as_pillow_has_them
        super().__init__(*args, **options)
        self.device = device
        self.transform = transform
        self._started: Any = None

    def start(self) -> None:
        """Starts the workers on the next pass; otherwise they start with its first batch.

        Workers are forked: a lock that another thread holds at that moment, a compiler's say, stays
        locked in them for ever.
        """
        if self.num_workers:
            self._started = super().__iter__()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        # No generator: what starts an epoch draws random numbers, here and not at the first batch.
        batches: Iterator[tuple[Tensor, Tensor]] = self._started or super().__iter__()
        self._started = None
        if self.device.type == "cuda":
            batches = copied_ahead(batches, self.device)
        return (
            (self.transform(images.permute(0, 3, 1, 2).contiguous()), labels)
            for images, labels in batches
        )


def _as_pillow_has_them(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
    """A batch of images `[3, H, W]` that are views of `[H, W, 3]`, which are quick to join."""
    return default_collate([(image.permute(1, 2, 0), label) for image, label in samples])


def copied_ahead(
    batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose images are on a GPU; the next one is copied while this one is computed with."""
    stream = torch.cuda.Stream(device)

    def copied(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return batch[0].to(device, non_blocking=True), batch[1], stream.record_event()

    coming = map(copied, batches)
    ahead = next(coming, None)
    while ahead is not None:
        (images, labels, done), ahead = ahead, next(coming, None)
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        images.record_stream(current)  # or its memory would be taken for the batch after the next
        yield images, labels


@dataclass(frozen=True)
class ImageLoading:
    """Where images come from and how they are read, in training and evaluation alike.

    Attributes:
        data_set, data_path, inat_category: as `datasets.build_dataset` takes them.
        holdout: training images that are left out of training and evaluated on.
        batch_size: images of a training batch; evaluation takes half as many again.
        num_workers: processes that load images, of which there is at most one per CPU core.
        pin_memory: use pinned host memory where the device is a GPU.
        cached: keep all images on the device, and augment whole batches there.
        compiler: backend of torch.compile for what is done to whole batches; None leaves it as it
            is.
    """

    data_set: str
    data_path: str
    inat_category: str = "name"
    holdout: int = 0
    batch_size: int = 64
    num_workers: int = 0
    pin_memory: bool = False
    cached: bool = False
    compiler: str | None = None

    def find(
        self, world: World, *, train: bool, transform: Transform | None = None
    ) -> LabelledImages:
        """The images of training or of evaluation."""
        with world.main_first():
            dataset, _ = build_dataset(
                self.data_set,
                self.data_path,
                train=train or self.holdout > 0,
                inat_category=self.inat_category,
                transform=transform,
            )
        return Split(dataset, self.holdout, held_out=not train) if self.holdout else dataset

    def batches(
        self,
        dataset: Any,
        batch_size: int,
        *,
        device: torch.device,
        ahead: int = 2,
        **options: Any,
    ) -> DeviceLoader | CachedLoader:
        """A loader with the `options` of its class; its workers are `ahead` by so many batches."""
        options |= {"device": device, **worker_options(self.num_workers)}
        if self.cached:
            return CachedLoader(dataset, batch_size, **options)
        working = options["num_workers"] > 0
        return DeviceLoader(
            dataset,
            batch_size,
            persistent_workers=working,
            prefetch_factor=ahead if working else None,
            pin_memory=self.pin_memory and device.type == "cuda",
            **options,
        )

    def compiled(self, transform: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return compile_augmentation(transform, self.compiler) if self.compiler else transform


def build_train_loader(
    loading: ImageLoading,
    world: World,
    images: Preprocessing,
    *,
    augmentation: dict[str, Any] | None,
    erasing: dict[str, Any],
    repeats: int = 1,
    seed: int = 0,
    accumulate: int = 1,
) -> tuple[DeviceLoader | CachedLoader, list[str]]:
    """Batches for training, and the names of the classes.

    Args:
        augmentation: of `augment.build_train_transform`; None shows the images as evaluation does.
        erasing: `reprob`, `remode` and `recount` of `device_augment.build_normalization`.
        repeats: draws of each image.
        accumulate: batches of an optimiser step.

    Raises:
        UserError: data that is missing, or of fewer images than a step draws.
    """
    found = loading.find(world, train=True)
    sampler = EpochSampler(
        len(found), num_replicas=world.size, rank=world.rank, repeats=repeats, seed=seed
    )
    if len(sampler) < loading.batch_size * accumulate:
        raise UserError(
            f"One step draws {loading.batch_size * accumulate} images per process, but an epoch of "
            f"{loading.data_set} has only {len(sampler)}: lower --batch-size or --grad-accum-steps."
        )
    build: Callable[..., Callable[[Tensor], Tensor]] = build_normalization
    if loading.cached and augmentation is not None:
        build = partial(build_device_transform, aa=augmentation["aa"])
    transform = build(mean=images.mean, std=images.std, device=world.device, **erasing)
    options: dict[str, Any] = {
        "sampler": sampler,
        "device": world.device,
        "drop_last": True,
        "transform": loading.compiled(transform),
    }
    if loading.cached:
        dataset = SeededDataset(found, _eval_transform(images), seed=seed)
        options["keys"] = [(index, index) for index in range(len(found))]
    else:
        dataset = SeededDataset(found, _train_transform(images, augmentation), seed=seed)
    return loading.batches(dataset, loading.batch_size, **options), list(found.classes)


def build_eval_loader(
    loading: ImageLoading, world: World, images: Preprocessing
) -> DeviceLoader | CachedLoader:
    """Batches for evaluation, of this process's share of the images."""
    found = loading.find(world, train=False, transform=_eval_transform(images))
    sampler = ShardSampler(len(found), num_replicas=world.size, rank=world.rank)
    normalize = build_normalization(mean=images.mean, std=images.std, device=world.device)
    # What these workers load at the start of a run fills memory through its first epoch.
    return loading.batches(found, int(1.5 * loading.batch_size), ahead=1, sampler=sampler,
                           transform=normalize, device=world.device)  # fmt: skip


def _train_transform(images: Preprocessing, augmentation: dict[str, Any] | None) -> Transform:
    if augmentation is None:
        return _eval_transform(images)
    options = {"interpolation": images.interpolation, **augmentation}
    return build_train_transform(input_size=images.size, mean=images.mean, **options)


def _eval_transform(images: Preprocessing) -> Transform:
    return build_eval_transform(
        input_size=images.size,
        crop_ratio=images.crop_pct,
        crop_mode=images.crop_mode,
        interpolation=images.interpolation,
    )


@contextmanager
def _random_states_restored() -> Iterator[None]:
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
