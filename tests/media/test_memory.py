"""Memory does not grow with a video's length, and broken files leave no open descriptors."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
    import sys
    import numpy as np
    from moviola.media import Video, VideoWriter
    path, seconds, shots = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "shots"
    if seconds:
        y, x = np.mgrid[:720, :1280]
        ground = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
        with VideoWriter(path, 10, preset="ultrafast", crf=30) as writer:
            for number in range(seconds * 10):
                image = ground.copy()
                image[200:500, number % 900 : number % 900 + 300] = (number * 7 % 256, 90, 160)
                writer.write(image)
    else:
        rows = sum(len(b) for b in Video(path).stream(every=1.0, short_side=224, shots=shots))
        # not ru_maxrss: a new process inherits that of the one it was forked from
        status = open("/proc/self/status").read()
        print(rows, status.split("VmHWM:")[1].split()[0])
"""


def run(path: Path, seconds: int, shots: str = "-") -> list[int]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path), str(seconds), shots]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("shots", ["-", "shots"])
def test_streaming_is_bounded(tmp_path: Path, shots: str) -> None:
    run(tmp_path / "short.mp4", 20)
    run(tmp_path / "long.mp4", 120)
    rows, little = run(tmp_path / "short.mp4", 0, shots)
    assert rows == 20
    rows, much = run(tmp_path / "long.mp4", 0, shots)
    assert rows == 120
    # Two batches of 64 frames at 224 x 398 are 34 MB; nothing may grow with the six times longer file.
    assert much < little + 60_000, (little, much)
    assert much < 300_000
