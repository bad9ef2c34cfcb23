"""Lists of labelled clips as the action recognition benchmarks release them.

    kinetics   CSV with label, youtube_id, time_start, time_end, split. Files are `ID_000010_000020.mp4` (cut,
               as crawlers name them) or `ID.mp4`: of one longer than its clip only the clip is read
    ucf101     trainlist01.txt, testlist01.txt (`Archery/v_Archery_g08_c01.avi 3`), and classInd.txt
    hmdb51     CLASS_test_split1.txt, a line a video: 1 to train, 2 to test, 0 neither
    ssv2       something-something-v2-train.json and labels.json beside it; `[something]` loses its brackets
    numbered   `path number` a line (mmaction, VideoMAE, ViFi-CLIP), class names in a file of their own

Files are looked for where the format puts them below the media folder, then by name anywhere in it, then by
name with any ending (UCF101 converted to .mp4).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moviola.data.classes import ClassSet
from moviola.data.media_set import Finder, file_stream
from moviola.data.tables import read_json
from moviola.media import Video, media_kind
from moviola.types import Clip, MediaError, TimeSpan, UsageError, printable

Layout = Literal["kinetics", "ucf101", "hmdb51", "ssv2", "numbered"]
LAYOUTS: tuple[Layout, ...] = ("kinetics", "ucf101", "hmdb51", "ssv2", "numbered")
ListNames = str | Path | Mapping[str, str] | Sequence[str]
_HMDB = re.compile(r"(?P<label>.+)_test_split(?P<number>\d)\.txt")
_UCF = re.compile(r"(?P<split>train|test)list(?P<number>\d\d)\.txt")
_UCF_FILE = re.compile(r"v_(?P<label>[A-Za-z]+)_g\d+_c\d+")
_SLACK = 1.0  # seconds by which a cut file may be longer than the clip it was cut to


@dataclass(frozen=True, slots=True)
class _Row:
    """A line: its class, and where its file may lie, or the `uncut` video in which the clip is `span`."""

    id: str
    label: str
    files: tuple[str, ...]
    uncut: tuple[str, ...] = ()
    span: TimeSpan | None = None


@dataclass(frozen=True, slots=True)
class _List:
    """Lines, and the name of each class by the key that lines have, in the order of the class numbers."""

    rows: Sequence[_Row]
    names: Mapping[str, str]
    split: str | None


def list_layout(source: str | Path) -> Layout | None:
    """Which released list this file or folder is; None for anything else (a table, a folder per class)."""
    path = Path(source)
    if path.is_dir():
        held = {one.name for one in path.iterdir() if one.is_file()}
        if any(_UCF.fullmatch(name) for name in held):
            return "ucf101"
        return "hmdb51" if any(_HMDB.fullmatch(name) for name in held) else None
    if _UCF.fullmatch(path.name):
        return "ucf101"
    if _HMDB.fullmatch(path.name):
        return "hmdb51"
    ending = path.suffix.lower()
    if ending == ".json" and path.is_file():
        data = read_json(path)
        rows = data if isinstance(data, list) else []
        return "ssv2" if rows and isinstance(rows[0], dict) and {"id", "template"} <= set(rows[0]) else None
    if ending == ".csv" and path.is_file():
        return "kinetics" if "youtube_id" in next(csv.reader(_lines(path)[:1])) else None
    if ending in (".txt", ".list") and path.is_file():
        return "numbered" if re.search(r"\s\d+\s*$", _lines(path)[0]) else None
    return None


def read_actions(
    source: str | Path,
    *,
    media_root: str | Path | None = None,
    layout: Layout | None = None,
    split: str | None = None,
    fold: int = 1,
    names: ListNames | None = None,
) -> ClassSet:
    """The clips of a released list that are under `media_root` (default: the list's own folder).

    layout  which format (default: told by the file)
    split   train, val or test: of a folder of lists, or of the CSV's `split` column
    fold    which of the three splits of UCF101 and HMDB51, where `source` is their folder
    names   class names by key, in the order of the class numbers, or a file with either: one a line,
            `number name`, CSV with id and name, or JSON. Lists of numbers need them

    What is in the list and not on the disk stands in `skipped`. Raises `UsageError` for a list of another
    format, labels that have no class (which it names), and where not one file is there.
    """
    path = Path(source)
    if not path.exists():
        raise UsageError(f"There is no list at {printable(path)}.", hint="Check the path.")
    layout = layout or list_layout(path)
    if layout is None:
        raise UsageError(
            f"{printable(path)} is no list of clips that is known.",
            hint=f"Say which with layout= (--layout): {', '.join(LAYOUTS)}.",
        )
    found = _READERS[layout](path, split, fold, names)
    if not found.rows:
        of_split = "" if split is None else f" of the split {split!r}"
        raise UsageError(f"{printable(path)} lists no clip{of_split}.")
    root = Path(media_root) if media_root is not None else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise UsageError(f"There is no folder of media at {printable(root)}.")
    return _class_set(path, found, root)


def _class_set(source: Path, found: _List, root: Path) -> ClassSet:
    number = {key: index for index, key in enumerate(found.names)}
    strange = sorted({row.label for row in found.rows} - set(number))
    if strange:
        raise UsageError(
            f"{len(strange)} labels of {printable(source)} are not among its {len(number)} classes: "
            f"{', '.join(strange[:10])}.",
            hint="Give all classes with names= (--classes).",
        )
    finder = Finder(root)
    clips: list[Clip] = []
    ids: list[str] = []
    labels: list[int] = []
    skipped: list[tuple[str, str]] = []
    for row in found.rows:
        place = finder.find(*row.files)
        span = None
        if isinstance(place, str) and row.uncut:
            whole = finder.find(*row.uncut)
            if isinstance(whole, Path):
                place, span = whole, _span_in(whole, row.span)
        if isinstance(place, str):
            skipped.append((row.id, place))
            continue
        clips.append(Clip(place, span))
        ids.append(row.id)
        labels.append(number[row.label])
    if not clips:
        raise UsageError(
            f"Of the {len(found.rows)} clips of {printable(source)} not one is under {printable(root)}; "
            f"the first would be {printable(found.rows[0].files[0])}.",
            hint="Say where the files are with media_root= (--media-root).",
        )
    return ClassSet(
        source,
        ids,
        file_stream(clips, ids),
        [clip.path for clip in clips],
        classes=tuple(found.names.values()),
        labels=labels,
        split=found.split,
        skipped=skipped,
    )


def _span_in(path: Path, span: TimeSpan | None) -> TimeSpan | None:
    """The clip's place in its file; None where the file is the clip, or cannot be read (reported later)."""
    try:
        longer = span is not None and Video(path).duration > span.duration + _SLACK
    except MediaError:
        return None
    return span if longer else None


# --------------------------------------------------------------------------------------------------
# One reader a format: (file or folder, split, fold, names) -> the list
# --------------------------------------------------------------------------------------------------


def _kinetics(path: Path, split: str | None, fold: int, names: ListNames | None) -> _List:
    rows: list[_Row] = []
    for number, line in enumerate(csv.DictReader(_lines(path)), 2):
        if split is not None and not _same_split(line.get("split") or "", split):
            continue
        label, name = line.get("label"), line.get("youtube_id")
        if not label or not name:
            raise UsageError(
                f"Line {number} of {printable(path)} has no label and youtube_id.",
                hint="Test lists without labels cannot be learned or measured.",
            )
        try:
            start, end = float(line["time_start"]), float(line["time_end"])
            span = TimeSpan(start, end)
        except (KeyError, TypeError, ValueError, UsageError):
            raise UsageError(f"Line {number} of {printable(path)} has no time_start and time_end.") from None
        folders = dict.fromkeys((label, label.replace(" ", "_"), "."))
        cut = f"{name}_{int(start):06d}_{int(end):06d}"
        rows.append(
            _Row(
                cut,
                label,
                (*(f"{folder}/{cut}.mp4" for folder in folders), cut),
                (*(f"{folder}/{name}.mp4" for folder in folders), name),
                span,
            )
        )
    keys = sorted({row.label for row in rows})
    return _List(rows, _named(names, {key: _spaced(key) for key in keys}), split)


def _ucf101(path: Path, split: str | None, fold: int, names: ListNames | None) -> _List:
    if path.is_dir():
        split = "train" if split is None else split
        if split not in ("train", "test"):
            raise UsageError(f"UCF101 has the splits train and test, not {split!r}.")
        path = _existing(path / f"{split}list{fold:02d}.txt")
    elif split is None and (told := _UCF.fullmatch(path.name)):
        split = told["split"]
    index = path.parent / "classInd.txt"
    keys = list(_numbered_names(index).values()) if index.is_file() else []
    known = {key.casefold(): key for key in keys}
    rows: list[_Row] = []
    for line in _lines(path):
        name = re.sub(r"\s+\d+$", "", line)
        place = Path(name)
        label = place.parent.name
        if not label:  # a file without its folder: the class is in its name
            told = _UCF_FILE.match(place.name)
            if told is None:
                raise UsageError(f"{printable(path)}: {printable(name)} tells no class of UCF101.")
            label = told["label"]
        label = known.get(label.casefold(), label)
        rows.append(_Row(name, label, (name, place.name, place.stem)))
    keys = keys or sorted({row.label for row in rows})
    return _List(rows, _named(names, {key: _camel(key) for key in keys}), split)


def _hmdb51(path: Path, split: str | None, fold: int, names: ListNames | None) -> _List:
    if path.is_file() and (told := _HMDB.fullmatch(path.name)):
        path, fold = path.parent, int(told["number"])
    split = "train" if split is None else split
    wanted = {"train": "1", "test": "2"}.get(split)
    if wanted is None:
        raise UsageError(f"HMDB51 has the splits train and test, not {split!r}.")
    rows: list[_Row] = []
    keys: list[str] = []
    for file in sorted(path.iterdir()):
        told = _HMDB.fullmatch(file.name)
        if told is None or int(told["number"]) != fold:
            continue
        label = told["label"]
        keys.append(label)
        for line in _lines(file, empty=True):
            name, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2") or not name:
                raise UsageError(f"{printable(file)}: expected NAME and 0, 1 or 2, got {printable(line)!r}.")
            if mark == wanted:
                name = name.strip()
                rows.append(_Row(name, label, (f"{label}/{name}", name, Path(name).stem)))
    if not keys:
        raise UsageError(f"{printable(path)} has no lists of split {fold}.", hint="There are 1, 2 and 3.")
    return _List(rows, _named(names, {key: _spaced(key) for key in keys}), split)


def _ssv2(path: Path, split: str | None, fold: int, names: ListNames | None) -> _List:
    data = read_json(path)
    rows: list[_Row] = []
    for row in data if isinstance(data, list) else []:
        name, template = (row.get("id"), row.get("template")) if isinstance(row, dict) else (None, None)
        if name is None or not template:
            raise UsageError(
                f"{printable(path)}: a clip has no id and template ({printable(row)}).",
                hint="Test lists without labels cannot be learned or measured.",
            )
        files = (f"{name}.webm", f"{name}.mp4", str(name))
        rows.append(_Row(str(name), _bare(template), files))
    beside = [path.with_name(one) for one in ("labels.json", "something-something-v2-labels.json")]
    stored = next((one for one in beside if one.is_file()), None)
    if stored is None and isinstance(names, str | Path) and Path(names).suffix == ".json":
        stored, names = Path(names), None
    numbers = read_json(stored) if stored is not None else {row.label: 0 for row in rows}
    if not isinstance(numbers, dict):
        raise UsageError(f"{printable(stored)} holds no labels.", hint='Expected {"label": "number", ...}.')
    keys = sorted(numbers, key=lambda key: (int(numbers[key]), key))
    return _List(rows, _named(names, {_bare(key): _bare(key) for key in keys}), split)


def _numbered(path: Path, split: str | None, fold: int, names: ListNames | None) -> _List:
    if names is None:
        raise UsageError(
            f"{printable(path)} has class numbers, not names.",
            hint="Name the classes in the order of their numbers with names= (--classes FILE).",
        )
    rows: list[_Row] = []
    for number, line in enumerate(_lines(path), 1):
        parts = re.fullmatch(r"(?P<name>.+?)[\s,]+(?P<label>\d+)", line)
        if parts is None or media_kind(parts["name"]) is None:
            raise UsageError(
                f"Line {number} of {printable(path)}: expected the path of a video and a class number, got "
                f"{printable(line)!r}.",
                hint="Lists of folders of frames (path, frames, number) are not read: name the videos.",
            )
        name = Path(parts["name"])
        rows.append(_Row(str(name), str(int(parts["label"])), (str(name), name.name, name.stem)))
    return _List(rows, _named(names, None), split)


_READERS: Mapping[Layout, Callable[[Path, str | None, int, ListNames | None], _List]] = {
    "kinetics": _kinetics,
    "ucf101": _ucf101,
    "hmdb51": _hmdb51,
    "ssv2": _ssv2,
    "numbered": _numbered,
}

# --------------------------------------------------------------------------------------------------
# Class names
# --------------------------------------------------------------------------------------------------


def _named(given: ListNames | None, own: dict[str, str] | None) -> dict[str, str]:
    """Names by key: the list's own, or those given for its keys; numbers are the keys where it has none."""
    if given is None:
        return own or {}
    if isinstance(given, str | Path):
        given = _names_of(Path(given))
    if isinstance(given, Mapping):
        chosen = {str(key): str(value) for key, value in given.items()}
        numbered = own is not None and all(key.isdecimal() for key in chosen)
        return _in_order(list(chosen.values()), own) if numbered else chosen
    return _in_order([str(name) for name in given], own)


def _in_order(names: Sequence[str], own: dict[str, str] | None) -> dict[str, str]:
    if own is None:
        return {str(number): name for number, name in enumerate(names)}
    if set(own) <= set(names):  # the labels themselves, perhaps with some that no clip here has
        return {name: own.get(name, name) for name in names}
    if len(names) != len(own):
        raise UsageError(f"There are {len(names)} names for the {len(own)} classes of the list.")
    return dict(zip(own, names))


def _names_of(path: Path) -> Mapping[str, str] | Sequence[str]:
    """Names in a file, by number where it has numbers."""
    if path.suffix.lower() == ".json":
        data: Any = read_json(path)
        if isinstance(data, dict):  # {"0": "name"}, or {"name": "0"} as Something-Something has it
            turned = all(str(value).isdecimal() for value in data.values())
            pairs = [(str(v), str(k)) if turned else (str(k), str(v)) for k, v in data.items()]
            return dict(sorted(pairs, key=lambda pair: int(pair[0])) if turned else pairs)
        return [str(name) for name in data]
    lines = _lines(path)
    if path.suffix.lower() == ".csv":
        return {row["id"]: row["name"] for row in csv.DictReader(lines) if row.get("id") and row.get("name")}
    return _numbered_names(path) if all(re.match(r"\d+\s+\S", line) for line in lines) else lines


def _numbered_names(path: Path) -> dict[str, str]:
    pairs = [line.split(None, 1) for line in _lines(path)]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _lines(path: Path, *, empty: bool = False) -> list[str]:
    """Lines without space around them, empty ones left out; a list of none is an error unless `empty`."""
    try:
        text = _existing(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The list {printable(path)} cannot be read ({error}).") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines and not empty:
        raise UsageError(f"The list {printable(path)} is empty.")
    return lines


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UsageError(f"There is no list at {printable(path)}.")
    return path


def _same_split(told: str, wanted: str) -> bool:
    short = {"validate": "val", "validation": "val"}
    return short.get(told, told) == short.get(wanted, wanted)


def _bare(template: str) -> str:
    """Something-Something's "Holding [something]" as its labels have it."""
    return template.replace("[", "").replace("]", "")


def _spaced(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _camel(name: str) -> str:
    """UCF101's ApplyEyeMakeup as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
