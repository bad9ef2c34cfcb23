from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.metrics.parses import score_parses
from moviola.parts import sentence_lexicon as lex
from moviola.parts.sentence_parser import Entity, Parse, Relation, RuleParser
from moviola.parts.sentence_tags import tag
from moviola.types import UsageError

ROWS = json.loads((Path(__file__).parent / "parsed_sentences.json").read_text(encoding="utf-8"))
PARSER = RuleParser()


def gold(split=None):
    return [Parse.from_json(row) for row in ROWS if split in (None, row["split"])]


def found(sentence):
    """The parse in short: {name: attributes}, [(subject, verb, object)]."""
    parse = PARSER.parse(sentence)
    return {e.name: list(e.attributes) for e in parse.entities}, [
        (r.subject, r.verb, r.object) for r in parse.relations
    ]


# -- the committed sentences ---------------------------------------------------------------------------


class ThreeWords:
    """The baseline: every word that is no function word is an entity, the second of three is the verb."""

    def parse(self, sentence):
        dull = lex.ARTICLES | lex.POSSESSIVES | lex.AUXILIARIES | lex.PREPOSITIONS | lex.CONJUNCTIONS
        words = [w for w in sentence.lower().strip(".?").replace(",", "").split() if w not in dull]
        if len(words) < 3:
            return Parse(sentence, tuple(Entity(w) for w in dict.fromkeys(words)))
        subject, verb, target = words[0], words[1], words[-1]
        names = dict.fromkeys([subject, *words[2:]])
        return Parse(sentence, tuple(map(Entity, names)), (Relation(subject, verb, target),))


def test_the_sentences_are_what_they_are_said_to_be():
    assert len(ROWS) == 100
    assert len({row["sentence"] for row in ROWS}) == 100
    assert [row["split"] for row in ROWS].count("dev") == 50
    assert {row["split"] for row in ROWS} == {"dev", "held-out"}
    assert len({row["kind"] for row in ROWS}) == 18
    for row in ROWS:
        named = {name for c in row["connections"] for name in (c["subject"], c["object"])} - {None}
        assert named <= row["objects"].keys()


def test_f1_on_the_committed_sentences():
    """Measured: entities 99, attributes 97, relations 97 of 100 over both halves; the floors lie below."""
    table = {
        (name, split or "all"): score_parses(parser, gold(split))
        for name, parser in (("three words", ThreeWords()), ("rules", PARSER))
        for split in ("dev", "held-out", None)
    }
    kinds = ("entities_f1", "attributes_f1", "relations_f1", "exact")
    print("\n" + f"{'parser':<12} {'sentences':<10}" + "".join(f"{kind:>15}" for kind in kinds))
    for (name, split), figures in table.items():
        print(f"{name:<12} {split:<10}" + "".join(f"{figures[kind]:>15.1f}" for kind in kinds))
    rules = table["rules", "all"]
    floors = {"entities_f1": 97, "attributes_f1": 95, "relations_f1": 95, "exact": 95}
    assert {kind: rules[kind] for kind in floors if rules[kind] < floors[kind]} == {}
    held = table["rules", "held-out"]
    assert held["entities_f1"] > 95
    assert held["relations_f1"] > 92
    assert table["three words", "all"]["relations_f1"] < 50


