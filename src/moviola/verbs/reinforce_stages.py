"""The work of `moviola reinforce` on one shard: look at pictures, ask the teachers, make the table.

Axis letters: R rows, A augmentations, N pictures or texts, D embedding width, H height, W width, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from moviola.clip.loaded import Model, unit
from moviola.data.augmentations import Augment, Augmentation, apply, draw
from moviola.data.reinforced import Teacher, pixel_door, shard_schema, vector_lists
from moviola.data.reinforced_source import SourceRow
from moviola.media import on_white, read_picture
from moviola.types import Dtype, Encoder, MediaError, Refusal, UsageError, printable
from moviola.verbs.common import counting_cuts
from moviola.verbs.load import as_model

GROUP_ROWS = 64
"""Rows of a row group in a shard: what a reader holds for one row at random."""
SHOWN = 20
"""Skipped rows that are told one by one."""
UNREADABLE = "picture cannot be read"
NOT_FINITE = "a teacher gave no finite vector"

OnRows = Callable[[int, str], None]
"""Called with how many rows were done and the last one's id."""


def load_teachers(given: Any, device: str, dtype: Dtype | None) -> list[Model]:
    """The models, each checked: it needs text, a tokenizer and one vector a picture."""
    names = [given] if isinstance(given, str | Path | Model) else list(given)
    if not names:
        raise UsageError("There is no teacher.", hint="Name one with --teacher, or take: --teacher builtin")
    models = [as_model(name, device=device, dtype=dtype) for name in names]
    for model in models:
        if not (model.has_text and model.separable) or model.adaptation == "classifier":
            lack = "has no text tower" if not model.has_text else "gives no vector of its own for a picture"
            raise Refusal(
                f"The model '{model.name}' {lack}, so it cannot teach.",
                hint="Name a CLIP as --teacher.",
            )
        if model.tokenizer is None:
            raise Refusal(
                f"The model '{model.name}' came without a tokenizer, so it cannot read captions.",
                hint="Load it with tokenizer= in Python and pass it as a teacher.",
            )
    hashes = [(model.hash, model.recipe.hash) for model in models]
    if len(set(hashes)) < len(hashes):
        raise UsageError(
            "Two teachers have the same weights: the second adds nothing.", hint="Leave one out."
        )
    return models


@dataclass
class _Seen:
    """A row whose picture was read: what is stored of it, and its augmented pixels by their size."""

    row: SourceRow
    image: bytes
    drawn: list[Augmentation]
    pixels: dict[tuple[int, int], np.ndarray]


