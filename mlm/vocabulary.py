"""Tokenisers to prepare text with: BERT's from a vocabulary or from text, or one from a folder."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from errors import UserError
from files import new_folder, remove
from mlm.shards import SPECIAL_TOKENS, load_tokenizer

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # as SPECIAL_TOKENS


def wordpiece(vocabulary: dict[str, int], *, lowercase: bool = True) -> Tokenizer:
    """BERT's tokeniser with this vocabulary; an empty one can be trained."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_tokenizer(
    documents: Iterable[str], size: int, *, lowercase: bool
) -> PreTrainedTokenizerFast:
    tokenizer = wordpiece({}, lowercase=lowercase)
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=list(WORDS), show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return _as_bert(tokenizer)


def read_tokenizer(path: Path, *, lowercase: bool) -> PreTrainedTokenizerFast:
    """The tokeniser of a vocab.txt, tokenizer.json or a folder, without its limits of length.

    Raises UserError for a vocabulary that would have text misread.
    """
    if path.is_dir() or path.name == "tokenizer.json":
        tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    else:
        tokenizer = _as_bert(wordpiece(_read_vocabulary(path), lowercase=lowercase))
    _require_case(tokenizer, path)
    return _unlimited(tokenizer)


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        words = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}") from error
    words = [word.removesuffix("\r") for word in words]
    if missing := [word for word in WORDS if word not in words]:
        raise UserError(f"The vocabulary {path} lacks {', '.join(missing)}.")
    word, count = Counter(words).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"The vocabulary {path} has the word {word!r} {count} times: take out all but the one "
            "whose line number the model knows."
        )
    return {word: number for number, word in enumerate(words)}


def _require_case(tokenizer: PreTrainedTokenizerFast, source: Path) -> None:
    """Raises UserError if words can never be met, for text is lowercased and they are not."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None or normalizer.normalize_str("A") != "a":
        return
    words = filter(re.compile("(##|▁|Ġ)?[A-Za-z]+").fullmatch, tokenizer.get_vocab())
    if cased := sorted(word for word in words if word != word.lower()):
        raise UserError(
            f"The vocabulary {source} is cased ({', '.join(cased[:3])}, ...), but text is "
            "lowercased: give --cased with a vocab.txt, or turn off lowercase in tokenizer.json."
        )


def _as_bert(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    named = dict(zip(SPECIAL_TOKENS, WORDS, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **named)
    return _unlimited(wrapped)


def _unlimited(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokeniser without truncation and padding, and with the ends that it lacked."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    if backend.encode("").ids != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, origin: str) -> None:
    """Puts the tokeniser, whole, in the place of the one in `folder`; `origin` tells its making."""
    with new_folder(folder) as new:
        tokenizer.save_pretrained(new)
        (new / "origin.json").write_text(json.dumps({"sha256": origin}) + "\n")
        remove(folder)
        new.rename(folder)


def origin_of(folder: Path) -> str:
    """What `save_tokenizer` noted; "" if there is no such tokeniser."""
    try:
        return json.loads((folder / "origin.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def document_encoder(
    tokenizer: PreTrainedTokenizerFast,
) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their tokens, each between the ends of a document.

    Names of special tokens in a text are text.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    def encode(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [[cls, *encoding.ids, sep] for encoding in encodings]

    return encode
