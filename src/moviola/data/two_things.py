"""Made scenes of one or two things, and pairs of scenes that differ in who is what, or where.

A scene is a colour and a shape left of, right of, above or below another colour and shape, told as "a red
circle above a blue square"; some show and tell one thing alone, and some grounds are nearly black. For each
true scene `contrasts` makes another that a reader who only counts words cannot tell from it:

    swapped roles        the same two things, each where the other was
    swapped attributes   the same shapes in the same places, with each other's colours

and three that differ in a word, as the pairs of ComVG do: `other subject`, `other relation`, `other object`.

Axis letters: N scenes, T the two things, S side in pixels, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.clip.tokenizer import Tokenizer
from moviola.data import world_shapes
from moviola.data.world_shapes import LARGEST_TURN, OUTLINES
from moviola.parts.sentence_parser import Entity, Parse, Relation
from moviola.types import Recipe

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross")
RELATIONS = ("left of", "right of", "above", "below")
CONTRASTS = ("swapped roles", "swapped attributes", "other subject", "other relation", "other object")
SIDE, CONTEXT_LENGTH = 32, 12
_THING, _VARIANTS, _DRAWN_AT = 13, 24, 4  # a thing's side in pixels, drawn in so many ways, larger first
_STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Scenes:
    """colour_NT and shape_NT of the subject and the object; relation_N; alone_N: only the subject is there.

    `at_NT2` is each thing's left and top in pixels, `ground_N` the grey level behind, `dice_NT` the drawing.
    """

    colour_NT: np.ndarray
    shape_NT: np.ndarray
    relation_N: np.ndarray
    alone_N: np.ndarray
    at_NT2: np.ndarray
    ground_N: np.ndarray
    dice_NT: np.ndarray

    def __len__(self) -> int:
        return len(self.relation_N)

    def names(self, n: int) -> list[tuple[str, str]]:
        """(colour, shape) of each thing that scene `n` shows, the subject first."""
        count = 1 if self.alone_N[n] else 2
        pairs = zip(self.colour_NT[n, :count].tolist(), self.shape_NT[n, :count].tolist(), strict=True)
        return [(COLOURS[colour], SHAPES[shape]) for colour, shape in pairs]

    def captions(self) -> list[str]:
        made = []
        for n, relation in enumerate(self.relation_N.tolist()):
            told = [f"a {colour} {shape}" for colour, shape in self.names(n)]
            made.append(f" {RELATIONS[relation]} ".join(told))
        return made

    def parses(self) -> list[Parse]:
        """The captions' true parses, of scenes of two things."""
        made = []
        for n, (caption, relation) in enumerate(zip(self.captions(), self.relation_N.tolist(), strict=True)):
            entities = tuple(Entity(shape, (colour,)) for colour, shape in self.names(n))
            link = Relation(entities[0].name, RELATIONS[relation], entities[-1].name)
            made.append(Parse(caption, entities, (link,)))
        return made

    def regions(self, n: int) -> dict[str, list[list[int]]]:
        """What a perfect dense captioner says: phrase -> boxes, xyxy pixels with inclusive corners."""
        found: dict[str, list[list[int]]] = {}
        for (colour, shape), (left, top) in zip(self.names(n), self.at_NT2[n].tolist(), strict=False):
            box = [left, top, left + _THING - 1, top + _THING - 1]
            found[f"a {colour} {shape}"] = [box]
        return found

    def draw(self, seed: int) -> np.ndarray:
        """pixels_NSS3 uint8."""
        rng = np.random.default_rng([seed, 5])
        canvas = np.empty((len(self), SIDE, SIDE, 3), np.float32)
        canvas[:] = self.ground_N[:, None, None, None]
        table = np.array([world_shapes.COLOURS[name] for name in COLOURS], np.float32)
        shade_NT3 = table[self.colour_NT] + rng.uniform(-16, 16, (*self.colour_NT.shape, 3))
        covers = _drawings()
        for n, alone in enumerate(self.alone_N.tolist()):
            for t in range(1 if alone else 2):
                left, top = self.at_NT2[n, t]
                cover = covers[self.shape_NT[n, t], self.dice_NT[n, t]][..., None]
                patch = canvas[n, top : top + _THING, left : left + _THING]
                patch += cover * (shade_NT3[n, t] - patch)
        canvas += 5 * rng.standard_normal(canvas.shape, np.float32)
        return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def scenes(seed: int, count: int, *, alone: float = 0.3, split: int = 0) -> Scenes:
    """`count` scenes by one law, the share `alone` with a single thing. Another `split`: other scenes.

    The two things of a scene differ both in colour and in shape.
    """
    rng = np.random.default_rng([seed, split])
    colour_NT = np.stack([rng.permutation(len(COLOURS))[:2] for _ in range(count)])
    shape_NT = np.stack([rng.permutation(len(SHAPES))[:2] for _ in range(count)])
    relation_N = rng.integers(len(RELATIONS), size=count)
    alone_N = rng.random(count) < alone
    ground_N = np.where(rng.random(count) < 0.3, 4.0, rng.uniform(20, 190, count)).astype(np.float32)
    dice_NT = rng.integers(_VARIANTS, size=(count, 2))
    at_NT2 = _places(rng, relation_N, alone_N)
    return Scenes(colour_NT, shape_NT, relation_N, alone_N, at_NT2, ground_N, dice_NT)


