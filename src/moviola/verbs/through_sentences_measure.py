"""How well videos are classified through sentences: on labelled videos, seen and unseen classes apart.

Axis letters: N videos, P prototypes (class sentences).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moviola.data.classes import ClassSet, read_classes
from moviola.data.observers import Captioner, Captions
from moviola.data.reworded import harmonic_mean
from moviola.data.tables import read_json
from moviola.metrics.classification import topk_accuracy
from moviola.types import Clip, Dtype, UsageError, printable
from moviola.verbs.classify import class_names
from moviola.verbs.common import Progress, Skipped, counting_cuts, cut_note, summary
from moviola.verbs.through_sentences import Documents, Observer, SentenceSpace, read_observers

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.systems.video.zsarcap import Embed, Prototypes, ZsarCapConfig

Split = Mapping[str, Sequence[str]]
"""Names of classes: those `training` (seen) and those `testing` (unseen)."""


@dataclass(frozen=True)
class SentenceReport:
    """Accuracy through sentences, in percent: `figures` by name, of several splits their means.

    `top-1`, `k neighbours` (one of the k nearest sentences is of the class, as officially counted) and
    `k classes` (the class is one of the k nearest). Where there is a split these are of the unseen classes
    among themselves, and those with `seen`, `unseen` and `harmonic mean` are with all classes to choose from.

    spread    their standard deviation over the splits; empty for one
    videos    how many were measured; `split` how many splits
    """

    model: str
    observers: int
    classes: int
    prototypes: int
    videos: int
    splits: int
    figures: dict[str, float]
    spread: dict[str, float]
    failed: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "classification through sentences",
            "model": self.model,
            "observers": self.observers,
            "classes": self.classes,
            "prototypes": self.prototypes,
            "videos": self.videos,
            "splits": self.splits,
            "figures": {name: round(value, 4) for name, value in self.figures.items()},
            "spread": {name: round(value, 4) for name, value in self.spread.items()},
            "failed": [one.to_json() for one in self.failed],
            "notes": list(self.notes),
            "ok": self.ok,
        }

    def __str__(self) -> str:
        lines = [
            f"Classification of {self.videos} videos through sentences of {self.observers} observers by "
            f"{self.model}: {self.prototypes} prototypes of {self.classes} classes, percent"
        ]
        for name, value in self.figures.items():
            spread = f" (+- {self.spread[name]:.2f})" if name in self.spread else ""
            lines.append(f"  {name:<32}{value:6.2f}{spread}")
        return "\n".join([*lines, *self.notes, *summary(self.failed, "were left out")])


def evaluate_through_sentences(
    truth: str | Path | ClassSet | Mapping[str, str] | None = None,
    classes: str | Path | Sequence[str] | None = None,
    *,
    captions: Observer | Sequence[Observer],
    ground_truth: Literal["map", "substring"] = "map",
    documents: Documents | None = None,
    definitions: Documents | None = None,
    split: str | Path | Split | Sequence[Split] | None = None,
    encoder: str | Path | Model | Embed = "builtin",
    selector: str | Path | Model | Embed | None = None,
    config: ZsarCapConfig | None = None,
    ks: Sequence[int] | None = None,
    encoding: str = "utf-8",
    device: str = "auto",
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    on_progress: Progress | None = None,
) -> SentenceReport:
    """Accuracy of classification through sentences on videos whose classes are known.

    truth         a folder per class, a table of videos and classes, or a mapping (or its JSON file) from a
                  video's name to its class. With `ground_truth="substring"` None: the videos are those of
                  the caption files, and the class is the first whose name is in the video's name, as in the
                  release; that calls some by wrong names, and notes say how many fit several classes
    classes       their names; None takes those of `truth`
    split         a mapping {"training": names, "testing": names} or its JSON file, or several: the classes
                  seen and unseen (`random_splits` draws some). None: all are unseen
    ks            for `k neighbours` and `k classes`; None: of 1, 5 and 10 those that can be

    The other arguments are those of `classify_through_sentences`.
    """
    from moviola.systems.video.zsarcap import squeeze

    observers = read_observers(captions)
    notes: list[str] = []
    failed: list[Skipped] = []
    if ground_truth == "substring":
        names = class_names(classes)
        labelled = _by_substring(truth, names, observers, notes)
    else:
        labelled, own = _labelled(truth, failed)
        names = class_names(classes if classes is not None else own)
    number = {squeeze(name): index for index, name in enumerate(names)}
    _check_known(sorted(set(labelled.values())), number, "The videos' classes")
    splits = [_numbered(one, number) for one in _splits(split)]
    space = SentenceSpace.open(encoder, selector, config, device=device, dtype=dtype, tokenizer=tokenizer)
    with counting_cuts() as cut:
        prototypes = space.prototypes(names, documents, definitions, encoding)
        told = space.tell(observers, list(labelled), failed, on_progress)
        if not told:
            raise UsageError("None of the labelled videos has a caption.", hint="Compare the names in both.")
        distance_NP = space.cap.distances(list(told.values()), prototypes)
    label_N = np.array([number[squeeze(labelled[path])] for path in told])
    rows = [_measure(distance_NP, prototypes, label_N, one, ks) for one in splits]
    shared = [name for name in rows[0] if all(name in row for row in rows)]
    values = {name: np.array([row[name] for row in rows]) for name in shared}
    return SentenceReport(
        space.name,
        len(observers),
        len(names),
        len(prototypes.owner_P),
        len(told),
        len(rows),
        {name: float(value.mean()) for name, value in values.items()},
        {name: float(value.std()) for name, value in values.items()} if len(rows) > 1 else {},
        tuple(failed),
        (*notes, *space.notes, *cut_note(cut)),
    )


def random_splits(classes: Sequence[str], unseen: int, *, runs: int = 10, seed: int = 0) -> list[Split]:
    """`runs` splits of the classes with `unseen` of them drawn at random to test on."""
    if not 1 <= unseen <= len(classes):
        raise UsageError(f"Of {len(classes)} classes {unseen} cannot be unseen.")
    generator = np.random.default_rng(seed)
    orders = [[classes[c] for c in generator.permutation(len(classes))] for _ in range(runs)]
    return [{"training": order[:-unseen], "testing": order[-unseen:]} for order in orders]


def _labelled(
    truth: str | Path | ClassSet | Mapping[str, str] | None, failed: list[Skipped]
) -> tuple[dict[Path, str], list[str]]:
    """The class of each video, and the names of all classes."""
    if truth is None:
        raise UsageError(
            "Nothing says which class the videos are of.",
            hint='Give a folder per class or a map, or ground_truth="substring" for the rule of the release.',
        )
    if isinstance(truth, str | Path) and Path(truth).suffix.lower() == ".json":
        truth = read_json(Path(truth))
    if isinstance(truth, Mapping):
        labelled = {Path(str(video)): str(name) for video, name in truth.items()}
        return labelled, sorted(set(labelled.values()))
    if isinstance(truth, list):
        raise UsageError('The JSON of classes holds a list, expected {"VIDEO": "CLASS", ...}.')
    found = truth if isinstance(truth, ClassSet) else read_classes(truth)
    failed += [Skipped(*one) for one in found.skipped]
    labelled = {}
    for index, name, media in found.stream(on_skip=lambda name, why: failed.append(Skipped(name, why))):
        if isinstance(media, Clip):
            labelled[media.path] = found.classes[found.labels_N[index]]
        else:
            failed.append(Skipped(name, "it is a picture without a name that captions could have"))
    return labelled, list(found.classes)


def _by_substring(
    truth: object, names: Sequence[str], observers: Sequence[Captions | Captioner], notes: list[str]
) -> dict[Path, str]:
    """The rule of the release, and a note about names that fit several classes."""
    from moviola.systems.video.zsarcap import substring_classes

    if truth is not None:
        raise UsageError("Give either a map of classes or ground_truth='substring', not both.")
    videos = [name for one in observers if isinstance(one, Mapping) for name in one]
    fitting = substring_classes(list(dict.fromkeys(videos)), names)
    several = {video: some for video, some in fitting.items() if len(some) > 1}
    if several:
        video, some = next(iter(several.items()))
        notes.append(
            f"The names of {len(several)} videos fit several classes, of which the first was taken: "
            f"{printable(video)} fits {', '.join(some)}. Give a map of their classes to be sure."
        )
    if lost := len(set(videos)) - len(fitting):
        notes.append(f"The names of {lost} videos fit no class: left out.")
    return {Path(video): some[0] for video, some in fitting.items()}


def _splits(split: str | Path | Split | Sequence[Split] | None) -> list[Split | None]:
    if split is None:
        return [None]
    read: Any = read_json(Path(split)) if isinstance(split, str | Path) else split
    given = [read] if isinstance(read, Mapping) else list(read)
    for one in given:
        if not isinstance(one, Mapping) or not {"training", "testing"} <= set(one):
            raise UsageError('A split is {"training": [names], "testing": [names]} of classes.')
    if not given:
        raise UsageError("There is no split in the list.")
    return given


def _numbered(split: Split | None, number: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """The numbers of seen and of unseen classes."""
    from moviola.systems.video.zsarcap import squeeze

    if split is None:
        return [], list(number.values())
    for part in ("training", "testing"):
        _check_known(split[part], number, f"The split's {part} classes")
    seen, unseen = ([number[squeeze(name)] for name in split[part]] for part in ("training", "testing"))
    if both := set(seen) & set(unseen):
        raise UsageError(f"{len(both)} classes of the split are both seen and unseen.")
    if not unseen:
        raise UsageError("The split has no testing classes.")
    return seen, unseen


def _check_known(names: Sequence[str], number: Mapping[str, int], what: str) -> None:
    from moviola.systems.video.zsarcap import squeeze

    if unknown := [name for name in names if squeeze(name) not in number]:
        raise UsageError(
            f"{what} are not all in the list of classes: {', '.join(unknown[:5])}.",
            hint="Add them to the classes, or mend their spelling.",
        )


def _measure(
    distance_NP: np.ndarray,
    prototypes: Prototypes,
    label_N: np.ndarray,
    split: tuple[Sequence[int], Sequence[int]],
    ks: Sequence[int] | None,
) -> dict[str, float]:
    seen, unseen = split
    made = _accuracy(distance_NP, prototypes, label_N, unseen, unseen, ks)
    if seen:
        both = [*seen, *unseen]
        parts = {
            name: _accuracy(distance_NP, prototypes, label_N, some, both, ks)
            for name, some in (("seen", seen), ("unseen", unseen))
        }
        for figure, value in parts["seen"].items():
            other = parts["unseen"][figure]
            made |= {f"seen, {figure}": value, f"unseen, {figure}": other}
            made[f"harmonic mean, {figure}"] = harmonic_mean(value, other)
    return made


def _accuracy(
    distance_NP: np.ndarray,
    prototypes: Prototypes,
    label_N: np.ndarray,
    shown: Sequence[int],
    candidates: Sequence[int],
    ks: Sequence[int] | None,
) -> dict[str, float]:
    """Of the videos of the classes `shown`, with `candidates` to choose from."""
    from moviola.systems.video.zsarcap import class_distances, neighbour_hits

    rows, columns = np.isin(label_N, shown), np.isin(prototypes.owner_P, candidates)
    if not rows.any():
        raise UsageError("No video is of the classes to be measured.", hint="Check the split and the truth.")
    distance, owner_P, label = distance_NP[rows][:, columns], prototypes.owner_P[columns], label_N[rows]
    sentences = [k for k in (1, 5, 10) if k <= len(owner_P)] if ks is None else ks
    distinct = [k for k in sentences if k <= len(candidates)]
    hits = {k: neighbour_hits(distance, owner_P, label, k) / len(label) * 100 for k in sentences}
    top = topk_accuracy(-class_distances(distance, owner_P, len(prototypes.classes)), label, distinct)
    return {
        **({"top-1": hits[1]} if 1 in hits else {}),
        **{f"{k} neighbours": value for k, value in hits.items() if k > 1},
        **{f"{k} classes": top[f"top{k}"] for k in distinct if k > 1},
    }
