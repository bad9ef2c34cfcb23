"""Rows by number: every kind of file, the order of an epoch, the fingerprint."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moviola.data.pairs import PairError
from moviola.data.rows import RowSource, Window, open_rows
from moviola.data.rows.parquet import ParquetShard
from moviola.types import UsageError
from tests.data.rows import made


def read(source: RowSource, name: str, rows: list[int] | None = None) -> list[object]:
    asked = np.arange(len(source)) if rows is None else np.array(rows)
    return source.read(asked, [name])[name].to_pylist()


def picture_folder(folder: Path, count: int = 6) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(made.encoded(made.picture(i)))
    return folder


class TestFormats:
    def test_parquet_with_bytes(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 10, row_group=3)])
        assert len(source) == 10
        assert source.columns == ("image", "caption")
        assert read(source, "caption", [7, 0, 7]) == [
            "picture number 7",
            "picture number 0",
            "picture number 7",
        ]
        assert read(source, "image", [4]) == [{"bytes": made.encoded(made.picture(4)), "path": None}]

    def test_parquet_with_structs_and_paths(self, tmp_path: Path) -> None:
        picture_folder(tmp_path / "pics")
        data = made.encoded(made.picture(9))
        cells = [{"bytes": data, "path": "a.png"}, {"bytes": None, "path": "pics/1.png"}, None]
        pq.write_table(pa.table({"image": cells, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
        found = read(open_rows([tmp_path / "a.parquet"]), "image")
        assert found[0] == {"bytes": data, "path": None}
        assert found[1] == {"bytes": None, "path": str(tmp_path / "pics/1.png")}
        assert found[2] == {"bytes": None, "path": None}

    @pytest.mark.parametrize(("ending", "mark"), [(".csv", ","), (".tsv", "\t")])
    def test_text_tables(self, tmp_path: Path, ending: str, mark: str) -> None:
        table = tmp_path / f"a{ending}"
        lines = ["filename", '"two\nlines, and ""quotes"""', "x"], ["f.png", "one", "y"], ["g.png", "", "z"]
        text = "\r\n".join(
            mark.join(line) for line in (["filename", "title", "n"], *lines[:1], [], *lines[1:])
        )
        table.write_bytes(b"\xef\xbb\xbf" + text.encode())
        source = open_rows([table])
        assert len(source) == 3
        assert read(source, "title", [1, 0, 2]) == ["one", 'two\nlines, and "quotes"', None]
        assert read(source, "n") == ["x", "y", "z"]
        assert read(source, "image", [1]) == [{"bytes": None, "path": str(tmp_path / "f.png")}]
        assert source.captions == ("title",)

    def test_a_csv_row_with_a_cell_too_many_gives_nulls(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("path,text\na.png,one\nb.png,two,three\nc.png,four\n")
        assert read(open_rows([tmp_path / "a.csv"]), "text") == ["one", None, "four"]

    def test_json_lines(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [
            {"path": f"{i}.png", "captions": [f"a{i}", f"b{i}"]} for i in range(5)
        ]
        made.jsonl(tmp_path / "a.jsonl", rows)
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('not json\n\n{"path": "z.png", "captions": "one only"}\n')
        source = open_rows([tmp_path / "a.jsonl"])
        assert len(source) == 7
        assert read(source, "captions", [4, 5, 6]) == [["a4", "b4"], None, ["one only"]]

    def test_long_tables_are_indexed_over_several_chunks(self, tmp_path: Path) -> None:
        many = 120_000
        with (tmp_path / "a.csv").open("w") as file:
            file.write("path,caption\n")
            file.writelines(f'p{i}.png,"caption, number {i} {"x" * (i % 50)}"\n' for i in range(many))
        assert (tmp_path / "a.csv").stat().st_size > 4 << 20
        source = open_rows([tmp_path / "a.csv"])
        assert len(source) == many
        rows = [0, 65_000, many - 1, 1]
        assert read(source, "caption", rows) == [f"caption, number {i} {'x' * (i % 50)}" for i in rows]

    def test_webdataset(self, tmp_path: Path) -> None:
        data = made.pictures(4)
        samples = [
            {"jpg": data[0], "txt": b"zero", "json": b'{"lang": "en", "caption": "json zero"}'},
            {"PNG": data[1], "txt": b"one"},
            {"txt": b"no picture"},
            {"json": b"{broken", "jpg": data[3], "txt": b"three"},
        ]
        source = open_rows([made.tar(tmp_path / "a.tar", samples)])
        assert len(source) == 4
        assert read(source, "txt", [3, 0, 1]) == ["three", "zero", "one"]
        assert read(source, "json.lang") == ["en", None, None, None]
        assert read(source, "__key__", [2]) == ["00002"]
        found = [cell["bytes"] for cell in read(source, "image")]  # type: ignore[index]
        assert found == [data[0], data[1], None, data[3]]
        assert source.captions == ("txt", "json.caption")

    def test_folder_with_captions_beside_pictures(self, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "pics" / "deep").parent
        (folder / "deep/0.txt").write_text("zero\n\nagain zero\n")
        (folder / "deep/1.json").write_text(json.dumps({"caption": "one", "source": "web"}))
        (folder / "deep/2.json").write_text(json.dumps(["two", "zwei"]))
        (folder / "deep/3.json").write_text("{")
        source = open_rows([folder])
        assert read(source, "caption") == [["zero", "again zero"], ["one"], ["two", "zwei"], None, None, None]
        assert read(source, "source", [1, 2]) == ["web", None]
        assert read(source, "id", [5]) == ["deep/5.png"]
        assert read(source, "image", [5]) == [{"bytes": None, "path": str(folder / "deep/5.png")}]

    def test_folder_per_class(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for name in ("red_fox", "owl"):
                picture_folder(tmp_path / "set" / split / name, 2)
        source = open_rows([tmp_path / "set"])
        assert len(source) == 4
        assert read(source, "class") == ["owl", "owl", "red fox", "red fox"]
        assert read(source, "caption", [3]) == ["a photo of a red fox."]
        assert "train" in str(read(source, "image", [0]))

    def test_folder_of_wordnet_ids_needs_names(self, tmp_path: Path) -> None:
        picture_folder(tmp_path / "set" / "n01440764")
        with pytest.raises(UsageError, match=r"n01440764.*captions"):
            open_rows([tmp_path / "set"])

    def test_all_kinds_together(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 3)
        made.jsonl(tmp_path / "b.jsonl", [{"path": "pics/1.png", "text": ["x", "y"], "caption": ["j"]}])
        picture_folder(tmp_path / "pics", 2)
        (tmp_path / "pics/0.txt").write_text("beside")
        made.tar(tmp_path / "c.tar", [{"png": made.encoded(made.picture(5)), "txt": b"tar"}])
        source = open_rows(
            [tmp_path / "pics", f"{tmp_path}/*.parquet", tmp_path / "b.jsonl", tmp_path / "c.tar"]
        )
        assert len(source) == 3 + 1 + 1 + 2
        texts = read(source, "caption", [5, 2, 3, 4])
        assert texts == [["beside"], ["picture number 2"], ["j"], None]
        assert read(source, "txt", [4, 0]) == ["tar", None]
        assert all(c["bytes"] or c["path"] for c in read(source, "image"))  # type: ignore[index]
        assert source.where(3) == "b.jsonl:1"
        assert source.where(6) == "pics:2"

    def test_columns_are_renamed(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 3, photo_bytes=made.pictures(3), mine=["a", "b", "c"])
        source = open_rows([tmp_path / "a.parquet"], columns={"image": "photo_bytes", "text": "mine"})
        assert read(source, "text") == ["a", "b", "c"]
        assert source.captions[0] == "text"
        assert "mine" not in source.columns
        with pytest.raises(UsageError, match=r"'nothing'.*'text'.*photo_bytes"):
            open_rows([tmp_path / "a.parquet"], columns={"text": "nothing"})


class TestPaths:
    def test_nothing_outside_the_root_is_read(self, tmp_path: Path) -> None:
        inside = tmp_path / "in"
        inside.mkdir()
        paths = ["../secret.png", "a/../../b.png", "/etc/passwd", "http://x/y.png", "a/../b.png", "", "x\0y"]
        pq.write_table(pa.table({"path": paths, "text": ["t"] * len(paths)}), inside / "a.parquet")
        found = [cell["path"] for cell in read(open_rows([inside / "a.parquet"]), "image")]  # type: ignore[index]
        assert [p is None or p.startswith("\0") for p in found] == [True, True, True, True, False, True, True]
        assert found[4] == str(inside / "b.png")
        wide = open_rows([inside / "a.parquet"], root=tmp_path)
        assert read(wide, "image", [4]) == [{"bytes": None, "path": str(tmp_path / "b.png")}]

    def test_absolute_paths_are_for_lists_of_ones_own(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("path,text\n/data/x.png,one\n/data/../x.png,two\n")
        found = [cell["path"] for cell in read(open_rows([tmp_path / "a.csv"]), "image")]  # type: ignore[index]
        assert found[0] == "/data/x.png"
        assert found[1].startswith("\0")


class TestBadInput:
    def test_what_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="does not exist"):
            open_rows([tmp_path / "no.parquet"])
        with pytest.raises(UsageError, match="no data"):
            open_rows([])
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="holds no pair files"):
            open_rows([tmp_path / "empty"])
        made.parquet(
            tmp_path / "a.parquet", 0, image=pa.array([], pa.binary()), caption=pa.array([], pa.string())
        )
        with pytest.raises(UsageError, match="holds no rows"):
            open_rows([tmp_path / "a.parquet"])

    def test_compressed_tables(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"path,text\na,b\n"))
        with pytest.raises(UsageError, match=r"compressed.*[Uu]npack"):
            open_rows([tmp_path / "a.csv.gz"])

    def test_cut_files(self, tmp_path: Path) -> None:
        path = made.parquet(tmp_path / "a.parquet", 30, row_group=10)
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        with pytest.raises(PairError, match="damaged"):
            open_rows([path])
        path.write_bytes(whole[:4] + bytes(200) + whole[204:])
        with pytest.raises(PairError, match="damaged"):
            read(open_rows([path]), "image")
        place = made.tar(tmp_path / "a.tar", [{"png": made.encoded(made.picture(1)), "txt": b"x"}] * 3)
        place.write_bytes(place.read_bytes()[:1500])
        with pytest.raises(PairError, match="damaged"):
            open_rows([place])

    def test_unknown_columns_and_rows(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 3)])
        with pytest.raises(UsageError, match=r"'nothing'.*'caption'"):
            source.read(np.array([0]), ["nothing"])
        with pytest.raises(UsageError, match="0 to 2"):
            source.read(np.array([3]), ["caption"])

    def test_columns_that_do_not_go_together(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 2, caption=[1, 2])
        made.parquet(tmp_path / "b.parquet", 2)
        with pytest.raises(UsageError, match=r"'caption'.*int64.*string"):
            read(open_rows([tmp_path]), "caption")

    def test_pictures_of_no_known_kind(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 2, image=[[1, 2], [3]])
        with pytest.raises(UsageError, match=r"'image'.*list<"):
            read(open_rows([tmp_path / "a.parquet"]), "image")


