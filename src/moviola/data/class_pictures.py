"""Pictures by class as the training loop reads them: cropped, mirrored, and through further views.

Axis letters: B rows of a batch, C channels, H height, W width, N rows in all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moviola.data.classes import ClassSet
from moviola.data.hashing import hash_uint64, hash_uniform
from moviola.data.pixel_views import VIEWS
from moviola.data.rows.views import DRAWS, View, look_at
from moviola.media import media_kind, read_picture
from moviola.types import LabelField, MediaError, Needs, PictureField, Recipe, UsageError, ViewField

MOST_BYTES = 2 << 30
"""Encoded pictures of a table that are kept in memory, since a table is not read row by row."""
_EPOCH, _VIEW = 0xC1A5, 0xC1B0


class ClassPictures:
    """`TrainingData` over some rows of a `ClassSet`: each batch has `id`, `row` and what `needs` names.

    rows        indices into `data`; a batch's row r is `data`'s rows[r]
    crop_area   least and largest share of a picture that a random crop keeps; (1, 1): no crop, exactly
                what the recipe prepares for encoding
    flip        chance of mirroring

    Every draw is a hash of (seed, epoch, row). All pictures are opened once at the start, so that a
    damaged one is found before training: those that cannot be read are left out and stand in `skipped`.
    Videos are refused.
    """

    def __init__(
        self,
        data: ClassSet,
        rows: Sequence[int] | np.ndarray,
        needs: Needs,
        *,
        recipe: Recipe,
        crop_area: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
    ) -> None:
        self.data, self.needs = data, needs
        known = (PictureField, LabelField, ViewField)
        foreign = [type(asked).__name__ for asked in needs.fields if not isinstance(asked, known)]
        if foreign:
            raise UsageError(
                f"Pictures by class have no {', '.join(foreign)}.", hint="Train on pairs for that."
            )
        self._pictures = [asked for asked in needs.fields if isinstance(asked, PictureField)]
        self._labels = [asked for asked in needs.fields if isinstance(asked, LabelField)]
        self._extra = [asked for asked in needs.fields if isinstance(asked, ViewField)]
        self._views = [
            View(recipe, size=asked.size, area=asked.area or crop_area, flip=flip)
            for asked in self._pictures
            for _ in range(asked.count)
        ]
        self._whole = View(recipe, size=None, area=(1, 1), flip=0)
        self._about = [str(needs), recipe.hash, list(crop_area), flip]
        self.skipped: list[tuple[str, str]] = []
        self._sources: list[bytes | Path] = []
        self._open(np.asarray(rows, np.int64))
        self.labels_N = data.labels_N[self.rows_N]

    def _open(self, rows: np.ndarray) -> None:
        kept, size = [], 0
        for index, name, media in self.data.stream(rows.tolist(), on_skip=self._skip):
            source = media if isinstance(media, bytes) else media.path
            if not isinstance(source, bytes) and media_kind(source) == "video":
                raise UsageError(
                    f"{name} is a video; this method trains on pictures.",
                    hint="Take frames of it, or use a method on frozen features, such as gda-clip.",
                )
            try:
                read_picture(source)
            except MediaError as error:
                self._skip(name, error.reason)
                continue
            size += len(source) if isinstance(source, bytes) else 0
            if size > MOST_BYTES:
                raise UsageError(
                    f"The pictures in the table take more than {MOST_BYTES >> 30} GiB.",
                    hint="Use --shots, or a folder per class, whose files are read when they are needed.",
                )
            kept.append(index)
            self._sources.append(source)
        self.rows_N = np.array(kept, np.int64)

    def _skip(self, name: str, why: str) -> None:
        self.skipped.append((name, why))

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the files, the rows and how they are shown."""
        told = json.dumps([self.data.fingerprint, self.rows_N.tolist(), self._about])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """The fields of some rows; `step` plays no part, since draws depend on the row alone."""
        rows = np.asarray(rows, np.int64)
        key = int(hash_uint64(seed, np.array([epoch], np.uint64), _EPOCH)[0])
        draws_BVD = np.stack(
            [hash_uniform(key, rows, stream) for stream in range(max(1, len(self._views)) * DRAWS)], axis=1
        ).reshape(len(rows), -1, DRAWS)
        seen = [self._look(int(row), draws, key) for row, draws in zip(rows, draws_BVD, strict=True)]
        made: dict[str, Any] = {
            "id": [self.data.ids[self.rows_N[row]] for row in rows],
            "row": torch.from_numpy(rows),
        }
        first = 0
        for asked in self._pictures:
            last = first + asked.count
            view = self._views[first]
            pixels_NCHW = view.normalized([one for pixels, _ in seen for one in pixels[first:last]])
            made[asked.name] = (
                pixels_NCHW if asked.count == 1 else pixels_NCHW.unflatten(0, (len(rows), asked.count))
            )
            first = last
        for place, extra in enumerate(self._extra):
            made[extra.name] = self._whole.normalized([others[place] for _, others in seen])
        for label in self._labels:
            made[label.name] = torch.from_numpy(self.labels_N[rows])
        return made

    def _look(self, row: int, draws_VD: np.ndarray, key: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """uint8 pixels_HWC of each crop, and of each further view."""
        source = self._sources[row]
        pixels = look_at(source, self._views, draws_VD)[0] if self._views else []
        if not self._extra:
            return pixels, []
        picture = read_picture(source)
        others = []
        for place, asked in enumerate(self._extra):
            seed = int(hash_uint64(key, np.array([row], np.uint64), _VIEW + place)[0])
            others.append(VIEWS[asked.kind](picture, self._whole.recipe.size, np.random.default_rng(seed)))
        return pixels, others
