"""Small files of pairs for the tests, made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from moviola.clip.tokenizer import Tokenizer


def picture(number: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A smooth picture of its own for every number; `size` is (height, width)."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = [
        np.sin((number % 7 + 1) * x + number * 0.7 + c) * np.cos((number % 5 + 1) * y + c) for c in range(3)
    ]
    return Image.fromarray((127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pictures(count: int, **options: object) -> list[bytes]:
    return [encoded(picture(i), **options) for i in range(count)]  # type: ignore[arg-type]


def captions(count: int) -> list[str]:
    return [f"picture number {i}" for i in range(count)]


def parquet(path: Path, count: int = 20, *, row_group: int = 1 << 20, **columns: object) -> Path:
    """Pictures as bytes and captions; `columns` replace these or come as well."""
    table = {"image": pictures(count), "caption": captions(count), **columns}
    pq.write_table(pa.table(table), path, row_group_size=row_group)
    return path


def tar(path: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for ending, body in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(body)
                archive.addfile(info, io.BytesIO(body))
    return path


def jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer(context_length: int = 16) -> Tokenizer:
    texts = [*captions(20), "a red square", "first part. second part", "un chat", "eine katze"]
    return Tokenizer.train(texts * 3, vocab_size=700, context_length=context_length)
