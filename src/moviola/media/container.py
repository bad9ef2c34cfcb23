"""Opening a media file with PyAV: what to refuse, how to say why, and where its clock starts.

Everything that reads a video, its sound or its subtitles opens it here, so that every bad file is
met with the same words and every container is closed again (PyAV leaks one that is not).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from moviola.types import MediaError

_CONVERT = "If it plays elsewhere, convert it first: ffmpeg -i INPUT OUTPUT.mp4"

# Bytes read at once where a file has to be read through Python (names that are not valid UTF-8).
_PYTHON_BUFFER = 1 << 20


def check_file(path: Path) -> int:
    """The file's size in bytes, or `MediaError` if it is missing, empty, unreadable or no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise MediaError(path, "there is no such file.", hint="Check the path.") from None
    except OSError as error:
        raise MediaError(path, f"the file cannot be reached ({error.strerror}).") from error
    if stat.S_ISDIR(found.st_mode):
        raise MediaError(path, "expected a media file, got a folder.", hint="Name the files inside it.")
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(path, "expected a plain file, got a pipe, socket or device.")
    if found.st_size == 0:
        raise MediaError(path, "the file is empty (0 bytes).", hint="Copy or download it again.")
    return found.st_size


def _looks_like_text(head: bytes) -> bool:
    """True when the first bytes are readable text: no known video format starts that way.

    This also keeps playlists (HLS, concat scripts) from being followed to other files or addresses.
    """
    if head.startswith(b"YUV4MPEG2"):
        return False
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    if any(byte < 9 or 13 < byte < 27 or 27 < byte < 32 for byte in head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) > 4
    return True


def _explain(path: Path, head: bytes, size: int, error: Exception) -> MediaError:
    """Words for a file FFmpeg would not open, from its first bytes."""
    if not head.strip(b"\0"):
        return MediaError(path, "the file holds only zero bytes.", hint="Copy or download it again.")
    if head[4:8] in (b"ftyp", b"mdat", b"moov", b"wide", b"free", b"skip"):
        return MediaError(
            path,
            "this MP4 or MOV file is cut off or damaged: its table of frames (moov) is missing or broken.",
            hint="It was probably not finished when it was recorded or copied; copy it again.",
        )
    if isinstance(error, av.EOFError):
        return MediaError(
            path,
            f"the file ends before its first frame ({size} bytes).",
            hint="It was probably not finished when it was recorded or copied; copy it again.",
        )
    return MediaError(
        path,
        f"expected a video, got {size} bytes that no known video format explains ({reason(error)}).",
        hint=_CONVERT,
    )


def reason(error: Exception) -> str:
    """FFmpeg's own short sentence for an error, without the path."""
    return str(getattr(error, "strerror", None) or type(error).__name__)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A PyAV input container that is closed on every way out. `MediaError` when it cannot be opened."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as error:
        raise MediaError(path, f"the file cannot be read ({error.strerror}).") from error
    if _looks_like_text(head):
        raise MediaError(
            path, "expected a video, got a text file.", hint="Check the file's name and content."
        )

    # An absolute path is never taken for a protocol ("a:b.mp4"). FFmpeg wants UTF-8 names: a name
    # that is not is read through Python instead, which costs a little speed.
    absolute = os.path.abspath(path)  # noqa: PTH100 (Path.absolute keeps "..", resolve follows links)
    source: Any = absolute
    through_python = None
    try:
        absolute.encode("utf-8")
    except UnicodeEncodeError:
        source = through_python = path.open("rb")
    try:
        try:
            container = av.open(
                source,
                metadata_errors="replace",
                container_options={"protocol_whitelist": "file"},
                buffer_size=_PYTHON_BUFFER,
            )
        except (av.FFmpegError, ValueError, OSError) as error:
            raise _explain(path, head, size, error) from error
        try:
            yield container
        finally:
            container.close()
    finally:
        if through_python is not None:
            through_python.close()


def _attached_picture(stream: Any) -> bool:
    """True for cover art, which FFmpeg shows as a video stream of one frame."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def video_stream(container: Any, path: Path) -> Any:
    """The first real video stream (cover art is none), or `MediaError`."""
    others = sorted({stream.type for stream in container.streams if stream.type in ("audio", "subtitle")})
    for stream in container.streams.video:
        if _attached_picture(stream):
            continue
        if stream.codec_context is None:
            raise MediaError(
                path, "the video stream uses a codec that this FFmpeg cannot decode.", hint=_CONVERT
            )
        return stream
    has = f"only {' and '.join(others)}" if others else "nothing to show"
    raise MediaError(path, f"expected a video stream, got {has}.")


def origin(container: Any, video: Any) -> Fraction:
    """The moment called 0 s, in the file's own seconds.

    It is the start of the earliest stream, as in players and the ffmpeg command, so that frames,
    sound and subtitles share one clock; where sound starts a little before 0 (encoder priming), 0
    stays 0 unless the video itself starts earlier.
    """
    tick = video.time_base if video is not None else None
    starts = None if video is None or video.start_time is None else video.start_time * tick
    if container.start_time is None:
        return starts if starts is not None else Fraction(0)
    whole = Fraction(container.start_time, av.time_base)
    # The container's start is the stream's rounded to microseconds: prefer the exact one.
    if starts is not None and abs(whole - starts) < Fraction(1, av.time_base):
        whole = starts
    if whole >= 0:
        return whole
    return min(Fraction(0), starts) if starts is not None else Fraction(0)


def orientation(frame: Any) -> tuple[int, bool]:
    """How to show a decoded frame upright: (quarter turns clockwise, mirror left-right before turning).

    Read from the display matrix that phones write; other angles go to the nearest quarter turn.
    """
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(item), dtype=np.int32)[:5].astype(np.float64)
            mirrored = a * d - b * c < 0
            if mirrored:
                a, b = -a, -b
            return round(np.degrees(np.arctan2(b, a)) / 90) % 4, bool(mirrored)
    return 0, False


def turned(image_HWC: np.ndarray, turns: int, mirrored: bool) -> np.ndarray:
    """Apply `orientation` to pixels (a view)."""
    if mirrored:
        image_HWC = image_HWC[:, ::-1]
    return np.rot90(image_HWC, -turns) if turns else image_HWC
