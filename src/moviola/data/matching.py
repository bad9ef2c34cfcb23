"""Which of half a million entries stand in a text, for many texts at once.

MetaCLIP's rule: an entry matches when ` entry ` is a sub-string of the spaced text, so it stands
between single spaces. That is the same as saying that the entry's tokens, split at every single space,
follow one another in the text's tokens. Batches of texts become arrays of token numbers, and all
places walk down one trie of entries together, level by level, in NumPy: a step is one look-up of
(node, token) in a hash table of exact 64-bit keys, and only places that are still inside some entry
take it. No object is made per match. Entries that match inside words (those of languages without
spaces) walk a second trie, over code points.

Axis letters: U texts, K tokens, M matches, N nodes, E entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moviola.data.hashing import as_words, eight_bytes
from moviola.types import UsageError

SPACED_MARKS = (",", ".", ";", ":", "?", "!", "`")
"""Marks that get a space on each side."""
BLANKS = ("\t", "\n", "\r")
"""Characters that become a space."""

_FULL_WIDTH_MARKS = "，。、；：？！“”‘’（）【】《》〈〉「」『』～—"
_ASCII_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_NO_SPACE_RANGES = (
    (0x4E00, 0x9FFF),  # Chinese characters and their extensions and radicals
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0x2CEB0, 0x2EBEF),
    (0xF900, 0xFAFF),
    (0x2E80, 0x2EFF),
    (0x2F00, 0x2FDF),
    (0x2FF0, 0x2FFF),
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x0F00, 0x0FFF),  # Tibetan
)
_END = b" \xff "
"""Between two texts: a token that no text and no entry holds, since 0xff never stands in UTF-8."""
_SLICE_TEXTS, _SLICE_BYTES = 1 << 15, 4 << 20  # work arrays that stay in the cache


def spacing(text: str) -> str:
    """The text as it is searched: a space each side, one around each mark, none of tab, LF and CR.

    >>> spacing("a dog, a cat")
    ' a dog ,  a cat '
    """
    for mark in SPACED_MARKS:
        text = text.replace(mark, f" {mark} ")
    for blank in BLANKS:
        text = text.replace(blank, " ")
    return f" {text} "


def needs_no_space(character: str) -> bool:
    """Whether entries need no space on a side that begins or ends with this character (MetaCLIP 2).

    True of Chinese characters, Thai, Lao, Burmese, Khmer and Tibetan letters and of ASCII and
    full-width punctuation; kana and Hangul are not among them, as in the authors' table.
    """
    code = ord(character)
    return (
        character in _ASCII_MARKS
        or character in _FULL_WIDTH_MARKS
        or any(low <= code <= high for low, high in _NO_SPACE_RANGES)
    )


def spaced_entry(entry: str, *, languages: bool = False) -> str:
    """The sub-string that a spaced text must hold. `languages`: MetaCLIP 2's rule, side by side."""
    if not languages:
        return f" {entry} "
    before = "" if needs_no_space(entry[0]) else " "
    after = "" if needs_no_space(entry[-1]) else " "
    return f"{before}{entry}{after}"


@dataclass(frozen=True)
class Matches:
    """Which entries stand in which texts: each pair once, by text, then by entry.

    text_M (int64) and entry_M (uint32); `texts` is how many texts were looked at.
    """

    text_M: np.ndarray
    entry_M: np.ndarray
    texts: int

    def __len__(self) -> int:
        return len(self.text_M)

    def per_text(self) -> np.ndarray:
        """Matches per text, (U,)."""
        return np.bincount(self.text_M, minlength=self.texts)

    def offsets(self) -> np.ndarray:
        """Where each text's matches begin and end, (U + 1,): the offsets of an Arrow list."""
        return np.concatenate([[0], np.cumsum(self.per_text())])

    def to_arrow(self) -> pa.ListArray:
        """list<uint32>, one list a text."""
        return pa.LargeListArray.from_arrays(self.offsets(), pa.array(self.entry_M)).cast(
            pa.list_(pa.uint32())
        )

    def pairs(self) -> np.ndarray:
        """The inverted index, (M, 2) uint32: entry and text."""
        return np.stack([self.entry_M, self.text_M.astype(np.uint32)], axis=1)


