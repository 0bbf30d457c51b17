"""Which image each process draws next, and a number for every draw."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from errors import UserError


class EpochSampler(Sampler[tuple[int, int]]):
    """Training order: yields `(index, draw)`, one shuffled order per epoch shared by all processes.

    The order depends on (seed, epoch) alone and process r takes the positions r, r + R, ..., so R
    processes with batch b see at every step the images of one process with batch R * b. `draw`
    numbers the samples of the whole training: it is unique, and the same whichever process or
    worker loads the sample, so it can seed the sample's augmentation.

    With `repeats` > 1 (repeated augmentation, arXiv 1902.05509) each image comes `repeats` times
    in a row, hence on different processes, but an epoch stays as long as without: as in DeiT,
    `length` rounded down to a multiple of 256 where the data set has as many images.

    Args:
        length: images in the data set.
        num_replicas, rank: number of processes R and the number r of this one.
        shuffle: False keeps the order of the data set.
        repeats: consecutive draws of each image.
        seed: non-negative int.

    Raises:
        UserError: fewer images than processes.
    """

    def __init__(
        self,
        length: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        repeats: int = 1,
        seed: int = 0,
    ) -> None:
        if length < num_replicas:
            raise UserError(
                f"The training set has {length} images for {num_replicas} processes: "
                "use fewer processes or more images."
            )
        self.length = length
        self.num_replicas = num_replicas
        self.rank = rank
        self.shuffle = shuffle
        self.repeats = repeats
        self.seed = seed
        draws_per_epoch = length if repeats == 1 else length // 256 * 256 or length
        self.draws_per_replica = draws_per_epoch // num_replicas
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Go to `epoch`, of which this process has consumed `start` draws already."""
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        first = self.rank + self.start * self.num_replicas
        end = self.draws_per_replica * self.num_replicas
        for position in range(first, end, self.num_replicas):
            # No epoch has more than `length` draws, whatever the number of processes.
            yield int(order[position // self.repeats]), self.epoch * self.length + position

    def __len__(self) -> int:
        return self.draws_per_replica - self.start


class ShardSampler(Sampler[int]):
    """Evaluation order: process `rank` of `num_replicas` takes the images rank, rank + R, ...

    Every image is taken exactly once, so the shards may differ in length by one.
    """

    def __init__(self, length: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        self.indices = range(rank, length, num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
