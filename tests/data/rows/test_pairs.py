"""`PairData`: fields of a batch, draws by row, rows that cannot be used."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from moviola.clip.preprocess import Preprocess
from moviola.data.rows import PairData, Window, check, held_out, open_rows
from moviola.data.rows.pairs import TRIES
from moviola.media import write_video
from moviola.types import (
    ClipBatch,
    FrameSpec,
    Needs,
    PictureField,
    Recipe,
    RegionField,
    ReinforcedField,
    TextField,
    UsageError,
    VectorField,
    VideoField,
)
from tests.data.rows import made

RECIPE = Recipe(size=(32, 32))
TOKENIZER = made.tokenizer()
TEXT = Needs((TextField(),))


def pairs(path: Path, needs: Needs | None = None, **options: Any) -> PairData:
    source = open_rows([path], columns=options.pop("columns", None), window=options.pop("window", None))
    options = {"recipe": RECIPE, "tokenizer": TOKENIZER, **options}
    return PairData(source, needs or Needs(), **options)


def take(data: PairData, rows: list[int], *, seed: int = 0, epoch: int = 0) -> dict[str, Any]:
    return data.batch(np.array(rows), seed=seed, epoch=epoch, step=0)


def tokens(*texts: str) -> torch.Tensor:
    return torch.from_numpy(TOKENIZER(list(texts)))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


class TestPictures:
    @pytest.mark.parametrize(
        "recipe",
        [
            RECIPE,
            Recipe(size=(24, 36), interpolation="bilinear"),
            Recipe(size=(32, 32), resize="squash", crop="none"),
            Recipe(size=(32, 32), resize_size=(36, 36)),
        ],
    )
    def test_without_crops_they_are_the_recipes_own(self, tmp_path: Path, recipe: Recipe) -> None:
        images = [
            made.picture(0, (50, 40)),
            made.picture(1, (33, 97)).convert("L"),
            made.picture(2, (64, 64)).convert("P"),
            made.picture(3, (70, 51)).convert("RGBA"),
            made.picture(4, (10, 12)),
        ]
        files = [made.encoded(image) for image in images]
        turned = Image.Exif()
        turned[0x0112] = 6
        files.append(made.encoded(made.picture(5, (300, 200)), "JPEG", exif=turned, quality=95))
        pq.write_table(pa.table({"image": files, "text": made.captions(6)}), tmp_path / "a.parquet")
        data = pairs(tmp_path / "a.parquet", recipe=recipe, crop_area=(1, 1))
        from moviola.media import read_picture

        want = Preprocess(recipe).pictures([read_picture(file) for file in files])
        assert torch.equal(take(data, list(range(6)))["image"], want)

    def test_a_crop_is_a_part_of_the_picture(self, tmp_path: Path) -> None:
        # a ramp in x and y: the value of a pixel says where in the picture it comes from
        y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
        ramp = Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1))
        made.parquet(tmp_path / "a.parquet", 40, image=[made.encoded(ramp)] * 40)
        recipe = Recipe(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
        data = pairs(tmp_path / "a.parquet", recipe=recipe, crop_area=(0.3, 0.6))
        image = take(data, list(range(40)))["image"].numpy() * 255
        wide = (image[:, 0, 16, -1] - image[:, 0, 16, 0]) * 32 / 31
        tall = (image[:, 1, -1, 16] - image[:, 1, 0, 16]) * 32 / 31
        share = wide * tall / 200**2
        assert share.min() > 0.27
        assert share.max() < 0.63
        assert share.std() > 0.04
        aspect = wide / tall
        assert aspect.min() > 0.72
        assert aspect.max() < 1.39
        assert image[:, 0, 16, 0].std() > 5

    def test_large_jpegs_decoded_small_stay_in_place(self, tmp_path: Path) -> None:
        y, x = np.mgrid[0:640, 0:801]
        ramp = np.stack([x * 255 / 800, y * 255 / 640, np.full_like(x, 90)], axis=-1).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 8
        upright = Image.fromarray(ramp)
        stored = upright.transpose(Image.Transpose.ROTATE_270)  # 8: turn by 90 degrees to see it upright
        files = {
            "plain": made.encoded(upright),
            "jpeg": made.encoded(upright, "JPEG", quality=98),
            "turned": made.encoded(stored, "JPEG", quality=98, exif=exif),
        }
        recipe = Recipe(size=(48, 48), mean=(0, 0, 0), std=(1, 1, 1))
        seen = {}
        for name, file in files.items():
            made.parquet(tmp_path / f"{name}.parquet", 8, image=[file] * 8)
            data = pairs(tmp_path / f"{name}.parquet", recipe=recipe, crop_area=(0.2, 1))
            seen[name] = take(data, list(range(8)))["image"] * 255
        assert (seen["jpeg"] - seen["plain"]).abs().max() < 4
        assert (seen["turned"] - seen["plain"]).abs().max() < 4

    def test_several_views_and_sizes(self, tmp_path: Path) -> None:
        fields = (
            PictureField(),
            PictureField("views", count=3, size=(16, 16)),
            PictureField("all", area=(1, 1)),
        )
        data = pairs(made.parquet(tmp_path / "a.parquet", 6), Needs(fields))
        batch = take(data, [2, 4])
        assert batch["image"].shape == (2, 3, 32, 32)
        assert batch["views"].shape == (2, 3, 3, 16, 16)
        assert torch.equal(batch["all"], Preprocess(RECIPE).pictures([made.picture(2), made.picture(4)]))
        views = batch["views"]
        assert not torch.equal(views[:, 0], views[:, 1])
        assert not torch.equal(views[:, 1], views[:, 2])

    def test_mirroring(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 30)
        plain = take(pairs(tmp_path / "a.parquet"), list(range(30)))["image"]
        always = take(pairs(tmp_path / "a.parquet", flip=1.0), list(range(30)))["image"]
        half = take(pairs(tmp_path / "a.parquet", flip=0.5), list(range(30)))["image"]
        assert torch.equal(always, plain.flip(-1))
        mirrored = [(torch.equal(a, b), torch.equal(a, b.flip(-1))) for a, b in zip(half, plain)]
        assert all(a or b for a, b in mirrored)
        assert 5 < sum(b for _, b in mirrored) < 25

    def test_bad_options(self, tmp_path: Path) -> None:
        path = made.parquet(tmp_path / "a.parquet", 3)
        for area in ((0.0, 1.0), (0.8, 0.5), (0.5, 1.5), (float("nan"), 1.0)):
            with pytest.raises(UsageError, match="area"):
                pairs(path, crop_area=area)
        with pytest.raises(UsageError, match="mirroring"):
            pairs(path, flip=1.5)
        with pytest.raises(UsageError, match="patch of 5"):
            pairs(path, patch=5)
        with pytest.raises(UsageError, match=r"no column of pictures.*'caption'"):
            pairs(made.jsonl(tmp_path / "b.jsonl", [{"caption": "x"}]))


class TestDraws:
    def test_a_row_looks_the_same_in_any_batch(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 20, row_group=4, caption=[[f"a{i}", f"b{i}"] for i in range(20)])
        data = pairs(tmp_path / "a.parquet", flip=0.5, window=Window(bytes=9000))
        whole = take(data, list(range(20)), epoch=3)
        for part in ([7], [19, 7, 0], [7, 7]):
            batch = pickle.loads(pickle.dumps(data)).batch(  # noqa: S301 (our own bytes)
                np.array(part), seed=0, epoch=3, step=99
            )
            assert torch.equal(batch["image"], whole["image"][part])
            assert torch.equal(batch["text"], whole["text"][part])
            assert batch["row"].tolist() == part
        assert not torch.equal(take(data, [7], epoch=4)["image"], whole["image"][[7]])
        assert not torch.equal(take(data, [7], seed=1, epoch=3)["image"], whole["image"][[7]])

    def test_row_and_id(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 4, uid=["w", "", None, "z"])
        batch = take(pairs(tmp_path / "a.parquet"), [3, 1, 2])
        assert batch["row"].dtype == torch.int64
        assert batch["id"] == ["z", "a.parquet:2", "a.parquet:3"]
        assert batch["skipped"] == []


class TestTexts:
    def test_one_of_several_captions_is_drawn(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 5, caption=[["one", "two", " ", None, "three"]] * 5)
        data = pairs(tmp_path / "a.parquet", TEXT)
        seen = torch.cat([take(data, list(range(5)), epoch=e)["text"] for e in range(40)])
        shares = [(seen == tokens(word)).all(dim=1).float().mean().item() for word in ("one", "two", "three")]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0.2

    def test_columns_in_order_and_patterns(self, tmp_path: Path) -> None:
        made.parquet(
            tmp_path / "a.parquet",
            3,
            long=["long text", None, None],
            caption_fr=["un chat", "un chat", ""],
            caption_de=[None, "eine katze", ""],
        )
        fields = (
            TextField("first", ("long", "caption")),
            TextField("other", ("caption_*",), optional=True),
            TextField("again", ("caption_*",), optional=True),
        )
        data = pairs(tmp_path / "a.parquet", Needs(fields))
        batch = take(data, [0, 1, 2])
        assert torch.equal(batch["first"], tokens("long text", "picture number 1", "picture number 2"))
        assert batch["other_mask"].tolist() == [True, True, False]
        assert batch["other_mask"].dtype == torch.bool
        assert torch.equal(batch["other"][[0, 2]], tokens("un chat", ""))
        drawn = torch.cat([take(data, [1], epoch=e)["other"] for e in range(20)])
        assert {tuple(t) for t in drawn.tolist()} == {
            tuple(t) for t in tokens("un chat", "eine katze").tolist()
        }
        for e in range(5):
            assert torch.equal(take(data, [1], epoch=e)["other"], take(data, [1], epoch=e)["again"])
        assert "first_mask" not in batch

    def test_first_sentence(self, tmp_path: Path) -> None:
        texts = ["first part. second part", "no stop", "v1.5 is. Ok", "ends here."]
        made.parquet(tmp_path / "a.parquet", 4, caption=texts)
        data = pairs(tmp_path / "a.parquet", Needs((TextField(), TextField("short", cut="first-sentence"))))
        batch = take(data, [0, 1, 2, 3])
        assert torch.equal(batch["text"], tokens(*texts))
        assert torch.equal(batch["short"], tokens("first part", "no stop", "v1.5 is", "ends here."))

    def test_long_captions_are_cut_without_a_word(
        self, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        made.parquet(tmp_path / "a.parquet", 1, caption=["picture number " * 50])
        text = take(pairs(tmp_path / "a.parquet", TEXT), [0])["text"]
        assert text.shape == (1, 16)
        assert text[0, -1] == TOKENIZER.end_id
        assert not recwarn.list

    def test_no_caption_column(self, tmp_path: Path) -> None:
        path = made.jsonl(tmp_path / "a.jsonl", [{"path": "x.png", "story": "x"}])
        with pytest.raises(UsageError, match=r"'text'.*'story'.*columns="):
            pairs(path)
        assert torch.equal(take(pairs(path, TEXT, columns={"text": "story"}), [0])["text"], tokens("x"))


class TestUnusableRows:
    def broken(self, folder: Path) -> Path:
        """Rows 0, 3 and 5 of ten cannot be used; ids are r0 to r9."""
        images: list[bytes | None] = list(made.pictures(10))
        images[0], images[3] = None, images[3][:60]  # type: ignore[index]
        texts: list[str | None] = list(made.captions(10))
        texts[5] = "  "
        return made.parquet(
            folder / "a.parquet", 10, image=images, caption=texts, id=[f"r{i}" for i in range(10)]
        )

    def test_are_replaced_the_same_way_and_told(self, tmp_path: Path) -> None:
        data = pairs(self.broken(tmp_path))
        batch = take(data, [0, 1, 3, 5])
        assert batch["row"].tolist() == [0, 1, 3, 5]
        told = dict(batch["skipped"])
        assert set(told) == {0, 3, 5}
        assert "names no picture" in told[0]
        assert "decoded" in told[3]
        assert "no text" in told[5]
        for place in (0, 2, 3):
            number = int(batch["id"][place].removeprefix("r"))
            assert number not in (0, 3, 5)
            assert torch.equal(batch["text"][place], tokens(f"picture number {number}")[0])
            assert torch.equal(batch["image"][place], take(data, [number])["image"][0])
        assert same(take(data, [0, 1, 3, 5]), batch)
        assert take(data, [3])["id"] == batch["id"][2:3]

    def test_missing_files_and_refused_paths(self, tmp_path: Path) -> None:
        (tmp_path / "pics").mkdir()
        (tmp_path / "pics/ok.png").write_bytes(made.encoded(made.picture(0)))
        (tmp_path / "pics/empty.png").write_bytes(b"")
        (tmp_path / "pics/text.png").write_text("this is no picture")
        names = ["ok.png", "gone.png", "../up.png", "empty.png", "text.png", "http://a/b.png"]
        rows: list[dict[str, object]] = [{"path": n, "text": n} for n in names]
        batch = take(pairs(made.jsonl(tmp_path / "pics/a.jsonl", rows)), list(range(6)))
        assert set(batch["id"]) == {"a.jsonl:1"}
        told = dict(batch["skipped"])
        for row, word in enumerate(
            ["no such file", "leads out", "empty", "no known picture", "web address"], 1
        ):
            assert word in told[row]

    def test_none_left_is_an_error_that_names_rows(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 4, image=[b"junk"] * 4)
        with pytest.raises(UsageError, match=rf"row 2, 1 in {TRIES} tries: a.parquet:3 \(.*no known picture"):
            take(pairs(tmp_path / "a.parquet"), [2, 1])

    def test_text_that_is_no_utf8(self, tmp_path: Path) -> None:
        raw = pa.array([b"caf\xe9 noir", b"fine"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"image": made.pictures(2), "caption": raw}), tmp_path / "a.parquet")
        batch = take(pairs(tmp_path / "a.parquet"), [0, 1])
        assert torch.equal(batch["text"][1], tokens("fine")[0])


class TestRegions:
    def boxed(self, folder: Path, **columns: object) -> Path:
        """Grey pictures with one red square each, whose box is told."""
        images, boxes = [], []
        for i in range(24):
            pixels = np.full((120, 160, 3), 60, np.uint8)
            x, y = 30 + 3 * i, 10 + 2 * i
            pixels[y : y + 40, x : x + 40] = (250, 0, 0)
            images.append(made.encoded(Image.fromarray(pixels)))
            boxes.append([[x, y, x + 40, y + 40]])
        table = {"boxes": boxes, "regions": [["a red square"]] * 24, **columns}
        return made.parquet(folder / "a.parquet", 24, image=images, **table)

    @pytest.mark.parametrize("area", [(0.3, 1.0), (1.0, 1.0)])
    def test_boxes_follow_the_crop(self, tmp_path: Path, area: tuple[float, float]) -> None:
        recipe = Recipe(size=(64, 48), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear")
        needs = Needs((RegionField(3), PictureField()))
        data = pairs(self.boxed(tmp_path), needs, recipe=recipe, crop_area=area, flip=0.5)
        batch = take(data, list(range(24)))
        assert batch["boxes"].shape == (24, 3, 4)
        assert batch["region_mask"].dtype == torch.bool
        assert not batch["region_mask"][:, 1:].any()
        assert batch["region_text"].shape == (24, 3, 16)
        shown = 0
        for i in range(24):
            red = batch["image"][i, 0].numpy() > 0.6
            if not batch["region_mask"][i, 0]:
                assert red.sum() < 64
                continue
            assert torch.equal(batch["region_text"][i, 0], tokens("a red square")[0])
            shown += 1
            rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
            found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(batch["boxes"][i, 0].numpy() - found).max() < 1.5
        assert shown > 15
        assert torch.equal(batch["region_text"][0, 2], tokens("")[0])
        assert not batch["boxes"][:, 1:].any()

    def test_empty_and_hidden_boxes_go_with_their_texts(self, tmp_path: Path) -> None:
        nan = float("nan")
        boxes = [[10, 10, 50, 50], [20, 20, 20, 60], [200, 10, 220, 30], [0, 0, nan, 9], [60, 0, 999, 999]]
        boxes += [[5, 5, 3, 9], [0, 0, 40, 40]]
        texts = ["kept", "flat", "outside", "nan", "cut", "turned round", " "]
        made.parquet(
            tmp_path / "a.parquet",
            3,
            image=[made.encoded(made.picture(0, (100, 100)))] * 3,
            boxes=[boxes, [], None],
            regions=[texts, [], None],
            region_scores=[[0.1, 1, 1, 1, 0.9, 1, 1], [], None],
        )
        needs = Needs((PictureField(), RegionField(4)))
        batch = take(
            pairs(tmp_path / "a.parquet", needs, recipe=Recipe(size=(50, 50)), crop_area=(1, 1)), [0, 1, 2]
        )
        assert batch["region_mask"].sum(dim=1).tolist() == [2, 0, 0]
        assert batch["boxes"][0, :2].tolist() == [[30, 0, 50, 50], [5, 5, 25, 25]]
        assert torch.equal(batch["region_text"][0, :2], tokens("cut", "kept"))
        best = take(
            pairs(tmp_path / "a.parquet", Needs((PictureField(), RegionField(1))), crop_area=(1, 1)), [0]
        )
        assert torch.equal(best["region_text"][0], tokens("cut"))

    def test_lists_of_unequal_length_make_a_row_unusable(self, tmp_path: Path) -> None:
        regions = [["a red square"]] * 23 + [["one", "two"]]
        needs = Needs((PictureField(), RegionField(2)))
        batch = take(pairs(self.boxed(tmp_path, regions=regions), needs), [23])
        assert "1 boxes, 2 texts" in batch["skipped"][0][1]

    def test_boxes_need_columns_and_a_picture(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"boxes and regions.*Add"):
            pairs(made.parquet(tmp_path / "a.parquet", 2), Needs((PictureField(), RegionField())))
        with pytest.raises(UsageError, match="PictureField"):
            pairs(self.boxed(tmp_path), Needs((RegionField(),)))

    def test_lists_as_text_in_a_csv(self, tmp_path: Path) -> None:
        (tmp_path / "0.png").write_bytes(made.encoded(made.picture(0, (50, 50))))
        line = 'path,text,boxes,regions,v\n0.png,hello,"[[0,0,25,50]]","[""left""]","[1,2.5]"\n'
        (tmp_path / "a.csv").write_text(line)
        needs = Needs((PictureField(), RegionField(1), VectorField("v", "v")))
        batch = take(pairs(tmp_path / "a.csv", needs, crop_area=(1, 1)), [0])
        assert batch["boxes"].tolist() == [[[0, 0, 16, 32]]]
        assert batch["v"].tolist() == [[1.0, 2.5]]


class TestVectors:
    def test_values(self, tmp_path: Path) -> None:
        vectors = np.arange(12, dtype=np.float16).reshape(4, 3)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 3)
        made.parquet(tmp_path / "a.parquet", 4, teacher=column)
        batch = take(pairs(tmp_path / "a.parquet", Needs((VectorField("t", "teacher"),))), [2, 0])
        assert batch["t"].dtype == torch.float32
        assert torch.equal(batch["t"], torch.from_numpy(vectors[[2, 0]]).float())

    def test_other_widths_are_an_error_and_gaps_are_not(self, tmp_path: Path) -> None:
        needs = Needs((VectorField("t", "teacher"),))
        made.parquet(tmp_path / "a.parquet", 4, teacher=[[1.0, 2.0], None, [1.0, float("nan")], [3.0, 4.0]])
        batch = take(pairs(tmp_path / "a.parquet", needs), [0, 1, 2, 3])
        assert {row for row, _ in batch["skipped"]} == {1, 2}
        made.parquet(tmp_path / "a.parquet", 2, teacher=[[1.0, 2.0], [1.0]])
        with pytest.raises(UsageError, match=r"a.parquet:2.*1 numbers here and 2"):
            take(pairs(tmp_path / "a.parquet", needs), [0, 1])
        with pytest.raises(UsageError, match="no column 'gone'"):
            pairs(tmp_path / "a.parquet", Needs((VectorField("t", "gone"),)))


class TestClips:
    def test_frames_by_the_spec(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = []
        for number, many in enumerate((40, 3)):
            frames = np.stack([np.full((48, 64, 3), 6 * t, np.uint8) for t in range(many)])
            write_video(tmp_path / f"{number}.mp4", frames, 10)
            rows.append({"video": f"{number}.mp4", "text": f"picture number {number}"})
        rows.append({"video": "0.mp4", "text": "from 2 to 3", "start": 2.0, "end": 3.0})
        rows.append({"video": "gone.mp4", "text": "x"})
        path = made.jsonl(tmp_path / "a.jsonl", rows)
        spec = FrameSpec(count=4, padding="mask")
        recipe = Recipe(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1))
        batch = take(
            pairs(path, Needs((VideoField(), TextField())), recipe=recipe, frame_spec=spec), [0, 1, 2, 3]
        )
        clip = batch["clip"]
        assert isinstance(clip, ClipBatch)
        assert clip.frames_BTCHW.shape == (4, 4, 3, 32, 32)
        assert clip.mask_BT.sum(dim=1).tolist()[:3] == [4, 3, 4]
        assert clip.times_BT[0].tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5], abs=0.11)
        grey = clip.frames_BTCHW[:, :, 0].mean(dim=(2, 3)) * 255
        assert grey[0].tolist() == pytest.approx([30, 90, 150, 210], abs=10)
        assert not clip.frames_BTCHW[1, 3].any()
        assert 115 < grey[2].min() < grey[2].max() < 185
        assert [row for row, _ in batch["skipped"]] == [3]

    def test_clips_in_a_tar(self, tmp_path: Path) -> None:
        write_video(tmp_path / "v.mp4", np.full((12, 32, 32, 3), 128, np.uint8), 6)
        made.tar(tmp_path / "a.tar", [{"mp4": (tmp_path / "v.mp4").read_bytes(), "txt": b"grey"}] * 2)
        spec = FrameSpec(sampler="rate", rate=3.0)
        clip = take(pairs(tmp_path / "a.tar", Needs((VideoField(),)), frame_spec=spec), [0, 1])["clip"]
        assert clip.frames_BTCHW.shape[:2] == (2, 6)
        assert clip.mask_BT.all()


def reinforced(folder: Path, dim: int = 4, seed: int = 0) -> Path:
    from moviola.data import reinforced as r

    teacher = r.Teacher("t", "0" * 16, dim, (32, 32), "", "float32", 100.0)
    schema = r.shard_schema([teacher], 2)
    rng = np.random.default_rng(seed)
    cells = [[one.to_json() for one in r.draw(0, str(i), (40, 48), 2)] for i in range(6)]
    images = made.pictures(6)
    images[4] = images[4][:50]
    table = {
        "id": [f"r{i}" for i in range(6)],
        "image": images,
        "captions": [[f"picture number {i}", f"a{i}"] for i in range(6)],
        "synthetic": [[f"b{i}"] for i in range(6)],
        "augmentations": pa.array(cells, schema.field("augmentations").type),
    }
    for name, many in (("teacher_image", 2), ("teacher_text", 2), ("teacher_synthetic", 1)):
        table[name] = r.vector_lists([many] * 6, rng.normal(size=(6 * many, dim)))  # type: ignore[assignment]
    pq.write_table(pa.table(table, schema=schema), folder / f"{dim}.parquet")
    return folder / f"{dim}.parquet"


class TestReinforced:
    def test_fields(self, tmp_path: Path) -> None:
        data = pairs(reinforced(tmp_path), Needs((ReinforcedField(),)))
        batch = take(data, [3, 0, 4])
        assert batch["image"].shape == (3, 3, 32, 32)
        assert {k: tuple(batch[k].shape) for k in ("text", "synthetic", "teacher_image", "teacher_text")} == {
            "text": (3, 16),
            "synthetic": (3, 16),
            "teacher_image": (3, 4),
            "teacher_text": (3, 4),
        }
        assert torch.equal(batch["synthetic"][:2], tokens("b3", "b0"))
        assert batch["id"][:2] == ["r3", "r0"]
        assert [row for row, _ in batch["skipped"]] == [4]
        assert torch.equal(take(data, [0])["image"][0], batch["image"][1])

    def test_plain_pairs_and_mixed_runs(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="not reinforced"):
            pairs(made.parquet(tmp_path / "a.parquet", 2), Needs((ReinforcedField(),)))
        (tmp_path / "sets").mkdir()
        reinforced(tmp_path / "sets", 4)
        reinforced(tmp_path / "sets", 6)
        with pytest.raises(UsageError, match="different runs"):
            pairs(tmp_path / "sets", Needs((ReinforcedField(),)))


class TestCheck:
    def test_all_the_same(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 8, caption=["same"] * 8)
        with pytest.raises(UsageError, match="All 8 captions"):
            check(pairs(tmp_path / "a.parquet"))
        made.parquet(tmp_path / "a.parquet", 8, image=made.pictures(1) * 8)
        with pytest.raises(UsageError, match="All 8 pictures"):
            check(pairs(tmp_path / "a.parquet"))
        made.parquet(tmp_path / "a.parquet", 8, image=[b"x"] * 8)
        with pytest.raises(UsageError, match="None of 8 rows"):
            check(pairs(tmp_path / "a.parquet"))

    def test_notes(self, tmp_path: Path) -> None:
        assert check(pairs(made.parquet(tmp_path / "a.parquet", 20))) == []
        images = made.pictures(20)
        images[3] = b"junk"
        made.parquet(tmp_path / "a.parquet", 20, caption=["dog"] * 5 + made.captions(15), image=images)
        notes = check(pairs(tmp_path / "a.parquet"))
        assert len(notes) == 2
        assert "20.0 % of 20 captions" in notes[0]
        assert "'dog' (5 times)" in notes[0]
        assert "1 of 20 rows" in notes[1]
        assert "a.parquet:4" in notes[1]

    def test_sorted_data_is_sampled_over_many_row_groups(self, tmp_path: Path) -> None:
        made.parquet(
            tmp_path / "a.parquet", 60, row_group=10, caption=[f"class {i // 10}" for i in range(60)]
        )
        notes = check(pairs(tmp_path / "a.parquet", window=Window(bytes=20_000)), rows=12)
        assert "captions" in notes[0]

    def test_held_out(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 40, row_group=5)])
        train, probe = held_out(source, 6, seed=1)
        texts = [
            part.read(np.arange(len(part)), ["caption"])["caption"].to_pylist() for part in (train, probe)
        ]
        assert len(texts[1]) == 6
        assert sorted(texts[0] + texts[1]) == sorted(made.captions(40))
        again = held_out(source, 6, seed=1)[1]
        assert again.fingerprint == probe.fingerprint != held_out(source, 6, seed=2)[1].fingerprint
        for count in (0, 40):
            with pytest.raises(UsageError, match="Between 1 and 39"):
                held_out(source, count, seed=0)
