"""Words for the made world: noun phrases, and two disjoint sets of sentence forms.

`TRAIN_TEMPLATES` are the forms a model may be trained on; `HELD_OUT_TEMPLATES` are other forms, and
`ACTION_WORDS` likewise holds two disjoint sets of phrases per action. Every single word of the
held-out wording also occurs somewhere in the training wording (a test checks it): what is new at
test time is the sentence, and which synonym goes with which meaning, never the word itself. For
example training says "moves left" and "goes away"; the held-out wording says "goes to the left".
The words that change partners this way are: against, backdrop, seen, shows, see, here, that, it (still
forms); goes, heads, side, slides, becomes, gets, bigger, larger, smaller, tiny, spins, around, comes,
closer, farther, away, out, jumps, off (actions); after, later, but, first, end (order).

Captions are lower case without a final stop; only `long_caption` writes prose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moviola.data.world_scene import Ground, Scene, Thing
    from moviola.data.world_shapes import Dice

__all__ = [
    "HELD_OUT_TEMPLATES",
    "NUMBERS",
    "TRAIN_TEMPLATES",
    "Wording",
    "article",
    "caption",
    "captions",
    "ground_phrase",
    "noun_phrase",
]

Wording = Literal["train", "held-out"]

NUMBERS = ("zero", "one", "two", "three", "four", "five")
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "dot"),
    "oval": ("oval", "oval", "ellipse"),
    "crescent": ("crescent", "crescent", "crescent moon"),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
}
GRAY = ("gray", "gray", "grey")
TEXTURE_WORDS = {
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
GROUND_NAMES: dict[str, tuple[str, ...]] = {
    "grass": ("grass", "green grass", "a lawn of grass"),
    "sky": ("the sky", "a blue sky", "a blue sky with clouds"),
    "sand": ("sand", "a sandy beach", "yellow sand"),
    "water": ("water", "blue water", "the water of the sea"),
    "bricks": ("bricks", "a brick wall", "a wall of red bricks"),
}

# Fields: {what} the object or objects, {where} its place, {ground} what lies behind,
# {first} {link} {second} a relation of two objects.
TRAIN_TEMPLATES: dict[str, tuple[str, ...]] = {
    "one": (
        "{what}",
        "{what} on {ground}",
        "{what} {where}",
        "{what} {where} on {ground}",
        "a picture of {what}",
        "a photo of {what}",
        "a drawing of {what} on {ground}",
        "an image of {what} {where}",
        "there is {what} {where}",
        "there is {what} on {ground}",
        "{what} in front of {ground}",
        "{ground} with {what} on it",
        "one can see {what}",
        "here is {what}",
    ),
    "many": (
        "{what}",
        "{what} on {ground}",
        "a picture of {what}",
        "a photo of {what} on {ground}",
        "an image with {what}",
        "there are {what}",
        "there are {what} on {ground}",
        "{ground} and {what}",
        "{what} are shown",
    ),
    "relation": (
        "{first} {link} {second}",
        "{first} is {link} {second}",
        "{first} {link} {second} on {ground}",
        "a picture of {first} {link} {second}",
        "there is {first} {link} {second}",
        "{first} and {second}, both against {ground}",
        "{first} seen {link} {second}",
        "{second} and {first}",
    ),
    "ground": (
        "{ground}",
        "a picture of {ground}",
        "an empty picture with {ground}",
        "nothing but {ground}",
        "only {ground} in view",
    ),
}
HELD_OUT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "one": (
        "against {ground} {what} is seen",
        "in this picture we see {what} {where}",
        "an image that shows {what} against {ground}",
        "{what} is here, {where}",
        "on {ground} there is {what} {where}",
    ),
    "many": (
        "on {ground} there are {what}",
        "in this picture we see {what}",
        "an image that shows {what} against {ground}",
        "here are {what}",
    ),
    "relation": (
        "in this picture we see {first} {link} {second}",
        "on {ground} there is {first} {link} {second}",
        "an image that shows {first}, and it is {link} {second}",
    ),
    "ground": ("in this picture we see only {ground}", "an image that shows {ground}"),
}
# Sentences that carry the held-out forms' small words in other company.
_TRAIN_ASIDES = ("we see that this is {what}", "it shows {what}", "{what} is in it")

LINKS: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of", "on the left side of"),
    "right": ("to the right of", "right of", "on the right side of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "inside": ("inside", "within"),
}
OPPOSITE_LINK = {"left": "right", "right": "left", "above": "below", "below": "above"}
BESIDE = ("next to", "beside")

_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "centre", "right")


def article(phrase: str) -> str:
    """The phrase with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


def colour_word(name: str, dice: Dice) -> str:
    return dice.pick(GRAY) if name == "gray" else name


