"""`moviola curate clips`, `classify --through-sentences` and `evaluate --also`, as people run them."""

from __future__ import annotations

import json
import sys

import pytest

from moviola.cli import main
from tests.verbs.colour_clip import video


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Two red films, one of which is the other's copy, and a blue one."""
    video(tmp_path / "clips" / "red" / "a.mp4", ("red", 1.0), ("white", 0.5))
    (tmp_path / "clips" / "red" / "b.mp4").write_bytes((tmp_path / "clips" / "red" / "a.mp4").read_bytes())
    video(tmp_path / "clips" / "blue" / "c.mp4", ("blue", 1.0))
    (tmp_path / "seers.py").write_text(
        "def nobody(frames):\n    return 0\n\ndef one(frames):\n    return 1\n"
    )
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clips"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moviola", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return ended.value.code or 0, told.out, told.err

    return run


def test_raw_videos_are_cleaned(clips, run, tmp_path):
    status, out, _ = run("curate", "clips", clips, "--to", "clean", "--detector", "seers:one", "--json")
    assert status == 0
    assert json.loads(out)["clips"] == 2
    rows = [json.loads(line) for line in (tmp_path / "clean" / "clips.jsonl").read_text().splitlines()]
    assert {row["people"] for row in rows} == {1}
    status, _, err = run("curate", "clips", clips, "--to", "none", "--detector", "seers:nobody")
    assert status != 0
    assert "No clip is left" in err
    status, _, err = run("curate", "clips", clips, "--to", "no", "--detector", "seers:who")
    assert status != 0
    assert "There is no detector 'seers:who'" in err


def test_classes_are_told_through_sentences(clips, run, tmp_path):
    said = {"a": "a red wall", "b": "a red wall", "c": "a blue wall"}
    (tmp_path / "said.json").write_text(json.dumps(said))
    call = ["classify", "builtin", clips, "--classes", "red wall, blue wall", "--device", "cpu", "--json"]
    status, out, _ = run(*call, "--through-sentences", "--captions", "said.json")
    assert status == 0
    found = {one["file"][-5]: one["classes"][0]["name"] for one in json.loads(out)["results"]}
    assert found == {"a": "red wall", "b": "red wall", "c": "blue wall"}
    status, _, err = run(*call, "--captions", "said.json")
    assert status != 0
    assert "--through-sentences" in err


def test_models_are_compared_on_the_same_clips(clips, run):
    status, out, _ = run("evaluate", "builtin", clips, "--also", "builtin", "--device", "cpu", "--json")
    assert status == 0
    first, second = json.loads(out)["models"]
    assert first == second
    status, _, err = run("evaluate", "builtin", clips, "--also", "builtin", "--head", "words")
    assert status != 0
    assert "--also compares zero-shot figures" in err


def test_a_video_that_cannot_be_read_ends_with_status_one(clips, run):
    (clips / "red" / "broken.mp4").write_bytes(b"no film")
    status, out, _ = run("curate", "clips", clips, "--to", "clean")
    assert status == 1
    assert "broken.mp4" in out
