"""Turns text into token shards: python -m mlm.prepare FILE ... --output FOLDER

A file's documents: `.txt`, separated by blank lines; `.jsonl` or `.json`, an object per line;
`.parquet`, a row each; the first two also with `.gz`. Called again, it goes on at the first file
whose shards are not there. Files of C4 are on the disk one at a time.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from files import replacing
from mlm.shards import SPECIAL_TOKENS, fingerprint_of, load_tokenizer, read_header, shard_writer
from utils import run_command

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # as SPECIAL_TOKENS
SPLITS = ("train", "eval")
BATCH = 256  # documents that are tokenised side by side
C4_FILES = 1024


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
    parser.add_argument("--text-field", default="text", help="of JSON objects and parquet rows")
    parser.add_argument("--eval-share", type=float, default=0.01, help="of the documents, held out")
    return parser


# ------------------------------------------------------------------------------------- documents


def read_documents(path: Path, field: str) -> Iterator[str]:
    """The documents of a file; ValueError naming the place where it cannot be read."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        yield from _rows(path, field)
        return
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        try:
            yield from _paragraphs(file) if kind == "txt" else _objects(file, path, field)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise ValueError(f"cannot read the text {path}: {error}") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _objects(lines: Iterable[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)[field]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is no JSON object with the field {field!r}."
            ) from error
        yield str(text)


def _rows(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow.") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=[field]):
            yield from (str(value) for value in batch.column(field).to_pylist())
    except (ArrowInvalid, KeyError, OSError) as error:
        raise ValueError(f"cannot read {field!r} of {path}: {error}") from error


@dataclass(frozen=True)
class Source:
    """A file of documents: what tells it from others, and the file itself while it is read."""

    facts: tuple
    file: Callable[[], AbstractContextManager[Path]]


def local_source(path: Path) -> Source:
    return Source((path.name, path.stat().st_size), lambda: nullcontext(path))


def c4_sources(span: str, output: Path) -> list[Source]:
    """The files FIRST-LAST of English C4."""
    first, _, last = span.partition("-")
    try:
        numbers = range(int(first), int(last or first) + 1)
    except ValueError:
        numbers = range(0)
    if not numbers or numbers[-1] >= C4_FILES:
        raise ValueError(f"--c4 takes FIRST-LAST of 0 to {C4_FILES - 1}, not {span!r}.")
    names = [f"en/c4-train.{number:05d}-of-{C4_FILES:05d}.json.gz" for number in numbers]
    return [Source((name,), partial(_c4_file, name, output / ".download")) for name in names]


@contextmanager
def _c4_file(name: str, folder: Path) -> Iterator[Path]:
    """Downloads a file, or the rest of it, and removes it after the block."""
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            "allenai/c4", name, repo_type="dataset", local_dir=folder
        )
    except Exception as error:  # of HTTP, of the hub, of the disk
        raise ValueError(f"cannot download {name} of allenai/c4: {error}") from error
    yield Path(path)
    shutil.rmtree(folder)


def read_sources(sources: Iterable[Source], field: str) -> Iterator[str]:
    for source in sources:
        with source.file() as path:
            yield from read_documents(path, field)


# ------------------------------------------------------------------------------------- tokenisers


def wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    """BERT's uncased tokeniser with this vocabulary; an empty one can be trained."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(documents: Iterable[str], size: int) -> Tokenizer:
    tokenizer = wordpiece({})
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=list(WORDS), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def read_vocabulary(path: Path) -> Tokenizer:
    words = path.read_text().splitlines()
    missing = [word for word in WORDS if word not in words]
    if missing:
        raise ValueError(f"The vocabulary {path} lacks {', '.join(missing)}.")
    return wordpiece({word: number for number, word in enumerate(words)})


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    cls, sep = (tokenizer.token_to_id(word) for word in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls), ("[SEP]", sep)],
    )
    named = dict(zip(SPECIAL_TOKENS, WORDS, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=inputs, **named
    ).save_pretrained(folder)


# ----------------------------------------------------------------------------------------- shards


def held_out(document: str, share: float) -> bool:
    """Whether a document is for evaluation, decided by its text alone."""
    return zlib.crc32(document.encode()) < share * 2**32


def write_shards(
    path: Path, stem: str, output: Path, tokenizer: Tokenizer, args: argparse.Namespace
) -> None:
    """Both splits of one input file."""
    facts = (fingerprint_of(output / "tokenizer"), tokenizer.get_vocab_size())
    texts = filter(str.strip, read_documents(path, args.text_field))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc=path.name, unit="doc", unit_scale=True))
        add_train, add_eval = (
            stack.enter_context(shard_writer(output / f"{split}-{stem}.bin", *facts))
            for split in SPLITS
        )
        while batch := list(islice(texts, BATCH)):
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch), strict=True):
                add = add_eval if held_out(text, args.eval_share) else add_train
                add(encoding.ids)
            bar.update(len(batch))


def stem_of(number: int, source: Source, args: argparse.Namespace) -> str:
    """Name of a file's shards, another one for other text or settings."""
    facts = (*source.facts, args.text_field, args.eval_share)
    return f"{number:05d}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def is_done(stem: str, output: Path) -> bool:
    fingerprint = fingerprint_of(output / "tokenizer")
    try:
        for split in SPLITS:
            read_header(output / f"{split}-{stem}.bin", fingerprint)
    except ValueError:
        return False
    return True


def write_manifest(output: Path, stems: list[str], words: int) -> dict[str, dict]:
    fingerprint = fingerprint_of(output / "tokenizer")
    splits = {}
    for split in SPLITS:
        names = [f"{split}-{stem}.bin" for stem in stems]
        counts = [read_header(output / name, fingerprint) for name in names]
        splits[split] = {
            "documents": sum(documents for documents, _, _ in counts),
            "tokens": sum(tokens for _, tokens, _ in counts),
            "shards": names,
        }
    manifest = {"tokenizer": fingerprint, "vocab_size": words, "splits": splits}
    with replacing(output / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
    return splits


def build(args: argparse.Namespace) -> Callable[[], None]:
    """Checks the arguments; the returned function does the work."""
    if bool(args.files) == bool(args.c4):
        raise ValueError("Give files of text, or --c4 FIRST-LAST: one of the two.")
    if not 0 <= args.eval_share < 1:
        raise ValueError(f"--eval-share must be in [0, 1), not {args.eval_share}.")
    for path in args.files:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind not in ("txt", "json", "jsonl", "parquet"):
            raise ValueError(f"{path} is no .txt, .json, .jsonl (or these with .gz) or .parquet.")
        if not path.is_file():
            raise ValueError(f"The text {path} does not exist.")
    if args.train_tokenizer is not None and args.train_tokenizer <= len(WORDS):
        raise ValueError(f"--train-tokenizer must be above {len(WORDS)}.")
    if args.tokenizer and not args.tokenizer.exists():
        raise ValueError(f"The tokeniser {args.tokenizer} does not exist.")
    files = map(local_source, args.files)
    return prepare(args, c4_sources(args.c4, args.output) if args.c4 else list(files))


def prepare(args: argparse.Namespace, sources: list[Source]) -> Callable[[], None]:
    """Makes the shards. Text that cannot be read is the user's error, as bad arguments are."""
    folder = args.output / "tokenizer"
    args.output.mkdir(parents=True, exist_ok=True)
    if args.train_tokenizer is None:
        if args.tokenizer.is_dir():
            load_tokenizer(args.tokenizer).save_pretrained(folder)
        else:
            save_tokenizer(read_vocabulary(args.tokenizer), folder)
    elif not (folder / "tokenizer.json").exists():
        texts = read_sources(sources, args.text_field)
        save_tokenizer(train_tokenizer(texts, args.train_tokenizer), folder)
    tokenizer = load_tokenizer(folder).backend_tokenizer
    stems = []
    for number, source in enumerate(sources):
        stems.append(stem_of(number, source, args))
        if not is_done(stems[-1], args.output):
            with source.file() as path:
                write_shards(path, stems[-1], args.output, tokenizer, args)
    splits = write_manifest(args.output, stems, tokenizer.get_vocab_size())

    def report() -> None:
        for split, facts in splits.items():
            print(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens")

    return report


def main(arguments: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(arguments)
    run_command("mlm.prepare", lambda _: build(args))


if __name__ == "__main__":
    main()
