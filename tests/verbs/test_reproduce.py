from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from moviola.types import Claim, UsageError
from moviola.verbs import reproduce as verb
from moviola.verbs.reproduce import Report, reproduce, reproduction_page, save_report, write_reproduction


@pytest.fixture
def claim(monkeypatch):
    """A claim whose figures the test sets; counts its runs."""
    made = SimpleNamespace(runs=[], figures={"ours": 10.0, "base": 5.0, "free": 1.0}, extra={})

    def run(arm, seed):
        made.runs.append((arm, seed))
        return {"R@1": made.figures[arm] + seed, "MedR": 3.0} | made.extra

    def use(**changes):
        settings = {
            "statement": "Ours is better.", "data": "numbers", "metric": "R@1",
            "arms": ("base", "free", "ours"), "ours": "ours", "baseline": "base",
            "run": run, "cached": {"base": "numbers/base"},
        }  # fmt: skip
        module = SimpleNamespace(CLAIM=Claim(**settings | changes))
        monkeypatch.setattr(verb, "entry_module", lambda system: module)

    made.use = use
    use()
    return made


def test_runs_every_arm_with_every_seed_and_reports(claim, tmp_path):
    said = []
    report = reproduce("xpool", cache=tmp_path, say=said.append)
    assert claim.runs == [(arm, seed) for arm in ("base", "free", "ours") for seed in (0, 1, 2)]
    assert (report.slug, report.seeds) == ("xpool", (0, 1, 2))
    assert report.arm("ours").metrics["R@1"] == [10.0, 11.0, 12.0]
    assert (report.arm("ours").mean("R@1"), report.arm("ours").spread("R@1")) == (11.0, 1.0)
    assert report.margins == [5.0, 5.0, 5.0]
    assert report.shows
    text = "\n".join(said)
    assert "ours: R@1 11.0 ± 1.0, MedR 3.0 ± 0.0" in text
    assert "The claim shows: ours beats base by 5.0 on average, with 3 of 3 seeds." in text


def test_a_claim_that_does_not_show_is_said_to_be_so(claim, tmp_path):
    claim.figures["ours"] = 4.0
    said = []
    report = reproduce("xpool", cache=tmp_path, say=said.append)
    assert not report.shows
    assert "does NOT show: ours beats base with 0 of 3 seeds only; on average it is worse by 1.0" in said[-1]


def test_one_lost_seed_is_enough_not_to_show(claim, tmp_path):
    values = {("base", 0): 1, ("base", 1): 1, ("ours", 0): 9, ("ours", 1): 0}
    claim.use(arms=("base", "ours"), cached={}, run=lambda arm, seed: {"R@1": values[arm, seed]})
    report = reproduce("xpool", seeds=(0, 1), cache=tmp_path, say=lambda line: None)
    assert not report.shows
    assert "1 of 2 seeds only; on average it is better by 3.5" in report.verdict


def test_lower_may_be_better(claim, tmp_path):
    claim.use(higher_is_better=False)
    assert reproduce("xpool", cache=tmp_path, say=lambda line: None).margins == [-5.0, -5.0, -5.0]


def test_baselines_come_from_the_cache_and_only_they(claim, tmp_path):
    first = reproduce("xpool", cache=tmp_path, say=lambda line: None)
    claim.runs.clear()
    said = []
    second = reproduce("xpool", seeds=(0, 1, 2, 3), cache=tmp_path, say=said.append)
    assert [seed for arm, seed in claim.runs if arm == "base"] == [3]
    assert len([arm for arm, _ in claim.runs if arm == "ours"]) == 4
    assert second.arm("base").metrics["R@1"][:3] == first.arm("base").metrics["R@1"]
    assert second.arm("base").cached == 3
    assert any("(3 from the cache)" in line for line in said)
    claim.use(cached={"base": "numbers/another base"})
    claim.runs.clear()
    reproduce("xpool", cache=tmp_path, say=lambda line: None)
    assert len([arm for arm, _ in claim.runs if arm == "base"]) == 3


def test_a_broken_cache_file_is_run_again(claim, tmp_path):
    reproduce("xpool", cache=tmp_path, say=lambda line: None)
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 3
    assert not list(tmp_path.glob(".*"))
    files[0].write_text('{"key": "numb')
    claim.runs.clear()
    reproduce("xpool", cache=tmp_path, say=lambda line: None)
    assert len([arm for arm, _ in claim.runs if arm == "base"]) == 1


def test_bad_input(claim, tmp_path):
    for seeds in ((), (1, 1)):
        with pytest.raises(UsageError, match="at least one seed"):
            reproduce("xpool", seeds=seeds, cache=tmp_path)
    with pytest.raises(UsageError, match="Did you mean xpool"):
        reproduce("xpol", cache=tmp_path)
    claim.use(metric="mAP")
    with pytest.raises(UsageError, match=r"not the claim's 'mAP'"):
        reproduce("xpool", cache=tmp_path, say=lambda line: None)


def test_the_page_is_made_from_stored_reports_alone(claim, tmp_path):
    reports = tmp_path / "reproduction"
    report = reproduce("xpool", cache=tmp_path / "cache", say=lambda line: None)
    path = save_report(report, reports)
    assert path.name == "44-xpool.json"
    assert Report.from_json(json.loads(path.read_text())) == report
    claim.runs.clear()
    page = write_reproduction(tmp_path / "reproduction.md").read_text()
    assert not claim.runs
    assert "| ours (ours) | 11.0 ± 1.0 | 3.0 ± 0.0 |" in page
    assert "| base (baseline) |" in page
    assert report.verdict in page


def test_a_file_that_is_no_report_is_named(tmp_path):
    (tmp_path / "07-vr-lwf.json").write_text("{}")
    with pytest.raises(UsageError, match=r"07-vr-lwf\.json is not a stored report.*moviola reproduce vr-lwf"):
        reproduction_page(tmp_path)


def test_the_committed_page_is_current():
    docs = Path(__file__).resolve().parents[2] / "docs"
    assert (docs / "reproduction.md").read_text() == reproduction_page(docs / "reproduction")
