"""Turns text into token shards: python -m mlm.prepare FILE ... --output FOLDER

A file's documents: `.txt`, separated by blank lines; `.jsonl` or `.json`, an object per line;
`.parquet`, a row each; the first two also with `.gz`. Called again, it goes on at the first file
whose shards are not there. Files of C4 are on the disk one at a time.
"""

import argparse
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from commands import run_command
from errors import UserError
from files import replacing
from intervals import outside
from journal import require_writable
from locking import only_run_in
from mlm.documents import KINDS, Documents, Source, c4_sources, kind_of, local_source
from mlm.shards import SPLITS, digest_of, fingerprint_of, load_tokenizer, read_header, shard_writer
from mlm.vocabulary import (
    WORDS,
    document_encoder,
    origin_of,
    read_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from processes import World

BATCH = 256  # documents that are tokenised side by side
EVAL_SHARE = 0.01
RECIPE = 2  # another number where the same text gives other shards than before


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mlm.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--c4", metavar="FIRST-LAST", help="files of C4 (0 to 1023), downloaded")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, metavar="PATH",
        help="vocab.txt of a BERT, or a folder with tokenizer.json")  # fmt: skip
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="WORDS",
        help="make a WordPiece vocabulary of this size from the text")  # fmt: skip
    parser.add_argument("--cased", action="store_true",
        help="keep capitals, with vocab.txt or a new vocabulary")  # fmt: skip
    parser.add_argument("--text-field", default="text", help="of JSON objects and parquet rows")
    parser.add_argument("--eval-share", type=float, default=EVAL_SHARE,
        help="of the documents, held out (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-skipped", type=float, default=0.1,
        help="share of a file's documents that may be no text (default: %(default)s)")  # fmt: skip
    return parser


def held_out(document: str, share: float) -> bool:
    """Whether a document is for evaluation, decided by its text alone."""
    return zlib.crc32(document.encode()) < share * 2**32


def write_shards(
    documents: Documents,
    stem: str,
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    eval_share: float,
) -> None:
    """Both splits of one input file."""
    facts = (fingerprint_of(output / "tokenizer"), len(tokenizer))
    encode = document_encoder(tokenizer)
    texts = filter(str.strip, documents)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc=documents.path.name, unit="doc", unit_scale=True))
        add_train, add_eval = (
            stack.enter_context(shard_writer(output / f"{split}-{stem}.bin", *facts))
            for split in SPLITS
        )
        while batch := list(islice(texts, BATCH)):
            for text, ids in zip(batch, encode(batch), strict=True):
                add = add_eval if held_out(text, eval_share) else add_train
                add(ids)
            bar.update(len(batch))


