"""Zero-shot accuracy of a CLIP on a table of encoded pictures with a `name` column."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from data import normalise
from moviola.clip.tokenizer import Tokenizer

TEMPLATES = (
    "a photo of a {}.",
    "{}",
    "a picture of a {}",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
)


@torch.inference_mode()
def zero_shot_accuracy(
    module: torch.nn.Module,
    tokenizer: Tokenizer,
    table_path: Path,
    names: list[str],
    *,
    limit: int | None = None,
    size: int = 64,
    among: list[str] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 in percent over the pictures whose name is in `among` (default: all)."""
    table = pq.read_table(table_path, columns=["image", "name"])
    label = {name: i for i, name in enumerate(names)}
    rows = [r for r in range(table.num_rows) if among is None or table["name"][r].as_py() in among]
    if limit and limit < len(rows):
        rows = rows[:: len(rows) // limit][:limit]
    vectors = []
    for template in TEMPLATES:
        tokens = torch.from_numpy(tokenizer([template.format(n) for n in names]))
        vectors.append(F.normalize(module.encode_text(tokens).float(), dim=-1))
    text_CD = F.normalize(torch.stack(vectors).mean(0), dim=-1)
    top1 = top5 = 0
    for start in range(0, len(rows), 250):
        part = table.take(rows[start : start + 250]).to_pylist()
        pictures = [Image.open(io.BytesIO(r["image"])).convert("RGB").resize((size, size), 3) for r in part]
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
        image_BD = F.normalize(module.encode_image(normalise(pixels)).float(), dim=-1)
        ranked = (image_BD @ text_CD.T).topk(min(5, len(names))).indices
        truth = torch.tensor([label[r["name"]] for r in part])
        top1 += int((ranked[:, 0] == truth).sum())
        top5 += int((ranked == truth[:, None]).any(1).sum())
    return {"top1": 100 * top1 / len(rows), "top5": 100 * top5 / len(rows)}
