"""Subtitles: .srt and .vtt files however untidy, sidecar files, and text tracks inside videos."""

from __future__ import annotations

import contextlib
import hashlib
import html
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from moviola.media.container import check_file, opened, origin, video_stream
from moviola.types import MediaError, TimeSpan

_ENDINGS = (".srt", ".vtt")

# 00:01:02,345 --> 00:01:04.5 position:50% ; hours are optional, one to three decimals or none.
_STAMP = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{1,2})(?:[.,:](\d{1,3}))?"
_TIMES = re.compile(rf"^\s*{_STAMP}\s*-{{1,3}}>\s*{_STAMP}(?:\s.*)?$")
_TAGS = re.compile(r"</?[a-zA-Z][^<>\n]*>|<\d[\d:.]*>|\{\\[^{}\n]*\}|\{/?[biuBIU]\}")
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?\s+[^>]*>")
_MOST_BYTES = 64 << 20
_SHOWN = 120.0  # seconds before a range in which a cue that reaches into it may begin
_LATE = 10.0  # seconds by which text may lie behind the pictures in a file


@dataclass(frozen=True)
class Subtitle:
    """One cue: when it is shown, its plain text (lines joined by newlines), its language if known."""

    span: TimeSpan
    text: str
    language: str | None = None


def read_subtitles(path: str | Path, *, language: str | None = None) -> list[Subtitle]:
    """The cues of an .srt or .vtt file, in order of time; see `parse_subtitles` for what is accepted.

    `MediaError` if the file is missing, empty, binary, or holds no line with times.
    """
    path = Path(path)
    size = check_file(path)
    if size > _MOST_BYTES:
        raise MediaError(path, f"expected subtitles, got a file of {size} bytes.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise MediaError(path, f"the file cannot be read ({error.strerror}).") from error
    cues, bad = parse_subtitles(decode_text(raw), language)
    if not cues:
        found = f"{bad} broken cues and no good one" if bad else "no line with times"
        raise MediaError(
            path,
            f"expected subtitles, got {found}.",
            hint="A cue looks like: 00:00:01,000 --> 00:00:02,500 and a line of text below it.",
        )
    return cues


def decode_text(raw: bytes) -> str:
    """Text from bytes: by its byte order mark, else UTF-8, else UTF-16 if it looks so, else cp1252."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace").lstrip("\ufeff")
    try:
        text = raw.decode("utf-8-sig")
        if "\0" not in text:
            return text
    except UnicodeDecodeError:
        pass
    if raw[:400].count(0) > len(raw[:400]) // 4:
        little = raw[1:400:2].count(0) >= raw[0:400:2].count(0)
        return raw.decode("utf-16-le" if little else "utf-16-be", "replace")
    return raw.decode("cp1252", "replace")


def parse_subtitles(text: str, language: str | None = None) -> tuple[list[Subtitle], int]:
    """(cues sorted by time, number of cues left out) from the text of an .srt or .vtt file.

    A cue is a line with two times and the lines below it, up to an empty line or the next cue, so
    missing numbers, missing empty lines and stray lines do no harm. Tags and positions are removed,
    entities resolved; cues may overlap. Left out and counted: cues whose end is before their start.
    Cues without text are left out silently.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    at = [number for number, line in enumerate(lines) if "->" in line and _TIMES.match(line)]
    cues: list[Subtitle] = []
    bad = sum("-->" in line for line in lines) - sum("-->" in lines[number] for number in at)
    for number, following in zip(at, [*at[1:], len(lines)]):
        found = _TIMES.match(lines[number])
        assert found is not None
        start, end = _seconds(found.groups()[:4]), _seconds(found.groups()[4:])
        if end < start:
            bad += 1
            continue
        body = _body(lines[number + 1 : following], following < len(lines))
        if body:
            cues.append(Subtitle(TimeSpan(start, end), body, language))
    cues.sort(key=lambda cue: cue.span)
    return cues, bad


def _seconds(parts: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, decimals = parts
    whole = int(hours or 0) * 3600 + int(minutes or 0) * 60 + int(seconds or 0)
    return whole + (float(f"0.{decimals}") if decimals else 0.0)


def _body(lines: list[str], more: bool) -> str:
    """The text of a cue; the number or name in front of the next cue is not part of it."""
    kept: list[str] = []
    for place, line in enumerate(lines):
        if not line.strip():
            if kept:
                break
            # An empty line straight below the times: the text may still follow.
            if place:
                return ""
            continue
        kept.append(line)
    else:
        # No empty line before the next cue: its number stands at the end.
        if more and kept and kept[-1].strip().isdigit():
            kept.pop()
    return plain("\n".join(kept))


def plain(text: str) -> str:
    """Text without tags, styles and entities; one space between words."""
    text = html.unescape(_TAGS.sub("", _VOICE.sub("", text)))
    tidy = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in tidy if line)


def sidecars(path: Path) -> list[tuple[Path, str | None]]:
    """Subtitle files beside a video: `stem.srt`, `stem.vtt`, `stem.LANG.srt` ..., with the language."""
    return [(path.parent / name, language) for name, language in _beside(path, _texts_in(path.parent))]


def sidecar_marks(paths: Iterable[Path]) -> dict[Path, str]:
    """For each video 16 hex digits that change with its sidecar files, "" where it has none.

    They cover the names, sizes and times of change; nothing is opened, and each folder is listed once.
    """
    folders: dict[Path, dict[str, list[str]]] = {}
    marks = {}
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = _texts_in(path.parent)
        digest = hashlib.blake2b(digest_size=8)
        seen = False
        for name, _ in _beside(path, folders[path.parent]):
            try:
                found = (path.parent / name).stat()
            except OSError:
                continue  # gone since the folder was listed
            digest.update(os.fsencode(name) + f"/{found.st_size}/{found.st_mtime_ns}/".encode())
            seen = True
        marks[path] = digest.hexdigest() if seen else ""
    return marks


def _texts_in(folder: Path) -> dict[str, list[str]]:
    """The subtitle files of a folder, by every stem that their video may have."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name[-4:].lower() in _ENDINGS)
    except OSError:
        return {}
    by_stem: dict[str, list[str]] = {}
    for name in names:
        parts = name[:-4].split(".")
        for tags in range(min(3, len(parts))):  # STEM, STEM.LANG, STEM.LANG.forced
            by_stem.setdefault(".".join(parts[: len(parts) - tags]), []).append(name)
    return by_stem


def _beside(path: Path, texts: dict[str, list[str]]) -> Iterator[tuple[str, str | None]]:
    """The names among `texts` that belong to the video, with their language."""
    for name in texts.get(path.stem, ()):
        tag = name[len(path.stem) + 1 : -4]
        if not tag:
            yield name, None
        elif re.fullmatch(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8})*(?:\.(?:forced|sdh|cc))?", tag):
            yield name, tag.split(".")[0]


def embedded_subtitles(path: Path, span: TimeSpan | None = None) -> list[Subtitle]:
    """The cues of every text track inside the file (SubRip, MP4 text, WebVTT, ASS); pictures are not text.

    With a `span` only those shown during it, with their own times. Then little more than the span is
    read, so a cue that began more than two minutes before it may be missed.
    """
    cues: list[Subtitle] = []
    with opened(path) as container:
        tracks = {one.index: one for one in container.streams.subtitles if one.codec_context is not None}
        if not tracks:
            return []
        try:
            zero = float(origin(container, video_stream(container, path)))
        except MediaError:
            zero = 0.0
        for packet in _packets_of(container, list(tracks.values()), span, zero):
            if packet.pts is None or not packet.size:
                continue
            track = tracks[packet.stream_index]
            text = _packet_text(track, packet)
            start = float(packet.pts * packet.time_base) - zero
            end = start + float((packet.duration or 0) * packet.time_base)
            if span is not None and not (start == span.start or (start < span.end and end > span.start)):
                continue
            if text and end >= 0:
                language = track.metadata.get("language")
                cues.append(
                    Subtitle(TimeSpan(max(0.0, start), end), text, None if language == "und" else language)
                )
    cues.sort(key=lambda cue: cue.span)
    return cues


def _packets_of(container: Any, tracks: list[Any], span: TimeSpan | None, zero: float) -> Iterator[Any]:
    """The packets of some tracks; with a `span` those from `_SHOWN` before it to its end."""
    if span is None:
        yield from _packets(container, tracks)
        return
    if span.start > _SHOWN:
        with contextlib.suppress(av.FFmpegError):  # one that cannot seek is read from its beginning
            container.seek(int((span.start - _SHOWN + zero) * av.time_base))
    wanted = {track.index for track in tracks}
    # Text comes seldom: the packets of the pictures say how far the reading is.
    for packet in _packets(container, [*tracks, *container.streams.video[:1]]):
        if packet.dts is not None and float(packet.dts * packet.time_base) - zero > span.end + _LATE:
            return
        if packet.stream_index in wanted:
            yield packet


def _packets(container: Any, streams: list[Any]) -> Iterator[Any]:
    packets = container.demux(streams)
    while True:
        try:
            yield next(packets)
        except (StopIteration, av.FFmpegError, OSError):
            return


def _packet_text(track: Any, packet: Any) -> str:
    try:
        lines = track.codec_context.decode(packet)
    except (av.FFmpegError, ValueError, RuntimeError):
        return ""
    texts = []
    for line in lines:
        if line.type == b"ass":
            raw = line.ass if isinstance(line.ass, bytes) else str(line.ass).encode()
            # FFmpeg's form: number, layer, style, name, three margins, effect, then the text.
            fields = raw.decode("utf-8", "replace").split(",", 8)
            texts.append(re.sub(r"\\[Nn]", "\n", fields[-1]).replace(r"\h", " "))
        elif line.type == b"text":
            raw = line.text if isinstance(line.text, bytes) else str(line.text).encode()
            texts.append(raw.decode("utf-8", "replace"))
    return plain("\n".join(texts))
