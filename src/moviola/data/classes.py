"""Labelled pictures or clips: a folder per class, as ImageNet has it, or a table with a class column."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moviola.data.media_set import MediaSet, Stream, file_stream, row_numbers, table_stream
from moviola.data.tables import ID_COLUMNS, MEDIA_COLUMNS, Table, read_json, row_id
from moviola.media import media_kind, walk
from moviola.types import Clip, UsageError, printable

CLASS_COLUMNS = ["class_name", "classname", "label_name", "name", "class", "category", "label", "target"]
SPLITS = ("val", "validation", "valid", "test", "train")
"""Folders that hold a split, in the order in which one is chosen where none is asked for."""
NAME_FILES = [
    "classes.txt",
    "classnames.txt",
    "class_names.txt",
    "classes.json",
    "classnames.json",
    "class_names.json",
    "LOC_synset_mapping.txt",
    "imagenet_class_index.json",
    "words.txt",
]
_WNID = re.compile(r"n\d{8}")

Names = str | Path | Mapping[str, str] | Sequence[str]


class ClassSet(MediaSet):
    """Items with one class each.

    classes   names for prompts, in the order of the class numbers
    labels_N  each item's class number
    split     the split that was read, None where there are none
    skipped   (path or row, reason) of what could not be used
    """

    def __init__(
        self,
        source: Path,
        ids: Sequence[str],
        stream: Stream,
        files: Sequence[Path],
        *,
        classes: Sequence[str],
        labels: Sequence[int],
        split: str | None,
        skipped: Sequence[tuple[str, str]],
    ) -> None:
        super().__init__(source, ids, stream, files)
        self.classes = tuple(classes)
        self.labels_N = row_numbers(labels)
        self.split = split
        self.skipped = tuple(skipped)

    @property
    def repeated(self) -> tuple[str, ...]:
        """Names that stand for more than one class: no words can tell those apart."""
        return tuple(name for name, count in Counter(self.classes).items() if count > 1)


def read_classes(
    source: str | Path,
    *,
    split: str | None = None,
    names: Names | None = None,
    label_column: str | None = None,
    media_column: str | None = None,
    id_column: str | None = None,
    media_root: str | Path | None = None,
) -> ClassSet:
    """Labelled pictures or clips of a folder or a table.

    A folder holds one folder per class, or `train`, `val` ... that do; without `split` the first of
    val, validation, valid, test, train is read. The class is named by its folder (`_` read as a
    space) or by `names`: a mapping from folder to name, a list in the order of the sorted folders, or
    a file with either; such a file is also found beside the folders (`classes.txt`,
    `classnames.json`, `LOC_synset_mapping.txt`, `words.txt`, `imagenet_class_index.json`). Folders
    named by WordNet ids need one.

    A table has a column with the class name, or its number where `names` or the Parquet file's own
    metadata (Hugging Face) tell the names. A table's `split` column is used when `split` is given.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, split, names)
    return _from_table(
        Table(path), split, names, label_column, media_column, id_column, media_root=media_root
    )


# --------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------