class TestOrder:
    def test_is_a_permutation_of_its_own_in_each_epoch(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 50, row_group=7)])
        orders = [source.order(3, epoch) for epoch in range(3)]
        for order in orders:
            assert sorted(order.tolist()) == list(range(50))
        assert not (orders[0] == orders[1]).all()
        assert (source.order(3, 1) == orders[1]).all()
        assert not (source.order(4, 1) == orders[1]).all()

    @settings(max_examples=15, deadline=None)
    @example(count=18, row_group=12, budget=18968, size=7, drop=0)
    @given(
        count=st.integers(1, 60),
        row_group=st.integers(1, 20),
        budget=st.integers(1, 60_000),
        size=st.integers(1, 17),
        drop=st.integers(0, 10),
    )
    def test_every_block_is_read_once_an_epoch(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        count: int,
        row_group: int,
        budget: int,
        size: int,
        drop: int,
    ) -> None:
        folder = tmp_path_factory.mktemp("rows")
        made.parquet(folder / "a.parquet", count, row_group=row_group)
        source = open_rows([folder], window=Window(bytes=budget))
        if drop and drop < count:
            source = source.subset(np.setdiff1d(np.arange(count), np.arange(drop)))
        order = source.order(0, 0)
        assert sorted(order.tolist()) == list(range(len(source)))
        loads: list[int] = []
        shard = source._shards[0]
        whole = shard.block

        def counted(number: int, columns: list[str]) -> pa.Table:
            loads.append(number)
            return whole(number, columns)

        shard.block = counted  # type: ignore[method-assign]
        want = read(source, "caption")
        loads.clear()
        source._cache.clear()
        seen: list[object] = []
        for start in range(0, len(order), size):
            seen += read(source, "caption", order[start : start + size].tolist())
        assert seen == [want[i] for i in order.tolist()]
        assert len(loads) == len(set(loads))
        held = sum(int(source._bytes_K[k]) for k in source._cache)
        assert held <= max(budget, int(source._bytes_K.max()))

    def test_a_row_group_beyond_the_window_is_read_in_stretches(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 60)
        source = open_rows([tmp_path], window=Window(bytes=20_000))
        shard = source._shards[0]
        assert isinstance(shard, ParquetShard)
        assert len(shard.start_K) > 8
        assert set(shard.group_K.tolist()) == {0}
        order = source.order(1, 0)
        assert (order != np.arange(60)).any()
        assert read(source, "caption", order.tolist()) == [f"picture number {i}" for i in order]
        assert read(source, "caption", [59, 0, 30, 3]) == [f"picture number {i}" for i in (59, 0, 30, 3)]

    def test_folders_and_texts_are_shuffled_freely(self, tmp_path: Path) -> None:
        made.jsonl(tmp_path / "a.jsonl", [{"path": "a.png", "text": str(i)} for i in range(20_000)])
        order = open_rows([tmp_path / "a.jsonl"], window=Window(bytes=1, rows=10)).order(0, 0)
        assert np.abs(np.diff(order)).mean() > 5000  # a third of all, were it uniform

    def test_row_windows(self, tmp_path: Path) -> None:
        made.parquet(tmp_path / "a.parquet", 40, row_group=4)
        order = open_rows([tmp_path], window=Window(rows=8)).order(0, 0)
        for start in range(0, 40, 8):
            assert len(set((order[start : start + 8] // 4).tolist())) == 2


class TestViews:
    def test_subset(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 20, row_group=5)])
        part = source.subset(np.array([17, 3, 8]))
        assert len(part) == 3
        assert read(part, "caption", [2, 0]) == ["picture number 17", "picture number 3"]
        assert part.where(1) == "a.parquet:9"
        again = part.subset(np.array([1, 2]))
        assert read(again, "caption") == ["picture number 8", "picture number 17"]
        assert len({source.fingerprint, part.fingerprint, again.fingerprint}) == 3
        assert part.near(1) == (1, 2)

    def test_pickle_holds_no_open_file(self, tmp_path: Path) -> None:
        source = open_rows([made.parquet(tmp_path / "a.parquet", 20, row_group=5)], window=Window(bytes=9000))
        before = read(source, "image")
        assert source._cache
        data = pickle.dumps(source)
        assert len(data) < 5000
        assert read(pickle.loads(data), "image") == before  # noqa: S301 (our own bytes)


class TestFingerprint:
    def test_follows_the_content_not_the_place(self, tmp_path: Path) -> None:
        first = made.parquet(tmp_path / "a.parquet", 10)
        (tmp_path / "other").mkdir()
        copy = tmp_path / "other" / "a.parquet"
        copy.write_bytes(first.read_bytes())
        base = open_rows([first]).fingerprint
        assert len(base) == 16
        assert int(base, 16) >= 0
        assert open_rows([copy]).fingerprint == base
        assert open_rows([copy], columns={"text": "caption"}).fingerprint != base
        made.parquet(copy, 10, caption=[*made.captions(9), "picture number X"])
        assert open_rows([copy]).fingerprint != base

    def test_a_long_file_is_looked_at_in_spots(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("path,text\n" + "a.png,abcdefg\n" * 500_000)
        base = open_rows([path]).fingerprint
        data = bytearray(path.read_bytes())
        for place in (20, len(data) - 3):
            changed = bytearray(data)
            changed[place] = ord("Z")
            path.write_bytes(changed)
            assert open_rows([path]).fingerprint != base

    def test_pictures_and_captions_of_a_folder_count(self, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "pics")
        (folder / "0.txt").write_text("zero")
        seen = [open_rows([folder]).fingerprint]
        (folder / "0.txt").write_text("null")
        seen.append(open_rows([folder]).fingerprint)
        (folder / "3.png").write_bytes(made.encoded(made.picture(77)))
        seen.append(open_rows([folder]).fingerprint)
        (folder / "5.png").unlink()
        seen.append(open_rows([folder]).fingerprint)
        assert len(set(seen)) == 4
