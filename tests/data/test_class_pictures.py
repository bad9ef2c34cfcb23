"""Pictures by class as the loop reads them: draws by hash, views, labels, what cannot be read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moviola.clip.preprocess import Preprocess
from moviola.data import class_pictures
from moviola.data.class_pictures import ClassPictures
from moviola.data.classes import read_classes
from moviola.media import read_picture
from moviola.types import (
    LabelField,
    MediaError,
    Needs,
    PictureField,
    Recipe,
    TextField,
    UsageError,
    ViewField,
)

RECIPE = Recipe(size=(24, 24))
PLAIN = Needs((PictureField(), LabelField()))
VIEWED = Needs((PictureField(), LabelField(), ViewField("strong", "moco"), ViewField("mixed", "augmix")))


def png(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((56, 40), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "set" / name / f"{n}.png").write_bytes(png(10 * label + n))
    return tmp_path / "set"


def pictures(folder: Path, needs: Needs = PLAIN, rows: list[int] | None = None, **options) -> ClassPictures:
    data = read_classes(folder)
    return ClassPictures(
        data, list(range(len(data))) if rows is None else rows, needs, recipe=RECIPE, **options
    )


def batch(made: ClassPictures, rows: list[int], seed: int = 0, epoch: int = 0, step: int = 0) -> dict:
    return made.batch(np.array(rows), seed=seed, epoch=epoch, step=step)


def test_a_batch_has_what_was_asked_for(folder: Path) -> None:
    made = pictures(folder, VIEWED)
    got = batch(made, [4, 0, 8])
    assert set(got) == {"id", "row", "image", "label", "strong", "mixed"}
    assert got["label"].tolist() == [1, 0, 2]
    assert got["label"].dtype == torch.int64
    assert got["row"].tolist() == [4, 0, 8]
    assert [Path(one).parent.name for one in got["id"]] == ["dog", "cat", "owl"]
    for name in ("image", "strong", "mixed"):
        assert got[name].shape == (3, 3, 24, 24)
        assert got[name].dtype == torch.float32
    assert not torch.equal(got["strong"], got["mixed"])
    assert set(batch(pictures(folder), [0])) == {"id", "row", "image", "label"}


def test_draws_are_of_seed_epoch_and_row_alone(folder: Path) -> None:
    made = pictures(folder, VIEWED)
    first = batch(made, [2, 5, 7])
    again = batch(pictures(folder, VIEWED), [7, 2], step=99)  # other order, company and step; a new object
    for name in ("image", "strong", "mixed"):
        assert torch.equal(again[name][0], first[name][2])
        assert torch.equal(again[name][1], first[name][0])
        for other in (batch(made, [2, 5, 7], epoch=1), batch(made, [2, 5, 7], seed=1)):
            assert all(not torch.equal(a, b) for a, b in zip(first[name], other[name], strict=True)), name


def test_every_picture_has_its_own_views(folder: Path) -> None:
    """Equal pictures in other rows are looked at otherwise."""
    for path in folder.rglob("*.png"):
        path.write_bytes(png(0))
    got = batch(pictures(folder, VIEWED), [0, 1, 2])
    for name in ("image", "strong", "mixed"):
        assert not torch.equal(got[name][0], got[name][1])
        assert not torch.equal(got[name][1], got[name][2])


def test_two_views_of_a_kind_differ(folder: Path) -> None:
    needs = Needs((ViewField("a", "moco"), ViewField("b", "moco")))
    got = batch(pictures(folder, needs), [0, 1])
    assert set(got) == {"id", "row", "a", "b"}
    assert not torch.equal(got["a"], got["b"])


def test_views_are_of_their_own_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(picture: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        return np.full((*size, 3), np.asarray(picture)[0, 0, 0], np.uint8)

    monkeypatch.setattr(class_pictures, "VIEWS", {"moco": seen, "augmix": seen})
    got = batch(pictures(folder, VIEWED), [3, 1])
    for row, strong in zip((3, 1), got["strong"], strict=True):
        path = sorted(folder.rglob("*.png"))[row]
        value = int(np.asarray(read_picture(path))[0, 0, 0])
        wanted = (value / 255 - RECIPE.mean[0]) / RECIPE.std[0]
        assert strong[0, 0, 0].item() == pytest.approx(wanted, abs=1e-4)


def test_without_crop_and_mirror_pictures_are_as_for_encoding(folder: Path) -> None:
    made = pictures(folder, crop_area=(1, 1), flip=0)
    shown = [read_picture(path) for path in sorted(folder.rglob("*.png"))[:4]]
    torch.testing.assert_close(batch(made, [0, 1, 2, 3])["image"], Preprocess(RECIPE).pictures(shown))
    mirrored = pictures(folder, crop_area=(1, 1), flip=1)
    torch.testing.assert_close(
        batch(mirrored, [0, 1, 2, 3])["image"], Preprocess(RECIPE).pictures(shown).flip(-1)
    )


def test_several_crops_of_a_picture(folder: Path) -> None:
    got = batch(pictures(folder, Needs((PictureField("crops", count=2, size=(16, 16)),))), [0, 1, 2])
    assert got["crops"].shape == (3, 2, 3, 16, 16)
    assert not torch.equal(got["crops"][:, 0], got["crops"][:, 1])


def test_some_rows_of_a_set(folder: Path) -> None:
    made = pictures(folder, rows=[8, 1])
    assert len(made) == 2
    assert sorted(made.rows_N.tolist()) == [1, 8]
    got = batch(made, [0, 1])
    assert got["label"].tolist() == made.labels_N.tolist()
    assert [Path(one).parent.name for one in got["id"]] == [
        {1: "cat", 8: "owl"}[row] for row in made.rows_N.tolist()
    ]


def test_the_fingerprint_tells_rows_looks_and_fields_apart(folder: Path) -> None:
    made = [
        pictures(folder),
        pictures(folder, VIEWED),
        pictures(folder, rows=[0, 1]),
        pictures(folder, flip=0),
        pictures(folder, crop_area=(0.5, 1)),
    ]
    assert len({one.fingerprint for one in made}) == len(made)
    assert pictures(folder).fingerprint == made[0].fingerprint


# --------------------------------------------------------------------------------------------------
# What cannot be read
# --------------------------------------------------------------------------------------------------


def test_damaged_pictures_are_found_at_the_start(folder: Path) -> None:
    whole = png(4)
    (folder / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "owl" / "0.png").write_bytes(b"")
    made = pictures(folder, VIEWED)
    assert len(made) == 7
    assert made.rows_N.tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert made.labels_N.tolist() == [0, 0, 0, 1, 1, 2, 2]
    skipped = {"/".join(Path(name).parts[-2:]): why for name, why in made.skipped}
    assert set(skipped) == {"dog/1.png", "owl/0.png"}
    assert "empty" in skipped["owl/0.png"]
    assert batch(made, list(range(7)))["label"].tolist() == made.labels_N.tolist()


def test_a_picture_that_goes_away_is_an_error_that_names_it(folder: Path) -> None:
    made = pictures(folder)
    (folder / "cat" / "0.png").unlink()
    with pytest.raises(MediaError, match=r"0\.png"):
        batch(made, [0])


def test_videos_are_refused(folder: Path) -> None:
    (folder / "cat" / "film.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"film\.mp4 is a video") as caught:
        pictures(folder)
    assert "gda-clip" in str(caught.value.hint)


def test_fields_that_pictures_do_not_have(folder: Path) -> None:
    with pytest.raises(UsageError, match="no TextField"):
        pictures(folder, Needs((PictureField(), TextField())))


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def table(folder: Path, rows: list[tuple[bytes | None, str]]) -> Path:
    made = pa.table({"image": [bytes_ for bytes_, _ in rows], "class": [name for _, name in rows]})
    pq.write_table(made, folder / "set.parquet")
    return folder / "set.parquet"


def test_tables_with_bytes(folder: Path, tmp_path: Path) -> None:
    rows = [(path.read_bytes(), path.parent.name) for path in sorted(folder.rglob("*.png"))]
    from_table, from_folder = pictures(table(tmp_path, rows), VIEWED), pictures(folder, VIEWED)
    a, b = batch(from_table, [0, 4, 8]), batch(from_folder, [0, 4, 8])
    for name in ("image", "strong", "mixed", "label"):
        assert torch.equal(a[name], b[name]), name


def test_tables_with_damage(tmp_path: Path) -> None:
    made = pictures(
        table(tmp_path, [(png(0), "cat"), (b"not a picture", "dog"), (None, "cat"), (png(1), "dog")])
    )
    assert len(made) == 2
    assert made.labels_N.tolist() == [0, 1]
    assert len(made.skipped) == 2


def test_more_bytes_than_memory_should_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_pictures, "MOST_BYTES", 100)
    with pytest.raises(UsageError, match="--shots"):
        pictures(table(tmp_path, [(png(0), "cat"), (png(1), "dog")]))
