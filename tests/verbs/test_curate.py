"""A curation run from files to files: exact, the same for any cut, resumable, clear about bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moviola.data.hashing import hash_strings
from moviola.data.matching import Matcher
from moviola.data.pairs import OutputError, PairError
from moviola.systems.curation import metaclip
from moviola.types import MoviolaError, UsageError
from moviola.verbs.curate import count_pool, curate
from moviola.verbs.curate_plan import plan

WORDS = [f"w{n}" for n in range(120)]
METADATA = [*WORDS[:70], "w0 w1", "w3 w2", "never seen"]
THRESHOLD = 60


def pool(rows=3000, seed=0):
    """Zipf words; every tenth text holds no entry."""
    generator = np.random.default_rng(seed)
    chance = 1 / np.arange(1, len(WORDS) + 1)
    draws = generator.choice(WORDS, (rows, 4), p=chance / chance.sum())
    texts = [" ".join(d) if n % 10 else "nothing of it" for n, d in enumerate(draws)]
    return pa.table({"id": [f"p{n}" for n in range(rows)], "caption": texts, "score": generator.random(rows)})


def parts_of(table, folder, parts, **options):
    folder.mkdir()
    cuts = np.linspace(0, table.num_rows, parts + 1).astype(int)
    for n, (start, stop) in enumerate(pairwise(cuts)):
        pq.write_table(table.slice(start, stop - start), folder / f"part{n}.parquet", **options)
    return folder


def kept(folder):
    """Every kept row of a run, by id."""
    files = sorted((folder / "pairs").rglob("*.parquet"))
    return pa.concat_tables([pq.read_table(f) for f in files]).sort_by("id").combine_chunks()


def expected(table, threshold=THRESHOLD, seed=0):
    """The same set from the method's functions, in memory."""
    found = Matcher(METADATA)(table["caption"])
    prob_E = metaclip.probabilities(metaclip.count(found, len(METADATA)), threshold)
    chance = metaclip.keep_probability(found, prob_E)
    stays = metaclip.keep(chance, hash_strings(table["id"].combine_chunks()), seed=seed)
    lists = found.to_arrow().filter(pa.array(stays))
    rows = table.filter(pa.array(stays)).append_column("matched_entries", lists)
    return rows.append_column("keep_probability", pa.array(chance[stays])).sort_by("id").combine_chunks()


def test_the_set_is_the_methods_for_any_cut_and_workers(tmp_path):
    table = pool()
    wanted = expected(table)
    assert 0.3 < wanted.num_rows / table.num_rows < 0.85
    for parts, workers, piece_rows in ((1, 1, 10**6), (2, 2, 500), (7, 1, 200)):
        folder = parts_of(table, tmp_path / f"in{parts}", parts, row_group_size=250)
        made = curate(
            folder, metadata=METADATA, to=tmp_path / f"out{parts}", threshold=THRESHOLD,
            workers=workers, piece_rows=piece_rows,
        )  # fmt: skip
        assert kept(made.folder).equals(wanted), parts
        assert not (tmp_path / f"out{parts}.partial").exists()
    counts = pq.read_table(tmp_path / "out1" / "counts.parquet")
    found = Matcher(METADATA)(table["caption"])
    np.testing.assert_array_equal(counts["count"], metaclip.count(found, len(METADATA)))
    assert counts["kept"][0].as_py() == sum(0 in e for e in wanted["matched_entries"].to_pylist())
    report = json.loads((tmp_path / "out1" / "report.json").read_text())
    assert (tmp_path / "out1" / "report.html").stat().st_size > 2000
    assert str(wanted.num_rows) in json.dumps(report)


@pytest.mark.slow
def test_daft_gives_the_same_bytes(tmp_path):
    pytest.importorskip("daft")
    folder = parts_of(pool(), tmp_path / "in", 3)
    for name in ("local", "daft"):
        curate(folder, metadata=METADATA, to=tmp_path / name, threshold=THRESHOLD, engine=name)
    for file in sorted((tmp_path / "local" / "pairs").iterdir()):
        assert file.read_bytes() == (tmp_path / "daft" / "pairs" / file.name).read_bytes()


