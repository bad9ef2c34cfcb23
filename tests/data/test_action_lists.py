"""Lists in the formats that the benchmarks release, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moviola.data.action_lists import list_layout, read_actions
from moviola.data.classes import ClassSet
from moviola.media import write_video
from moviola.types import TimeSpan, UsageError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    return path


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(found: ClassSet) -> list[tuple[str, str, str]]:
    """(id, class, file name) of each clip."""
    return [
        (name, found.classes[label], media.path.name)  # type: ignore[union-attr]
        for (_, name, media), label in zip(found.stream(), found.labels_N.tolist(), strict=True)
    ]


# --------------------------------------------------------------------------------------------------
# Kinetics
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def kinetics(tmp_path: Path) -> Path:
    return write(
        tmp_path / "train.csv",
        "label,youtube_id,time_start,time_end,split",
        "abseiling,_4YTwq0-73Y,66,76,train",
        '"air drumming",0067ReoA_4U,20,30,train',
        "abseiling,gone0000000,1,11,train",
        "zumba,--val000000,4,14,validate",
    )


def test_kinetics(kinetics: Path, tmp_path: Path) -> None:
    touch(tmp_path / "clips" / "abseiling" / "_4YTwq0-73Y_000066_000076.mp4")
    touch(tmp_path / "clips" / "air_drumming" / "0067ReoA_4U_000020_000030.mp4")
    assert list_layout(kinetics) == "kinetics"
    found = read_actions(kinetics, media_root=tmp_path / "clips")
    assert found.classes == ("abseiling", "air drumming", "zumba")
    assert read(found) == [
        ("_4YTwq0-73Y_000066_000076", "abseiling", "_4YTwq0-73Y_000066_000076.mp4"),
        ("0067ReoA_4U_000020_000030", "air drumming", "0067ReoA_4U_000020_000030.mp4"),
    ]
    assert all(media.span is None for _, _, media in found.stream())  # type: ignore[union-attr]
    assert [name for name, _ in found.skipped] == ["gone0000000_000001_000011", "--val000000_000004_000014"]
    only = read_actions(kinetics, media_root=tmp_path / "clips", split="train")
    assert (only.classes, only.split) == (("abseiling", "air drumming"), "train")
    with pytest.raises(UsageError, match="lists no clip of the split 'test'"):
        read_actions(kinetics, media_root=tmp_path / "clips", split="test")


def test_kinetics_files_under_any_folder_and_ending(kinetics: Path, tmp_path: Path) -> None:
    touch(tmp_path / "k400" / "val" / "part7" / "--val000000_000004_000014.mkv")
    found = read_actions(kinetics, media_root=tmp_path / "k400", split="val")
    assert read(found) == [("--val000000_000004_000014", "zumba", "--val000000_000004_000014.mkv")]


def test_kinetics_of_an_uncut_video_only_the_clip_is_read(kinetics: Path, tmp_path: Path) -> None:
    frame = np.zeros((1, 16, 16, 3), np.uint8)
    (tmp_path / "v" / "abseiling").mkdir(parents=True)
    write_video(tmp_path / "v" / "abseiling" / "_4YTwq0-73Y.mp4", (frame for _ in range(80)), 1)
    write_video(tmp_path / "v" / "abseiling" / "gone0000000.mp4", (frame for _ in range(10)), 1)
    found = read_actions(kinetics, media_root=tmp_path / "v", split="train")
    spans = [media.span for _, _, media in found.stream()]  # type: ignore[union-attr]
    assert spans == [TimeSpan(66, 76), None]  # the other is as long as its clip: cut already


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (",_4YTwq0-73Y,66,76,train", "Line 2 of .* has no label"),
        ("abseiling,_4YTwq0-73Y,,,train", "Line 2 of .* has no time_start"),
        ("abseiling,_4YTwq0-73Y,76,66,train", "Line 2 of .* has no time_start"),
    ],
)
def test_kinetics_bad_lines(line: str, match: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "label,youtube_id,time_start,time_end,split", line)
    with pytest.raises(UsageError, match=match):
        read_actions(path)


def test_kinetics_test_list_without_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split", "abc,0,10,test")
    with pytest.raises(UsageError, match="no label") as caught:
        read_actions(path)
    assert "cannot be learned" in str(caught.value.hint)


# --------------------------------------------------------------------------------------------------
# UCF101
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    lists = tmp_path / "ucfTrainTestlist"
    write(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 HandstandPushups", "3 YoYo")
    write(
        lists / "trainlist01.txt",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1",
        "HandstandPushups/v_HandStandPushups_g08_c01.avi 2",
        "YoYo/v_YoYo_g25_c05.avi 3",
    )
    write(lists / "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi")
    for name in ("v_ApplyEyeMakeup_g08_c01", "v_ApplyEyeMakeup_g01_c01"):
        touch(tmp_path / "UCF-101" / "ApplyEyeMakeup" / f"{name}.avi")
    touch(tmp_path / "UCF-101" / "HandstandPushups" / "v_HandStandPushups_g08_c01.avi")
    touch(tmp_path / "UCF-101" / "YoYo" / "v_YoYo_g01_c01.mp4")  # converted
    return lists


def test_ucf101(ucf: Path, tmp_path: Path) -> None:
    root = tmp_path / "UCF-101"
    found = read_actions(ucf, media_root=root)
    assert found.classes == ("Apply Eye Makeup", "Handstand Pushups", "Yo Yo")
    assert [row[1:] for row in read(found)] == [
        ("Apply Eye Makeup", "v_ApplyEyeMakeup_g08_c01.avi"),
        ("Handstand Pushups", "v_HandStandPushups_g08_c01.avi"),
    ]
    assert found.skipped[0][0] == "YoYo/v_YoYo_g25_c05.avi"
    for test in (
        read_actions(ucf, media_root=root, split="test"),
        read_actions(ucf / "testlist01.txt", media_root=root),
    ):
        assert [row[1:] for row in read(test)] == [
            ("Apply Eye Makeup", "v_ApplyEyeMakeup_g01_c01.avi"),
            ("Yo Yo", "v_YoYo_g01_c01.mp4"),
        ]
        assert (test.classes, test.split) == (found.classes, "test")


def test_ucf101_files_in_one_folder(tmp_path: Path) -> None:
    """As ViFi-CLIP lists them: the class is in the file's name."""
    write(tmp_path / "classInd.txt", "1 ApplyEyeMakeup", "2 HandstandPushups")
    path = write(
        tmp_path / "trainlist01.txt", "v_ApplyEyeMakeup_g08_c01.avi 1", "v_HandStandPushups_g01_c01.avi 2"
    )
    for line in path.read_text().splitlines():
        touch(tmp_path / "all" / line.split()[0])
    assert [row[1] for row in read(read_actions(path))] == ["Apply Eye Makeup", "Handstand Pushups"]


