"""`evaluate`: known figures on sets made on the spot, with a model whose answers are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from moviola.data.readers import read_classes
from moviola.types import Refusal, UsageError
from moviola.verbs.evaluate import evaluate_retrieval, evaluate_zero_shot
from moviola.verbs.set_reader import NothingEvaluated
from tests.verbs.colour_clip import COLOURS, TOKENIZER, colour_model, encoded, picture, video

NAMES = list(COLOURS)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Eight classes of two pictures; one 'red' picture is really blue, so 15 of 16 can be right."""
    root = tmp_path / "set"
    for name in NAMES:
        picture(root / name / "1.png", name)
        picture(root / name / "2.png", "blue" if name == "red" else name)
    return root


def test_zero_shot_on_folders(folders: Path) -> None:
    report = evaluate_zero_shot(colour_model(), folders)
    assert (report.n, report.classes) == (16, 8)
    assert report.top1 == pytest.approx(100 * 15 / 16)
    assert report.mean_per_class == pytest.approx(100 * 7.5 / 8)
    assert report.per_class["red"] == 50.0
    assert report.per_class["blue"] == 100.0
    assert report.ok
    # the blue picture holds no red, as little as of six other colours: ties count against it
    assert report.top5 == pytest.approx(100 * 15 / 16)


def test_zero_shot_without_one_vector_per_item(folders: Path) -> None:
    report = evaluate_zero_shot(colour_model(separable=False), folders, templates="simple", batch_size=3)
    assert report.top1 == pytest.approx(100 * 15 / 16)


def test_a_model_that_sees_nothing_scores_nothing(folders: Path) -> None:
    """Equal scores for all classes must not look like a good model."""
    model = colour_model()
    model.module.table_VD.fill_(1.0)
    report = evaluate_zero_shot(model, folders)
    assert (report.top1, report.top5) == (0.0, 0.0)


def test_zero_shot_reports_what_it_left_out(folders: Path) -> None:
    (folders / "green" / "3.png").write_bytes(b"no picture")
    report = evaluate_zero_shot(colour_model(), folders)
    assert report.n == 16
    assert [Path(one.path).name for one in report.failed] == ["3.png"]
    assert not report.ok
    data = json.loads(json.dumps(report.to_json()))
    assert data["top1"] == pytest.approx(93.75)
    assert data["failed"][0]["file"].endswith("3.png")
    assert "93.75" in str(report)
    assert "1 left out" in str(report)
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(report)
    assert "93.75" in console.export_text()


def test_zero_shot_on_a_parquet_of_bytes(tmp_path: Path) -> None:
    rows = [(name, encoded(name, tmp_path)) for name in ("red", "green", "blue")] * 3
    table = pa.table({"image": [r[1] for r in rows], "name": [r[0] for r in rows]})
    pq.write_table(table, tmp_path / "set.parquet")
    report = evaluate_zero_shot(colour_model(), tmp_path / "set.parquet", batch_size=4)
    assert (report.n, report.classes, report.top1, report.top5) == (9, 3, 100.0, None)
    rows[4] = ("green", b"broken")
    table = pa.table({"image": [r[1] for r in rows], "name": [r[0] for r in rows]})
    pq.write_table(table, tmp_path / "set.parquet")
    report = evaluate_zero_shot(colour_model(), tmp_path / "set.parquet", batch_size=4)
    assert (report.n, report.failed[0].path) == (8, "set.parquet:5")


def test_limit_takes_the_same_items_and_says_so(folders: Path) -> None:
    calls: list[tuple[float, float | None]] = []
    one = evaluate_zero_shot(
        colour_model(), folders, limit=6, on_progress=lambda d, t, note="": calls.append((d, t))
    )
    assert one.n == 6
    assert calls[-1] == (6, 6)
    assert "sample of 6 of 16" in one.notes[0]
    assert one == evaluate_zero_shot(colour_model(), folders, limit=6)
    with pytest.raises(UsageError, match="limit"):
        evaluate_zero_shot(colour_model(), folders, limit=0)


