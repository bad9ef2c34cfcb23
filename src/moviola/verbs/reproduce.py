"""Run a paper's claim in miniature, and write down what came out.

`reproduce("xpool")` runs every arm of the system's `CLAIM` with every seed, prints mean and spread
with the wall time of each arm beside them, and says plainly when the claim does not show. Nothing
here is a result on real data: the claims run on made worlds.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moviola.systems.registry import entry_module, find
from moviola.types import Claim, System, UsageError, printable
from moviola.verbs.common import cache_folder


@dataclass(frozen=True)
class Arm:
    """One arm of a claim: metrics per seed, in the order of `Report.seeds`, and the seconds they took.

    `cached` seeds came from the cache; their seconds are those of the run that filled it.
    """

    name: str
    metrics: dict[str, list[float]]
    seconds: float
    cached: int = 0

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.metrics[metric])

    def spread(self, metric: str) -> float:
        """Standard deviation over the seeds; 0 for a single one."""
        values = self.metrics[metric]
        return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Report:
    """What a claim in miniature gave."""

    number: int
    slug: str
    title: str
    statement: str
    data: str
    metric: str
    ours: str
    baseline: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]

    @property
    def margins(self) -> list[float]:
        """How much better ours is than the baseline, seed by seed (positive is better)."""
        ours, base = (self.arm(name).metrics[self.metric] for name in (self.ours, self.baseline))
        sign = 1 if self.higher_is_better else -1
        return [sign * (a - b) for a, b in zip(ours, base, strict=True)]

    @property
    def shows(self) -> bool:
        """True when ours beats the baseline with every seed."""
        return all(margin > 0 for margin in self.margins)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    @property
    def verdict(self) -> str:
        won, count = sum(margin > 0 for margin in self.margins), len(self.seeds)
        mean = statistics.fmean(self.margins)
        if self.shows:
            return (
                f"The claim shows: {self.ours} beats {self.baseline} by {mean:.1f} on average, "
                f"with {won} of {count} seeds."
            )
        return (
            f"The claim does NOT show: {self.ours} beats {self.baseline} with {won} of {count} seeds only; "
            f"on average it is {'better' if mean > 0 else 'worse'} by {abs(mean):.1f}."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"shows": self.shows}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        made = {k: v for k, v in data.items() if k != "shows"}
        return cls(**made | {"seeds": tuple(data["seeds"]), "arms": tuple(Arm(**a) for a in data["arms"])})


def reproduce(
    slug: str | int,
    *,
    seeds: Sequence[int] | None = None,
    cache: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Run the claim of one system: all arms with all seeds.

    `cache` is a folder for the arms a claim lets systems share (baselines); by default the user's
    cache folder. `say` receives the lines to print.
    """
    system = find(slug)
    claim: Claim = entry_module(system).CLAIM
    chosen = tuple(claim.seeds if seeds is None else seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"reproduce needs at least one seed and none twice, got {list(chosen)}.")
    folder = Path(cache) if cache is not None else default_cache()
    say(f"{system.number} {system.slug}: {claim.statement}")
    say(f"Data: {claim.data}. Seeds: {', '.join(map(str, chosen))}.")
    arms = []
    for name in claim.arms:
        arm = _run_arm(claim, name, chosen, folder)
        arms.append(arm)
        say(_line(arm, claim.metric))
    report = _report(system, claim, chosen, tuple(arms))
    say(report.verdict)
    return report


def default_cache() -> Path:
    """Where shared baselines are kept: `moviola/claims` in the user's cache folder."""
    return cache_folder("claims")