def test_ucf101_bad_lists(ucf: Path, tmp_path: Path) -> None:
    root = tmp_path / "UCF-101"
    write(ucf / "trainlist02.txt", "Juggling/v_Juggling_g01_c01.avi 1", "ApplyEyeMakeup/v_A_g01_c01.avi 1")
    with pytest.raises(UsageError, match=r"1 labels .* not among its 3 classes: Juggling\."):
        read_actions(ucf, media_root=root, fold=2)
    with pytest.raises(UsageError, match=r"no list at .*trainlist03"):
        read_actions(ucf, media_root=root, fold=3)
    with pytest.raises(UsageError, match="splits train and test, not 'val'"):
        read_actions(ucf, media_root=root, split="val")
    write(ucf / "trainlist03.txt", "film.avi 1")
    with pytest.raises(UsageError, match=r"film\.avi tells no class"):
        read_actions(ucf, media_root=root, fold=3)


# --------------------------------------------------------------------------------------------------
# HMDB51
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    lists = tmp_path / "testTrainMulti_7030_splits"
    for fold, marks in ((1, "120"), (2, "012")):
        for name in ("brush_hair", "run"):
            rows = [f"{name}_(a)&b_{n}.avi {mark} " for n, mark in enumerate(marks)]
            write(lists / f"{name}_test_split{fold}.txt", *rows)
    for name in ("brush_hair", "run"):
        for n in range(3):
            touch(tmp_path / "hmdb51" / name / f"{name}_(a)&b_{n}.avi")
    return lists


