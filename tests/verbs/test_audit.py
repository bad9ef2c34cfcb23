"""`audit`: known figures through the whole verb, bad input, resuming, the page and the command."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from moviola.cli.audit import audit as audit_command
from moviola.clip.loaded import Model, unit
from moviola.data.classes import read_classes
from moviola.data.cue_conflict import CLASSES
from moviola.data.templates import GENERAL
from moviola.metrics.calibration import softmax
from moviola.types import Refusal, StoreError, UsageError
from moviola.verbs import audit_suites
from moviola.verbs.audit import AuditReport, audit
from moviola.verbs.audit_charts import letter, percents
from moviola.verbs.audit_models import WithWords
from moviola.verbs.audit_page import SECTIONS, audit_page
from moviola.verbs.classify import ClassScorer
from moviola.verbs.evaluate import evaluate_zero_shot
from moviola.verbs.set_reader import NothingEvaluated
from tests.verbs.colour_clip import COLOURS, TOKENIZER, ColourClip, colour_model, encoded, picture, video

NAMES = list(COLOURS)
PLAIN: dict[str, Any] = {"corruptions": None, "cue_conflict": None, "prompts": ()}
"""Accuracy and calibration alone."""


class Rule:
    """A classifier that answers as `rule` says: a row of logits for the middle pixel's colour."""

    def __init__(
        self, rule: Mapping[str, Sequence[float]], name: str = "rule", classes: Sequence[str] = NAMES
    ) -> None:
        self.rule, self.name, self.classes = rule, name, list(classes)
        self.seen = 0

    def classify_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        self.seen += len(pictures)
        found = []
        for one in pictures:
            pixel = np.asarray(one.convert("RGB").getpixel((one.width // 2, one.height // 2)))
            colour = min(COLOURS, key=lambda name: float(np.abs(pixel - np.array(COLOURS[name])).sum()))
            found.append(self.rule[colour])
        return np.array(found, np.float32)


class Kept(Rule):
    hash = "kept"


def sure(right: float = 4.0, wrong: Mapping[str, str] | None = None) -> dict[str, list[float]]:
    """Logits of `right` for the colour itself, or for what `wrong` says in its stead."""
    said = {name: (wrong or {}).get(name, name) for name in NAMES}
    return {name: [right * (other == said[name]) for other in NAMES] for name in NAMES}


def model_of(factor: float = 1.0, name: str = "colours", **options: Any) -> Any:
    """A colour model with another logit scale; its hash follows its weights."""
    made = colour_model(**options)
    with torch.no_grad():
        made.module.logit_scale += math.log(factor)
    made.hash, made.name = f"colours times {factor}", name
    return made


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Eight classes of two pictures."""
    root = tmp_path / "set"
    for name in NAMES:
        for n in range(2):
            picture(root / name / f"{n}.png", name)
    return root


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that are decoded."""
    names: list[str] = []
    real = audit_suites.looks

    def counted(*given: Any, **options: Any) -> Any:
        for item in real(*given, **options):
            names.append(item[1])
            yield item

    monkeypatch.setattr(audit_suites, "looks", counted)
    return names


def part(report: AuditReport, section: str, model: str = "rule") -> Any:
    return report.to_json()["sections"][section]["by_model"][model]


def finite(value: Any) -> bool:
    """No NaN and no infinity anywhere, and only what JSON knows."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and finite(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(finite, value))
    return value is None or isinstance(value, str | bool | int) or math.isfinite(value)


# --------------------------------------------------------------------------------------------------
# Known figures
# --------------------------------------------------------------------------------------------------


def test_accuracy_and_calibration_of_a_known_rule(folders: Path) -> None:
    report = audit(Rule(sure(4.0, {"red": "blue", "cyan": "blue"})), folders, **PLAIN)
    found = part(report, "accuracy")
    assert (found["top1"], found["mean_per_class"], found["n"]) == (75.0, 75.0, 16)
    assert found["per_class"]["red"] == 0.0
    assert found["per_class"]["blue"] == 100.0
    assert found["standard_error"] == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 16), abs=1e-4)
    half = part(report, "calibration")
    confidence = 100 * float(softmax([[4.0] + [0.0] * 7]).max())
    assert half["ece"] == pytest.approx(abs(confidence - half["top1"]), abs=1e-4)
    right = half["top1"] / 100
    spent = -right * math.log(confidence / 100) - (1 - right) * math.log((1 - confidence / 100) / 7)
    assert half["nll"] == pytest.approx(spent, abs=1e-5)
    assert sum(half["reliability"]["count"]) == half["n"] == 8
    assert "With 16 items" in " ".join(report.figures["notes"])


def test_the_diagram_is_of_the_half_that_was_measured(folders: Path) -> None:
    """The gaps of the diagram, weighted by their items, are the ECE of the table."""
    report = audit(model_of(), folders, **PLAIN)
    found = part(report, "calibration", "colours")
    for ending in ("", "_scaled"):
        diagram = found[f"reliability{ending}"]
        gaps = [
            count * abs(right - sure)
            for count, right, sure in zip(
                diagram["count"], diagram["accuracy"], diagram["confidence"], strict=True
            )
            if count
        ]
        assert sum(gaps) / found["n"] == pytest.approx(found[f"ece{ending}"], abs=1e-4)


def test_an_inflated_model_gets_its_temperature_back(tmp_path: Path) -> None:
    """Logits ten times as large: the same accuracy, ten times the temperature, the same NLL after it."""
    rng = np.random.default_rng(0)
    for name in NAMES:
        for n in range(8):
            other = NAMES[rng.integers(8)]
            picture(tmp_path / "set" / name / f"{n}.png", *((name, other) if n else (other,)), size=(8, 8))
    rule = {name: [2.0 * (other == name) + 0.1 * k for k, other in enumerate(NAMES)] for name in NAMES}
    loud = {name: [10 * value for value in row] for name, row in rule.items()}
    report = audit([Rule(rule, "plain"), Rule(loud, "loud")], tmp_path / "set", **PLAIN)
    plain, inflated = (part(report, "calibration", name) for name in ("plain", "loud"))
    assert inflated["temperature"] == pytest.approx(10 * plain["temperature"], rel=1e-5)
    assert inflated["nll_scaled"] == pytest.approx(plain["nll_scaled"], abs=1e-5)
    assert inflated["ece"] > inflated["ece_scaled"]
    assert inflated["top1"] == plain["top1"]


def test_accuracy_is_that_of_evaluate(folders: Path) -> None:
    picture(folders / "red" / "2.png", "blue", "red", "blue")
    report = audit(model_of(), folders, templates="general", truncate=True, **PLAIN)
    known = evaluate_zero_shot(colour_model(), folders, templates="general", truncate=True)
    assert part(report, "accuracy", "colours")["top1"] == pytest.approx(known.top1)


def test_a_model_that_is_not_separable_is_asked_its_own_score(folders: Path) -> None:
    picture(folders / "red" / "2.png", "blue")
    report = audit(
        [model_of(separable=False, name="frames"), model_of()],
        folders,
        corruptions=("contrast",),
        severities=(1,),
        prompts=("simple", ["then {}", "a photo of a {}"]),
        cue_conflict=None,
    )
    for name in ("frames", "colours"):
        assert part(report, "accuracy", name)["top1"] == pytest.approx(100 * 16 / 17)
    alone, _ = part(report, "prompts", "frames")["alone"], part(report, "prompts", "colours")["alone"]
    assert alone is None
    assert part(report, "prompts", "frames")["sets"]["range"] == 0


class OwnHead(ColourClip):
    """Answers by the share of each colour, without words; blue for what is mostly red."""

    def classify_image(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        logits_BC = self.encode_image(pixels_BCHW).clone()
        red, blue = NAMES.index("red"), NAMES.index("blue")
        logits_BC[:, blue] += logits_BC[:, red]
        logits_BC[:, red] = 0
        return logits_BC


def test_an_adapted_classifier_answers_by_its_own_head(folders: Path, tmp_path: Path) -> None:
    base = colour_model()
    model = Model(
        OwnHead(adaptation="classifier"),
        config={},
        recipe=base.recipe,
        tokenizer=TOKENIZER,
        name="own head",
        device="cpu",
        classes=NAMES,
    )
    options = {**PLAIN, "prompts": ("simple", ["{}"])}
    report = audit([model, model_of()], folders, to=tmp_path / "out", **options)
    assert part(report, "accuracy", "own head")["per_class"]["red"] == 0.0
    assert part(report, "accuracy", "own head")["top1"] == 87.5
    assert [one["kind"] for one in report.figures["models"]] == ["classifier", "words"]
    assert list(report.figures["sections"]["prompts"]["by_model"]) == ["colours"]
    assert len(list((tmp_path / "out" / "cache").iterdir())) == 2
    for name in NAMES[1:]:
        (folders / name).rename(folders / f"not {name}")
    with pytest.raises(UsageError, match="does not know 7 of 8 classes"):
        audit(model, folders, **options)


def test_corruptions_reach_every_model_alike(folders: Path) -> None:
    """Thick fog whitens the colours, which the rule reads from the middle pixel."""
    rules = [Rule(sure(), "one"), Rule(sure(), "two")]
    report = audit(
        rules, folders, corruptions=("fog", "gaussian-noise"), severities=(5, 1), cue_conflict=None
    )
    section = report.to_json()["sections"]["corruptions"]
    assert section["severities"] == [1, 5]
    assert set(section["names"]) == {"fog", "gaussian noise"}
    one, two = (section["by_model"][name] for name in ("one", "two"))
    assert one == two
    assert one["clean"] == 100.0
    row = one["rows"]["fog"]
    assert row["severity"]["5"] < row["severity"]["1"]
    assert row["mean"] == pytest.approx((row["severity"]["1"] + row["severity"]["5"]) / 2)
    assert row["relative_drop"] == pytest.approx(100 - row["mean"], abs=1e-4)
    assert row["effective"] is None
    assert any("No effective robustness" in note for note in report.figures["notes"])
    assert set(part(report, "calibration", "one")["corrupted"]) == {"1", "5"}


def test_noise_does_not_depend_on_where_the_folder_lies(folders: Path, tmp_path: Path) -> None:
    kept: list[list[bytes]] = []

    class Watch(Rule):
        def classify_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
            kept[-1] += [one.tobytes() for one in pictures]
            return super().classify_pictures(pictures)

    options: dict[str, Any] = {"corruptions": ("shot noise",), "severities": (3,), "cue_conflict": None}
    for place, seed in ((folders, 0), (folders.rename(tmp_path / "moved"), 0), (tmp_path / "moved", 1)):
        kept.append([])
        audit(Watch(sure()), place if place.exists() else tmp_path / "moved", seed=seed, **options)
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]


def test_large_pictures_are_corrupted_at_the_size_that_models_see(tmp_path: Path) -> None:
    sizes = set()

    class Watch(Rule):
        def classify_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
            sizes.update(one.size for one in pictures)
            return super().classify_pictures(pictures)

    for name in ("red", "green"):
        picture(tmp_path / "set" / name / "1.png", name, size=(300, 450))
    audit(Watch(sure()), tmp_path / "set", corruptions="jpeg", severities=(1,), cue_conflict=None)
    assert sizes == {(450, 300), (336, 224)}


class Shaky(Rule):
    """Answers black for every picture whose middle is not exactly a colour of the palette."""

    def classify_pictures(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        found = super().classify_pictures(pictures)
        for row, one in enumerate(pictures):
            if one.convert("RGB").getpixel((one.width // 2, one.height // 2)) not in COLOURS.values():
                found[row] = self.rule["black"]
        return found


def test_effective_robustness_from_models_and_from_reports(folders: Path, tmp_path: Path) -> None:
    """Baselines that noise costs nothing lie on a line; a model like them is on it, a shaky one below."""
    options: dict[str, Any] = {"corruptions": "gaussian noise", "severities": (1,), "cue_conflict": None}
    wrongs: list[dict[str, str]] = [{}, {"red": "blue"}, {"red": "blue", "cyan": "blue"}]
    rules = [Rule(sure(4, wrong), f"base {n}") for n, wrong in enumerate(wrongs)]
    for n, one in enumerate(rules):
        audit(one, folders, to=tmp_path / f"report {n}", **options)
    models = [Rule(sure(4, {"green": "blue"}), "good"), Shaky(sure(4, {"green": "blue"}), "shaky")]
    live = audit(models, folders, baselines=rules, **options)
    stored = audit(models, folders, baselines=[tmp_path / f"report {n}" for n in range(3)], **options)
    last = AuditReport(json.loads((tmp_path / "report 2" / "report.json").read_text()))
    mixed = audit(models, folders, baselines=[rules[0], tmp_path / "report 1/report.json", last], **options)
    for report in (live, stored, mixed):
        assert report.figures["baselines"] == ["base 0", "base 1", "base 2"]
        good, shaky = (
            part(report, "corruptions", name)["rows"]["gaussian noise"] for name in ("good", "shaky")
        )
        assert good["effective"] == pytest.approx(0, abs=0.01)
        assert shaky["effective"] == pytest.approx(shaky["mean"] - good["mean"], abs=0.01)
        assert shaky["mean"] < 50
        assert not any("No effective" in note for note in report.figures["notes"])
    assert "Effective robustness" in audit_page(live.to_json())
    with pytest.raises(UsageError, match="other pictures or other corruptions"):
        audit(models, folders, baselines=[tmp_path / "report 0"], **{**options, "severities": (4,)})
    audit(rules[0], folders, to=tmp_path / "report 3", **PLAIN)
    with pytest.raises(UsageError, match="other pictures or other corruptions"):
        audit(models, folders, baselines=[tmp_path / "report 3"], **options)


def test_factors_from_a_mapping_a_file_and_a_column(folders: Path, tmp_path: Path) -> None:
    tags = {f"{name}/{n}.png": ("pose" if n else ["dark", "pose"]) for name in NAMES for n in range(2)}
    del tags["red/0.png"]
    rule = Rule(sure(4, {"red": "blue"}))
    (tmp_path / "tags.json").write_text(json.dumps(tags))
    for given in (tags, tmp_path / "tags.json"):
        report = audit(rule, folders, factors=given, **PLAIN)
        section = report.to_json()["sections"]["factors"]
        assert section["items"] == {"dark": 7, "pose": 8}
        assert section["untagged"] == 1
        found = section["by_model"]["rule"]["factors"]
        assert found["dark"]["accuracy"] == 100.0
        assert found["pose"]["accuracy"] == 87.5
        assert found["pose"]["gap"] == 0.0
    rows = [(name, encoded(name, tmp_path), "odd" if name == "red" else None) for name in NAMES]
    columns = dict(zip(("name", "image", "what"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({key: list(value) for key, value in columns.items()}), tmp_path / "set.parquet")
    report = audit(rule, tmp_path / "set.parquet", factors="what", **PLAIN)
    assert part(report, "factors")["factors"]["odd"]["accuracy"] == 0.0
    with pytest.raises(UsageError, match="no column 'where'"):
        audit(rule, tmp_path / "set.parquet", factors="where", **PLAIN)
    with pytest.raises(UsageError, match="gives none of 16 items"):
        audit(rule, folders, factors={"x.png": "pose"}, **PLAIN)
    with pytest.raises(UsageError, match="no columns"):
        audit(rule, folders, factors="what", **PLAIN)


def test_shape_bias_of_the_published_layout(tmp_path: Path, folders: Path) -> None:
    """Stripes by shape colour, middle by texture colour: the rule reads the middle, so texture decides."""
    root = tmp_path / "cues"
    for shape, texture in (("cat", "dog"), ("dog", "cat"), ("cat", "cat")):
        colour = {"cat": "red", "dog": "blue"}
        place = root / shape / f"{shape}1-{texture}2.png"
        picture(place, colour[shape], colour[texture], colour[shape], size=(9, 9))
    # answers by the middle pixel: red means cat, blue means dog
    classes = [*NAMES, *CLASSES]
    rule = {name: [0.0] * len(classes) for name in NAMES}
    for colour, name in (("red", "cat"), ("blue", "dog")):
        rule[colour][classes.index(name)] = 5.0
    report = audit(
        [Rule(rule, classes=classes), Rule(sure(), "narrow")],
        folders,
        **{**PLAIN, "cue_conflict": root},
    )
    found = part(report, "shape")
    assert (found["bias"], found["shape"], found["texture"], found["used"]) == (0.0, 0, 2, 2)
    assert "narrow" not in report.figures["sections"]["shape"]["by_model"]
    assert any("narrow" in note for note in report.figures["notes"])


def test_shape_bias_of_made_pictures(folders: Path) -> None:
    """Plain colours have no shape: with the amplitude comes the colour, and every answer is the texture."""
    report = audit(model_of(), folders, **{**PLAIN, "cue_conflict": "made"})
    found = part(report, "shape", "colours")
    assert found["texture"] > found["shape"] == 0
    assert report.figures["sections"]["shape"]["pictures"] == 64


def test_outside_of_a_known_rule(folders: Path, tmp_path: Path) -> None:
    """Surest of red and unsure of white: white pictures outside are told apart, red ones look inside."""
    rule = sure(4.0) | {"white": [0.1] + [0.0] * 7, "red": sure(5.0)["red"]}
    for n in range(3):
        picture(tmp_path / "away" / "deep" / f"{n}.png", "white")
        picture(tmp_path / "near" / f"{n}.png", "red")
    classes = folders / "white"
    for one in classes.iterdir():
        one.unlink()
    report = audit(Rule(rule), folders, outside=[tmp_path / "away", tmp_path / "near"], **PLAIN)
    section = report.to_json()["sections"]["outside"]
    assert section["items"] == {"away": 3, "near": 3}
    away, near = (section["by_model"]["rule"]["by_set"][name] for name in ("away", "near"))
    assert (away["max_probability"]["auroc"], away["max_probability"]["fpr"]) == (100.0, 0.0)
    # of 14 pictures inside two are as sure as those outside, all others less
    assert near["max_probability"]["auroc"] == pytest.approx(100 * 2 * 0.5 / 14, abs=1e-4)
    assert near["max_probability"]["fpr"] == 100.0
    assert sum(section["by_model"]["rule"]["histogram"]) == 14
    assert "1 of 8 classes have no item here." in report.figures["notes"]
    table = pa.table({"image": [encoded("white", tmp_path)] * 2})
    pq.write_table(table, tmp_path / "away.parquet")
    report = audit(Rule(rule), folders, outside=tmp_path / "away.parquet", **PLAIN)
    assert part(report, "outside")["by_set"]["away.parquet"]["max_logit"]["n"] == 2


def test_prompts_by_set_and_alone(folders: Path) -> None:
    """A template that names another colour misleads; the mean over a set with it is steadier."""
    misled = "a {} white white white white"
    report = audit(
        [model_of(), Rule(sure())], folders, **{**PLAIN, "prompts": ["simple", [misled], ["{}", misled]]}
    )
    section = report.to_json()["sections"]["prompts"]
    assert list(section["templates"]) == ["simple", misled, "{} ..."]
    assert list(section["by_model"]) == ["colours"]
    found = section["by_model"]["colours"]
    assert found["sets"]["templates"]["simple"] == 100.0
    assert found["alone"]["templates"][misled] == found["sets"]["templates"][misled]
    assert found["sets"]["range"] == pytest.approx(
        max(found["sets"]["templates"].values()) - min(found["sets"]["templates"].values())
    )
    assert (
        "prompts" not in audit(Rule(sure()), folders, corruptions=None, cue_conflict=None).figures["sections"]
    )


def test_vectors_and_templates_asked_later_give_the_scores_of_a_scorer() -> None:
    """The cache keeps vectors; a set that was not known then gives what `ClassScorer` gives."""
    model = model_of()
    reader = WithWords(model, NAMES, [("{}",)], batch_size=4, truncate=True)
    raw_NK = unit(np.random.default_rng(0).normal(size=(5, model.dim)))
    scorer = ClassScorer(model, NAMES, GENERAL, batch_size=4, frames=None, truncate=True)
    np.testing.assert_array_equal(reader.logits(raw_NK, GENERAL), scorer.logits(raw_NK))


def test_retrieval_both_ways(folders: Path, tmp_path: Path) -> None:
    rows = [
        (str(picture(tmp_path / "pairs" / f"{name}.png", name)), f"a photo of a {name}") for name in NAMES
    ]
    lines = ["image,caption", *(",".join(row) for row in rows)]
    (tmp_path / "pairs" / "pairs.csv").write_text("\n".join(lines))
    done: list[tuple[float, float | None]] = []
    report = audit(
        [model_of(), Rule(sure())],
        folders,
        retrieval=tmp_path / "pairs" / "pairs.csv",
        on_progress=lambda done_, total, note="": done.append((done_, total)),
        **PLAIN,
    )
    section = report.to_json()["sections"]["retrieval"]
    assert list(section["by_model"]) == ["colours"]
    assert section["by_model"]["colours"]["text_to_item"]["R1"] == 100.0
    assert done[-1] == (16 * 2 + 8, 16 * 2 + 8)


# --------------------------------------------------------------------------------------------------
# The cache
# --------------------------------------------------------------------------------------------------


def test_a_killed_audit_goes_on(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: list[str]
) -> None:
    monkeypatch.setattr(audit_suites, "BLOCK", 4)
    options: dict[str, Any] = {"corruptions": ("jpeg",), "severities": (1,), "cue_conflict": None}

    def kill(done: float, total: float | None, note: str = "") -> None:
        if done == 2 * 8 + 4:  # looks: two blocks whole, and half of the third
            raise KeyboardInterrupt

    whole = audit(Kept(sure()), folders, **options)
    shown.clear()
    with pytest.raises(KeyboardInterrupt):
        audit(Kept(sure()), folders, to=tmp_path / "out", on_progress=kill, **options)
    assert not (tmp_path / "out" / "report.json").exists()
    assert len(shown) == 13  # a block ends where the next begins
    shown.clear()
    again = Kept(sure())
    report = audit(again, folders, to=tmp_path / "out", **options)
    assert again.seen == 2 * 8
    assert len(shown) == 8
    assert report.to_json() == whole.to_json()
    last = Kept(sure())
    audit(last, folders, to=tmp_path / "out", corruptions=("jpeg", "fog"), severities=(1,), cue_conflict=None)
    assert last.seen == 16  # of the new corruption alone
    assert not list((tmp_path / "out" / "cache").glob("*.writing"))


def test_a_model_without_a_hash_is_not_kept(folders: Path, tmp_path: Path) -> None:
    for _ in range(2):
        rule = Rule(sure())
        audit(rule, folders, cache=tmp_path / "cache", **PLAIN)
        assert rule.seen == 16
    assert not list((tmp_path / "cache").iterdir())


def test_every_picture_is_decoded_once_for_all(folders: Path, shown: list[str]) -> None:
    audit([Rule(sure(), "one"), Rule(sure(), "two"), model_of()], folders, cue_conflict=None, truncate=True)
    assert len(shown) == 16


def test_a_table_is_read_once_whatever_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_suites, "BLOCK", 2)
    rows = [(name, encoded(name, tmp_path)) for name in NAMES] + [("red", b"broken"), ("red", b"")]
    columns = {"name": [name for name, _ in rows], "image": [data for _, data in rows]}
    pq.write_table(pa.table(columns), tmp_path / "set.parquet")
    data = read_classes(tmp_path / "set.parquet")
    asked = []
    real = data.stream
    monkeypatch.setattr(data, "stream", lambda *a, **k: asked.append(a) or real(*a, **k))
    report = audit([Kept(sure(), "one"), Rule(sure(), "two")], data, cache=tmp_path / "cache", **PLAIN)
    assert len(asked) == 1
    assert report.to_json()["items"] == 8
    assert len(report.figures["failed"]) == 2
    again = audit(Kept(sure(), "one"), data, cache=tmp_path / "cache", **PLAIN)
    assert len(asked) == 1
    assert again.figures["failed"] == report.figures["failed"]


def test_a_changed_file_or_seed_is_asked_anew(folders: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"corruptions": ("jpeg",), "severities": (1,), "cue_conflict": None}
    audit(Kept(sure()), folders, cache=tmp_path / "cache", **options)
    other = Kept(sure())
    audit(other, folders, cache=tmp_path / "cache", seed=1, **options)
    assert other.seen == 16  # the corrupted ones
    picture(folders / "red" / "0.png", "blue", size=(30, 30))
    changed = Kept(sure())
    report = audit(changed, folders, cache=tmp_path / "cache", **options)
    assert changed.seen == 32
    assert part(report, "accuracy")["top1"] == pytest.approx(100 * 15 / 16, abs=1e-4)


def test_a_damaged_cache_is_named(folders: Path, tmp_path: Path) -> None:
    audit(Kept(sure()), folders, cache=tmp_path / "cache", **PLAIN)
    place = next((tmp_path / "cache").iterdir())
    place.write_bytes(b"broken")
    with pytest.raises(StoreError, match="cannot be read"):
        audit(Kept(sure()), folders, cache=tmp_path / "cache", **PLAIN)


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_left_out_for_all(folders: Path, tmp_path: Path) -> None:
    (folders / "red" / "bad.png").write_bytes(b"no picture")
    video(folders / "red" / "film.mp4", ("red", 0.3))
    report = audit(
        [Rule(sure(), "one"), model_of()], folders, to=tmp_path / "out", severities=(2,), truncate=True
    )
    assert report.to_json()["items"] == 16
    assert not report.ok
    why = {Path(one["file"]).name: one["reason"] for one in report.figures["failed"]}
    assert set(why) == {"bad.png", "film.mp4"}
    assert "it is a video" in why["film.mp4"]
    assert "2 left out" in str(report)
    assert "bad.png" in (tmp_path / "out" / "report.html").read_text()


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(b"no picture")
    with pytest.raises(NothingEvaluated, match="none of 2 pictures"):
        audit(Rule(sure(), classes=NAMES), tmp_path / "set", **PLAIN)


def test_numbers_that_are_not_finite(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"'rule' gave numbers that are not finite for 2 of 16 pictures"):
        audit(Rule(sure() | {"red": [math.nan] * 8}), folders, **PLAIN)
    with pytest.raises(UsageError, match="not finite"):
        audit(model_of(broken="red"), folders, **PLAIN)
    with pytest.raises(UsageError, match="not finite"):
        audit(model_of(broken="red", separable=False), folders, **PLAIN)


def test_scores_of_another_width(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"shape \(16, 8\).*each of its 9 classes"):
        audit(Rule(sure(), classes=[*NAMES, "grey"]), folders, **PLAIN)


def test_classes_are_matched_by_name(folders: Path) -> None:
    turned = [name.upper() for name in reversed(NAMES)]
    rule = {name: list(reversed(row)) for name, row in sure().items()}
    assert part(audit(Rule(rule, classes=turned), folders, **PLAIN), "accuracy")["top1"] == 100.0
    with pytest.raises(UsageError, match="does not know 1 of 8 classes of the data: white"):
        audit(Rule(sure(), classes=["grey" if name == "white" else name for name in NAMES]), folders, **PLAIN)
    with pytest.raises(UsageError, match="names classes twice: red"):
        audit(Rule(sure(), classes=["red", "Red", *NAMES[2:]]), folders, **PLAIN)
    more = {name: [*row, 9.0] for name, row in sure().items()}
    report = audit(Rule(more, classes=[*NAMES, "grey"]), folders, **PLAIN)
    assert part(report, "accuracy")["top1"] == 100.0  # the ninth class is not asked for
    assert any("8 of its 9 classes" in note for note in report.figures["notes"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"corruptions": ("rain",)}, UsageError, "no corruption 'rain'"),
        ({"severities": (0, 3)}, UsageError, "from 1 to 5"),
        ({"severities": ()}, UsageError, "from 1 to 5"),
        ({"batch_size": 0}, UsageError, "batch size"),
        ({"templates": "no such set"}, UsageError, "no set of templates"),
        ({"outside": "nowhere"}, UsageError, "does not exist"),
        ({"cue_conflict": "nowhere"}, UsageError, "no folder"),
        ({"limit": 0}, UsageError, "limit"),
    ],
)
def test_bad_options(folders: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        audit(Rule(sure()), folders, **options)


def test_models_that_cannot_be_audited(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no text tower, so audit"):
        audit(model_of(has_text=False), folders, **PLAIN)
    with pytest.raises(UsageError, match="A int cannot be audited"):
        audit([3], folders, **PLAIN)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="no model"):
        audit([], folders, **PLAIN)
    picture(tmp_path / "one" / "red" / "1.png", "red")
    with pytest.raises(UsageError, match="two classes or more"):
        audit(Rule(sure()), tmp_path / "one", **PLAIN)


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditReport, Path]:
    """Every section, of two models and a classifier with a hostile name."""
    root = tmp_path_factory.mktemp("full")
    for name in NAMES:
        for n in range(2):
            picture(root / "set" / name / f"{n}.png", name, name, NAMES[(NAMES.index(name) + n) % 8])
    pairs = ["image,caption"]
    for name in NAMES:
        pairs.append(f"{picture(root / 'pairs' / f'{name}.png', name)},a photo of a {name}")
    (root / "pairs" / "pairs.csv").write_text("\n".join(pairs))
    picture(root / "away" / "1.png", *NAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = audit(
            [model_of(), model_of(0.1), Rule(sure(4, {"red": "blue"}), "<script>\u202e'rule'")],
            root / "set",
            to=root / "out",
            corruptions=("jpeg", "contrast"),
            severities=(1, 5),
            outside=root / "away",
            retrieval=root / "pairs" / "pairs.csv",
            factors={f"{name}/0.png": "first" for name in NAMES},
            baselines=[Rule(sure(4, {NAMES[n]: "blue"} if n else {}), f"base {n}") for n in range(3)],
            prompts=("simple", ["then {}", "a picture showing {}"]),
        )
    return report, root / "out"


def test_the_json_is_whole_and_finite(full: tuple[AuditReport, Path]) -> None:
    report, folder = full
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert finite(stored)
    assert set(stored["sections"]) == set(SECTIONS)
    assert stored["not_asked"] == []
    names = [one["name"] for one in stored["models"]]
    assert names[:2] == ["colours", "colours (2)"]
    for section in ("accuracy", "factors", "corruptions", "shape", "calibration", "outside"):
        assert list(stored["sections"][section]["by_model"]) == names


def test_the_page_has_every_section_and_nothing_from_outside(full: tuple[AuditReport, Path]) -> None:
    _, folder = full
    page = (folder / "report.html").read_text()
    assert page == audit_page(json.loads((folder / "report.json").read_text()))
    for name, title in SECTIONS.items():
        assert f'<section id="{name}">' in page
        assert f"<h2>{title}</h2>" in page
    assert "<script" not in page
    assert "\u202e" not in page
    assert "http" not in page.replace("http-equiv", "")
    # a reliability diagram and a histogram a model, a bar a model, curves, scatter, strips
    assert page.count("<svg") == 3 + 3 + 3 + (1 + 2 + 1) + 2
    assert page.count("★") > 5
    assert "NaN" not in page
    assert "nan" not in page


def test_the_best_is_marked_by_the_figures_direction(full: tuple[AuditReport, Path]) -> None:
    rows = {row[0]: row[1:] for row in full[0].rows()}
    named = full[0].to_json()["sections"]["calibration"]["by_model"]
    best = min(range(3), key=lambda n: list(named.values())[n]["ece"])
    assert [cell.endswith("*") for cell in rows["ECE, %"]].index(True) == best
    assert rows["range over sets of prompts, points"][2] == "-"
    assert not any(cell.endswith("*") for cell in rows["shape bias, %"])
    assert "top-1 under corruption, %" in str(full[0])


def test_what_was_not_asked_says_how_to_ask(folders: Path) -> None:
    report = audit(Rule(sure()), folders, corruptions=None, cue_conflict=None)
    missing = {one["section"]: one["option"] for one in report.figures["not_asked"]}
    assert set(missing) == {"factors", "corruptions", "shape", "outside", "retrieval", "prompts"}
    assert missing["outside"] == "outside= (--outside)"
    assert "--retrieval" in str(report)
    assert "--retrieval" in audit_page(report.to_json())


def test_a_sample_is_told(folders: Path) -> None:
    report = audit(Rule(sure()), folders, limit=9, **PLAIN)
    assert report.to_json()["items"] == 9
    assert "A sample of 9 of 16 items." in report.figures["notes"]


def test_a_report_that_cannot_be_written(full: tuple[AuditReport, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        full[0].write(tmp_path / "file")


def test_ticks_and_letters() -> None:
    assert [label for _, label in percents()] == ["0", "20", "40", "60", "80", "100"]
    assert percents(50, 50)[0][0] <= 50 <= percents(50, 50)[-1][0]
    assert [letter(n) for n in (0, 25, 26)] == ["A", "Z", "A2"]


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def test_the_command(folders: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(audit_command)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    given = ["builtin", "--data", str(folders), "--to", str(tmp_path / "out"), "--corruption", "jpeg"]
    given += [
        "--severity",
        "2",
        "--prompts",
        "simple",
        "--prompts",
        "a {}",
        "--cue-conflict",
        "none",
        "--limit",
        "4",
    ]
    told = CliRunner().invoke(app, [*given, "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["sections"]["corruptions"]["severities"] == [2]
    assert (tmp_path / "out" / "report.html").is_file()
    (folders / "red" / "bad.png").write_bytes(b"no picture")
    plain = CliRunner().invoke(app, [*given[:3], "--corruption", "none", "--cue-conflict", "none"])
    assert plain.exit_code == 1
    assert "1 left out" in plain.stdout
    assert "corruptions= (--corruption)" in plain.stdout
