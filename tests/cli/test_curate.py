"""`moviola curate` as people run it: what it prints, its exit status, its messages, its progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from moviola.cli import main, show

WORDS = ["cat", "dog", "red car", "axolotl", "harpsichord"]
FREQUENT = [f"a cat and a dog, number {n}" for n in range(120)]
RARE = ["an axolotl in a tank", "a red car and a cat"]
NOTHING = [f"IMG_{n}.JPG" for n in range(18)]


@pytest.fixture
def pool(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    texts = FREQUENT + RARE + NOTHING
    table = pa.table({"url": [f"p{n}" for n in range(len(texts))], "caption": texts})
    pq.write_table(table.slice(0, 70), folder / "a.parquet")
    pq.write_table(table.slice(70), folder / "b.parquet")
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def moviola(monkeypatch, capsys, tmp_path):
    """Run the command in this process: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moviola", "curate", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = capsys.readouterr()
        return stopped.value.code or 0, told.out, told.err

    return run


def kept_rows(folder):
    return pq.read_table(folder / "pairs").sort_by("url").to_pylist()


def test_run_prints_a_summary_and_leaves_the_folder(moviola, pool, tmp_path):
    status, out, err = moviola(
        "run", pool, "--metadata", "words.txt", "--to", "set", "--threshold", 10, "--workers", 1, "--seed", 3
    )
    assert (status, err) == (0, "")
    assert "140 rows came" in out
    assert "less 18 text holds no entry" in out
    assert "4 of 5 entries matched" in out
    assert "Threshold 10: 2 entries are thinned" in out
    assert "Report: set/report.html" in out
    rows = kept_rows(tmp_path / "set")
    assert set(RARE) <= {row["caption"] for row in rows}
    assert 2 < len(rows) < 60  # about 19 of 120 frequent ones
    assert f"{len(rows)} rows stay" in out
    assert "harpsichord" in (tmp_path / "set" / "report.html").read_text()


def test_run_with_json_prints_the_report(moviola, pool, tmp_path):
    status, out, err = moviola(
        "run", pool / "*.parquet", "--metadata", "words.txt", "--to", "set",
        "--tail-share", 0.01, "--seed", 5, "--workers", 1, "--json",
    )  # fmt: skip
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told.pop("folder") == "set"
    assert told == json.loads((tmp_path / "set" / "report.json").read_text())
    assert told["kept"]["rows"] == len(kept_rows(tmp_path / "set"))
    assert told["seed"] == 5
    assert told["config"]["tail_share"] == 0.01


def test_columns_and_texts_are_passed_on(moviola, pool, tmp_path):
    table = pa.table({"key": ["x", "x", "y"], "alt": ["a cat", "a dog", "-"], "title": ["an axolotl"] * 3})
    pq.write_table(table, tmp_path / "two.parquet")
    status, out, _ = moviola(
        "run", "two.parquet", "--metadata", "words.txt", "--to", "set", "--texts", "all", "--workers", 1,
        "--text-column", "alt", "--text-column", "title", "--id-column", "key", "--json",
    )  # fmt: skip
    assert status == 0
    told = json.loads(out)
    assert told["input"]["columns"] == [{"texts": ["alt", "title"], "id": "key", "language": None}]
    assert told["input"]["duplicates"] == 2  # both texts of the second x
    assert told["kept"]["rows"] == 2
    assert told["funnel"]["unit"] == "texts"


def test_count_then_plan_then_run_by_these_counts(moviola, pool, tmp_path):
    status, out, _ = moviola("count", pool, "--metadata", "words.txt", "--to", "counted", "--workers", 1)
    assert status == 0
    assert "rows stay" not in out
    assert not (tmp_path / "counted" / "pairs").exists()

    status, out, _ = moviola("plan", "counted")
    assert status == 0
    head, *rows = out.splitlines()
    assert head.split("  ")[0] == "threshold"
    assert rows[0].split()[0] == "1"
    assert rows[-1].split()[-2] == "122"  # every matched text stays
    assert len({len(row) for row in rows}) == 1  # figures stand under each other

    status, out, _ = moviola("plan", "counted/counts.parquet", "--threshold", 10, "--threshold", 30, "--json")
    assert status == 0
    planned = json.loads(out)
    assert [row["threshold"] for row in planned] == [10, 30]
    assert planned[0]["head_entries"] == 2
    chance = 1 - (1 - 10 / 121) * (1 - 10 / 120)  # cat stands in one text more than dog
    assert planned[0]["size"] == pytest.approx(2 + 120 * chance)

    status, out, _ = moviola(
        "run", pool, "--metadata", "words.txt", "--counts", "counted/counts.parquet", "--to", "set",
        "--threshold", 10, "--workers", 1, "--json",
    )  # fmt: skip
    assert status == 0
    told = json.loads(out)
    assert told["counts_given"]
    assert told["kept"]["expected"] == pytest.approx(planned[0]["size"])


