"""Reinforced pairs: what `moviola reinforce` stores with each pair, and what a training batch reads of it.

A set is a folder of Parquet shards and `manifest.json`. A row holds

    id             string
    image          the picture's file, as bytes
    captions       its real captions
    synthetic      captions from a captioner; empty where there are none
    augmentations  list of A structs: the strong augmentations, every parameter written out
    teacher_image  list of A vectors (float16, D): the teachers' embedding of each augmented picture
    teacher_text, teacher_synthetic   a vector for each caption and synthetic caption

D is the sum of the teachers' widths: each teacher's part is of length one. The manifest says the widths.

The augmentations themselves are in `moviola.data.augmentations`.

Axis letters: B batch, D embedding width, N vectors, H height, W width, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.augmentations import Augment, Augmentation, apply, draw
from moviola.data.hashing import hash_uniform, mix
from moviola.media import read_picture
from moviola.types import MediaError, Recipe, UsageError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from moviola.clip.preprocess import Preprocess

__all__ = [
    "MANIFEST",
    "REINFORCED_COLUMNS",
    "Augment",
    "Augmentation",
    "Manifest",
    "Teacher",
    "apply",
    "draw",
    "open_reinforced",
    "pixel_door",
    "read_manifest",
    "reinforced_batch",
]

VERSION = 1
MANIFEST = "manifest.json"
METADATA = b"moviola.reinforced"
"""The key in a shard's schema under which its widths and its teachers' hashes stand."""

REINFORCED_COLUMNS = (
    "image",
    "captions",
    "synthetic",
    "augmentations",
    "teacher_image",
    "teacher_text",
    "teacher_synthetic",
)
"""The columns that `reinforced_batch` reads."""

AUGMENTATION_TYPE = pa.struct(
    [
        *((name, pa.float32()) for name in ("left", "top", "right", "bottom")),
        ("mirror", pa.bool_()),
        ("operations", pa.list_(pa.string())),
        ("values", pa.list_(pa.float32())),
    ]
)

# --------------------------------------------------------------------------------------------------
# The set on the disk
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teacher:
    """Who made a part of the vectors: `dim` numbers of each, of length one."""

    name: str
    hash: str
    dim: int
    size: tuple[int, int]
    recipe: str
    dtype: str
    logit_scale: float


@dataclass(frozen=True)
class Manifest:
    """What a set holds and how it was made; `manifest.json`.

    `shards` are (file name, rows). `counts`: pairs, captions, synthetic captions, rows that have none,
    captions cut to a teacher's context, and rows left out by reason. `settings` is what a run that goes
    on must share with the one that began.
    """

    teachers: tuple[Teacher, ...]
    augmentations: int
    augment: Augment
    seed: int
    rows: int
    shards: tuple[tuple[str, int], ...]
    counts: Mapping[str, Any]
    synthetic: str
    settings: Mapping[str, Any]
    made_with: Mapping[str, str]
    version: int = VERSION

    @property
    def dims(self) -> tuple[int, ...]:
        """The teachers' widths, in the order in which their parts stand in a vector."""
        return tuple(teacher.dim for teacher in self.teachers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        made = dict(data)
        made["teachers"] = tuple(Teacher(**{**t, "size": tuple(t["size"])}) for t in data["teachers"])
        made["augment"] = Augment.from_json(data["augment"])
        made["shards"] = tuple((name, rows) for name, rows in data["shards"])
        return cls(**made)


def shard_schema(teachers: Sequence[Teacher], augmentations: int) -> pa.Schema:
    """The columns of a shard; its metadata says the widths and the teachers' hashes."""
    vectors = pa.list_(pa.list_(pa.float16(), sum(t.dim for t in teachers)))
    about = {
        "version": VERSION,
        "teachers": [[t.hash, t.dim] for t in teachers],
        "augmentations": augmentations,
    }
    return pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.binary()),
            ("captions", pa.list_(pa.string())),
            ("synthetic", pa.list_(pa.string())),
            ("augmentations", pa.list_(AUGMENTATION_TYPE)),
            *((name, vectors) for name in ("teacher_image", "teacher_text", "teacher_synthetic")),
        ],
        metadata={METADATA: json.dumps(about).encode()},
    )


def vector_lists(sizes: Sequence[int], vectors_ND: np.ndarray) -> pa.ListArray:
    """Rows of `sizes` vectors each, stored as float16."""
    flat = pa.array(np.ascontiguousarray(vectors_ND, np.float16).reshape(-1))
    ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(ends), pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
    )


