"""The labels of spatio-temporal statistics for clips as they come: with their optical flow, cut and mirrored.

Axis letters: N clips, T frames, F flow maps, H, W pixels, C colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from moviola.clip.preprocess import Preprocess
from moviola.clip.sample import choose_frames
from moviola.data.clip_statistics import DIRECTIONS, FRAMES, NAMES, SIDE, blocks, labels_of
from moviola.data.rows.clips import read_clip
from moviola.media.flow import Method, optical_flow
from moviola.types import FrameSpec, Recipe, UsageError


@dataclass(frozen=True)
class Labeller:
    """Views of clips for training, and the labels of each view.

    side            of the square cut out of a clip at random; it divides by 8
    flow            how the optical flow is computed (`media.flow`)
    flip            chance of mirroring a clip
    cache           clips whose flow is kept in memory, by row: a later epoch then has it at once
    official_strip  see `appearance_statistics`
    official_flip   leave the sign of a mirrored clip's horizontal flow, which is not what its flow would be

    Draws come from torch's global generator, which the training loop seeds.
    """

    side: int = SIDE
    flow: Method = "dis"
    flip: float = 0.5
    cache: int = 0
    official_strip: bool = False
    official_flip: bool = False
    _flows: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        blocks(self.side)  # an impossible side raises here rather than at the first step
        if self.flow not in get_args(Method) or not 0 <= self.flip <= 1 or self.cache < 0:
            raise UsageError(
                f"flow is {' or '.join(get_args(Method))}, flip in [0, 1] and cache not negative, got "
                f"{self.flow!r}, {self.flip} and {self.cache}."
            )

    def __call__(self, rgb_NTHWC: np.ndarray, rows: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """A view of each uint8 clip, (N, T, side, side, C), and its labels (N, 27).

        `rows` are the clips' row numbers, for the cache.
        """
        flow_NF2HW = self.flows(rgb_NTHWC, rows)
        views = [self.view(*both) for both in zip(rgb_NTHWC, flow_NF2HW, strict=True)]
        rgb, flow = (np.stack(part) for part in zip(*views, strict=True))
        return rgb, labels_of(rgb, flow, official_strip=self.official_strip)

    def flows(self, rgb_NTHWC: np.ndarray, rows: Sequence[int] = ()) -> np.ndarray:
        """flow_NF2HW, float32."""
        known = [self._flows.get(row) for row in rows] or [None] * len(rgb_NTHWC)
        lacking = [place for place, flow in enumerate(known) if flow is None]
        with ThreadPoolExecutor() as pool:  # OpenCV works outside Python's lock
            made = pool.map(lambda place: optical_flow(rgb_NTHWC[place], self.flow), lacking)
            for place, flow_F2HW in zip(lacking, made, strict=True):
                known[place] = flow_F2HW
                if rows and len(self._flows) < self.cache:
                    self._flows[rows[place]] = flow_F2HW
        return np.stack([flow for flow in known if flow is not None])

    def view(self, rgb_THWC: np.ndarray, flow_F2HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same square of a clip and of its flow, at times mirrored."""
        room = [size - self.side for size in rgb_THWC.shape[1:3]]
        if min(room) < 0:
            raise UsageError(f"A square of {self.side} pixels cannot be cut from clips {rgb_THWC.shape}.")
        top, left = (int(torch.randint(most + 1, ())) for most in room)
        rows, columns = slice(top, top + self.side), slice(left, left + self.side)
        rgb_THWC, flow_F2HW = rgb_THWC[:, rows, columns], flow_F2HW[..., rows, columns]
        return (
            self.mirrored(rgb_THWC, flow_F2HW) if float(torch.rand(())) < self.flip else (rgb_THWC, flow_F2HW)
        )

    def mirrored(self, rgb_THWC: np.ndarray, flow_F2HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A clip left to right, and its flow: what moved to the right now moves to the left."""
        sign_2 = np.array([1 if self.official_flip else -1, 1], np.float32)
        return rgb_THWC[:, :, ::-1], flow_F2HW[..., ::-1] * sign_2[:, None, None]


# --------------------------------------------------------------------------------------------------
# A clip of a real video
# --------------------------------------------------------------------------------------------------


def statistics_of(
    source: str | Path | np.ndarray, *, side: int = SIDE, frames: int = FRAMES, flow: Method = "dis"
) -> dict[str, int]:
    """The 27 labels by name, of the middle `frames` frames of a video file or of uint8 frames_THWC.

    The short side is scaled to `side` and the middle cut out. `described` says them in words.
    """
    spec = FrameSpec(frames, "consecutive", "refuse")
    ready = Preprocess(
        Recipe((side, side), interpolation="bilinear", mean=(0.0,) * 3, std=(1 / 255,) * 3)  # 0 to 255
    )
    if isinstance(source, np.ndarray):
        index_K, _ = choose_frames(spec, np.arange(len(source)))
        pixels_TCHW = ready.frames(source[index_K])
    else:
        pixels_TCHW = read_clip(Path(source), None, spec, ready)[0]
    rgb_THWC = pixels_TCHW.round().byte().permute(0, 2, 3, 1).numpy()
    labels = labels_of(rgb_THWC[None], optical_flow(rgb_THWC, flow)[None])[0]
    return dict(zip(NAMES, labels.tolist(), strict=True))


_COLOURS = ("blue", "cyan", "magenta", "white", "dark", "green", "red", "yellow")
_TRIANGLES = tuple(
    f"{corner}, by the {edge} edge"
    for corner, edges in (
        ("top left", ("left", "top")),
        ("top right", ("top", "right")),
        ("bottom left", ("left", "bottom")),
        ("bottom right", ("bottom", "right")),
    )
    for edge in edges
)


def described(labels: Mapping[str, int]) -> str:
    """What `statistics_of` found, in words: a line a label."""
    return "\n".join(f"{name + ':':31} {_in_words(name, label)}" for name, label in labels.items())


def _in_words(name: str, label: int) -> str:
    if label == 0:
        return "no motion"
    if name.endswith("frame"):
        return f"{label}"
    if name.endswith("colour"):
        return f"{label}, {_COLOURS[label - 1]}"
    if name.endswith("direction"):
        return f"{label}, the gradient points to {360 // DIRECTIONS * (label - 1)} degrees (90: down)"
    if name.startswith("cells"):
        return f"{label}, row {(label + 3) // 4}, column {(label - 1) % 4 + 1}"
    if name.startswith("rings"):
        return f"{label} of 4 from the centre"
    return f"{label}, {_TRIANGLES[label - 1]}"