def test_text_formats_keep_their_own_form(tmp_path):
    table = pool(400)
    folder = tmp_path / "in"
    folder.mkdir()
    rows = table.to_pylist()
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:200]))
    (folder / "b.csv").write_text("id,caption\n" + "".join(f"{r['id']},{r['caption']}\n" for r in rows[200:]))
    made = curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=THRESHOLD)
    wanted = {r["id"]: r["matched_entries"] for r in expected(table).to_pylist()}
    lines = [json.loads(line) for line in (made.folder / "pairs" / "a.jsonl").read_text().splitlines()]
    got = {line["id"]: line["matched_entries"] for line in lines}
    header, *cells = (made.folder / "pairs" / "b.csv").read_text().splitlines()
    assert header == "id,caption,matched_entries,keep_probability"
    assert {line["id"] for line in lines} | {c.partition(",")[0] for c in cells} == set(wanted)
    assert all(wanted[name] == entries for name, entries in got.items())


def test_duplicate_ids_stay_once_and_do_not_count(tmp_path):
    table = pool(500)
    doubled = pa.concat_tables([table, table.slice(0, 200)])
    made = curate(
        parts_of(doubled, tmp_path / "in", 3), metadata=METADATA, to=tmp_path / "out", threshold=THRESHOLD
    )
    assert kept(made.folder).equals(expected(table))


def test_several_texts_a_row(tmp_path):
    rows = {
        "id": [f"r{n}" for n in range(300)],
        "texts": [["w0", "nothing", f"w{n % 60} w1"][: 1 + n % 3] for n in range(300)],
    }
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table(rows), folder / "t.parquet")
    one = kept(curate(folder, metadata=METADATA, to=tmp_path / "one", threshold=20).folder)
    everything = kept(
        curate(folder, metadata=METADATA, to=tmp_path / "all", threshold=20, texts="all").folder
    )
    assert {len(k) for k in one["kept_texts"].to_pylist()} == {1}
    assert max(len(k) for k in everything["kept_texts"].to_pylist()) == 2
    for made in (one, everything):
        assert len(set(made["id"].to_pylist())) == made.num_rows
        for row in made.to_pylist():
            texts = [row["texts"][k] for k in row["kept_texts"]]
            assert "nothing" not in texts
            matched = {METADATA[e] for e in row["matched_entries"]}
            assert matched == {w for t in texts for w in [*t.split(), t] if w in METADATA}


def test_each_language_by_its_own_list(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "en.txt").write_text("dog\nred\n")
    (lists / "zh.txt").write_text("犬\n红\n")
    rows = [("red dog", "en"), ("a dog", "en-US"), ("红犬", "zh"), ("红", "ZH"), ("dog", "fr"), ("犬", "en")]
    table = pa.table(
        {
            "id": [str(n) for n in range(120)],
            "text": [rows[n % 6][0] for n in range(120)],
            "language": [rows[n % 6][1] for n in range(120)],
        }
    )
    made = curate(parts_of(table, tmp_path / "in", 2), metadata=lists, to=tmp_path / "out", threshold=30)
    counts = pq.read_table(made.folder / "counts.parquet").to_pydict()
    assert counts["language"] == ["en", "en", "zh", "zh"]
    assert counts["count"] == [40, 20, 20, 40]
    # English's tail share at 30 is a third; the Chinese threshold with that share is 20
    assert counts["probability"] == [0.75, 1, 1, 0.5]
    assert set(kept(made.folder)["language"].to_pylist()) <= {"en", "en-US", "zh", "ZH"}


def test_counts_of_another_pool(tmp_path):
    folder = parts_of(pool(), tmp_path / "in", 2)
    counted = count_pool(folder, metadata=METADATA, to=tmp_path / "counts")
    assert not (counted.folder / "pairs").exists()
    direct = curate(folder, metadata=METADATA, to=tmp_path / "direct", threshold=THRESHOLD)
    given = curate(
        folder,
        metadata=METADATA,
        to=tmp_path / "given",
        threshold=THRESHOLD,
        counts=counted.folder / "counts.parquet",
    )
    assert kept(given.folder).equals(kept(direct.folder))
    with pytest.raises(UsageError, match="other metadata"):
        curate(folder, metadata=METADATA[1:], to=tmp_path / "x", counts=counted.folder / "counts.parquet")


def test_a_plan_tells_the_sizes_that_come_out(tmp_path):
    table = pool()
    folder = parts_of(table, tmp_path / "in", 2)
    counted = count_pool(folder, metadata=METADATA, to=tmp_path / "counts")
    rows = plan(counted.folder, thresholds=[10, THRESHOLD, 10**6])
    sizes = [expected(table, r.threshold).num_rows for r in rows]
    for row, size in zip(rows, sizes, strict=True):
        assert abs(row.size - size) <= 4 * row.error
        assert row.error < 3 * np.sqrt(size)
    assert rows[2].head_entries == 0
    assert rows[2].tail_share == 1
    assert [r.tail_share for r in rows] == sorted(r.tail_share for r in rows)
    usual = plan(counted.folder / "counts.parquet")
    assert usual[-1].head_entries == 0
    (counted.folder / "match_sample.parquet").unlink()
    with pytest.raises(UsageError, match=r"match_sample.parquet is missing"):
        plan(counted.folder)