def read_manifest(folder: str | Path) -> Manifest:
    """`UsageError` where the folder holds no reinforced set, or one of a later version."""
    place = Path(folder) / MANIFEST
    try:
        data = json.loads(place.read_bytes())
    except FileNotFoundError:
        partial = Path(folder).with_name(Path(folder).name + ".partial")
        raise UsageError(
            f"{printable(folder)} is no reinforced set: it has no {MANIFEST}.",
            hint="The run that makes it has not ended: run its command again."
            if partial.exists()
            else "Make one with: moviola reinforce PAIRS --to FOLDER --teacher MODEL",
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{printable(place)} cannot be read ({error}).", hint="Copy it again.") from error
    if not isinstance(data, dict) or not {f.name for f in fields(Manifest)} <= data.keys():
        raise UsageError(f"{printable(place)} is not the manifest of a reinforced set.")
    if data["version"] != VERSION:
        raise UsageError(
            f"{printable(folder)} is a reinforced set of version {data['version']}, expected {VERSION}.",
            hint="Upgrade with: pip install -U moviola",
        )
    return Manifest.from_json(data)


def open_reinforced(folder: str | Path) -> tuple[Manifest, list[Path]]:
    """The manifest and the shards, each checked against it: rows, teachers, widths, augmentations.

    Only the shards' footers are read. `UsageError` names the first shard that does not belong.
    """
    manifest = read_manifest(folder)
    want = shard_schema(manifest.teachers, manifest.augmentations)
    shards = []
    for name, rows in manifest.shards:
        place = Path(folder) / name
        try:
            footer = pq.read_metadata(place)
            schema = footer.schema.to_arrow_schema()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(
                f"The shard {printable(place)} cannot be read ({error}).",
                hint="Copy it again, or make the set again.",
            ) from error
        check_schema(schema, printable(place), want)
        if footer.num_rows != rows:
            raise UsageError(
                f"{printable(place)} has {footer.num_rows} rows, the manifest says {rows}.",
                hint="Copy the folder again, or make the set again.",
            )
        shards.append(place)
    return manifest, shards


def check_schema(schema: pa.Schema, where: str, want: pa.Schema | None = None) -> None:
    """`UsageError` where columns lack, or teachers, widths or augmentations are other than in `want`."""
    missing = [name for name in REINFORCED_COLUMNS if name not in schema.names]
    if missing:
        raise UsageError(
            f"{where} has no column {', '.join(map(repr, missing))}: these pairs are not reinforced.",
            hint="Make them with: moviola reinforce PAIRS --to FOLDER --teacher MODEL",
        )
    told = (schema.metadata or {}).get(METADATA)
    about = json.loads(told) if told else None
    if want is not None and about is not None:
        wanted = json.loads(want.metadata[METADATA])
        for key, what in (("teachers", "teachers (hash, width)"), ("augmentations", "augmentations a row")):
            if about[key] != wanted[key]:
                raise UsageError(
                    f"{where} has {what} {about[key]}, the set's manifest says {wanted[key]}.",
                    hint="Keep the shards of different runs in different folders.",
                )
    width = sum(dim for _, dim in about["teachers"]) if about else None
    if want is not None:
        width = _width(want.field("teacher_image").type)
    for name in ("teacher_image", "teacher_text", "teacher_synthetic"):
        given = _width(schema.field(name).type)
        width = given if width is None else width
        if given is None or given != width:
            what = f"type {schema.field(name).type}" if given is None else f"vectors of width {given}"
            raise UsageError(
                f"{where}: {name} has {what}, expected lists of vectors of width {width or 'D'}.",
                hint="Its teachers are not those of the manifest: make the set again.",
            )


def _width(kind: pa.DataType) -> int | None:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return None
    return kind.value_type.list_size if pa.types.is_fixed_size_list(kind.value_type) else None


# --------------------------------------------------------------------------------------------------
# A training batch
# --------------------------------------------------------------------------------------------------

_AUGMENTATION, _CAPTION, _SYNTHETIC = range(3)


@lru_cache(maxsize=8)
def pixel_door(recipe: Recipe) -> Preprocess:
    """The recipe's conversion and normalisation alone: augmented pictures have its size already."""
    from moviola.clip.preprocess import Preprocess

    return Preprocess(replace(recipe, resize="squash", crop="none", resize_size=None))


def reinforced_batch(
    table: pa.Table,
    rows: np.ndarray,
    *,
    seed: int,
    epoch: int,
    recipe: Recipe,
    tokenize: Callable[[Sequence[str]], np.ndarray],
) -> dict[str, Tensor]:
    """What one step needs of some rows; no teacher is asked.

    `table` holds the rows of the batch, `rows` (B,) their numbers in the whole set. One augmentation, one
    caption and one synthetic caption of each are drawn by hash of (seed, epoch, row). A row without
    synthetic captions takes another of its captions, or the same one where it has no other.

    image (B, C, H, W) float32, normalised by the recipe; text and synthetic (B, L) int64; teacher_image,
    teacher_text and teacher_synthetic (B, D) float32. `UsageError` where a row has not as many vectors as
    augmentations or captions, or other numbers than its shard says; `MediaError` for a damaged picture.
    """
    import torch

    rows = np.asarray(rows, np.int64)
    if len(rows) != table.num_rows:
        raise UsageError(f"A batch of {table.num_rows} rows came with {len(rows)} row numbers.")
    check_schema(table.schema, "The batch")
    columns = {name: _List(table, name) for name in REINFORCED_COLUMNS if name != "image"}
    _check_counts(table.schema, columns, rows)

    number_B = columns["augmentations"].size_B
    which_B = _choose(seed, epoch, rows, _AUGMENTATION, number_B)
    caption_B = _choose(seed, epoch, rows, _CAPTION, columns["captions"].size_B)
    made_B = columns["synthetic"].size_B
    synthetic_B = _choose(seed, epoch, rows, _SYNTHETIC, np.maximum(made_B, 1))
    # without synthetic captions: a step of 1 to captions - 1 from the real one, or none
    others_B = columns["captions"].size_B - 1
    steps_B = 1 + _choose(seed, epoch, rows, _SYNTHETIC, np.maximum(others_B, 1))
    other_B = np.where(others_B > 0, (caption_B + steps_B) % (others_B + 1), caption_B)

    texts = columns["captions"].strings(caption_B)
    others = columns["captions"].strings(other_B)
    has_B = made_B > 0
    given = iter(columns["synthetic"].strings(synthetic_B[has_B], has_B))
    synthetic = [next(given) if has else other for has, other in zip(has_B.tolist(), others, strict=True)]
    teacher_synthetic_BD = columns["teacher_text"].vectors(other_B)
    if has_B.any():
        teacher_synthetic_BD[has_B] = columns["teacher_synthetic"].vectors(synthetic_B[has_B], has_B)

    augmentations = columns["augmentations"].take(which_B).to_pylist()
    pixels_BHWC = np.empty((len(rows), *recipe.size, 3), np.uint8)
    for place, (cell, stored) in enumerate(zip(table["image"], augmentations, strict=True)):
        try:
            picture = read_picture(cell.as_py() or b"")
        except MediaError as error:
            raise MediaError(f"row {rows[place]}", error.reason, hint=error.hint) from error
        pixels_BHWC[place] = np.asarray(apply(Augmentation.from_json(stored), picture, recipe.size))
    tokens = tokenize([*texts, *synthetic])
    return {
        "image": pixel_door(recipe).frames(pixels_BHWC),
        "text": torch.from_numpy(tokens[: len(rows)]),
        "synthetic": torch.from_numpy(tokens[len(rows) :]),
        "teacher_image": torch.from_numpy(columns["teacher_image"].vectors(which_B)),
        "teacher_text": torch.from_numpy(columns["teacher_text"].vectors(caption_B)),
        "teacher_synthetic": torch.from_numpy(teacher_synthetic_BD),
    }


def _choose(seed: int, epoch: int, rows: np.ndarray, what: int, count_B: np.ndarray) -> np.ndarray:
    """One of `count` for each row."""
    u_B = hash_uniform(seed, mix(rows.astype(np.uint64) ^ mix(np.array([epoch], np.uint64))), 0x5E1 + what)
    return np.minimum((u_B * count_B).astype(np.int64), count_B - 1)


class _List:
    """A column of lists: how long each row's is, and one item of each row."""

    def __init__(self, table: pa.Table, name: str) -> None:
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # what older releases give
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        offsets = column.offsets.to_numpy().astype(np.int64)
        null_B = column.is_null().to_numpy(zero_copy_only=False)
        self.start_B = offsets[:-1]
        self.size_B = np.where(null_B, 0, np.diff(offsets))
        self._values = column.values

    def take(self, index_B: np.ndarray, some_B: np.ndarray | None = None) -> pa.Array:
        start_B = self.start_B if some_B is None else self.start_B[some_B]
        return self._values.take(pa.array(start_B + index_B))

    def strings(self, index_B: np.ndarray, some_B: np.ndarray | None = None) -> list[str]:
        return self.take(index_B, some_B).to_pylist()

    def vectors(self, index_B: np.ndarray, some_B: np.ndarray | None = None) -> np.ndarray:
        """float32 (B, D)."""
        start_B = self.start_B if some_B is None else self.start_B[some_B]
        flat = self._values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, self._values.type.list_size)[start_B + index_B].astype(np.float32)


