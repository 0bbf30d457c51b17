"""Masked windows of a corpus: which are drawn when, and which tokens are masked in them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerFast

from errors import UserError
from mlm.shards import Corpus
from samplers import EpochSampler

IGNORED = -100


class MaskedWindows(Dataset):
    """Items `(index, draw)`: window `index`, with masks that depend on (seed, draw) alone.

    An item has `input_ids` and `labels`, int64 `[N]`, and `document_ids` if documents are kept
    apart. Of the tokens to predict, 80 % are masked, 10 % replaced by any word and 10 % kept.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        *,
        share: float,
        seed: int,
        separate_documents: bool,
    ) -> None:
        self.corpus, self.share, self.seed = corpus, share, seed
        self.separate_documents = separate_documents
        self.special = np.array(tokenizer.all_special_ids)
        self.words = len(tokenizer)
        self.mask, self.cls = tokenizer.mask_token_id, tokenizer.cls_token_id

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = place
        tokens = self.corpus[index]
        if (most := tokens.max()) >= self.words:
            raise UserError(
                f"A shard in {self.corpus.folder} holds the token {most}, beyond the {self.words} "
                "words of its tokeniser: it is damaged, prepare the text again."
            )
        generator = np.random.default_rng((self.seed, draw))
        chance, kind = generator.random((2, len(tokens)))
        others = generator.integers(self.words, size=len(tokens))
        selected = (chance < self.share) & ~np.isin(tokens, self.special)
        inputs = np.where(kind < 0.8, self.mask, np.where(kind < 0.9, others, tokens))
        item = {
            "input_ids": np.where(selected, inputs, tokens),
            "labels": np.where(selected, tokens, IGNORED),
        }
        if self.separate_documents:
            item["document_ids"] = (tokens == self.cls).cumsum()
        return {name: torch.from_numpy(values) for name, values in item.items()}


class EndlessSampler(Sampler[tuple[int, int]]):
    """Epoch after epoch of an `EpochSampler`, from the draw `start` of this process."""

    def __init__(self, epochs: EpochSampler, start: int) -> None:
        self.epochs, self.start = epochs, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = divmod(self.start, self.epochs.draws_per_replica)
        while True:
            self.epochs.set_epoch(epoch, start)
            yield from self.epochs
            epoch, start = epoch + 1, 0


class EvalSampler(Sampler[tuple[int, int]]):
    """Every window once over all processes, always with the same masks."""

    def __init__(self, length: int, *, num_replicas: int, rank: int) -> None:
        self.indices = range(rank, length, num_replicas)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((index, index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)
