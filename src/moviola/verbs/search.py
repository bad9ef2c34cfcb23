"""`search`: ask an index with words, a picture or words in subtitles, and get moments."""

from __future__ import annotations

import base64
import fnmatch
import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from moviola.types import Dtype, Moment, Refusal, StoreError, TimeSpan, UsageError, printable

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from moviola.clip.foreign_tokenizer import AnyTokenizer
    from moviola.clip.loaded import Model
    from moviola.store.index import Index
    from moviola.store.moments import Found, MomentSettings

WORDS_MARGIN = 5.0
"""Seconds around a matching subtitle in which a moment may lie when words and subtitles are asked."""
_SHORTLIST = 50


class NothingFound(UsageError):
    """A search without a single result; the message says why."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The score of every unit of one file over time, as the report draws it."""

    file: str
    duration: float
    times: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Results(Sequence[Moment]):
    """Moments, best first, with what was asked. A notebook shows them as pictures.

    measure   what `score` means: `cosine` (smoothed over the moment, corrected for part of the
              file's own level; see store/moments.py), `model` (the score of a non-separable model)
              or `words` (BM25)
    curves    the score over time of every video that has a moment here
    """

    moments: tuple[Moment, ...]
    query: str
    index_path: str
    model: str
    measure: str = "cosine"
    curves: dict[str, Curve] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.moments)

    def __iter__(self) -> Iterator[Moment]:
        return iter(self.moments)

    @overload
    def __getitem__(self, at: int) -> Moment: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Moment, ...]: ...
    def __getitem__(self, at: int | slice) -> Moment | tuple[Moment, ...]:
        return self.moments[at]

    def to_json(self) -> dict[str, Any]:
        """`{"results": [{"file", "start", "end", "score"}, ...]}`; 0 and 0 for a picture."""
        return {"results": [moment.to_json() for moment in self.moments]}

    def _repr_html_(self) -> str:
        cells = []
        for moment in self.moments:
            picture = ""
            if moment.thumbnail:
                data = base64.b64encode(moment.thumbnail).decode()
                picture = f'<img alt="" src="data:image/jpeg;base64,{data}"><br>'
            name = html.escape(printable(os.path.basename(moment.file)))  # noqa: PTH119
            when = "" if moment.kind == "picture" else f"{clock(moment.span.start)}-{clock(moment.span.end)} "
            cells.append(
                '<div style="display:inline-block;margin:4px;vertical-align:top;font-size:12px">'
                f"{picture}{name}<br>{when}{moment.score:.3f}</div>"
            )
        return f"<div><b>{html.escape(self.query)}</b><br>{''.join(cells)}</div>"


def clock(seconds: float) -> str:
    """65.25 -> 1:05.2, 3600 -> 1:00:00.0"""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def search(
    index: str | Path,
    query: str | None = None,
    *,
    image: str | Path | Image.Image | None = None,
    text: str | None = None,
    k: int = 10,
    within: Sequence[str | Path] | None = None,
    min_score: float | None = None,
    truncate: bool = False,
    model: str | Path | Model | None = None,
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    settings: MomentSettings | None = None,
) -> Results:
    """The `k` best moments of an index for words, a picture, or words in file names and subtitles.

    query     a sentence or a few words, compared with the pictures
    image     a picture to find the like of; together with `query` the two vectors are averaged
    text      words that must stand in a subtitle or the file's name; alone, the subtitles' times are
              the moments, with `query` or `image` only moments near them count
    within    only these files: paths, folders or patterns like "*/beach*.mp4"
    min_score leave out what scores lower (a cosine; what is high depends on the model)
    truncate  cut a query that is longer than the model's context instead of refusing it
    model     the model, loaded or by name; default: the one the index was made with, loaded again
    tokenizer for a checkpoint without one; default: the file the index was made with, if it is unchanged

    Moments of one file never overlap. `UsageError` for an empty query or a `k` below 1,
    `NothingFound` (also a `UsageError`) when there is no result, `StoreError` for a bad index.
    """
    from moviola.store.index import Index

    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UsageError(f"k is the number of results: a whole number above 0, got {k!r}.")
    if query is not None and not query.strip():
        raise UsageError("The query is empty.", hint='Say what to look for: moviola search INDEX "a red car"')
    if query is None and image is None and text is None:
        raise UsageError("There is nothing to look for: give words, a picture (--image) or --text.")
    opened = Index(index)
    allowed = _within(opened, within)
    asked = _asked(query, image, text)
    if query is None and image is None:
        assert text is not None
        results = _by_words(opened, text, allowed, k, asked)
    else:
        loaded = _model_of(opened, model, device, dtype, tokenizer, words=query is not None)
        results = _by_vector(opened, loaded, query, image, text, allowed, k, asked, truncate, settings)
    if min_score is not None and results.moments:
        best = results[0].score
        results = replace(results, moments=tuple(one for one in results if one.score >= min_score))
        if not results.moments:
            raise NothingFound(f"Nothing scores {min_score:g} or more; the best has {best:.3f}.")
    return results


