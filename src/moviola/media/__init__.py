"""Pictures, video, sound and subtitles, in and out. The only place that knows PyAV.

Names are imported when first used, so `import moviola.media` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moviola.media.batches import FrameBatch
    from moviola.media.files import PICTURES, VIDEOS, Found, media_kind, walk
    from moviola.media.pictures import jpeg, on_white, read_picture
    from moviola.media.subtitles import Subtitle, read_subtitles, sidecar_marks
    from moviola.media.video import StreamInfo, Video
    from moviola.media.writer import VideoWriter, cut, write_video

__all__ = [
    "PICTURES",
    "VIDEOS",
    "Found",
    "FrameBatch",
    "StreamInfo",
    "Subtitle",
    "Video",
    "VideoWriter",
    "cut",
    "jpeg",
    "media_kind",
    "on_white",
    "read_picture",
    "read_subtitles",
    "sidecar_marks",
    "walk",
    "write_video",
]

_HOME = {
    "batches": ("FrameBatch",),
    "files": ("PICTURES", "VIDEOS", "Found", "media_kind", "walk"),
    "pictures": ("jpeg", "on_white", "read_picture"),
    "subtitles": ("Subtitle", "read_subtitles", "sidecar_marks"),
    "video": ("StreamInfo", "Video"),
    "writer": ("VideoWriter", "cut", "write_video"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
