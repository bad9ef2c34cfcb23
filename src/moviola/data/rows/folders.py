"""Folders of pictures as shards: captions beside the pictures, or the class that a folder is named after.

`a/b.jpg` has its captions in `a/b.txt`, one a line, or in `a/b.json`: an object with `caption`, `captions`,
`text` ..., whose other fields are columns too. Where no picture has such a file, the folders are classes
and the caption is "a photo of a NAME.", also in `class`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moviola.data.classes import read_classes
from moviola.data.rows.shards import CheapShard, column_of, media_columns
from moviola.data.tables import TEXT_COLUMNS
from moviola.data.templates import SIMPLE
from moviola.media.files import walk
from moviola.types import UsageError, printable

_LOOKED_AT = 100  # JSON files whose fields count as columns


class FolderShard(CheapShard):
    """Every picture and video under a folder, a row each."""

    absolute = False

    def __init__(self, folder: Path, *, renames: Mapping[str, str]) -> None:
        self.name = folder.name or str(folder)
        self.root = folder
        found = [one.path for one in walk(folder)]
        if not found:
            raise UsageError(f"{printable(folder)} holds no pictures.", hint="Check the path.")
        base = str(folder).rstrip(os.sep) + os.sep
        self._names = [str(path).removeprefix(base) for path in found]
        self._beside_N = _beside(folder, self._names)
        fields = [] if not (self._beside_N & 2).any() else self._fields()
        self._class_N = None if self._beside_N.any() else self._classes(folder)
        texts = ["class"] if self._class_N is not None else []
        caption = ["caption"] if self._beside_N.any() or texts else []
        self.columns = tuple(dict.fromkeys(["path", "id", *caption, *texts, *fields]))
        self.media = media_columns(("path",), {k: v for k, v in renames.items() if v == "path"})
        self.count = len(self._names)
        self.files = [(name, folder / name) for name in self._names]
        for ending, bit in ((".txt", 1), (".json", 2)):
            beside = [_stem(self._names[i]) + ending for i in np.flatnonzero(self._beside_N & bit)]
            self.files += [(name, folder / name) for name in dict.fromkeys(beside)]
        self.blocks()

    def _classes(self, folder: Path) -> list[str] | None:
        """The class name of each row, None where the pictures lie in the folder itself."""
        if not all(os.sep in name for name in self._names):
            return None
        split = "train" if (folder / "train").is_dir() else None
        try:
            known = read_classes(folder, split=split)
        except UsageError as error:
            raise UsageError(
                f"{error.problem} Its pictures have no captions beside them either.", hint=error.hint
            ) from error
        base = str(folder).rstrip(os.sep) + os.sep
        self._names = [name.removeprefix(base) for name in known.ids]
        self._beside_N = np.zeros(len(self._names), np.uint8)
        return [known.classes[label] for label in known.labels_N.tolist()]

    def _fields(self) -> list[str]:
        names: dict[str, None] = {}
        for row in np.flatnonzero(self._beside_N & 2)[:_LOOKED_AT].tolist():
            names.update(dict.fromkeys(self._json(row)))
        return [name for name in names if name not in ("path", "id")]

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        made: dict[str, pa.Array] = {}
        asked = rows.tolist()
        objects: list[dict[str, Any]] = []
        if set(columns) - {"path", "id", "class"} and self._class_N is None:
            objects = [self._json(row) if self._beside_N[row] & 2 else {} for row in asked]
        for name in columns:
            if name in ("path", "id"):
                made[name] = column_of([self._names[row] for row in asked])
            elif name == "class" and self._class_N is not None:
                made[name] = column_of([self._class_N[row] for row in asked])
            elif name == "caption":
                made[name] = self._captions(asked, objects)
            else:
                made[name] = column_of([o.get(name) for o in objects])
        return pa.table(made)

    def _captions(self, rows: Sequence[int], objects: Sequence[Mapping[str, Any]]) -> pa.Array:
        if self._class_N is not None:
            return column_of([SIMPLE[0].format(self._class_N[row]) for row in rows])
        texts: list[Any] = []
        for place, row in enumerate(rows):
            if self._beside_N[row] & 1:
                lines = (self._text(row, ".txt") or "").splitlines()
                texts.append([line for line in lines if line.strip()])
                continue
            found = next((objects[place][n] for n in TEXT_COLUMNS if objects[place].get(n)), None)
            texts.append(found if isinstance(found, list) or found is None else [str(found)])
        return column_of(texts)

    def _text(self, row: int, ending: str) -> str | None:
        """The file beside a picture, None where it cannot be read: the row then lacks what it held."""
        path = self.root / (_stem(self._names[row]) + ending)
        try:
            return path.read_text(encoding="utf-8-sig", errors="replace")
        except OSError:
            return None

    def _json(self, row: int) -> dict[str, Any]:
        try:
            value = json.loads(self._text(row, ".json") or "{}")
        except (json.JSONDecodeError, RecursionError):
            return {}
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            return {"caption": value}
        return value if isinstance(value, dict) else {}


def _beside(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Of each picture: 1 where there is a text file of its name, 2 where there is a JSON file, 3 for both."""
    there: dict[str, set[str]] = {}

    def listed(place: str) -> set[str]:
        if place not in there:
            there[place] = set(os.listdir(folder / place))  # noqa: PTH208 (names only)
        return there[place]

    found = np.zeros(len(names), np.uint8)
    for row, name in enumerate(names):
        place, base = os.path.split(name)
        stem = _stem(base)
        around = listed(place)
        found[row] = (stem + ".txt" in around) | (stem + ".json" in around) << 1
    return found


def _stem(name: str) -> str:
    """The name without its ending; strings, since there may be millions."""
    return os.path.splitext(name)[0]  # noqa: PTH122
