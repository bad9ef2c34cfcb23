"""The command as people run it: exit codes, JSON, messages. Uses the built-in model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from moviola.media import write_video

RED, BLUE = (220, 30, 30), (30, 30, 220)


def moviola(*args, cwd=None, check=None):
    done = subprocess.run(
        [sys.executable, "-m", "moviola", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )
    if check is not None:
        assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (80, 60), RED).save(folder / "red.png")
    frames = np.zeros((40, 64, 96, 3), np.uint8)
    frames[:20], frames[20:] = RED, BLUE
    write_video(folder / "two colours.mp4", frames, 10)
    return folder


@pytest.fixture(scope="module")
def indexed(media, tmp_path_factory):
    to = tmp_path_factory.mktemp("work") / "my.index"
    moviola("index", media, "--to", to, "--every", "0.5", check=0)
    return to


def test_help_lists_every_command():
    text = moviola("--help", check=0).stdout
    for name in (
        "index",
        "search",
        "embed",
        "classify",
        "evaluate",
        "info",
        "export",
        "systems",
        "reproduce",
    ):
        assert name in text


def test_search_prints_moments_and_json(indexed, media):
    text = moviola("search", indexed, "a plain blue picture", "-k", 3, check=0).stdout
    assert "two colours.mp4" in text
    data = json.loads(moviola("search", indexed, "a plain blue picture", "--json", check=0).stdout)
    assert data["results"]
    for found in data["results"]:
        assert set(found) == {"file", "start", "end", "score"}
        picture = found["file"].endswith(".png")
        assert (found["start"], found["end"]) == (0, 0) if picture else found["start"] < found["end"] <= 4.1
    scores = [found["score"] for found in data["results"]]
    assert scores == sorted(scores, reverse=True)


def test_search_writes_a_report_and_clips(indexed, tmp_path):
    page, clips = tmp_path / "r.html", tmp_path / "clips"
    moviola("search", indexed, "blue", "--html", page, "--clips", clips, "-k", 2, check=0)
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert list(clips.iterdir())


def test_indexing_again_does_nothing(indexed, media):
    report = json.loads(moviola("index", media, "--to", indexed, "--json", check=0).stdout)
    assert (report["new"], report["unchanged"], report["units"]) == (0, 2, 0)


def test_index_list_stats_remove(media, tmp_path):
    to = tmp_path / "i"
    moviola("index", media, "--to", to, check=0)
    assert "red.png" in moviola("index", "list", to, check=0).stdout
    assert json.loads(moviola("index", "stats", to, "--json", check=0).stdout)
    moviola("index", "remove", to, media / "red.png", check=0)
    assert "red.png" not in moviola("index", "list", to, check=0).stdout


def test_a_bad_file_is_reported_and_the_rest_goes_on(media, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "text.mp4").write_text("not a video")
    Image.new("RGB", (40, 40), BLUE).save(folder / "blue.png")
    done = moviola("index", folder, "--to", tmp_path / "i", check=1)
    assert "text.mp4" in done.stdout
    assert "1 indexed" in done.stdout


def test_nothing_to_index_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    done = moviola("index", tmp_path / "empty", "--to", tmp_path / "i", check=2)
    assert done.stderr.startswith("moviola: ")


@pytest.mark.parametrize(
    "args",
    [
        ("search", "nowhere.index", "a dog"),
        ("search", "INDEX", ""),
        ("search", "INDEX", "a dog", "-k", "0"),
        ("search", "INDEX", "word " * 300),
        ("search", "INDEX"),
        ("info", "nowhere.pt"),
        ("reproduce", "no-such-system"),
        ("evaluate", "builtin", "nowhere.csv"),
    ],
)
def test_errors_say_what_to_do_and_exit_with_2(args, indexed, tmp_path):
    done = moviola(*(indexed if a == "INDEX" else a for a in args), cwd=tmp_path, check=2)
    assert done.stderr.startswith("moviola: ")
    assert "Traceback" not in done.stderr


def test_classify_embed_info_systems(media, tmp_path):
    classes = "a red picture, a blue picture"
    made = json.loads(
        moviola("classify", "builtin", media / "red.png", "--classes", classes, "--json", check=0).stdout
    )
    assert made["classes"] == ["a red picture", "a blue picture"]
    assert len(made["results"]) == 1
    moviola("embed", media, "--to", tmp_path / "v.npy", check=0)
    assert np.load(tmp_path / "v.npy").shape == (2, 256)
    assert "recipe" in json.loads(moviola("info", "--json", check=0).stdout)
    systems = json.loads(moviola("systems", "--json", check=0).stdout)["systems"]
    assert {"number", "name", "room", "title", "call"} == set(systems[0])
    assert {0, 44} <= {s["number"] for s in systems}


@pytest.mark.slow
def test_demo_on_a_users_folder(media, tmp_path):
    done = moviola("demo", "--to", tmp_path / "out", "--media", media, "--query", "a blue picture", check=0)
    assert "two colours.mp4" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.slow
def test_demo_finds_a_planted_moment(tmp_path):
    done = json.loads(moviola("demo", "--to", tmp_path / "out", "--json", check=0).stdout)
    assert len(done["searches"]) == 3
    for search, planted in zip(done["searches"], done["planted"], strict=True):
        name = planted["file"].rsplit("/", 1)[-1]
        assert any(
            found["file"].endswith(name)
            and found["start"] < planted["end"]
            and found["end"] > planted["start"]
            for found in search["results"][:3]
        ), search["query"]


def test_importing_is_cheap():
    code = (
        "import sys, moviola; heavy = {'torch', 'av', 'pyarrow', 'transformers', 'tokenizers', 'numpy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
