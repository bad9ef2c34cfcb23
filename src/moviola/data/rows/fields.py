"""How each kind of field is made: what a row's cells give, and how rows become a batch.

A maker names its columns, takes what it needs of a row (`row`, which raises `Unusable` with a reason) and
stacks the rows (`stack`). Pictures come last, so that a row that lacks a caption is never decoded.

Axis letters: B rows, L tokens, N boxes of a picture.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from moviola.clip.preprocess import Preprocess
from moviola.data.rows.clips import clip_batch, read_clip
from moviola.data.rows.shards import REFUSED
from moviola.data.rows.source import RowSource
from moviola.data.rows.views import Placed, View, look_at
from moviola.data.tables import text_cell
from moviola.types import (
    FrameSpec,
    MediaError,
    PictureField,
    RegionField,
    TextField,
    TimeSpan,
    UsageError,
    VectorField,
    VideoField,
)

_LEAST_SIDE = 1.0  # pixels of the view that a box must keep to be seen


class Unusable(Exception):
    """A row that cannot be used, and why."""


@dataclass(slots=True)
class Row:
    """A row on its way into a batch: cells by column, its uniform numbers, what the makers took."""

    number: int
    cells: Mapping[str, Any]
    draws: np.ndarray
    where: str
    made: dict[str, Any] = field(default_factory=dict)
    places: list[Placed] = field(default_factory=list)


class Maker(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...
    def row(self, row: Row) -> None: ...
    def stack(self, rows: Sequence[Row]) -> dict[str, Any]: ...


# --------------------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------------------


class Tokenize:
    """Texts to tokens (N, L) int64; long ones are cut without a word, as is usual in training."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return np.array(self._tokenizer(list(texts), truncate=True), np.int64)


class TextMaker:
    """A `TextField`; `draw` is the place of its uniform number, shared by fields of the same columns."""

    def __init__(self, asked: TextField, source: RowSource, tokenize: Tokenize, draw: int) -> None:
        self.field, self._tokenize, self._draw = asked, tokenize, draw
        patterns = asked.columns or source.captions
        groups = [_matching(pattern, source.columns) for pattern in patterns]
        self._groups = [group for group in groups if group]
        self.columns = tuple(dict.fromkeys(name for group in self._groups for name in group))
        if not self.columns and not asked.optional:
            wanted = ", ".join(asked.columns) or "a caption (caption, captions, text ...)"
            listed = ", ".join(map(repr, source.columns)) or "none"
            raise UsageError(
                f"The data has no column for the field {asked.name!r}: expected {wanted}. Columns: {listed}.",
                hint="Say which column it is: --column text=NAME (columns={'text': 'NAME'}).",
            )

    def row(self, row: Row) -> None:
        texts: list[str] = []
        for group in self._groups:
            texts = [text for name in group for text in text_cell(row.cells[name])]
            if texts:
                break
        if not texts:
            if not self.field.optional:
                raise Unusable(f"it has no text in {', '.join(self.columns)}")
            row.made[self.field.name] = None
            return
        text = texts[min(int(row.draws[self._draw] * len(texts)), len(texts) - 1)]
        row.made[self.field.name] = text.partition(". ")[0] if self.field.cut == "first-sentence" else text

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        name = self.field.name
        texts = [row.made[name] for row in rows]
        made: dict[str, Any] = {name: torch.from_numpy(self._tokenize([text or "" for text in texts]))}
        if self.field.optional:
            made[f"{name}_mask"] = torch.tensor([text is not None for text in texts], dtype=torch.bool)
        return made


