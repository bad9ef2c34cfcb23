"""Made pictures with more to tell than a short caption holds: a thing in a frame of two colours.

A long caption tells the thing and one half of the frame, says something idle, and then tells the other
half: "a red star in a top-blue frame. this is a small picture that nobody took. the frame is bottom-pink".
Its first sentence is the short caption. Which half comes first is dealt anew for every picture, so short
captions teach the words for both: what is asked is whether a text is read to its end.

Axis letters: N pictures, S side in pixels, H the two halves, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data import long_tail, world_shapes
from moviola.data.long_tail import CLASSES, COLOURS
from moviola.data.word_tokens import word_tokens
from moviola.metrics.retrieval import retrieval_metrics

HALVES = ("top", "bottom")
IDLE = "this is a small picture that nobody took"
BAND = 4
SIDE = long_tail.SIDE + 2 * BAND


@dataclass(frozen=True)
class Framed:
    """pixels_NSS3 uint8, the things (numbers of `CLASSES`), the colours of the frames' `HALVES`, and which
    of these the caption tells last.
    """

    pixels_NSS3: np.ndarray
    class_N: np.ndarray
    colour_NH: np.ndarray
    late_N: np.ndarray

    def __len__(self) -> int:
        return len(self.class_N)

    def short_captions(self) -> list[str]:
        """The first sentences: the thing, and one half of its frame."""
        return [caption.partition(". ")[0] for caption in self.long_captions()]

    def long_captions(self, last: int | None = None) -> list[str]:
        """One a picture; with `last` the half that is told last has this colour instead of its own."""
        captions = []
        for n, class_ in enumerate(self.class_N.tolist()):
            late = int(self.late_N[n])
            shades = [COLOURS[c] for c in self.colour_NH[n].tolist()]
            if last is not None:
                shades[late] = COLOURS[last]
            colour, shape = CLASSES[class_]
            early_words, late_words = (f"{HALVES[half]}-{shades[half]}" for half in (1 - late, late))
            first = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} in a {early_words} frame"
            captions.append(f"{first}. {IDLE}. the frame is {late_words}")
        return captions

    def late_colours(self) -> np.ndarray:
        """The true colours of the halves that are told last: (N,)."""
        return self.colour_NH[np.arange(len(self)), self.late_N]

    def tensors(self, length: int) -> dict[str, Tensor]:
        """All of it as a batch: `image` (N, 3, S, S), `text` and `text_short` cut to (N, `length`)."""
        texts = {"text": self.long_captions(), "text_short": self.short_captions()}
        made = {name: torch.from_numpy(tokens(told, length)) for name, told in texts.items()}
        return {"image": long_tail.pixels(self.pixels_NSS3), **made}


def framed(seed: int, count: int) -> Framed:
    """`count` pictures, every thing as likely as another, every colour by itself."""
    inner = long_tail.long_tail(seed, count, exponent=0.0, noise=0.0)
    rng = np.random.default_rng([seed, 2])
    colour_NH = rng.integers(len(COLOURS), size=(count, len(HALVES)))
    late_N = rng.integers(len(HALVES), size=count)
    table = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
    shade_NH3 = table[colour_NH] + rng.uniform(-20, 20, (count, len(HALVES), 3)).astype(np.float32)
    canvas_NSS3 = np.repeat(shade_NH3, SIDE // 2, axis=1)[:, :, None].repeat(SIDE, axis=2)
    canvas_NSS3 += 6 * rng.standard_normal(canvas_NSS3.shape, np.float32)
    canvas_NSS3[:, BAND:-BAND, BAND:-BAND] = inner.pixels_NSS3
    pixels_NSS3 = np.clip(np.rint(canvas_NSS3), 0, 255).astype(np.uint8)
    return Framed(pixels_NSS3, inner.class_N, colour_NH, late_N)


def _pieces(text: str) -> list[str]:
    return re.findall(r"[\w-]+|[^\w\s]", text)


@lru_cache(maxsize=1)
def _numbers() -> dict[str, int]:
    texts = [*map(" ".join, CLASSES), "a an in the frame is .", IDLE]
    texts += [f"{half}-{shade}" for half in HALVES for shade in COLOURS]
    words = sorted({piece for text in texts for piece in _pieces(text)})
    return {word: number for number, word in enumerate(words, start=1)}


def vocabulary_size() -> int:
    """Tokens there are: 0 fills up, the largest ends a text."""
    return len(_numbers()) + 2


def tokens(texts: Sequence[str], length: int) -> np.ndarray:
    """tokens_NL int64; what does not fit before the closing token is cut off."""
    return word_tokens(texts, _numbers(), length, world="The framed pictures have", words=_pieces)


def towers(context_length: int) -> ClipConfig:
    """A small CLIP for these pictures that reads texts of this length."""
    vision = VitConfig(SIDE, patch_size=8, width=64, layers=1, heads=4, stem=((32, 0),))
    return ClipConfig(64, vision, TextConfig(context_length, vocabulary_size(), width=64, layers=2, heads=4))


@torch.no_grad()
def measure(model: CLIP, test: Framed) -> dict[str, float]:
    """The late half's colour out of eight, and text-to-picture R@1 by long and by short captions.

    The colour is read by comparing the picture with its long caption in all eight colours.
    """

    def vectors(tokens_NL: Tensor) -> Tensor:
        return F.normalize(model.encode_text(tokens_NL), dim=-1)

    data, length = test.tensors(model.context_length), model.context_length
    image_NE = F.normalize(model.encode_image(data["image"]), dim=-1)
    told = (torch.from_numpy(tokens(test.long_captions(last=c), length)) for c in range(len(COLOURS)))
    cosines_NC = torch.stack([(image_NE * vectors(tokens_NL)).sum(-1) for tokens_NL in told], dim=1)
    hit_N = cosines_NC.argmax(1) == torch.from_numpy(test.late_colours())
    figures = {"late attribute, %": 100 * hit_N.double().mean().item()}
    for name, text in (("long", "text"), ("short", "text_short")):
        ranks = retrieval_metrics((vectors(data[text]) @ image_NE.T).numpy(), range(len(test)))
        figures[f"{name} t2i R@1"] = ranks["t2v"]["R1"]
    return figures
