"""Filming the made world: bodies with tracks, where they stand, the drawing of frames, and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from moviola.data import world_draw as draw
from moviola.data.world_actions import Track
from moviola.data.world_scene import (
    Photo,
    Thing,
    in_thirds,
    roll_angle,
    roll_look,
    roll_texture,
    split_photo,
    stamp,
)
from moviola.data.world_shapes import SIZES, Dice
from moviola.types import TimeSpan

__all__ = [
    "ANOMALIES",
    "Anomaly",
    "Body",
    "arrange",
    "bounds",
    "film",
    "make_body",
    "roll_spans",
    "settle",
    "spoil",
]

ANOMALIES: tuple[str, ...] = ("blackout", "flash", "static", "inverted", "rolled")
_HIDING = ("blackout", "flash", "static")


@dataclass(frozen=True, slots=True)
class Anomaly:
    """Frames that do not belong: whole-frame faults, planted in `span`."""

    span: TimeSpan
    kind: str


@dataclass(slots=True)
class Body:
    """An object being made: how it looks, its track, where it stands, and its pixels' radius and turn."""

    look: draw.Look
    thing: Thing
    track: Track
    radius: float
    angle: float
    group: int
    x: float = 0.0
    y: float = 0.0


def make_body(
    dice: Dice, side: int, shape: str, colour: str, group: int, frames: int, actions: Sequence[str],
    named: Sequence[Photo] = (),
) -> Body:  # fmt: skip
    """An object fit for what it will do: small if it grows, no facing if it turns, and so on."""
    scaled = any(a in ("grows", "shrinks") for a in actions)
    turned = any(a.startswith("rotates") for a in actions)
    busy = any(a in ("approaches", "parts", "shakes", "bounces") or a.startswith("moves") for a in actions)
    size = "small" if scaled or (len(actions) > 1 and busy) else dice.pick(("small", "medium"))
    texture = roll_texture(dice)
    radius = dice.uniform(*SIZES[size]) * side
    angle, facing = roll_angle(dice, shape)
    look = roll_look(dice, shape, colour, "plain" if "changes colour" in actions else texture)
    if "changes colour" in actions:
        look = replace(look, rim=None)  # a rim made from one of the two colours would tell which came first
    photo = None
    if named and not turned and "changes colour" not in actions and dice.chance(0.35):
        image, photo = split_photo(dice.pick(named))
        look, shape, colour, facing, angle = (
            draw.Look("photo", (0, 0, 0), (0, 0, 0), photo=image),
            "photo",
            "",
            None,
            0.0,
        )
    if turned:
        angle, facing = dice.uniform(0, 360), None
    thing = Thing(
        shape,
        colour,
        "medium" if scaled else size,
        look.texture,
        0,
        0,
        radius,
        angle,
        (1, 1),
        (0, 0, 0, 0),
        facing,
        photo,
    )
    return Body(look, thing, Track.still(frames), radius, angle, group)


def roll_spans(lengths: Sequence[int], frames: int, dice: Dice, gap: int = 1) -> list[tuple[int, int]]:
    """Places for events in order, `gap` steps apart or more; the slack is shared out evenly at random,
    so that the spans seen backwards are distributed alike."""
    slack = frames - 1 - sum(lengths) - gap * (len(lengths) - 1)
    cuts = sorted(dice.below(slack + 1) for _ in lengths)
    spans, at = [], 0
    for k, (length, cut) in enumerate(zip(lengths, cuts)):
        start = at + cut + gap * k
        spans.append((start, start + length))
        at += length
    return spans


def arrange(bodies: Sequence[Body], size: int, dice: Dice) -> None:
    """Choose where groups of objects stand so that all stay in view and, if it can be, apart."""
    groups = sorted({body.group for body in bodies})
    reach = {}
    for group in groups:
        members = [b for b in bodies if b.group == group]
        sides = []
        for axis in ("x_T", "y_T"):
            offsets = [getattr(b.track, axis) * size for b in members]
            rims = [b.radius * b.track.scale_T for b in members]
            low = max(float((r - o).max()) for o, r in zip(offsets, rims))
            high = min(float((size - r - o).min()) for o, r in zip(offsets, rims))
            sides.append((low, high) if low <= high else ((low + high) / 2, (low + high) / 2))
        reach[group] = sides
    for _ in range(40):
        base = {g: (dice.uniform(*sides[0]), dice.uniform(*sides[1])) for g, sides in reach.items()}
        for body in bodies:
            body.x, body.y = base[body.group]
        if not any(_meet(a, b, size) for i, a in enumerate(bodies) for b in bodies[:i] if a.group != b.group):
            return


