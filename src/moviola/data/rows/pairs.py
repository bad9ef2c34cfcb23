"""`PairData`: rows of a `RowSource` as the batches an objective needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from moviola.clip.preprocess import Preprocess
from moviola.data.hashing import hash_uint64, hash_uniform
from moviola.data.rows.fields import (
    Maker,
    PictureMaker,
    RegionMaker,
    Row,
    TextMaker,
    Tokenize,
    Unusable,
    VectorMaker,
    VideoMaker,
)
from moviola.data.rows.scripts import ScriptMaker, draws_of
from moviola.data.rows.source import RowSource
from moviola.data.rows.views import DRAWS, View
from moviola.types import (
    FrameSpec,
    LabelField,
    MediaError,
    Needs,
    PictureField,
    Recipe,
    RegionField,
    ReinforcedField,
    ScriptField,
    TextField,
    UsageError,
    VectorField,
    VideoField,
    ViewField,
)

TRIES = 20
"""How many other rows are tried for one that cannot be used; the first half of them lie near it."""
_EPOCH, _OTHER = 0xE70C, 0x07E2


class PairData:
    """What the training loop reads: `TrainingData` over the rows of files.

    Every draw is a hash of (seed, epoch, row): a row looks the same whatever batch or process it comes in.
    `batch["row"]` are the rows asked for. One that cannot be used (a picture that is missing or damaged,
    no caption) is replaced by another row, the same in every run; `batch["id"]` names the row that is
    really shown, and `batch["skipped"]` lists (row, reason) of those that are not.

    crop_area  least and largest share of a picture that a random crop keeps; (1, 1): no crop, exactly
               what the recipe prepares for encoding
    flip       chance of mirroring a picture
    patch      the tower's patch: sizes of pictures must be multiples of it
    """

    def __init__(
        self,
        source: RowSource,
        needs: Needs,
        *,
        recipe: Recipe,
        tokenizer: Any,
        frame_spec: FrameSpec | None = None,
        crop_area: tuple[float, float] = (0.5, 1.0),
        flip: float = 0.0,
        patch: int = 1,
    ) -> None:
        self.source, self.needs, self.recipe = source, needs, recipe
        self._tokenize = Tokenize(tokenizer)
        by_class = [f for f in needs.fields if isinstance(f, LabelField | ViewField)]
        if by_class:
            raise UsageError(
                f"The objective needs pictures by class ({', '.join(f.name for f in by_class)}); pairs of "
                "pictures and texts have none.",
                hint="Use it through: moviola adapt --method SLUG --data FOLDER-PER-CLASS",
            )
        self._reinforced = any(isinstance(asked, ReinforcedField) for asked in needs.fields)
        if self._reinforced:
            _check_reinforced(source)
        self._draws = 0
        self._makers: list[Maker] = []
        self._texts(needs, source)
        self._makers += [VectorMaker(f, source) for f in needs.fields if isinstance(f, VectorField)]
        pictures = [f for f in needs.fields if isinstance(f, PictureField)]
        if pictures:
            self._pictures(pictures, source, crop_area, flip, patch)
        for asked in needs.fields:
            if isinstance(asked, RegionField):
                if not pictures:
                    raise UsageError("Boxes need the picture that they lie in: add a PictureField.")
                self._makers.append(RegionMaker(asked, source, self._tokenize))
            elif isinstance(asked, VideoField | ScriptField):
                self._video(asked, source, frame_spec)
        read = [name for maker in self._makers for name in maker.columns]
        self.columns = tuple(dict.fromkeys([*read, *source.ids]))

    def _texts(self, needs: Needs, source: RowSource) -> None:
        draw_of: dict[tuple[str, ...], int] = {}
        for asked in needs.fields:
            if isinstance(asked, TextField):
                draw = draw_of.setdefault(asked.columns, len(draw_of))
                self._makers.append(TextMaker(asked, source, self._tokenize, draw))
        self._draws = len(draw_of)

    def _pictures(
        self,
        fields: Sequence[PictureField],
        source: RowSource,
        crop_area: tuple[float, float],
        flip: float,
        patch: int,
    ) -> None:
        if "image" not in source.columns:
            raise UsageError(
                f"The data has no column of pictures. Columns: {', '.join(map(repr, source.columns))}.",
                hint="Say which it is: --column image=NAME (columns={'image': 'NAME'}).",
            )
        views = []
        for asked in fields:
            size = asked.size or self.recipe.size
            if asked.count < 1 or size[0] % patch or size[1] % patch:
                raise UsageError(
                    f"The field {asked.name!r} asks for {asked.count} pictures of {size}, expected at least "
                    f"one, of a size that the patch of {patch} pixels divides."
                )
            area = crop_area if asked.area is None else asked.area
            views.append(View(self.recipe, size=asked.size, area=area, flip=flip))
        many = sum(asked.count for asked in fields) * DRAWS
        draws_VD = np.arange(self._draws, self._draws + many).reshape(-1, DRAWS)
        self._draws += many
        self._makers.append(PictureMaker(fields, views, draws_VD))

    def _video(
        self, asked: VideoField | ScriptField, source: RowSource, frame_spec: FrameSpec | None
    ) -> None:
        if not {"video", "image"} & set(source.columns):
            raise UsageError(
                f"The data has no column of videos. Columns: {', '.join(map(repr, source.columns))}.",
                hint="Say which it is: --column video=NAME (columns={'video': 'NAME'}).",
            )
        spec = self.recipe.sampler if frame_spec is None else frame_spec
        if isinstance(asked, VideoField):
            recipe = self.recipe
            if asked.whole and recipe.resize_size is not None:
                recipe = replace(recipe, size=recipe.resize_size)
            self._makers.append(VideoMaker(asked, source, spec, Preprocess(recipe)))
            return
        draws = np.arange(self._draws, self._draws + draws_of(spec))
        self._draws += len(draws)
        self._makers.append(ScriptMaker(asked, source, spec, Preprocess(self.recipe), self._tokenize, draws))

    # ------------------------------------------------------------------------------- TrainingData

    def __len__(self) -> int:
        return len(self.source)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when the data does."""
        return self.source.fingerprint

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All rows as this epoch has them; see `RowSource.order`."""
        return self.source.order(seed, epoch)

    def batch(self, rows: np.ndarray, *, seed: int, epoch: int, step: int) -> dict[str, Any]:
        """The fields of some rows; `step` plays no part, since draws depend on the row alone.

        `UsageError` where no usable row is found in place of another.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        key = int(hash_uint64(seed, np.array([epoch], np.uint64), stream=_EPOCH)[0])
        found: list[tuple[Row, dict[str, Tensor]] | None] = [None] * len(rows)
        reasons: list[list[tuple[int, str]]] = [[] for _ in rows]
        now, waiting = rows.copy(), np.arange(len(rows))
        for attempt in range(TRIES + 1):
            for place, result in zip(waiting.tolist(), self._read(now[waiting], key, seed, epoch)):
                if isinstance(result, str):
                    reasons[place].append((int(now[place]), result))
                else:
                    found[place] = result
            waiting = np.array([i for i, one in enumerate(found) if one is None], np.int64)
            if not len(waiting):
                break
            for place in waiting.tolist():
                now[place] = self._other(int(rows[place]), key, attempt)
        if len(waiting):
            raise self._no_rows(rows[waiting], [reasons[i] for i in waiting.tolist()])
        whole = [one for one in found if one is not None]
        made = self._stacked(whole)
        made["row"] = torch.from_numpy(rows.copy())
        made["id"] = [row.where for row, _ in whole]
        made["skipped"] = list(dict.fromkeys(told for one in reasons for told in one))
        return made

    def unusable(self, rows: np.ndarray) -> list[tuple[int, str]]:
        """Those of some rows that cannot be used, with the reason."""
        read = self._read(np.asarray(rows, np.int64), 0, 0, 0)
        return [(row, why) for row, why in zip(rows.tolist(), read) if isinstance(why, str)]

    def _stacked(self, whole: Sequence[tuple[Row, dict[str, Tensor]]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if not whole:
            return made
        for name in whole[0][1]:
            made[name] = torch.stack([tensors[name] for _, tensors in whole])
        for maker in self._makers:
            made.update(maker.stack([row for row, _ in whole]))
        return made

    def _other(self, row: int, key: int, attempt: int) -> int:
        """The row to try next in place of one: near it first, where reading costs nothing, then anywhere."""
        start, stop = self.source.near(row) if attempt < TRIES // 2 else (0, len(self))
        value = int(hash_uint64(key, np.array([row], np.uint64), stream=_OTHER + attempt)[0])
        return start + value % max(1, stop - start)

    def _no_rows(self, rows: np.ndarray, reasons: Sequence[Sequence[tuple[int, str]]]) -> UsageError:
        told = [f"{self.source.where(row)} ({why})" for row, why in reasons[0][:5]]
        named = ", ".join(str(row) for row in rows[:8].tolist()) + (", ..." if len(rows) > 8 else "")
        return UsageError(
            f"No usable row was found in place of row {named} in {TRIES} tries: {'; '.join(told)} ...",
            hint="Mend the data, or leave out the rows that cannot be used.",
        )

    # ------------------------------------------------------------------------------- rows

    def _read(
        self, rows: np.ndarray, key: int, seed: int, epoch: int
    ) -> list[tuple[Row, dict[str, Tensor]] | str]:
        """Each row with what its makers took, or the reason why it cannot be used."""
        if not len(rows):
            return []
        stored = self._reinforced_rows(rows, seed, epoch)
        table = self.source.read(rows, self.columns)
        cells = {name: _cells(table[name]) for name in self.columns}
        ids = np.arange(self._draws)
        draws_ND = np.stack([hash_uniform(key, rows, stream=int(i)) for i in ids] or [np.zeros(len(rows))], 1)
        results: list[tuple[Row, dict[str, Tensor]] | str] = []
        for place, number in enumerate(rows.tolist()):
            own = {name: cells[name][place] for name in self.columns}
            named = next((own[name] for name in self.source.ids if own[name] not in (None, "")), None)
            where = self.source.where(number) if named is None else str(named)
            row = Row(number, own, draws_ND[place], where)
            tensors = stored[place] if stored is not None else {}
            if isinstance(tensors, str):
                results.append(tensors)
                continue
            try:
                for maker in self._makers:
                    maker.row(row)
            except Unusable as error:
                results.append(str(error))
            else:
                row.cells = {}  # encoded pictures need not wait for the whole batch
                results.append((row, tensors))
        return results

    def _reinforced_rows(
        self, rows: np.ndarray, seed: int, epoch: int
    ) -> list[dict[str, Tensor] | str] | None:
        """What `moviola reinforce` stored, row by row; None where no field asks for it."""
        if not self._reinforced:
            return None
        from moviola.data.reinforced import REINFORCED_COLUMNS, reinforced_batch

        table = self.source.read(rows, REINFORCED_COLUMNS)
        images = pc.struct_field(table["image"].combine_chunks(), "bytes")
        table = table.set_column(table.schema.get_field_index("image"), "image", images)

        def made(first: int, last: int) -> dict[str, Tensor]:
            return reinforced_batch(
                table.slice(first, last - first).combine_chunks(),
                rows[first:last],
                seed=seed,
                epoch=epoch,
                recipe=self.recipe,
                tokenize=self._tokenize,
            )

        try:
            whole = made(0, len(rows))
            return [{name: whole[name][i] for name in whole} for i in range(len(rows))]
        except MediaError:
            pass  # one of them cannot be used: which one shows when they are read one by one
        results: list[dict[str, Tensor] | str] = []
        for place in range(len(rows)):
            try:
                results.append({name: value[0] for name, value in made(place, place + 1).items()})
            except MediaError as error:
                results.append(error.reason.rstrip("."))
        return results


def _check_reinforced(source: RowSource) -> None:
    """`UsageError` where the columns are missing, or files were made with different teachers."""
    from moviola.data.reinforced import METADATA, REINFORCED_COLUMNS

    missing = [name for name in REINFORCED_COLUMNS if name not in source.columns]
    if missing:
        raise UsageError(
            f"The data is not reinforced: it has no column {', '.join(map(repr, missing))}.",
            hint="Make it with: moviola reinforce PAIRS --to FOLDER --teacher MODEL",
        )
    if len({about.get(METADATA) for about in source.all_metadata()}) > 1:
        raise UsageError(
            "The files were reinforced by different runs: other teachers or other augmentations.",
            hint="Train on the files of one run.",
        )


def _cells(values: Any) -> list[Any]:
    """A column as Python values; what is not UTF-8 is mended, so that one bad text spoils no batch."""
    try:
        return values.to_pylist()
    except UnicodeDecodeError:
        raw = values.combine_chunks().cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "replace") for value in raw]