# -- conventions, on sentences outside the committed ones -----------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "entities", "relations"),
    [
        (
            "a lightbulb surrounding some plants",
            {"lightbulb": [], "plants": []},
            [("lightbulb", "surrounding", "plants")],
        ),
        (
            "The woman pointing at the map wears a scarf, gloves and boots.",
            {"woman": [], "map": [], "scarf": [], "gloves": [], "boots": []},
            [
                ("woman", "pointing at", "map"),
                ("woman", "wears", "scarf"),
                ("woman", "wears", "gloves"),
                ("woman", "wears", "boots"),
            ],
        ),
        (
            "A man, wearing a hat, walks his dog.",
            {"man": [], "hat": [], "dog": []},
            [("man", "wearing", "hat"), ("man", "walks", "dog")],
        ),
        (
            "In the park, two kids play chess.",
            {"park": [], "kids": ["two"], "chess": []},
            [("kids", "play in", "park"), ("kids", "play", "chess")],
        ),
        (
            "The ball that the boy throws is red.",
            {"ball": ["red"], "boy": []},
            [("boy", "throws", "ball")],
        ),
        (
            "A dog that is on the sofa barks.",
            {"dog": [], "sofa": []},
            [("dog", "on", "sofa"), ("dog", "barks", None)],
        ),
        (
            "The girl is taller than the boy.",
            {"girl": ["taller"], "boy": []},
            [("girl", "taller than", "boy")],
        ),
        (
            "The kitchen has white cabinets and a black oven.",
            {"kitchen": [], "cabinets": ["white"], "oven": ["black"]},
            [("kitchen", "has", "cabinets"), ("kitchen", "has", "oven")],
        ),
        (
            "A person is cutting a cake with a knife.",
            {"person": [], "cake": [], "knife": []},
            [("person", "cutting", "cake"), ("person", "cutting with", "knife")],
        ),
        ("A boy's dog eats its food.", {"boy": [], "dog": [], "food": []}, [("dog", "eats", "food")]),
        (
            "A man vlogs his breakfast.",
            {"man": [], "breakfast": []},
            [("man", "vlogs", "breakfast")],
        ),
        (
            "A boy kicks a ball to a girl who catches it.",
            {"boy": [], "ball": [], "girl": []},
            [("boy", "kicks", "ball"), ("boy", "kicks to", "girl"), ("girl", "catches", "ball")],
        ),
        ("The guard turns the lamp off.", {"guard": [], "lamp": []}, [("guard", "turns off", "lamp")]),
        (
            "A boy who wants to eat ice cream cries.",
            {"boy": [], "ice cream": []},
            [("boy", "eat", "ice cream"), ("boy", "cries", None)],
        ),
        ("riding a horse", {"horse": []}, []),
        ("dog", {"dog": []}, []),
    ],
)
def test_what_is_found(sentence, entities, relations):
    ours, links = found(sentence)
    assert ours == entities
    assert sorted(links, key=str) == sorted(relations, key=str)


def test_two_things_of_one_noun_are_told_apart_by_their_names():
    entities, relations = found("an old person kisses a young person")
    assert entities == {"old person": [], "young person": []}
    assert relations == [("old person", "kisses", "young person")]
    assert Entity("person", ("old",)).text == "old person"


def test_what_is_spoken_of_twice_is_one_thing():
    entities, relations = found("A dog sees a cat and the dog chases the cat.")
    assert entities == {"dog": [], "cat": []}
    assert relations == [("dog", "sees", "cat"), ("dog", "chases", "cat")]
    assert found("the water is full of fish and the fish are colorful")[0] == {
        "water": [],
        "fish": ["colorful"],
    }


def test_subject_and_object_are_not_exchangeable():
    assert found("the dog bites the man")[1] == [("dog", "bites", "man")]
    assert found("the man bites the dog")[1] == [("man", "bites", "dog")]
    assert found("the man is bitten by the dog")[1] == [("man", "bitten by", "dog")]


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", ["", "   ", "\n\t", "...", "?!", "and of the", "🎬🎬", "\x00\x07"])
def test_no_entity_is_an_empty_parse(sentence):
    assert PARSER.parse(sentence) == Parse(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Собака бежит по траве.",
        "犬が公園で走っている。",
        "Ein Hund läuft über die Wiese.",
        "كلب يركض",
        "कुत्ता दौड़ता है",
    ],
)
def test_other_languages_do_not_crash(sentence):
    assert PARSER.parse(sentence).sentence == sentence


def test_control_characters_separate_words():
    assert found("a dog\x00chases\x1b a\u200b cat\r\n") == found("a dog chases a cat")


@pytest.mark.parametrize(
    "piece",
    [
        "a cat and ",
        "big, ",
        "a man who sees ",
        "she gives it up, ",
        "the dog runs and sits ",
        "running ",
        "of ",
    ],
)
def test_very_long_sentences_take_no_quadratic_time(piece):
    PARSER.parse(piece)
    start = time.perf_counter()
    PARSER.parse(piece * 2000)
    assert time.perf_counter() - start < 5


VOCABULARY = sorted(
    lex.ARTICLES | lex.POSSESSIVES | lex.PREPOSITIONS | lex.AUXILIARIES | lex.RELATIVES | lex.SUBORDINATORS
    | lex.PRONOUNS.keys() | lex.NUMERALS | lex.CONJUNCTIONS | {",", ".", "'s", "red", "orange", "man", "dogs"}
    | {"run", "runs", "running", "thrown", "helps", "made", "in front of", "there", "cup", "swimming", "pool"}
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=25).map(" ".join))
def test_any_order_of_words_gives_a_sound_parse(sentence):
    parse = PARSER.parse(sentence)  # Parse checks that names differ and that relations name entities
    assert Parse.from_json(parse.to_json()) == parse
    assert PARSER.parse(sentence) == parse
    assert all(e.name.strip() and r.verb.strip() for e in parse.entities for r in parse.relations)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_gives_a_parse(sentence):
    assert PARSER.parse(sentence).sentence == sentence


