"""What a curation run tells: one JSON-able report, short enough for a pool of any size.

How many rows came, matched and stayed and why others went; the head and the tail of every list before
and after; entries and texts by name. `curate_page` shows it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.verbs.curate_page import report_lines, report_page
from moviola.verbs.curate_stages import NO_ENTRY, NO_LIST

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["build_report", "report_lines", "report_page"]

CURVE_POINTS, LEAST_POINTS, ALL_POINTS = 200, 40, 2_400
"""Ranks of one list's curve; with many lists each has fewer, so that the report stays short."""
_SHARES = (50, 90, 99)
_LARGEST, _LARGEST_OF_MANY = 25, 10
_NEVER, _TEXTS, _NAMES, _FAILED = 40, 12, 12, 100


def build_report(
    columns: pa.Table,
    *,
    config: Mapping[str, Any],
    metadata: str,
    hashes: Mapping[str, str],
    files: int,
    summaries: Sequence[Mapping[str, Any]],
    duplicates: int,
    thresholds: Mapping[str, float] | None,
    kept: Mapping[str, Any] | None,
    counts_given: bool,
    failed: Sequence[str],
    engine: str,
    seconds: float,
    candidates: int | None = None,
) -> dict[str, Any]:
    """All a run says about itself, as plain JSON (no NaN, no infinity).

    columns     language, entry, count and, after a draw, probability and kept: a row an entry, in order
    summaries   what `MatchStage` said of each piece
    duplicates  matched texts left out since an earlier row had their id
    thresholds  per language, None where nothing was drawn; an infinite one becomes null: all stays
    kept        the draw's figures: texts, rows, expected, bytes
    candidates  texts that were drawn for; None if not known. With it, several texts a row show why each
                of them went.
    """
    sums = {
        name: sum(int(s[name]) for s in summaries)
        for name in ("rows", "rows_with_text", "matched_rows", "texts", "matched_texts", "without_id")
    }
    sums["most_texts"] = max((int(s["most_texts"]) for s in summaries), default=0)
    problems = merged(s["problems"] for s in summaries)
    entries = _Entries(columns, thresholds)
    report: dict[str, Any] = {
        "made": "set" if kept is not None else "counts",
        "metadata": {"name": metadata, "hashes": dict(hashes)},
        "config": {k: None if v in (np.inf, "inf") else v for k, v in config.items()},
        "seed": config["seed"],
        "input": {
            "files": files,
            "failed": len(failed),
            "failures": list(failed[:_FAILED]),
            "columns": _columns_used(summaries),
            **sums,
            "duplicates": duplicates,
            "candidates": candidates,
            "problems": problems,
        },
        "kept": None if kept is None else dict(kept),
        "funnel": _funnel(sums, problems, duplicates, candidates, kept, config["texts"]),
        "counts_given": counts_given,
        "total": entries.total(),
        "languages": entries.languages(),
        "texts": entries.texts(summaries),
        "engine": engine,
        "seconds": round(seconds, 2),
        "versions": _versions(),
    }
    report["warnings"] = list(_warnings(report, entries))
    return report


