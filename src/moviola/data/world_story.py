"""Sentences about made clips: what happens, in which order, and long descriptions of everything.

Like `world_text`, two disjoint sets of forms: `TRAIN_TEMPLATES` and `HELD_OUT_TEMPLATES` here, and
`ACTION_WORDS` in `world_actions`. A caption depends only on the dice, so the same dice with one
action reversed or the order swapped gives a pair that differs in nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

from moviola.data.world_actions import ACTION_WORDS, ACTIONS, SPEED_WORDS
from moviola.data.world_scene import Ground, Thing
from moviola.data.world_shapes import COLOURS, Dice
from moviola.data.world_text import (
    NUMBERS,
    SIZE_WORDS,
    Wording,
    article,
    colour_word,
    ground_phrase,
    listing,
    noun_phrase,
    place_phrase,
)
from moviola.types import TimeSpan

__all__ = ["HELD_OUT_TEMPLATES", "TRAIN_TEMPLATES", "Event", "long_caption", "opposite", "story"]

# {what} an object, {does} / {doing} the action, {ground} what lies behind; {first} and {second} are
# whole clauses ("a red star bounces") in the order in which they happen.
TRAIN_TEMPLATES: dict[str, tuple[str, ...]] = {
    "event": (
        "{what} {does}",
        "{what} {doing}",
        "{what} is {doing}",
        "{what} {does} on {ground}",
        "{what} {doing} on {ground}",
        "a video of {what} {doing}",
        "a clip of {what} {doing} on {ground}",
        "a video where {what} {does}",
        "there is {what} {doing}",
        "{what} that {does}",
    ),
    "order": (
        "{first} and then {second}",
        "{first}, then {second}",
        "first {first}, then {second}",
        "{first} before {second}",
        "after {first}, {second}",
        "{first}, and later {second}",
        "at first {first}, at the end {second}",
    ),
    "sequence": (
        "{first}, then {second}, and then {third}",
        "first {first}, then {second}, and later {third}",
        "at first {first}, then {second}, and at the end {third}",
    ),
}
HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "event": (
        "in this video we see {what} {doing}",
        "a clip that shows {what} {doing}",
        "on {ground} {what} {does}",
        "here is {what}, and it {does}",
        "we see that {what} is {doing} on {ground}",
    ),
    "order": (
        "{second} after {first}",
        "{second}, but first {first}",
        "in this video {first} first and {second} later",
        "we see that {first}, and at the end {second}",
    ),
    "sequence": (
        "in this video {first} first, {second} later and {third} at the end",
        "{third} at the end, but first {first}, and after that {second}",
    ),
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens: in `span`, to the objects numbered `objects` (the actor first).

    `speed` is slow, medium or fast where the action has one; `colours` are the old and the new
    colour of a change; `sound` names what is heard meanwhile. `captions` are training wording,
    `held_out` wording kept from training, about this event alone.
    """

    span: TimeSpan
    action: str
    objects: tuple[int, ...]
    speed: str | None = None
    colours: tuple[str, str] | None = None
    sound: str | None = None
    captions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


def _does(event: Event, things: Sequence[Thing], dice: Dice, wording: Wording) -> tuple[str, str]:
    """The action in both verb forms, with its adverb and its other object."""
    pairs = ACTION_WORDS[event.action][0 if wording == "train" else 1]
    finite, participle = dice.pick(pairs)
    fields = {}
    if event.colours is not None:
        old, new = (colour_word(name, dice) for name in event.colours)
        fields = {"old": old, "new": new}
    if len(event.objects) > 1:
        fields["other"] = noun_phrase(things[event.objects[1]], dice)
    adverb = ""
    chosen = dice.draw()
    if event.speed in SPEED_WORDS and chosen < 0.6:
        words = SPEED_WORDS[event.speed]
        adverb = " " + words[int(chosen / 0.6 * len(words))]
    return finite.format(**fields) + adverb, participle.format(**fields) + adverb


def _actor(event: Event, things: Sequence[Thing], dice: Dice) -> str:
    return noun_phrase(things[event.objects[0]], dice, colour=event.colours is None)


