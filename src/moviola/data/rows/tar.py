"""WebDataset tars as shards: where each file of each sample lies is found once, then read by `pread`.

A sample is a run of files that share their path up to the first dot of the name; what follows the dot, in
lower case, is the column. `image` and `video` are the sample's first file that ends like one, whatever its
ending; fields of the sample's JSON file are columns `json.NAME`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moviola.data.pairs.jsonl import parsed
from moviola.data.pairs.tar import TarError, TarReader
from moviola.data.pairs.types import PairError, PairFile
from moviola.data.pairs.webdataset import KEY, webdataset_columns
from moviola.data.rows.shards import CheapShard, column_of
from moviola.media.files import PICTURES, VIDEOS

_TEXTS = ("txt", "text", "caption", "cls")


class TarShard(CheapShard):
    """One uncompressed tar. Its index is two integers for each file in it."""

    absolute = False

    def __init__(self, file: PairFile, *, root: Path | None, renames: Mapping[str, str]) -> None:
        self.path = file.path.absolute()
        self.name = file.name
        self.root = file.path.parent if root is None else root
        self.files = [(file.name, self.path)]
        self._keys, self._endings, self._at_NE, self._size_NE = _index(file)
        self.count = len(self._keys)
        fields = [name for name in webdataset_columns(file) if name.startswith("json.")]
        kinds = {"image": PICTURES, "video": VIDEOS}
        self._media_E = {
            kind: [e for e, ending in enumerate(self._endings) if "." + ending.rsplit(".", 1)[-1] in known]
            for kind, known in kinds.items()
        }
        self.media = {
            kind: renames.get(kind, f"__{kind}__")
            for kind, found in self._media_E.items()
            if (renames[kind] in self._endings if kind in renames else found)
        }
        made = [f"__{kind}__" for kind in kinds if self._media_E[kind]]
        self.columns = (KEY, *self._endings, *fields, *made)
        self.blocks()

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            made: dict[str, pa.Array] = {}
            fields = [name for name in columns if name.startswith("json.")]
            if fields:
                texts = self._bodies(descriptor, rows, [self._endings.index("json")])
                objects = [v if isinstance(v := parsed(t or b"{}"), dict) else {} for t in texts]
                for name in fields:
                    made[name] = column_of([o.get(name.removeprefix("json.")) for o in objects])
            for name in columns:
                if name == KEY:
                    made[name] = self._keys.take(pa.array(rows))
                elif name in ("__image__", "__video__"):
                    at = self._media_E[name.strip("_")]
                    made[name] = pa.array(self._bodies(descriptor, rows, at), pa.large_binary())
                elif name not in made:
                    bodies = self._bodies(descriptor, rows, [self._endings.index(name)])
                    made[name] = _column(name, bodies)
        finally:
            os.close(descriptor)
        return pa.table(made)

    def _bodies(self, descriptor: int, rows: np.ndarray, endings: list[int]) -> list[bytes | None]:
        """Of each row the first of these files that its sample has."""
        at_NE, size_NE = self._at_NE[rows][:, endings], self._size_NE[rows][:, endings]
        first_N = np.argmax(at_NE >= 0, axis=1)
        every = np.arange(len(rows))
        at_N, size_N = at_NE[every, first_N], size_NE[every, first_N]
        bodies: list[bytes | None] = [None] * len(rows)
        for place in np.argsort(at_N, kind="stable").tolist():
            if at_N[place] < 0:
                continue
            size = int(size_N[place])
            body = os.pread(descriptor, size, int(at_N[place]))
            if len(body) < size:
                raise PairError(self.path, "has become shorter since it was opened.", hint="Start again.")
            bodies[place] = body
        return bodies


def _column(name: str, bodies: list[bytes | None]) -> pa.Array:
    """Files with a text's ending as text, others as bytes."""
    if name.rsplit(".", 1)[-1] in _TEXTS:
        return pa.array(
            [None if b is None else b.decode("utf-8", "replace") for b in bodies], pa.large_string()
        )
    return pa.array(bodies, pa.large_binary())


def _index(file: PairFile) -> tuple[pa.Array, list[str], np.ndarray, np.ndarray]:
    """Keys of the samples, endings, and where each sample's file of each ending begins and how long it is."""
    keys: list[str] = []
    endings: dict[str, int] = {}
    found: list[tuple[int, int, int, int]] = []  # sample, ending, place, size
    try:
        with file.path.open("rb") as stream:
            for member in TarReader(stream, file.path.stat().st_size):
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not stem or not dot or (name.startswith("__") and name.endswith("__")):
                    continue  # as data loaders do: hidden files, names without an ending, remarks
                key = f"{folder}{slash}{stem}"
                if not keys or keys[-1] != key:
                    keys.append(key)
                number = endings.setdefault(ending.lower(), len(endings))
                found.append((len(keys) - 1, number, stream.tell(), member.size))
    except (OSError, TarError) as error:
        raise PairError(
            file.path, f"is damaged ({error}).", hint="Copy it again, or leave it out."
        ) from error
    at_NE = np.full((len(keys), len(endings)), -1, np.int64)
    size_NE = np.zeros_like(at_NE)
    if found:
        sample, number, place, size = np.array(found, np.int64).T
        at_NE[sample, number], size_NE[sample, number] = place, size
    clean = [key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for key in keys]
    return pa.array(clean, pa.large_string()), list(endings), at_NE, size_NE