def _matching(pattern: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The column of that name, or for `name*` all that begin so."""
    if not pattern.endswith("*"):
        return (pattern,) if pattern in columns else ()
    return tuple(name for name in columns if name.startswith(pattern[:-1]))


# --------------------------------------------------------------------------------------------------
# Pictures and clips
# --------------------------------------------------------------------------------------------------


def media_of(cell: Mapping[str, Any] | None, what: str) -> bytes | Path:
    """The bytes or the path of a cell of `image` or `video`."""
    data = None if cell is None else cell["bytes"]
    path = None if cell is None else cell["path"]
    if data is not None:
        if not len(data):
            raise Unusable(f"its {what} has no bytes")
        return bytes(data)
    if path is None:
        raise Unusable(f"it names no {what}")
    if path.startswith(REFUSED):
        raise Unusable(path.removeprefix(REFUSED))
    return Path(path)


class PictureMaker:
    """All `PictureField`s at once: each picture is decoded once. `draws`: places of the uniform numbers."""

    columns = ("image",)

    def __init__(self, fields: Sequence[PictureField], views: Sequence[View], draws: np.ndarray) -> None:
        self._fields = fields
        self._of_view = [view for asked, view in zip(fields, views) for _ in range(asked.count)]
        self._views = views
        self._draws_VD = draws

    def row(self, row: Row) -> None:
        source = media_of(row.cells["image"], "picture")
        try:
            pixels, row.places = look_at(source, self._of_view, row.draws[self._draws_VD])
        except MediaError as error:
            raise Unusable(error.reason.rstrip(".")) from error
        row.made["__pixels__"] = pixels

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        first = 0
        for asked, view in zip(self._fields, self._views):
            last = first + asked.count
            pixels_NCHW = view.normalized([p for row in rows for p in row.made["__pixels__"][first:last]])
            if asked.count > 1:
                pixels_NCHW = pixels_NCHW.unflatten(0, (len(rows), asked.count))
            made[asked.name] = pixels_NCHW
            first = last
        return made


class VideoMaker:
    """A `VideoField`: one clip a row by the model's `FrameSpec`; `start` and `end` in seconds where given."""

    def __init__(self, asked: VideoField, source: RowSource, spec: FrameSpec, preprocess: Preprocess) -> None:
        self._name, self._spec, self._preprocess = asked.name, spec, preprocess
        self._media = "video" if "video" in source.columns else "image"
        self._spans = {"start", "end"} <= set(source.columns)
        self.columns = (self._media, *(("start", "end") if self._spans else ()))

    def row(self, row: Row) -> None:
        media = media_of(row.cells[self._media], "video")
        try:
            row.made[self._name] = read_clip(media, self._span(row), self._spec, self._preprocess)
        except MediaError as error:
            raise Unusable(error.reason.rstrip(".")) from error

    def _span(self, row: Row) -> TimeSpan | None:
        cells = (row.cells["start"], row.cells["end"]) if self._spans else (None, None)
        if all(cell in (None, "") for cell in cells):
            return None
        try:
            return TimeSpan(*(float(cell) for cell in cells))  # type: ignore[arg-type]
        except (TypeError, ValueError, UsageError):
            raise Unusable(
                f"expected 0 <= start <= end in seconds, got {cells[0]!r} and {cells[1]!r}"
            ) from None

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {self._name: clip_batch([row.made[self._name] for row in rows])}


# --------------------------------------------------------------------------------------------------
# Regions and vectors
# --------------------------------------------------------------------------------------------------


def listed(value: Any) -> Any:
    """A list; text tables hold lists as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            raise Unusable(f"expected a list, got the text {value[:40]!r}") from None
    return value


class RegionMaker:
    """A `RegionField`: after `PictureMaker`, whose first view the boxes are moved into.

    Boxes are xyxy pixels of the upright picture. Those that are empty, not finite, without a text, or
    of which less than a pixel is to be seen, go together with their texts.
    """

    def __init__(self, asked: RegionField, source: RowSource, tokenize: Tokenize) -> None:
        self._most, self._tokenize = asked.most, tokenize
        missing = [name for name in ("boxes", "regions") if name not in source.columns]
        if missing:
            listed_names = ", ".join(map(repr, source.columns))
            raise UsageError(
                f"The objective needs boxes with texts, the data has no column {' and '.join(missing)}. "
                f"Columns: {listed_names}.",
                hint="Add 'boxes' (lists of xyxy pixels) and 'regions' (as many texts), or rename columns.",
            )
        scored = ("region_scores",) if "region_scores" in source.columns else ()
        self.columns = ("boxes", "regions", *scored)

    def row(self, row: Row) -> None:
        boxes = listed(row.cells["boxes"]) or []
        texts = listed(row.cells["regions"]) or []
        scores = listed(row.cells.get("region_scores"))
        try:
            boxes_N4 = np.array(boxes, np.float64).reshape(-1, 4)
            scores_N = np.zeros(len(boxes_N4)) if scores is None else np.array(scores, np.float64).reshape(-1)
        except (TypeError, ValueError):
            raise Unusable("its boxes are no lists of four numbers") from None
        if not len(boxes_N4) == len(texts) == len(scores_N):
            raise Unusable(f"it has {len(boxes_N4)} boxes, {len(texts)} texts and {len(scores_N)} scores")
        finite_N = np.asarray(np.isfinite(boxes_N4).all(axis=1))
        sound_N = finite_N & (boxes_N4[:, 2] > boxes_N4[:, 0]) & (boxes_N4[:, 3] > boxes_N4[:, 1])
        sound_N &= np.array([isinstance(text, str) and bool(text.strip()) for text in texts], bool)
        moved_N4 = row.places[0].boxes(np.where(finite_N[:, None], boxes_N4, 0.0))
        sides_N2 = moved_N4[:, 2:] - moved_N4[:, :2]
        kept = np.flatnonzero(sound_N & (sides_N2 >= _LEAST_SIDE).all(axis=1))
        kept = kept[np.argsort(-np.nan_to_num(scores_N[kept], nan=-np.inf), kind="stable")][: self._most]
        row.made["__regions__"] = moved_N4[kept], [texts[i].strip() for i in kept.tolist()]

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        count, most = len(rows), self._most
        boxes_BN4 = torch.zeros(count, most, 4)
        mask_BN = torch.zeros(count, most, dtype=torch.bool)
        texts = [""] * (count * most)
        for place, row in enumerate(rows):
            moved_N4, names = row.made["__regions__"]
            boxes_BN4[place, : len(names)] = torch.from_numpy(moved_N4.astype(np.float32))
            mask_BN[place, : len(names)] = True
            texts[place * most : place * most + len(names)] = names
        tokens = torch.from_numpy(self._tokenize(texts)).unflatten(0, (count, most))
        return {"boxes": boxes_BN4, "region_text": tokens, "region_mask": mask_BN}


class VectorMaker:
    """A `VectorField`. All rows must be as wide as the first that was read; another width is an error."""

    def __init__(self, asked: VectorField, source: RowSource) -> None:
        self.field = asked
        self.columns = (asked.column,)
        self._width: int | None = None
        if asked.column not in source.columns:
            raise UsageError(
                f"The data has no column {asked.column!r} for the field {asked.name!r}. "
                f"Columns: {', '.join(map(repr, source.columns))}.",
                hint=f"Rename one: --column {asked.column}=NAME (columns={{'{asked.column}': 'NAME'}}).",
            )

    def row(self, row: Row) -> None:
        value = listed(row.cells[self.field.column])
        if value is None:
            raise Unusable(f"it has no {self.field.column}")
        try:
            vector_D = np.array(value, np.float32).reshape(-1)
        except (TypeError, ValueError):
            raise Unusable(f"its {self.field.column} is no list of numbers") from None
        if not np.isfinite(vector_D).all():
            raise Unusable(f"its {self.field.column} is not finite")
        if self._width is None:
            self._width = len(vector_D)
        if len(vector_D) != self._width:
            raise UsageError(
                f"{row.where}: the column {self.field.column!r} holds {len(vector_D)} numbers here and "
                f"{self._width} in other rows, expected one width.",
                hint="Make all vectors with the same model.",
            )
        row.made[self.field.name] = vector_D

    def stack(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {self.field.name: torch.from_numpy(np.stack([row.made[self.field.name] for row in rows]))}
