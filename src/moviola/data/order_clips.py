"""Clips whose action is told by the order of their frames alone, and by nothing a single frame shows.

One shape does one of eight actions, four pairs that are each other seen backwards: it moves left or
right, moves up or down, grows or shrinks, comes or goes (fades). The path is drawn first and the direction
after it, so the frames of "moves left" are, as a bag, distributed exactly as those of "moves right":
which of a pair it is cannot be told from frames whose order is lost. Test clips have colours, shapes and
speeds that no training clip has. `combined` clips do two actions at once ("grows while moving left"), for
zero-shot tests with words that were only met apart.

Made in bulk (a thousand clips of 8 frames in about a second) and seeded: equal arguments, equal clips.

Axis letters: N clips, T frames, S side in pixels, C classes, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.model import CLIP
from moviola.data.word_tokens import word_tokens
from moviola.data.world_shapes import COLOURS, OUTLINES
from moviola.types import ClipBatch, UsageError

PAIRS = (
    ("moves left", "moves right"),
    ("moves up", "moves down"),
    ("grows", "shrinks"),
    ("comes", "goes"),
)
ACTIONS = tuple(name for pair in PAIRS for name in pair)
"""Action 2p and 2p + 1 are each other seen backwards."""
COMBINED = tuple(f"{size} while {move}" for size in PAIRS[2] for move in PAIRS[0] + PAIRS[1])
"""Two actions at once; number 4a + b of `PAIRS[2][a]` and the b-th of the four moves."""
SIDE, FRAMES, CONTEXT_LENGTH, END_OF_TEXT = 32, 8, 12, 1

Split = Literal["train", "test"]
SEEN: dict[str, dict[Split, tuple[str, ...]]] = {
    "colours": {"train": ("red", "green", "blue", "yellow"), "test": ("orange", "purple", "pink")},
    "shapes": {"train": ("square", "triangle", "cross", "ring"), "test": ("circle", "star", "diamond")},
}
_PATH: dict[Split, tuple[tuple[float, float], ...]] = {
    "train": ((0.24, 0.36), (0.52, 0.62)),  # slow and fast: how much of the way is gone in the clip
    "test": ((0.40, 0.48),),
}
_DRAWN_AT = 3


@dataclass(frozen=True)
class OrderClips:
    """frames_NTSS3 uint8; label_N into `ACTIONS` (or `COMBINED`); what each shows (`colour shape`).

    state_NT4: where the thing is in each frame (x, y as shares of the side), its radius and opacity.
    """

    frames_NTSS3: np.ndarray
    label_N: np.ndarray
    things: tuple[str, ...]
    state_NT4: np.ndarray
    classes: tuple[str, ...] = ACTIONS

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def captions(self) -> list[str]:
        return [
            f"a {thing} {self.classes[label]}" for thing, label in zip(self.things, self.label_N.tolist())
        ]

    def frame_caption(self, row: int, frame: int) -> str:
        """What one frame shows: "a small pale red ring at the top left"."""
        x, y, radius, shown = self.state_NT4[row, frame].tolist()
        size = "small " if radius < 0.17 else "large " if radius > 0.25 else ""
        pale = "pale " if shown < 0.55 else ""
        place = f"{_third(y, ('top', 'centre', 'bottom'))} {_third(x, ('left', 'middle', 'right'))}"
        return f"a {size}{pale}{self.things[row]} at the {place}"

    def pixels(self, rows: Sequence[int] | np.ndarray | Tensor | None = None) -> Tensor:
        """frames_NTCSS float32 from -1 to 1, of some rows."""
        frames = self.frames_NTSS3 if rows is None else self.frames_NTSS3[np.asarray(rows)]
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3) / 127.5 - 1

    def batch(self, rows: Sequence[int] | np.ndarray | Tensor | None = None) -> ClipBatch:
        """The clips as a video model takes them, a frame every eighth of a second."""
        return clip_batch(self.pixels(rows))

    def labelled(self, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Any]:
        """Some clips and their labels, as objectives of recognition take them."""
        return {"clip": self.batch(rows), "label": torch.from_numpy(self.label_N[np.asarray(rows)])}

    def shuffled(self, seed: int) -> OrderClips:
        """The same clips, the frames of each in a drawn order: the control that must be at chance."""
        rng = np.random.default_rng([seed, 7])
        count, frames = self.frames_NTSS3.shape[:2]
        order_NT = rng.permuted(np.tile(np.arange(frames), (count, 1)), axis=1)
        mixed = np.take_along_axis(self.frames_NTSS3, order_NT[:, :, None, None, None], axis=1)
        states = np.take_along_axis(self.state_NT4, order_NT[:, :, None], axis=1)
        return OrderClips(mixed, self.label_N, self.things, states, self.classes)


def _third(place: float, names: tuple[str, str, str]) -> str:
    return names[0 if place < 0.4 else 2 if place > 0.6 else 1]


def clip_batch(frames_NTCSS: Tensor) -> ClipBatch:
    count, frames = frames_NTCSS.shape[:2]
    times_T = torch.arange(frames) / 8
    return ClipBatch(frames_NTCSS, times_T.expand(count, -1), torch.ones(count, frames, dtype=torch.bool))


def order_clips(
    seed: int,
    count: int,
    *,
    split: Split = "train",
    frames: int = FRAMES,
    actions: Sequence[str] = ACTIONS,
    combined: bool = False,
) -> OrderClips:
    """`count` clips, every class as often. Test clips share no colour, shape or speed with training clips."""
    classes = COMBINED if combined else ACTIONS
    chosen = [classes.index(name) for name in (classes if combined else actions)]
    if count < 1 or frames < 2 or not chosen:
        raise UsageError(f"There must be clips of two frames or more, got {count} of {frames}.")
    rng = np.random.default_rng([seed, int(split == "test"), int(combined)])
    label_N = rng.permutation(np.resize(chosen, count))
    made = np.empty((count, frames, SIDE, SIDE, 3), np.uint8)
    states = np.empty((count, frames, 4), np.float32)
    things = []
    for row, label in enumerate(label_N.tolist()):
        colour, shape = (str(rng.choice(SEEN[kind][split])) for kind in ("colours", "shapes"))
        things.append(f"{colour} {shape}")
        states[row] = _states(rng, label, split, frames, combined)
        made[row] = _draw(rng, colour, shape, states[row])
    return OrderClips(made, label_N, tuple(things), states, classes)


def _states(rng: np.random.Generator, label: int, split: Split, frames: int, combined: bool) -> np.ndarray:
    """x, y, radius and opacity in each frame: a path drawn without its direction, then run one way."""
    pace = _PATH[split][rng.integers(len(_PATH[split]))]
    length = rng.uniform(*pace)
    way_T = length * np.linspace(0, 1, frames)
    start = rng.uniform(0.17, 0.83 - length)
    x_T, y_T = (np.full(frames, place) for place in rng.uniform(0.28, 0.72, 2))
    radius_T, shown_T = np.full(frames, rng.uniform(0.17, 0.25)), np.ones(frames)
    # what changes, and whether it does so backwards
    size, move = divmod(label, 4) if combined else (label - 4, label)
    if 0 <= size < 2:
        radius_T = rng.uniform(0.10, 0.13) + 0.4 * way_T
        radius_T = radius_T[::-1] if size == 1 else radius_T
    if move < 2:
        x_T = start + way_T
        x_T = x_T[::-1] if move == 0 else x_T
    elif move < 4:
        y_T = start + way_T
        y_T = y_T[::-1] if move == 2 else y_T
    elif label >= 6:
        shown_T = rng.uniform(0.1, 0.25) + 1.2 * way_T
        shown_T = shown_T[::-1] if label == 7 else shown_T
    return np.stack([x_T, y_T, radius_T, shown_T], axis=1)


def _draw(rng: np.random.Generator, colour: str, shape: str, state_T4: np.ndarray) -> np.ndarray:
    """frames_TSS3 of one clip."""
    ground_3 = rng.uniform(110, 150) + rng.uniform(-12, 12, 3)
    shade_3 = np.clip(np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3), 0, 255)
    turn = rng.uniform(-0.4, 0.4)
    covers = [_cover(shape, x, y, radius, turn) * shown for x, y, radius, shown in state_T4]
    made = ground_3 + np.stack(covers)[..., None] * (shade_3 - ground_3)
    made += rng.normal(0, 4, made.shape)
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


def _cover(shape: str, x: float, y: float, radius: float, turn: float) -> np.ndarray:
    large = SIDE * _DRAWN_AT
    image = Image.new("L", (large, large))
    pen = ImageDraw.Draw(image)
    outline, hole = OUTLINES[shape][:2]
    cos, sin = np.cos(turn), np.sin(turn)
    turn_22 = np.array([[cos, -sin], [sin, cos]])
    for points, fill in ((outline, 255), (hole, 0)):
        if points is not None:
            places = (points @ turn_22.T * radius + (x, y)) * large
            pen.polygon([(float(a), float(b)) for a, b in places], fill=fill)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) / 255


# --------------------------------------------------------------------------------------------------
# Words, a small CLIP, and the measure
# --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _word_numbers() -> dict[str, int]:
    things = [name for kind in SEEN.values() for names in kind.values() for name in names]
    places = "a picture of a clip small large pale at the top centre bottom left middle right"
    words = {word for text in (*ACTIONS, *COMBINED, *things, places) for word in text.split()}
    return {word: number for number, word in enumerate(sorted(words), start=2)}


def vocabulary_size() -> int:
    return len(_word_numbers()) + 2


def tokens(texts: Sequence[str]) -> Tensor:
    """tokens_NL int64, one a word."""
    made_NL = word_tokens(texts, _word_numbers(), CONTEXT_LENGTH, world="Order clips have", end=END_OF_TEXT)
    return torch.from_numpy(made_NL)


def clip_config(width: int = 64, layers: int = 2) -> ClipConfig:
    """A small CLIP for these clips: a convolutional stem, and patches of 8 pixels, so 16 of them a frame."""
    vision = VitConfig(SIDE, 8, width=width, layers=layers, heads=width // 32, stem=((16, 0), (32, 0)))
    text = TextConfig(CONTEXT_LENGTH, vocabulary_size(), width=48, layers=1, heads=2, eot_id=END_OF_TEXT)
    return ClipConfig(48, vision, text)


@lru_cache(maxsize=4)
def image_clip(seed: int, *, steps: int = 300, width: int = 64, layers: int = 2) -> CLIP:
    """A CLIP that learned single frames from captions such as "a small red ring at the top left".

    The image model that all arms of a claim begin with: it knows what is where, and no actions. Take a
    copy before you change it.
    """
    from moviola.training.brief import fit
    from moviola.training.objectives import Contrastive

    clips = order_clips(seed + 1000, 1200)
    rng = np.random.default_rng([seed, 9])
    frame_N = rng.integers(clips.frames_NTSS3.shape[1], size=len(clips))
    data = {
        "image": clips.pixels()[torch.arange(len(clips)), torch.from_numpy(frame_N)],
        "text": tokens([clips.frame_caption(row, frame) for row, frame in enumerate(frame_N.tolist())]),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(clip_config(width, layers))
        fit(model, Contrastive(), data, steps=steps, batch=96, lr=2e-3, seed=seed)
    return model.eval()


def pair_accuracy(scores_NC: np.ndarray | Tensor, label_N: np.ndarray) -> float:
    """How often, in percent, an action scores above the one it is backwards (of `ACTIONS`; chance is 50)."""
    scores = np.asarray(scores_NC)
    rows = np.arange(len(label_N))
    own, other = scores[rows, label_N], scores[rows, label_N ^ 1]
    return float(((own > other) + 0.5 * (own == other)).mean() * 100)
