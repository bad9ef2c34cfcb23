"""Short made clips: who does what, when and where, and every truth about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moviola.data import world_draw as draw
from moviola.data.world_actions import ACTIONS, SPEEDS, TURNS, animate, event_frames
from moviola.data.world_draw import GROUNDS
from moviola.data.world_film import Anomaly, Body, arrange, bounds, film, make_body, roll_spans, settle, spoil
from moviola.data.world_scene import ALIKE, Ground, Photo, Thing, check_palette, roll_ground
from moviola.data.world_shapes import COLOURS, SHAPES, Dice, jitter
from moviola.data.world_sound import SOUNDS, Line, soundtrack, talk
from moviola.data.world_story import Event, long_caption, opposite, story
from moviola.types import TimeSpan, UsageError

__all__ = ["MadeClip", "Shot", "WorldConfig", "clip"]

_TURNABLE = tuple(shape for shape in SHAPES if shape not in ("circle", "ring", "hexagon"))


@dataclass(frozen=True)
class WorldConfig:
    """What a made world may show.

    `size` pixels a side, `rate` frames a second, `duration` seconds. `event_mix`: the weights of
    one, two and three events in a clip; `order` is the share of several-event clips made only of
    closed actions by different objects, where nothing but the order in time tells "A, then B" from
    "B, then A". `colours`, `shapes`, `speeds`, `actions` and `grounds` are what may be drawn:
    `apart` makes two configs that share none of the first three. `bystanders`: at most so many objects
    that do nothing. `drift`, `sound`, `subtitles` and `anomalies` are probabilities per clip, and
    `subtitle_shift` says by how many seconds subtitles may be off. `captions`: how many of each wording.
    """

    size: int = 64
    rate: float = 8.0
    duration: float = 2.0
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    speeds: tuple[str, ...] = tuple(SPEEDS)
    actions: tuple[str, ...] = tuple(ACTIONS)
    grounds: tuple[str, ...] = GROUNDS
    event_mix: tuple[float, float, float] = (0.6, 0.3, 0.1)
    order: float = 0.6
    bystanders: int = 2
    drift: float = 0.15
    sound: float = 0.5
    subtitles: float = 0.5
    subtitle_shift: float = 1.0
    anomalies: float = 0.0
    captions: int = 4

    def __post_init__(self) -> None:
        check_palette(self.colours, self.shapes)
        for kind, given, known in (
            ("action", self.actions, ACTIONS),
            ("speed", self.speeds, SPEEDS),
            ("ground", self.grounds, GROUNDS),
        ):
            if not given or set(given) - set(known):
                raise UsageError(
                    f"Unknown or no {kind}: {', '.join(sorted(set(given) - set(known))) or 'none given'}.",
                    hint=f"Choose from {', '.join(known)}.",
                )
        if round(self.duration * self.rate) < 6:
            raise UsageError(
                f"A clip needs 6 frames or more, got {self.duration} s at {self.rate} a second.",
                hint="Give a longer duration or a higher rate.",
            )

    def apart(
        self, colours: int = 4, shapes: int = 4, speeds: int = 1, seed: int = 0
    ) -> tuple[WorldConfig, WorldConfig]:
        """A training and a test config with no colour, shape or speed in common.

        The counts say how many go to the test side (0 leaves that property whole on both sides).
        """
        dice = Dice(seed, 0)

        def part(names: tuple[str, ...], count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
            if not count:
                return names, names
            kept = set(dice.sample(names, min(count, len(names))))
            return tuple(n for n in names if n not in kept), tuple(n for n in names if n in kept)

        c, s, v = part(self.colours, colours), part(self.shapes, shapes), part(self.speeds, speeds)
        return (
            replace(self, colours=c[0], shapes=s[0], speeds=v[0]),
            replace(self, colours=c[1], shapes=s[1], speeds=v[1]),
        )


@dataclass(frozen=True, slots=True)
class Shot:
    span: TimeSpan
    ground: Ground


@dataclass(frozen=True, slots=True)
class MadeClip:
    """A made video and the truth about it.

    frames_THWC uint8 RGB at `rate`; frame `t` is shown from `times_T[t]` on. masks_KTHW (bool):
    the visible pixels of each object; none while a frame is black, white or static. boxes_KT4
    (float, xyxy pixels) bound the masks, NaN where nothing is visible. `short` captions are
    training wording, `held_out` other wording, `opposites` the training wording made false in
    direction or order alone (empty where that is impossible), `long` over 100 words. `heard` names
    what sounds when, seen or not. `sound` is mono float32 at 16 kHz, or None.
    """

    frames_THWC: np.ndarray
    times_T: np.ndarray
    rate: float
    events: tuple[Event, ...]
    objects: tuple[Thing, ...]
    shots: tuple[Shot, ...]
    masks_KTHW: np.ndarray
    boxes_KT4: np.ndarray
    short: tuple[str, ...]
    held_out: tuple[str, ...]
    opposites: tuple[str, ...]
    long: str
    sound: np.ndarray | None = None
    heard: tuple[tuple[TimeSpan, str], ...] = ()
    subtitles: tuple[Line, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()

    @property
    def duration(self) -> float:
        return len(self.frames_THWC) / self.rate


def turnable(shapes: Sequence[str]) -> bool:
    """Whether one of the shapes can be seen to rotate."""
    return any(shape in _TURNABLE for shape in shapes)


@dataclass(slots=True)
class Plan:
    """An event before it is filmed: the action, its actor and, where it has one, its other object."""

    action: str
    actor: int
    other: int | None = None


def _family(action: str) -> str:
    """Actions of one family would undo or outrun each other if one object did both."""
    return "scales" if action in ("grows", "shrinks") else action.split()[0]


def _plan(dice: Dice, config: WorldConfig, frames: int) -> tuple[list[Plan], int]:
    """Which events happen to which objects, and how many objects they need."""
    actions = [a for a in config.actions if turnable(config.shapes) or not a.startswith("rotates")]
    if not actions:
        raise UsageError(
            "None of the configured shapes can be seen to rotate.",
            hint=f"Add one of: {', '.join(_TURNABLE)}.",
        )
    at, count = dice.draw() * sum(config.event_mix), 0
    for weight in config.event_mix:
        count += 1
        at -= weight
        if at < 0:
            break
    count = max(1, min(count, (frames - 1) // 5))
    closed = [a for a in actions if ACTIONS[a].closed]
    if count > 1 and closed and dice.chance(config.order):
        return [Plan(dice.pick(closed), k) for k in range(count)], count
    plans: list[Plan] = []
    objects = 0
    for _ in range(count):
        last = plans[-1] if plans else None
        if last is not None and last.other is None and dice.chance(0.4):
            done = [p.action for p in plans if p.actor == last.actor]
            taken = {_family(a) for a in done}
            free = [
                a
                for a in actions
                if ACTIONS[a].bodies == 1
                and _family(a) not in taken
                and a != "appears"
                and "disappears" not in done
            ]
            if free:
                plans.append(Plan(dice.pick(free), last.actor))
                continue
        action = dice.pick(actions)
        plans.append(Plan(action, objects, objects + 1 if ACTIONS[action].bodies == 2 else None))
        objects += ACTIONS[action].bodies
    return plans, objects


def cast(
    dice: Dice, count: int, shapes: Sequence[str], palette: Sequence[str], turning: set[int]
) -> list[tuple[str, str]]:
    """A (shape, colour) for each object: no two alike, and all different in both if that can be."""
    made: list[tuple[str, str]] = []
    for k in range(count):
        allowed = [s for s in shapes if k not in turning or s in _TURNABLE]
        free = [(s, c) for s in allowed for c in palette if (s, c) not in made] or [
            (s, c) for s in allowed for c in palette
        ]
        used_shapes, used_colours = {s for s, _ in made}, {c for _, c in made}
        fewest = min((s in used_shapes) + (c in used_colours) for s, c in free)
        made.append(dice.pick([p for p in free if (p[0] in used_shapes) + (p[1] in used_colours) == fewest]))
    return made


def palette_of(config: WorldConfig, avoid: Sequence[str], ground: Ground) -> list[str]:
    """Colours that stand out from a ground; if there are none, those that at least differ."""
    return [c for c in config.colours if c not in avoid] or [
        c for c in config.colours if c not in ground.colours
    ]


def clip(
    seed: int, index: int, *, config: WorldConfig | None = None, photos: Sequence[Photo] | None = None
) -> MadeClip:
    """One short clip of one or several events; the same (seed, index, config) gives the same bytes."""
    config = config or WorldConfig()
    dice = Dice(seed, index, 16)
    frames = round(config.duration * config.rate)
    ground, scenery, avoid = roll_ground(dice, photos, config.colours, config.grounds)
    palette = palette_of(config, avoid, ground)
    plans, count = _plan(dice, config, frames)
    does = [[p.action for p in plans if p.actor == k] for k in range(count)]
    others = {p.other for p in plans}
    turning = {k for k in range(count) if any(a.startswith("rotates") for a in does[k])}
    room_for = len(config.shapes) * len(palette) - count
    total = count + max(0, min(dice.below(config.bystanders + 1), room_for))
    named = [photo for photo in photos or () if isinstance(photo, tuple)]
    bodies = []
    for k, (shape, colour) in enumerate(cast(dice, total, config.shapes, palette, turning)):
        actions = does[k] if k < count else (["approaches"] if k in others else [])
        lent = named if k not in others else ()
        bodies.append(make_body(dice, config.size, shape, colour, k, frames, actions, lent))
    for plan in plans:
        if plan.other is not None:
            bodies[plan.actor].group = plan.other

    lengths, paces, speeds = [], [], []
    for plan in plans:
        speed = dice.pick(config.speeds) if plan.action.startswith(("moves", "rotates")) else None
        room = (frames - len(plans)) // len(plans)
        length, pace = event_frames(plan.action, speed or "medium", config.rate, room, dice)
        if speed and plan.action.startswith("rotates") and pace < TURNS[speed][0]:
            speed = None  # the frame rate is too low to turn that fast, so the word would be untrue
        lengths.append(length)
        paces.append(pace)
        speeds.append(speed)
    events = []
    for plan, (start, end), pace, speed in zip(plans, roll_spans(lengths, frames, dice), paces, speeds):
        body = bodies[plan.actor]
        colours = None
        if plan.other is not None:
            _walk(body, bodies[plan.other], plan.action, start, end, config.size, dice)
        elif plan.action == "changes colour":
            old = body.thing.colour
            colours = (old, dice.pick([c for c in palette if c != old and c not in ALIKE[old]] or
                                      [c for c in config.colours if c != old]))  # fmt: skip
            animate(body.track, plan.action, start, end, config.rate, pace, dice,
                    (body.look.colour, jitter(colours[1], dice)))  # fmt: skip
        else:
            animate(body.track, plan.action, start, end, config.rate, pace, dice)
        who = (plan.actor,) if plan.other is None else (plan.actor, plan.other)
        events.append(
            Event(TimeSpan(start / config.rate, end / config.rate), plan.action, who, speed, colours)
        )
    arrange(bodies, config.size, dice)
    drift = (0.0, 0.0)
    if dice.chance(config.drift):
        turn, far = dice.uniform(0, 2 * math.pi), dice.uniform(0.1, 0.35) / frames
        drift = (far * math.cos(turn), far * math.sin(turn))
    shots = (Shot(TimeSpan(0, frames / config.rate), ground),)
    return assemble(seed, index, config, bodies, events, shots, [(0, scenery, drift)], frames)


def _walk(actor: Body, other: Body, action: str, start: int, end: int, size: int, dice: Dice) -> None:
    """The actor comes close to the other object, or leaves it, along a line of any direction."""
    touch = (actor.radius + other.radius) / size + 0.02
    far = touch + min(dice.uniform(0.2, 0.4), max(0.1, 0.96 - 2 * touch))
    first, last = (far, touch) if action == "approaches" else (touch, far)
    progress_T = np.clip((np.arange(len(actor.track.x_T)) - start) / (end - start), 0, 1)
    distance_T = first + (last - first) * progress_T
    turn = dice.uniform(0, 2 * math.pi)
    actor.track.x_T += math.cos(turn) * distance_T
    actor.track.y_T += math.sin(turn) * distance_T


def assemble(
    seed: int,
    index: int,
    config: WorldConfig,
    bodies: Sequence[Body],
    events: Sequence[Event],
    shots: Sequence[Shot],
    scenes: Sequence[tuple[int, draw.SceneryLook, tuple[float, float]]],
    frames: int,
    told: int | None = None,
) -> MadeClip:
    """Film the bodies and say everything that is true: captions, sound, subtitles and faults.

    `told`: how many of the first bodies the descriptions are about (None: all).
    """
    duration = frames / config.rate
    canvases, masks_KTHW = film(bodies, scenes, frames, config.size)
    dice = Dice(seed, index, 17)
    frames_THWC = draw.develop(canvases, draw.Camera.roll(dice))
    anomalies: tuple[Anomaly, ...] = ()
    if dice.chance(config.anomalies):
        count = 1 + (frames >= 40 and dice.chance(0.5))
        anomalies = spoil(frames_THWC, masks_KTHW, config.rate, count, dice)
    things = [settle(body, config.size) for body in bodies]

    sound, heard = None, []
    dice = Dice(seed, index, 18)
    if dice.chance(config.sound):
        events = [replace(e, sound=dice.pick(SOUNDS)) if dice.chance(0.8) else e for e in events]
        heard = [(e.span, e.sound) for e in events if e.sound is not None]
        if dice.chance(0.25):
            start = dice.uniform(0, 0.6 * duration)
            heard.append((TimeSpan(start, min(duration, start + dice.uniform(0.4, 1.5))), dice.pick(SOUNDS)))
        sound = soundtrack(heard, duration, dice)

    behind = [next(s.ground for s in reversed(shots) if s.span.start <= e.span.start) for e in events]
    dice, spare = Dice(seed, index, 19), Dice(seed, index, 20)
    events = [
        replace(
            event,
            captions=tuple(story([event], things, ground, dice) for _ in range(config.captions)),
            held_out=tuple(story([event], things, ground, spare, "held-out") for _ in range(config.captions)),
        )
        for event, ground in zip(events, behind)
    ]
    wrong_way = opposite(events[:3]) if events else None
    short, held_out, opposites = [], [], []
    for at in range(config.captions if events else 0):
        short.append(story(events[:3], things, behind[0], Dice(seed, index, 32 + at)))
        held_out.append(story(events[:3], things, behind[0], Dice(seed, index, 96 + at), "held-out"))
        if wrong_way:
            opposites.append(story(wrong_way, things, behind[0], Dice(seed, index, 32 + at)))

    dice = Dice(seed, index, 21)
    grounds = [(shot.span, shot.ground) for shot in shots]
    long = long_caption(
        events,
        things[:told],
        grounds,
        dice,
        duration=duration,
        heard=[name for _, name in heard],
        alone=told is None,
    )
    subtitles: tuple[Line, ...] = ()
    if dice.chance(config.subtitles):
        wrong = [story([e], things, behind[0], dice) for e in wrong_way or ()]
        told_lines = [(e.span, dice.pick(e.captions)) for e in events if e.captions]
        subtitles = talk(told_lines, wrong, duration, dice, shift=config.subtitle_shift)
    return MadeClip(
        frames_THWC, np.arange(frames) / config.rate, config.rate, tuple(events), tuple(things), tuple(shots),
        masks_KTHW, bounds(masks_KTHW), tuple(short), tuple(held_out), tuple(opposites), long,
        sound, tuple(heard), subtitles, anomalies,
    )  # fmt: skip
