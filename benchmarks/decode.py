"""Sampling frames from a video: ours beside OpenCV and the ffmpeg command, in one run.

    python benchmarks/decode.py [--seconds 60] [--repeat 1] [--json]

Makes a 720p H.264 file (30 frames/s, three B-frames, a key frame every 250 frames, moving shapes on
a textured ground), then takes one frame per second at short side 224, and the key frames. Prints
the best time of each, frames of video per second, and how many times faster ours is. Peers that are
not installed are left out. Times depend on the machine and its load: only ratios from one run mean
something.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moviola.media import Video, VideoWriter

RATE, HEIGHT, WIDTH, SIDE = 30, 720, 1280, 224


def make(path: Path, seconds: int) -> None:
    """Textured ground that pans slowly, and shapes that move fast: neither still nor noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(40, 215, (HEIGHT // 16, 2 * WIDTH // 16, 3), dtype=np.uint8)
    ground = coarse.repeat(16, 0).repeat(16, 1)
    grain = rng.integers(0, 24, ground.shape, dtype=np.uint8)
    ground = ground + grain
    with VideoWriter(path, RATE, preset="veryfast", crf=23) as writer:
        for number in range(seconds * RATE):
            left = number * 2 % WIDTH
            image = ground[:, left : left + WIDTH].copy()
            for shape in range(6):
                x = (number * (7 + 3 * shape) + 190 * shape) % (WIDTH - 120)
                image[100 * shape + 20 : 100 * shape + 110, x : x + 120] = (40 * shape, 230 - 30 * shape, 120)
            writer.write(image)


def ours(path: Path) -> int:
    return sum(len(batch) for batch in Video(path).stream(every=1.0, short_side=SIDE))


def ours_keyframes(path: Path) -> int:
    return sum(len(batch) for batch in Video(path).stream(keyframes=True, short_side=SIDE))


def ours_at(path: Path) -> int:
    return len(Video(path).uniform(8, short_side=SIDE))


def ours_shots(path: Path) -> int:
    return sum(len(batch) for batch in Video(path).stream(every=1.0, short_side=SIDE, shots=True))


def opencv(path: Path) -> int:
    """grab() every frame, retrieve() and resize the wanted ones (by count: OpenCV has no true times)."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    count, number = 0, 0
    while capture.grab():
        if number % RATE == 0:
            image = cv2.resize(
                capture.retrieve()[1], (SIDE * WIDTH // HEIGHT, SIDE), interpolation=cv2.INTER_AREA
            )
            count += image is not None
        number += 1
    capture.release()
    return count


def opencv_at(path: Path) -> int:
    import cv2

    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    count = 0
    for number in ((np.arange(8) + 0.5) * total / 8).astype(int):
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(number))
        image = cv2.resize(capture.read()[1], (SIDE * WIDTH // HEIGHT, SIDE), interpolation=cv2.INTER_AREA)
        count += image is not None
    capture.release()
    return count


def ffmpeg(*before: str, select: str) -> Callable[[Path], int]:
    def run(path: Path) -> int:
        wide = SIDE * WIDTH // HEIGHT
        command = [
            "ffmpeg",
            "-v",
            "error",
            *before,
            "-i",
            str(path),
            "-vf",
            f"{select}scale={wide}:{SIDE}:flags=bicubic",
        ]
        command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        return len(raw) // (wide * SIDE * 3)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()

    rows: dict[str, dict[str, Callable[[Path], int]]] = {
        "one frame per second": {"moviola": ours},
        "the same, with shots": {"moviola": ours_shots},
        "key frames": {"moviola": ours_keyframes},
        "8 frames, uniform": {"moviola": ours_at},
    }
    if importlib.util.find_spec("cv2"):
        rows["one frame per second"]["opencv"] = opencv
        rows["the same, with shots"]["opencv (no shots)"] = opencv
        rows["8 frames, uniform"]["opencv"] = opencv_at
    if shutil.which("ffmpeg"):
        rows["one frame per second"]["ffmpeg"] = ffmpeg(select="fps=1,")
        rows["one frame per second"]["ffmpeg, 1 thread"] = ffmpeg("-threads", "1", select="fps=1,")
        rows["key frames"]["ffmpeg"] = ffmpeg("-skip_frame", "nokey", select="")

    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.mp4"
        make(path, chosen.seconds)
        for task, runs in rows.items():
            best: dict[str, float] = {}
            frames: dict[str, int] = {}
            for _ in range(chosen.repeat):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    frames[name] = run(path)
                    best[name] = min(best.get(name, np.inf), time.perf_counter() - begin)
            for name, seconds in best.items():
                results.append(
                    {
                        "task": task,
                        "with": name,
                        "frames": frames[name],
                        "seconds": round(seconds, 3),
                        "video_frames_per_second": round(chosen.seconds * RATE / seconds),
                        "moviola_is_faster_by": round(seconds / best["moviola"], 2),
                    }
                )
        size = path.stat().st_size
    if chosen.json:
        about = {"video": f"{HEIGHT}p H.264, {chosen.seconds} s, {size} bytes", "cores": os.cpu_count()}
        print(json.dumps({**about, "results": results}, indent=1))
        return
    print(
        f"{HEIGHT}p H.264, {chosen.seconds} s at {RATE} frames/s, {size / 1e6:.1f} MB, {os.cpu_count()} cores"
    )
    print(f"{'task':22} {'with':18} {'frames':>6} {'s':>7} {'video frames/s':>15} {'ours faster by':>15}")
    for row in results:
        print(
            f"{row['task']:22} {row['with']:18} {row['frames']:6} {row['seconds']:7.2f} "
            f"{row['video_frames_per_second']:15} {row['moviola_is_faster_by']:14}x"
        )


if __name__ == "__main__":
    main()