def contrasts(seed: int, count: int) -> tuple[Scenes, dict[str, Scenes]]:
    """`count` true scenes of two things, and for each of `CONTRASTS` as many their captions do not fit."""
    true = scenes(seed, count, alone=0.0, split=1)
    rng = np.random.default_rng([seed, 2])
    swap = np.s_[:, ::-1]

    def other(table_NT: np.ndarray, thing: int, kinds: int) -> np.ndarray:
        """Another value for one of the things, unlike both."""
        made_NT = table_NT.copy()
        for row in made_NT:
            row[thing] = rng.choice(np.setdiff1d(np.arange(kinds), row))
        return made_NT

    # of the relations' numbers, the last bit tells a side from the other one, the next the axis
    opposite_N, across_N = true.relation_N ^ 1, true.relation_N ^ 2
    made = {
        "swapped roles": replace(true, relation_N=opposite_N, at_NT2=true.at_NT2[swap]),
        "swapped attributes": replace(true, colour_NT=true.colour_NT[swap]),
        "other subject": replace(true, shape_NT=other(true.shape_NT, 0, len(SHAPES))),
        "other relation": replace(true, relation_N=across_N, at_NT2=true.at_NT2[..., ::-1]),
        "other object": replace(true, shape_NT=other(true.shape_NT, 1, len(SHAPES))),
    }
    return true, made


def _places(rng: np.random.Generator, relation_N: np.ndarray, alone_N: np.ndarray) -> np.ndarray:
    """Left and top of both things: apart along the relation's axis, nearly level across it."""
    count, middle = len(relation_N), (SIDE - _THING) / 2
    step_N2 = np.array([_STEP[name] for name in RELATIONS])[relation_N]
    apart_N1 = rng.uniform(7.0, 9.0, (count, 1))
    common_N2 = rng.uniform(-3, 3, (count, 2)) * (step_N2 == 0)
    at_NT2 = np.stack([middle + common_N2 + sign * apart_N1 * step_N2 for sign in (1, -1)], axis=1)
    at_NT2 += rng.uniform(-1, 1, at_NT2.shape) * (step_N2 == 0)[:, None]
    free_N2 = rng.uniform(0, SIDE - _THING, (count, 2))
    at_NT2[:, 0] = np.where(alone_N[:, None], free_N2, at_NT2[:, 0])
    whole_NT2: np.ndarray = np.clip(np.rint(at_NT2), 0, SIDE - _THING).astype(np.int64)
    return whole_NT2


@lru_cache(maxsize=1)
def _drawings() -> np.ndarray:
    """How much of each pixel a shape covers: float32 (shapes, variants, side, side)."""
    rng, large = np.random.default_rng(0), _THING * _DRAWN_AT
    made = np.zeros((len(SHAPES), _VARIANTS, _THING, _THING), np.float32)
    for kind, name in enumerate(SHAPES):
        for variant in range(_VARIANTS):
            image = Image.new("L", (large, large))
            angle = np.deg2rad(LARGEST_TURN[name] * rng.uniform(-1, 1))
            turn_22 = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            size = rng.uniform(0.42, 0.5)
            points = (OUTLINES[name][0] @ turn_22.T * size + 0.5) * large
            ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=255)
            small = image.resize((_THING, _THING), Image.Resampling.BOX)
            made[kind, variant] = np.asarray(small, np.float32) / 255
    return made


# --------------------------------------------------------------------------------------------------
# Words and towers
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    """One token a word: pieces of words are joined until none is left to join."""
    words = (*COLOURS, *SHAPES, *" ".join(RELATIONS).split())
    return Tokenizer.train([" ".join(words)] * 4, vocab_size=700, context_length=CONTEXT_LENGTH)


def tensors(made: Scenes, seed: int) -> dict[str, torch.Tensor]:
    """All of it as a batch to train on: `image` (N, 3, S, S) from -1 to 1 and `text` (N, L) tokens."""
    image_NCSS = torch.from_numpy(made.draw(seed)).permute(0, 3, 1, 2) / 127.5 - 1
    return {"image": image_NCSS, "text": torch.from_numpy(_tokenizer()(made.captions()))}


def small_model(seed: int) -> Model:
    """An untrained CLIP for these scenes and words, on the CPU: a convolutional stem, one layer a tower."""
    vision = VitConfig(SIDE, patch_size=8, width=64, layers=1, heads=2, stem=((16, 0), (32, 0), (64, 0)))
    text = TextConfig(CONTEXT_LENGTH, _tokenizer().size, width=48, layers=1, heads=2)
    config = ClipConfig(48, vision, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = CLIP(config)
    half = (0.5, 0.5, 0.5)
    recipe = Recipe(size=(SIDE, SIDE), mean=half, std=half, context_length=CONTEXT_LENGTH)
    return Model(
        module,
        config=config.to_json(),
        recipe=recipe,
        tokenizer=_tokenizer(),
        name="two things",
        device="cpu",
    )
