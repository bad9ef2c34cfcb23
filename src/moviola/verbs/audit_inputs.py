"""What an audit is asked for, read and checked: variants, prompts, sets, factors, earlier reports.

Axis letters: N items, P pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moviola.data.classes import ClassSet
from moviola.data.corruptions import corruption_names
from moviola.data.cue_conflict import CueConflictSet, cue_pairs, read_cue_conflict
from moviola.data.media_set import MediaSet
from moviola.data.tables import ID_COLUMNS, Table, read_json, row_id
from moviola.data.templates import read_templates
from moviola.metrics.robustness import LEAST_BASELINES
from moviola.types import UsageError, printable
from moviola.verbs.audit_models import Templates
from moviola.verbs.audit_suites import CueSuite, PublishedCues, Variant, any_pictures, below

Json = dict[str, Any]

_CUE_PAIRS = 400


def read_variants(corruptions: Sequence[str] | str | None, severities: Sequence[int]) -> tuple[Variant, ...]:
    if corruptions is None or not corruptions:
        return ()
    known = {name.replace("-", " "): name for name in corruption_names()}  # either is easy to type
    given = list(known) if corruptions == "all" else several(corruptions)
    names = [known.get(name.replace("-", " ")) for name in given]
    if None in names:
        wrong = given[names.index(None)]
        raise UsageError(
            f"There is no corruption {wrong!r}.", hint=f"Known are all, {', '.join(known.values())}."
        )
    if not severities or any(one not in (1, 2, 3, 4, 5) for one in severities):
        raise UsageError(f"Severities are whole numbers from 1 to 5, got {tuple(severities)}.")
    return tuple(Variant(name, one) for name in dict.fromkeys(names) for one in sorted(set(severities)))


def several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def read_sets(given: Sequence[Any]) -> dict[str, Templates]:
    """Sets of templates by name, the first first; the same set twice is one."""
    sets: dict[str, Templates] = {}
    for one in given:
        templates = read_templates(one)
        if templates in sets.values():
            continue
        if isinstance(one, str | Path):
            name = Path(one).name if Path(one).is_file() else str(one)
        else:
            name = templates[0] + (" ..." if len(templates) > 1 else "")
        sets[free_name(name, sets)] = templates
    return sets


def read_outside(given: Any) -> dict[str, MediaSet]:
    found: dict[str, MediaSet] = {}
    for one in [] if given is None else several(given):
        pictures = any_pictures(one)
        found[free_name(pictures.source.name, found)] = pictures
    return found


def read_cues(
    given: Any, data: ClassSet, rows: Sequence[int], limit: int | None, seed: int
) -> CueSuite | PublishedCues | None:
    if given is None:
        return None
    if given != "made":
        published = given if isinstance(given, CueConflictSet) else read_cue_conflict(given)
        return PublishedCues(published, published.sample(limit))
    labels_N = data.labels_N[list(rows)]
    if len(set(labels_N.tolist())) < 2:
        return None
    shape_P, texture_P = cue_pairs(labels_N, min(_CUE_PAIRS, 4 * len(rows)), seed)
    return CueSuite(data, np.array(rows)[shape_P], np.array(rows)[texture_P])


def free_name(name: str, taken: Any) -> str:
    """The name, with a number where it is taken."""
    number, made = 1, name
    while made in taken:
        number += 1
        made = f"{name} ({number})"
    return made


# --------------------------------------------------------------------------------------------------
# Earlier reports as baselines
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What two audits must share so that their figures compare: `pictures` is a hash of items and labels."""

    pictures: str
    corruptions: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, data: ClassSet, index_N: np.ndarray, variants: Sequence[Variant], seed: int) -> Setting:
        digest = hashlib.sha256()
        for row in index_N.tolist():
            label = data.classes[data.labels_N[row]]
            digest.update(
                f"{below(data.ids[row], data.source)}\0{label}\0".encode("utf-8", "surrogateescape")
            )
        return cls(digest.hexdigest()[:16], tuple(sorted(map(str, variants))), seed)

    def to_json(self) -> Json:
        return {"pictures": self.pictures, "corruptions": list(self.corruptions), "seed": self.seed}