def test_counts_of_another_pool_are_warned_about(moviola, pool, tmp_path):
    pq.write_table(pa.table({"url": ["q"], "caption": ["a dog"]}), tmp_path / "other.parquet")
    moviola("count", "other.parquet", "--metadata", "words.txt", "--to", "counted", "--workers", 1)
    status, out, _ = moviola(
        "run", pool, "--metadata", "words.txt", "--counts", "counted/counts.parquet", "--to", "set",
        "--threshold", 10, "--workers", 1,
    )  # fmt: skip
    assert status == 0
    assert "Note: 3 of the entries in this pool count 0" in out
    assert "cat, red car, axolotl" in out


def test_a_file_that_cannot_be_read_gives_status_1_or_stops_a_strict_run(moviola, pool):
    (pool / "broken.parquet").write_bytes(b"PAR1 cut off")
    options = ("--metadata", "words.txt", "--threshold", 10, "--workers", 1)
    status, out, err = moviola("run", pool, *options, "--to", "set")
    assert status == 1
    assert "140 rows came" in out
    assert "1 could not be read:" in err
    assert "broken.parquet" in err
    status, out, err = moviola("run", pool, *options, "--to", "strict", "--strict")
    assert status == 2
    assert "broken.parquet" in err
    status, out, err = moviola("count", pool, *options[:2], "--to", "counted", "--workers", 1, "--json")
    assert status == 1
    assert json.loads(out)["input"]["failed"] == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--threshold", "0"], "must be above 0"),
        (["--threshold", "-3"], "must be above 0"),
        (["--threshold", "nan"], "must be above 0"),
        (["--tail-share", "1.5"], "between 0 and 1"),
        (["--threshold", "5", "--tail-share", "0.1"], "not both"),
        (["--text-column", "capture"], "'capture'. Its columns: 'url', 'caption'"),
        (["--metadata", "none.txt"], "none.txt"),
        (["--counts", "none.parquet"], "none.parquet"),
        (["--address", "ray://head:10001"], "only for the engine 'ray'"),
    ],
)
def test_what_cannot_be_meant_gives_status_2_and_leaves_nothing(moviola, pool, tmp_path, options, problem):
    status, out, err = moviola(
        "run", pool, "--metadata", "words.txt", "--to", "set", "--workers", 1, *options
    )
    assert (status, out) == (2, "")
    assert err.startswith("moviola: ")
    assert problem in err
    assert not (tmp_path / "set").exists()


def test_an_output_that_exists_is_not_touched(moviola, pool, tmp_path):
    (tmp_path / "set").mkdir()
    status, _, err = moviola("run", pool, "--metadata", "words.txt", "--to", "set")
    assert status == 2
    assert "exists already" in err


def test_no_match_at_all_says_why(moviola, pool, tmp_path):
    (tmp_path / "upper.txt").write_text("CAT\nDOG\n")
    status, _, err = moviola("run", pool, "--metadata", "upper.txt", "--to", "set", "--workers", 1)
    assert status == 2
    assert "None of 140 texts holds any of 2 entries" in err


def test_ctrl_c_says_how_to_go_on(moviola, pool, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moviola.verbs.curate.curate", stopped)
    status, out, err = moviola("run", pool, "--metadata", "words.txt", "--to", "set")
    assert (status, out) == (130, "")
    assert "run the same command again to go on" in err


def test_plan_of_something_else(moviola, tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    status, _, err = moviola("plan", "x.parquet")
    assert status == 2
    assert "no table of counts" in err


def test_stages_have_a_bar_each_with_the_time_left(monkeypatch):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(show, "err", console)
    with show.stages(quiet=False) as on_progress:
        for done in range(1, 5):
            on_progress(done, 4, "matching")
        on_progress(1, 2, "drawing")
    text = written.getvalue()
    assert "matching" in text
    assert "4/4" in text
    assert "drawing" in text
    assert "1/2" in text
    with show.stages(quiet=True) as on_progress:
        assert on_progress is None


def test_the_command_is_there_and_its_help_is_cheap():
    """Both sub-commands hang on the command, and asking for help loads nothing heavy."""
    code = (
        "import sys; from moviola.cli.commands import app; "
        "print([m for m in ('torch', 'pyarrow', 'lancedb', 'numpy') if m in sys.modules], "
        "sorted(g.name for g in app.registered_groups))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("[]")
    assert "'curate'" in told.stdout
    assert "'metadata'" in told.stdout


def test_the_package_offers_the_verbs():
    import moviola as package
    from moviola.verbs.curate import count_pool, curate

    assert package.curate is curate
    assert package.count_pool is count_pool
    assert {"curate", "count_pool"} <= set(package.__all__)
