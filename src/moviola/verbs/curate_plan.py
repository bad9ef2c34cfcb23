"""Counts of a curation run, and what a threshold would make of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moviola.types import UsageError, printable


@dataclass(frozen=True)
class PlanRow:
    """What a threshold gives: the set's expected size and how far the real one may be from it, and shares.

    `error` is one standard deviation, of the draws and, where match sets are a sample, of that.
    """

    threshold: float
    tail_share: float
    head_entries: int
    size: float
    error: float


def plan(counts: str | Path, *, thresholds: Sequence[float] = ()) -> list[PlanRow]:
    """Set size and tail share over thresholds, from the counts and the sample of match sets beside them.

    `counts`: a `counts.parquet`, or the folder of a run. Without `thresholds`: two a decade up to the
    largest count. With several languages the threshold is English's, the others follow its tail share.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from moviola.data.matching import Matches
    from moviola.systems.curation import metaclip

    path = counts_file(counts)
    table, about = read_counts(path)
    count_E = table["count"].to_numpy()
    metaclip.check_counts(count_E)
    place = path.with_name("match_sample.parquet")
    if not place.exists():
        raise UsageError(
            f"{printable(place)} is missing: set sizes are told from its sample of match sets.",
            hint="Keep it beside counts.parquet, or count again: moviola curate count",
        )
    lists = pq.read_table(place)["entries"].combine_chunks()
    sizes = pc.list_value_length(lists).to_numpy()
    sample = Matches(np.repeat(np.arange(len(lists)), sizes), lists.flatten().to_numpy(), len(lists))
    languages = table["language"].to_pylist()
    names = list(dict.fromkeys(languages))
    ends = np.cumsum([languages.count(name) for name in names])
    by_language = dict(zip(names, np.split(count_E, ends[:-1]), strict=True))
    config = metaclip.MetaClipConfig.from_json({**about["config"], "tail_share": None})
    rows = []
    for threshold in thresholds or _usual_thresholds(int(count_E.max())):
        limits = metaclip.thresholds(by_language, replace(config, threshold=threshold))
        prob_E = np.concatenate([metaclip.probabilities(c, limits[n]) for n, c in by_language.items()])
        limit_E = np.concatenate([np.full(len(c), limits[n]) for n, c in by_language.items()])
        keep_U = metaclip.keep_probability(sample, prob_E)
        total = about["candidates"]
        left = max(0.0, 1 - sample.texts / max(total, 1))  # a sample of everything has no error
        sampling = total * float(keep_U.std()) * math.sqrt(left / max(1, sample.texts))
        drawing = math.sqrt(total * float((keep_U * (1 - keep_U)).mean())) if sample.texts else 0.0
        rows.append(
            PlanRow(
                threshold,
                float(count_E[count_E < limit_E].sum() / count_E.sum()),
                int((count_E > limit_E).sum()),
                total * float(keep_U.mean()) if sample.texts else 0.0,
                math.hypot(sampling, drawing),
            )
        )
    return rows


def _usual_thresholds(largest: int) -> list[float]:
    """1, 3, 10, 30 ... up to the first that keeps everything."""
    steps = [float(m * 10**e) for e in range(len(str(largest)) + 1) for m in (1, 3)]
    return [t for n, t in enumerate(steps) if n == 0 or steps[n - 1] < largest]


def counts_file(counts: str | Path) -> Path:
    """The `counts.parquet` that is meant by it or by the folder of its run."""
    path = Path(counts) / "counts.parquet" if Path(counts).is_dir() else Path(counts)
    if not path.exists():
        raise UsageError(f"{printable(path)} does not exist.", hint="Expected what a curate run left.")
    return path


def read_counts(path: Path) -> tuple[Any, dict[str, Any]]:
    """The table of a `counts.parquet` and what its run said about it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{printable(path)} is no readable counts.parquet ({error}).") from error
    about = (table.schema.metadata or {}).get(b"moviola")
    if about is None or "count" not in table.column_names:
        raise UsageError(
            f"{printable(path)} is no table of counts.", hint="Expected the counts.parquet of a curate run."
        )
    return table, json.loads(about)


def given_counts(path: Path, hashes: Mapping[str, str]) -> np.ndarray:
    """The counts of another run; `UsageError` unless it had the same metadata."""
    table, about = read_counts(path)
    if about["metadata"] != hashes:
        raise UsageError(
            f"{printable(path)} counts the entries of other metadata.",
            hint="Count again with this metadata: moviola curate count",
        )
    return np.asarray(table["count"].to_numpy())
