"""What objects of the made world do, as curves over frames, and the words for it.

Open actions come in pairs that are each other seen backwards: moves left and right, grows and
shrinks, and so on. Closed actions end as they began. Both facts keep single frames from giving the
answer away: over a whole clip, "moves left" and "moves right" show the same pictures in another
order, and so do "A, then B" and "B, then A" where A and B are closed actions of two objects.

Progress is linear and every cycle is symmetric in time, so the reversed curve of an action is
exactly a curve of its `backwards` action.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moviola.data.world_shapes import Dice, Rgb

__all__ = ["ACTIONS", "ACTION_WORDS", "SPEEDS", "TURNS", "Action", "Track", "animate"]


@dataclass(frozen=True, slots=True)
class Action:
    """`backwards` names the action seen when time is reversed; `bodies` is 1 or 2."""

    name: str
    backwards: str
    closed: bool = False
    bodies: int = 1


ACTIONS: dict[str, Action] = {
    action.name: action
    for action in (
        Action("moves left", "moves right"),
        Action("moves right", "moves left"),
        Action("moves up", "moves down"),
        Action("moves down", "moves up"),
        Action("grows", "shrinks"),
        Action("shrinks", "grows"),
        Action("rotates clockwise", "rotates anticlockwise"),
        Action("rotates anticlockwise", "rotates clockwise"),
        Action("appears", "disappears"),
        Action("disappears", "appears"),
        Action("approaches", "parts", bodies=2),
        Action("parts", "approaches", bodies=2),
        Action("changes colour", "changes colour"),
        Action("bounces", "bounces", closed=True),
        Action("blinks", "blinks", closed=True),
        Action("pulses", "pulses", closed=True),
        Action("shakes", "shakes", closed=True),
    )
}

SPEEDS: dict[str, tuple[float, float]] = {"slow": (0.12, 0.2), "medium": (0.28, 0.4), "fast": (0.55, 0.8)}
"""Picture widths per second; turning uses `TURNS` degrees per second for the same words."""
TURNS: dict[str, tuple[float, float]] = {"slow": (45, 70), "medium": (100, 140), "fast": (190, 235)}
LARGEST_STEP = 30.0  # degrees per frame: less than half of any shape's symmetry, so the sense can be seen

# name -> ((finite, participle), ...) for training, then for held-out wording.
Phrases = tuple[tuple[str, str], ...]
ACTION_WORDS: dict[str, tuple[Phrases, Phrases]] = {
    **{
        f"moves {way}": (
            (
                (f"moves {way}", f"moving {way}"),
                (f"moves to the {side}", f"moving to the {side}"),
                (f"slides {way}", f"sliding {way}"),
                (f"travels {way}ward", f"travelling {way}ward"),
            ),
            ((f"goes {way}", f"going {way}"), (f"heads for the {side} side", f"heading for the {side} side")),
        )
        for way, side in (("left", "left"), ("right", "right"), ("up", "top"), ("down", "bottom"))
    },
    "grows": (
        (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
        (("gets larger", "getting larger"), ("becomes bigger", "becoming bigger")),
    ),
    "shrinks": (
        (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes tiny", "becoming tiny")),
        (("becomes smaller", "becoming smaller"), ("gets tiny", "getting tiny")),
    ),
    **{
        f"rotates {sense}": (
            (
                (f"rotates {sense}", f"rotating {sense}"),
                (f"turns {sense}", f"turning {sense}"),
                (f"spins around {sense}", f"spinning around {sense}"),
            ),
            ((f"goes around {sense}", f"going around {sense}"), (f"spins {sense}", f"spinning {sense}")),
        )
        for sense in ("clockwise", "anticlockwise")
    },
    "appears": (
        (("appears", "appearing"), ("shows up", "showing up"), ("fades in", "fading in")),
        (("comes in", "coming in"), ("comes up", "coming up")),
    ),
    "disappears": (
        (("disappears", "disappearing"), ("goes away", "going away"), ("fades out", "fading out")),
        (("goes out of the picture", "going out of the picture"), ("fades away", "fading away")),
    ),
    "approaches": (
        (
            ("moves towards {other}", "moving towards {other}"),
            ("approaches {other}", "approaching {other}"),
            ("comes closer to {other}", "coming closer to {other}"),
            ("heads for {other}", "heading for {other}"),
        ),
        (
            ("goes towards {other}", "going towards {other}"),
            ("gets closer to {other}", "getting closer to {other}"),
        ),
    ),
    "parts": (
        (
            ("moves away from {other}", "moving away from {other}"),
            ("leaves {other}", "leaving {other}"),
            ("goes farther from {other}", "going farther from {other}"),
        ),
        (
            ("slides away from {other}", "sliding away from {other}"),
            ("gets farther from {other}", "getting farther from {other}"),
        ),
    ),
    "changes colour": (
        (
            ("changes colour from {old} to {new}", "changing colour from {old} to {new}"),
            ("changes color from {old} to {new}", "changing color from {old} to {new}"),
            ("turns from {old} to {new}", "turning from {old} to {new}"),
            ("turns {new} after being {old}", "turning {new} after being {old}"),
        ),
        (
            ("goes from {old} to {new}", "going from {old} to {new}"),
            ("becomes {new} after being {old}", "becoming {new} after being {old}"),
        ),
    ),
    "bounces": (
        (
            ("bounces", "bouncing"),
            ("jumps up and down", "jumping up and down"),
            ("bounces in place", "bouncing in place"),
        ),
        (("bounces up and down", "bouncing up and down"), ("jumps in place", "jumping in place")),
    ),
    "blinks": (
        (
            ("blinks", "blinking"),
            ("flashes on and off", "flashing on and off"),
            ("comes and goes", "coming and going"),
        ),
        (("blinks on and off", "blinking on and off"),),
    ),
    "pulses": (
        (("pulses", "pulsing"), ("grows and shrinks", "growing and shrinking")),
        (("gets bigger and smaller", "getting bigger and smaller"),),
    ),
    "shakes": (
        (("shakes", "shaking"), ("moves from side to side", "moving from side to side")),
        (("slides from side to side", "sliding from side to side"),),
    ),
}
SPEED_WORDS = {"slow": ("slowly",), "fast": ("quickly", "fast")}


@dataclass(slots=True)
class Track:
    """One object over time: offsets in picture widths from a base place that is chosen afterwards."""

    x_T: np.ndarray
    y_T: np.ndarray
    scale_T: np.ndarray
    angle_T: np.ndarray
    opacity_T: np.ndarray
    colour_T3: np.ndarray | None = None

    @classmethod
    def still(cls, frames: int) -> Track:
        zeros = np.zeros(frames)
        return cls(zeros.copy(), zeros.copy(), zeros + 1, zeros.copy(), zeros + 1)


def event_frames(name: str, speed: str, rate: float, room: int, dice: Dice) -> tuple[int, float]:
    """How many frame steps an action takes within `room`, and its pace (widths or degrees a second)."""
    if name.startswith("moves"):
        pace = dice.uniform(*SPEEDS[speed])
        longest = max(3, min(room, int(0.55 / pace * rate)))
        shortest = min(longest, max(3, int(0.25 / pace * rate)))
    elif name.startswith("rotates"):
        pace = min(dice.uniform(*TURNS[speed]), LARGEST_STEP * rate)
        shortest, longest = min(room, max(3, round(0.6 * rate))), room
    elif name in ("appears", "disappears"):
        pace, longest = 0.0, max(2, min(room, round(0.6 * rate)))
        shortest = min(2, longest)
    else:
        pace, shortest, longest = 0.0, min(room, max(4, round(0.6 * rate))), room
    return min(room, shortest + dice.below(longest - shortest + 1)), pace


def animate(
    track: Track, name: str, start: int, end: int, rate: float, pace: float, dice: Dice,
    colours: tuple[Rgb, Rgb] | None = None,
) -> None:  # fmt: skip
    """Add an action between frames `start` and `end` to a track, in place.

    At frame `start` the object is still as before and at `end` it has arrived; both rest outside.
    """
    frames = len(track.x_T)
    progress_T = np.clip((np.arange(frames) - start) / (end - start), 0.0, 1.0)
    seconds = (end - start) / rate
    if name.startswith("moves"):
        travel = min(pace * seconds, 0.55)
        axis = track.x_T if name.endswith(("left", "right")) else track.y_T
        axis += (-travel if name.endswith(("left", "up")) else travel) * progress_T
    elif name.startswith("rotates"):
        track.angle_T += (1 if name.endswith(" clockwise") else -1) * pace * seconds * progress_T
    elif name in ("grows", "shrinks"):
        ratio = dice.uniform(1.8, 2.6)
        track.scale_T *= ratio ** (progress_T if name == "grows" else 1 - progress_T)
    elif name in ("appears", "disappears"):
        track.opacity_T *= progress_T if name == "appears" else 1 - progress_T
    elif name == "changes colour":
        if colours is None:
            raise ValueError("a change of colour needs the two colours")
        old, new = (np.array(c, dtype=float) for c in colours)
        track.colour_T3 = old + (new - old) * progress_T[:, None]
    elif name not in ACTIONS or not ACTIONS[name].closed:
        raise ValueError(f"{name} is not an action of one body")
    else:
        _cycle(track, name, progress_T, end - start, rate, dice)


def _cycle(track: Track, name: str, progress_T: np.ndarray, steps: int, rate: float, dice: Dice) -> None:
    """Whole cycles of about 1.4 a second, four frames or more each, alike in both directions of time."""
    cycles = max(1, min(steps // 4, round(dice.uniform(1.1, 1.7) * steps / rate)))
    swing_T = np.sin(np.pi * cycles * progress_T)
    if name == "bounces":
        track.y_T -= dice.uniform(0.1, 0.2) * np.abs(swing_T)
    elif name == "pulses":
        track.scale_T *= 1 + dice.uniform(0.35, 0.6) * swing_T**2
    elif name == "shakes":
        side = 1 if dice.chance(0.5) else -1
        track.x_T += side * dice.uniform(0.06, 0.12) * np.sin(2 * np.pi * cycles * progress_T)
    else:  # blinks
        track.opacity_T *= np.where(np.abs(swing_T) > 0.75, 0.0, 1.0)
