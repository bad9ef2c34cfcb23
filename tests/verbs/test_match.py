"""`match`: the right picture, what it reports, what it refuses, and the page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moviola.parts.sentence_parser import Entity, Parse, Relation
from moviola.types import Refusal, UsageError
from moviola.verbs.match import NothingMatched, match
from moviola.verbs.match_pairs import evaluate_pairs
from tests.verbs.colour_clip import colour_model, picture, video

TEXT = "red then green"
PARSE = Parse(TEXT, (Entity("red"), Entity("green")), (Relation("red", "then", "green"),))
HALVES = {"a red part": [[0, 0, 11, 23]], "green thing": [[12, 0, 23, 23]]}


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("match")
    picture(folder / "right.png", "red", "green")
    picture(folder / "blue.png", "blue", "blue", "green")
    picture(folder / "yellow.png", "yellow")
    return folder


def boxes(**more: object) -> dict[str, object]:
    return {"right.png": HALVES, "blue": {"green": [[16, 0, 23, 23]]}, "yellow.png": {}, **more}


def test_the_right_picture_comes_first_and_the_parts_are_told(media: Path) -> None:
    got = match(TEXT, media, colour_model(), regions=boxes(), parse=PARSE)
    assert [Path(one.file).name for one in got.results] == ["right.png", "blue.png", "yellow.png"]
    assert got.regions == "given"
    parts = got.best.matched.parts
    assert [part.key for part in parts] == ["red", "green", "then"]
    assert parts[0].boxes == ((0, 0, 11, 23),)
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert got.results[2].matched.parts[0].boxes == ()
    data = json.loads(json.dumps(got.to_json()))
    assert data["results"][0]["parts"][0]["boxes"] == [[0, 0, 11, 23]]
    assert data["ok"]
    assert "right.png" in str(got)


def test_plain_is_what_search_would_say(media: Path) -> None:
    model = colour_model()
    got = match(TEXT, media, model, regions=boxes(), parse=PARSE)
    from PIL import Image

    image_ND = model.embed_pictures([Image.open(one.file) for one in got.results])
    np.testing.assert_allclose(
        [one.plain for one in got.results], image_ND @ model.embed_texts(TEXT)[0], atol=1e-5
    )


def test_tables_files_k_and_rerank(media: Path, tmp_path: Path) -> None:
    files = {}
    for name, data in {
        "regions": boxes(),
        "parse": PARSE.to_json(),
        "table": {
            name: {"red": phrases, "green": []}
            for name, phrases in {"right": ["green thing"], "blue": ["nothing"], "yellow": []}.items()
        },
    }.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(data))
    got = match(TEXT, media, colour_model(), **files)
    by_name = {Path(one.file).stem: one for one in got.results}
    assert by_name["right"].matched.parts[0].boxes == ((12, 0, 23, 23),)
    assert by_name["blue"].matched.parts[0].boxes == ()  # a phrase without a box: the whole picture
    assert len(match(TEXT, media, colour_model(), regions=boxes(), parse=PARSE, k=1).results) == 1
    short = match(TEXT, media, colour_model(), regions=boxes(), parse=PARSE, rerank=2)
    assert {Path(one.file).stem for one in short.results} == {"right", "blue"}
    assert short.notes == ("1 pictures that fit less by their plain cosine were left out.",)


def test_what_cannot_be_compared_is_told(media: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    clip = video(tmp_path / "clip.mp4", ("red", 0.5))
    stray = picture(tmp_path / "stray.png", "red")
    outside = picture(tmp_path / "outside.png", "red")
    files = [media / "right.png", broken, clip, stray, outside, tmp_path / "gone.png"]
    got = match(
        TEXT, files, colour_model(), regions=boxes(**{"outside.png": {"red": [[90, 0, 95, 9]]}}), parse=PARSE
    )
    assert [Path(one.file).name for one in got.results] == ["right.png"]
    why = {Path(one.path).name: one.reason for one in got.failed}
    assert set(why) == {"broken.png", "clip.mp4", "stray.png", "outside.png", "gone.png"}
    assert "video" in why["clip.mp4"]
    assert "no entry" in why["stray.png"]
    assert "outside the picture" in why["outside.png"]
    assert not got.ok
    with pytest.raises(NothingMatched, match="none of the 1 files"):
        match(TEXT, broken, colour_model(), regions={}, parse=PARSE)
    with pytest.raises(NothingMatched, match="no pictures"):
        match(TEXT, tmp_path_empty(tmp_path), colour_model(), regions={}, parse=PARSE)


def tmp_path_empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_picture_the_model_fails_on_is_told(media: Path) -> None:
    got = match(TEXT, media, colour_model(broken="yellow"), regions=boxes(), parse=PARSE)
    assert [Path(one.path).name for one in got.failed] == ["yellow.png"]
    assert "no finite score" in got.failed[0].reason


def test_no_entity_gives_plain_cosines(media: Path) -> None:
    got = match(TEXT, media, colour_model(), regions=boxes(), parse=Parse(TEXT))
    assert all(one.score == pytest.approx(one.plain) for one in got.results)
    assert "No thing" in got.notes[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text": " "}, "empty"),
        ({"k": 0}, "k must be at least 1"),
        ({"rerank": 0}, "rerank must be"),
        ({"table": {}}, "without regions"),
        ({"regions": {"right.png": [1]}}, "object of objects"),
        ({"regions": "missing.json"}, "cannot be read"),
        ({"parse": {"objects": {}, "connections": [{"subject": "red"}]}}, "lacks verb"),
        ({"parse": Parse("another sentence")}, "another sentence"),
        ({"parse": PARSE, "parser": object()}, "not both"),
        ({"regions": {"right.png": {"red": [[1, 2]]}}, "parse": PARSE}, "must be a list of"),
        (
            {"regions": boxes(), "table": {"right.png": {"red": []}}, "parse": PARSE},
            "lacks the entity 'green'",
        ),
    ],
)
def test_bad_input(media: Path, options: dict[str, object], said: str) -> None:
    text = options.pop("text", TEXT)
    with pytest.raises(UsageError, match=said):
        match(text, media / "right.png", colour_model(), **options)  # type: ignore[arg-type]


def test_models_without_words_or_patches(media: Path) -> None:
    with pytest.raises(Refusal, match="no text tower"):
        match(TEXT, media, colour_model(has_text=False), parse=PARSE)
    with pytest.raises(Refusal, match="--regions"):
        match(TEXT, media, colour_model(), parse=PARSE)


def test_the_page_shows_each_box(media: Path, tmp_path: Path) -> None:
    evil = picture(tmp_path / "<b>&.png", "red", "green")
    page = tmp_path / "new" / "page.html"
    match(TEXT, [media, evil], colour_model(), regions=boxes(**{evil.name: HALVES}), parse=PARSE, html=page)
    html = page.read_text()
    assert "&lt;b&gt;&amp;.png" in html
    assert "<b>" not in html
    svgs = [ElementTree.fromstring(part[: part.index("</svg>") + 6]) for part in _split(html)]
    assert sorted(len(svg.findall("rect")) for svg in svgs) == [0, 1, 2, 2]
    best = svgs[0].findall("rect")[1]
    assert [float(best.get(side)) for side in ("x", "y", "width", "height")] == [12, 0, 12, 24]


def test_boxes_that_cover_everything_are_told(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moviola.systems.retrieval import comclip

    found = {"red": [(0, 0, 23, 23)], "green": [(12, 0, 23, 23)]}
    monkeypatch.setattr(comclip, "PatchRegions", lambda *_, **__: lambda pictures, _: [found] * len(pictures))
    got = match(TEXT, [media / "right.png", media / "blue.png"], colour_model(), parse=PARSE)
    assert got.notes[0].startswith("2 of the 4 boxes cover all")


def _split(html: str) -> list[str]:
    return ["<svg" + part for part in html.split("<svg")[1:]]


def test_the_command_and_the_built_in_model(media: Path, tmp_path: Path) -> None:
    """By default: rules take the sentence apart, and boxes come from the model's own patches."""
    from moviola.cli.match import match as command

    app = typer.Typer()
    app.command()(command)
    files = [str(media / name) for name in ("right.png", "yellow.png")]
    done = CliRunner().invoke(
        app, ["a red square left of a green square", *files, "--json", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["regions"] == "own patches"
    assert Path(data["results"][0]["file"]).name == "right.png"
    assert data["parse"]["connections"]
    again = CliRunner().invoke(
        app, ["a red square left of a green square", *files, str(tmp_path / "gone.png"), "-k", "1"]
    )
    assert again.exit_code == 1
    assert "right.png" in again.stdout


# --------------------------------------------------------------------------------------------------
# Tables of pairs
# --------------------------------------------------------------------------------------------------


def comvg(path: Path, *rows: tuple[object, ...]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sentence", "pos_triplet", "pos_image_id", "neg_image_id", "neg_value"])
        writer.writerows((n, *row) for n, row in enumerate(rows))
    return path


def test_pairs_count_failed_rows(tmp_path: Path) -> None:
    for name, colours in {"1": ("red", "green"), "2": ("blue", "green"), "3": ("red", "blue")}.items():
        picture(tmp_path / f"{name}.png", *colours)
    table = comvg(
        tmp_path / "pairs.csv",
        (TEXT, "red,then,green", 1, 2, "subject"),
        (TEXT, "[red,then,green]", 1, 3, "object"),
        (TEXT, "red,then,green", 3, 1, "object"),
        (TEXT, "red,then,green", 1, 99, "subject"),
        (TEXT, "red,then", 1, 2, "verb"),
    )
    regions = {
        name: {colour: [[12 * n, 0, 12 * n + 11, 23]] for n, colour in enumerate(colours)}
        for name, colours in {"1": ("red", "green"), "2": ("blue", "green"), "3": ("red", "blue")}.items()
    }
    got = evaluate_pairs(colour_model(), table, tmp_path, regions=regions, ending=".png")
    assert (got.comclip.accuracy, got.comclip.rows, got.comclip.failed) == (40.0, 5, 2)
    assert got.comclip.scored == pytest.approx(200 / 3)
    assert (got.plain.accuracy, got.plain.failed) == (40.0, 2)
    assert {kind: ours.accuracy for kind, (ours, _) in got.kinds.items()} == {
        "subject": 50.0,
        "object": 50.0,
        "verb": 0.0,
    }
    assert [one.path for one in got.failed] == ["pairs.csv:4", "pairs.csv:5"]
    assert json.loads(json.dumps(got.to_json()))["comclip"]["failed"] == 2
    assert "count as wrong" in str(got)


def test_pairs_the_model_fails_on_are_told(tmp_path: Path) -> None:
    for name, colour in {"1": "red", "2": "green", "3": "yellow"}.items():
        picture(tmp_path / f"{name}.png", colour)
    rows = [(TEXT, "red,then,green", 1, wrong, "subject") for wrong in (2, 3)]
    table = comvg(tmp_path / "pairs.csv", *rows)
    regions = {name: {} for name in "123"}
    got = evaluate_pairs(colour_model(broken="yellow"), table, tmp_path, regions=regions, ending=".png")
    assert [one.path for one in got.failed] == ["pairs.csv:2"]
    assert (got.comclip.failed, got.plain.failed, got.comclip.rows) == (1, 1, 2)


def test_pairs_bad_input(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("sentence,image\na,b\n")
    with pytest.raises(UsageError, match="no column pos_triplet"):
        evaluate_pairs(colour_model(), other, tmp_path)
    table = comvg(tmp_path / "t.csv", (TEXT, "red,then,green", 1, 2, "subject"))
    with pytest.raises(UsageError, match="no folder"):
        evaluate_pairs(colour_model(), table, tmp_path / "gone")
    with pytest.raises(UsageError, match="Not one of the 1 rows"):
        evaluate_pairs(colour_model(), table, tmp_path, regions={})
    with pytest.raises(UsageError, match="has no rows"):
        evaluate_pairs(colour_model(), comvg(tmp_path / "e.csv"), tmp_path, regions={})