def test_cached_vectors_are_used_and_not_for_changed_files(folders: Path, tmp_path: Path) -> None:
    (folders / "green" / "bad.png").write_bytes(b"no picture")
    first = evaluate_zero_shot(colour_model(), folders, cache=tmp_path / "cache")
    model = colour_model()
    again = evaluate_zero_shot(model, folders, cache=tmp_path / "cache")
    assert again == first
    assert model.module.seen == 0
    evaluate_zero_shot(model, folders, cache=tmp_path / "cache", templates="a picture showing {}")
    assert model.module.seen == 0
    picture(folders / "red" / "2.png", "red", size=(30, 30))
    changed = evaluate_zero_shot(model, folders, cache=tmp_path / "cache")
    assert model.module.seen == 16
    assert changed.top1 == 100.0
    with pytest.raises(UsageError, match="nothing to cache"):
        evaluate_zero_shot(colour_model(separable=False), folders, cache=tmp_path / "cache")


def test_one_name_for_two_classes_is_noted(folders: Path) -> None:
    names = {name: name for name in NAMES} | {"cyan": "green"}
    report = evaluate_zero_shot(colour_model(), read_classes(folders, names=names))
    assert "green" in " ".join(report.notes)
    assert report.per_class["green (3)"] == 0.0
    assert report.per_class["green (7)"] == 0.0


def test_zero_shot_refusals(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no text tower"):
        evaluate_zero_shot(colour_model(has_text=False), folders)
    with pytest.raises(UsageError, match="belong to read_classes"):
        evaluate_zero_shot(colour_model(), read_classes(folders), split="val")
    for path in folders.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(NothingEvaluated, match="none of 16 items") as caught:
        evaluate_zero_shot(colour_model(), folders)
    assert len(caught.value.failed) == 16


# ------------------------------------------------------------------------------------- retrieval


def karpathy(root: Path, items: list[tuple[str, list[str]]], dataset: str = "coco") -> Path:
    images = [
        {
            "filename": f"{i}.png",
            "filepath": "val2014",
            "split": "test",
            "cocoid": i,
            "sentences": [{"raw": text} for text in texts],
        }
        for i, (_, texts) in enumerate(items)
    ]
    for i, (colour, _) in enumerate(items):
        picture(root / "val2014" / f"{i}.png", colour)
    path = root / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"dataset": dataset, "images": images}))
    return path


def test_retrieval_of_pictures_with_several_captions(tmp_path: Path) -> None:
    """Twelve captions, of which one names another picture's colour."""
    items = [(name, [f"a photo of a {name}", f"{name} thing"]) for name in NAMES[:6]]
    items[2] = ("red", ["a photo of a red", "blue thing"])
    path = karpathy(tmp_path, items)
    report = evaluate_retrieval(colour_model(), path, batch_size=4)
    assert (report.n_items, report.n_texts, report.layout, report.among) == (6, 12, "karpathy", "captions")
    assert report.text_to_item["R1"] == pytest.approx(100 * 11 / 12)
    # the blue picture's captions are no better than the red one's "blue thing": a tie counts against it
    assert report.item_to_text["R1"] == pytest.approx(100 * 5 / 6)
    assert report.text_to_item["MedR"] == 1.0
    assert report.text_to_item["MeanR"] > 1.0
    assert report.ok


