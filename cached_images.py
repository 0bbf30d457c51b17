"""Small images that are decoded once and stay on the device as bytes, for fast training."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from samplers import EpochSampler, ShardSampler

BATCH = 1000  # images that a worker decodes at a time


class CachedLoader:
    """Batches `(images, labels)` of a data set that is held on a device; both are there.

    The images are decoded, by `num_workers` processes, when the first batch is asked for.

    Args:
        dataset: yields (bytes `[3, S, S]`, label) and has `classes`; of one size.
        batch_size: images of a batch.
        sampler: yields indices of images, or pairs that begin with one.
        transform: bytes `[B, 3, S, S]` on the device -> what is to be yielded.
        keys: what to index `dataset` by to get its images in order; None is their number.
        drop_last: leave out the last batch where it is not full.
        options: of the DataLoader that decodes.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        sampler: EpochSampler | ShardSampler,
        transform: Callable[[Tensor], Tensor],
        device: torch.device,
        keys: Sequence | None = None,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.sampler: Any = sampler
        self.transform = transform
        self.device = device
        self.drop_last = drop_last
        keys = range(len(dataset)) if keys is None else keys
        self._decoder = DataLoader(dataset, BATCH, sampler=keys, **options)

    def start(self) -> None:
        """Decodes the images now, as `loaders.DeviceLoader` starts its workers."""
        _ = self._images_and_labels

    @cached_property
    def _images_and_labels(self) -> tuple[Tensor, Tensor]:
        images, labels = zip(*self._decoder, strict=True)
        return torch.cat(images).to(self.device), torch.cat(labels).to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # No generator: decoding draws random numbers, here and not at the first batch.
        images, labels = self._images_and_labels
        drawn = np.array(list(self.sampler)).reshape(len(self.sampler), -1)[:, 0]
        batches = torch.from_numpy(drawn).to(self.device).split(self.batch_size)[: len(self)]
        return ((self.transform(images[batch]), labels[batch]) for batch in batches)

    def __len__(self) -> int:
        count = len(self.sampler)
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)
