"""Any `tokenizer.json` of the `tokenizers` library as a text tower's: XLM-R's, RoBERTa's, BERT's.

Normalising, splitting and the vocabulary (Unigram, BPE, WordPiece) are the file's. Around it text is
cleaned as OpenCLIP does for such towers: mojibake repaired, HTML entities resolved twice, white space
collapsed, case kept. CLIP's own byte pairs are `moviola.clip.tokenizer`'s; `read_tokenizer` tells them apart.

Axis letters: N texts, L the context length.
"""

from __future__ import annotations

import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
from tokenizers import Tokenizer as Backend

from moviola.clip.tokenizer import (
    WORD_END,
    Tokenizer,
    find_tokenizer,
    marks_of,
    no_surrogates,
    padded,
    read_json,
    token_name,
)
from moviola.types import CheckpointError, UsageError, printable

_PADS = ("<pad>", "[PAD]")


class LibraryTokenizer:
    """Call it for padded ids, `encode` and `decode` for plain ones, as `moviola.clip.tokenizer.Tokenizer`.

    `content` is a `tokenizer.json` as read. Its post-processor says which ids open and close a text;
    `pad`, the token that fills up, is the file's own padding, or `<pad>` or `[PAD]` where it names none.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        *,
        context_length: int = 77,
        pad: str | None = None,
        source: str = "The tokenizer",
    ) -> None:
        if context_length < 2:
            raise UsageError(f"A context length of at least 2 is needed, got {context_length}.")
        self.context_length = context_length
        stated = (content.get("padding") or {}).get("pad_token")
        self._content = {**content, "padding": None, "truncation": None}
        try:
            self._backend = Backend.from_buffer(json.dumps(self._content).encode())
        except ValueError as error:
            raise CheckpointError(f"{source} is not a file of the tokenizers library: {error}.") from error
        start, end = marks_of(content.get("post_processor"))
        if start is None or end is None:
            raise CheckpointError(
                f"{source} does not say which tokens open and close a text (see its post_processor).",
                hint="Give the tokenizer.json that belongs to the checkpoint.",
            )
        pads = [
            name for name in (pad, stated, *_PADS) if name and self._backend.token_to_id(name) is not None
        ]
        if not pads:
            raise CheckpointError(
                f"{source} names no token that fills up short texts: neither its padding nor <pad> or [PAD].",
                hint="Name one as pad_token in tokenizer_config.json beside it.",
            )
        self.start, self.end, self.pad = start, end, pads[0]
        ids = [self._backend.token_to_id(name) for name in (start, end, pads[0])]
        known = [i for i in ids if i is not None]
        if len(known) < len(ids):
            raise CheckpointError(f"{source} opens or closes texts with a token that its vocabulary lacks.")
        self.start_id, self.end_id, self.pad_id = known

    @property
    def size(self) -> int:
        """Rows the token embedding needs: the largest id plus one."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def hash(self) -> str:
        """16 hex digits over everything in the file that decides the ids, the padding's among them."""
        content = json.dumps([self._content, self.pad], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end."""
        return self._backend.encode(self._clean(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; marks and padding are left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def __call__(self, texts: str | Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Texts to ids_NL (int64): start, ids, end, then the padding's id.

        A text longer than the context raises `UsageError`; with `truncate` it is cut, its last id
        becomes the end id, and a warning names it.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        encoded = self._backend.encode_batch([self._clean(text) for text in texts])
        full = [made.ids for made in encoded]
        return padded(texts, full, self.context_length, self.end_id, self.pad_id, truncate=truncate)

    def with_context(self, context_length: int) -> LibraryTokenizer:
        """The same tokenizer for another context length."""
        if context_length == self.context_length:
            return self
        return LibraryTokenizer(self._content, context_length=context_length, pad=self.pad)

    @staticmethod
    def _clean(text: str) -> str:
        if not isinstance(text, str):
            raise UsageError(f"A text must be a string, got {type(text).__name__}.")
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(no_surrogates(text)))).split())

    # ------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_file(cls, path: str | Path, *, context_length: int = 77) -> LibraryTokenizer:
        """From a `tokenizer.json` or a folder that holds one (tokenizer_config.json may name the padding)."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"There is no tokenizer file at {printable(path)}.")
        return cls._from_json(read_json(path), path, context_length)

    @classmethod
    def _from_json(cls, content: Any, path: Path, context_length: int) -> LibraryTokenizer:
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise CheckpointError(
                f"{printable(path)} is not a file of the tokenizers library: it has no model."
            )
        beside = path.with_name("tokenizer_config.json")
        names = read_json(beside) if beside.is_file() else {}
        pad = token_name(names.get("pad_token"), None)
        return cls(content, context_length=context_length, pad=pad, source=str(printable(path)))

    def to_json(self) -> dict[str, Any]:
        """The file's content, with the padding spelled out."""
        padding = {
            "strategy": {"Fixed": self.context_length},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": self.pad_id,
            "pad_type_id": 0,
            "pad_token": self.pad,
        }
        return {**self._content, "padding": padding}

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into the folder."""
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")
        return path


AnyTokenizer = Tokenizer | LibraryTokenizer


def read_tokenizer(path: str | Path, *, context_length: int = 77) -> AnyTokenizer:
    """The tokenizer of a checkpoint, CLIP's own or another of the `tokenizers` library, by its content."""
    path = Path(path)
    found = find_tokenizer(path) if path.is_dir() else path
    if found is None or found.suffix != ".json" or found.name == "vocab.json" or not found.is_file():
        return Tokenizer.from_file(path, context_length=context_length)
    content = read_json(found)
    model = content.get("model") if isinstance(content, dict) else None
    kind = model.get("type", "BPE") if isinstance(model, dict) else "BPE"
    if isinstance(model, dict) and (kind != "BPE" or model.get("end_of_word_suffix") != WORD_END):
        return LibraryTokenizer._from_json(content, found, context_length)
    return Tokenizer.from_json(content, str(printable(found)), context_length)
