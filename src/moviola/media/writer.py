"""Writing .mp4 files: H.264 video, AAC sound, text subtitles; and cutting a range out of a video.

A file appears under its name only when it is complete: it is written beside it under a hidden
temporary name and then moved, so a crash or a full disk leaves no half file in its place.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from moviola.media.container import opened
from moviola.media.decode import EPSILON, Reader, Scaler, no_frames
from moviola.media.files import media_kind
from moviola.media.sound import iter_sound, sound_frames, sound_stream
from moviola.media.subtitles import Subtitle, embedded_subtitles
from moviola.types import MediaError, TimeSpan, UsageError

_CLOCK = Fraction(1, 90000)
_SOUND_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_BT709 = 1

_ASS_HEADER = b"""[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize, PrimaryColour, SecondaryColour, OutlineColour, BackColour, Bold, Italic, \
Underline, StrikeOut, ScaleX, ScaleY, Spacing, Angle, BorderStyle, Outline, Shadow, Alignment, MarginL, \
MarginR, MarginV, Encoding
Style: Default,Arial,16,&Hffffff,&Hffffff,&H0,&H0,0,0,0,0,100,100,0,0,1,1,0,2,10,10,10,1

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
"""


class VideoWriter:
    """Writes one .mp4, frame by frame; use as a context manager (an exception leaves no file).

    rate        frames per second; None where `write` is given times
    sound_rate  sampling rate of the samples to come, None for no sound; `channels` 1 or 2
    subtitles   cues to put in text tracks, one for each language; where cues of a track overlap,
                their texts are shown together
    crf         quality of the encoder: lower is better and larger (18 looks like the source)

    Frames are (H, W, 3) uint8 RGB, all of one size; an odd height or width gets one more row or
    column (a copy of the last), because H.264 needs even sizes. Colours are written as BT.709. Write
    sound about as far as frames as you go, or the part that is ahead waits in memory, encoded.
    """

    def __init__(
        self,
        path: str | Path,
        rate: float | Fraction | None,
        *,
        sound_rate: int | None = None,
        channels: int = 1,
        subtitles: Sequence[Subtitle] | None = None,
        codec: str = "libx264",
        crf: int = 20,
        preset: str = "veryfast",
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in (".mp4", ".m4v", ".mov"):
            raise UsageError(f"Expected a file name ending in .mp4, got {self.path.name!r}.")
        if rate is not None and not (0 < rate < 1e6):
            raise UsageError(f"A frame rate must be a positive number, got {rate}.")
        if sound_rate is not None and (sound_rate < 1 or channels not in (1, 2)):
            raise UsageError(
                f"Sound needs a positive rate and 1 or 2 channels, got {sound_rate}, {channels}."
            )
        self._rate = None if rate is None else Fraction(rate).limit_denominator(1001)
        self._codec, self._crf, self._preset = codec, crf, preset
        self._sound_rate, self._channels = sound_rate, channels
        languages = dict.fromkeys(cue.language for cue in subtitles or [])
        self._cues = {
            language: without_overlap([cue for cue in subtitles or [] if cue.language == language])
            for language in languages
        }
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None
        self._container: Any = None
        self._file: Any = None
        self._temporary = self.path.with_name(f".{self.path.stem}.{secrets.token_hex(4)}.part")
        self._count = 0
        self._last: int | None = None
        self._heard = 0
        self._durations: dict[int, int] = {}

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(
        self,
        frames: np.ndarray,
        times: Sequence[float] | np.ndarray | None = None,
        *,
        end: float | None = None,
    ) -> None:
        """Add one frame (H, W, 3) or several (T, H, W, 3).

        times  their times in seconds, rising, where the writer has no rate; `end` is when the last
               of them goes (default: as long as the one before it)
        """
        frames_THWC = frames[None] if frames.ndim == 3 else frames
        if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
            raise UsageError(f"Expected uint8 RGB frames (T, H, W, 3), got {frames.dtype} {frames.shape}.")
        if (times is None) != (self._rate is not None):
            raise UsageError("Give times when the writer has no rate, and only then.")
        for place, image_HWC in enumerate(frames_THWC):
            if times is None:
                stamp = self._count
            else:
                stamp = round(float(times[place]) / _CLOCK)
            if self._last is not None and stamp <= self._last:
                raise UsageError(f"Frame times must rise, got {stamp} after {self._last} (in 1/90000 s).")
            self._put(image_HWC, stamp)
        if end is not None and self._last is not None and self._rate is None:
            self._durations[self._last] = max(1, round(end / _CLOCK) - self._last)

    def write_sound(self, samples: np.ndarray) -> None:
        """Add float samples in [-1, 1]: (S,) for one channel, (S, 2) for two."""
        if self._sound_rate is None:
            raise UsageError("Give the writer sound_rate= to write sound.")
        samples_SC = samples[:, None] if samples.ndim == 1 else samples
        if samples_SC.ndim != 2 or samples_SC.shape[1] != self._channels:
            raise UsageError(
                f"Expected samples with {self._channels} channels, got the shape {samples.shape}."
            )
        if self._container is None:
            raise UsageError("Write the first frame before the sound.")
        if not len(samples_SC):
            return
        packed = np.ascontiguousarray(samples_SC.T, dtype=np.float32)
        layout = "mono" if self._channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.nan_to_num(packed).clip(-1, 1), format="fltp", layout=layout)
        frame.sample_rate = self._sound_rate
        frame.pts = self._heard
        frame.time_base = Fraction(1, self._sound_rate)
        self._heard += len(samples_SC)
        self._mux(self._audio, frame)

    def close(self) -> None:
        """Finish the file and give it its name. `MediaError` if no frame was written."""
        if self._container is None:
            raise MediaError(self.path, "no frame was written, so there is no video to save.")
        self._mux(self._video, None)
        if self._sound_rate is not None:
            self._mux(self._audio, None)
        try:
            container, self._container = self._container, None
            container.close()
            if self._file is not None:
                self._file.close()
            os.replace(self._temporary, self.path)  # noqa: PTH105 (over an older file, on every system)
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise self._failed(error) from error

    def discard(self) -> None:
        """Forget what was written and remove the temporary file."""
        container, self._container = self._container, None
        if container is not None:
            # The disk may be full: the end of the file cannot be written, and need not be.
            with contextlib.suppress(av.FFmpegError, OSError):
                container.close()
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self._temporary.unlink()

    def _failed(self, error: Exception) -> MediaError:
        why = getattr(error, "strerror", None) or str(error)
        return MediaError(
            self.path,
            f"the video could not be written ({why}).",
            hint="Is there room, and may you write there?",
        )

    def _open(self, height: int, width: int) -> None:
        self._size = (height, width)
        target: Any = os.path.abspath(self._temporary)  # noqa: PTH100 (names stay as they are)
        options = {"movflags": "+faststart"}
        try:
            try:
                target.encode("utf-8")
            except UnicodeEncodeError:
                # FFmpeg takes UTF-8 names only; without one it cannot reopen the file to move its index.
                self._file = target = self._temporary.open("wb")
                options = {}
            self._container = av.open(target, "w", format="mp4", container_options=options)
            self._video = self._container.add_stream(
                self._codec, rate=self._rate or 30, options={"crf": str(self._crf), "preset": self._preset}
            )
            video = self._video
            video.width, video.height, video.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
            video.codec_context.time_base = _CLOCK if self._rate is None else 1 / self._rate
            for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
                setattr(video.codec_context, name, _BT709)  # color_range 1 is the limited range
            if self._sound_rate is not None:
                rate = min((one for one in _SOUND_RATES if one >= self._sound_rate), default=96000)
                layout = "mono" if self._channels == 1 else "stereo"
                self._audio = self._container.add_stream("aac", rate=rate, layout=layout)
                self._audio.bit_rate = 96000 * self._channels
            tracks = [(self._text_track(language), cues) for language, cues in self._cues.items() if cues]
            self._container.start_encoding()
            for track, cues in tracks:
                for cue in cues:
                    self._container.mux(_cue_packet(track, cue))
        except (av.FFmpegError, OSError, ValueError) as error:
            self.discard()
            raise self._failed(error) from error

    def _text_track(self, language: str | None) -> Any:
        track = self._container.add_stream("mov_text")
        track.codec_context.subtitle_header = _ASS_HEADER
        track.codec_context.time_base = track.time_base = Fraction(1, 1000)
        if language:
            track.metadata["language"] = language
        return track

    def _put(self, image_HWC: np.ndarray, stamp: int) -> None:
        height, width = image_HWC.shape[:2]
        if self._container is None:
            if self._size is not None:
                raise UsageError("This writer is closed: make a new one.")
            self._open(height, width)
        if (height, width) != self._size:
            raise UsageError(f"Every frame must be of one size {self._size}, got {(height, width)}.")
        if height % 2 or width % 2:
            image_HWC = np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image_HWC), format="rgb24")
        frame = self._reformatter.reformat(
            rgb,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        frame.pts = stamp
        frame.time_base = _CLOCK if self._rate is None else 1 / self._rate
        if self._last is not None:
            self._durations[self._last] = stamp - self._last
        self._last = stamp
        self._count += 1
        self._mux(self._video, frame)

    def _mux(self, stream: Any, frame: Any) -> None:
        try:
            for packet in stream.encode(frame):
                if stream is self._video and packet.pts is not None:
                    step = self._durations.pop(packet.pts, None)
                    if step is not None and self._rate is None:
                        packet.duration = step
                self._container.mux(packet)
        except (av.FFmpegError, OSError) as error:
            self.discard()
            raise self._failed(error) from error


def _cue_packet(track: Any, cue: Subtitle) -> Any:
    raw = cue.text.encode("utf-8", "replace")[:65000]
    packet = av.Packet(len(raw).to_bytes(2, "big") + raw)
    packet.stream = track
    packet.time_base = Fraction(1, 1000)
    packet.pts = packet.dts = round(cue.span.start * 1000)
    packet.duration = max(1, round(cue.span.end * 1000) - packet.pts)
    return packet


def without_overlap(cues: Sequence[Subtitle]) -> list[Subtitle]:
    """Cues cut so that no two are on screen at once: overlapping ones become one with both texts."""
    cues = [cue for cue in cues if cue.text]
    edges = sorted(
        {round(t, 3) for cue in cues for t in (cue.span.start, max(cue.span.end, cue.span.start + 1e-3))}
    )
    made: list[Subtitle] = []
    waiting = sorted(cues, key=lambda cue: cue.span, reverse=True)
    shown: list[Subtitle] = []
    for start, end in pairwise(edges):
        middle = (start + end) / 2
        while waiting and waiting[-1].span.start < middle:
            shown.append(waiting.pop())
        shown = [cue for cue in shown if max(cue.span.end, cue.span.start + 1e-3) > middle]
        if not shown:
            continue
        text = "\n".join(cue.text for cue in shown)
        before = made[-1] if made else None
        if before is not None and before.text == text and before.span.end == start and len(shown) > 1:
            made[-1] = Subtitle(TimeSpan(before.span.start, end), text, before.language)
        else:
            made.append(Subtitle(TimeSpan(start, end), text, shown[0].language))
    return made


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray] | np.ndarray,
    rate: float | Fraction,
    *,
    sound: np.ndarray | None = None,
    sound_rate: int = 16000,
    subtitles: Sequence[Subtitle] | None = None,
    codec: str = "libx264",
    crf: int = 20,
    preset: str = "veryfast",
) -> Path:
    """Write uint8 RGB frames, (H, W, 3) each or batches (T, H, W, 3), as an .mp4; returns the path.

    `sound` is float samples in [-1, 1], (S,) or (S, 2). Frames are taken one by one, so a generator
    of hours of video needs little memory. See `VideoWriter`.
    """
    channels = 1 if sound is None or sound.ndim == 1 else sound.shape[1]
    writer = VideoWriter(
        path,
        rate,
        sound_rate=None if sound is None else sound_rate,
        channels=channels,
        subtitles=subtitles,
        codec=codec,
        crf=crf,
        preset=preset,
    )
    with writer:
        count, heard = 0, 0
        for batch in frames:
            writer.write(batch)
            count += 1 if batch.ndim == 3 else len(batch)
            if sound is not None:
                upto = round(count / rate * sound_rate)
                writer.write_sound(sound[heard:upto])
                heard = max(heard, min(upto, len(sound)))
        if sound is not None and count:
            writer.write_sound(sound[heard:])
    return Path(path)


def cut(path: str | Path, span: TimeSpan, to: str | Path, *, crf: int = 18) -> Path:
    """Write what is on screen and heard during `span` as a new .mp4; returns its path.

    Everything is encoded anew, so the range is exact: the first frame is the one on screen at
    `span.start`, the last goes at `span.end`. Rotation is applied, frame times are kept, sound
    becomes mono or stereo AAC, text tracks inside the file are kept, a track for each language. A span of
    no length gives one frame. The span is cut at the video's end.
    """
    path, to = Path(path), Path(to)
    if media_kind(path) == "picture":
        raise UsageError(f"A picture has no range to cut: {path.name}.")
    if to.exists() and to.samefile(path):
        raise UsageError("The cut must go to another file than the one it is taken from.")
    sound_rate, channels = _sound_of(path)
    scaler = Scaler()
    with Reader(path) as reader:
        frames = reader.frames_from(span.start)
        here = next(frames, None)
        if here is None:
            raise no_frames(reader)
        ahead = next(frames, None)
        while ahead is not None and ahead[0] <= span.start + EPSILON:
            here, ahead = ahead, next(frames, None)
        if ahead is None and span.start > here[0] + 1:
            raise MediaError(path, f"the video ends at {here[0]:.2f} s, before {span.start:.2f} s.")
        start = span.start
        end = span.end if span.duration else start + reader.step
        sound: Iterator[np.ndarray] = iter(())
        if sound_rate is not None:
            sound = iter_sound(path, sound_rate, start=start, end=end, seconds=1.0, channels=channels)
        cues = _cues_of(path, TimeSpan(start, end))
        with VideoWriter(
            to, None, sound_rate=sound_rate, channels=channels, subtitles=cues, crf=crf
        ) as writer:
            heard = start
            while True:
                begin = max(here[0], start)
                until = min(max(here[0], start) + reader.step if ahead is None else ahead[0], end)
                writer.write(scaler(here[1]), [begin - start], end=max(until - start, begin - start + 1e-4))
                # Sound goes along, so that neither waits long for the other.
                while heard < until and (part := next(sound, None)) is not None:
                    writer.write_sound(part)
                    heard += len(part) / (sound_rate or 1)
                if ahead is None or ahead[0] >= end - EPSILON:
                    break
                here, ahead = ahead, next(frames, None)
            for part in sound:
                writer.write_sound(part)
    return to


def _cues_of(path: Path, span: TimeSpan) -> list[Subtitle]:
    """The text shown during `span`, on the clock of a video that begins with it."""
    return [
        replace(
            cue,
            span=TimeSpan(max(0.0, cue.span.start - span.start), min(cue.span.end, span.end) - span.start),
        )
        for cue in embedded_subtitles(path, span)
    ]


def _sound_of(path: Path) -> tuple[int | None, int]:
    """(rate to encode at, channels) of the file's sound; (None, 1) where there is none to decode."""
    with opened(path) as container:
        try:
            stream = sound_stream(container, path)
            if next(sound_frames(container, stream), None) is None:
                return None, 1
        except MediaError:
            return None, 1
        codec = stream.codec_context
        rate = min((one for one in _SOUND_RATES if one >= (codec.sample_rate or 16000)), default=96000)
        return rate, 1 if (codec.channels or 1) == 1 else 2
