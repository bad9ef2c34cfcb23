"""Words to the ids a text tower reads, exactly as OpenAI's release makes them.

Text is cleaned (mojibake repaired, HTML entities resolved twice, white space collapsed, lower-cased),
split by CLIP's pattern, spelled in a byte alphabet in which `</w>` closes a word, and merged by byte
pair encoding. The merging runs in the `tokenizers` library; the vocabulary comes from the checkpoint.

Axis letters: N texts, L the context length.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from moviola.types import CheckpointError, UsageError, printable

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

# The contractions match whatever the case in OpenAI's code; after lower-casing only the long s is left.
# U+0345 is a mark, but a letter in the other case, so none of the classes takes it there.
_WORDS = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{0345}]+"
_MARKS = r"<\|startoftext\|>|<\|endoftext\|>"
_SPACE = re.compile(r"\s+")
_OPENAI_MERGES = 49152 - 256 - 2  # the released file holds more lines than the release uses
_LARGEST = 1 << 26  # bytes of merges read, in case a small archive unpacks without end
_SHOWN = 60  # characters of a text quoted in messages


def clean(text: str) -> str:
    """OpenAI's cleaning: ftfy, HTML entities resolved twice, spaces collapsed, lower case."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing to repair
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text.strip()).strip().lower()


