"""From wiki markup to words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moviola.data.wikitext import Words, plain_text, punctuation

WORDS = Words()


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''it''", "Bold and it"),
        ("a [[dog]], a [[cat|big cat]], [[hound]]s", "a dog, a big cat, hounds"),
        ("x {{cite|a={{b|{{c}}}}|d}} y", "x y"),
        ("x {{never closed", "x {{never closed"),
        ("x }} y", "x }} y"),
        ("a\n{| class=w\n! h\n|-\n| {{x|}} || b\n{|\n|inner\n|}\n|}\nz", "a\nz"),
        ("[[File:A.jpg|thumb|a [[cat|fat cat]] there]]kept", "kept"),
        ("[[Category:Dogs|x]][[:Category:Dogs]]", "Category:Dogs"),
        ("a<ref>b {{c}}</ref>d<ref name=e />f<ref name='g'>h</ref>", "adf"),
        ("a <ref> never closed", "a never closed"),
        ("x <math>\\frac{{a}}{b}</math> y", "x y"),
        ("a<!-- b\n c -->d<!-- never closed", "ad"),
        ("H<sub>2</sub>O<br/>next", "H2O\nnext"),
        ("see [http://a.org the site] or http://b.org/x?y=1 now", "see the site or now"),
        ("== Head ==\n* one\n*# two\n: three", "Head\none\ntwo\nthree"),
        ("a&nbsp;b &amp; c &lt;b&gt;", "a b & c <b>"),
        ("__NOTOC__x", "x"),
        ("<nowiki>kept</nowiki>", "kept"),
        ("", ""),
    ],
)
def test_markup(markup, text):
    assert plain_text(markup) == text


def test_namespaces_of_the_dump_are_dropped_too():
    assert plain_text("[[Datei:A.png|x]]y [[Datei:B.png]]", dropped={"datei"}) == "y"
    assert plain_text("[[Datei:A.png|x]]") == "x"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("{}[]|<>/!-=*'& \nabref:"), max_size=80))
def test_never_fails_on_broken_markup(markup):
    text = plain_text(markup)
    assert text == text.strip()


@pytest.mark.parametrize(
    "piece", ["{{", "[[", "[[a|", "<ref>", "<ref ", "<!--", "{|\n", "=", " = ", "<b ", "[http://a ", "\n "]
)
def test_time_is_linear_in_the_worst_cases(piece):
    def seconds(count):
        start = time.process_time()
        plain_text(piece * count + "x")
        return time.process_time() - start

    seconds(100)
    short, long = min(seconds(2_000) for _ in range(3)), min(seconds(32_000) for _ in range(2))
    assert long < 80 * short + 0.05  # 16 times for linear, 256 for quadratic


def test_words_end_at_spaces_and_marks_and_pairs_do_not_reach_over_marks():
    words = Words()
    assert list(words("A hot dog, please.\nNext line")) == [["A", "hot", "dog"], ["please"], ["Next", "line"]]
    assert list(words("don't state-of-the-art")) == [
        ["don"],
        ["t", "state"],
        ["of"],
        ["the"],
        ["art"],
    ]
    assert list(words("« été » – naïve… €5")) == [["été"], ["naïve"], ["€5"]]
    assert list(words(" \u00a0\n.,")) == []


def test_marks_that_are_kept_stand_inside_words_only():
    assert list(Words(keep="'-")("don't 'quoted' t-shirt - end")) == [["don't", "quoted", "t-shirt", "end"]]


def test_letters_of_languages_without_spaces_are_words_of_their_own():
    assert list(Words()("北京 かな ไทย")) == [["北", "京", "かな", "ไ", "ท", "ย"]]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_no_word_holds_a_blank_a_mark_or_a_control_character(text):
    for run in WORDS(text):
        for word in run:
            assert word.split() == [word]
            assert not punctuation() & set(word)
            assert min(word) > " "  # so pairs joined by a space sort by their words