def merged(tallies: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Reasons and their counts over all pieces, the most frequent first."""
    total: dict[str, int] = {}
    for tally in tallies:
        for why, many in tally.items():
            total[why] = total.get(why, 0) + int(many)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _columns_used(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The different choices of columns among the files; files of one pool mostly agree."""
    used: list[dict[str, Any]] = []
    for summary in summaries:
        columns = {**summary["columns"], "texts": list(summary["columns"]["texts"])}
        if columns not in used:
            used.append(columns)
    return used[:20]


def _versions() -> dict[str, str]:
    import pyarrow as pa

    import moviola

    return {
        "moviola": moviola.__version__,
        "pyarrow": pa.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# --------------------------------------------------------------------------------------------------
# Why rows went
# --------------------------------------------------------------------------------------------------


def _funnel(
    sums: Mapping[str, int],
    problems: Mapping[str, int],
    duplicates: int,
    candidates: int | None,
    kept: Mapping[str, Any] | None,
    texts: str,
) -> dict[str, Any]:
    """What is left after each step and why the rest went; the steps add up.

    In rows where every row has at most one text; else in texts, where a row that could not be read
    counts as one.
    """
    unusable = {why: many for why, many in problems.items() if why not in (NO_ENTRY, NO_LIST)}
    missed = {why: many for why, many in problems.items() if why in (NO_ENTRY, NO_LIST)}
    without = sums["rows"] - sums["rows_with_text"]
    single = (
        sums["most_texts"] <= 1
        and sums["texts"] == sums["rows_with_text"]
        and sum(unusable.values()) == without
    )
    came = sums["rows"] if single else sums["texts"] + sum(unusable.values())
    steps = [
        {"step": "came", "left": came, "lost": {}},
        {"step": "hold a usable text" if single else "are usable", "left": sums["texts"], "lost": unusable},
        {"step": "hold an entry", "left": sums["matched_texts"], "lost": missed},
    ]
    left = sums["matched_texts"] - duplicates
    if duplicates:
        steps.append(
            {"step": "have an id of their own", "left": left, "lost": {"id came before": duplicates}}
        )
    if kept is not None:
        drawn = "not drawn"
        if texts == "one" and not single:
            if candidates is None:
                drawn = "another text of the row was chosen, or not drawn"
            elif candidates < left:
                lost = {"another text of the row was chosen": left - candidates}
                steps.append({"step": "are their row's choice", "left": candidates, "lost": lost})
                left = candidates
        stays = int(kept["texts"])
        steps.append({"step": "stay", "left": stays, "lost": {drawn: left - stays} if left > stays else {}})
    return {"unit": "rows" if single else "texts", "steps": steps}


# --------------------------------------------------------------------------------------------------
# Entries
# --------------------------------------------------------------------------------------------------


class _Entries:
    """The table of counts, as arrays by entry number. E: entries of all lists, L: of one list."""

    def __init__(self, columns: pa.Table, thresholds: Mapping[str, float] | None) -> None:
        self.names = columns["entry"]
        self.count_E = columns["count"].to_numpy().astype(np.int64)
        self.kept_E: np.ndarray | None = None
        self.prob_E: np.ndarray | None = None
        if "kept" in columns.column_names:
            self.kept_E = columns["kept"].to_numpy().astype(np.int64)
            self.prob_E = columns["probability"].to_numpy()
        codes = columns["language"].dictionary_encode().unify_dictionaries().combine_chunks()
        code_E = codes.indices.to_numpy()
        starts = np.flatnonzero(np.diff(code_E, prepend=-1))
        stops = np.append(starts[1:], len(code_E))
        self.spans = [
            (codes.dictionary[int(code_E[a])].as_py(), slice(int(a), int(b)))
            for a, b in zip(starts, stops, strict=True)
        ]
        self.limits = thresholds
        self.limit_E: np.ndarray | None = None
        if thresholds is not None:
            parts = [np.full(s.stop - s.start, thresholds[name]) for name, s in self.spans]
            self.limit_E = np.concatenate(parts)
        self.several = len(self.spans) > 1

    def total(self) -> dict[str, Any]:
        """The figures of all lists together."""
        return self._figures(slice(0, len(self.count_E)), CURVE_POINTS)

    def languages(self) -> list[dict[str, Any]]:
        """A block for each list, the one with the most matches first."""
        points = max(LEAST_POINTS, min(CURVE_POINTS, ALL_POINTS // max(1, len(self.spans))))
        blocks = []
        for name, where in self.spans:
            limit = None
            if self.limits is not None and np.isfinite(self.limits[name]):
                limit = float(self.limits[name])
            blocks.append(
                {"language": name, "threshold": limit, **self._figures(where, points), **self._named(where)}
            )
        return sorted(blocks, key=lambda block: -block["matches"])

    def _figures(self, where: slice, points: int) -> dict[str, Any]:
        count_L = self.count_E[where]
        matches = int(count_L.sum())
        figures: dict[str, Any] = {
            "entries": len(count_L),
            "matched": int((count_L > 0).sum()),
            "matches": matches,
            "covering": _covering(count_L),
            "before": _curve(count_L, points),
            "after": None,
        }
        if self.kept_E is None or self.limit_E is None:
            return figures
        kept_L, limit_L = self.kept_E[where], self.limit_E[where]
        head_L, tail_L = count_L > limit_L, count_L < limit_L
        return {
            **figures,
            "head_entries": int(head_L.sum()),
            "head_share": _part(count_L[head_L].sum(), matches),
            "tail_share": _part(count_L[tail_L].sum(), matches),
            "kept_matches": int(kept_L.sum()),
            "kept_head_share": _part(kept_L[head_L].sum(), kept_L.sum()),
            "kept_entries": int((kept_L > 0).sum()),
            "kept_covering": _covering(kept_L),
            "after": _curve(kept_L, points),
        }

    def _named(self, where: slice) -> dict[str, Any]:
        """Some entries by name: the largest, some of the tail, some that no text held."""
        many = _LARGEST_OF_MANY if self.several else _LARGEST
        count_L = self.count_E[where]
        falling = where.start + np.argsort(-count_L, kind="stable")[: int((count_L > 0).sum())]
        if self.limit_E is None:
            tail = falling[many:]
        else:
            tail = falling[self.count_E[falling] < self.limit_E[falling]]
        never = where.start + np.flatnonzero(count_L == 0)
        some = np.linspace(0, len(never) - 1, min(len(never), _NEVER)).round().astype(np.int64)
        return {
            "largest": [self.entry(e) for e in falling[:many]],
            "tail": [self.entry(e) for e in tail[_log_places(len(tail), many)]],
            "never": [self.names[int(e)].as_py() for e in never[some]],
        }

    def entry(self, number: int | np.integer) -> dict[str, Any]:
        """An entry by name, with what it counts and, after a draw, its chance and what stays."""
        e = int(number)
        told: dict[str, Any] = {"entry": self.names[e].as_py(), "count": int(self.count_E[e])}
        if self.kept_E is not None and self.prob_E is not None:
            told["probability"] = float(f"{self.prob_E[e]:.6g}")
            told["kept"] = int(self.kept_E[e])
        return told

    # ------------------------------------------------------------------------------------ their texts

    def texts(self, summaries: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Example texts of the whole pool: those with the lowest draws, each text once.

        After a draw in `head` (all of a text's entries are frequent) and `tail` (one is rare, so the
        text always stays); before one in `matched`.
        """
        shown: dict[str, list[dict[str, Any]]] = {"head": [], "tail": [], "matched": [], "unmatched": []}
        for text, found in _drawn(s["examples"] for s in summaries):
            told, chance = self._text(text, found)
            kind = "matched" if chance is None else "tail" if chance == 1 else "head"
            if len(shown[kind]) < _TEXTS:
                shown[kind].append(told)
        for text, _ in _drawn(s["unmatched"] for s in summaries):
            if len(shown["unmatched"]) < _TEXTS:
                shown["unmatched"].append({"text": text})
        return shown

    def _text(self, text: str, found: Sequence[int]) -> tuple[dict[str, Any], float | None]:
        entries = np.asarray(found, np.int64)
        rarest = entries[np.argsort(self.count_E[entries], kind="stable")]
        told: dict[str, Any] = {
            "text": text,
            "entries": [self.entry(e) for e in rarest[:_NAMES]],
            "more": max(0, len(rarest) - _NAMES),
            "chance": None,
        }
        if self.prob_E is None:
            return told, None
        chance = float(1 - np.prod(1 - self.prob_E[entries]))
        told["chance"] = float(f"{chance:.6g}")
        return told, 1.0 if (self.prob_E[entries] == 1).any() else min(chance, np.nextafter(1.0, 0))

    def matched_without_count(self) -> np.ndarray:
        """Numbers of the entries that stay in some text though the counts know none."""
        if self.kept_E is None:
            return np.empty(0, np.int64)
        return np.flatnonzero((self.kept_E > 0) & (self.count_E == 0))


def _drawn(examples: Iterable[Iterable[Sequence[Any]]]) -> list[tuple[str, Sequence[int]]]:
    """(text, entries) of all pieces by rising draw. The same text has the same draw everywhere."""
    all_of_them = sorted((float(d), str(t), tuple(e)) for piece in examples for d, t, e in piece)
    once: dict[str, Sequence[int]] = {}
    for _, text, found in all_of_them:
        once.setdefault(text, found)
    return list(once.items())


def _part(some: int | np.integer, whole: int | np.integer) -> float | None:
    return float(f"{int(some) / int(whole):.6g}") if whole else None


def _log_places(length: int, many: int) -> np.ndarray:
    """At most `many` places of `length`, the first and the last among them, evenly in their logarithm."""
    if not length:
        return np.empty(0, np.int64)
    return np.unique(np.geomspace(1, length, many).round().astype(np.int64)) - 1


def _curve(values_L: np.ndarray, points: int) -> dict[str, list[Any]]:
    """Rank (from 1) against value, falling, and the share of the sum up to the rank; zeros left out."""
    falling = -np.sort(-values_L[values_L > 0])
    places = _log_places(len(falling), points)
    if not len(places):
        return {"rank": [], "many": [], "share": []}
    summed = np.cumsum(falling)
    return {
        "rank": (places + 1).tolist(),
        "many": falling[places].tolist(),
        "share": [float(f"{share:.4g}") for share in summed[places] / summed[-1]],
    }


def _covering(values_L: np.ndarray) -> dict[str, int]:
    """How many entries, the most frequent first, make 50, 90 and 99 % of all matches."""
    summed = np.cumsum(-np.sort(-values_L[values_L > 0]))
    if not len(summed):
        return {str(percent): 0 for percent in _SHARES}
    whole = int(summed[-1])
    needed = [-(-whole * percent // 100) for percent in _SHARES]
    return {str(p): int(np.searchsorted(summed, n)) + 1 for p, n in zip(_SHARES, needed, strict=True)}


# --------------------------------------------------------------------------------------------------
# What to look at
# --------------------------------------------------------------------------------------------------


def _warnings(report: Mapping[str, Any], entries: _Entries) -> Iterable[str]:
    came = report["input"]
    if came["failed"]:
        yield f"Files, or parts of one, that could not be read and are left out: {came['failed']:,}."
    if came["without_id"]:
        yield (
            f"{came['without_id']:,} of {came['rows']:,} rows have no id. Their draw hangs on the file's "
            "name and the row's number: renamed files or moved rows change which of them stay, and the "
            "same pair in two places is not seen as a duplicate."
        )
    if len(came["columns"]) > 1:
        yield "The files do not all have the same columns for texts, id and language; see below."
    if came["problems"].get(NO_LIST):
        yield f"{came['problems'][NO_LIST]:,} texts are in languages without a list of entries."
    if report["counts_given"]:
        unknown = entries.matched_without_count()
        if len(unknown):
            names = ", ".join(entries.names[int(e)].as_py() for e in unknown[:_NAMES])
            yield (
                f"{len(unknown):,} of the entries in this pool count 0 in the counts that were given, so "
                f"every text with one of them stays: {names}{' ...' if len(unknown) > _NAMES else ''}. "
                "The counts may be of another pool."
            )
    if report["kept"] is not None and not report["total"]["head_entries"]:
        yield "No entry counts more than its threshold, so nothing was thinned."
