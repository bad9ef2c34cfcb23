"""A look at the data before hours are spent on it, and rows held out to measure with."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np

from moviola.data.hashing import hash_uint64, hash_uniform
from moviola.data.rows.fields import Unusable, media_of
from moviola.data.rows.pairs import PairData
from moviola.data.rows.source import RowSource
from moviola.data.tables import text_cell
from moviola.types import PictureField, TextField, UsageError

_PLACES = 16  # blocks that a sample comes from
_HELD_OUT_PLACES = 32
_SAMPLE, _PROBE = 0xC4EC, 0x4E1D


def check(data: PairData, rows: int = 1000) -> list[str]:
    """Look at a sample of the rows; notes in plain words about what is odd.

    `UsageError` where all captions, or all pictures, of the sample are the same, or none can be used:
    nothing could be learned.
    """
    sample = _spread(data.source, rows, _PLACES, seed=0, stream=_SAMPLE)
    captions: Counter[str] = Counter()
    pictures: Counter[bytes] = Counter()
    with_text = any(isinstance(f, TextField) and not f.optional for f in data.needs.fields)
    with_picture = any(isinstance(f, PictureField) for f in data.needs.fields)
    texts = [c for c in data.source.captions if c in data.columns] if with_text else []
    reasons: list[tuple[int, str]] = []
    for start in range(0, len(sample), 64):
        some = sample[start : start + 64]
        table = data.source.read(some, data.columns)
        for name in texts[:1]:
            for cell in table[name].to_pylist():
                captions.update(text_cell(cell)[:1])
        if with_picture:
            pictures.update(_digests(table["image"].to_pylist()))
        reasons += data.unusable(some)
    if len(reasons) == len(sample):
        raise UsageError(
            f"None of {len(sample)} rows looked at can be used: {data.source.where(reasons[0][0])}: "
            f"{reasons[0][1]}.",
            hint="Check the columns and where the paths start (--root).",
        )
    for what, found in (("captions", captions), ("pictures", pictures)):
        if len(found) == 1 and sum(found.values()) > 1:
            raise UsageError(
                f"All {sum(found.values())} {what} looked at are the same: there is nothing to learn.",
                hint=f"Check that the column of {what} is the right one.",
            )
    return [
        *_repeats("captions", captions),
        *_repeats("pictures", pictures),
        *_unread(data, reasons, len(sample)),
    ]


def _digests(cells: list[Any]) -> list[bytes]:
    """A hash of each picture's file; nothing where there is none, which is told elsewhere."""
    found = []
    for cell in cells:
        try:
            media = media_of(cell, "picture")
            content = media if isinstance(media, bytes) else media.read_bytes()
        except (Unusable, OSError):
            continue
        found.append(hashlib.blake2b(content, digest_size=16).digest())
    return found


def _repeats(what: str, found: Counter[Any]) -> list[str]:
    total = sum(found.values())
    twice = total - len(found)
    if not twice:
        return []
    most = found.most_common(1)[0]
    shown = f", most often {most[0][:60]!r} ({most[1]} times)" if isinstance(most[0], str) else ""
    return [f"{100 * twice / total:.1f} % of {total} {what} looked at repeat another one{shown}."]


def _unread(data: PairData, reasons: list[tuple[int, str]], total: int) -> list[str]:
    if not reasons:
        return []
    row, why = reasons[0]
    return [
        f"{len(reasons)} of {total} rows looked at cannot be used and are replaced by others, "
        f"for example {data.source.where(row)}: {why}."
    ]


def held_out(source: RowSource, count: int, seed: int) -> tuple[RowSource, RowSource]:
    """`count` rows to measure with and all the others to train on, as (training, probe).

    Of a large Parquet source the held-out rows come from some row groups only, so that reading them
    does not read everything.
    """
    if not 0 < count < len(source):
        raise UsageError(
            f"Between 1 and {len(source) - 1} rows can be held out of {len(source)}, got {count}.",
            hint="Hold out fewer, or add data.",
        )
    probe = _spread(source, count, _HELD_OUT_PLACES, seed=seed, stream=_PROBE)
    rest = np.setdiff1d(np.arange(len(source)), probe, assume_unique=True)
    return source.subset(rest), source.subset(probe)


def _spread(source: RowSource, count: int, places: int, *, seed: int, stream: int) -> np.ndarray:
    """Rows drawn by hash, in rising order: from all of them, or from some blocks where reading is dear."""
    total = len(source)
    if total <= count:
        return np.arange(total)
    key_N = hash_uint64(seed, np.arange(total, dtype=np.uint64), stream=stream)
    start_K = source.blocks()
    if source.dear and len(start_K) > places:
        size_K = np.diff(np.append(start_K, total))
        turn_K = np.argsort(hash_uniform(seed, np.arange(len(start_K)), stream), kind="stable")
        held = int(np.searchsorted(np.cumsum(size_K[turn_K]), count)) + 1
        inside_N = np.zeros(total, bool)
        for block in turn_K[: max(places, held)].tolist():
            inside_N[start_K[block] : start_K[block] + size_K[block]] = True
        rows = np.flatnonzero(inside_N)
    else:
        rows = np.arange(total)
    return np.sort(rows[np.argsort(key_N[rows], kind="stable")[:count]])
