"""What is heard and what is said in made clips: short sounds, and subtitles as bad as real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moviola.data.world_shapes import Dice
from moviola.types import TimeSpan

__all__ = ["SOUNDS", "SOUND_RATE", "Line", "soundtrack", "talk"]

SOUND_RATE = 16_000
SOUNDS: tuple[str, ...] = ("beep", "buzz", "chirp", "click", "hum", "whistle", "hiss", "siren")


@dataclass(frozen=True, slots=True)
class Line:
    """One subtitle: when it is shown and what it says, which need not be when or what happens."""

    span: TimeSpan
    text: str


def _voice(name: str, samples: int, pitch: float, dice: Dice) -> np.ndarray:
    """`samples` of a named sound at 16 kHz, peak about 1; `pitch` is a factor near 1."""
    t = np.arange(samples) / SOUND_RATE
    if name == "beep":
        return np.sin(2 * np.pi * 880 * pitch * t) * (t % 0.3 < 0.15)
    if name == "buzz":
        return np.sign(np.sin(2 * np.pi * 120 * pitch * t)) * 0.7
    if name == "chirp":
        return np.sin(2 * np.pi * (1500 + 1500 * pitch * (t % 0.2) / 0.2) * (t % 0.2))
    if name == "click":
        return np.exp(-((t % 0.125) * 400)) * np.cos(2 * np.pi * 2200 * pitch * t)
    if name == "hum":
        return 0.7 * np.sin(2 * np.pi * 150 * pitch * t) + 0.3 * np.sin(2 * np.pi * 300 * pitch * t)
    if name == "whistle":
        return np.sin(2 * np.pi * 2300 * pitch * t + 3 * np.sin(2 * np.pi * 6 * t))
    if name == "hiss":
        return dice.rng.standard_normal(samples) * 0.35
    return np.sin(2 * np.pi * 700 * pitch * t - 140 * np.cos(2 * np.pi * 1.5 * t))  # siren


def soundtrack(heard: Sequence[tuple[TimeSpan, str]], duration: float, dice: Dice) -> np.ndarray:
    """Mono float32 at 16 kHz: each named sound within its span over a faint bed of noise."""
    made = dice.rng.standard_normal(round(duration * SOUND_RATE)) * dice.uniform(0.001, 0.006)
    for span, name in heard:
        start, end = round(span.start * SOUND_RATE), min(len(made), round(span.end * SOUND_RATE))
        if end <= start:
            continue
        voice = _voice(name, end - start, dice.uniform(0.85, 1.18), dice)
        fade = np.minimum(1, np.minimum(np.arange(end - start), np.arange(end - start)[::-1]) / 160)
        made[start:end] += dice.uniform(0.2, 0.45) * voice * fade
    return np.clip(made, -1, 1).astype(np.float32)


_OPENINGS = ("", "", "so ", "okay, ", "now look, ", "as you can see ", "and here ", "well, you know, ")
_CHATTER = (
    "welcome back everybody",
    "don't forget to subscribe",
    "i had a great time making this",
    "let me know what you think below",
    "hold on a second",
    "anyway, where was i",
    "this is my favourite part",
    "thanks for watching",
)


def talk(
    told: Sequence[tuple[TimeSpan, str]],
    wrong: Sequence[str],
    duration: float,
    dice: Dice,
    *,
    shift: float = 1.0,
) -> tuple[Line, ...]:
    """Subtitles for told events: shifted by up to `shift` seconds, stretched, with lost words, chatter,
    one in eight left out, and one in eight saying something false (taken from `wrong`)."""
    lines = []
    for span, sentence in told:
        if dice.chance(0.125):
            continue
        text = dice.pick(wrong) if wrong and dice.chance(0.125) else sentence
        words = text.split()
        if len(words) > 4 and dice.chance(0.3):
            del words[dice.below(len(words))]
        start = min(max(0.0, span.start + dice.uniform(-shift, shift)), max(0.0, duration - 0.4))
        end = min(duration, start + max(0.4, span.duration * dice.uniform(0.6, 1.3)))
        lines.append(Line(TimeSpan(round(start, 3), round(end, 3)), dice.pick(_OPENINGS) + " ".join(words)))
    for _ in range(dice.below(3)):
        start = dice.uniform(0, max(0.0, duration - 0.5))
        end = min(duration, start + dice.uniform(0.5, 2.0))
        lines.append(Line(TimeSpan(round(start, 3), round(end, 3)), dice.pick(_CHATTER)))
    return tuple(sorted(lines, key=lambda line: line.span))
