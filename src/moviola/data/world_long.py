"""Long made videos: a few planted moments among shots where other things happen."""

from __future__ import annotations

from collections.abc import Sequence

from moviola.data import world_draw as draw
from moviola.data.world_actions import ACTIONS, LARGEST_STEP, animate
from moviola.data.world_clip import MadeClip, Shot, WorldConfig, assemble, cast, palette_of, turnable
from moviola.data.world_film import Body, arrange, make_body, roll_spans
from moviola.data.world_scene import ALIKE, Ground, Photo, roll_ground
from moviola.data.world_shapes import Dice, jitter
from moviola.data.world_story import Event
from moviola.types import TimeSpan, UsageError

__all__ = ["LONG_ACTIONS", "long_video"]

LONG_ACTIONS: tuple[str, ...] = tuple(
    name for name, action in ACTIONS.items() if action.bodies == 1 and name not in ("appears", "disappears")
)
"""Actions that can fill a whole moment, during which alone their object is in view."""

_SHOT = (4.0, 10.0)  # seconds between cuts where no moment forbids one


def long_video(
    seed: int,
    index: int,
    *,
    duration: float = 60.0,
    events: int = 3,
    moment: tuple[float, float] = (3.0, 8.0),
    config: WorldConfig | None = None,
    photos: Sequence[Photo] | None = None,
) -> MadeClip:
    """A video of several shots with `events` planted moments of `moment` (least, most) seconds.

    Each moment shows an object of its own (no other object of the video has both its colour and its
    shape), acting from the moment's first frame to its last and out of view before and after. No cut
    falls inside a moment; its ends are cuts about half the time. Everywhere, other objects stand or
    act, some sharing the colour or the shape. `events[i].captions` and `.held_out` are the queries,
    `events[i].span` the answer. Only `config.duration` is not used; the default rate is 4 a second.
    """
    config = config or WorldConfig(rate=4.0, bystanders=2)
    dice = Dice(seed, index, 24)
    frames, rate = round(duration * config.rate), config.rate
    actions = [
        a
        for a in config.actions
        if a in LONG_ACTIONS and (turnable(config.shapes) or not a.startswith("rotates"))
    ]
    if not actions or events < 1:
        raise UsageError(
            f"A long video needs an event or more, of an action that lasts; got {events} events of "
            f"{', '.join(config.actions)}.",
            hint=f"Choose actions from {', '.join(LONG_ACTIONS)}.",
        )
    lengths = [max(5, round(dice.uniform(*moment) * rate)) for _ in range(events)]
    gap = max(1, round(2 * rate))
    if sum(lengths) + gap * (events + 1) > frames:
        raise UsageError(
            f"{events} moments of up to {moment[1]} s do not fit in {duration} s with 2 s between them.",
            hint="Give a longer duration, fewer events or shorter moments.",
        )
    spans = roll_spans(lengths, frames + 1, dice, gap)
    does = [dice.pick(actions) for _ in range(events)]
    turning = {k for k, action in enumerate(does) if action.startswith("rotates")}
    stars = cast(dice, events, config.shapes, config.colours, turning)
    named = [photo for photo in photos or () if isinstance(photo, tuple)]

    bodies: list[Body] = []
    planted: list[Event] = []
    for k, ((start, end), action, (shape, colour)) in enumerate(zip(spans, does, stars)):
        body = make_body(dice, config.size, shape, colour, k, frames, [action])
        if body.thing.size != "small" and action not in ("grows", "shrinks"):
            body.radius = dice.uniform(0.16, 0.22) * config.size
        colours = None
        if action == "changes colour":
            others = [c for c in config.colours if c != colour and c not in ALIKE[colour]]
            colours = (colour, dice.pick(others or [c for c in config.colours if c != colour]))
        _act(body, action, start, end - 1, config, dice, colours)
        body.track.opacity_T[:start] = 0
        body.track.opacity_T[end:] = 0
        bodies.append(body)
        planted.append(Event(TimeSpan(start / rate, end / rate), action, (k,), None, colours))

    shots, scenes = [], []
    for first, last in _cut(spans, frames, rate, dice):
        inside = [k for k, (start, end) in enumerate(spans) if first <= start and end <= last]
        ground, look, palette = _ground_for([bodies[k] for k in inside], planted, config, photos, dice)
        extras = _extras(dice, config, stars, palette, first, last, frames, named, len(bodies))
        arrange([bodies[k] for k in inside] + extras, config.size, dice)
        bodies += extras
        shots.append(Shot(TimeSpan(first / rate, last / rate), ground))
        scenes.append((first, look, (0.0, 0.0)))
    return assemble(seed, index, config, bodies, planted, shots, scenes, frames, told=events)


