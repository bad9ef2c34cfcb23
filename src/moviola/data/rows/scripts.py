"""Segments of videos with the words that are spoken in each: the maker of `ScriptField`.

Words have times. They come from a column `words` or a file `NAME.words.json` beside the video, which list
`{"word", "start", "end"}` in seconds (`end` may be missing, `time` stand for `start`), alone or under
`words` or `subtitles`; else from the subtitles beside the video, else from those inside it. A cue's
words are spread evenly over the time that it is shown.

Axis letters: B rows, K segments of a row, L tokens, T frames.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moviola.clip.preprocess import Preprocess
from moviola.data.rows.clips import FRAMES, clip_batch, read_clip
from moviola.data.rows.fields import Row, TextMaker, Tokenize, Unusable, listed, media_of
from moviola.data.rows.source import RowSource
from moviola.media import Subtitle, Video, media_kind, read_subtitles
from moviola.media.subtitles import embedded_subtitles, sidecars
from moviola.types import FrameSpec, MediaError, ScriptField, TextField, UsageError

Word = tuple[float, str]
"""The middle of the time in which a word is spoken, in seconds, and the word."""
STARTS = 8
"""How many places of a video are tried, until each segment has words."""


def timed_words(value: Any) -> list[Word]:
    """Words in order of time from lists of objects, as the module says. `ValueError` for anything else."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("words", "subtitles") if name in value), None)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError("expected a list of words with times")
    found: list[Word] = []
    for one in value:
        try:
            start = float(one["start"] if "start" in one else one["time"])
            end = one.get("end")
            middle = start if end is None else (start + float(end)) / 2
            text = " ".join(str(one["word"]).split())
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"expected a word with its start in seconds, got {str(one)[:60]}") from None
        if not np.isfinite(middle):
            raise ValueError(f"the time of {text!r} is not finite")
        if text:
            found.append((middle, text))
    return sorted(found)


def words_of_cues(cues: Sequence[Subtitle]) -> list[Word]:
    """The words of subtitles, each cue's spread evenly over its time."""
    found: list[Word] = []
    for cue in cues:
        words = cue.text.split()
        step = cue.span.duration / len(words) if words else 0.0
        found += [(cue.span.start + (place + 0.5) * step, word) for place, word in enumerate(words)]
    return sorted(found, key=lambda word: word[0])


