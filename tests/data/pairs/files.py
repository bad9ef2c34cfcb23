"""Pair files of every format, written for the tests with the formats' own libraries."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moviola.data.pairs import PairBatch, PairColumns, Piece, find_pairs, pair_columns, pieces, read_texts

ENDINGS = ["parquet", "csv", "tsv", "jsonl", "tar"]


def packed(data: bytes, ending: str) -> bytes:
    if ending.endswith((".zst", ".zstd")):
        return pa.Codec("zstd").compress(data).to_pybytes()
    if ending.endswith((".gz", ".tgz")):
        return gzip.compress(data)
    if ending.endswith(".bz2"):
        return bz2.compress(data)
    return lzma.compress(data) if ending.endswith(".xz") else data


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.endswith((".zst", ".zstd")):
        return pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
    if path.name.endswith((".gz", ".tgz")):
        return gzip.decompress(data)
    if path.name.endswith(".bz2"):
        return bz2.decompress(data)
    return lzma.decompress(data) if path.name.endswith(".xz") else data


def tar_of(members: list[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(body), 1_700_000_000
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


def members_of(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    """Rows in the format of the path's ending. In a tar `key` names the sample, `caption` is its .txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if ".parquet" in path.name:
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path
    if ".jsonl" in path.name:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif ".tar" in path.name or ".tgz" in path.name:
        members = []
        for i, row in enumerate(rows):
            key = row.get("key", f"{i:06d}")
            members += [
                (f"{key}.jpg", b"\xff\xd8" + key.encode() * 300),
                (f"{key}.txt", row["caption"].encode()),
            ]
        data = tar_of(members)
    else:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerow(names)
        writer.writerows([row.get(name, "") for name in names] for row in rows)
        data = text.getvalue().encode()
    path.write_bytes(packed(data, path.name))
    return path


def only_piece(path: Path) -> Piece:
    (piece,) = pieces(find_pairs([path]))
    return piece


def read_all(
    piece: Piece | Path, columns: PairColumns | None = None, **options: Any
) -> tuple[list[tuple[int, int, str]], list[str] | None, dict[str, int], int]:
    """((row, candidate, text) of every text, ids, problems, rows), with the batches' own promises checked."""
    if isinstance(piece, Path):
        piece = only_piece(piece)
    columns = columns or pair_columns(piece.file)
    texts: list[tuple[int, int, str]] = []
    ids: list[str] = []
    problems: dict[str, int] = {}
    rows = 0
    for batch in read_texts(piece, columns, **options):
        check(batch, rows)
        rows += batch.rows
        texts += [
            (batch.first + row, nth, text)
            for row, nth, text in zip(batch.row_U.tolist(), batch.text_U.tolist(), batch.texts.to_pylist())
        ]
        ids += batch.ids.to_pylist() if batch.ids is not None else []
        for name, many in batch.problems.items():
            problems[name] = problems.get(name, 0) + many
    return texts, ids if columns.id is not None else None, problems, rows


def check(batch: PairBatch, first: int) -> None:
    assert batch.first == first
    assert batch.texts.type == pa.string()
    assert batch.texts.null_count == 0
    batch.texts.validate(full=True)
    assert len(batch.texts) == len(batch.row_U) == len(batch.text_U)
    assert batch.row_U.dtype == np.int64
    assert batch.text_U.dtype == np.int32
    assert (np.diff(batch.row_U) >= 0).all()
    assert not len(batch.row_U) or (batch.row_U[0] >= 0 and batch.row_U[-1] < batch.rows)
    for labels in (batch.ids, batch.languages):
        assert labels is None or (len(labels) == batch.rows and labels.null_count == 0)
