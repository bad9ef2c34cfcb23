"""The pictures of an audit, and one pass over each set of them.

A picture is decoded once for all models and all corruptions of it. What a model gave is kept block by
block, so a killed audit loses at most one block.

Axis letters: N items, P pairs, C classes, K numbers that a model gives for a picture, B a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from zipfile import BadZipFile

import numpy as np

from moviola.data.classes import ClassSet
from moviola.data.corruptions import CORRUPTIONS, corrupt
from moviola.data.cue_conflict import CueConflictSet, cue_conflict
from moviola.data.media_set import MediaSet, file_stream, table_stream
from moviola.data.tables import ID_COLUMNS, MEDIA_COLUMNS, Table, media_cell, row_id
from moviola.files import atomic
from moviola.media import media_kind, on_white, walk
from moviola.types import Clip, StoreError, TimeSpan, UsageError, printable
from moviola.verbs.audit_models import Subject, Templates
from moviola.verbs.common import Look, Progress, Skipped, batches, looks
from moviola.verbs.set_reader import NothingEvaluated

if TYPE_CHECKING:
    from PIL import Image

    from moviola.clip.loaded import Model

OnSkip = Callable[[int, Skipped], None]

BLOCK = 64
"""Items whose answers make one file of the cache."""
SIDE = 224
"""Short side in pixels to which larger pictures are scaled before they are corrupted or made into cues.

