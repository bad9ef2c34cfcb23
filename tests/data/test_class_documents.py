"""Texts of classes from a folder, a JSON file or a mapping."""

from __future__ import annotations

import json

import pytest

from moviola.data.class_documents import read_documents
from moviola.systems.video.zsarcap import squeeze
from moviola.types import UsageError

CLASSES = ["Ride Horse", "swim"]


def read(source, **options):
    return read_documents(source, CLASSES, key=squeeze, **options)


def test_every_form(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "ride_horse.txt").write_text("He rides.", encoding="utf-8-sig")
    (folder / "swim.txt").write_text("She swims.\nFar.")
    (folder / "fly.txt").write_text("It flies.")
    wanted = {"Ride Horse": "He rides.", "swim": "She swims.\nFar."}
    assert read(folder) == (wanted, ("fly",))
    plain = {"ridehorse": "He rides.", "swim": ["She swims.", "Far."]}
    (tmp_path / "a.json").write_text(json.dumps(plain))
    assert read(tmp_path / "a.json") == (wanted, ())
    defined = [{"word": "ride horse", "defn": "He rides."}, {"word": "swim", "defn": "She swims.\nFar."}]
    (tmp_path / "b.json").write_text(json.dumps(defined))
    assert read(tmp_path / "b.json") == (wanted, ())
    assert read({"ride_horse": "He rides.", "Swim": "She swims.\nFar."}) == (wanted, ())


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "swim.txt").write_bytes("caf\u00e9".encode("cp1252"))
    (tmp_path / "ride horse.txt").write_text("x")
    with pytest.raises(UsageError, match=r"swim\.txt is not utf-8 text .*encoding='cp1252'"):
        read(tmp_path)
    assert read(tmp_path, encoding="cp1252")[0]["swim"] == "caf\u00e9"
    with pytest.raises(UsageError, match="no encoding 'nope'"):
        read(tmp_path, encoding="nope")


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match=r"holds no \.txt"):
        read(tmp_path)
    (tmp_path / "swim.txt").write_text("x")
    with pytest.raises(UsageError, match=r"no document for 1 of 2 classes: Ride Horse\. It has: swim"):
        read(tmp_path)
    assert read(tmp_path, some=True)[0] == {"swim": "x"}
    with pytest.raises(UsageError, match="two documents of one class: 'ride_horse' and 'ride horse'"):
        read({"ride_horse": "a", "ride horse": "b", "swim": "c"})
    for text, said in (("3", "no class documents"), ('{"swim": 3, "ride horse": ""}', "got a int")):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "a.json")
