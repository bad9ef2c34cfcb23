"""One pass of a model over the items of a labelled set, with its vectors kept for the next time.

Axis letters: N items or texts, M items, C classes, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.files import atomic
from moviola.types import UsageError
from moviola.verbs.common import Progress, Skipped, embed_media, score_media

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.data.media_set import MediaSet
    from moviola.verbs.classify import ClassScorer

_SAVE_EVERY = 4096
"""Items between two writes of the cache, so that a killed pass loses little."""


class NothingEvaluated(UsageError):
    """Not one item could be used; `failed` says why."""

    def __init__(self, problem: str, failed: Sequence[Skipped], *, hint: str | None = None) -> None:
        super().__init__(problem, hint=hint)
        self.failed = tuple(failed)


class SetReader:
    """The chosen `rows` of a set through a model; what cannot be read is added to `failed`.

    `cache` is a folder where the vectors are kept by item: whatever rows are asked for, only those that
    are not there yet are computed. A changed file, model or recipe begins anew.
    """

    def __init__(
        self,
        model: Model,
        data: MediaSet,
        rows: Sequence[int],
        *,
        batch_size: int = 32,
        frames: int | None = None,
        cache: str | Path | None = None,
        failed: list[Skipped] | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
        if frames is not None and frames < 1:
            raise UsageError(f"A video's vector needs at least one frame, got frames={frames}.")
        if cache is not None and not model.separable:
            raise UsageError(
                f"The model '{model.name}' has no single vector per item, so there is nothing to cache.",
                hint="Leave cache out.",
            )
        self.model, self.data, self.rows = model, data, list(rows)
        self.batch_size, self.frames = batch_size, frames
        self.failed = [] if failed is None else failed
        self.cache = None if cache is None else Path(cache)
        self.on_progress = on_progress
        self.done = 0

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the items that could be read, rising, and their unit vectors_ND."""
        kept = _Kept(None if self.cache is None else self.cache / f"features-{self._key()}.npz")
        known = [row for row in self.rows if row in kept]
        for row in known:
            if row in kept.failed:
                self.failed.append(kept.failed[row])
        if known:
            self._tell(len(known), "from the cache")
        missing = [row for row in self.rows if row not in kept]

        def skip(index: int, one: Skipped) -> None:
            kept.failed[index] = one
            self._skip(index, one)

        new = 0
        for group, vectors_ND in embed_media(
            self.model,
            self._items(missing),
            batch_size=self.batch_size,
            frames=self.frames,
            on_skip=skip,
        ):
            kept.vectors.update(zip((one[0] for one in group), vectors_ND, strict=True))
            self._tell(len(group), group[-1][1])
            new += len(group)
            if new >= _SAVE_EVERY:
                kept.write()
                new = 0
        if missing:
            kept.write()
        index = sorted(row for row in self.rows if row in kept.vectors)
        self._check(index)
        return np.array(index), np.stack([kept.vectors[row] for row in index])

    def scores(self, scorer: ClassScorer) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the items that could be read, and their scores_NC."""
        index, scores = [], []
        for group, logits_NC in scorer.over(self._items(self.rows), on_skip=self._skip):
            index += [one[0] for one in group]
            scores.append(logits_NC)
            self._tell(len(group), group[-1][1])
        self._check(index)
        return np.array(index), np.concatenate(scores)

    def similarities(self, text_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices of the items that could be read, and scores_NM; no item's frames are kept."""
        index, scores = [], []
        for group, scores_NM in score_media(
            self.model,
            text_ND,
            self._items(self.rows),
            batch_size=self.batch_size,
            frames=self.frames,
            on_skip=self._skip,
        ):
            index += [one[0] for one in group]
            scores.append(scores_NM)
            self._tell(len(group), group[-1][1])
        self._check(index)
        return np.array(index), np.concatenate(scores, axis=1)

    def _items(self, rows: Sequence[int]) -> Any:
        def skip(name: str, why: str) -> None:
            self._skip(-1, Skipped(name, why))

        return self.data.stream(rows, on_skip=skip)

    def _skip(self, index: int, one: Skipped) -> None:
        self.failed.append(one)
        self._tell(1, one.path)

    def _tell(self, steps: int, note: str) -> None:
        self.done += steps
        if self.on_progress is not None:
            self.on_progress(self.done, len(self.rows), note)

    def _check(self, index: Sequence[int]) -> None:
        if not index:
            first = f" The first: {self.failed[0]}." if self.failed else ""
            raise NothingEvaluated(
                f"Nothing was evaluated: none of {len(self.rows)} items could be read.{first}", self.failed
            )

    def _key(self) -> str:
        """What a vector depends on besides its item, as 20 hex digits."""
        model = self.model
        parts = [model.hash, model.recipe.hash, str(model.dtype), self.frames, self.data.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


class _Kept:
    """Vectors by item, and the items that cannot be read; in a file where `place` is given."""

    def __init__(self, place: Path | None) -> None:
        self.place = place
        self.vectors: dict[int, np.ndarray] = {}
        self.failed: dict[int, Skipped] = {}
        if place is not None and place.is_file():
            with np.load(place, allow_pickle=False) as stored:
                self.vectors = dict(zip(stored["index"].tolist(), stored["vectors"], strict=True))
                self.failed = {row: Skipped(*one) for row, *one in json.loads(str(stored["failed"]))}

    def __contains__(self, row: int) -> bool:
        return row in self.vectors or row in self.failed

    def write(self) -> None:
        if self.place is None or not self.vectors:
            return
        listed = json.dumps([[row, one.path, one.reason] for row, one in self.failed.items()])
        index = sorted(self.vectors)
        with atomic(self.place) as file:
            np.savez(
                file,
                index=np.array(index),
                vectors=np.stack([self.vectors[row] for row in index]),
                failed=np.array(listed),
            )
