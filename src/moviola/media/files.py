"""Which files under the given paths are pictures and videos, in an order that never changes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moviola.types import MediaKind

_PICTURES = "jpg jpeg jpe jfif png webp gif bmp dib tif tiff ppm pgm pbm pnm tga avif jp2"
_VIDEOS = (
    "mp4 m4v mov qt mkv webm avi mpg mpeg m2v mpe ts mts m2ts vob wmv asf flv f4v 3gp 3g2 ogv mxf mjpeg mjpg "
    "divx dv h264 264 h265 265 hevc ivf y4m nut"
)
PICTURES = frozenset("." + name for name in _PICTURES.split())
VIDEOS = frozenset("." + name for name in _VIDEOS.split())


@dataclass(frozen=True, slots=True)
class Found:
    """A file to index: `path` as reached from the paths given, `size` in bytes, `mtime_ns` as stat has it."""

    path: Path
    kind: MediaKind
    size: int
    mtime_ns: int


def media_kind(path: str | Path) -> MediaKind | None:
    """Picture or video by the name's ending; None for anything else."""
    ending = os.path.splitext(os.fspath(path))[1].lower()  # noqa: PTH122 (also for names like ".mp4")
    if ending in PICTURES:
        return "picture"
    return "video" if ending in VIDEOS else None


def walk(
    paths: str | Path | Iterable[str | Path], *, on_skip: Callable[[Path, str], None] | None = None
) -> Iterator[Found]:
    """Every picture and video under `paths` (files or folders), sorted within each folder.

    Links are followed, but no folder is entered twice and no file given twice, so loops end. Hidden
    files and folders below the given paths and files that are no media are passed over silently.
    What was named but is no media, and what is missing, broken or unreadable, goes to
    `on_skip(path, reason)`.
    """
    skip = on_skip if on_skip is not None else _silent
    folders: set[tuple[int, int]] = set()
    files: set[str] = set()
    for given in [paths] if isinstance(paths, (str, Path)) else paths:
        yield from _visit(Path(given), True, skip, folders, files)


def _transport_stream(path: Path) -> bool:
    """True for MPEG-TS, False for TypeScript, which has the same ending."""
    try:
        with path.open("rb") as file:
            return file.read(5).rfind(b"G") in (0, 4)
    except OSError:
        return True


def _silent(path: Path, reason: str) -> None:
    """Where the caller does not ask what was skipped."""


def _visit(
    top: Path,
    named: bool,
    skip: Callable[[Path, str], None],
    folders: set[tuple[int, int]],
    files: set[str],
) -> Iterator[Found]:
    # A stack instead of recursion: folders may be nested deeper than Python's limit.
    stack = [(top, named)]
    while stack:
        path, named = stack.pop()
        kind = media_kind(path)
        try:
            found = path.stat()
        except FileNotFoundError:
            broken = path.is_symlink()
            if named or kind is not None or broken:
                skip(path, "the link leads nowhere" if broken else "there is no such file or folder")
            continue
        except (OSError, ValueError) as error:
            # ELOOP (a link to itself), no permission, a name the system cannot take.
            skip(path, f"it cannot be reached ({getattr(error, 'strerror', None) or error})")
            continue
        if stat.S_ISDIR(found.st_mode):
            key = (found.st_dev, found.st_ino)
            if key in folders:
                continue
            folders.add(key)
            try:
                names = sorted(os.listdir(path), key=os.fsencode, reverse=True)  # noqa: PTH208 (names only)
            except OSError as error:
                skip(path, f"the folder cannot be read ({error.strerror})")
                continue
            stack.extend((path / name, False) for name in names if not name.startswith("."))
            continue
        if kind is None:
            if named:
                skip(path, "its name does not end like a picture's or a video's")
            continue
        if path.suffix.lower() == ".ts" and not named and not _transport_stream(path):
            continue
        if not stat.S_ISREG(found.st_mode):
            skip(path, "it is a pipe, socket or device, not a file")
            continue
        if not os.access(path, os.R_OK):
            skip(path, "there is no permission to read it")
            continue
        real = os.path.realpath(path)
        if real not in files:
            files.add(real)
            yield Found(path, kind, found.st_size, found.st_mtime_ns)
