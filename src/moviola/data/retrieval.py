"""Pictures or videos with their captions, for retrieval: the public benchmarks' layouts and plain tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moviola.data.media_set import Finder, MediaSet, Stream, file_stream, row_numbers, table_stream
from moviola.data.tables import (
    MEDIA_COLUMNS,
    TEXT_COLUMNS,
    Table,
    media_cell,
    read_json,
    row_id,
    span_columns,
    text_cell,
)
from moviola.media import media_kind
from moviola.types import Clip, MediaKind, TimeSpan, UsageError, printable

Layout = Literal["auto", "karpathy", "msrvtt", "table"]
LAYOUTS: tuple[Layout, ...] = ("auto", "karpathy", "msrvtt", "table")

_ITEM_IDS = ["image_id", "video_id", "media_id", "item_id", "key", "id", "uid"]
# an id may name the file where nothing else does, as in MSR-VTT
_ITEM_MEDIA = [*MEDIA_COLUMNS, "video_id", "image_id"]
_JSFUSION = {"vid_key", "video_id", "sentence"}
_FOLDER_FILES = [
    "dataset_coco.json",
    "dataset_flickr30k.json",
    "dataset_flickr8k.json",
    "dataset.json",
    "MSRVTT_JSFUSION_test.csv",
    "MSRVTT_data.json",
]


class RetrievalSet(MediaSet):
    """Items and the texts that describe them, several to an item or one.

    texts     all texts; `owner_N[n]` is the index of the item that text n describes
    missing   (path or id, reason) of items that are left out with their texts
    """

    def __init__(
        self,
        source: Path,
        ids: Sequence[str],
        stream: Stream,
        files: Sequence[Path],
        *,
        texts: Sequence[str],
        owner: Sequence[int],
        layout: str,
        split: str | None,
        kind: MediaKind,
        missing: Sequence[tuple[str, str]],
    ) -> None:
        super().__init__(source, ids, stream, files)
        self.texts = tuple(texts)
        self.owner_N = row_numbers(owner)
        self.layout, self.split, self.kind = layout, split, kind
        self.missing = tuple(missing)


def read_retrieval(
    source: str | Path,
    *,
    layout: Layout = "auto",
    split: str = "test",
    media_root: str | Path | None = None,
    media_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    captions_per_item: int | None = None,
) -> RetrievalSet:
    """A retrieval benchmark from its annotation file, or from the folder that holds it.

    karpathy  `dataset_coco.json`, `dataset_flickr30k.json`: `split` is train, restval, val or test;
              `a+b` takes both
    msrvtt    `MSRVTT_data.json` (train, validate, test), or `MSRVTT_JSFUSION_test.csv`, the 1k-A
              test set; a folder with both means 1k-A
    table     CSV, TSV, JSON Lines or Parquet. Rows with one file, or for bytes one id, are captions
              of one item. A `split` column is used where there is one
    auto      found by the content

    Media lie under `media_root`, by default the annotation file's folder: by the path that the file
    gives, else by name anywhere below. Files that are not there go to `missing` and the rest goes on.
    `captions_per_item` keeps the first so many captions of each (5 is the custom for COCO).
    """
    if layout not in LAYOUTS:
        raise UsageError(f"There is no layout {layout!r}.", hint=f"Use one of: {', '.join(LAYOUTS)}.")
    if captions_per_item is not None and captions_per_item < 1:
        raise UsageError(f"captions_per_item must be at least 1, got {captions_per_item}.")
    path = _annotations(Path(source))
    if media_root is not None and not Path(media_root).is_dir():
        raise UsageError(f"The media folder {printable(media_root)} does not exist.")
    root = Path(media_root) if media_root is not None else path.parent
    data: Any = None
    if path.suffix.lower() == ".json":
        data = read_json(path)
        found: str = _json_layout(data)
    else:
        found = "msrvtt" if set(Table(path).columns) >= _JSFUSION else "table"
    if layout == "table" or (layout == "auto" and found == "table"):
        return _from_table(path, split, root, media_column, text_column, id_column, captions_per_item)
    if layout not in ("auto", found):
        raise UsageError(
            f"{printable(path)} does not have the layout {layout!r}; it looks like {found!r}.",
            hint="Leave the layout out, or name another file.",
        )
    chosen = split
    try:
        if found == "karpathy":
            rows = _karpathy(data, split, path)
        elif data is not None:
            rows = _msrvtt(data, split, path)
        else:
            rows, chosen = _jsfusion(Table(path), split), "1k-A"
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{printable(path)} is not as the layout {found!r} has it ({type(error).__name__}: {error}).",
            hint="Download the annotation file again.",
        ) from error
    return _from_rows(path, rows, root, found, chosen, captions_per_item)


def _annotations(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in _FOLDER_FILES:
        if (source / name).is_file():
            return source / name
    raise UsageError(
        f"{printable(source)} holds none of the annotation files this version knows.",
        hint=f"Name the file itself. Known in a folder: {', '.join(_FOLDER_FILES)}.",
    )


def _json_layout(data: Any) -> str:
    if isinstance(data, dict):
        if isinstance(data.get("images"), list) and any("sentences" in i for i in data["images"][:1]):
            return "karpathy"
        if isinstance(data.get("sentences"), list) and isinstance(data.get("videos"), list):
            return "msrvtt"
        raise UsageError(
            f"This JSON has the keys {', '.join(map(repr, list(data)[:8])) or 'none'}, "
            "which no layout known here has.",
            hint="Karpathy's files have images with sentences, MSR-VTT's have videos and sentences.",
        )
    return "table"


# One item: its id, the paths it may have (likeliest first), its captions.
_Row = tuple[str, tuple[str, ...], tuple[str, ...]]


def _karpathy(data: Mapping[str, Any], split: str, path: Path) -> list[_Row]:
    wanted = _wanted(split, Counter(str(image.get("split")) for image in data["images"]), path)
    rows: list[_Row] = []
    for image in data["images"]:
        if str(image.get("split")) not in wanted:
            continue
        name = str(image["filename"])
        folder = image.get("filepath")
        paths: tuple[str, ...] = (f"{folder}/{name}", name) if folder else (name,)
        captions = text_cell([sentence.get("raw") for sentence in image["sentences"]])
        rows.append((str(image.get("cocoid", image.get("imgid", name))), paths, captions))
    return rows


def _msrvtt(data: Mapping[str, Any], split: str, path: Path) -> list[_Row]:
    wanted = _wanted(split, Counter(str(video.get("split")) for video in data["videos"]), path)
    captions: dict[str, list[str]] = {}
    for sentence in data["sentences"]:
        captions.setdefault(str(sentence["video_id"]), []).append(sentence["caption"])
    names = [str(video["video_id"]) for video in data["videos"] if str(video.get("split")) in wanted]
    return [(name, (f"{name}.mp4", name), text_cell(captions.get(name, []))) for name in names]


def _jsfusion(table: Table, split: str) -> list[_Row]:
    if split.lower() not in ("test", "1k-a"):
        raise UsageError(
            f"{printable(table.path)} is the 1k-A test set; it has no split {split!r}.",
            hint="Name MSRVTT_data.json for train and validate.",
        )
    captions: dict[str, list[str]] = {}
    for _, row in table.rows():
        captions.setdefault(str(row["video_id"]), []).append(row["sentence"])
    return [(name, (f"{name}.mp4", name), text_cell(texts)) for name, texts in captions.items()]


def _wanted(split: str, there: Counter[str], path: Path) -> set[str]:
    wanted = set(split.split("+"))
    if not wanted <= set(there):
        counts = ", ".join(f"{name} ({count})" for name, count in sorted(there.items()))
        raise UsageError(f"{printable(path)} has no split {split!r}. Its splits: {counts}.")
    return wanted


def _from_rows(
    path: Path, rows: Iterable[_Row], root: Path, layout: str, split: str | None, most: int | None
) -> RetrievalSet:
    finder = Finder(root)
    clips: list[Clip] = []
    ids: list[str] = []
    texts: list[str] = []
    owner: list[int] = []
    missing: list[tuple[str, str]] = []
    for name, paths, captions in rows:
        found = finder.find(*paths) if captions else "it has no caption"
        if isinstance(found, str):
            missing.append((paths[0], found))
            continue
        owner += [len(clips)] * len(captions[:most])
        texts += captions[:most]
        clips.append(Clip(found))
        ids.append(name)
    if not clips:
        raise UsageError(
            f"None of the {len(missing)} pictures or videos of {printable(path)} was found under "
            f"{printable(root)}. The first: {printable(missing[0][0])}."
            if missing
            else f"{printable(path)} names no picture and no video.",
            hint="Name the folder that holds them with media_root= (--media-root).",
        )
    return RetrievalSet(
        path,
        ids,
        file_stream(clips, ids),
        [clip.path for clip in clips],
        texts=texts,
        owner=owner,
        layout=layout,
        split=split,
        kind=media_kind(clips[0].path) or "picture",
        missing=missing,
    )


def _from_table(
    path: Path,
    split: str,
    root: Path,
    media_column: str | None,
    text_column: str | None,
    id_column: str | None,
    most: int | None,
) -> RetrievalSet:
    table = Table(path)
    media_name = table.column(media_column, _ITEM_MEDIA, "pictures or videos", "media_column")
    text_name = table.column(text_column, TEXT_COLUMNS, "texts", "text_column")
    if id_column is not None:
        table.column(id_column, (), "ids", "id_column")
    id_name = table.find(id_column, _ITEM_IDS)
    by_split = "split" in table.columns
    missing: list[tuple[str, str]] = []
    finder = Finder(root)
    first_row: dict[object, int] = {}  # item -> index in the lists below
    numbers: list[int] = []
    ids: list[str] = []
    texts: list[list[str]] = []
    clips: list[Clip | None] = []
    splits: Counter[str] = Counter()
    lost: dict[object, str] = {}
    wanted = [media_name, text_name, *span_columns(table)]
    wanted += [name for name in (id_name, "split" if by_split else None) if name is not None]
    for number, row in table.rows(wanted, on_skip=lambda where, why: missing.append((where, why))):
        if by_split:
            splits[str(row.get("split"))] += 1
            if str(row.get("split")) not in split.split("+"):
                continue
        media = media_cell(row.get(media_name), root, row if span_columns(table) else None)
        captions = text_cell(row.get(text_name))
        if isinstance(media, str) or not captions:
            why = media if isinstance(media, str) else "it has no text"
            missing.append((table.where(number), why))
            continue
        name = row_id(table, number, row, id_name)
        key: object = name
        if isinstance(media, Clip):
            key = (media.path, media.span)
            if key in lost:
                continue
            found = media.path if key in first_row else finder.find(_relative(media.path, root))
            if isinstance(found, str):
                lost[key] = found
                missing.append((str(media.path), found))
                continue
            media = Clip(found, media.span)
        if key not in first_row:
            first_row[key] = len(texts)
            numbers.append(number)
            ids.append(name if isinstance(media, bytes) else _clip_name(media))
            clips.append(media if isinstance(media, Clip) else None)
            texts.append([])
        texts[first_row[key]] += captions
    if not texts:
        there = ", ".join(f"{name} ({count})" for name, count in sorted(splits.items()))
        why = f" Its splits: {there}." if by_split else f" The first: {missing[0][1]}." if missing else ""
        raise UsageError(f"The table {printable(path)} has no usable row for the split {split!r}.{why}")
    files = [clip for clip in clips if clip is not None]
    if len(files) == len(clips):
        stream = file_stream(files, ids)
    elif files:
        raise UsageError(
            f"The column {media_name!r} of {printable(path)} mixes paths and bytes, expected one kind."
        )
    else:
        stream = table_stream(table, media_name, numbers, ids, root)
    return RetrievalSet(
        path,
        ids,
        stream,
        [clip.path for clip in files] or [path],
        texts=[text for group in texts for text in group[:most]],
        owner=[index for index, group in enumerate(texts) for _ in group[:most]],
        layout="table",
        split=split if by_split else None,
        kind=(media_kind(files[0].path) or "picture") if files else "picture",
        missing=missing,
    )


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _clip_name(clip: Clip) -> str:
    span: TimeSpan | None = clip.span
    return str(clip.path) if span is None else f"{clip.path}@{span.start:g}-{span.end:g}"
