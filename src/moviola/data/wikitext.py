"""From the markup of a Wikipedia page to its words.

This is no renderer: it keeps what a reader would read as running text and drops what would need one
(templates, tables, formulas, references, pictures' frames). Everything is linear in the page's length.
"""

from __future__ import annotations

import html
import re
import string
import sys
import unicodedata
from collections.abc import Collection, Iterator
from functools import cache

from moviola.data.matching import needs_no_space

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_DROPPED_TAGS = (
    "ref references math chem ce gallery syntaxhighlight source timeline score hiero graph imagemap "
    "mapframe maplink templatestyles templatedata style script categorytree inputbox indicator"
)
_DROPPED = re.compile(rf"<(/?)({'|'.join(_DROPPED_TAGS.split())})(?=[\s/>])[^<>]*?(/?)>", re.IGNORECASE)
_BREAK = re.compile(r"<(?:br|p|/p|div|/div|li|tr|td|th|h[1-6]|hr)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_BRACES = re.compile(r"\{\{|\}\}|^[ \t:]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NESTED = 12  # links inside the captions of pictures, and pictures inside those
_OUTSIDE = re.compile(r"\[(?:[a-z]+:)?//[^\s\[\]]+([^\[\]\n]*)\]", re.IGNORECASE)
_BARE = re.compile(r"\b(?:https?|ftp)://[^\s<>\[\]]+", re.IGNORECASE)
_QUOTES = re.compile(r"'{2,}")
_MAGIC = re.compile(r"__[A-Z]+__")

DROPPED_NAMESPACES = frozenset({"file", "image", "media", "category"})
"""Links into these show a picture or nothing; a dump names them in its own language too."""


def plain_text(markup: str, *, dropped: Collection[str] = DROPPED_NAMESPACES) -> str:
    """The running text of a page, a paragraph a line.

    `dropped`: names of namespaces (lower case) whose links go with all they hold. Links and outside
    links leave their label; other tags leave what is between them.

    >>> plain_text("A '''[[dog|hot dog]]'''s {{cite|x}} is <ref>no</ref> [[food]].")
    'A hot dogs is food.'
    """
    text = _COMMENT.sub("", markup)
    if "<" in text:
        text = _without_tags(text)
    if "{" in text:
        text = _without_braces(text)
    if "[" in text:
        text = _links(text, dropped)
    if "//" in text:
        text = _OUTSIDE.sub(r"\1", text)
        text = _BARE.sub(" ", text)
    if "<" in text:
        text = _BREAK.sub("\n", text)
        text = _TAG.sub("", text)
    text = _QUOTES.sub("", text)
    text = _MAGIC.sub("", text)
    if "&" in text:
        text = html.unescape(text)
    # the marks of lists and headings stand at the ends of lines
    lines = (" ".join(line.lstrip("*#:; \t").strip("= \t").split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def _without_tags(text: str) -> str:
    """Without the tags of `_DROPPED` and what is between them; a tag that never ends goes alone."""
    opened: list[tuple[str, int]] = []
    depth: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for found in _DROPPED.finditer(text):
        closing, name, alone = found[1], found[2].lower(), found[3]
        if alone:
            spans.append(found.span())
        elif not closing:
            opened.append((name, found.start()))
            depth[name] = depth.get(name, 0) + 1
        elif depth.get(name):
            spans.append((_pop(opened, depth, name), found.end()))
    return _cut(text, spans)


def _without_braces(text: str) -> str:
    """Without templates and tables, nested as they may be; a brace that never closes stays."""
    opened: list[tuple[str, int]] = []
    depth: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for found in _BRACES.finditer(text):
        mark = found[0].lstrip(" \t:")
        if mark in ("{{", "{|"):
            opened.append((mark, found.start()))
            depth[mark] = depth.get(mark, 0) + 1
        else:
            name = "{{" if mark == "}}" else "{|"
            if depth.get(name):
                spans.append((_pop(opened, depth, name), found.end()))
    return _cut(text, spans)


def _pop(opened: list[tuple[str, int]], depth: dict[str, int], name: str) -> int:
    """Where the last open `name` began; what was opened inside it and not closed is forgotten."""
    while True:
        inner, start = opened.pop()
        depth[inner] -= 1
        if inner == name:
            return start


def _cut(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without the spans, which may lie inside one another."""
    if not spans:
        return text
    parts, at = [], 0
    for start, end in sorted(spans):
        if start >= at:
            parts.append(text[at:start])
        at = max(at, end)
    parts.append(text[at:])
    return "".join(parts)


def _links(text: str, dropped: Collection[str]) -> str:
    def label(found: re.Match[str]) -> str:
        target, bar, shown = found[1].partition("|")
        if ":" in target:
            space = target.partition(":")[0].strip().lower().replace("_", " ")
            if space in dropped:
                return ""
            target = target.removeprefix(":")
        # a picture's caption is its last part, a link's label the only one
        return shown.rpartition("|")[2] if bar and shown.strip() else target

    for _ in range(_NESTED):
        text, count = _LINK.subn(label, text)
        if not count:
            break
    return text


# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------

_INSIDE_WORDS = "\u00b7\u05f3\u05f4"
"""Marks that Unicode calls punctuation and that stand inside Catalan and Hebrew words."""
_CONTROL = frozenset(map(chr, range(32))) - frozenset("\t\n\r\v\f\x1c\x1d\x1e\x1f")


@cache
def punctuation() -> frozenset[str]:
    """Characters at which words end: Unicode's punctuation and ASCII's symbols."""
    every = map(chr, range(sys.maxunicode + 1))
    marks = frozenset(c for c in every if unicodedata.category(c)[0] == "P")
    return marks - frozenset(_INSIDE_WORDS) | frozenset(string.punctuation + "～")


@cache
def _letters_alone() -> str:
    """The inside of a regular expression's class for letters that are words of their own."""
    codes = map(chr, range(0x0E00, 0x2FFFF))
    return _ranges(sorted({c for c in codes if needs_no_space(c)} - punctuation()))


class Words:
    """Cuts plain text into runs of words that follow one another: `words(text)` yields lists.

    Words are what stands between white space and punctuation, as in the authors' code; a run ends at a
    punctuation mark or a line's end, so no pair of words reaches over one. Chinese characters and Thai,
    Lao, Burmese, Khmer and Tibetan letters are words of their own, since their words cannot be told
    without a dictionary. `keep` names marks that may stand inside a word, such as `'-`; they are taken
    off a word's ends. Case is kept.

    >>> list(Words()("A hot dog, please."))
    [['A', 'hot', 'dog'], ['please']]
    """

    def __init__(self, *, keep: str = "") -> None:
        self.keep = keep
        ends = (punctuation() | _CONTROL | {"\n"}) - frozenset(keep)
        self._ends = re.compile(f"[{_ranges(sorted(ends))}]+")
        self._alone = re.compile(f"([{_letters_alone()}])")

    def __call__(self, text: str) -> Iterator[list[str]]:
        if self._alone.search(text):
            text = self._alone.sub(r" \1 ", text)
        for part in self._ends.split(text):
            words = part.split()
            if self.keep:
                words = [bare for word in words if (bare := word.strip(self.keep))]
            if words:
                yield words


def _ranges(characters: list[str]) -> str:
    """Sorted characters as the inside of a regular expression's class."""
    parts: list[list[int]] = []
    for code in map(ord, characters):
        if parts and parts[-1][1] == code - 1:
            parts[-1][1] = code
        else:
            parts.append([code, code])
    return "".join(f"{re.escape(chr(low))}-{re.escape(chr(high))}" for low, high in parts)