def story(
    events: Sequence[Event], things: Sequence[Thing], ground: Ground, dice: Dice, wording: Wording = "train"
) -> str:
    """One sentence that tells one event, or several in their order."""
    forms = TRAIN_TEMPLATES if wording == "train" else HELD_OUT_TEMPLATES
    if len(events) == 1:
        form = dice.pick(forms["event"])
        what = _actor(events[0], things, dice)
        does, doing = _does(events[0], things, dice, wording)
        return form.format(what=what, does=does, doing=doing, ground=ground_phrase(ground, dice))
    form = dice.pick(forms["order" if len(events) == 2 else "sequence"])
    slots = ("{first}", "{second}", "{third}")[: len(events)]
    turn = int(dice.draw() * (1 << 53))
    clauses: dict[str, str] = {}
    named: set[int] = set()
    for slot, event in sorted(zip(slots, events), key=lambda pair: form.index(pair[0])):  # as they are read
        # Each clause has dice of its own, so that swapping two events swaps their words whole.
        own = Dice(turn, crc32(f"{event.action} {event.objects}".encode()))
        what = _actor(event, things, own)
        if event.objects[0] in named:
            thing = things[event.objects[0]]
            what = f"the photo of {thing.photo}" if thing.photo is not None else f"the {thing.shape}"
        named.add(event.objects[0])
        clauses[slot[1:-1]] = f"{what} {_does(event, things, own, wording)[0]}"
    return form.format(**clauses)


def opposite(events: Sequence[Event]) -> tuple[Event, ...] | None:
    """The same clip told wrongly in direction or order only; None where there is no such telling."""
    if len(events) > 1:
        first, second, *rest = events
        if (first.action, first.objects) == (second.action, second.objects):
            return None
        return (second, first, *rest)
    event = events[0]
    if event.colours is not None:
        return (replace(event, colours=event.colours[::-1]),)
    action = ACTIONS[event.action]
    return None if action.backwards == action.name else (replace(event, action=action.backwards),)


# --------------------------------------------------------------------------------------------------
# Long descriptions
# --------------------------------------------------------------------------------------------------

_LONG_WORDS = 105
_COMMON = ("circle", "star", "heart", "cross", "ring", "arrow", "square", "triangle")
_SIDEWAYS, _UPRIGHT = ("moves left", "moves right"), ("moves up", "moves down")
_LOOKS_LIKE = {  # actions that one could also see in another: not to be denied
    "approaches": (*_SIDEWAYS, *_UPRIGHT),
    "parts": (*_SIDEWAYS, *_UPRIGHT),
    "shakes": _SIDEWAYS,
    "bounces": _UPRIGHT,
    "pulses": ("grows", "shrinks"),
    "blinks": ("appears", "disappears"),
    **dict.fromkeys((*_SIDEWAYS, *_UPRIGHT), ("approaches", "parts")),
}


def _count_phrase(count: int) -> str:
    return f"{NUMBERS[count] if count < len(NUMBERS) else count} object{'s' if count != 1 else ''}"


def _about(thing: Thing, dice: Dice) -> str:
    name = f"photo of {thing.photo}" if thing.photo is not None else thing.shape
    told = [f"The {name} is seen {place_phrase(thing.place, dice)}"]
    if thing.size in SIZE_WORDS:
        told.append(f"it is {thing.size}")
    if thing.photo is None:
        told.append(f"its colour is {thing.colour}")
        told.append("its surface is plain" if thing.texture == "plain" else f"its surface is {thing.texture}")
    if thing.facing is not None:
        told.append(f"it points {thing.facing}")
    return ", ".join(told[:-1]) + (f" and {told[-1]}" if len(told) > 1 else told[0]) + "."