def _asked(query: str | None, image: object, text: str | None) -> str:
    parts = [] if query is None else [query]
    if image is not None:
        named = isinstance(image, str | Path)
        parts.append(f"[like {printable(os.path.basename(str(image)))}]" if named else "[like a picture]")  # noqa: PTH119
    if text is not None:
        parts.append(f"[words: {text}]")
    return " ".join(parts)


def _within(index: Index, within: Sequence[str | Path] | None) -> np.ndarray:
    """Which files may answer, (files,) bool."""
    import numpy as np

    from moviola.store.format import absolute_bytes

    usable_F = np.array([row.status != "failed" for row in index.files], dtype=bool)
    if not usable_F.any():
        raise NothingFound(f"The index {printable(index.folder)} holds no file that could be read.")
    if within is None:
        return usable_F
    if isinstance(within, str | Path):
        within = [within]
    allowed_F = np.zeros(len(index.files), dtype=bool)
    for name in within:
        top = absolute_bytes(name)
        pattern = re.compile(fnmatch.translate(os.fspath(name)), re.DOTALL)
        below = top.rstrip(os.sep.encode()) + os.sep.encode()
        hits = [
            row.path == top or row.path.startswith(below) or pattern.fullmatch(row.file) is not None
            for row in index.files
        ]
        if not any(hits):
            raise UsageError(
                f"The index holds no file {printable(name)}.",
                hint=f"See what it holds with: moviola index list {printable(index.folder)}",
            )
        allowed_F |= np.array(hits)
    if not (usable_F & allowed_F).any():
        raise NothingFound("None of the files searched in could be read when they were indexed.")
    return usable_F & allowed_F


def _model_of(
    index: Index,
    model: str | Path | Model | None,
    device: str,
    dtype: Dtype | None,
    tokenizer: str | Path | None,
    *,
    words: bool,
) -> Model:
    if model is not None and not isinstance(model, str | Path):
        return model
    from moviola.verbs.load import load

    source = index.manifest.model.source if model is None else model
    own = model is None or Path(model).is_file()  # the same bare file, perhaps moved
    remembered = _remembered(index) if words and own and tokenizer is None else None
    return load(source, device=device, dtype=dtype, tokenizer=tokenizer or remembered)


def _remembered(index: Index) -> AnyTokenizer | None:
    """The tokenizer the index was made with, read again; `StoreError` if it is gone or another by now."""
    from moviola.clip.foreign_tokenizer import read_tokenizer

    card = index.manifest.model
    if card.tokenizer is None:
        return None
    where, folder = printable(card.tokenizer), printable(index.folder)
    if not Path(card.tokenizer).exists():
        raise StoreError(
            f"The index {folder} was made with the tokenizer {where}, which is gone.",
            hint="Say where it lies now: --tokenizer FILE (give it to moviola index once, and it is "
            "remembered).",
        )
    tokenizer = read_tokenizer(card.tokenizer)
    if tokenizer.hash != card.tokenizer_hash:
        raise StoreError(
            f"The tokenizer {where} has changed since the index {folder} was made with it "
            f"(expected {card.tokenizer_hash}, it is {tokenizer.hash} now).",
            hint="Put the former file back, or say where a copy lies: --tokenizer FILE.",
        )
    return tokenizer


# --------------------------------------------------------------------------------------------------
# By words alone
# --------------------------------------------------------------------------------------------------


def _by_words(index: Index, text: str, allowed_F: np.ndarray, k: int, asked: str) -> Results:
    from moviola.store.words import match

    rows = [row for row in index.texts if allowed_F[row.file]]
    hits = match(text, [row.text for row in rows])[:k]
    if not hits:
        raise NothingFound(
            f"No file name and no subtitle has the words {text!r}.",
            hint="Words must match; to look for what is seen, ask without --text.",
        )
    moments = []
    for at, score in hits:
        row = rows[at]
        file = index.files[row.file]
        unit = _unit_at(index, row.file, (row.start + row.end) / 2)
        moments.append(
            Moment(
                file=file.file,
                kind="video" if file.kind == "video" else "picture",
                span=TimeSpan(row.start, row.end),
                score=score,
                thumbnail=None if unit is None else index.thumbnail(unit),
                text=row.text,
            )
        )
    return Results(tuple(moments), asked, os.fsdecode(index.folder), index.manifest.model.name, "words")


def _unit_at(index: Index, file: int, time: float) -> int | None:
    """The unit of a file nearest to a time."""
    import numpy as np

    low, high = np.searchsorted(index.units.file_N, [file, file + 1])
    if low == high:
        return None
    return int(low + np.argmin(np.abs(index.units.start_N[low:high] - time)))