def test_retrieval_equals_a_plain_count_of_ranks(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    items = []
    for _ in range(10):
        mix = [NAMES[i] for i in draw.integers(0, 8, 2)]
        items.append(
            (mix[0], [" ".join(draw.permutation([*mix, NAMES[draw.integers(8)]])) for _ in range(3)])
        )
    model = colour_model()
    path = karpathy(tmp_path, items)
    report = evaluate_retrieval(model, path)
    texts = model.embed_texts([text for _, captions in items for text in captions])
    pictures = np.eye(8)[[NAMES.index(colour) for colour, _ in items]]
    sims = texts @ pictures.astype(np.float32).T
    ranks = []
    for n in range(30):
        own = sims[n, n // 3]
        ranks.append(sum(sims[n, m] >= own for m in range(10)))
    assert report.text_to_item["MeanR"] == pytest.approx(np.mean(ranks))
    assert report.text_to_item["R5"] == pytest.approx(100 * np.mean(np.array(ranks) <= 5))


@pytest.mark.parametrize("separable", [True, False])
def test_retrieval_of_videos_both_kinds_of_model(tmp_path: Path, separable: bool) -> None:
    pairs = [("red", "green"), ("blue", "yellow"), ("cyan", "magenta")]
    with (tmp_path / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        for i, (a, b) in enumerate(pairs):
            video(tmp_path / "videos" / f"video{i}.mp4", (a, 0.6), (b, 0.6))
            writer.writerow([f"ret{i}", f"msr{i}", f"video{i}", f"{a} then {b}"])
        writer.writerow(["ret9", "msr9", "video9", "a video that is not here"])
    report = evaluate_retrieval(colour_model(separable=separable), tmp_path, batch_size=5)
    assert (report.layout, report.split, report.among) == ("msrvtt", "1k-A", "items")
    assert (report.n_items, report.n_texts) == (3, 3)
    assert report.text_to_item["R1"] == report.item_to_text["R1"] == 100.0
    assert [one.path for one in report.failed] == ["video9.mp4"]
    assert not report.ok


def test_a_score_of_its_own_differs_from_the_mean(tmp_path: Path) -> None:
    """One video is red throughout, one only half: the worst frame tells them apart for a red query."""
    rows = [("a.mp4", "red thing"), ("b.mp4", "red then blue")]
    video(tmp_path / "a.mp4", ("red", 1))
    video(tmp_path / "b.mp4", ("red", 0.5), ("blue", 0.5))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), *rows])
    report = evaluate_retrieval(colour_model(separable=False), tmp_path / "t.csv")
    # "red then blue" finds the video that is red all along: no frame of the other is better
    assert report.text_to_item["R1"] == 50.0
    assert report.layout == "table"
    found = evaluate_retrieval(colour_model(separable=False), tmp_path / "t.csv", batch_size=1)
    assert found.text_to_item == report.text_to_item
    assert evaluate_retrieval(colour_model(), tmp_path / "t.csv").text_to_item["R1"] == 100.0


def test_unreadable_items_go_with_their_texts(tmp_path: Path) -> None:
    items = [(name, [f"{name} thing", name]) for name in NAMES[:4]]
    path = karpathy(tmp_path, items)
    (tmp_path / "val2014" / "1.png").write_bytes(b"broken")
    (tmp_path / "val2014" / "2.png").unlink()
    report = evaluate_retrieval(colour_model(), path)
    assert (report.n_items, report.n_texts) == (2, 4)
    assert sorted(one.path for one in report.failed) == ["1", "val2014/2.png"]
    assert report.text_to_item["R1"] == 100.0
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(report)
    assert "100.00" in console.export_text()
    assert "2 left out" in str(report)
    assert json.loads(json.dumps(report.to_json()))["items"] == 2


def test_retrieval_options(tmp_path: Path) -> None:
    items = [(name, [f"{name} thing", name, "black thing"]) for name in NAMES]
    path = karpathy(tmp_path, items)
    report = evaluate_retrieval(colour_model(), path, captions_per_item=1)
    assert report.n_texts == 8
    report = evaluate_retrieval(colour_model(), path, limit=4, among="items")
    assert (report.n_items, report.n_texts, report.among) == (4, 12, "items")
    assert "sample of 4 of 8" in report.notes[0]
    first = evaluate_retrieval(colour_model(), path, cache=tmp_path / "cache")
    model = colour_model()
    assert evaluate_retrieval(model, path, cache=tmp_path / "cache") == first
    assert model.module.seen == 0
    with pytest.raises(UsageError, match="among"):
        evaluate_retrieval(colour_model(), path, among="none")  # type: ignore[arg-type]
    with pytest.raises(Refusal, match="no text tower"):
        evaluate_retrieval(colour_model(has_text=False), path)


def test_a_random_model_is_near_chance_on_real_photos(shared_dir: Path) -> None:
    """200 classes, so chance is 0.5 %: the plumbing adds no knowledge of its own."""
    import torch

    from moviola.clip.config import ClipConfig, TextConfig, VitConfig
    from moviola.clip.loaded import Model
    from moviola.clip.model import CLIP

    torch.manual_seed(0)
    config = ClipConfig(32, VitConfig(64, 16, 64, 2, 2), TextConfig(16, TOKENIZER.size, 64, 2, 2))
    model = Model(CLIP(config), config=config.to_json(), tokenizer=TOKENIZER, device="cpu", name="random")
    report = evaluate_zero_shot(
        model, shared_dir / "data" / "tiny_imagenet_val.parquet", limit=200, truncate=True
    )
    assert (report.n, report.classes) == (200, 200)
    assert report.top1 < 5
    assert report.ok
    assert "were cut" in " ".join(report.notes)