RUN = """
import sys
from moviola.verbs.curate import curate
import tests.verbs.test_curate as t
if __name__ == "__main__":
    options = {"threshold": t.THRESHOLD, "workers": int(sys.argv[3]), "piece_rows": 250}
    curate(sys.argv[1], metadata=t.METADATA, to=sys.argv[2], **options)
"""


def killed_runs(tmp_path, kills, workers):
    """Start the run again and again, killing it at random moments; then let it end."""
    folder = parts_of(pool(8000), tmp_path / "in", 4, row_group_size=250)
    script = tmp_path / "run.py"
    script.write_text(RUN)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out"), str(workers)]
    generator, work = np.random.default_rng(1), tmp_path / "out.partial"

    def files():
        return sum(1 for f in work.rglob("*") if f.is_file()) if work.exists() else 0

    for _ in range(kills):
        target = files() + int(generator.integers(1, 8))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
        while process.poll() is None and files() < target:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.02))  # within a piece, not at its end
        assert process.poll() is None, "it ended before it was killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists()
    subprocess.run(command, env=environment, check=True)
    clean = curate(folder, metadata=METADATA, to=tmp_path / "clean", threshold=THRESHOLD, piece_rows=250)
    ours = {f.name: f.read_bytes() for f in (tmp_path / "out" / "pairs").iterdir()}
    assert ours == {f.name: f.read_bytes() for f in (clean.folder / "pairs").iterdir()}
    for name in ("counts.parquet", "match_sample.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (clean.folder / name).read_bytes()


def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    killed_runs(tmp_path, 3, 1)


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    killed_runs(tmp_path, 30, 2)


# ------------------------------------------------------------------------------------------ bad input


def test_a_corrupt_file_among_many(tmp_path):
    table = pool(900)
    folder = parts_of(table, tmp_path / "in", 3)
    broken = folder / "part1.parquet"
    broken.write_bytes(broken.read_bytes()[:-200])
    made = curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=10**6)
    assert len(made.failed) == 1
    assert "part1.parquet" in made.failed[0]
    assert kept(made.folder).num_rows == expected(table.slice(0, 300), 10**6).num_rows * 2
    with pytest.raises(MoviolaError, match=r"part1.parquet"):
        curate(folder, metadata=METADATA, to=tmp_path / "strict", strict=True)


def test_nothing_matched_says_why(tmp_path):
    folder = parts_of(pa.table({"text": ["DOG", "A CAT", None]}), tmp_path / "in", 1)
    with pytest.raises(UsageError, match=r"None of 2 texts .* null: 1.* match in lower case"):
        curate(folder, metadata=["Dog", "bird"], to=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))  # nothing half-written stays


def test_other_bad_input(tmp_path):
    folder = parts_of(pool(50), tmp_path / "in", 1)
    (tmp_path / "there").mkdir()
    for message, options in {
        "there exists already": {"to": tmp_path / "there"},
        "a threshold or a tail share, not both": {"threshold": 1, "tail_share": 0.1},
        "above 0, got 0": {"threshold": 0},
        "has no column 'words'": {"text_columns": ["words"]},
        "twice, first 'a'": {"metadata": ["a", "b", "a"]},
    }.items():
        with pytest.raises((UsageError, PairError), match=message):
            curate(folder, **({"metadata": METADATA, "to": tmp_path / "out"} | options))
    with pytest.raises(UsageError):
        curate(tmp_path / "nowhere", metadata=METADATA, to=tmp_path / "out")
    (tmp_path / "not_counts.parquet").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"no readable counts.parquet"):
        plan(tmp_path / "not_counts.parquet")


def test_an_unfinished_run_with_other_settings(tmp_path):
    folder = parts_of(pool(90), tmp_path / "in", 3)
    broken = folder / "part1.parquet"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-200])
    options = {"to": tmp_path / "out", "threshold": THRESHOLD, "strict": True}
    with pytest.raises(MoviolaError, match=r"part1.parquet"):
        curate(folder, metadata=METADATA, **options)
    with pytest.raises(UsageError, match=r"other settings \(metadata\)"):
        curate(folder, metadata=METADATA[:-1], **options)