def test_hmdb51(hmdb: Path, tmp_path: Path) -> None:
    root = tmp_path / "hmdb51"

    def files(**options: object) -> list[str]:
        return [row[2] for row in read(read_actions(hmdb, media_root=root, **options))]  # type: ignore[arg-type]

    assert list_layout(hmdb) == "hmdb51"
    assert read_actions(hmdb, media_root=root).classes == ("brush hair", "run")
    assert files() == ["brush_hair_(a)&b_0.avi", "run_(a)&b_0.avi"]
    assert files(split="test") == ["brush_hair_(a)&b_1.avi", "run_(a)&b_1.avi"]
    assert files(split="test", fold=2) == ["brush_hair_(a)&b_2.avi", "run_(a)&b_2.avi"]
    one = read_actions(hmdb / "run_test_split2.txt", media_root=root)  # any of its files stands for the split
    assert [row[2] for row in read(one)] == ["brush_hair_(a)&b_1.avi", "run_(a)&b_1.avi"]


def test_hmdb51_bad_lists(hmdb: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no lists of split 3"):
        read_actions(hmdb, media_root=tmp_path, fold=3)
    write(hmdb / "run_test_split1.txt", "run_0.avi 3")
    with pytest.raises(UsageError, match=r"run_test_split1\.txt: expected NAME and 0, 1 or 2"):
        read_actions(hmdb, media_root=tmp_path / "hmdb51")


# --------------------------------------------------------------------------------------------------
# Something-Something V2
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def ssv2(tmp_path: Path) -> Path:
    rows = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "vicks vaporub bottle"],
        },
        {
            "id": "42326",
            "label": "pushing a plate",
            "template": "Pushing [something] so that it [slightly] moves",
            "placeholders": ["a plate"],
        },
    ]
    path = tmp_path / "something-something-v2-train.json"
    path.write_text(json.dumps(rows))
    for row in rows:
        touch(tmp_path / "20bn-something-something-v2" / f"{row['id']}.webm")
    return path


def labels(ssv2: Path, name: str, numbers: dict[str, str]) -> None:
    (ssv2.parent / name).write_text(json.dumps(numbers))


@pytest.mark.parametrize("name", ["labels.json", "something-something-v2-labels.json"])
def test_ssv2(ssv2: Path, name: str) -> None:
    numbers = {
        "Pushing something so that it slightly moves": "1",
        "Holding something next to something": "0",
        "Tearing something just a little bit": "10",
    }
    labels(ssv2, name, numbers)
    assert list_layout(ssv2) == "ssv2"
    found = read_actions(ssv2)
    assert found.classes == tuple(sorted(numbers, key=lambda key: int(numbers[key])))
    assert [row[1:] for row in read(found)] == [
        ("Holding something next to something", "78687.webm"),
        ("Pushing something so that it slightly moves", "42326.webm"),
    ]


def test_ssv2_labels_elsewhere(ssv2: Path, tmp_path: Path) -> None:
    numbers = {"Holding something next to something": "1", "Pushing something so that it slightly moves": "0"}
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "labels.json").write_text(json.dumps(numbers))
    found = read_actions(ssv2, names=tmp_path / "far" / "labels.json")
    assert found.classes == (
        "Pushing something so that it slightly moves",
        "Holding something next to something",
    )
    assert read_actions(ssv2).classes == tuple(sorted(numbers))  # without a file: those of the clips


def test_ssv2_labels_missing_from_the_list(ssv2: Path) -> None:
    labels(ssv2, "labels.json", {"Holding something next to something": "0"})
    with pytest.raises(UsageError, match=r"1 labels .*: Pushing something so that it slightly moves"):
        read_actions(ssv2)


def test_ssv2_test_list_without_labels(ssv2: Path) -> None:
    ssv2.write_text(json.dumps([{"id": "1", "template": "Holding [something]"}, {"id": "2"}]))
    with pytest.raises(UsageError, match=r"no id and template"):
        read_actions(ssv2)


# --------------------------------------------------------------------------------------------------
# Path and number
# --------------------------------------------------------------------------------------------------


