"""A small deterministic encoder for tests of the store: colour shares of the picture, words as colours.

It has the surface of `moviola.clip.loaded.Model` that indexing and searching use, and real
arithmetic: a frame's vector is its share of each colour, a text's vector marks the colours it names.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from moviola.clip.preprocess import Preprocess
from moviola.types import FrameSpec, Recipe, Refusal, UsageError

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 220),
    "yellow": (230, 220, 20),
    "magenta": (210, 20, 210),
    "cyan": (20, 210, 210),
}


class ColourModel:
    """Vectors of colour shares. `delay` seconds per frame make it as slow as a test needs."""

    def __init__(
        self,
        *,
        name: str = "colours",
        has_text: bool = True,
        separable: bool = True,
        adaptation: str = "none",
        spec: FrameSpec | None = None,
        delay: float = 0.0,
        size: int = 32,
    ) -> None:
        self.name, self.system = name, "clip"
        self.hash = name.encode().hex().ljust(16, "0")[:16]
        self.dim, self.has_text, self.separable, self.adaptation = (
            len(COLOURS),
            has_text,
            separable,
            adaptation,
        )
        self.frame_spec = spec or FrameSpec()
        self.recipe = Recipe(size=(size, size), sampler=self.frame_spec, context_length=8)
        self.preprocess = Preprocess(self.recipe)
        self.delay = delay
        self.frames_seen = 0
        self._palette_CD = np.array(list(COLOURS.values()), dtype=np.float32)

    def _shares(self, pixels_HWC: np.ndarray) -> np.ndarray:
        flat = pixels_HWC[::2, ::2].reshape(-1, 3).astype(np.float32)
        distance = ((flat[:, None] - self._palette_CD[None]) ** 2).sum(-1)
        return np.bincount(distance.argmin(1), minlength=self.dim).astype(np.float32) / len(flat) * 3.0

    def embed_frames(
        self, frames_THWC: np.ndarray, *, batch_size: int = 32, normalize: bool = True
    ) -> np.ndarray:
        self.frames_seen += len(frames_THWC)
        if self.delay:
            time.sleep(self.delay * len(frames_THWC))
        return self._out(np.stack([self._shares(one) for one in frames_THWC]), normalize)

    def embed_pictures(
        self, pictures: Iterable[Image.Image], *, batch_size: int = 32, normalize: bool = True
    ) -> np.ndarray:
        rows = [self._shares(np.asarray(one.convert("RGB"))) for one in pictures]
        self.frames_seen += len(rows)
        if self.delay:
            time.sleep(self.delay * len(rows))
        return self._out(np.stack(rows), normalize)

    def embed_clips(
        self,
        clips: Iterable[tuple[np.ndarray, np.ndarray]],
        *,
        batch_size: int = 8,
        normalize: bool = True,
    ) -> np.ndarray:
        rows = [np.mean([self._shares(one) for one in frames], axis=0) for frames, _ in clips]
        return self._out(np.stack(rows), normalize)

    def embed_texts(
        self, texts: Sequence[str], *, normalize: bool = True, truncate: bool = False, batch_size: int = 256
    ) -> np.ndarray:
        if not self.has_text:
            raise Refusal("no text")
        rows = []
        for text in texts:
            words = text.lower().split()
            if len(words) > self.recipe.context_length and not truncate:
                raise UsageError(f"The text has {len(words)} tokens, the model takes 8.", hint="--truncate")
            rows.append([1.0 if colour in words else 0.05 for colour in COLOURS])
        return self._out(np.array(rows, dtype=np.float32), normalize)

    def score(self, texts: Sequence[str], video: np.ndarray, mask_MT: np.ndarray) -> np.ndarray:
        """The worst frame decides: a score that no single vector per video can give."""
        text_ND = self.embed_texts(texts)
        unit = video / np.maximum(np.linalg.norm(video, axis=-1, keepdims=True), 1e-12)
        scores_NMT = np.einsum("nd,mtd->nmt", text_ND, unit)
        return np.where(mask_MT[None], scores_NMT, np.inf).min(-1)

    @staticmethod
    def _out(vectors_ND: np.ndarray, normalize: bool) -> np.ndarray:
        if normalize:
            vectors_ND = vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
        return vectors_ND.astype(np.float32)


def make_video(
    path: Path,
    colours: Sequence[tuple[str, float]],
    *,
    rate: int = 10,
    size: tuple[int, int] = (48, 64),
    subtitles: Sequence[tuple[float, float, str]] = (),
) -> Path:
    """A real .mp4 of plain colours, each for some seconds, with a moving dot; subtitles beside it."""
    import av

    with av.open(path.open("wb"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "threads": "1"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        number = 0
        for colour, seconds in colours:
            for _ in range(round(seconds * rate)):
                pixels = np.empty((*size, 3), np.uint8)
                pixels[:] = COLOURS[colour]
                pixels[20:28, number % 50 : number % 50 + 8] = 128
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
                number += 1
        for packet in stream.encode():
            container.mux(packet)
    if subtitles:
        lines = [
            f"{i}\n{_stamp(start)} --> {_stamp(end)}\n{text}\n"
            for i, (start, end, text) in enumerate(subtitles, 1)
        ]
        path.with_suffix(".srt").write_text("\n".join(lines), encoding="utf-8")
    return path


def _stamp(seconds: float) -> str:
    whole = int(seconds)
    millis = round(seconds % 1 * 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d},{millis:03d}"


def make_picture(path: Path, colour: str, *, size: tuple[int, int] = (60, 80)) -> Path:
    Image.new("RGB", (size[1], size[0]), COLOURS[colour]).save(path)
    return path