class Earlier:
    """Models of earlier reports, for the line of effective robustness."""

    def __init__(self) -> None:
        self._reports: list[Json] = []

    @property
    def names(self) -> list[str]:
        return [model["name"] for report in self._reports for model in report["models"]]

    def take(self, source: Any) -> bool:
        """Keep `source` if it is a report: figures, their file, or its folder. Whether it is one."""
        if isinstance(source, str | Path):
            place = Path(source)
            place = place / "report.json" if place.is_dir() else place
            if place.suffix.lower() != ".json" or not place.is_file():
                return False
            source = read_json(place)
        if not (isinstance(source, Mapping) and source.get("task") == "audit"):
            return False
        self._reports.append(dict(source))
        return True

    def figures(self, section: str, setting: Setting) -> dict[str, Json]:
        """What the models of the reports have in a section; they must be of the same pictures."""
        wanted = setting.to_json() if section == "corruptions" else {"pictures": setting.pictures}
        found: dict[str, Json] = {}
        for report in self._reports:
            of = f"The baseline report on {printable(report['data'])}"
            if any(report["setting"][key] != value for key, value in wanted.items()):
                raise UsageError(
                    f"{of} is of other pictures or other {section}.",
                    hint="Audit the baselines on the same items, with the same options and seed.",
                )
            if section not in report["sections"]:
                raise UsageError(f"{of} has no {section}.", hint="Audit the baselines with the same options.")
            found |= report["sections"][section]["by_model"]
        return found

    def note(self, live: int) -> list[str]:
        """Said where there are too few baselines for a line."""
        count = live + len(self.names)
        if count >= LEAST_BASELINES:
            return []
        return [
            f"No effective robustness: it needs {LEAST_BASELINES} baselines (baselines=, --baseline); "
            f"there {'is' if count == 1 else 'are'} {count or 'none'}. See the relative drop instead."
        ]


# --------------------------------------------------------------------------------------------------
# Factors of the items
# --------------------------------------------------------------------------------------------------


def read_tags(source: str | Path | Mapping[str, Any], data: ClassSet) -> dict[int, str]:
    """The factor of each row that has one: from a column of the data's table, a JSON file, or a mapping.

    A JSON names items by id, by path below the data's folder, or by file name. Of a list of factors the
    first counts, as the paper takes the top one.
    """
    if isinstance(source, Mapping):
        return _tags_by_name(source, data, "The mapping of factors")
    path = Path(source)
    if path.suffix.lower() == ".json" or path.is_file():
        given = read_json(path)
        if not isinstance(given, dict):
            raise UsageError(
                f"{printable(path)} holds a JSON {type(given).__name__}, expected an object: item to factor."
            )
        return _tags_by_name(given, data, printable(path))
    if data.source.is_dir():
        raise UsageError(
            f"There is no file {printable(path)}, and a folder of classes has no columns.",
            hint="Give a JSON of item and factor.",
        )
    table = Table(data.source)
    name = table.column(str(source), (), "factors", "factors")
    id_name = table.find(None, ID_COLUMNS)
    row_of = {one: row for row, one in enumerate(data.ids)}
    tags = {}
    wanted = [name, *([id_name] if id_name else [])]
    for number, cells in table.rows(wanted, on_skip=lambda where, why: None):
        row, factor = row_of.get(row_id(table, number, cells, id_name)), _factor(cells.get(name))
        if row is not None and factor is not None:
            tags[row] = factor
    if not tags:
        raise UsageError(f"The column {name!r} of {printable(table.path)} gives no item a factor.")
    return tags


def _tags_by_name(given: Mapping[str, Any], data: ClassSet, what: str) -> dict[int, str]:
    names = Counter(Path(one).name for one in data.ids)
    tags = {}
    for row, one in enumerate(data.ids):
        keys = [one, below(one, data.source)]
        if names[Path(one).name] == 1:
            keys.append(Path(one).name)
        factor = next((_factor(given[key]) for key in keys if key in given), None)
        if factor is not None:
            tags[row] = factor
    if not tags:
        first = ", ".join(printable(one) for one in list(given)[:2]) or "nothing"
        raise UsageError(
            f"{what} gives none of {len(data)} items a factor. It names {first}; the first item is "
            f"{printable(data.ids[0])}.",
            hint='Expected {"CLASS/PICTURE.jpg": "pose", ...}.',
        )
    return tags


def _factor(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        value = next(iter(value), None)
    return None if value is None else str(value).strip() or None