# --------------------------------------------------------------------------------------------------
# By vector
# --------------------------------------------------------------------------------------------------


def _by_vector(
    index: Index,
    model: Model,
    query: str | None,
    image: str | Path | Image.Image | None,
    text: str | None,
    allowed_F: np.ndarray,
    k: int,
    asked: str,
    truncate: bool,
    settings: MomentSettings | None,
) -> Results:
    import numpy as np

    from moviola.store.moments import best_moments

    units, files = index.units, index.files
    query_D = _query_vector(index, model, query, image, truncate)
    bounds_F = units.bounds(len(files))
    keep_N = allowed_F[units.file_N]
    if text is not None:
        keep_N &= _near_words(index, text, allowed_F)
    if not keep_N.any():
        raise NothingFound("The files searched in have no moment near those words.")
    score_N = index.scores(query_D[None])[:, 0]
    kept = np.flatnonzero(keep_N)
    kept_bounds = np.searchsorted(units.file_N[kept], np.arange(len(files) + 1))
    windows = index.manifest.sampling.window is not None
    rerank = not model.separable and query is not None
    best = best_moments(
        score_N[kept],
        units.start_N[kept],
        units.shot_N[kept],
        kept_bounds,
        [row.duration if row.kind == "video" else 0.0 for row in files],
        max(_SHORTLIST, 5 * k) if rerank else k,
        level=float(np.median(score_N)),
        settings=settings,
        step=index.manifest.sampling.step or None,
        end_N=units.end_N[kept] if windows else None,
        gapless=index.manifest.sampling.keyframes,
    )
    # Units of each moment by their position in the index.
    rows = [
        kept[kept_bounds[one.file] + one.stretch.first : kept_bounds[one.file] + one.stretch.last + 1]
        for one in best
    ]
    scores = [one.stretch.score for one in best]
    if rerank:
        assert query is not None
        if windows:
            scores = _read_again(index, model, query, [units[score_N[units].argmax()] for units in rows])
        else:
            scores = _reranked(index, model, query, rows)
    order = np.argsort(-np.array(scores), kind="stable")[:k]
    moments = tuple(_moment(index, best[i], scores[i], rows[i], score_N) for i in order)
    return Results(
        moments,
        asked,
        os.fsdecode(index.folder),
        index.manifest.model.name,
        "model" if rerank else "cosine",
        _curves(index, (best[i].file for i in order), score_N, bounds_F, windows),
    )


def _query_vector(
    index: Index,
    model: Model,
    query: str | None,
    image: str | Path | Image.Image | None,
    truncate: bool,
) -> np.ndarray:
    """The unit vector to compare with, (D,)."""
    import numpy as np

    from moviola.verbs.index import card_of

    made_with, given = index.manifest.model, card_of(model, model.name)
    if made_with.same_but_tokenizer(given):
        lies = f" ({printable(made_with.tokenizer)})" if made_with.tokenizer else ""
        raise StoreError(
            f"The index {printable(index.folder)} was made with the tokenizer "
            f"{made_with.tokenizer_hash}{lies}, the one given is {given.tokenizer_hash}.",
            hint="Give the tokenizer that belongs to the model.",
        )
    if not made_with.same_vectors(given):
        raise StoreError(
            f"The index {printable(index.folder)} was made with the model {made_with}, "
            f"but the query would be embedded with {given}.",
            hint=f"Search with --model {made_with.source}, or index again with the new model.",
        )
    if query is not None and not model.has_text:
        raise Refusal(
            f"The model '{model.name}' has no text tower, so words cannot be compared with its vectors.",
            hint="Ask with a picture: moviola search INDEX --image FILE",
        )
    parts = []
    if query is not None:
        parts.append(model.embed_texts([query], truncate=truncate)[0])
    if image is not None:
        parts.append(model.embed_pictures([_picture(image)])[0])
    vector_D = np.mean(parts, axis=0, dtype=np.float32)
    length = max(float(np.linalg.norm(vector_D)), 1e-12)
    return np.asarray(vector_D / length, dtype=np.float32)


def _picture(image: str | Path | Image.Image) -> Image.Image:
    if not isinstance(image, str | Path):
        return image
    from moviola.media import read_picture

    return read_picture(image)


