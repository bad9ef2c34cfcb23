"""What a sentence names and how the named things are related: entities, attributes, relations.

`Parse` is what `moviola match` works on; `Parser` is the interface, `RuleParser` the default that needs
neither a model nor a network, and `parts.chat_parser.ChatParser` the one that asks a language model.

Conventions (a `Parser` should keep them; the committed test sentences do):

- An entity is a noun with its compound ("fire truck"), lower-case, as the sentence has it; "a group of
  people" and "a glass of water" are one entity. Articles and possessives are dropped; numerals, adjectives
  and participles before the noun, and adjectives said of it ("the dog is brown"), are attributes.
- Entities of one sentence have different names. Where two would share one, the attributes go into the
  name: "a black dog and a white dog" are `black dog` and `white dog`, without attributes.
- A relation's verb is the sentence's own form without auxiliaries, with its particle, and with its
  preposition where the object hangs on one: `throws`, `sitting on`, `picks up`, `thrown by`, `next to`. An
  object that needs none is None: `(dog, runs, None)`. The subject is the grammatical one: "a ball is thrown
  by a boy" is `(ball, thrown by, boy)`.
- A pronoun stands for the noun it can be told to mean, else it is an entity itself (`he` for "him").
- A verb without a subject ("riding a horse", "put the cup down") gives its entities and no relation.

On the 100 captions of `tests/parts/parsed_sentences.json` `RuleParser` has F1 of 98.9 (entities), 97.2
(attributes) and 97.4 (relations); on the half its rules were never tuned on, 97.9, 95.4 and 94.8. Those who
wrote the rules wrote the captions, so expect less of captions by others.

What `RuleParser` cannot do: tell by meaning what a prepositional phrase hangs on (it goes by the
preposition and by whether the noun is a person or an animal), words that are in no list and stand where
both a noun and a verb could, ellipsis ("one chases another"), negation (dropped: "a man without a hat" keeps
its `without`, "is not eating" does not), comparison, quoted speech, idioms, and any language but English,
whose words it takes for nouns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from moviola.parts.sentence_clauses import relate
from moviola.parts.sentence_phrases import Thing
from moviola.parts.sentence_tags import tag
from moviola.types import UsageError

__all__ = ["Entity", "Parse", "Parser", "Relation", "RuleParser"]


@dataclass(frozen=True, slots=True)
class Entity:
    name: str
    attributes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Attributes and name as one phrase: the key text of an entity's part of the picture."""
        return " ".join((*self.attributes, self.name))


@dataclass(frozen=True, slots=True)
class Relation:
    """`subject` and `object` are names of entities of the same parse."""

    subject: str
    verb: str
    object: str | None = None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"A parse needs {what} to be a non-empty text, got {value!r:.80}.")
    return " ".join(value.split())


