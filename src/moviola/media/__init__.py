"""Pictures, video, sound and subtitles, in and out. The only place that knows PyAV.

Names are imported when first used, so `import moviola.media` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moviola.media.pictures import jpeg, on_white, read_picture
    from moviola.media.subtitles import Subtitle, read_subtitles
    from moviola.media.video import FrameBatch, StreamInfo, Video
    from moviola.media.files import PICTURES, VIDEOS, Found, media_kind, walk
    from moviola.media.writer import VideoWriter, cut, write_video

_HOME = {
    "FrameBatch": "video",
    "Found": "files",
    "PICTURES": "files",
    "StreamInfo": "video",
    "Subtitle": "subtitles",
    "VIDEOS": "files",
    "Video": "video",
    "VideoWriter": "writer",
    "cut": "writer",
    "jpeg": "pictures",
    "media_kind": "files",
    "on_white": "pictures",
    "read_picture": "pictures",
    "read_subtitles": "subtitles",
    "walk": "files",
    "write_video": "writer",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