def sha256_of(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def stem_of(number: int, source: Source, field: str, eval_share: float) -> str:
    """Name of a file's shards, another one for other text or settings."""
    digest = sha256_of(RECIPE, source.name, source.digest, field, eval_share)
    return f"{number:05d}-{digest[:8]}"


def is_done(stem: str, output: Path) -> bool:
    fingerprint = fingerprint_of(output / "tokenizer")
    try:
        for split in SPLITS:
            read_header(output / f"{split}-{stem}.bin", fingerprint)
    except UserError:
        return False
    return True


def write_manifest(
    output: Path, stems: list[str], sources: list[Source], words: int, eval_share: float
) -> dict[str, dict]:
    """What the shards hold, by split, as the manifest keeps it; `words` are in the vocabulary.

    Raises UserError if they hold no document, or a share that is not the default holds out none.
    """
    fingerprint = fingerprint_of(output / "tokenizer")
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        names = [f"{split}-{stem}.bin" for stem in stems]
        counts = [read_header(output / name, fingerprint) for name in names]
        splits[split] = {
            "documents": sum(documents for documents, _, _ in counts),
            "tokens": sum(tokens for _, tokens, _ in counts),
            "shards": names,
        }
    if not any(facts["documents"] for facts in splits.values()):
        empty = ", ".join(source.name for source in sources)
        raise UserError(f"There is no document in {empty}: give files that hold text.")
    if eval_share != EVAL_SHARE and (wrong := none_held_out(splits, eval_share)):
        raise UserError(wrong)
    manifest = {
        "tokenizer": fingerprint,
        "vocab_size": words,
        "digest": digest_of(fingerprint, {split: splits[split]["shards"] for split in SPLITS}),
        "sources": [{"name": source.name, "sha256": source.digest} for source in sources],
        "splits": splits,
    }
    with replacing(output / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    return splits


def none_held_out(splits: dict[str, dict], share: float) -> str:
    """What is wrong with a share by which no document is held out, if anything."""
    if splits["eval"]["documents"] or not share:
        return ""
    count = splits["train"]["documents"]
    return f"None of {count:,} documents is held out: give a larger --eval-share than {share:g}."


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not go together, or text that is not there."""
    if bool(args.files) == bool(args.c4):
        raise UserError("Give files of text, or --c4 FIRST-LAST: one of the two.")
    for name, interval in (("eval_share", "[0, 1)"), ("max_skipped", "[0, 1]")):
        if wrong := outside(getattr(args, name), interval):
            raise UserError(f"--{name.replace('_', '-')} {wrong}.")
    for path in args.files:
        if kind_of(path) not in KINDS:
            raise UserError(
                f"{path} is no .txt, .json, .jsonl (or these with .gz) or .parquet: convert it."
            )
        if not path.is_file():
            raise UserError(f"The text {path} does not exist: check its name.")
    if args.train_tokenizer is not None and args.train_tokenizer <= len(WORDS):
        raise UserError(f"--train-tokenizer must be above {len(WORDS)}.")
    if args.tokenizer and not args.tokenizer.exists():
        raise UserError(f"The tokeniser {args.tokenizer} does not exist: check its name.")
    if args.cased and args.tokenizer and args.tokenizer.suffix != ".txt":
        raise UserError(f"--cased is for vocab.txt: {args.tokenizer} itself says what it keeps.")


def build(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments; the returned function does the work."""
    check_args(args)
    require_writable(args.output, World(), "--output")
    with only_run_in(args.output, World(), "--output"):
        if args.c4:
            return prepare(args, c4_sources(args.c4, args.output))
        return prepare(args, [local_source(path) for path in args.files])


def prepare(args: argparse.Namespace, sources: list[Source]) -> Callable[[], None]:
    """Makes the shards. Text that cannot be read is the user's error, as bad arguments are."""
    output, field, max_skipped = args.output, args.text_field, args.max_skipped
    if args.tokenizer:
        given = read_tokenizer(args.tokenizer, lowercase=not args.cased)
        save_tokenizer(given, output / "tokenizer", origin="")
    else:
        make_tokenizer(output / "tokenizer", args.train_tokenizer, sources, cased=args.cased,
                       field=field, max_skipped=max_skipped)  # fmt: skip
    tokenizer = load_tokenizer(output / "tokenizer")
    for leftover in output.glob(".*.bin.saving"):  # of a call that was killed
        leftover.unlink()
    stems, skipped = [], 0
    for number, source in enumerate(sources):
        stems.append(stem_of(number, source, field, args.eval_share))
        if not is_done(stems[-1], output):
            with source.file() as path:
                documents = Documents(path, field, max_skipped)
                write_shards(documents, stems[-1], output, tokenizer, args.eval_share)
            skipped += documents.skipped
    splits = write_manifest(output, stems, sources, len(tokenizer), args.eval_share)

    def report() -> None:
        for split, facts in splits.items():
            print(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")
        if skipped:
            print(f"skipped: {skipped:,} documents that are no text")
        if wrong := none_held_out(splits, args.eval_share):
            print(wrong)

    return report


def make_tokenizer(
    folder: Path,
    words: int,
    sources: list[Source],
    *,
    cased: bool,
    field: str,
    max_skipped: float,
) -> None:
    """A tokeniser of so many words from this very text.

    One that was made of the same text in an earlier call is kept: a new one would differ.
    """
    text = [(source.name, source.digest) for source in sources]
    origin = sha256_of(RECIPE, words, cased, field, text)
    if origin_of(folder) != origin:
        texts = _read_all(sources, field, max_skipped)
        save_tokenizer(train_tokenizer(texts, words, lowercase=not cased), folder, origin)


def _read_all(sources: Iterable[Source], field: str, max_skipped: float) -> Iterator[str]:
    for source in sources:
        with source.file() as path:
            yield from Documents(path, field, max_skipped, report=False)


def main(arguments: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(arguments)
    run_command("mlm.prepare", lambda _: build(args))


if __name__ == "__main__":
    main()