def _byte_values() -> dict[str, int]:
    """One printable character for each byte, in the official order (printable bytes first)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTES = _byte_values()


def byte_symbols() -> list[str]:
    """The byte alphabet that every token is spelled in."""
    return list(_BYTES)


class Tokenizer:
    """A CLIP tokenizer: call it for padded ids, `encode` and `decode` for plain ones.

    `vocab` maps tokens to ids, `merges` are ordered. The end id closes every text; towers that pool
    at the largest id need it to be the largest.
    """

    pad_id = 0

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        context_length: int = 77,
        start: str = START,
        end: str = END,
        unknown: str | None = None,
    ) -> None:
        if context_length < 2:
            raise UsageError(f"A context length of at least 2 is needed, got {context_length}.")
        self.context_length = context_length
        self.vocab = dict(vocab)
        self.merges = [(a, b) for a, b in merges]
        self._check(start, end, unknown)
        self.start, self.end, self.unknown = start, end, unknown
        self.start_id, self.end_id = self.vocab[start], self.vocab[end]
        self._specials = {START: self.start_id, END: self.end_id, start: self.start_id, end: self.end_id}
        bpe = models.BPE(self.vocab, self.merges, end_of_word_suffix=WORD_END, unk_token=unknown)
        self._backend = Backend(bpe)
        self._backend.pre_tokenizer = _splitter(_WORDS)
        self._pieces = pre_tokenizers.Split(Regex(f"{_MARKS}|{_WORDS}"), behavior="removed", invert=True)

    def _check(self, start: str, end: str, unknown: str | None) -> None:
        for role, name in (("start", start), ("end", end), ("unknown", unknown)):
            if name is not None and name not in self.vocab:
                raise CheckpointError(
                    f"The tokenizer's {role} token {name!r} is not in its vocabulary of {len(self.vocab)}.",
                    hint="Give the tokenizer files that belong to this checkpoint.",
                )
        ids = list(self.vocab.values())
        if len(set(ids)) != len(ids) or min(ids) < 0:
            raise CheckpointError("The tokenizer's vocabulary gives one id to two tokens, or a negative id.")
        lost = [f"{a} {b}" for a, b in self.merges if not {a, b, a + b} <= self.vocab.keys()]
        if lost:
            raise CheckpointError(
                f"{len(lost)} merges of the tokenizer lead out of its vocabulary, first: {lost[0]!r}.",
                hint="The vocabulary and the merges come from two different tokenizers.",
            )
        symbols = [s + tail for s in byte_symbols() for tail in ("", WORD_END)]
        missing = [s for s in symbols if s not in self.vocab]
        if missing and unknown is None:
            raise CheckpointError(
                f"The vocabulary lacks {len(missing)} of the 512 byte symbols and names no unknown token, "
                f"first: {missing[0]!r}. This is not a CLIP tokenizer."
            )

    # ---------------------------------------------------------------------------------- using it

    @property
    def size(self) -> int:
        """Rows the token embedding needs: the largest id plus one."""
        return max(self.vocab.values()) + 1

    @cached_property
    def hash(self) -> str:
        """16 hex digits over vocabulary, merges and marks; equal whatever file format they came from."""
        content = [sorted(self.vocab.items()), self.merges, self.start, self.end, self.unknown]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""
        return self._encode_all([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids: every word is followed by a space, marks are spelled out."""
        try:
            spelled = "".join(self._tokens[int(i)] for i in ids)
        except KeyError as error:
            raise UsageError(f"No token has the id {error.args[0]}; ids end at {self.size - 1}.") from error
        data = bytearray()
        for char in spelled:
            data += bytes([_BYTES[char]]) if char in _BYTES else char.encode()
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ")

    def __call__(self, texts: str | Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Texts to ids_NL (int64): start, ids, end, zeros.

        A text longer than the context raises `UsageError`; with `truncate` it is cut, its last id
        becomes the end id, and a warning names it.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        full = [[self.start_id, *ids, self.end_id] for ids in self._encode_all(texts)]
        return padded(texts, full, self.context_length, self.end_id, self.pad_id, truncate=truncate)

    def with_context(self, context_length: int) -> Tokenizer:
        """The same tokenizer for another context length."""
        if context_length == self.context_length:
            return self
        return Tokenizer(
            self.vocab,
            self.merges,
            context_length=context_length,
            start=self.start,
            end=self.end,
            unknown=self.unknown,
        )

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self.vocab.items()}

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise UsageError(f"A text must be a string, got {type(text).__name__}.")
        cleaned = [clean(no_surrogates(text)) for text in texts]
        encoded = [e.ids for e in self._backend.encode_batch(cleaned, add_special_tokens=False)]
        for row, text in enumerate(cleaned):
            if START in text or END in text:
                encoded[row] = self._encode_with_marks(text)
        return encoded

    def _encode_with_marks(self, text: str) -> list[int]:
        """The marks become ids only where CLIP's pattern meets them whole, as in `<|startoftext|>a`."""
        ids: list[int] = []
        for piece, _ in self._pieces.pre_tokenize_str(text):
            if piece in self._specials:
                ids.append(self._specials[piece])
            else:
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    # -------------------------------------------------------------------------------- making one

    @classmethod
    def from_merges(cls, merges: Iterable[tuple[str, str]], *, context_length: int = 77) -> Tokenizer:
        """OpenAI's order: 256 byte symbols, the same closing a word, one token a merge, start, end."""
        merges = list(merges)
        symbols = byte_symbols()
        tokens = [*symbols, *(s + WORD_END for s in symbols), *(a + b for a, b in merges), START, END]
        return cls({t: i for i, t in enumerate(tokens)}, merges, context_length=context_length)

    @classmethod
    def from_file(cls, path: str | Path, *, context_length: int = 77) -> Tokenizer:
        """Read a tokenizer from what a checkpoint carries.

        `path` is a `tokenizer.json`, OpenAI's merges (`.txt` or `.txt.gz`), a `vocab.json` or
        `merges.txt` beside its other half, or a folder that holds one of these.
        """
        path = Path(path)
        if path.is_dir():
            found = find_tokenizer(path)
            if found is None:
                raise CheckpointError(
                    f"{printable(path)} holds no tokenizer: expected tokenizer.json, or vocab.json with "
                    "merges.txt, or bpe_simple_vocab_16e6.txt.gz."
                )
            path = found
        if not path.is_file():
            raise CheckpointError(f"There is no tokenizer file at {printable(path)}.")
        if path.name == "vocab.json":
            return cls._from_pair(path, path.with_name("merges.txt"), context_length)
        if path.name == "merges.txt" and path.with_name("vocab.json").is_file():
            return cls._from_pair(path.with_name("vocab.json"), path, context_length)
        if path.suffix == ".json":
            return cls.from_json(read_json(path), str(printable(path)), context_length)
        if path.name.endswith((".txt", ".txt.gz")):
            return cls.from_merges(_read_merges(path)[:_OPENAI_MERGES], context_length=context_length)
        raise CheckpointError(
            f"{printable(path)} is not a tokenizer file: expected tokenizer.json, vocab.json with "
            "merges.txt, or a merges .txt or .txt.gz."
        )

    @classmethod
    def _from_pair(cls, vocab_path: Path, merges_path: Path, context_length: int) -> Tokenizer:
        if not merges_path.is_file():
            raise CheckpointError(f"{printable(vocab_path)} needs merges.txt beside it.")
        vocab = _vocab(read_json(vocab_path), str(printable(vocab_path)))
        config = vocab_path.with_name("tokenizer_config.json")
        names = read_json(config) if config.is_file() else {}
        start, end, unknown = (
            token_name(names.get(key), default)
            for key, default in (("bos_token", START), ("eos_token", END), ("unk_token", None))
        )
        full = {s + tail for s in byte_symbols() for tail in ("", WORD_END)} <= vocab.keys()
        return cls(
            vocab,
            _read_merges(merges_path),
            context_length=context_length,
            start=start or START,
            end=end or END,
            unknown=None if full else unknown or END,
        )

    @classmethod
    def from_json(cls, data: Any, source: str, context_length: int = 77) -> Tokenizer:
        """From the content of a `tokenizer.json`; `source` names it in errors."""
        model = data.get("model") if isinstance(data, dict) else None
        if not isinstance(model, dict) or "vocab" not in model:
            raise CheckpointError(f"{source} is not a file of the tokenizers library: it has no model.")
        kind, suffix = model.get("type", "BPE"), model.get("end_of_word_suffix")
        if kind != "BPE" or suffix != WORD_END:
            what = f"{kind} model" if kind != "BPE" else f"BPE model whose words end with {suffix!r}"
            raise CheckpointError(
                f"{source} holds a {what}; a CLIP tokenizer is a BPE whose words end with {WORD_END!r}. "
                "It belongs to another family (SigLIP, T5, BERT or RoBERTa texts), which is not supported."
            )
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        if any(len(m) != 2 for m in pairs):
            raise CheckpointError(f"{source} holds a merge that is not a pair.")
        merges = [(a, b) for a, b in pairs]
        vocab = _vocab(model["vocab"], source)
        for added in data.get("added_tokens") or []:
            vocab.setdefault(added["content"], added["id"])
        start, end = marks_of(data.get("post_processor"))
        full = {s + tail for s in byte_symbols() for tail in ("", WORD_END)} <= vocab.keys()
        return cls(
            vocab,
            merges,
            context_length=context_length,
            start=start or START,
            end=end or END,
            unknown=None if full else model.get("unk_token"),
        )

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = 8192, context_length: int = 77) -> Tokenizer:
        """Learn merges from texts. Same alphabet and rules as CLIP's; the end id is the largest."""
        symbols = byte_symbols()
        room = vocab_size - 2 * len(symbols) - 2
        if room < 0:
            raise UsageError(f"A vocabulary needs at least {2 * len(symbols) + 2} ids, got {vocab_size}.")
        backend = Backend(models.BPE(end_of_word_suffix=WORD_END))
        backend.pre_tokenizer = _splitter(_WORDS)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=symbols,
            # listed beforehand, so that ties between merges are broken alike in every run
            special_tokens=[s + WORD_END for s in symbols],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        backend.train_from_iterator((clean(t) for t in texts), trainer)
        learned = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
        vocab = {t: i for i, t in enumerate([*symbols, *(s + WORD_END for s in symbols)])}
        merges: list[tuple[str, str]] = []
        limit = len(vocab) + room
        for a, b in learned:
            joined = a + b
            if joined not in vocab:
                if len(vocab) == limit:
                    break
                vocab[joined] = len(vocab)
            merges.append((a, b))
        vocab[START], vocab[END] = len(vocab), len(vocab) + 1
        return cls(vocab, merges, context_length=context_length)

    # ------------------------------------------------------------------------------------ saving

    def to_json(self) -> dict[str, Any]:
        """The content of a `tokenizer.json` that transformers' CLIPTokenizer reads as well."""
        marks = [(self.start, self.start_id), (self.end, self.end_id)]
        added = [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, i in sorted(marks, key=lambda m: m[1])
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
                    {"type": "Lowercase"},
                ],
            },
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True},
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": False,
                        "trim_offsets": True,
                        "use_regex": False,
                    },
                ],
            },
            "post_processor": {
                "type": "RobertaProcessing",
                "sep": [self.end, self.end_id],
                "cls": [self.start, self.start_id],
                "trim_offsets": False,
                "add_prefix_space": False,
            },
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                # transformers wants an unknown token; with the full byte alphabet it is never used
                "unk_token": self.unknown or self.end,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": WORD_END,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self.vocab,
                "merges": [list(m) for m in self.merges],
            },
        }

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into the folder."""
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")
        return path


TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "bpe_simple_vocab_16e6.txt.gz",
    "bpe_simple_vocab_16e6.txt",
)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a checkpoint's folder, None where it has none."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    return None


def _splitter(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def no_surrogates(text: str) -> str:
    """File names with undecodable bytes carry lone surrogates, which no encoder takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def padded(
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    length: int,
    end_id: int,
    pad_id: int,
    *,
    truncate: bool,
) -> np.ndarray:
    """ids_NL (int64) from whole texts' ids, start and end among them; the rest is filled with `pad_id`.

    A longer text raises `UsageError`; with `truncate` it is cut, its last id becomes the end id, and a
    warning names it.
    """
    ids_NL = np.full((len(texts), length), pad_id, dtype=np.int64)
    for row, (text, full) in enumerate(zip(texts, ids, strict=True)):
        if len(full) > length:
            problem = f"The text {quote(text)} needs {len(full)} tokens, the model's context holds {length}."
            if not truncate:
                raise UsageError(problem, hint="Shorten it, or pass truncate=True (--truncate) to cut it.")
            warnings.warn(f"{problem} It was cut.", stacklevel=3)
            full = [*full[: length - 1], end_id]
        ids_NL[row, : len(full)] = full
    return ids_NL