def test_numbered_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path / "train_list_videos.txt",
        "abseiling/a b.mp4 0",
        "zumba/c.mp4 2",
        "zumba/d.mp4,2",
        "x/gone.mp4 1",
    )
    for name in ("abseiling/a b.mp4", "other/c.mkv", "zumba/d.mp4"):
        touch(tmp_path / "v" / name)
    assert list_layout(path) == "numbered"
    names = {
        "list": ["abseiling", "air drumming", "zumba"],
        "lines": write(tmp_path / "label_map_k400.txt", "abseiling", "air drumming", "zumba"),
        "csv": write(tmp_path / "labels.csv", "id,name", "0,abseiling", "1,air drumming", "2,zumba"),
        "numbers": write(tmp_path / "names.txt", "0 abseiling", "1 air drumming", "2 zumba"),
        "json": tmp_path / "names.json",
        "mapping": {"0": "abseiling", "1": "air drumming", "2": "zumba"},
    }
    (tmp_path / "names.json").write_text(json.dumps({"zumba": "2", "abseiling": "0", "air drumming": "1"}))
    for kind, given in names.items():
        found = read_actions(path, media_root=tmp_path / "v", names=given)  # type: ignore[arg-type]
        assert found.classes == ("abseiling", "air drumming", "zumba"), kind
        assert [row[1:] for row in read(found)] == [
            ("abseiling", "a b.mp4"),
            ("zumba", "c.mkv"),
            ("zumba", "d.mp4"),
        ], kind
        assert found.skipped == (("x/gone.mp4", "there is no such file under the media folder"),)


def test_numbered_lists_with_whole_paths(tmp_path: Path) -> None:
    file = touch(tmp_path / "far" / "a.mp4")
    path = write(tmp_path / "lists" / "val.txt", f"{file} 1", f"{tmp_path}/far/b.mp4 0")
    found = read_actions(path, names=["x", "y"])
    assert [row[1:] for row in read(found)] == [("y", "a.mp4")]


def test_numbered_bad_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a.mp4 0", "b.mp4 5", "c.mp4 7")
    touch(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="class numbers, not names"):
        read_actions(path)
    with pytest.raises(UsageError, match=r"2 labels .* among its 2 classes: 5, 7\."):
        read_actions(path, names=["x", "y"])
    frames = write(tmp_path / "rawframes.txt", "abseiling/clip1 250 0")
    with pytest.raises(UsageError, match=r"Line 1 .*path of a video and a class number"):
        read_actions(frames, names=["x", "y"])


# --------------------------------------------------------------------------------------------------
# Any list
# --------------------------------------------------------------------------------------------------


def test_names_of_ones_own(ucf: Path, tmp_path: Path) -> None:
    root = tmp_path / "UCF-101"
    found = read_actions(ucf, media_root=root, names=["making up", "push-ups", "a yo-yo"])
    assert read(found)[0][1] == "making up"
    with pytest.raises(UsageError, match="2 names for the 3 classes"):
        read_actions(ucf, media_root=root, names=["a", "b"])
    with pytest.raises(UsageError, match=r"labels .*: HandstandPushups"):
        read_actions(ucf, media_root=root, names={"ApplyEyeMakeup": "making up", "YoYo": "a yo-yo"})


def test_all_classes_of_a_benchmark_for_a_part_of_it(kinetics: Path, tmp_path: Path) -> None:
    """A list that lacks some classes, and the names of all: numbers are those of the whole benchmark."""
    touch(tmp_path / "clips" / "--val000000_000004_000014.mp4")
    whole = write(tmp_path / "map.txt", "abseiling", "air drumming", "archery", "zumba")
    found = read_actions(kinetics, media_root=tmp_path / "clips", split="val", names=whole)
    assert found.classes == ("abseiling", "air drumming", "archery", "zumba")
    assert found.labels_N.tolist() == [3]
    with pytest.raises(UsageError, match=r"labels .* not among its 1 classes: abseiling, air drumming"):
        read_actions(kinetics, media_root=tmp_path / "clips", names={"zumba": "zumba"})


def test_nothing_there(kinetics: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"Of the 4 clips of .* not one is under") as caught:
        read_actions(kinetics, media_root=tmp_path / "empty")
    assert "--media-root" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no folder of media"):
        read_actions(kinetics, media_root=tmp_path / "gone")
    with pytest.raises(UsageError, match="There is no list"):
        read_actions(tmp_path / "gone.csv")
    with pytest.raises(UsageError, match="is empty"):
        read_actions(write(tmp_path / "e.txt", ""), layout="numbered", names=["a"])


def test_what_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "classes" / "run").mkdir(parents=True)
    table = write(tmp_path / "table.csv", "path,class", "a.mp4,run")
    for other in (tmp_path / "classes", table, tmp_path / "gone.parquet"):
        assert list_layout(other) is None
    with pytest.raises(UsageError, match="no list of clips that is known"):
        read_actions(table)
