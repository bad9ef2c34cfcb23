"""Videos made on the spot with PyAV; frames whose number can be read back from their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

MakeVideo = Callable[..., Path]


def numbered(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A frame that shows its number as eight grey blocks (bits), readable after lossy coding."""
    image_HWC = np.zeros((height, width, 3), dtype=np.uint8)
    for bit in range(8):
        left, right = bit * width // 8, (bit + 1) * width // 8
        image_HWC[:, left:right] = 220 if number >> bit & 1 else 30
    return image_HWC


def number_of(image_HWC: np.ndarray) -> int:
    width = image_HWC.shape[1]
    middle = image_HWC[image_HWC.shape[0] // 2].mean(axis=-1)
    return sum((middle[(2 * bit + 1) * width // 16] > 125) << bit for bit in range(8))


def numbers_of(frames_THWC: np.ndarray) -> list[int]:
    return [number_of(image_HWC) for image_HWC in frames_THWC]


@pytest.fixture
def make_video(tmp_path: Path) -> MakeVideo:
    """Encode numbered frames: `make_video("a.mp4", 50, rate=25, codec="libx264", times=..., ...)`."""

    def make(
        name: str | Path,
        count: int = 50,
        *,
        rate: int = 25,
        codec: str = "libx264",
        size: tuple[int, int] = (96, 128),
        pix_fmt: str = "yuv420p",
        options: dict[str, str] | None = None,
        times: Sequence[float] | None = None,
        offset: float = 0.0,
        frames: Sequence[np.ndarray] | None = None,
        tone: float | None = None,
        rotation: int | None = None,
        mux: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        height, width = size
        with av.open(str(path), "w", container_options=mux or {}) as container:
            video: Any = container.add_stream(codec, rate=rate, options=options or {})
            video.width, video.height, video.pix_fmt = width, height, pix_fmt
            tick = Fraction(1, rate) if times is None and not offset else Fraction(1, 90000)
            video.codec_context.time_base = tick
            if rotation is not None:
                if not hasattr(video, "set_display_rotation"):
                    pytest.skip("this PyAV cannot write a display matrix")
                video.set_display_rotation(rotation)
            sound: Any = None
            if tone is not None:
                sound = container.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48000)
                sound.layout, sound.bit_rate = "mono", 192_000
            # Also a file without frames gets its header.
            container.start_encoding()
            for number in range(count):
                image_HWC = frames[number] if frames is not None else numbered(number, height, width)
                frame = av.VideoFrame.from_ndarray(image_HWC, format="rgb24").reformat(format=pix_fmt)
                time = number / rate if times is None else times[number]
                frame.pts = number if tick == Fraction(1, rate) else round((time + offset) / tick)
                frame.time_base = tick
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
            if sound is not None and tone is not None:
                length = count / rate
                wave = 0.5 * np.sin(2 * np.pi * tone * np.arange(round(48000 * length)) / 48000)
                for begin in range(0, len(wave), 1024):
                    part = wave[None, begin : begin + 1024].astype(np.float32)
                    piece = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                    piece.sample_rate, piece.pts = 48000, begin
                    container.mux(sound.encode(piece))
                container.mux(sound.encode(None))
        return path

    return make