def _check_counts(schema: pa.Schema, columns: Mapping[str, _List], rows: np.ndarray) -> None:
    """Every augmentation and every text of every row must have its vector."""
    told = (schema.metadata or {}).get(METADATA)
    expected = json.loads(told)["augmentations"] if told else None
    size_B = columns["augmentations"].size_B
    wrong = (size_B < 1) if expected is None else (size_B != expected)
    if wrong.any():
        place = int(wrong.argmax())
        raise UsageError(
            f"Row {rows[place]} has {size_B[place]} augmentations, expected {expected or 'at least one'}.",
            hint="It was made by another run: make the set again.",
        )
    if (columns["captions"].size_B < 1).any():
        raise UsageError(f"Row {rows[int((columns['captions'].size_B < 1).argmax())]} has no captions.")
    for items, vectors in (
        ("augmentations", "teacher_image"),
        ("captions", "teacher_text"),
        ("synthetic", "teacher_synthetic"),
    ):
        wrong = columns[items].size_B != columns[vectors].size_B
        if wrong.any():
            place = int(wrong.argmax())
            raise UsageError(
                f"Row {rows[place]} has {columns[items].size_B[place]} {items} but "
                f"{columns[vectors].size_B[place]} vectors in {vectors}, expected one for each.",
                hint="The set is damaged or was edited: make it again.",
            )