def _meet(a: Body, b: Body, size: int) -> bool:
    dx = a.x - b.x + (a.track.x_T - b.track.x_T) * size
    dy = a.y - b.y + (a.track.y_T - b.track.y_T) * size
    room = a.radius * a.track.scale_T + b.radius * b.track.scale_T
    return bool((dx * dx + dy * dy < room * room).any())


def film(
    bodies: Sequence[Body],
    scenes: Sequence[tuple[int, draw.SceneryLook, tuple[float, float]]],
    frames: int,
    size: int,
) -> tuple[list[Image.Image], np.ndarray]:
    """Draw all frames. `scenes`: first frame, ground and drift per frame of each shot."""
    canvases = []
    masks_KTHW = np.zeros((len(bodies), frames, size, size), dtype=bool)
    shot = -1
    for t in range(frames):
        while shot + 1 < len(scenes) and scenes[shot + 1][0] <= t:
            shot += 1
            first, look, drift = scenes[shot]
            ground = draw.scenery(look, size)
        if drift != (0.0, 0.0):
            ground = draw.scenery(look, size, (drift[0] * (t - first), drift[1] * (t - first)))
        canvas = ground.copy()
        for k in reversed(range(len(bodies))):  # the first object is on top
            body, track = bodies[k], bodies[k].track
            opacity = float(track.opacity_T[t])
            if opacity <= 0:
                continue
            seen = body.look
            if track.colour_T3 is not None:
                seen = replace(seen, colour=tuple(round(v) for v in track.colour_T3[t].tolist()))
            patch, left, top = draw.paint(
                canvas,
                seen,
                body.x + float(track.x_T[t]) * size,
                body.y + float(track.y_T[t]) * size,
                body.radius * float(track.scale_T[t]),
                body.angle + float(track.angle_T[t]),
                opacity,
            )
            mark = stamp(patch, left, top, size)
            masks_KTHW[k + 1 :, t] &= ~mark
            masks_KTHW[k, t] = mark
        canvases.append(canvas)
    return canvases, masks_KTHW


def bounds(masks_KTHW: np.ndarray) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) around masks, NaN where a mask is empty."""
    made = np.full((*masks_KTHW.shape[:2], 4), np.nan)
    for at, axis in ((0, 2), (1, 3)):
        lines: np.ndarray = np.any(masks_KTHW, axis=axis)  # the columns, then the rows, that hold something
        first, last = lines.argmax(-1), lines.shape[-1] - lines[..., ::-1].argmax(-1)
        seen: np.ndarray = np.any(lines, axis=-1)
        made[..., at][seen] = first[seen]
        made[..., at + 2][seen] = last[seen]
    return made


def settle(body: Body, size: int) -> Thing:
    """The object's description with its place where it is first visible."""
    t = int((body.track.opacity_T > 0).argmax())
    x, y = body.x + float(body.track.x_T[t]) * size, body.y + float(body.track.y_T[t]) * size
    radius = body.radius * float(body.track.scale_T[t])
    box = (x - radius, y - radius, x + radius, y + radius)
    return replace(body.thing, x=x, y=y, radius=radius, place=in_thirds(x, y, size), box=box)


def spoil(
    frames_THWC: np.ndarray, masks_KTHW: np.ndarray, rate: float, count: int, dice: Dice
) -> tuple[Anomaly, ...]:
    """Plant `count` whole-frame faults in place, apart from each other."""
    total = len(frames_THWC)
    length = max(1, min(round(dice.uniform(0.15, 0.5) * rate), total // (2 * count)))
    made = []
    for start, end in roll_spans(
        [length] * count, total + 1, dice, gap=1 if total > (length + 1) * count else 0
    ):
        kind = dice.pick(ANOMALIES)
        part = slice(start, end)
        if kind == "blackout":
            frames_THWC[part] = dice.below(8)
        elif kind == "flash":
            frames_THWC[part] = 255 - dice.below(8)
        elif kind == "static":
            frames_THWC[part] = dice.rng.integers(0, 256, frames_THWC[part].shape, dtype=np.uint8)
        elif kind == "inverted":
            frames_THWC[part] = 255 - frames_THWC[part]
        else:
            by = round(frames_THWC.shape[1] * dice.uniform(0.3, 0.7))
            frames_THWC[part] = np.roll(frames_THWC[part], by, axis=1)
            masks_KTHW[:, part] = np.roll(masks_KTHW[:, part], by, axis=2)
        if kind in _HIDING:
            masks_KTHW[:, part] = False
        made.append(Anomaly(TimeSpan(start / rate, end / rate), kind))
    return tuple(made)
