"""What observers say of videos: caption files, one an observer, or captioners that are asked.

A caption file is JSON as dense captioners write it, `{"results": {"v_NAME": [{"sentence": ...}]}}`, or
`{"NAME": "a sentence" or ["more", "than one"]}`; or a table (CSV, JSON Lines, Parquet ...) with a column that
names the video and one of captions, a sentence a row. A name is the video's path, the end of it, its file
name with or without ending, or that with `v_` before it.

Axis letters: T frames, H height, W width, C channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moviola.data.tables import ID_COLUMNS, MEDIA_COLUMNS, TEXT_COLUMNS, Table, read_json, text_cell
from moviola.media import Video
from moviola.types import MediaError, UsageError, printable

Captions = Mapping[str, Sequence[str]]
"""One observer's sentences by the video's name, the first the most important."""


class Captioner(Protocol):
    """An observer that is asked: a video's path -> sentences about it, the most important first."""

    def __call__(self, video: Path, /) -> Sequence[str]: ...


def of_frames(describe: Callable[[np.ndarray, np.ndarray], Sequence[str]], *, frames: int = 12) -> Captioner:
    """A captioner from a function of evenly spread frames_THWC (uint8 RGB) and their times_T in seconds."""

    def captioner(video: Path, /) -> Sequence[str]:
        with Video(video) as opened:
            batch = opened.uniform(frames)
        return describe(batch.frames_THWC, batch.times_T)

    return captioner


def read_captions(source: str | Path) -> dict[str, tuple[str, ...]]:
    """One observer's file. Videos of which it says nothing are not in it."""
    path = Path(source)
    found = _json_captions(path) if path.suffix.lower() == ".json" else _table_captions(path)
    if not any(found.values()):
        raise UsageError(
            f"{printable(path)} holds no captions.",
            hint='Expected {"results": {"v_NAME": [{"sentence": "..."}]}}, {"NAME": "..."}, or a table with '
            "a video and a caption a row.",
        )
    return {name: sentences for name, sentences in found.items() if sentences}


def _json_captions(path: Path) -> dict[str, tuple[str, ...]]:
    data = read_json(path)
    if isinstance(data, list):
        return _table_captions(path)
    if isinstance(data, dict) and isinstance(data.get("results"), dict):
        data = data["results"]
    if not isinstance(data, dict):
        raise UsageError(f"{printable(path)} holds a JSON {type(data).__name__}, expected an object.")
    return {str(name): _sentences(value, f"{printable(path)}, {name!r}") for name, value in data.items()}


def _sentences(value: Any, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    texts = [one.get("sentence") if isinstance(one, dict) else one for one in values]
    if any(not isinstance(text, str) for text in texts):
        raise UsageError(
            f'{where}: expected sentences, or objects with a "sentence", got {_kinds(values)}.',
            hint="Mend the file.",
        )
    return text_cell(texts)


def _kinds(values: Sequence[Any]) -> str:
    return ", ".join(sorted({type(value).__name__ for value in values}))


def _table_captions(path: Path) -> dict[str, tuple[str, ...]]:
    table = Table(path)
    video = table.column(None, [*MEDIA_COLUMNS, *ID_COLUMNS], "videos", "video")
    text = table.column(None, TEXT_COLUMNS, "captions", "caption")
    made: dict[str, list[str]] = defaultdict(list)
    for _, row in table.rows([video, text]):
        if row.get(video) not in (None, ""):
            made[str(row[video])].extend(text_cell(row.get(text)))
    return {name: tuple(sentences) for name, sentences in made.items()}


def names_of(path: Path) -> list[str]:
    """The names by which a caption file may call a video, the most telling first."""
    ends = [Path(*path.parts[n:]) for n in range(len(path.parts))]
    full = [name for end in ends for name in (end.as_posix(), end.with_suffix("").as_posix())]
    return list(dict.fromkeys([*full, f"v_{path.name}", f"v_{path.stem}"]))


def match_names(captions: Captions, videos: Sequence[Path]) -> dict[Path, str]:
    """Of each video the name that the captions have for it; videos without one are left out.

    `UsageError` where one name fits several videos.
    """
    matched: dict[Path, str] = {}
    taken: dict[str, Path] = {}
    for video in videos:
        name = next((name for name in names_of(video) if name in captions), None)
        if name is None:
            continue
        if name in taken:
            raise UsageError(
                f"The captions of {name!r} fit two videos: {printable(taken[name])} and {printable(video)}.",
                hint="Name the videos of the caption file by folder and file.",
            )
        matched[video], taken[name] = name, video
    return matched


def observe(
    observer: Captions | Captioner, videos: Sequence[Path], *, on_skip: Callable[[Path, str], None]
) -> dict[Path, tuple[str, ...]]:
    """What one observer says of these videos; those it says nothing of are left out.

    A video that a captioner cannot read goes to `on_skip(path, reason)`.
    """
    said: dict[Path, Sequence[str]] = {}
    if isinstance(observer, Mapping):
        said.update((video, observer[name]) for video, name in match_names(observer, videos).items())
    else:
        for video in videos:
            try:
                said[video] = observer(video)
            except MediaError as error:
                on_skip(video, error.reason)
    kept = {
        video: text_cell([sentences] if isinstance(sentences, str) else list(sentences))
        for video, sentences in said.items()
    }
    return {video: sentences for video, sentences in kept.items() if sentences}
