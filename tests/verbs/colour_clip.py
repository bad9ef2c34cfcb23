"""A real `Model` around a module that sees the share of each colour and reads colour words.

Its answers are known beforehand, so tests can ask for the right class, rank and vector.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from moviola.clip.loaded import Model
from moviola.clip.model import mean_of_frames
from moviola.clip.tokenizer import Tokenizer
from moviola.media import write_video
from moviola.types import ClipBatch, FrameSpec, Recipe

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "yellow": (230, 220, 20),
    "magenta": (210, 20, 210),
    "cyan": (20, 210, 210),
}
WORDS = ["a photo of a", "a picture showing", "then", "thing", *COLOURS]
TOKENIZER = Tokenizer.train(WORDS * 4, vocab_size=700, context_length=32)


class ColourClip(nn.Module):
    """`separable=False`: a video is its frames, and its worst frame decides the score."""

    context_length = 32

    def __init__(
        self,
        *,
        separable: bool = True,
        has_text: bool = True,
        adaptation: str = "none",
        spec: FrameSpec | None = None,
        broken: str | None = None,
    ) -> None:
        super().__init__()
        self.separable, self.has_text, self.adaptation = separable, has_text, adaptation
        self.frame_spec = spec or FrameSpec(padding="mask")
        self.broken = list(COLOURS).index(broken) if broken else -1
        self.register_buffer("palette_CD", torch.tensor(list(COLOURS.values())) / 255.0)
        table_VD = torch.full((TOKENIZER.size, len(COLOURS)), 2.0**-10)  # sums stay exact
        for index, word in enumerate(COLOURS):
            (token,) = TOKENIZER.encode(word)
            table_VD[token, index] = 1.0
        self.register_buffer("table_VD", table_VD)
        self.logit_scale = nn.Parameter(torch.tensor(10.0).log())
        self.seen = 0

    @property
    def dim(self) -> int:
        return len(COLOURS)

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        self.seen += len(pixels_BCHW)
        flat_BPC = pixels_BCHW.flatten(2).transpose(1, 2).contiguous()
        nearest_BP = torch.cdist(flat_BPC, self.palette_CD.expand(len(flat_BPC), -1, -1)).argmin(-1)
        shares_BD = 3.0 * F.one_hot(nearest_BP, self.dim).float().mean(1)
        if self.broken >= 0:  # as an overflow in half precision gives
            shares_BD[shares_BD[:, self.broken] > 2] = torch.nan
        return shares_BD.to(pixels_BCHW.dtype)

    def encode_text(self, tokens_NL: Tensor) -> Tensor:
        return self.table_VD[tokens_NL].sum(1)

    def encode_video(self, batch: ClipBatch) -> Tensor:
        count = batch.frames_BTCHW.shape[:2]
        frames_BTD = self.encode_image(batch.frames_BTCHW.flatten(0, 1)).unflatten(0, count)
        return mean_of_frames(frames_BTD, batch.mask_BT) if self.separable else frames_BTD

    def pool(self, video: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return video if self.separable else mean_of_frames(video, mask_BT)

    def score(self, text_ND: Tensor, video: Tensor, mask_MT: Tensor | None = None) -> Tensor:
        text_ND = F.normalize(text_ND, dim=-1)
        if self.separable:
            return self.logit_scale.exp() * text_ND @ F.normalize(video, dim=-1).T
        scores_NMT = torch.einsum("nd,mtd->nmt", text_ND, F.normalize(video, dim=-1))
        if mask_MT is not None:
            scores_NMT = scores_NMT.masked_fill(~mask_MT, torch.inf)
        return self.logit_scale.exp() * scores_NMT.min(-1).values


def colour_model(**options: Any) -> Model:
    return Model(
        ColourClip(**options),
        config={},
        recipe=Recipe(size=(16, 16), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), context_length=32),
        tokenizer=TOKENIZER,
        name="colours",
        device="cpu",
    )


def picture(path: Path, *colours: str, size: tuple[int, int] = (24, 24)) -> Path:
    """Stripes of the colours, as equal as the width allows."""
    pixels = np.zeros((*size, 3), np.uint8)
    for index, columns in enumerate(np.array_split(np.arange(size[1]), len(colours))):
        pixels[:, columns] = COLOURS[colours[index]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def video(path: Path, *parts: tuple[str, float], rate: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [
        np.full((1, 32, 48, 3), COLOURS[name], np.uint8) for name, s in parts for _ in range(round(s * rate))
    ]
    return write_video(path, np.concatenate(frames), rate)


def encoded(colour: str, tmp: Path) -> bytes:
    return picture(tmp / "encoded.png", colour).read_bytes()