def spoken_words(path: Path) -> list[Word]:
    """The words of a video file, in one language. `MediaError` where they cannot be read or there are none.

    Of several subtitle files the one without a language in its name comes first.
    """
    beside = path.with_name(f"{path.stem}.words.json")
    if beside.is_file():
        try:
            found = timed_words(json.loads(beside.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, RecursionError) as error:
            raise MediaError(beside, f"the words cannot be read ({error}).") from error
    elif texts := sidecars(path):
        chosen, _ = min(texts, key=lambda text: text[1] is not None)
        found = words_of_cues(read_subtitles(chosen))
    else:
        cues = embedded_subtitles(path)
        found = words_of_cues([cue for cue in cues if cue.language == cues[0].language])
    if not found:
        raise MediaError(
            path,
            "it has no words with times.",
            hint="Put NAME.srt, NAME.vtt or NAME.words.json beside the video.",
        )
    return found


def segment_texts(
    words: Sequence[Word], start: float, length: float, gap: float, count: int
) -> tuple[str, ...]:
    """The words whose time lies inside each of `count` segments of `length` seconds from `start` on."""
    times = [time for time, _ in words]
    texts = []
    for begin in (start + n * (length + gap) for n in range(count)):
        inside = words[bisect_right(times, begin) : bisect_left(times, begin + length)]
        texts.append(" ".join(word for _, word in inside))
    return tuple(texts)


def draws_of(spec: FrameSpec) -> int:
    """How many uniform numbers a row needs: the length, the starts, the caption and every frame."""
    return 2 + STARTS + (spec.count or FRAMES)


class ScriptMaker:
    """A `ScriptField`; `draws` are the places of its uniform numbers, `draws_of(spec)` of them."""

    def __init__(
        self,
        asked: ScriptField,
        source: RowSource,
        spec: FrameSpec,
        preprocess: Preprocess,
        tokenize: Tokenize,
        draws: np.ndarray,
    ) -> None:
        if asked.count < 2 or not 0 < asked.seconds[0] <= asked.seconds[1] or asked.gap < 0:
            raise UsageError(
                "A script has two or more segments of positive length, and no negative gaps; got "
                f"count={asked.count}, seconds={asked.seconds}, gap={asked.gap}."
            )
        self.field, self._spec, self._preprocess, self._tokenize = asked, spec, preprocess, tokenize
        (self._length, self._caption), self._starts, self._frames = (
            draws[:2],
            draws[2 : 2 + STARTS],
            draws[2 + STARTS :],
        )
        self._media = "video" if "video" in source.columns else "image"
        self._captions = (
            TextMaker(TextField(asked.name, optional=True), source, tokenize, int(self._caption))
            if asked.optional
            else None
        )
        stored = ("words",) if "words" in source.columns else ()
        self.columns = (self._media, *stored, *(self._captions.columns if self._captions else ()))

    def row(self, row: Row) -> None:
        media = media_of(row.cells[self._media], "video")
        try:
            try:
                self._script(row, media)
            except (Unusable, MediaError):
                if self._captions is None:
                    raise
                self._captions.row(row)
                caption = row.made[self.field.name]
                if caption is None:
                    raise
                row.made[self.field.name] = (caption, *[""] * (self.field.count - 1))
                row.made[self.field.clip] = read_clip(media, None, self._spec, self._preprocess)
        except MediaError as error:
            raise Unusable(error.reason.rstrip(".")) from error

    def _script(self, row: Row, media: bytes | Path) -> None:
        if isinstance(media, Path) and media_kind(media) == "picture":
            raise Unusable("a picture has no words with times")
        with _on_disk(media) as path:
            video = Video(path)
            words = self._words(row, path)
            start, length, texts = self._place(words, video.duration, row)
            span = self._span(length)
            part_T = np.arange(len(self._frames)) + row.draws[self._frames]
            batch = video.at(start + part_T * span / len(part_T), short_side=self._preprocess.decode_hint)
        row.made[self.field.name] = texts
        real_T = np.ones(len(batch.times_T), bool)
        row.made[self.field.clip] = self._preprocess.frames(batch.frames_THWC), batch.times_T, real_T

    def _words(self, row: Row, path: Path) -> list[Word]:
        value = listed(row.cells.get("words"))
        if value is None:
            return spoken_words(path)
        try:
            return timed_words(value)
        except ValueError as error:
            raise Unusable(f"its column 'words': {error}") from None

    def _span(self, length: float) -> float:
        return self.field.count * length + (self.field.count - 1) * self.field.gap

    def _place(
        self, words: Sequence[Word], duration: float, row: Row
    ) -> tuple[float, float, tuple[str, ...]]:
        """Where the segments begin, how long each is, and what is said in them."""
        asked, (least, most) = self.field, self.field.seconds
        length = least + row.draws[self._length] * (most - least)
        if self._span(length) > duration:
            length = (duration - (asked.count - 1) * asked.gap) / asked.count
            if length <= 0:
                raise Unusable(
                    f"its {duration:.1f} s are too short for {asked.count} segments {asked.gap:g} s apart"
                )
        free = max(0.0, duration - self._span(length))
        for draw in row.draws[self._starts]:
            start = float(draw * free)
            texts = segment_texts(words, start, length, asked.gap, asked.count)
            if all(texts):
                return start, length, texts
        raise Unusable(f"of {asked.count} segments of {length:.1f} s one has no words, wherever they began")

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        name, count = self.field.name, self.field.count
        texts_BK = [row.made[name] for row in rows]
        tokens_NL = torch.from_numpy(self._tokenize([text for texts in texts_BK for text in texts]))
        return {
            name: tokens_NL.unflatten(0, (len(rows), count)),
            f"{name}_mask": torch.tensor([[bool(text) for text in texts] for texts in texts_BK]),
            self.field.clip: clip_batch([row.made[self.field.clip] for row in rows]),
        }


@contextmanager
def _on_disk(media: bytes | Path) -> Iterator[Path]:
    """The file of a video, for as long as it is looked at; the decoder opens files by name."""
    if isinstance(media, Path):
        yield media
        return
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(media)
        file.flush()
        yield Path(file.name)
