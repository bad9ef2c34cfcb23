"""`reinforce`: what is stored is what the teachers say, a killed run goes on, bad input is told."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from moviola.clip.config import ClipConfig, TextConfig, VitConfig
from moviola.clip.loaded import Model
from moviola.clip.model import CLIP
from moviola.data.pairs import OutputError
from moviola.data.reinforced import (
    Augmentation,
    apply,
    draw,
    open_reinforced,
    read_manifest,
    reinforced_batch,
)
from moviola.media import read_picture
from moviola.types import Recipe, Refusal, UsageError
from moviola.verbs.reinforce import reinforce
from tests.verbs.colour_clip import COLOURS, TOKENIZER, colour_model

NAMES = list(COLOURS)


def tiny_clip(size: int = 24, seed: int = 0) -> Model:
    """A random CLIP with pictures of another size and vectors of another width than the colour model."""
    torch.manual_seed(seed)
    text = TextConfig(context_length=12, vocab_size=TOKENIZER.size, width=16, layers=1, heads=2)
    config = ClipConfig(12, VitConfig(size, 8, 16, 1, 2), text)
    return Model(CLIP(config), config=config.to_json(), tokenizer=TOKENIZER, name="tiny", device="cpu")


def png(row: int, size: tuple[int, int] = (30, 40)) -> bytes:
    """Blocks of colours, another arrangement in each row."""
    blocks = np.random.default_rng(row).integers(0, len(NAMES), (3, 4))
    pixels = np.array(list(COLOURS.values()), np.uint8)[blocks]
    out = io.BytesIO()
    Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST).save(out, "PNG")
    return out.getvalue()


def table(rows: int) -> pa.Table:
    return pa.table(
        {
            "id": [f"row-{r}" for r in range(rows)],
            "image": [png(r) for r in range(rows)],
            "captions": [
                [f"a photo of a {NAMES[(r + i) % 8]} thing" for i in range(1 + r % 3)] for r in range(rows)
            ],
            "made": [f"a picture showing {NAMES[r % 8]}" if r % 4 else None for r in range(rows)],
        }
    )


def pairs(folder: Path, rows: int, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows), folder / "pairs.parquet", **options)
    return folder / "pairs.parquet"


def read(folder: Path) -> pa.Table:
    _, shards = open_reinforced(folder)
    return pa.concat_tables([pq.read_table(shard) for shard in shards])


def test_what_is_stored_is_what_the_teachers_say(tmp_path):
    colours, tiny = colour_model(), tiny_clip()
    made = reinforce(
        pairs(tmp_path, 21), tmp_path / "out", teachers=[colours, tiny], augmentations=5, shard_rows=8,
        synthetic="made", seed=3, batch_size=16,
    )  # fmt: skip
    assert made.ok
    manifest, shards = open_reinforced(tmp_path / "out")
    assert manifest == made.manifest
    assert manifest.dims == (8, 12)
    assert [(t.name, t.hash, t.size) for t in manifest.teachers] == [
        ("colours", colours.hash, (16, 16)),
        ("tiny", tiny.hash, (24, 24)),
    ]
    assert [rows for _, rows in manifest.shards] == [8, 8, 5]
    assert not (tmp_path / "out.partial").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        *(s.name for s in shards),
    ]
    rows, given = read(tmp_path / "out").to_pylist(), table(21).to_pylist()
    for row, was in zip(rows, given, strict=True):
        assert (row["id"], row["image"], row["captions"]) == (was["id"], was["image"], was["captions"])
        assert row["synthetic"] == ([was["made"]] if was["made"] else [])
        drawn = [Augmentation.from_json(one) for one in row["augmentations"]]
        assert drawn == draw(3, was["id"], (30, 40), 5)
        for name, texts in (("teacher_text", row["captions"]), ("teacher_synthetic", row["synthetic"])):
            want = np.concatenate([m.embed_texts(texts) for m in (colours, tiny)], 1)
            np.testing.assert_allclose(np.array(row[name], np.float32).reshape(-1, 20), want, atol=1e-3)
        picture = read_picture(row["image"])
        shown = [[apply(d, picture, m.recipe.size) for d in drawn] for m in (colours, tiny)]
        given_AD = np.array(row["teacher_image"], np.float32)
        frames = [np.stack([np.asarray(one) for one in some]) for some in shown]
        want = np.concatenate([m.embed_frames(f) for m, f in zip((colours, tiny), frames, strict=True)], 1)
        np.testing.assert_allclose(given_AD, want, atol=1e-3)
        np.testing.assert_allclose(given_AD[:, 8:], tiny.embed_pictures(shown[1]), atol=1e-3)
        assert np.ptp(want, axis=0).max() > 0.01  # the augmentations are seen
    assert manifest.counts["without_synthetic"] == 6
    assert manifest.counts["synthetic"] == 15
    assert "15 from made; 6 pairs have none" in str(made)


def test_training_batches_never_call_a_teacher(tmp_path):
    teacher = colour_model()
    reinforce(pairs(tmp_path, 12), tmp_path / "out", teachers=teacher, augmentations=3)
    assert teacher.module.seen == 36
    calls: list[str] = []
    for module in teacher.module.modules():
        module.register_forward_pre_hook(lambda *args: calls.append("forward"))
    teacher.module.encode_image = teacher.module.encode_text = lambda *args: calls.append("encode")  # type: ignore
    student = Recipe(size=(32, 32))  # another size than the teacher's
    for epoch in range(3):
        batch = reinforced_batch(
            read(tmp_path / "out"), np.arange(12), seed=0, epoch=epoch, recipe=student, tokenize=TOKENIZER
        )
        assert batch["image"].shape == (12, 3, 32, 32)
        torch.testing.assert_close(batch["teacher_image"].norm(dim=1), torch.ones(12), atol=1e-3, rtol=0)
        torch.testing.assert_close(batch["teacher_text"].norm(dim=1), torch.ones(12), atol=1e-3, rtol=0)
    assert teacher.module.seen == 36
    assert calls == []


def test_without_synthetic_captions_it_says_what_stands_in(tmp_path):
    made = reinforce(pairs(tmp_path, 9), tmp_path / "out", teachers=colour_model(), augmentations=1)
    assert "no synthetic captions (--synthetic)" in str(made)
    assert "another real caption" in str(made)
    assert "3 pairs that have only one" in str(made)
    assert read(tmp_path / "out")["synthetic"].to_pylist() == [[]] * 9


# ------------------------------------------------------------------------------------------- resuming

RUN = """
import sys, torch
import tests.verbs.test_reinforce as t
from moviola.verbs.reinforce import reinforce
torch.set_num_threads(1)
reinforce(sys.argv[1], sys.argv[2], **t.settings(slow=True))
"""


def settings(slow: bool = False) -> dict:
    tiny = tiny_clip()
    if slow:  # so that a kill hits the middle of a shard
        encode = tiny.module.encode_image

        def encode_slowly(pixels):
            time.sleep(0.01)
            return encode(pixels)

        tiny.module.encode_image = encode_slowly
    return {
        "teachers": [colour_model(), tiny],
        "augmentations": 4,
        "shard_rows": 10,
        "synthetic": "made",
        "batch_size": 8,
    }


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, kills):
    source = pairs(tmp_path, 75, row_group_size=20)
    (tmp_path / "more").mkdir()
    lines = [{"id": f"l{r}", "image": f"{r}.png", "caption": "green", "made": "red"} for r in range(25)]
    for r in range(25):
        (tmp_path / "more" / f"{r}.png").write_bytes(png(100 + r))
    lines[7]["image"] = "missing.png"
    (tmp_path / "more" / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    script = tmp_path / "run.py"
    script.write_text(RUN.replace("sys.argv[1]", repr([str(source), str(tmp_path / "more" / "lines.jsonl")])))
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
        "OMP_NUM_THREADS": "1",
    }
    out, work = tmp_path / "out", tmp_path / "out.partial"
    command = [sys.executable, str(script), "-", str(out)]
    kept = []
    for _ in range(kills):
        before = len(list(work.glob("done/*.json")))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and len(list(work.glob("done/*.json"))) < before + 2:
            time.sleep(0.002)
        time.sleep(0.05)
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not out.exists()
        kept.append({p.name: p.stat().st_mtime_ns for p in (work / "out").glob("*.parquet")})
    # what a kill can leave: a file being written, and a shard without its receipt
    (work / "out" / ".part-x.abc.writing").write_bytes(b"half")
    receipts = sorted(work.glob("done/*.json"))
    finished = len(receipts)
    receipts[-1].unlink()
    sources = [source, tmp_path / "more" / "lines.jsonl"]
    torch.set_num_threads(1)
    made = reinforce(sources, out, **settings())
    assert made.went_on == finished - 1
    for earlier, later in pairwise(kept):
        assert earlier.items() <= later.items()  # nothing is made twice
    clean = reinforce(sources, tmp_path / "clean", **settings())
    assert clean.went_on == 0
    assert clean.manifest.shards == made.manifest.shards
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in clean.folder.iterdir())
    for place in clean.folder.iterdir():
        assert (out / place.name).read_bytes() == place.read_bytes()
    ids = read(out)["id"].to_pylist()
    assert ids == [f"row-{r}" for r in range(75)] + [f"l{r}" for r in range(25) if r != 7]
    assert made.manifest.counts["skipped"] == {"picture cannot be read": 1}
    assert made.manifest.counts["read"] == 100


def test_a_whole_set_is_given_back(tmp_path):
    source = pairs(tmp_path, 6)
    first = reinforce(source, tmp_path / "out", teachers=colour_model(), augmentations=2)
    teacher = colour_model()
    again = reinforce(source, tmp_path / "out", teachers=teacher, augmentations=2)
    assert again.manifest == first.manifest
    assert teacher.module.seen == 0


def stop_after(rows: int):
    def stop(done: float, total: float | None, note: str = "") -> None:
        if done > rows:
            raise KeyboardInterrupt

    return stop


def interrupted(source: Path, out: Path, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        reinforce(source, out, shard_rows=4, batch_size=4, on_progress=stop_after(6), **options)


@pytest.mark.parametrize("whole", [False, True])
def test_another_teacher_or_setting_does_not_go_on(tmp_path, whole):
    source, out = pairs(tmp_path, 12), tmp_path / "out"
    options = {"teachers": tiny_clip(), "augmentations": 2}
    if whole:
        reinforce(source, out, shard_rows=4, **options)
    else:
        interrupted(source, out, **options)
        assert not out.exists()
    what = "holds a reinforced set" if whole else "holds an unfinished run"
    with pytest.raises(UsageError, match=rf"{what} of other teachers: weights .* there"):
        reinforce(source, out, shard_rows=4, **{**options, "teachers": tiny_clip(seed=1)})
    with pytest.raises(UsageError, match=rf"{what} of other teachers"):
        reinforce(source, out, shard_rows=4, **{**options, "teachers": [tiny_clip(), colour_model()]})
    for changed in ({"augmentations": 3}, {"seed": 1}, {"area": (0.5, 1.0)}, {"synthetic": "made"}):
        with pytest.raises(UsageError, match=rf"{what} with other settings"):
            reinforce(source, out, **{"shard_rows": 4, **options, **changed})
    pq.write_table(table(13), source)
    with pytest.raises(UsageError, match=rf"{what} with other settings \(files\)"):
        reinforce(source, out, shard_rows=4, **options)


def test_progress_counts_to_the_end_and_from_where_it_stopped(tmp_path):
    told = []
    source, options = pairs(tmp_path, 12), {"teachers": colour_model(), "augmentations": 2}
    interrupted(source, tmp_path / "out", **options)
    made = reinforce(
        source, tmp_path / "out", shard_rows=4, on_progress=lambda *a: told.append(a[:2]), **options
    )
    assert told[0] == (4, 12)
    assert told[-1] == (12, 12)
    assert made.went_on == 1


# -------------------------------------------------------------------------------------------- formats


def test_tables_with_paths_and_tars_give_the_same_rows(tmp_path):
    given = table(10)
    (tmp_path / "csv" / "pictures").mkdir(parents=True)
    lines = ["id,image,caption,made"]
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for r, row in enumerate(given.to_pylist()):
            (tmp_path / "csv" / "pictures" / f"{r}.png").write_bytes(row["image"])
            lines.append(f"{row['id']},pictures/{r}.png,{row['captions'][0]},{row['made'] or ''}")
            extra = json.dumps({"id": row["id"], "made": row["made"]}).encode()
            for ending, body in (
                ("png", row["image"]),
                ("txt", row["captions"][0].encode()),
                ("json", extra),
            ):
                info = tarfile.TarInfo(f"{r:04d}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    (tmp_path / "csv" / "pairs.csv").write_text("\n".join(lines))
    options = {"teachers": colour_model(), "augmentations": 2, "shard_rows": 4}
    reinforce(tmp_path / "csv" / "pairs.csv", tmp_path / "a", synthetic="made", **options)
    reinforce(tmp_path / "pairs.tar", tmp_path / "b", synthetic="json.made", id_column="json.id", **options)
    one, other = read(tmp_path / "a"), read(tmp_path / "b")
    assert one.num_rows == 10
    assert one.equals(other)
    assert one["captions"].to_pylist() == [row[:1] for row in given["captions"].to_pylist()]
    # a set of its own is a table of pairs, too
    reinforce(tmp_path / "a", tmp_path / "c", synthetic="synthetic", **options)
    assert read(tmp_path / "c").equals(one)


# ------------------------------------------------------------------------------------------ bad input


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    given = table(8).to_pylist()
    given[1]["image"] = b"no picture"
    given[2]["image"] = None
    given[3]["captions"] = [" ", None]
    given[4]["captions"] = None
    given[5]["image"] = png(5)[:60]
    pq.write_table(pa.Table.from_pylist(given, table(8).schema), tmp_path / "p.parquet")
    made = reinforce(tmp_path / "p.parquet", tmp_path / "out", teachers=colour_model(), augmentations=2)
    assert not made.ok
    assert made.manifest.counts["skipped"] == {
        "picture cannot be read": 2,
        "row has no picture": 1,
        "row has no caption": 2,
    }
    assert read(tmp_path / "out")["id"].to_pylist() == ["row-0", "row-6", "row-7"]
    assert len(made.skipped) == 5
    assert any(line.startswith("row-1: ") for line in made.skipped)
    assert "5 rows were left out" in str(made)


def test_a_vector_that_is_not_finite_is_left_out(tmp_path):
    solid = io.BytesIO()
    Image.new("RGB", (30, 40), COLOURS["red"]).save(solid, "PNG")
    given = table(4).set_column(1, "image", pa.array([png(0), solid.getvalue(), png(2), png(3)]))
    pq.write_table(given, tmp_path / "p.parquet")
    made = reinforce(
        tmp_path / "p.parquet",
        tmp_path / "out",
        teachers=colour_model(broken="red"),
        augmentations=2,
        operations=0,
    )
    assert made.manifest.counts["skipped"] == {"a teacher gave no finite vector": 1}
    assert read(tmp_path / "out")["id"].to_pylist() == ["row-0", "row-2", "row-3"]


def test_long_captions_are_cut_and_counted_without_a_warning_each(tmp_path, recwarn):
    given = table(3).set_column(2, "captions", pa.array([["red " * 60], ["blue"], ["green"]]))
    pq.write_table(given, tmp_path / "p.parquet")
    made = reinforce(tmp_path / "p.parquet", tmp_path / "out", teachers=[tiny_clip(), colour_model()])
    assert made.manifest.counts["cut"] == 1
    assert "1 captions were cut" in str(made)
    assert made.ok
    assert not [w for w in recwarn if "was cut" in str(w.message)]


def test_two_runs_do_not_write_one_folder(tmp_path):
    from filelock import FileLock

    source, work = pairs(tmp_path, 12), tmp_path / "out.partial"
    interrupted(source, tmp_path / "out", teachers=colour_model(), augmentations=2)
    with FileLock(work / ".lock"), pytest.raises(UsageError, match=r"Another run is writing"):
        reinforce(source, tmp_path / "out", teachers=colour_model(), augmentations=2, shard_rows=4)


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    given = table(3).set_column(1, "image", pa.array([b"x", b"y", b"z"]))
    pq.write_table(given, tmp_path / "p.parquet")
    with pytest.raises(
        UsageError, match=r"Nothing was reinforced of 3 rows \(picture cannot be read: 3\).*row-0"
    ):
        reinforce(tmp_path / "p.parquet", tmp_path / "out", teachers=colour_model())
    assert not list(tmp_path.glob("out*"))


def cut_tar(place: Path, rows: int, kept: int) -> Path:
    """A tar of `rows` samples that ends in the middle of sample `kept`."""
    with tarfile.open(place, "w") as tar:
        for r in range(rows):
            if r == kept:
                end = tar.offset
            for ending, body in (("png", png(r)), ("txt", b"a red thing")):
                info = tarfile.TarInfo(f"{r:04d}.{ending}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    place.write_bytes(place.read_bytes()[: end + 512 + 50])
    return place


def test_a_file_that_breaks_keeps_what_came_before(tmp_path):
    sources = [cut_tar(tmp_path / "cut.tar", 130, kept=121), pairs(tmp_path, 5)]
    options = {"teachers": colour_model(), "augmentations": 1, "shard_rows": 60}
    made = reinforce(sources, tmp_path / "out", **options)
    assert not made.ok
    assert made.manifest.counts["skipped"] == {"the file is damaged from here on": 1}
    assert "ends inside a file" in made.skipped[0]
    rows = read(tmp_path / "out")
    assert rows["id"].to_pylist() == [f"{r:04d}" for r in range(121)] + [f"row-{r}" for r in range(5)]
    # stopped after the damage, it does not look at the damaged file again
    with pytest.raises(KeyboardInterrupt):
        reinforce(sources, tmp_path / "again", on_progress=stop_after(122), **options)
    assert reinforce(sources, tmp_path / "again", **options).manifest == made.manifest


def test_a_garbled_parquet_page_keeps_what_came_before(tmp_path):
    source = pairs(
        tmp_path, 40, row_group_size=10, write_page_checksum=True, compression="none", use_dictionary=False
    )
    group = pq.ParquetFile(source).metadata.row_group(2)
    at = group.column(1).data_page_offset + group.column(1).total_compressed_size // 2
    data = bytearray(source.read_bytes())
    data[at] ^= 0xFF
    source.write_bytes(data)
    made = reinforce(source, tmp_path / "out", teachers=colour_model(), augmentations=1, shard_rows=16)
    assert made.manifest.counts["skipped"] == {"the file is damaged from here on": 1}
    assert read(tmp_path / "out")["id"].to_pylist() == [f"row-{r}" for r in range(20)]


def test_columns_teachers_and_numbers_that_cannot_be(tmp_path):
    source = pairs(tmp_path, 2)
    teacher = colour_model()
    for options, match in (
        ({"synthetic": "nothing"}, r"no column 'nothing'.*'made'.*--synthetic"),
        ({"image_column": "photo"}, r"no column 'photo'.*--image-column"),
        ({"text_columns": ["words"]}, r"no column 'words'.*--text-column"),
        ({"augmentations": 0}, r"at least one augmentation"),
        ({"batch_size": 0}, r"batch_size must be at least 1"),
        ({"area": (0.0, 1.0)}, r"area of a crop"),
        ({"teachers": []}, r"no teacher"),
        ({"teachers": [teacher, colour_model()]}, r"same weights"),
    ):
        with pytest.raises(UsageError, match=match):
            reinforce(source, tmp_path / "out", **{"teachers": teacher, **options})
    with pytest.raises(Refusal, match=r"has no text tower"):
        reinforce(source, tmp_path / "out", teachers=colour_model(has_text=False))
    with pytest.raises(Refusal, match=r"cannot teach"):
        reinforce(source, tmp_path / "out", teachers=colour_model(separable=False))
    pq.write_table(table(2).drop_columns(["captions"]), tmp_path / "bare.parquet")
    with pytest.raises(UsageError, match=r"no column that names itself captions"):
        reinforce(tmp_path / "bare.parquet", tmp_path / "out", teachers=teacher)
    with pytest.raises(UsageError, match=r"lies among the pairs"):
        reinforce(tmp_path, tmp_path / "out", teachers=teacher)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match=r"exists already and is no reinforced set"):
        reinforce(source, tmp_path / "there", teachers=teacher)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    source = pairs(tmp_path / "in", 2)
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"could not be written"):
        reinforce(source, tmp_path / "locked" / "out", teachers=colour_model())


def test_shards_that_do_not_belong_are_found(tmp_path):
    source = pairs(tmp_path, 8)
    reinforce(source, tmp_path / "a", teachers=colour_model(), augmentations=2, shard_rows=4)
    reinforce(source, tmp_path / "b", teachers=tiny_clip(), augmentations=2, shard_rows=4)
    reinforce(source, tmp_path / "c", teachers=colour_model(), augmentations=3, shard_rows=4)
    shard = read_manifest(tmp_path / "a").shards[1][0]
    kept = (tmp_path / "a" / shard).read_bytes()
    for other, match in (
        ("b", r"has teachers .* the set's manifest says"),
        ("c", r"has augmentations a row 3"),
    ):
        (tmp_path / "a" / shard).write_bytes((tmp_path / other / shard).read_bytes())
        with pytest.raises(UsageError, match=match):
            open_reinforced(tmp_path / "a")
    (tmp_path / "a" / shard).write_bytes(kept[:-100])
    with pytest.raises(UsageError, match=r"cannot be read"):
        open_reinforced(tmp_path / "a")
    whole = pq.read_table(io.BytesIO(kept))
    pq.write_table(whole.slice(1), tmp_path / "a" / shard)
    with pytest.raises(UsageError, match=r"has 3 rows, the manifest says 4"):
        open_reinforced(tmp_path / "a")
    narrow = whole.set_column(
        5, "teacher_image", pa.array([[[0.0] * 3] * 2] * 4, pa.list_(pa.list_(pa.float16(), 3)))
    )
    pq.write_table(narrow, tmp_path / "a" / shard)
    with pytest.raises(UsageError, match=r"teacher_image has vectors of width 3, expected .* width 8"):
        open_reinforced(tmp_path / "a")


# -------------------------------------------------------------------------------------------- the CLI


def test_the_command(tmp_path):
    from moviola.cli.reinforce import reinforce as command

    app = Typer()
    app.command()(command)
    tiny_clip().save(tmp_path / "tiny")
    source = pairs(tmp_path, 6)
    arguments = [
        str(source),
        "--to",
        str(tmp_path / "out"),
        "--teacher",
        "builtin",
        "--teacher",
        str(tmp_path / "tiny"),
    ]
    arguments += ["--augmentations", "2", "--synthetic", "made", "--area", "0.3", "1", "--seed", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "6 pairs with 2 augmentations each" in result.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.dims[1] == 12
    assert (manifest.augment.area, manifest.seed) == ((0.3, 1.0), 4)
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.output)["rows"] == 6


# ------------------------------------------------------------------------------------------ the speed


@pytest.mark.slow
def test_a_batch_costs_little_more_than_decoding(tmp_path, record_property):
    """CPU time of batches against Pillow's decoding and CLIP's own recipe of the same pictures."""
    from moviola.clip.preprocess import Preprocess

    generator = np.random.default_rng(0)
    images = []
    for _ in range(64):
        small = Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8))
        out = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        images.append(out.getvalue())
    pq.write_table(pa.table({"image": images, "caption": ["a red thing"] * 64}), tmp_path / "p.parquet")
    reinforce(tmp_path / "p.parquet", tmp_path / "out", teachers=colour_model(), augmentations=4)
    stored, recipe = read(tmp_path / "out"), Recipe()

    def ours(epoch: int) -> None:
        reinforced_batch(stored, np.arange(64), seed=0, epoch=epoch, recipe=recipe, tokenize=TOKENIZER)

    def plain(_: int) -> None:
        Preprocess(recipe).pictures([read_picture(image) for image in images])

    def seconds(function) -> float:
        spent = []
        for epoch in range(4):
            start = time.process_time()
            function(epoch)
            spent.append(time.process_time() - start)
        return min(spent[1:])

    mine, theirs = seconds(ours), seconds(plain)
    record_property("rows_per_cpu_second", 64 / mine)
    record_property("plain_rows_per_cpu_second", 64 / theirs)
    print(f"{64 / mine:.0f} rows per CPU second, plain decoding {64 / theirs:.0f}")
    assert mine < 3 * theirs