# -- the forms of a parse ---------------------------------------------------------------------------------


def test_triplets():
    parse = Parse.from_triplet(" man, sit ,table", "A man sits at a table.")
    assert parse.entities == (Entity("man"), Entity("table"))
    assert parse.relations == (Relation("man", "sit", "table"),)
    assert parse.sentence == "A man sits at a table."
    assert Parse.from_triplet("man,see,man").entities == (Entity("man"),)


@pytest.mark.parametrize("triplet", ["", "man,sit", "man,,table", "man,sit,table,chair", "man;sit;table"])
def test_triplets_that_are_none(triplet):
    with pytest.raises(UsageError, match="subject,verb,object"):
        Parse.from_triplet(triplet)


def test_json_goes_both_ways():
    for parse in gold():
        assert Parse.from_json(json.loads(json.dumps(parse.to_json()))) == parse


def test_published_parses_are_read():
    """Attributes as text, list, null or absent; a connection may name a thing of its own."""
    parse = Parse.from_json(
        {
            "objects": {
                "dog": {"attributes": "small"},
                "cat": {"attributes": ["old", "grey"]},
                "mat": None,
                "x": {},
            },
            "connections": [
                {"subject": "dog", "verb": "chases", "object": "mouse"},
                {"subject": "cat", "verb": "sits"},
            ],
        },
        "said",
    )
    assert {e.text for e in parse.entities} == {"small dog", "old grey cat", "mat", "x", "mouse"}
    assert parse.relations == (Relation("dog", "chases", "mouse"), Relation("cat", "sits"))
    assert parse.sentence == "said"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "JSON object"),
        ("man", "JSON object"),
        (None, "JSON object"),
        ({"objects": []}, "'objects' to be"),
        ({"objects": {}, "connections": {"subject": "a"}}, "'connections' to be a list"),
        ({"objects": {"": {}}}, "object's name"),
        ({"objects": {"dog": {"attributes": 3}}}, "attributes of 'dog'"),
        ({"objects": {"dog": {"attributes": ["a", None]}}}, "attributes of 'dog'"),
        ({"connections": ["man sits"]}, "Connection 0 .* expected an object"),
        ({"connections": [{"verb": "sits", "object": "mat"}]}, "Connection 0 .* lacks subject"),
        ({"connections": [{"subject": "man", "object": "mat"}]}, "lacks verb"),
        ({"connections": [{"subject": None, "verb": ""}]}, "lacks subject and verb"),
        ({"connections": [{"subject": "man", "verb": 5}]}, "connection 0's verb"),
        ({"connections": [{"subject": "man", "verb": "sits", "object": ["mat"]}]}, "connection 0's object"),
        ({"objects": {"a b": {}, "a  b": {}}}, "one object twice"),
    ],
)
def test_json_that_is_no_parse(value, said):
    with pytest.raises(UsageError, match=said):
        Parse.from_json(value)


def test_a_parse_is_checked_where_it_is_made():
    with pytest.raises(UsageError, match="different names"):
        Parse("x", (Entity("dog"), Entity("dog")))
    with pytest.raises(UsageError, match="no entity; entities: dog"):
        Parse("x", (Entity("dog"),), (Relation("dog", "on", "mat"),))


# -- word forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "base", "kind"),
    [
        ("chases", "chase", "s"),
        ("chasing", "chase", "ing"),
        ("chased", "chase", "ed"),
        ("carries", "carry", "s"),
        ("carried", "carry", "ed"),
        ("plays", "play", "s"),
        ("running", "run", "ing"),
        ("patting", "pat", "ing"),
        ("watches", "watch", "s"),
        ("lying", "lie", "ing"),
        ("tying", "tie", "ing"),
        ("thrown", "throw", "ed"),
        ("sat", "sit", "ed"),
        ("goes", "go", "s"),
        ("agreed", "", ""),
        ("opening", "open", "ing"),
    ],
)
def test_verb_forms(form, base, kind):
    assert lex.verb_forms().get(form, ("", "")) == (base, kind)


def test_classes_by_place():
    def classes(sentence):
        return "".join(word.tag for word in tag(sentence))

    assert classes("the play") == "DN"
    assert classes("children play") == "NV"
    assert classes("her dog sees her") == "SNVO"
    assert classes("to the left of it") == "PO"
    assert classes("a dog that barks at that man") == "DNWVPDN"
