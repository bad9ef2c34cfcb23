"""How often ComCLIP and the plain cosine prefer the right one of two pictures: tables in ComVG's layout.

Axis letters: R rows, N pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moviola.data.tables import Table
from moviola.metrics.compositional import PairwiseAccuracy, pairwise_accuracy
from moviola.types import Dtype, MediaError, UsageError, printable
from moviola.verbs.classify import refuse_without_words
from moviola.verbs.common import Progress, Skipped, resolve, summary
from moviola.verbs.match import NO_SCORE, Named, located

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.parts.regions import Dense
    from moviola.systems.retrieval.comclip import ComClipConfig, Pair

_AT_ONCE = 16  # rows scored together


@dataclass(frozen=True)
class PairsReport:
    """Accuracies in percent of all rows, failed ones counted as wrong; `kinds` by what differs."""

    data: str
    model: str
    comclip: PairwiseAccuracy
    plain: PairwiseAccuracy
    kinds: dict[str, tuple[PairwiseAccuracy, PairwiseAccuracy]] = field(default_factory=dict)
    failed: tuple[Skipped, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "model": self.model,
            "comclip": asdict(self.comclip),
            "plain": asdict(self.plain),
            "kinds": {
                name: {"comclip": asdict(ours), "plain": asdict(plain)}
                for name, (ours, plain) in self.kinds.items()
            },
            "failed": [one.to_json() for one in self.failed],
            "ok": self.ok,
        }

    def __str__(self) -> str:
        lines = [f"Pairwise accuracy on {printable(self.data)} by {self.model}, percent"]
        for name, (ours, plain) in {"all": (self.comclip, self.plain), **self.kinds}.items():
            lines.append(
                f"  {name}: ComCLIP {ours.accuracy:.2f}, plain {plain.accuracy:.2f}, {ours.rows} rows"
            )
        return "\n".join([*lines, *summary(self.failed, "rows failed and count as wrong")])


def evaluate_pairs(
    model: str | Path | Model,
    data: str | Path,
    pictures: str | Path,
    *,
    regions: str | Path | Mapping[str, Dense] | None = None,
    config: ComClipConfig | None = None,
    ending: str = ".jpg",
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    batch_size: int = 32,
    on_progress: Progress | None = None,
) -> PairsReport:
    """Pairwise accuracy over rows of sentence, pos_triplet, pos_image_id and neg_image_id (ComVG's CSV).

    `pictures` is the folder of `<image id><ending>`; a triplet is "subject,verb,object". Where the table
    has `neg_value` (subject, verb or object), figures are also given for each. `regions` as for `match`.
    A row that fails counts as wrong and is reported.
    """
    from moviola.systems.retrieval.comclip import ComClip, ComClipConfig

    table = Table(data)
    lacking = [name for name in _COLUMNS if name not in table.columns]
    if lacking:
        raise UsageError(
            f"{printable(table.path)} has no column {', '.join(lacking)}; it has {', '.join(table.columns)}."
        )
    folder = Path(pictures)
    if not folder.is_dir():
        raise UsageError(f"There is no folder {printable(folder)} with pictures.")
    dense = None if regions is None else Named(regions, "regions")
    loaded = resolve(model, device=device, dtype=dtype, tokenizer=tokenizer)
    refuse_without_words(loaded, "evaluate_pairs")
    matcher = ComClip(loaded, config or ComClipConfig(), batch_size=batch_size)

    failed: list[Skipped] = []
    kinds: list[str] = []
    scores: list[list[float]] = []  # of each row ComCLIP's and the plain score, of the true and the false one
    waiting: list[tuple[int, str, Pair]] = []

    def flush() -> None:
        made = matcher.match([pair for *_, pair in waiting])
        for (row, where, _), one in zip(waiting, made, strict=True):
            scores[row] += [one.score, one.plain]
            if not math.isfinite(one.score):
                failed.append(Skipped(where, one.note or NO_SCORE))
        waiting.clear()

    for number, row in table.rows():
        scores.append([])
        kinds.append(str(row.get("neg_value") or ""))
        try:
            pairs = _pairs(row, folder, ending, dense)
            waiting += [(len(scores) - 1, table.where(number), pair) for pair in pairs]
        except (UsageError, MediaError) as error:
            failed.append(Skipped(table.where(number), error.problem))
        if len(waiting) >= 2 * _AT_ONCE:
            flush()
            if on_progress is not None:
                on_progress(len(scores), None, "")
    flush()
    scores_R4 = np.array([one if len(one) == 4 else [math.nan] * 4 for one in scores]).reshape(-1, 4)
    if not np.isfinite(scores_R4).any():
        raise UsageError(
            f"Not one of the {len(scores)} rows could be scored. The first: {failed[0]}."
            if failed
            else f"{printable(table.path)} has no rows."
        )
    kind_R = np.array(kinds)
    return PairsReport(
        table.path.name,
        loaded.name,
        *_both(scores_R4),
        {kind: _both(scores_R4[kind_R == kind]) for kind in dict.fromkeys(kinds) if kind},
        tuple(failed),
    )


_COLUMNS = ("sentence", "pos_triplet", "pos_image_id", "neg_image_id")


def _both(scores_R4: np.ndarray) -> tuple[PairwiseAccuracy, PairwiseAccuracy]:
    true, true_plain, false, false_plain = scores_R4.T
    return pairwise_accuracy(true, false), pairwise_accuracy(true_plain, false_plain)


def _pairs(row: Mapping[str, Any], folder: Path, ending: str, dense: Named | None) -> list[Pair]:
    """The sentence with the true picture, then with the false one."""
    from moviola.media import read_picture
    from moviola.parts.sentence_parser import Parse
    from moviola.systems.retrieval.comclip import Pair

    empty = [name for name in _COLUMNS if row.get(name) in (None, "")]
    if empty:
        raise UsageError(f"it has no {empty[0]}")
    parse = Parse.from_triplet(str(row["pos_triplet"]).strip("[]"), str(row["sentence"]))
    made = []
    for name in ("pos_image_id", "neg_image_id"):
        path = folder / f"{row[name]}{ending}"
        picture = read_picture(path)
        made.append(
            Pair(parse, picture, None if dense is None else located(parse, picture, str(path), dense))
        )
    return made