def test_rows_without_an_id_are_drawn_by_their_place(tmp_path):
    table = pool(600).drop_columns(["id"])
    sizes = []
    for n, piece_rows in enumerate((10**6, 100)):
        folder = parts_of(table, tmp_path / f"in{n}", 2, row_group_size=50)
        made = curate(folder, metadata=METADATA, to=tmp_path / f"out{n}", threshold=20, piece_rows=piece_rows)
        files = sorted((made.folder / "pairs").iterdir())
        sizes.append(pa.concat_tables([pq.read_table(f) for f in files]).combine_chunks())
    assert sizes[0].equals(sizes[1])


def test_every_stage_comes_to_its_end_on_the_screen(tmp_path):
    last = {}
    curate(
        parts_of(pool(300), tmp_path / "in", 2), metadata=METADATA, to=tmp_path / "out", threshold=20,
        on_progress=lambda done, total, stage: last.update({stage: (done, total)}),
    )  # fmt: skip
    assert {"matching", "looking for duplicates", "counting", "writing"} <= set(last)
    assert all(done == total for done, total in last.values())


def test_a_corrupt_first_file_is_left_out_like_any_other(tmp_path):
    folder = parts_of(pool(600), tmp_path / "in", 2)
    (folder / "a.parquet").write_bytes(b"PAR1")
    made = curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=THRESHOLD)
    assert kept(made.folder).equals(expected(pool(600)))
    assert "a.parquet" in made.failed[0]
    with pytest.raises(PairError, match=r"a\.parquet"):
        curate(folder, metadata=METADATA, to=tmp_path / "strict", strict=True)


def test_an_output_among_the_pairs_is_refused(tmp_path):
    folder = parts_of(pool(60), tmp_path / "in", 1)
    for source in (folder, folder.parent, f"{folder}/**/*.parquet"):
        with pytest.raises(UsageError, match="lies among the pairs"):
            curate(source, metadata=METADATA, to=folder / "out")
    curate(f"{folder}/*.parquet", metadata=METADATA, to=folder / "out")  # this one never looks into it
    (folder / "left.partial").mkdir()
    (folder / "left.partial" / "x.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match="lies among the pairs"):
        curate(f"{folder}/*", metadata=METADATA, to=folder / "left")


def test_an_output_that_cannot_be_made(tmp_path):
    folder = parts_of(pool(60), tmp_path / "in", 1)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="link exists already"):
        curate(folder, metadata=METADATA, to=tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out could not be written \(Not a directory\)"):
        curate(folder, metadata=METADATA, to=tmp_path / "file" / "out")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no unfinished run"):
        curate(folder, metadata=METADATA, to=tmp_path / "mine")
    assert [f.name for f in (tmp_path / "mine.partial").iterdir()] == ["notes.txt"]


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path):
    folder = parts_of(pool(60), tmp_path / "in", 1)

    def appear(done, total, stage):
        if stage == "writing":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="out could not be written"):
        curate(folder, metadata=METADATA, to=tmp_path / "out", on_progress=appear)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("stage", ["matching", "drawing"])
def test_a_file_that_changes_meanwhile_stops_the_run(tmp_path, stage):
    """With as many rows as before, only its time and size can tell."""
    folder = parts_of(pool(300), tmp_path / "in", 2)

    def change(done, total, present):
        if (present, done) == (stage, total):
            table = pq.read_table(folder / "part1.parquet")
            pq.write_table(table.take(list(range(table.num_rows))[::-1]), folder / "part1.parquet")

    with pytest.raises(UsageError, match=r"part1\.parquet changed during the run"):
        curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=5, on_progress=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_set_that_was_curated_before_is_refused_at_once(tmp_path, ending):
    folder = parts_of(pool(60), tmp_path / "in", 1)
    rows = {"id": ["x"], "caption": ["w0"], "matched_entries": [[0]]}
    if ending == "parquet":
        pq.write_table(pa.table(rows), folder / "again.parquet")
    else:
        (folder / "again.jsonl").write_text(json.dumps({k: v[0] for k, v in rows.items()}) + "\n")
    made = curate(folder, metadata=METADATA, to=tmp_path / "out")
    assert "already has the column 'matched_entries'" in made.failed[0]
    with pytest.raises(PairError, match="already has the column 'matched_entries'"):
        curate(folder / f"again.{ending}", metadata=METADATA, to=tmp_path / "again")
    assert count_pool(folder, metadata=METADATA, to=tmp_path / "counted").failed == ()


