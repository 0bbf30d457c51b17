"""Documents of text files: what is no text is left out, counted, and reported with its place."""

import gzip
import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from errors import UserError

logger = logging.getLogger(__name__)

KINDS = ("txt", "json", "jsonl", "parquet")
C4_FILES = 1024
_MAX_REPORTED = 5  # places of a file


def kind_of(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2]


class Documents:
    """Iterates over the documents of a file.

    `seen` and `skipped` count what there was and what was no text; the first few of these are
    logged if `report`. Raises UserError, at the end, if they were more than the share
    `max_skipped`, and where the file cannot be read.
    """

    def __init__(self, path: Path, field: str, max_skipped: float, *, report: bool = True) -> None:
        self.path, self.field, self.max_skipped, self.report = path, field, max_skipped, report
        self.seen = self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        first = ""
        for place, value in _values(self.path, self.field):
            self.seen += 1
            if not (reason := _no_text(value)):
                yield value
                continue
            self.skipped += 1
            first = first or f"{place} of {self.path} {reason}"
            if self.report and self.skipped <= _MAX_REPORTED:
                logger.warning("Skipped: %s of %s %s.", place, self.path, reason)
        if self.report and self.skipped > _MAX_REPORTED:
            logger.warning("Skipped %d documents of %s in all.", self.skipped, self.path)
        if self.skipped > self.max_skipped * self.seen:
            raise UserError(
                f"{first}, and in all {self.skipped} of {self.seen} documents are no text: mend "
                "the file, or raise --max-skipped."
            )


@dataclass(frozen=True)
class NoText:
    """What stands in the place of a document."""

    reason: str


def _no_text(value: Any) -> str:
    """Why a value is no text; "" if it is."""
    if isinstance(value, NoText):
        return value.reason
    if not isinstance(value, str):
        return f"holds {json.dumps(value, default=repr)[:40]}, which is no text"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds the code {error.object[error.start]!a}, which is no character"
    return ""


def _values(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """The place and value of every document of a file."""
    if kind_of(path) == "parquet":
        yield from _rows(path, field)
        return
    try:
        with _opened(path) as file:
            lines = enumerate(file, start=1)
            yield from _paragraphs(lines) if kind_of(path) == "txt" else _objects(lines, field)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the text {path}: {error}") from error


def _opened(path: Path) -> IO[str]:
    """Lines end at line feeds alone; bytes that are no UTF-8 become surrogates."""
    options: dict[str, Any] = {
        "encoding": "utf-8-sig", "errors": "surrogateescape", "newline": "\n"
    }  # fmt: skip
    return gzip.open(path, "rt", **options) if path.suffix == ".gz" else path.open(**options)


def _paragraphs(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    paragraph: list[str] = []
    start = 0
    for number, line in lines:
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield f"Line {start}", "".join(paragraph)
            paragraph = []
    if paragraph:
        yield f"Line {start}", "".join(paragraph)


def _objects(lines: Iterable[tuple[int, str]], field: str) -> Iterator[tuple[str, Any]]:
    for number, line in lines:
        if line.isspace():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            value = NoText(f"is no JSON object with the field {field!r}")
        yield f"Line {number}", value


def _rows(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path} needs pyarrow: pip install pyarrow.") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=[field]):
            for scalar in batch.column(field):
                number += 1
                yield f"Row {number}", _of_arrow(scalar)
    except (ArrowException, KeyError, OSError) as error:
        raise UserError(f"cannot read {field!r} of {path}: {error}") from error


def _of_arrow(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NoText("is no UTF-8")


@dataclass(frozen=True)
class Source:
    """A file of documents: what tells it from others, and the file itself while it is read."""

    name: str
    digest: str
    file: Callable[[], AbstractContextManager[Path]]


def local_source(path: Path) -> Source:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Source(path.name, digest, lambda: nullcontext(path))


def c4_sources(span: str, output: Path) -> list[Source]:
    """The files FIRST-LAST of English C4, which never change."""
    first, _, last = span.partition("-")
    try:
        numbers = range(int(first), int(last or first) + 1)
    except ValueError:
        numbers = range(0)
    if not numbers or numbers[0] < 0 or numbers[-1] >= C4_FILES:
        raise UserError(f"--c4 takes FIRST-LAST of 0 to {C4_FILES - 1}, not {span!r}.")
    names = [f"en/c4-train.{number:05d}-of-{C4_FILES:05d}.json.gz" for number in numbers]
    folder = output / ".download"
    return [Source(name, "", partial(_c4_file, name, folder)) for name in names]


@contextmanager
def _c4_file(name: str, folder: Path) -> Iterator[Path]:
    """Downloads a file, or the rest of it, and removes it after the block."""
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            "allenai/c4", name, repo_type="dataset", local_dir=folder
        )
    except Exception as error:  # of HTTP, of the hub, of the disk
        raise UserError(f"cannot download {name} of allenai/c4: {error}") from error
    try:
        yield Path(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