def noun_phrase(thing: Thing, dice: Dice, *, count: int = 1, size: bool = True, colour: bool = True) -> str:
    """`a small striped red star`; with `count`, `three small red stars`.

    Colour (unless told not to) and shape are always there; size, texture and an arrow's facing
    sometimes.
    """
    words = []
    if size and thing.size in SIZE_WORDS and dice.chance(0.55):
        words.append(dice.pick(SIZE_WORDS[thing.size]))
    if thing.photo is not None:
        words.append(plural("photo") if count > 1 else "photo")
        words.append(f"of {thing.photo}")
    else:
        if thing.texture in TEXTURE_WORDS and dice.chance(0.7):
            words.append(dice.pick(TEXTURE_WORDS[thing.texture]))
        if colour:
            words.append(colour_word(thing.colour, dice))
        noun = dice.pick(SHAPE_WORDS.get(thing.shape, (thing.shape,)))
        words.append(plural(noun) if count > 1 else noun)
        if thing.facing is not None and count == 1 and dice.chance(0.6):
            words.append(f"pointing {thing.facing}")
    phrase = " ".join(words)
    if count > 1:
        number = str(count) if dice.chance(0.15) else NUMBERS[count]
        return f"{number} {phrase}"
    return f"one {phrase}" if dice.chance(0.06) else article(phrase)


def ground_phrase(ground: Ground, dice: Dice) -> str:
    """What lies behind, as a noun phrase: `a striped green background`, `the sky`."""
    if ground.kind in GROUND_NAMES:
        return dice.pick(GROUND_NAMES[ground.kind])
    if ground.kind == "photo":
        if ground.photo is None:
            return dice.pick(("a photo", "a photo in the background"))
        return dice.pick((f"a photo of {ground.photo}", f"{article(ground.photo)}"))
    noun = dice.pick(("background", "background", "backdrop"))
    colour = colour_word(ground.colours[0], dice)
    if ground.kind == "plain":
        return dice.pick(
            (f"a plain {colour} {noun}", f"{article(colour)} {noun}", f"{article(colour)} {noun}")
        )
    if ground.kind == "gradient":
        other = colour_word(ground.colours[1], dice)
        return dice.pick((f"{article(colour)} and {other} {noun}", f"a gradient of {colour} and {other}"))
    kind = dice.pick(TEXTURE_WORDS.get(ground.kind, (ground.kind,)))
    return f"{article(kind)} {colour} {noun}"


def place_phrase(place: tuple[int, int], dice: Dice) -> str:
    """Where in the picture, for (row, column) in thirds."""
    row, column = _ROWS[place[0]], _COLUMNS[place[1]]
    if place == (1, 1):
        return dice.pick(("in the middle", "in the centre", "in the center", "in the middle of the picture"))
    if place[0] == 1:
        return dice.pick((f"on the {column}", f"on the {column} side", f"at the {column} of the picture"))
    if place[1] == 1:
        return dice.pick((f"at the {row}", f"at the {row} of the picture", f"near the {row}"))
    return dice.pick((f"in the {row} {column} corner", f"at the {row} {column}", f"in the {row} {column}"))


def listing(phrases: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene, dice: Dice, wording: Wording = "train") -> str:
    """One true sentence or phrase about a still scene."""
    forms = TRAIN_TEMPLATES if wording == "train" else HELD_OUT_TEMPLATES
    ground = ground_phrase(scene.ground, dice)
    things = scene.things
    if not things:
        return dice.pick(forms["ground"]).format(ground=ground)
    if scene.relation is not None:
        link = scene.relation
        first, second = things[0], things[1]
        if link in OPPOSITE_LINK and dice.chance(0.5):
            first, second, link = second, first, OPPOSITE_LINK[link]
        words = (
            dice.pick(BESIDE) if link in ("left", "right") and dice.chance(0.15) else dice.pick(LINKS[link])
        )
        return dice.pick(forms["relation"]).format(
            first=noun_phrase(first, dice), link=words, second=noun_phrase(second, dice), ground=ground
        )
    if scene.same:
        return dice.pick(forms["many"]).format(
            what=noun_phrase(things[0], dice, count=len(things)), ground=ground
        )
    if len(things) > 1:
        order = dice.sample(things, len(things))
        what = listing([noun_phrase(thing, dice) for thing in order])
        return dice.pick(forms["many"]).format(what=what, ground=ground)
    what = noun_phrase(things[0], dice)
    if wording == "train" and dice.chance(0.08):
        return dice.pick(_TRAIN_ASIDES).format(what=what)
    return dice.pick(forms["one"]).format(what=what, where=place_phrase(things[0].place, dice), ground=ground)


def captions(scene: Scene, dice: Dice, count: int, wording: Wording = "train") -> tuple[str, ...]:
    return tuple(caption(scene, dice, wording) for _ in range(count))
