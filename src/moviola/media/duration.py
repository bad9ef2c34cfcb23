"""How long a video really is: the end of its last packet, not what its header claims."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from moviola.media.container import opened, origin, video_stream

_MARGIN = 3
"""Seconds before the promised end from which on packets are read."""


def true_end(path: Path) -> float:
    """Seconds from 0 to the end of the last frame. Reads packets only, nothing is decoded.

    First from the last key frame to the end of the file; where a file cannot be seeked, or is cut so
    that its end cannot be read, from its start. 0 for a video stream without packets.
    """
    for from_end in (True, False):
        with opened(path) as container:
            stream = video_stream(container, path)
            if from_end and not _near_the_end(container, stream):
                continue
            end, timed = _read(container, stream)
            if from_end and (end is None or not timed):
                continue
            return 0.0 if end is None else max(0.0, float(end - origin(container, stream)))
    return 0.0


def _near_the_end(container: Any, stream: Any) -> bool:
    """Seek to a key frame some seconds before the promised end; False where that cannot be done."""
    tick = Fraction(stream.time_base)
    if stream.duration:
        end = Fraction((stream.start_time or 0) + stream.duration)
    elif container.duration:
        end = Fraction((container.start_time or 0) + container.duration, av.time_base) / tick
    else:
        return False
    # Some demuxers (MPEG-TS) land between key frames: leave room for frames out of order.
    try:
        container.seek(int(end - _MARGIN / tick), stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


def _read(container: Any, stream: Any) -> tuple[Fraction | None, bool]:
    """(end of the last packet in the file's seconds, False where only a full read would tell)."""
    tick = Fraction(stream.time_base)
    rate = stream.guessed_rate or stream.average_rate
    step = 1 / Fraction(rate) if rate else Fraction(1, 25)
    # AVI has decoding times only; what a parser adds as presentation times there is guesswork.
    avi = container.format.name == "avi"
    end: Fraction | None = None
    count = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError, OSError):
            break
        if packet.size == 0 or packet.is_discard:
            continue
        count += 1
        stamp = packet.dts if avi or packet.pts is None else packet.pts
        if stamp is None:
            continue
        last = stamp * tick + (packet.duration * tick if packet.duration else step)
        end = last if end is None else max(end, last)
    if end is None and count:
        # A raw stream has no times: its count at the nominal rate, which needs every packet.
        return count * step, False
    return end, True