def _from_folder(root: Path, split: str | None, names: Names | None) -> ClassSet:
    folder, split = _split_folder(root, split)
    class_folders = _subfolders(folder)
    if not class_folders:
        loose = sum(1 for path in folder.iterdir() if media_kind(path))
        raise UsageError(
            f"{printable(folder)} has no folder per class, but {loose} pictures or videos."
            if loose
            else f"{printable(folder)} is empty of classes: it holds no folder per class.",
            hint="Expected CLASS/PICTURE or val/CLASS/PICTURE, or a table with a class column.",
        )
    keys = [path.name for path in class_folders]
    keys, classes = _named(keys, _names_for(keys, names, (root, folder)), where=root)
    skipped: list[tuple[str, str]] = []
    clips: list[Clip] = []
    ids: list[str] = []
    labels: list[int] = []
    for label, key in enumerate(keys):
        for found in walk(folder / key, on_skip=lambda path, why: skipped.append((str(path), why))):
            clips.append(Clip(found.path))
            ids.append(str(found.path))
            labels.append(label)
    if not clips:
        raise UsageError(
            f"None of the {len(keys)} class folders of {printable(folder)} holds a picture or a video."
        )
    return ClassSet(
        root,
        ids,
        file_stream(clips, ids),
        [clip.path for clip in clips],
        classes=classes,
        labels=labels,
        split=split,
        skipped=skipped,
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _split_folder(root: Path, split: str | None) -> tuple[Path, str | None]:
    there = {path.name: path for path in _subfolders(root)}
    splits = [name for name in SPLITS if name in there]
    if split is not None:
        if split not in there:
            raise UsageError(
                f"{printable(root)} has no folder {split!r}. Its folders: {_few(there)}.",
                hint="Name one of them as the split.",
            )
        return there[split], split
    if splits and len(splits) == len(there):
        return there[splits[0]], splits[0]
    return root, None


def _names_for(keys: Sequence[str], names: Names | None, places: Sequence[Path]) -> _Given | None:
    if names is not None:
        return _given(names, keys)
    for place in dict.fromkeys(places):
        for name in NAME_FILES:
            if (place / name).is_file():
                return _given(place / name, keys)
    return None


class _Given:
    """Names as they were given: a mapping from keys, or a list in their order; `source` for messages."""

    def __init__(self, values: Mapping[str, str] | Sequence[str], source: str) -> None:
        self.values, self.source = values, source


def _given(names: Names, keys: Sequence[str]) -> _Given:
    if isinstance(names, Mapping):
        return _Given({str(key): str(value) for key, value in names.items()}, "names")
    if not isinstance(names, str | Path):
        listed = [str(name) for name in names]
        chosen = set(listed) <= set(keys)  # the classes themselves: which ones, in which order
        return _Given({name: name for name in listed} if chosen else listed, "names")
    path = Path(names)
    source = printable(path)
    if path.suffix.lower() == ".json":
        return _Given(_json_names(read_json(path), keys, source), source)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UsageError(f"The file of class names {source} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file of class names {source} cannot be read ({error}).") from error
    known = set(keys)
    if set(lines) <= known:  # the folders themselves: which ones, in which order
        return _Given({line: _spaced(line) for line in lines}, source)
    parts = [line.split("\t", 1) if "\t" in line else line.split(None, 1) for line in lines]
    mapping = {part[0].strip(): part[1].strip() for part in parts if len(part) == 2}
    if any(key in known for key in mapping):
        return _Given({key: _first_synonym(key, name) for key, name in mapping.items()}, source)
    return _Given(lines, source)


def _json_names(data: Any, keys: Sequence[str], source: str) -> Mapping[str, str] | Sequence[str]:
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return data
    if isinstance(data, dict):
        flat: dict[str, str] = {}
        for key, value in data.items():
            if isinstance(value, list) and len(value) == 2 and value[0] in keys:
                key, value = value  # {"0": ["n01440764", "tench"]}
            elif isinstance(value, list) and value:
                value = value[0]
            if not isinstance(value, str):
                break
            flat[key] = _first_synonym(key, value)
        else:
            return flat
    raise UsageError(
        f"{source} holds no class names.", hint='Expected {"folder": "name", ...} or ["name", ...].'
    )


def _named(keys: list[str], given: _Given | None, *, where: Path) -> tuple[list[str], list[str]]:
    """Keys and names in the order of the class numbers."""
    if given is None:
        ids = [key for key in keys if _WNID.fullmatch(key)]
        if ids:
            raise UsageError(
                f"The classes of {printable(where)} are named by WordNet ids ({_few(ids)}), "
                "which no text tower knows as words.",
                hint=f"Put a file classes.txt with lines like '{ids[0]} tench' there, or pass names=FILE.",
            )
        return keys, [_spaced(key) for key in keys]
    if isinstance(given.values, Mapping):
        mapping = given.values
        missing = [key for key in keys if key not in mapping]
        if missing and not set(mapping) <= set(keys):
            raise UsageError(
                f"{given.source} names no class for {len(missing)} of {len(keys)}: {_few(missing)}.",
                hint="Add a line for each.",
            )
        # a file that names only some of the classes chooses those, in its own order
        kept = [key for key in mapping if key in keys] if missing or len(mapping) == len(keys) else keys
        names = [mapping[key] for key in kept]
    else:
        if len(given.values) != len(keys):
            raise UsageError(
                f"{given.source} has {len(given.values)} names for {len(keys)} classes.",
                hint="Expected one name per class, in the order of the sorted classes.",
            )
        kept, names = keys, list(given.values)
    empty = [key for key, name in zip(kept, names) if not name.strip()]
    if empty:
        raise UsageError(f"{given.source} gives an empty name to: {_few(empty)}.")
    return kept, names


def _first_synonym(key: str, name: str) -> str:
    return name.split(",")[0].strip() if _WNID.fullmatch(key) else name


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").split()) or name


def _few(names: Any, shown: int = 5) -> str:
    names = list(names)
    listed = ", ".join(printable(name) for name in names[:shown])
    return f"{listed} and {len(names) - shown} more" if len(names) > shown else listed or "none"


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def _from_table(
    table: Table,
    split: str | None,
    names: Names | None,
    label_column: str | None,
    media_column: str | None,
    id_column: str | None,
    *,
    media_root: str | Path | None,
) -> ClassSet:
    media_name = table.column(media_column, MEDIA_COLUMNS, "pictures or videos", "media_column")
    label_name = table.column(label_column, CLASS_COLUMNS, "classes", "label_column")
    if id_column is not None:
        table.column(id_column, (), "ids", "id_column")
    id_name = table.find(id_column, ID_COLUMNS)
    if split is not None:
        table.column("split", (), "splits", "split")
    wanted = [label_name, *([id_name] if id_name else []), *(["split"] if split is not None else [])]
    skipped: list[tuple[str, str]] = []
    numbers, ids, raw = [], [], []
    splits: Counter[str] = Counter()
    for number, row in table.rows(wanted, on_skip=lambda where, why: skipped.append((where, why))):
        if split is not None:
            splits[str(row.get("split"))] += 1
            if row.get("split") != split:
                continue
        label = row.get(label_name)
        if label is None or str(label).strip() == "" or not isinstance(label, str | int):
            skipped.append((table.where(number), "it has no class"))
            continue
        numbers.append(number)
        ids.append(row_id(table, number, row, id_name))
        raw.append(str(label).strip())
    if not raw:
        of_split = f" of the split {split!r} (there are: {_few(splits)})" if splits else ""
        raise UsageError(f"The table {printable(table.path)} has no row with a class{of_split}.")
    keys, classes = _table_classes(table, label_name, sorted(set(raw)), names)
    number_of = {key: index for index, key in enumerate(keys)}
    kept = [index for index, key in enumerate(raw) if key in number_of]
    skipped += [
        (ids[index], f"its class {raw[index]!r} is not among those named")
        for index in range(len(raw))
        if raw[index] not in number_of
    ]
    numbers = [numbers[index] for index in kept]
    ids = [ids[index] for index in kept]
    root = Path(media_root) if media_root is not None else table.folder
    return ClassSet(
        table.path,
        ids,
        table_stream(table, media_name, numbers, ids, root),
        [table.path],
        classes=classes,
        labels=[number_of[raw[index]] for index in kept],
        split=split,
        skipped=skipped,
    )


def _table_classes(
    table: Table, label_name: str, keys: list[str], names: Names | None
) -> tuple[list[str], list[str]]:
    numbered = all(key.isdecimal() for key in keys)
    if numbered:
        keys = sorted(keys, key=int)
        listed = _huggingface_names(table, label_name) if names is None else None
        given = _Given(listed, "The table's metadata") if listed else None
        if names is not None:
            given = _given(names, keys)
        if given is None:
            raise UsageError(
                f"The column {label_name!r} of {printable(table.path)} holds class numbers, not names.",
                hint="Pass names= with the names in order, or label_column= of a column with names.",
            )
        if not isinstance(given.values, Mapping):
            # a list names the classes 0, 1, 2 ..., also those that no row has
            if int(keys[-1]) >= len(given.values):
                raise UsageError(
                    f"{given.source} has {len(given.values)} names, but there is a class number {keys[-1]}."
                )
            given = _Given({str(i): name for i, name in enumerate(given.values)}, given.source)
            keys = list(given.values)
        return _named(keys, given, where=table.path)
    return _named(keys, None if names is None else _given(names, keys), where=table.path)


def _huggingface_names(table: Table, label_name: str) -> list[str] | None:
    """The names of a `ClassLabel` feature, which `datasets` keeps in the Parquet schema."""
    stored = table.metadata().get(b"huggingface")
    if stored is None:
        return None
    try:
        names = json.loads(stored)["info"]["features"][label_name]["names"]
    except (ValueError, KeyError, TypeError):
        return None  # other features, or metadata of another make
    return [str(name) for name in names] if isinstance(names, list) else None