class Teaching:
    """The teachers, the augmentations, and the threads that prepare pictures ahead."""

    def __init__(
        self,
        models: Sequence[Model],
        *,
        augment: Augment,
        augmentations: int,
        seed: int,
        batch_size: int,
        threads: int,
    ) -> None:
        self.models = models
        self.augment, self.augmentations, self.seed = augment, augmentations, seed
        self.batch_size, self.threads = batch_size, threads
        self.teachers = tuple(
            Teacher(m.name, m.hash, m.dim, m.recipe.size, m.recipe.hash, str(m.dtype)[6:], m.logit_scale)
            for m in models
        )
        self.schema = shard_schema(self.teachers, augmentations)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="augment")

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def shard(self, rows: Iterable[SourceRow], on_rows: OnRows) -> tuple[pa.Table, dict[str, Any]]:
        """The rows of a shard that can be used, and its receipt."""
        skipped: dict[str, int] = {}
        examples: list[str] = []
        read = 0

        def skip(row: SourceRow, why: str, detail: str) -> None:
            skipped[why] = skipped.get(why, 0) + 1
            if len(examples) < SHOWN:
                examples.append(f"{printable(row.id)}: {detail}")

        kept: list[_Seen] = []
        image_RAD: list[np.ndarray] = []
        for group in self._groups(rows):
            good: list[_Seen] = []
            for row, seen in group:
                if isinstance(seen, _Seen):
                    good.append(seen)
                else:
                    skip(row, *seen)
            if good:
                vectors_RAD = self._teach_pictures(good)
                for seen, vectors_AD in zip(good, vectors_RAD, strict=True):
                    seen.pixels = {}
                    if not np.isfinite(vectors_AD).all():
                        skip(seen.row, NOT_FINITE, "a teacher's vector of its picture is not finite")
                        continue
                    kept.append(seen)
                    image_RAD.append(vectors_AD)
            read += len(group)
            on_rows(len(group), group[-1][0].id)

        captions = [list(seen.row.captions) for seen in kept]
        synthetic = [list(seen.row.synthetic) for seen in kept]
        texts = list(dict.fromkeys(text for row in (*captions, *synthetic) for text in row))
        vectors_ND, cut = self._teach_texts(texts)
        place = {text: index for index, text in enumerate(texts)}
        finite_N = np.isfinite(vectors_ND).all(axis=1)
        fine = []
        for index, seen in enumerate(kept):
            if finite_N[[place[text] for text in (*captions[index], *synthetic[index])]].all():
                fine.append(index)
            else:
                skip(seen.row, NOT_FINITE, "a teacher's vector of its caption is not finite")
        dim = vectors_ND.shape[1]

        def said(lists: Sequence[Sequence[str]]) -> pa.ListArray:
            which = [place[text] for index in fine for text in lists[index]]
            return vector_lists([len(lists[i]) for i in fine], vectors_ND[np.array(which, np.int64)])

        pictures_ND = np.concatenate([image_RAD[i] for i in fine]) if fine else np.empty((0, dim))
        columns = [
            [kept[i].row.id for i in fine],
            [kept[i].image for i in fine],
            [captions[i] for i in fine],
            [synthetic[i] for i in fine],
            [[drawn.to_json() for drawn in kept[i].drawn] for i in fine],
            vector_lists([self.augmentations] * len(fine), pictures_ND),
            said(captions),
            said(synthetic),
        ]
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        receipt = {
            "read": read,
            "rows": len(fine),
            "captions": sum(len(captions[i]) for i in fine),
            "synthetic": sum(len(synthetic[i]) for i in fine),
            "without_synthetic": sum(not synthetic[i] for i in fine),
            "one_caption": sum(not synthetic[i] and len(captions[i]) == 1 for i in fine),
            "cut": cut,
            "skipped": skipped,
            "examples": examples,
        }
        return pa.Table.from_arrays(arrays, schema=self.schema), receipt

    # --------------------------------------------------------------------------------- the pictures

    def _groups(self, rows: Iterable[SourceRow]) -> Iterator[list[tuple[SourceRow, _Seen | tuple[str, str]]]]:
        """Rows with what was made of them, enough for one pass of a teacher; prepared ahead by threads."""
        size = max(1, self.batch_size // self.augmentations)
        waiting: deque[tuple[SourceRow, Future[_Seen | tuple[str, str]]]] = deque()
        group: list[tuple[SourceRow, _Seen | tuple[str, str]]] = []
        source = iter(rows)
        ended = False
        while True:
            while not ended and len(waiting) < max(2 * size, 2 * self.threads):
                row = next(source, None)
                ended = row is None
                if row is not None:
                    waiting.append((row, self.pool.submit(self._see, row)))
            if not waiting:
                break
            row, future = waiting.popleft()
            group.append((row, future.result()))
            if len(group) >= size:
                yield group
                group = []
        if group:
            yield group

    def _see(self, row: SourceRow) -> _Seen | tuple[str, str]:
        """Read a picture, draw its augmentations and make them at every teacher's size."""
        if row.problem is not None:
            return row.problem, row.detail
        try:
            image = row.picture if isinstance(row.picture, bytes) else row.picture.read_bytes()
            picture = on_white(read_picture(image))
        except MediaError as error:
            return UNREADABLE, error.reason
        except OSError as error:
            return UNREADABLE, f"{printable(row.picture)}: {error.strerror or error}"
        size = (picture.height, picture.width)
        drawn = draw(self.seed, row.id, size, self.augmentations, self.augment)
        pixels = {
            teacher.size: np.stack([np.asarray(apply(one, picture, teacher.size)) for one in drawn])
            for teacher in {teacher.size: teacher for teacher in self.teachers}.values()
        }
        return _Seen(row, image, drawn, pixels)

    def _teach_pictures(self, seen: Sequence[_Seen]) -> np.ndarray:
        """vectors_RAD float32: every teacher's part of length one, side by side."""
        parts = []
        for model in self.models:
            pixels_NHWC = np.concatenate([one.pixels[model.recipe.size] for one in seen])
            door, encoder = pixel_door(model.recipe), cast(Encoder, model.module)
            made = []
            with torch.inference_mode():
                for first in range(0, len(pixels_NHWC), self.batch_size):
                    chunk_NHWC = pixels_NHWC[first : first + self.batch_size]
                    pixels_NCHW = door.frames(chunk_NHWC, model.device).to(model.dtype)
                    made.append(encoder.encode_image(pixels_NCHW).float().cpu().numpy())
            parts.append(unit(np.concatenate(made)))
        return np.concatenate(parts, axis=1).reshape(len(seen), self.augmentations, -1)

    def _teach_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """vectors_ND float32, and how many texts were cut to a teacher's context."""
        parts, most = [], 0
        for model in self.models:
            with counting_cuts() as cut:
                parts.append(model.embed_texts(texts, truncate=True))
            most = max(most, len(cut))
        return np.concatenate(parts, axis=1), most


def write_shard(table: pa.Table, file: Any) -> None:
    """A shard: small row groups, pictures and vectors as they are (they do not compress), texts packed."""
    texts = [
        "id",
        "captions.list.element",
        "synthetic.list.element",
        "augmentations.list.element.operations.list.element",
        "augmentations.list.element.values.list.element",
    ]
    with pq.ParquetWriter(
        file,
        table.schema,
        version="2.6",
        use_dictionary=texts,
        compression=dict.fromkeys(texts, "zstd"),
        write_page_checksum=True,
    ) as writer:
        writer.write_table(table, row_group_size=GROUP_ROWS)


def about_synthetic(columns: Sequence[str], counts: Mapping[str, int]) -> str:
    """One sentence or two about what stands for synthetic captions."""
    without, one = counts["without_synthetic"], counts["one_caption"]
    if columns and not without:
        return f"Synthetic captions: {counts['synthetic']:,} from {', '.join(columns)}."
    told = (
        f"Synthetic captions: {counts['synthetic']:,} from {', '.join(columns)}; {without:,} pairs have none"
        if columns
        else "There are no synthetic captions (--synthetic)"
    )
    return (
        f"{told}: a training step takes another real caption of the pair in their place, and the same "
        f"caption for the {one:,} pairs that have only one."
    )
