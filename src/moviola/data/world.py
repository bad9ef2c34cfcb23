"""The made world: a seeded generator of pictures and short videos with the whole truth about them.

    picture(seed, index)        one still scene with captions in two wordings
    clip(seed, index)           a short video of one or several events
    long_video(seed, index)     planted moments among shots where other things happen
    write(clip, path)           the same as a real .mp4, with a JSON file of truths beside it

Every item depends only on (seed, index) and the settings, so any of them can be made alone, in any
order and in any process. Nothing learned here is reported as a result on real data.

Why it does not give its answers away: actions that differ only in direction are each other's
mirror in time, so over a clip they show the same pictures; and in clips that tell "A, then B" from
"B, then A" (`WorldConfig.order`), both actions end as they began. A single frame at a known time
still says something (what moves left is more often on the right at the start), as it must.

The parts: `world_shapes` (dice, colours, shapes), `world_draw` (rendering), `world_scene`
(pictures), `world_actions` (motion and its words), `world_film` and `world_clip` (clips),
`world_long` (long videos), `world_text` and `world_story` (captions), `world_sound`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moviola.data.world_actions import ACTION_WORDS, ACTIONS, SPEEDS
from moviola.data.world_clip import MadeClip, Shot, WorldConfig, clip
from moviola.data.world_draw import GROUNDS, TEXTURES
from moviola.data.world_film import ANOMALIES, Anomaly
from moviola.data.world_long import LONG_ACTIONS, long_video
from moviola.data.world_scene import Ground, Photo, Scene, Thing, picture
from moviola.data.world_shapes import COLOURS, SHAPES
from moviola.data.world_sound import SOUND_RATE, SOUNDS, Line
from moviola.data.world_story import HELD_OUT_TEMPLATES as HELD_OUT_CLIP_TEMPLATES
from moviola.data.world_story import TRAIN_TEMPLATES as TRAIN_CLIP_TEMPLATES
from moviola.data.world_story import Event, opposite, story
from moviola.data.world_text import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, caption
from moviola.types import TimeSpan

__all__ = [
    "ACTIONS",
    "ACTION_WORDS",
    "ANOMALIES",
    "COLOURS",
    "GROUNDS",
    "HELD_OUT_CLIP_TEMPLATES",
    "HELD_OUT_TEMPLATES",
    "LONG_ACTIONS",
    "SHAPES",
    "SOUNDS",
    "SOUND_RATE",
    "SPEEDS",
    "TEXTURES",
    "TRAIN_CLIP_TEMPLATES",
    "TRAIN_TEMPLATES",
    "Anomaly",
    "Event",
    "Ground",
    "Line",
    "MadeClip",
    "Photo",
    "Scene",
    "Shot",
    "Thing",
    "WorldConfig",
    "caption",
    "clip",
    "long_video",
    "opposite",
    "picture",
    "story",
    "truths",
    "write",
]


def truths(made: MadeClip) -> dict[str, Any]:
    """What is true of a clip as plain JSON values: all but pixels, masks and sound.

    Spans are [start, end] in seconds; `boxes` are per object, per frame, xyxy pixels or null.
    """

    def span(value: TimeSpan) -> list[float]:
        return [round(value.start, 4), round(value.end, 4)]

    return {
        "rate": made.rate,
        "duration": made.duration,
        "short": list(made.short),
        "held_out": list(made.held_out),
        "opposites": list(made.opposites),
        "long": made.long,
        "events": [
            {
                "span": span(event.span),
                "action": event.action,
                "objects": list(event.objects),
                "speed": event.speed,
                "colours": None if event.colours is None else list(event.colours),
                "sound": event.sound,
                "captions": list(event.captions),
                "held_out": list(event.held_out),
            }
            for event in made.events
        ],
        "objects": [
            {
                "shape": thing.shape,
                "colour": thing.colour or None,
                "size": thing.size,
                "texture": thing.texture,
                "facing": thing.facing,
                "photo": thing.photo,
            }
            for thing in made.objects
        ],
        "shots": [
            {"span": span(shot.span), "ground": shot.ground.kind, "colours": list(shot.ground.colours)}
            for shot in made.shots
        ],
        "boxes": [
            [None if np.isnan(box).any() else box.tolist() for box in boxes_T4] for boxes_T4 in made.boxes_KT4
        ],
        "heard": [{"span": span(when), "sound": name} for when, name in made.heard],
        "subtitles": [{"span": span(line.span), "text": line.text} for line in made.subtitles],
        "anomalies": [{"span": span(fault.span), "kind": fault.kind} for fault in made.anomalies],
    }


def write(made: MadeClip, path: str | Path) -> Path:
    """Write a clip as a real .mp4 with its sound and subtitles, and `truths` beside it as .json."""
    from moviola.media.subtitles import Subtitle
    from moviola.media.writer import write_video

    path = Path(path)
    subtitles = [Subtitle(line.span, line.text) for line in made.subtitles] or None
    write_video(
        path,
        made.frames_THWC,
        made.rate,
        sound=made.sound,
        sound_rate=SOUND_RATE,
        subtitles=subtitles,
    )
    path.with_suffix(".json").write_text(json.dumps(truths(made), indent=1), encoding="utf-8")
    return path