Models see about as much; noise of a larger picture would vanish when they scale it.
"""

# --------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """A picture as it is, or after a corruption."""

    corruption: str | None = None
    severity: int = 0

    def __str__(self) -> str:
        return "clean" if self.corruption is None else f"{self.corruption} {self.severity}"


CLEAN = Variant()


class Suite:
    """Pictures that every model sees, in every one of `variants`."""

    def __init__(
        self, data: MediaSet, rows: Sequence[int], variants: Sequence[Variant] = (CLEAN,), *, seed: int = 0
    ) -> None:
        self.data, self.rows, self.variants, self.seed = data, tuple(rows), tuple(variants), seed

    def key(self, variant: Variant, block: Sequence[int]) -> list[Any]:
        """What decides the pixels of a block."""
        noise: list[Any] = []
        if variant.corruption is not None:
            strength = CORRUPTIONS[variant.corruption].parameters[variant.severity - 1]
            noise = [variant.corruption, variant.severity, strength, self.seed, SIDE]
        return [self.data.fingerprint, list(block), *noise]

    def looks(self, rows: Sequence[int], on_skip: OnSkip) -> Iterator[tuple[int, str, Look]]:
        """Row, id and pixels of every item that can be read."""
        return read_pictures(self.data, rows, on_skip)

    def spoilt(self, variant: Variant, name: str, picture: Image.Image) -> Image.Image:
        """After a corruption; the noise depends on the seed and on where the item lies in its set."""
        assert variant.corruption is not None
        name = below(name, self.data.source)
        return corrupt(picture, variant.corruption, variant.severity, seed=self.seed, id=name)


class PublishedCues(Suite):
    """A cue-conflict set: `labels` gives the classes of shape and of texture, among the set's own."""

    data: CueConflictSet

    def labels(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.data.shape_N[index_N], self.data.texture_N[index_N]


class CueSuite(Suite):
    """Made pictures with the shape of one item and the texture of another; rows count the pairs."""

    data: ClassSet

    def __init__(self, data: ClassSet, shape_P: np.ndarray, texture_P: np.ndarray) -> None:
        super().__init__(data, range(len(shape_P)))
        self.shape_P, self.texture_P = shape_P, texture_P

    def labels(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.data.labels_N[self.shape_P[index_N]], self.data.labels_N[self.texture_P[index_N]]

    def key(self, variant: Variant, block: Sequence[int]) -> list[Any]:
        rows = np.array(block)
        pairs = [self.shape_P[rows].tolist(), self.texture_P[rows].tolist()]
        return [self.data.fingerprint, *pairs, "cue conflict", SIDE]

    def looks(self, rows: Sequence[int], on_skip: OnSkip) -> Iterator[tuple[int, str, Look]]:
        from PIL import Image, ImageOps

        wanted = {int(row) for pair in rows for row in (self.shape_P[pair], self.texture_P[pair])}
        size = (SIDE, SIDE)
        small = {
            row: ImageOps.fit(on_white(look.picture), size, Image.Resampling.BICUBIC)
            for row, _, look in read_pictures(self.data, sorted(wanted), lambda row, one: on_skip(-1, one))
            if look.picture is not None
        }
        for pair in rows:
            shape, texture = small.get(int(self.shape_P[pair])), small.get(int(self.texture_P[pair]))
            if shape is not None and texture is not None:
                made = cue_conflict(shape, texture, SIDE)
                yield pair, f"pair {pair}", Look("picture", TimeSpan(0, 0), picture=made)


def read_pictures(data: MediaSet, rows: Sequence[int], on_skip: OnSkip) -> Iterator[tuple[int, str, Look]]:
    """Row, id and decoded picture of the rows; videos, and what cannot be read, go to `on_skip`."""

    row_of = {name: row for row, name in enumerate(data.ids)}

    def skip(name: str, why: str) -> None:
        on_skip(row_of.get(name, -1), Skipped(name, why))

    def pictures() -> Iterator[tuple[int, str, Clip | bytes]]:
        for row, name, media in data.stream(rows, on_skip=skip):
            if isinstance(media, Clip) and media_kind(media.path) == "video":
                on_skip(row, Skipped(name, "it is a video, and an audit looks at pictures"))
            else:
                yield row, name, media

    # only a video's frames depend on the model
    return looks(pictures(), cast("Model", None), on_skip=on_skip)


def below(name: str, source: Path) -> str:
    """An item's path below the folder it is of, so that a set may be moved; other ids stay."""
    place = Path(name)
    return place.relative_to(source).as_posix() if place.is_relative_to(source) else name


def any_pictures(source: str | Path | MediaSet) -> MediaSet:
    """Pictures whatever their classes: a folder with any below it, a table with a column of them, a set."""
    if isinstance(source, MediaSet):
        return source
    path = Path(source)
    if path.is_dir():
        clips = [Clip(found.path) for found in walk(path) if found.kind == "picture"]
        if not clips:
            raise UsageError(f"{printable(path)} holds no pictures.")
        names = [str(clip.path) for clip in clips]
        return MediaSet(path, names, file_stream(clips, names), [clip.path for clip in clips])
    table = Table(path)
    media_name = table.column(None, MEDIA_COLUMNS, "pictures", "media_column")
    id_name = table.find(None, ID_COLUMNS)
    numbers, names, files = [], [], [path]
    for number, row in table.rows(
        [media_name, *([id_name] if id_name else [])], on_skip=lambda where, why: None
    ):
        numbers.append(number)
        names.append(row_id(table, number, row, id_name))
        media = media_cell(row.get(media_name), table.folder)
        if isinstance(media, Clip):
            files.append(media.path)
    if not numbers:
        raise UsageError(f"The table {printable(path)} has no rows.")
    return MediaSet(path, names, table_stream(table, media_name, numbers, names, table.folder), files)


# --------------------------------------------------------------------------------------------------
# The pass
# --------------------------------------------------------------------------------------------------


class Seen:
    """What the models gave for a suite: of the rows `index_N`, which all of them saw in every variant."""

    def __init__(self, blocks: Mapping[tuple[Subject, Variant], Sequence[Path]], suite: Suite) -> None:
        self._blocks = blocks
        self.corrupted = tuple(one for one in suite.variants if one.corruption is not None)
        failed: dict[Skipped, None] = {}
        common: set[int] = set(suite.rows)
        for places in blocks.values():
            index: set[int] = set()
            for place in places:
                with _opened(place) as stored:
                    index.update(stored["index"].tolist())
                    failed.update(dict.fromkeys(Skipped(*one) for one in json.loads(str(stored["failed"]))))
            common &= index
        self.failed = tuple(failed)
        self.index_N = np.array(sorted(common), dtype=np.int64)

    def raw(self, subject: Subject, variant: Variant = CLEAN) -> np.ndarray:
        """raw_NK of the rows `index_N`."""
        index, rows = [], []
        for place in self._blocks[subject, variant]:
            with _opened(place) as stored:
                index.append(stored["index"])
                rows.append(stored["raw"])
        found_M = np.concatenate(index)
        order_M = np.argsort(found_M)
        chosen_N = order_M[np.searchsorted(found_M[order_M], self.index_N)]
        return np.concatenate([one for one in rows if len(one)])[chosen_N]

    def logits(
        self, subject: Subject, variant: Variant = CLEAN, templates: Templates | None = None
    ) -> np.ndarray:
        return subject.logits(self.raw(subject, variant), templates)


class _Block:
    """Neighbouring rows, and for what of them the cache has nothing."""

    def __init__(self, rows: Sequence[int], wanted: Mapping[tuple[Subject, Variant], Path]) -> None:
        self.rows, self.wanted = rows, wanted
        self.index: list[int] = []
        self.raw: dict[tuple[Subject, Variant], list[np.ndarray]] = {pair: [] for pair in wanted}

    def write(self, failed: Sequence[Skipped]) -> None:
        listed = np.array(json.dumps([[one.path, one.reason] for one in failed]))
        index_N = np.array(self.index, np.int64)
        for pair, place in self.wanted.items():
            raw_NK = np.concatenate(self.raw[pair]) if self.index else np.empty((0, 0), np.float32)
            with atomic(place) as file:
                np.savez(file, index=index_N, raw=raw_NK, failed=listed)
        self.raw.clear()


class Run:
    """Shows suites to models. `cache` is kept; `temporary` is for models that have no name for a cache.

    `failed` gathers what could not be read. `total` is how many looks there will be in all.
    """

    def __init__(
        self,
        cache: Path,
        temporary: Path,
        batch_size: int,
        on_progress: Progress | None,
        total: int,
        failed: dict[Skipped, None],
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"The batch size must be at least 1, got {batch_size}.")
        self.cache, self.temporary, self.batch_size = cache, temporary, batch_size
        self.on_progress, self.total, self.failed = on_progress, total, failed
        self.done = 0

    def tell(self, steps: int, note: str) -> None:
        self.done += steps
        if steps and self.on_progress is not None:
            self.on_progress(self.done, self.total, note)

    def see(self, suite: Suite, subjects: Sequence[Subject]) -> Seen:
        """Every variant of every picture through every model, but for what the cache has.

        `NothingEvaluated` where not one picture could be read.
        """
        pairs = [(subject, variant) for subject in subjects for variant in suite.variants]
        blocks: dict[tuple[Subject, Variant], list[Path]] = {pair: [] for pair in pairs}
        unfinished: list[_Block] = []
        for start in range(0, len(suite.rows), BLOCK):
            rows = suite.rows[start : start + BLOCK]
            places = {pair: self._place(*pair, suite, rows) for pair in pairs}
            for pair, place in places.items():
                blocks[pair].append(place)
            wanted = {pair: place for pair, place in places.items() if not place.is_file()}
            self.tell(len(rows) * (len(places) - len(wanted)), "from the cache")
            if wanted:
                unfinished.append(_Block(rows, wanted))
        if unfinished:
            self._show(suite, unfinished)
        seen = Seen(blocks, suite)
        self.failed.update(dict.fromkeys(seen.failed))
        if not len(seen.index_N):
            first = f" The first: {seen.failed[0]}." if seen.failed else ""
            raise NothingEvaluated(
                f"Nothing was audited: none of {len(suite.rows)} pictures of {printable(suite.data.source)} "
                f"could be used.{first}",
                seen.failed,
            )
        return seen

    def _show(self, suite: Suite, blocks: Sequence[_Block]) -> None:
        """One stream over all blocks, since a table is read from its start each time."""
        block_of = {row: block for block in blocks for row in block.rows}
        failed: list[tuple[int, Skipped]] = []
        found = suite.looks(list(block_of), lambda row, one: failed.append((row, one)))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="corrupt") as pool:
            for block, several in groupby(found, key=lambda item: block_of[item[0]]):
                for group in batches(several, self.batch_size):
                    self._show_batch(suite, block, group, pool)
                block.write([one for row, one in failed if block_of.get(row, block) is block])
                self.tell((len(block.rows) - len(block.index)) * len(block.wanted), "left out")
        for block in blocks:
            if not block.index:  # nothing of it could be read
                block.write([one for row, one in failed if block_of.get(row, block) is block])
                self.tell(len(block.rows) * len(block.wanted), "left out")

    def _show_batch(
        self, suite: Suite, block: _Block, group: Sequence[tuple[int, str, Look]], pool: ThreadPoolExecutor
    ) -> None:
        """Each picture is corrupted once a variant and seen by all models."""
        block.index += [row for row, _, _ in group]
        names = [name for _, name, _ in group]
        pictures = [look.picture for _, _, look in group if look.picture is not None]
        variants = dict.fromkeys(variant for _, variant in block.wanted)
        small = [] if list(variants) == [CLEAN] else list(pool.map(_small, pictures))
        for variant in variants:
            shown = pictures
            if variant != CLEAN:
                shown = list(pool.map(suite.spoilt, [variant] * len(small), names, small))
            for subject in (one for one, other in block.wanted if other == variant):
                raw_BK = subject.see(shown)
                _check_finite(subject, variant, names, raw_BK)
                block.raw[subject, variant].append(raw_BK)
                self.tell(len(group), f"{subject.name}, {variant}")

    def _place(self, subject: Subject, variant: Variant, suite: Suite, block: Sequence[int]) -> Path:
        """The file of a block, named by all that decides what is in it."""
        folder, known = (
            (self.temporary, f"{id(subject)}") if subject.key is None else (self.cache, subject.key)
        )
        digest = hashlib.sha256(json.dumps([known, *suite.key(variant, block)]).encode()).hexdigest()
        return folder / f"audit-{digest[:20]}.npz"


def _small(picture: Image.Image) -> Image.Image:
    """RGB, its short side `SIDE` where it was longer."""
    from PIL import Image

    picture = on_white(picture)
    short = min(picture.size)
    if short <= SIDE:
        return picture
    width, height = (side * SIDE // short for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _check_finite(subject: Subject, variant: Variant, names: Sequence[str], raw_BK: np.ndarray) -> None:
    bad = [name for name, row_K in zip(names, raw_BK, strict=True) if not np.isfinite(row_K).all()]
    if bad:
        raise UsageError(
            f"The model '{subject.name}' gave numbers that are not finite for {len(bad)} of {len(names)} "
            f"pictures ({variant}), the first: {printable(bad[0])}. No figure can be made of them.",
            hint="Half precision may have overflowed: try dtype float32. Else the weights are damaged.",
        )


def _opened(place: Path) -> Any:
    try:
        return np.load(place, allow_pickle=False)
    except (OSError, ValueError, BadZipFile) as error:
        raise StoreError(
            f"{printable(place)} of the cache cannot be read ({error}).", hint="Delete it and run again."
        ) from error