def quote(text: str) -> str:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f'"{printable(shown)}" ({len(text)} characters)'


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{printable(path)} is not valid JSON: {error}.") from error


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs from a merges file; its first line is a header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines = file.read(_LARGEST).decode("utf-8").split("\n")
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{printable(path)} is not a merges file: {error}.") from error
    if "#version" not in lines[0]:
        raise CheckpointError(
            f"{printable(path)} is not a merges file: its first line should hold '#version'."
        )
    pairs = [tuple(line.split()) for line in lines[1:] if line.strip()]
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise CheckpointError(f"{printable(path)}: merge {number + 1} is not a pair: {' '.join(pair)!r}.")
    return [(a, b) for a, b in pairs]


def _vocab(data: Any, source: str) -> dict[str, int]:
    if not isinstance(data, dict) or not all(isinstance(i, int) for i in data.values()) or not data:
        raise CheckpointError(f"{source} does not hold a vocabulary (tokens with their ids).")
    return dict(data)


def token_name(value: Any, default: str | None) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else default


def marks_of(processor: Any) -> tuple[str | None, str | None]:
    """Start and end token of a tokenizer.json, where its post-processor names them."""
    if not isinstance(processor, dict):
        return None, None
    if processor.get("type") in ("RobertaProcessing", "BertProcessing"):
        return processor["cls"][0], processor["sep"][0]
    if processor.get("type") == "TemplateProcessing":
        names = [part["SpecialToken"]["id"] for part in processor["single"] if "SpecialToken" in part]
        if len(names) == 2:
            return names[0], names[1]
    return None, None