def _near_words(index: Index, text: str, allowed_F: np.ndarray) -> np.ndarray:
    """Which units lie within `WORDS_MARGIN` of a text that has the words, (N,) bool."""
    import numpy as np

    from moviola.store.words import match

    rows = [row for row in index.texts if allowed_F[row.file]]
    hits = match(text, [row.text for row in rows])
    if not hits:
        raise NothingFound(f"No file name and no subtitle has the words {text!r}.")
    units = index.units
    near_N = np.zeros(len(units), dtype=bool)
    bounds_F = units.bounds(len(index.files))
    for at, _ in hits:
        row = rows[at]
        part = slice(bounds_F[row.file], bounds_F[row.file + 1])
        if row.source == "name":
            near_N[part] = True
        else:
            low, high = row.start - WORDS_MARGIN, row.end + WORDS_MARGIN
            near_N[part] |= (units.end_N[part] >= low) & (units.start_N[part] <= high)
    return near_N


def _reranked(index: Index, model: Model, query: str, rows: Sequence[np.ndarray]) -> list[float]:
    """The model's own scores of candidate moments, from their stored frame vectors."""
    import numpy as np

    from moviola.clip.sample import choose_frames

    chosen = []
    for units in rows:
        index_K, mask_K = choose_frames(model.frame_spec, index.units.start_N[units])
        chosen.append((units[index_K], mask_K))
    longest = max(len(mask_K) for _, mask_K in chosen)
    video_MTD = np.zeros((len(rows), longest, index.manifest.model.dim), dtype=np.float32)
    mask_MT = np.zeros((len(rows), longest), dtype=bool)
    for m, (units, mask_K) in enumerate(chosen):
        video_MTD[m, : len(units)] = index.vectors(units, unit_length=False) * mask_K[:, None]
        mask_MT[m, : len(units)] = mask_K
    return [float(score) for score in model.score([query], video_MTD, mask_MT)[0]]


def _read_again(index: Index, model: Model, query: str, units: Sequence[int]) -> list[float]:
    """The model's own scores of clips, whose frames are read again: only one vector of each is stored."""
    import numpy as np

    from moviola.media import Video, read_picture

    side, step = model.preprocess.decode_hint, index.manifest.sampling.every or None

    def clip(unit: int) -> tuple[np.ndarray, np.ndarray]:
        row = index.files[index.units.file_N[unit]]
        if row.kind != "video":
            return np.asarray(read_picture(Path(row.file)).convert("RGB"))[None], np.zeros(1)
        start, end = float(index.units.start_N[unit]), float(index.units.end_N[unit])
        count = round((end - start) / step) + 1 if step else index.manifest.sampling.window or 1
        batch = Video(row.file).at(np.linspace(start, end, count), short_side=side)
        return batch.frames_THWC, batch.times_T

    video, mask_MT = model.encode_clips(clip(unit) for unit in units)
    return [float(score) for score in model.score([query], video, mask_MT)[0]]


def _moment(index: Index, found: Found, score: float, rows: np.ndarray, score_N: np.ndarray) -> Moment:
    file = index.files[found.file]
    best = int(rows[score_N[rows].argmax()])
    return Moment(
        file=file.file,
        kind="video" if file.kind == "video" else "picture",
        span=TimeSpan(found.stretch.start, found.stretch.end),
        score=score,
        thumbnail=index.thumbnail(best),
    )


def _curves(
    index: Index, files: Iterable[int], score_N: np.ndarray, bounds_F: np.ndarray, windows: bool
) -> dict[str, Curve]:
    curves = {}
    for f in dict.fromkeys(files):
        row = index.files[f]
        if row.kind == "video":
            part = slice(bounds_F[f], bounds_F[f + 1])
            time_T = index.units.start_N[part]
            if windows:
                time_T = (time_T + index.units.end_N[part]) / 2
            times = tuple(float(t) for t in time_T)
            curves[row.file] = Curve(row.file, row.duration, times, tuple(float(s) for s in score_N[part]))
    return curves


# --------------------------------------------------------------------------------------------------
# Moments as files
# --------------------------------------------------------------------------------------------------


def save_clips(results: Iterable[Moment], folder: str | Path) -> list[Path]:
    """Write each moment as a file of its own: videos cut to .mp4, pictures copied. The files written.

    Names are numbered in the order of the results: `01-beach-0m12.0s.mp4`.
    """
    import shutil

    from moviola.media import cut

    moments = list(results)
    if not moments:
        raise NothingFound("There is no moment to write.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{printable(folder)} is a file; the clips need a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(2, len(str(len(moments))))
    written = []
    for number, moment in enumerate(moments, 1):
        source = Path(moment.file)
        stem = re.sub(r"[^\w.-]+", "_", printable(source.stem))[:60]
        if moment.kind == "picture":
            target = folder / f"{number:0{digits}d}-{stem}{source.suffix.lower()}"
            shutil.copyfile(source, target)
        else:
            minutes, seconds = divmod(moment.span.start, 60)
            target = folder / f"{number:0{digits}d}-{stem}-{int(minutes)}m{seconds:04.1f}s.mp4"
            cut(source, moment.span, target)
        written.append(target)
    return written