def test_several_lists_need_a_language_column_and_english(tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, entry in (("zh", "犬"), ("other", "dog")):
        (lists / f"{name}.txt").write_text(f"{entry}\n")
    rows = {"id": ["1", "2"], "text": ["犬", "dog"], "language": ["zh", "fr"]}
    folder = parts_of(pa.table(rows), tmp_path / "in", 1)
    bare = parts_of(pa.table(rows).drop_columns(["language"]), tmp_path / "bare", 1)
    with pytest.raises(UsageError, match="lists has no list en"):
        curate(folder, metadata=lists, to=tmp_path / "out")
    (lists / "en.txt").write_text("zebra\n")
    with pytest.raises(UsageError, match="no column that names itself a language"):
        curate(bare, metadata=lists, to=tmp_path / "out")
    with pytest.raises(UsageError, match="No text holds an entry of the list en"):
        curate(folder, metadata=lists, to=tmp_path / "out")
    made = curate(folder, metadata=lists, to=tmp_path / "out", tail_share=0.5)  # what its hint says
    assert kept(made.folder).num_rows == 2


def test_another_threshold_goes_on_from_an_unfinished_run(tmp_path):
    folder = parts_of(pool(900), tmp_path / "in", 3)
    for stop in ("drawing", "writing"):

        def halt(done, total, stage, stop=stop):
            if stage == stop and done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=500, on_progress=halt)
    seen = set()
    made = curate(
        folder, metadata=METADATA, to=tmp_path / "out", threshold=THRESHOLD,
        on_progress=lambda done, total, stage: seen.add(stage),
    )  # fmt: skip
    assert kept(made.folder).equals(expected(pool(900)))
    assert "counting" not in seen
    clean = curate(folder, metadata=METADATA, to=tmp_path / "clean", threshold=THRESHOLD)
    for file in (clean.folder / "pairs").iterdir():
        assert file.read_bytes() == (made.folder / "pairs" / file.name).read_bytes()
    assert (clean.folder / "counts.parquet").read_bytes() == (made.folder / "counts.parquet").read_bytes()


def test_a_run_beside_another_is_told_so_whatever_its_settings(tmp_path):
    folder = parts_of(pool(90), tmp_path / "in", 1)
    told = []

    def second(done, total, stage):
        if stage == "matching":
            with pytest.raises(UsageError, match="Another run is writing") as error:
                curate(folder, metadata=METADATA, to=tmp_path / "out", seed=7)
            told.append(error)

    curate(folder, metadata=METADATA, to=tmp_path / "out", on_progress=second)
    assert told


def test_counts_may_be_named_by_their_folder(tmp_path):
    folder = parts_of(pool(300), tmp_path / "in", 1)
    counted = count_pool(folder, metadata=METADATA, to=tmp_path / "counts").folder
    given = curate(folder, metadata=METADATA, to=tmp_path / "out", threshold=20, counts=counted)
    assert kept(given.folder).equals(expected(pool(300), 20))
    for missing in (tmp_path / "nowhere", folder):
        with pytest.raises(UsageError, match="does not exist"):
            plan(missing)


def test_runs_of_one_process_into_one_folder_do_not_mix(tmp_path):
    """What a worker keeps open for the next piece must not reach the next run."""
    folder = parts_of(pool(300), tmp_path / "in", 2)
    runs = [(METADATA, 20), (METADATA, 5), (METADATA[::-1], 5)]

    def made(metadata, threshold, name):
        out = curate(folder, metadata=metadata, to=tmp_path / name, threshold=threshold).folder
        return kept(out), pq.read_table(out / "counts.parquet")

    wanted = [made(*run, f"out{n}") for n, run in enumerate(runs)]
    for run, both in zip(runs, wanted, strict=True):  # one after the other, nothing in between
        assert made(*run, "out") == both
        shutil.rmtree(tmp_path / "out")


def test_names_that_are_no_utf8_are_refused_before_the_work(tmp_path):
    folder = parts_of(pool(30), tmp_path / "in", 1)
    with pytest.raises(UsageError, match="is not UTF-8"):
        curate(folder, metadata=METADATA, to=tmp_path / os.fsdecode(b"o\xff"))
    (folder / "part0.parquet").rename(folder / os.fsdecode(b"p\xff.parquet"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        curate(folder, metadata=METADATA, to=tmp_path / "out")
    assert not list(tmp_path.glob("o*"))
