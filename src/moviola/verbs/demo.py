"""`demo`: index something small, search it three times, write the report. The README's first command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moviola.types import Clip, UsageError

if TYPE_CHECKING:
    from moviola.clip.loaded import Model
    from moviola.verbs.common import Progress
    from moviola.verbs.index import IndexReport
    from moviola.verbs.search import Results

SEED = 4
VIDEOS, PICTURES, QUERIES = 6, 12, 3
OWN_QUERIES = ("a person", "an animal", "a car on a road")
"""What is asked of a user's own folder when nothing else is given."""


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made: the index, what went into it, the searches and the HTML page.

    `planted` says for each query where its event was put; empty for a user's own files.
    """

    index: Path
    page: Path
    indexed: IndexReport
    searches: tuple[Results, ...]
    planted: tuple[Clip, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "index": str(self.index),
            "report": str(self.page),
            "indexed": self.indexed.to_json(),
            "searches": [{"query": r.query, **r.to_json()} for r in self.searches],
            "planted": [
                {"file": str(clip.path), "start": clip.span.start, "end": clip.span.end}
                for clip in self.planted
                if clip.span is not None
            ],
        }


def make_media(folder: Path) -> dict[str, Clip]:
    """Write a few made videos and pictures into `folder`; three queries and where their events are.

    Files that are there already are kept: the same seed would write the same ones.
    """
    from PIL import Image

    from moviola.data.world import WorldConfig, long_video, picture, write

    folder.mkdir(parents=True, exist_ok=True)
    planted: dict[str, Clip] = {}
    for n in range(VIDEOS):
        made = long_video(SEED, n, duration=40.0, config=WorldConfig(size=160, rate=8.0))
        path = folder / f"made-{n + 1}.mp4"
        if n < QUERIES:
            planted[made.events[0].held_out[0]] = Clip(path, made.events[0].span)
        if not path.exists():
            write(made, path)
    for n in range(PICTURES):
        path = folder / f"scene-{n + 1:02d}.png"
        if not path.exists():
            Image.fromarray(picture(SEED, n, size=160).pixels_HWC).save(path)
    return planted


def demo(
    to: str | Path = "demo-out",
    *,
    media: str | Path | None = None,
    queries: Sequence[str] | None = None,
    model: str | Path | Model = "builtin",
    k: int = 5,
    on_progress: Progress | None = None,
) -> Demo:
    """Index made videos and pictures (or those under `media`) at `to`, search, write `to/report.html`.

    Run again, it goes on with the same index. Raises what `index` and `search` raise.
    """
    from moviola.verbs.index import index
    from moviola.verbs.report import report
    from moviola.verbs.search import search

    to = Path(to)
    planted: dict[str, Clip] = {}
    if media is None:
        source = to / "media"
        planted = make_media(source)
        asked = tuple(queries or planted)
    else:
        source = Path(media)
        if not source.exists():
            raise UsageError(f"There is no {source}.", hint="MEDIA must be a folder with videos or pictures.")
        asked = tuple(queries or OWN_QUERIES)
    # one index per source, so that changing MEDIA does not mix the demo's files with the user's
    place = to / ("index" if media is None else f"index-{source.resolve().name or 'media'}")
    indexed = index(source, place, model=model, every=0.5 if media is None else None, on_progress=on_progress)
    searches = tuple(search(place, query, k=k) for query in asked)
    page = report(searches, to / "report.html", title="Moments found by Moviola")
    known = tuple(planted[query] for query in asked if query in planted)
    return Demo(place, page, indexed, searches, known)