def _act(
    body: Body,
    action: str,
    start: int,
    end: int,
    config: WorldConfig,
    dice: Dice,
    colours: tuple[str, str] | None = None,
) -> None:
    """Fill the frames from `start` to `end` with one action at whatever pace that takes."""
    seconds = (end - start) / config.rate
    pace = 0.0
    if action.startswith("moves"):
        pace = dice.uniform(0.25, 0.5) / seconds
    elif action.startswith("rotates"):
        pace = min(dice.uniform(45, 120), LARGEST_STEP * config.rate)
    shades = None if colours is None else (body.look.colour, jitter(colours[1], dice))
    animate(body.track, action, start, end, config.rate, pace, dice, shades)


def _cut(spans: Sequence[tuple[int, int]], frames: int, rate: float, dice: Dice) -> list[tuple[int, int]]:
    """Shots as (first, last) frames: random cuts outside the moments, and often at their ends."""
    cuts = {0}
    at = 0.0
    while (at := at + dice.uniform(*_SHOT) * rate) < frames - rate:
        if not any(start < at < end for start, end in spans):
            cuts.add(round(at))
    for start, end in spans:
        cuts |= {edge for edge in (start, end) if dice.chance(0.5)}
    edges = sorted(c for c in cuts if (c == 0 or rate <= c < frames) and not any(s < c < e for s, e in spans))
    return list(zip(edges, [*edges[1:], frames]))


def _ground_for(
    bodies: Sequence[Body],
    events: Sequence[Event],
    config: WorldConfig,
    photos: Sequence[Photo] | None,
    dice: Dice,
) -> tuple[Ground, draw.SceneryLook, list[str]]:
    """A ground from which every planted object of the shot stands out, if one turns up in 40 tries."""
    wanted = {body.thing.colour for body in bodies}
    wanted |= {c for e in events if e.colours and e.colours[0] in wanted for c in e.colours}
    for _ in range(40):
        ground, look, avoid = roll_ground(dice, photos, config.colours, config.grounds)
        if not wanted & set(avoid):
            break
    return ground, look, palette_of(config, avoid, ground)


def _extras(
    dice: Dice,
    config: WorldConfig,
    stars: Sequence[tuple[str, str]],
    palette: Sequence[str],
    first: int,
    last: int,
    frames: int,
    named: Sequence[Photo],
    group: int,
) -> list[Body]:
    """Objects of one shot that no query asks for, though they may share a colour or a shape with one."""
    made = []
    for k in range(dice.below(config.bystanders + 1)):
        free = [(s, c) for s in config.shapes for c in palette if (s, c) not in stars]
        alike = [(s, c) for s, c in free if any(s == shape or c == colour for shape, colour in stars)]
        pool = alike if alike and dice.chance(0.4) else free
        if not pool:
            break
        shape, colour = dice.pick(pool)
        calm = [a for a in config.actions if a in LONG_ACTIONS and a != "changes colour"]
        calm = [a for a in calm if turnable((shape,)) or not a.startswith("rotates")]
        action = dice.pick(calm) if calm and last - first > 6 and dice.chance(0.5) else None
        body = make_body(
            dice, config.size, shape, colour, group + k, frames, [action] if action else [], named
        )
        if action is not None:
            _act(body, action, first, last - 1, config, dice)
        body.track.opacity_T[:first] = 0
        body.track.opacity_T[last:] = 0
        made.append(body)
    return made