class Matcher:
    """A fixed list of entries, ready to be looked for. `matcher(texts)` -> `Matches`.

    `languages` uses MetaCLIP 2's rule: no space is asked for on a side of an entry that begins or ends
    with a character of a script without spaces, or with punctuation. Entry numbers are places in the
    list. Raises `UsageError` for an empty list, an empty entry, one that is no string, or a duplicate,
    since their numbers would mean nothing.
    """

    def __init__(self, entries: Sequence[str], *, languages: bool = False) -> None:
        check_entries(entries)
        self.entries = tuple(entries)
        inside = np.zeros(len(entries), bool)
        if languages:
            inside = np.array([needs_no_space(e[0]) or needs_no_space(e[-1]) for e in entries])
        spaced, inner = np.flatnonzero(~inside), np.flatnonzero(inside)
        whole = [entries[i].encode() for i in spaced.tolist()]
        self._tokens = _Tokens(whole, spaced) if len(spaced) else None
        forms = [spaced_entry(entries[i], languages=True) for i in inner.tolist()]
        self._points = _Points(forms, inner) if len(inner) else None

    def __call__(self, texts: pa.StringArray | pa.ChunkedArray | Sequence[str]) -> Matches:
        """Every (text, entry) pair. Texts are strings without nulls; batches of any size are fine."""
        array = texts if isinstance(texts, pa.Array | pa.ChunkedArray) else pa.array(texts, pa.string())
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if not pa.types.is_string(array.type) and not pa.types.is_large_string(array.type):
            raise UsageError(f"Expected texts as strings, got {array.type}.")
        if array.null_count:
            raise UsageError(f"Expected texts without nulls, got {array.null_count} among {len(array)}.")
        keys = [self._keys(part) + (first << 32) for first, part in _parts(array)]
        key_M = np.concatenate(keys) if keys else np.empty(0, np.int64)
        return Matches(key_M >> 32, (key_M & 0xFFFFFFFF).astype(np.uint32), len(array))

    def _keys(self, texts: pa.Array) -> np.ndarray:
        """text << 32 | entry, sorted and without repeats."""
        data = _joined(texts)
        found = [trie.walk(data) for trie in (self._tokens, self._points) if trie is not None]
        key_M = np.concatenate(found) if len(found) > 1 else found[0]
        key_M.sort()
        if len(key_M):
            key_M = key_M[np.concatenate([[True], key_M[1:] != key_M[:-1]])]
        return key_M