@dataclass(frozen=True, slots=True)
class Parse:
    """One sentence's parse. No entity at all is allowed: the caller decides what that means."""

    sentence: str
    entities: tuple[Entity, ...] = ()
    relations: tuple[Relation, ...] = ()

    def __post_init__(self) -> None:
        names = [entity.name for entity in self.entities]
        if len(set(names)) < len(names):
            raise UsageError(f"A parse needs entities with different names, got {', '.join(names)}.")
        for r in self.relations:
            for name in (r.subject, r.object):
                if name is not None and name not in names:
                    raise UsageError(
                        f"The relation ({r.subject}, {r.verb}, {r.object}) names '{name}', no entity; "
                        f"entities: {', '.join(names) or 'none'}."
                    )

    def to_json(self) -> dict[str, Any]:
        """The published form, with the sentence: `{"sentence", "objects": {name: {"attributes": [...]}},
        "connections": [{"subject", "verb", "object"}]}`."""
        return {
            "sentence": self.sentence,
            "objects": {e.name: {"attributes": list(e.attributes)} for e in self.entities},
            "connections": [
                {"subject": r.subject, "verb": r.verb, "object": r.object} for r in self.relations
            ],
        }

    @classmethod
    def from_json(cls, value: object, sentence: str | None = None) -> Parse:
        """Read `to_json`'s form, also as ComCLIP's cached files have it: attributes as text, list or null.

        `sentence` is used where the JSON holds none. An object of a connection may be null or absent; a
        connection's subject or object that is not among the objects becomes one, as published parses name
        things there first.
        """
        if not isinstance(value, Mapping):
            raise UsageError(
                f"A parse is a JSON object with 'objects' and 'connections', got {type(value).__name__}."
            )
        objects, connections = value.get("objects", {}), value.get("connections") or []
        if not isinstance(objects, Mapping) or not isinstance(connections, list):
            raise UsageError(
                "A parse needs 'objects' to be {name: {'attributes': ...}} and 'connections' to be a list, "
                f"got {type(objects).__name__} and {type(connections).__name__}."
            )
        entities: dict[str, Entity] = {}
        for name, about in objects.items():
            name = _text(name, "an object's name")
            if name in entities:
                raise UsageError(f"A parse names one object twice: '{name}'.")
            entities[name] = Entity(name, _attributes(name, about))
        relations = []
        for at, one in enumerate(connections):
            if not isinstance(one, Mapping):
                raise UsageError(f"Connection {at} of a parse is {type(one).__name__}, expected an object.")
            missing = [key for key in ("subject", "verb") if not one.get(key)]
            if missing:
                raise UsageError(f"Connection {at} of a parse lacks {' and '.join(missing)}: {dict(one)}.")
            subject, verb = (_text(one[key], f"connection {at}'s {key}") for key in ("subject", "verb"))
            target = one.get("object")
            target = None if target in (None, "") else _text(target, f"connection {at}'s object")
            for name in filter(None, (subject, target)):
                entities.setdefault(name, Entity(name))
            relations.append(Relation(subject, verb, target))
        said = value.get("sentence", sentence)
        return cls(
            said if isinstance(said, str) else sentence or "", tuple(entities.values()), tuple(relations)
        )

    @classmethod
    def from_triplet(cls, triplet: str, sentence: str | None = None) -> Parse:
        """ "man,sit,table", as the rows of ComVG and SVO-Probes hold it: subject, verb, object.

        >>> Parse.from_triplet("man,sit,table").relations
        (Relation(subject='man', verb='sit', object='table'),)
        """
        parts = [" ".join(part.split()) for part in triplet.split(",")]
        if len(parts) != 3 or not all(parts):
            raise UsageError(f"A triplet is 'subject,verb,object', got {triplet!r}.")
        subject, verb, target = parts
        entities = {name: Entity(name) for name in (subject, target)}
        text = " ".join(parts) if sentence is None else sentence
        return cls(text, tuple(entities.values()), (Relation(subject, verb, target),))


def _attributes(name: str, about: object) -> tuple[str, ...]:
    """The attributes of one object of a JSON parse, as text, list or null, bare or under "attributes"."""
    value = about.get("attributes") if isinstance(about, Mapping) else about
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UsageError(
            f"The attributes of '{name}' must be a text, a list of texts or null, got {value!r:.80}."
        )
    return tuple(" ".join(one.split()) for one in value if one.strip())


class Parser(Protocol):
    def parse(self, sentence: str) -> Parse: ...


class RuleParser:
    """English captions by rules: word classes, then phrases, then one pass over the clauses.

    Deterministic; any text gives a `Parse`, and one without words has no entities.
    """

    def parse(self, sentence: str) -> Parse:
        things, links = relate(tag(sentence))
        names = _names(things)
        entities = {names[thing].name: names[thing] for thing in things}
        relations = [
            Relation(names[link.subject].name, link.verb, names[link.object].name if link.object else None)
            for link in links
        ]
        return Parse(sentence, tuple(entities.values()), tuple(dict.fromkeys(relations)))


def _names(things: Sequence[Thing]) -> dict[Thing, Entity]:
    """An entity for each thing, with different names; things nothing tells apart share one."""
    by_noun: dict[str, list[Thing]] = {}
    for thing in things:
        by_noun.setdefault(thing.noun, []).append(thing)
    names: dict[Thing, Entity] = {}
    for noun, same in by_noun.items():
        apart: dict[Thing, list[Thing]] = {}
        for thing in same:
            first = next((t for t in apart if thing.repeats(t)), thing)
            apart.setdefault(first, []).append(thing)
        for first, mentions in apart.items():
            said = [word for thing in mentions for word in thing.said]
            entity = Entity(noun, tuple(dict.fromkeys(first.attributes + said)))
            if len(apart) > 1:
                entity = Entity(Entity(noun, tuple(first.attributes)).text, tuple(dict.fromkeys(said)))
            names |= dict.fromkeys(mentions, entity)
    return names
