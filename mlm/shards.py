"""Token shards: written whole or not at all, memory-mapped, and bound to their tokeniser.

A folder of shards holds `manifest.json`, `tokenizer/` and the shards of the splits `train` and
`eval`. A shard is a header and its documents' tokens one after the other, each document
`[CLS] ... [SEP]`.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from errors import UserError
from files import inside, replacing, require_file

HEADER = struct.Struct("<8s32sQQB7x")  # magic, SHA-256 of the tokeniser, documents, tokens, bytes
MAGIC = b"LIONMLM1"
SPLITS = ("train", "eval")
SPECIAL_TOKENS = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_USUAL_NAMES = (("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
                ("<pad>", "<unk>", "<s>", "</s>", "<mask>"))  # fmt: skip


@contextmanager
def shard_writer(path: Path, fingerprint: str, vocab: int) -> Iterator[Callable[[list[int]], None]]:
    """Gives a function that adds a document's tokens; `path` is a whole shard after the block.

    It is not there if the block fails.
    """
    dtype = np.dtype("<u2" if vocab <= 2**16 else "<u4")
    count = tokens = 0

    def add(document: list[int]) -> None:
        nonlocal count, tokens
        file.write(np.asarray(document, dtype).tobytes())
        count, tokens = count + 1, tokens + len(document)

    with replacing(path, "xb") as file:
        file.write(bytes(HEADER.size))
        yield add
        file.seek(0)
        header = (MAGIC, bytes.fromhex(fingerprint), count, tokens, dtype.itemsize)
        file.write(HEADER.pack(*header))


def read_header(path: Path, fingerprint: str) -> tuple[int, int, int]:
    """Documents, tokens and bytes per token of a shard that is whole and of this tokeniser.

    Raises UserError if it is not.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from error
    if len(header) < HEADER.size or header[:8] != MAGIC:
        raise UserError(f"{path} is no token shard, or cut off: prepare the text again.")
    _, written_by, documents, tokens, width = HEADER.unpack(header)
    if written_by.hex() != fingerprint:
        raise UserError(
            f"The shard {path} was written with another tokeniser than that of its folder: "
            "prepare the text again."
        )
    expected, size = HEADER.size + tokens * width, path.stat().st_size
    if size != expected:
        raise UserError(
            f"The shard {path} is truncated or damaged ({size} bytes, not {expected}): "
            "prepare the text again."
        )
    return documents, tokens, width


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of the tokeniser in a folder."""
    try:
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"There is no tokeniser in {folder}: {error.strerror}.") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokeniser in a folder; UserError if it lacks BERT's special tokens."""
    fingerprint_of(folder)  # a folder that is not there would be looked for on the hub
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"cannot load the tokeniser in {folder}: {error}") from error
    _look_up_special_tokens(tokenizer)
    missing = [name for name in SPECIAL_TOKENS if getattr(tokenizer, f"{name}_id") is None]
    if missing:
        raise UserError(
            f"The tokeniser in {folder} has no {', '.join(missing)}: name them in "
            "tokenizer_config.json."
        )
    _require_ids(tokenizer.get_vocab(), folder)
    return tokenizer


def _look_up_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """Names the special tokens that a bare tokenizer.json has, as BERT or RoBERTa call them."""
    words = tokenizer.get_vocab()
    for name, *candidates in zip(SPECIAL_TOKENS, *_USUAL_NAMES, strict=True):
        known = [word for word in candidates if word in words]
        if getattr(tokenizer, name) is None and known:
            setattr(tokenizer, name, known[0])


def _require_ids(words: dict[str, int], folder: Path) -> None:
    """Raises UserError if words do not have the numbers from 0 on, one each."""
    named: dict[int, str] = {}
    for word, number in sorted(words.items()):
        if number >= len(words):
            raise UserError(
                f"The tokeniser in {folder} gives {word!r} the id {number}, beyond its vocabulary "
                f"of {len(words)} words: number these from 0 to {len(words) - 1}."
            )
        if number in named:
            raise UserError(
                f"The tokeniser in {folder} gives the id {number} to two words, {named[number]!r} "
                f"and {word!r}: number them apart."
            )
        named[number] = word


class Corpus:
    """Windows of `length` tokens of one split of a prepared folder.

    Raises UserError if the folder is not whole.
    """

    def __init__(self, folder: str | Path, split: str, length: int) -> None:
        self.folder, self.length = Path(folder), length
        manifest = read_manifest(self.folder)
        self.fingerprint = fingerprint_of(self.folder / "tokenizer")
        self.shards = []
        for name in manifest["splits"][split]["shards"]:
            path = self.folder / name
            _, tokens, width = read_header(path, self.fingerprint)
            if tokens >= length:
                self.shards.append(
                    np.memmap(path, f"<u{width}", "r", offset=HEADER.size, shape=tokens)
                )
        self.ends = np.cumsum([len(shard) // length for shard in self.shards])
        if not self.shards:
            more = "more text" if split == "train" else "more text, or with a larger --eval-share"
            raise UserError(
                f"The {split} split of {folder} has no window of {length} tokens: "
                f"prepare {more}, or lower the length."
            )

    def description(self) -> str:
        """What tells it apart from another, wherever it is."""
        sizes = ",".join(str(len(shard)) for shard in self.shards)
        content = hashlib.sha256(f"{self.fingerprint} {sizes}".encode()).hexdigest()[:8]
        return f"{len(self)} windows of {self.length} tokens, {content}"

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, int64 `[length]`."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        start = (index - (self.ends[shard - 1] if shard else 0)) * self.length
        return self.shards[shard][start : start + self.length].astype(np.int64)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UserError if the folder was not prepared to the end, or names files outside of it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        splits = manifest["splits"]
        if missing := [split for split in SPLITS if split not in splits]:
            raise KeyError(missing[0])
        names = [name for split in splits.values() for name in split["shards"]]
        if strangers := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"a shard is called {strangers[0]!r:.40}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
        raise UserError(
            f"cannot read {folder}/manifest.json: {reason}; make the folder with "
            "python -m mlm.prepare."
        ) from error
    for name in names:
        inside(folder, name, folder / "manifest.json")
    return manifest


def digest_of(tokenizer: str, shards: dict[str, list[str]]) -> str:
    """Tells prepared text from other text: of the tokeniser's SHA-256 and the shards' names.

    A shard's name holds a digest of its text.
    """
    return hashlib.sha256(json.dumps([tokenizer, shards], sort_keys=True).encode()).hexdigest()


def data_digest(folder: Path) -> str:
    """`digest_of` the folder's text; its manifest need not hold it."""
    manifest = read_manifest(folder)
    shards = {name: split["shards"] for name, split in manifest["splits"].items()}
    return digest_of(fingerprint_of(folder / "tokenizer"), shards)