def _run_arm(claim: Claim, name: str, seeds: Sequence[int], folder: Path) -> Arm:
    rows, seconds, cached = [], 0.0, 0
    for seed in seeds:
        key = claim.cached.get(name)
        path = None
        if key is not None:
            path = folder / f"{hashlib.sha256(f'{key}#{seed}'.encode()).hexdigest()[:20]}.json"
        stored = _read_cache(path, f"{key}#{seed}") if path is not None else None
        if stored is None:
            start = time.perf_counter()
            figures = {k: float(v) for k, v in claim.run(name, seed).items()}
            stored = {"key": f"{key}#{seed}", "metrics": figures, "seconds": time.perf_counter() - start}
            if path is not None:
                _write(path, json.dumps(stored, indent=1) + "\n")
        else:
            cached += 1
        if claim.metric not in stored["metrics"]:
            raise UsageError(
                f"The arm {name!r} reports {sorted(stored['metrics'])}, not the claim's {claim.metric!r}."
            )
        rows.append(stored["metrics"])
        seconds += stored["seconds"]
    return Arm(name, {metric: [row[metric] for row in rows] for metric in rows[0]}, seconds, cached)


def _read_cache(path: Path, key: str) -> dict[str, Any] | None:
    """A stored arm, or None where there is none, it is cut short, or it answers another key."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return stored if isinstance(stored, dict) and stored.get("key") == key else None


def _report(system: System, claim: Claim, seeds: tuple[int, ...], arms: tuple[Arm, ...]) -> Report:
    return Report(
        system.number,
        system.slug,
        system.title,
        claim.statement,
        claim.data,
        claim.metric,
        claim.ours,
        claim.baseline,
        claim.higher_is_better,
        seeds,
        arms,
    )


def _line(arm: Arm, metric: str) -> str:
    shown = [metric] + [name for name in arm.metrics if name != metric]
    figures = ", ".join(f"{name} {arm.mean(name):.1f} ± {arm.spread(name):.1f}" for name in shown)
    cached = f" ({arm.cached} from the cache)" if arm.cached else ""
    return f"  {arm.name}: {figures}; {arm.seconds:.1f} s{cached}"


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------


def save_report(report: Report, folder: str | Path) -> Path:
    """Keep a report as `<folder>/NN-slug.json`, the source of the page."""
    path = Path(folder) / f"{report.number:02d}-{report.slug}.json"
    _write(path, json.dumps(report.to_json(), indent=1) + "\n")
    return path


def reproduction_page(folder: str | Path) -> str:
    """The page in Markdown, from the reports in `folder`; nothing is run."""
    reports = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            reports.append(Report.from_json(json.loads(path.read_text(encoding="utf-8"))))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{printable(path)} is not a stored report: {error}.",
                hint=f"Delete it, or run: moviola reproduce {path.stem.partition('-')[2]}",
            ) from error
    lines = [
        "# Claims in miniature",
        "",
        "Generated by `moviola.verbs.reproduce`; do not edit. Each system's claim, on data this project",
        "makes itself, trained arms with equal data and steps. Mean ± standard deviation of seeds. None",
        "of this is a result on real data. A claim *shows* when ours beats the baseline with every seed.",
    ]
    for report in sorted(reports, key=lambda r: r.number):
        names = [report.metric]
        names += [m for arm in report.arms for m in arm.metrics if m not in names]
        names = list(dict.fromkeys(names))
        lines += [
            "",
            f"## {report.number} {report.slug}: {report.title}",
            "",
            report.statement,
            f"Data: {report.data}. Seeds: {', '.join(map(str, report.seeds))}.",
            "",
            f"| arm | {' | '.join(names)} | seconds |",
            f"|---|{'---:|' * (len(names) + 1)}",
        ]
        for arm in report.arms:
            role = {report.ours: " (ours)", report.baseline: " (baseline)"}.get(arm.name, "")
            cells = [f"{arm.mean(m):.1f} ± {arm.spread(m):.1f}" if m in arm.metrics else "" for m in names]
            lines.append(f"| {arm.name}{role} | {' | '.join(cells)} | {arm.seconds:.0f} |")
        lines += ["", report.verdict]
    return "\n".join(lines) + "\n"


def write_reproduction(page: str | Path, folder: str | Path | None = None) -> Path:
    """Write the page from the reports in `folder` (by default `reproduction/` beside the page)."""
    page = Path(page)
    text = reproduction_page(folder if folder is not None else page.with_suffix(""))
    _write(page, text)
    return page


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