def check_entries(entries: Sequence[str]) -> None:
    if not len(entries):
        raise UsageError("The metadata is empty: there is no entry to look for.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, str) or not entry:
            what = "is empty" if entry == "" else f"is a {type(entry).__name__}, expected a string"
            raise UsageError(f"Entry {number} of the metadata {what}.", hint="See: moviola metadata check")
    if len(set(entries)) < len(entries):
        seen: set[str] = set()
        twice = next(e for e in entries if e in seen or seen.add(e))  # type: ignore[func-returns-value]
        raise UsageError(
            f"The metadata holds {len(entries) - len(set(entries))} entries twice, first {twice!r}: "
            "their counts would be split.",
            hint="Remove the duplicates; `moviola metadata check` lists them.",
        )


def _parts(array: pa.Array) -> Iterator[tuple[int, pa.Array]]:
    """(first text, texts) in slices of at most `_SLICE_TEXTS` and, but for a longer text, `_SLICE_BYTES`."""
    start = 0
    while start < len(array):
        rest = array.slice(start, _SLICE_TEXTS)
        ends = np.cumsum(pc.binary_length(rest).to_numpy(zero_copy_only=False).astype(np.int64) + 3)
        take = max(1, int(np.searchsorted(ends, _SLICE_BYTES, side="right")))
        yield start, rest.slice(0, take)
        start += take


def _joined(texts: pa.Array) -> bytes:
    """Spaced texts one after the other, each but the last followed by `_END`, without outer spaces."""
    binary = texts.cast(pa.string()).cast(pa.binary())
    data = pc.binary_join(pa.ListArray.from_arrays([0, len(binary)], binary), _END)[0].as_py()
    for mark in SPACED_MARKS:
        data = data.replace(mark.encode(), b" " + mark.encode() + b" ")
    for blank in BLANKS:
        data = data.replace(blank.encode(), b" ")
    return data


class _Table:
    """Exact uint64 keys to int32 values, looked up by the array; -1 where a key is not there.

    A slot holds one key. Keys whose slot is taken go to a smaller table of the same kind, and only
    look-ups that meet a slot with such followers go on to it.
    """

    def __init__(self, key_N: np.ndarray, value_N: np.ndarray) -> None:
        bits = max(4, int(len(key_N) * 2 - 1).bit_length())
        self.shift = np.uint64(64 - bits)
        self.multiplier = np.uint64(0x9E3779B97F4A7C15)
        self.keys = np.zeros(1 << bits, np.uint64)
        self.values = np.full(1 << bits, -1, np.int32)
        slot_N = self._slot(key_N)
        slots, first = np.unique(slot_N, return_index=True)
        self.keys[slots], self.values[slots] = key_N[first], value_N[first]
        rest = np.ones(len(key_N), bool)
        rest[first] = False
        self.crowded: np.ndarray | None = None
        self.next: _Table | None = None
        if rest.any():
            self.crowded = np.zeros(1 << bits, bool)
            self.crowded[slot_N[rest]] = True
            # other bits of the key decide in the next table
            self.next = _Table(_turn(key_N[rest]), value_N[rest])

    def _slot(self, key_N: np.ndarray) -> np.ndarray:
        return ((key_N * self.multiplier) >> self.shift).view(np.int64)

    def __getitem__(self, key_N: np.ndarray) -> np.ndarray:
        slot_N = self._slot(key_N)
        value_N = np.where(self.keys[slot_N] == key_N, self.values[slot_N], np.int32(-1))
        if self.crowded is not None and self.next is not None:
            more = np.flatnonzero(self.crowded[slot_N] & (value_N < 0))
            if len(more):
                value_N[more] = self.next[_turn(key_N[more])]
        return value_N


def _turn(key_N: np.ndarray) -> np.ndarray:
    """Another order of the same keys, for the table that takes the collisions; a bijection."""
    return (key_N ^ (key_N >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)


class _Trie:
    """Nodes of all prefixes of the entries; symbols are token numbers or code points."""

    def __init__(self, symbol_K: np.ndarray, start_E: np.ndarray, length_E: np.ndarray, symbols: int) -> None:
        node_E = np.zeros(len(start_E), np.int64)
        keys, values = [], []
        ends: list[tuple[np.ndarray, np.ndarray]] = []
        self.first = np.full(symbols, -1, np.int32)
        count = 0
        for depth in range(int(length_E.max())):
            alive = np.flatnonzero(length_E > depth)
            symbol = symbol_K[start_E[alive] + depth]
            key = (node_E[alive].astype(np.uint64) << np.uint64(32)) | symbol.astype(np.uint64)
            distinct, place = np.unique(key, return_inverse=True)
            node = count + np.arange(len(distinct))
            if depth == 0:
                self.first[distinct.astype(np.int64)] = node
            else:
                keys.append(distinct)
                values.append(node.astype(np.int32))
            node_E[alive] = node[place]
            done = alive[length_E[alive] == depth + 1]
            ends.append((node_E[done], done))
            count += len(distinct)
        self.entry_at = np.full(count, -1, np.int32)
        for node, entry in ends:
            self.entry_at[node] = entry
        self.table = _Table(np.concatenate(keys), np.concatenate(values)) if keys else None
        self.inner = np.zeros(count, bool)
        if keys:
            self.inner[(np.concatenate(keys) >> np.uint64(32)).astype(np.int64)] = True

    def walk(self, symbol_K: np.ndarray, place_P: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(place_M, entry_M) of all entries that begin at one of these places, by their length.

        A symbol of -1 ends every walk; the last one must be -1, so that no walk leaves the array.
        """
        symbol_P = symbol_K[place_P]
        node_P = np.where(symbol_P >= 0, self.first[symbol_P], np.int32(-1))
        begun = node_P >= 0
        place_P, node_P = place_P[begun], node_P[begun]
        depth = 0
        while len(place_P):
            entry_P = self.entry_at[node_P]
            hit = entry_P >= 0
            yield place_P[hit], entry_P[hit]
            depth += 1
            inner = self.inner[node_P]
            place_P, node_P = place_P[inner], node_P[inner]
            next_P = symbol_K[place_P + depth]
            known = next_P >= 0
            place_P, node_P, next_P = place_P[known], node_P[known], next_P[known]
            if self.table is None or not len(place_P):
                return
            key_P = (node_P.astype(np.uint64) << np.uint64(32)) | next_P.astype(np.uint64)
            node_P = self.table[key_P]
            found = node_P >= 0
            place_P, node_P = place_P[found], node_P[found]


class _Tokens:
    """Entries that stand between single spaces, as sequences of chunks of at most eight bytes.

    A token with the space that ends it is cut into chunks, so a chunk is one exact uint64, a short
    word is one chunk, and a walk that follows an entry's chunks follows its tokens.
    """

    def __init__(self, entries: Sequence[bytes], number_E: np.ndarray) -> None:
        self.number_E = number_E
        chunk_K, _, _ = _chunks(_END.join(entries))
        distinct, symbol_K = np.unique(chunk_K, return_inverse=True)
        self.chunks = _Table(distinct, np.arange(len(distinct), dtype=np.int32))
        end_K = np.append(np.flatnonzero(chunk_K == _END_CHUNK), len(chunk_K))
        starts = np.concatenate([[0], end_K[:-1] + 1])
        self.trie = _Trie(symbol_K, starts, end_K - starts, len(distinct) + 1)

    def walk(self, data: bytes) -> np.ndarray:
        """text << 32 | entry of every occurrence, in no order."""
        chunk_K, first_K, text_K = _chunks(data)
        symbol_K = np.append(self.chunks[chunk_K], np.int32(-1))
        symbol_K[:-1][chunk_K == _END_CHUNK] = -1
        keys = [
            (text_K[place] << 32) | self.number_E[entry]
            for place, entry in self.trie.walk(symbol_K, np.flatnonzero(first_K))
        ]
        return np.concatenate(keys) if keys else np.empty(0, np.int64)


_END_CHUNK = np.uint64(int.from_bytes(_END.strip(b" ") + b" ", "little"))


def _chunks(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """chunk_K, whether each begins a token, and the text each is of.

    A chunk is up to eight bytes of one token, little-endian, zeros behind the token's last space.
    """
    data += b" "
    words = as_words(data)
    end_T = np.flatnonzero(np.frombuffer(data, np.uint8) == 32) + 1
    start_T = np.concatenate([[0], end_T[:-1]])
    count_T = (end_T - start_T + 7) >> 3
    before_T = np.cumsum(count_T) - count_T
    first_K = np.zeros(int(count_T.sum()), bool)
    first_K[before_T] = True
    start_K = np.repeat(start_T - 8 * before_T, count_T) + 8 * np.arange(len(first_K))
    left_K = np.minimum(np.repeat(end_T, count_T) - start_K, 8)
    chunk_K = eight_bytes(words, start_K, left_K)
    return chunk_K, first_K, np.cumsum(chunk_K == _END_CHUNK)


class _Points:
    """Entries that may match inside words, as sequences of code points with their spaces."""

    def __init__(self, forms: Sequence[str], number_E: np.ndarray) -> None:
        self.number_E = number_E
        lengths = np.array([len(form) for form in forms])
        self.trie = _Trie(_points("".join(forms)), np.cumsum(lengths) - lengths, lengths, 0x110000)

    def walk(self, data: bytes) -> np.ndarray:
        point_K = _points(" " + data.decode("utf-8", "surrogateescape") + " ")
        end_K = point_K == 0xDCFF  # what surrogateescape makes of 0xff
        text_K = np.cumsum(end_K)
        symbol_K = np.append(np.where(end_K, -1, point_K), -1)
        keys = [
            (text_K[place] << 32) | self.number_E[entry]
            for place, entry in self.trie.walk(symbol_K, np.arange(len(symbol_K) - 1))
        ]
        return np.concatenate(keys) if keys else np.empty(0, np.int64)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.int32)