def long_caption(
    events: Sequence[Event],
    things: Sequence[Thing],
    grounds: Sequence[tuple[TimeSpan, Ground]],
    dice: Dice,
    *,
    duration: float,
    heard: Sequence[str] = (),
    alone: bool = True,
) -> str:
    """A description of everything, in more than 100 words, true in every sentence.

    The order is: the ground, the objects, the events in time, the sounds, then what is not there.
    `alone` False: objects that are not told about also act, so nothing is said of what is absent.
    """
    told = []
    for at, (_, ground) in enumerate(grounds):
        opening = "In this video we see" if at == 0 else "After a cut the view changes to"
        told.append(f"{opening} {ground_phrase(ground, dice)}.")
    if alone:
        told.append(f"There {'is' if len(things) == 1 else 'are'} {_count_phrase(len(things))} in it.")
    else:
        told.append(
            f"Among other things there {'is' if len(things) == 1 else 'are'} {_count_phrase(len(things))}."
        )
    names = [noun_phrase(thing, dice, size=False) for thing in things]
    told.append(f"One can see {listing(names)}.")
    told += [_about(thing, dice) for thing in things]
    for at, event in enumerate(events):
        does, _ = _does(event, things, dice, "train")
        when = "First" if at == 0 else ("Finally" if at == len(events) - 1 else "Then")
        thing = things[event.objects[0]]
        name = f"photo of {thing.photo}" if thing.photo is not None else thing.shape
        told.append(
            f"{when}, from second {event.span.start:.1f} to second {event.span.end:.1f}, the {name} {does}."
        )
        if event.sound is not None:
            told.append(f"Meanwhile one hears {article(event.sound)}.")
    unseen = [name for name in heard if name not in [event.sound for event in events]]
    told += [f"{article(name).capitalize()} is heard, though nothing in view makes it." for name in unseen]
    if not heard:
        told.append("No sound goes with it.")
    told += _absences(events, things, grounds, dice, duration, sum(len(t.split()) for t in told), alone)
    return " ".join(told)


def _absences(
    events: Sequence[Event],
    things: Sequence[Thing],
    grounds: Sequence[tuple[TimeSpan, Ground]],
    dice: Dice,
    duration: float,
    words: int,
    alone: bool,
) -> list[str]:
    """Further true sentences, until the description is long enough."""
    acting = {k for event in events for k in event.objects[:1]}
    coloured = {thing.colour for thing in things} | {c for event in events for c in event.colours or ()}
    shapes = {thing.shape for thing in things}
    photos = any(thing.photo for thing in things) or any(ground.kind == "photo" for _, ground in grounds)
    more = [f"The whole clip lasts {duration:.1f} seconds."]
    if len(acting) < len(things):
        idle = [f"the {t.photo or t.shape}" for k, t in enumerate(things) if k not in acting]
        more.append(f"All the while {listing(idle)} {'does' if len(idle) == 1 else 'do'} nothing else.")
    if alone:
        colours = dice.sample([c for c in COLOURS if c not in coloured], 3)
        more.append(f"No object here is {colours[0]}, {colours[1]} or {colours[2]}.")
        lacking = dice.sample([s for s in _COMMON if s not in shapes], 3)
        more.append(f"There is no {' and no '.join(lacking)} among the objects.")
        done = {event.action for event in events} | {a for e in events for a in _LOOKS_LIKE.get(e.action, ())}
        undone = dice.sample([a for a in ACTIONS if a not in done], 3)
        does = [
            ACTION_WORDS[a][0][0][0].format(other="another", old="one colour", new="another") for a in undone
        ]
        more.append(
            f"At no time is there an object that {does[0]}, one that {does[1]} or one that {does[2]}."
        )
    more.append("The view is square, and the background fills it from one edge to the other at all times.")
    if not photos:
        more.append("Every object is drawn flat, without depth, as if cut from paper and laid on the ground.")
        more.append("There are no people, no animals, no buildings and no written words anywhere.")
    things_told = NUMBERS[len(events)] if len(events) < len(NUMBERS) else str(len(events))
    more.append(f"The number of events told here is {things_told}, and the last of them ends the story.")
    more.append("Before the first event and after the last one, what was told about stays as it is.")
    more.append(
        "What can be seen is all that there is: the camera shows the whole scene, and nothing is hidden."
    )
    more.append(
        "The light stays the same from the beginning of the video to its end, and so does the sharpness."
    )
    made = []
    for sentence in more:
        if words > _LONG_WORDS:
            break
        made.append(sentence)
        words += len(sentence.split())
    return made
