"""Labelled sets: folders per class with and without names, splits, and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moviola.data.readers import read_classes
from moviola.types import Clip, UsageError

WNIDS = {"n01440764": "tench, Tinca tinca", "n02124075": "Egyptian cat", "n03126707": "crane"}


def folders(root: Path, *names: str, files: int = 2) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(files):
            (root / name / f"{i}.JPEG").write_bytes(b"x")
    return root


def test_a_folder_per_class(tmp_path: Path) -> None:
    found = read_classes(folders(tmp_path, "golden_retriever", "cat"))
    assert found.classes == ("cat", "golden retriever")
    assert found.labels_N.tolist() == [0, 0, 1, 1]
    assert [(i, media) for i, _, media in found.stream()] == [
        (i, Clip(tmp_path / folder / f"{n}.JPEG"))
        for i, (folder, n) in enumerate([(f, n) for f in ("cat", "golden_retriever") for n in (0, 1)])
    ]
    assert [i for i, _, _ in found.stream([3, 1])] == [1, 3]


def test_nested_pictures_and_other_files(tmp_path: Path) -> None:
    folders(tmp_path, "cat")
    (tmp_path / "cat" / "images").mkdir()
    (tmp_path / "cat" / "images" / "deep.png").write_bytes(b"x")
    (tmp_path / "cat" / "boxes.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    found = read_classes(tmp_path)
    assert len(found) == 3
    assert found.classes == ("cat",)


def test_splits(tmp_path: Path) -> None:
    folders(tmp_path / "train", "cat", "dog", files=3)
    folders(tmp_path / "val", "cat", "dog", files=1)
    (tmp_path / "classes.txt").write_text("cat house cat\ndog hot dog\n")
    found = read_classes(tmp_path)
    assert (found.split, len(found), found.classes) == ("val", 2, ("house cat", "hot dog"))
    assert len(read_classes(tmp_path, split="train")) == 6
    with pytest.raises(UsageError, match=r"no folder 'test'\. Its folders: train, val"):
        read_classes(tmp_path, split="test")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LOC_synset_mapping.txt", "\n".join(f"{k} {v}" for k, v in WNIDS.items())),
        ("words.txt", "\n".join(f"{k}\t{v}" for k, v in {**WNIDS, "n99999999": "other"}.items())),
        ("classnames.json", json.dumps(WNIDS)),
        ("imagenet_class_index.json", json.dumps({str(i): [k, v] for i, (k, v) in enumerate(WNIDS.items())})),
        ("classes.txt", "\n".join(v.split(",")[0] for v in WNIDS.values())),
        ("classes.json", json.dumps({k: v.split(", ") for k, v in WNIDS.items()})),
    ],
)
def test_wordnet_folders_with_each_kind_of_names(tmp_path: Path, name: str, content: str) -> None:
    folders(tmp_path, *WNIDS)
    with pytest.raises(UsageError, match=r"WordNet ids \(n01440764.*classes\.txt"):
        read_classes(tmp_path)
    (tmp_path / name).write_text(content)
    assert read_classes(tmp_path).classes == ("tench", "Egyptian cat", "crane")


def test_names_given_by_the_caller(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b", "c")
    assert read_classes(tmp_path, names={"a": "x", "b": "y", "c": "z"}).classes == ("x", "y", "z")
    assert read_classes(tmp_path, names=["x", "y", "z"]).classes == ("x", "y", "z")
    chosen = read_classes(tmp_path, names=["c", "a"])
    assert chosen.classes == ("c", "a")
    assert [Path(name).parent.name for name in chosen.ids] == ["c", "c", "a", "a"]
    assert chosen.labels_N.tolist() == [0, 0, 1, 1]
    assert read_classes(tmp_path, names=["x", "x", "z"]).repeated == ("x",)
    with pytest.raises(UsageError, match="2 names for 3 classes"):
        read_classes(tmp_path, names=["x", "y"])
    with pytest.raises(UsageError, match="empty name to: b"):
        read_classes(tmp_path, names={"a": "x", "b": " ", "c": "z"})
    with pytest.raises(UsageError, match="names no class for 1 of 3: b"):
        read_classes(tmp_path, names={"a": "x", "q": "y", "c": "z"})
    with pytest.raises(UsageError, match="does not exist"):
        read_classes(tmp_path, names=tmp_path / "gone.txt")


def test_folder_names_that_are_parts_of_each_other(tmp_path: Path) -> None:
    folders(tmp_path, "red", "red panda")
    (tmp_path / "classes.txt").write_text("red\nred panda\n")
    assert read_classes(tmp_path).classes == ("red", "red panda")


def test_folders_without_classes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty of classes"):
        read_classes(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="but 1 pictures"):
        read_classes(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UsageError, match="None of the 1 class folders"):
        read_classes(tmp_path)


def test_the_fingerprint_follows_files(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b")
    before = read_classes(tmp_path).fingerprint
    assert before == read_classes(tmp_path).fingerprint
    (tmp_path / "a" / "0.JPEG").write_bytes(b"changed")
    changed = read_classes(tmp_path).fingerprint
    (tmp_path / "a" / "1.JPEG").unlink()
    assert len({before, changed, read_classes(tmp_path).fingerprint}) == 3


def test_a_sample_takes_from_everywhere(tmp_path: Path) -> None:
    folders(tmp_path, *(f"c{i}" for i in range(10)), files=20)
    found = read_classes(tmp_path)
    rows = found.sample(60)
    assert rows == sorted(set(rows)) == found.sample(60)
    assert len(rows) == 60
    assert len(set(found.labels_N[rows].tolist())) == 10
    assert found.sample(None) == found.sample(1000) == list(range(200))


def parquet(path: Path, metadata: dict | None = None, **columns: list) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def test_a_table_with_names(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", image=[b"1", b"2", b"3"], name=["dog", "cat", "dog"])
    found = read_classes(path)
    assert found.classes == ("cat", "dog")
    assert found.labels_N.tolist() == [1, 0, 1]
    assert [(i, name, media) for i, name, media in found.stream([0, 2])] == [
        (0, "t.parquet:1", b"1"),
        (2, "t.parquet:3", b"3"),
    ]


def test_a_table_with_numbers(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", image=[b"1", b"2", b"3"], label=[10, 0, 2])
    with pytest.raises(UsageError, match="class numbers, not names"):
        read_classes(path)
    names = [f"class {i}" for i in range(11)]
    found = read_classes(path, names=names)
    assert found.classes == tuple(names)
    assert found.labels_N.tolist() == [10, 0, 2]
    with pytest.raises(UsageError, match="has 3 names, but there is a class number 10"):
        read_classes(path, names=["a", "b", "c"])
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    path = parquet(
        tmp_path / "hf.parquet",
        {"huggingface": json.dumps(features)},
        image=[{"bytes": b"1", "path": None}],
        label=[3],
    )
    found = read_classes(path)
    assert (found.classes, found.labels_N.tolist()) == (tuple(names), [3])
    assert next(iter(found.stream()))[2] == b"1"


def test_a_csv_with_paths_a_split_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("path,class,split\na.jpg,cat,val\nb.jpg,dog,train\nc.jpg,,val\n,cat,val\nbroken\n")
    found = read_classes(path, split="val")
    assert found.classes == ("cat",)
    assert [name for name, _ in found.skipped] == ["t.csv:3", "t.csv:5"]
    skipped: list[tuple[str, str]] = []
    media = [m for _, _, m in found.stream(on_skip=lambda where, why: skipped.append((where, why)))]
    assert media == [Clip(tmp_path / "a.jpg")]
    assert skipped == [("t.csv:4", "it names no picture or video")]
    with pytest.raises(
        UsageError, match=r"no row with a class of the split 'test' \(there are: val, train\)"
    ):
        read_classes(path, split="test")
    with pytest.raises(UsageError, match="no column 'kind'"):
        read_classes(path, label_column="kind")


def test_names_choose_among_the_classes_of_a_table(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", image=[b"1", b"2", b"3"], name=["dog", "cat", "cow"])
    found = read_classes(path, names=["cow", "dog"])
    assert found.classes == ("cow", "dog")
    assert found.labels_N.tolist() == [1, 0]
    assert [m for _, _, m in found.stream()] == [b"1", b"3"]
    assert found.skipped == (("t.parquet:2", "its class 'cat' is not among those named"),)


def test_real_tables(shared_dir: Path) -> None:
    found = read_classes(shared_dir / "data" / "tiny_imagenet_val.parquet")
    assert (len(found), len(found.classes)) == (10_000, 200)
    found = read_classes(shared_dir / "data" / "cifar10_test.parquet")
    assert "airplane" in found.classes
    assert len(found.classes) == 10
