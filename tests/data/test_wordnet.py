"""The reader of WordNet database folders, on a small made one and, where there is one, the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moviola.data.wordnet import hypernyms, read_nouns, read_synsets, synset_names
from moviola.types import UsageError

LICENCE = "  1 This software and database is being provided to you\n"


def write(folder, *, noun="", verb="", adj="", adv=""):
    for name, lines in (("noun", noun), ("verb", verb), ("adj", adj), ("adv", adv)):
        (folder / f"data.{name}").write_text(LICENCE + lines, encoding="latin-1")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(
        tmp_path,
        noun=(
            "00000001 03 n 01 entity 0 000 | all there is  \n"
            "00000002 03 n 02 living_thing 0 organism 0 001 @ 00000001 n 0000 | alive  \n"
            '00000003 05 n 02 Dog 0 domestic_dog 0 002 @ 00000002 n 0000 ~ 00000009 n 0000 | barks "x"  \n'
            "00000004 05 n 01 St._Bernard 0 001 @ 00000003 n 0000 | large  \n"
            "00000005 06 n 01 .22_caliber 0 000 | small  \n"
        ),
        verb="00000001 29 v 01 run 0 001 @ 00000002 v 0000 01 + 02 00 | go fast  \n",
        adj="00000001 00 a 0b galore(ip) 0 a1 0 a2 0 a3 0 a4 0 a5 0 a6 0 a7 0 a8 0 a9 0 b1 0 000 | many  \n"
        "00000002 00 s 01 outback(a) 0 001 & 00000001 a 0000 | far  \n",
        adv="00000001 02 r 01 run 0 000 | as the verb  \n",
    )


def test_words_parents_and_gloss(folder):
    nouns = read_nouns(folder)
    assert nouns["00000003"].words == ("Dog", "domestic dog")
    assert nouns["00000003"].parents == ("00000002",)
    assert nouns["00000003"].gloss == 'barks "x"'
    assert read_synsets(folder, "verb")["00000001"].parents == ("00000002",)  # frames are no pointers


def test_adjectives_lose_their_markers_and_counts_are_hexadecimal(folder):
    words = read_synsets(folder, "adj")["00000001"].words
    assert words[0] == "galore"
    assert len(words) == 11


def test_hypernyms_nearest_first_without_those_left_out(folder):
    nouns = read_nouns(folder)
    assert list(hypernyms(nouns, "00000004")) == ["Dog", "domestic dog", "living thing", "organism", "entity"]
    assert list(hypernyms(nouns, "00000004", leave_out={"organism"})) == ["Dog", "domestic dog", "entity"]


def test_names_of_all_parts_of_speech_lower_case_up_to_the_first_full_stop(folder):
    assert synset_names(folder) == ["dog", "entity", "galore", "living thing", "outback", "run", "st"]


def test_a_folder_without_wordnet_says_what_is_expected(tmp_path):
    with pytest.raises(UsageError, match=r"data\.noun does not exist.*wordnet-base"):
        read_nouns(tmp_path)


def test_a_file_that_is_no_wordnet_names_the_line(tmp_path):
    write(tmp_path, noun="00000001 03 n 01 entity 0 000 | x\nhello world\n")
    with pytest.raises(UsageError, match="line 3"):
        read_nouns(tmp_path)
    write(tmp_path)
    with pytest.raises(UsageError, match="holds no synset"):
        read_nouns(tmp_path)
    with pytest.raises(UsageError, match="noun, verb, adj, adv"):
        read_synsets(tmp_path, "nouns")


def test_the_real_one_gives_the_papers_86654_entries():
    real = Path(os.environ.get("MOVIOLA_WORDNET", "/usr/share/wordnet"))
    if not (real / "data.noun").exists():
        pytest.skip("no WordNet database folder (set MOVIOLA_WORDNET)")
    names = synset_names(real)
    assert len(names) == 86_554
    assert len({*map(str, range(100)), *names}) == 86_654
