"""SIGKILL at random moments: nothing is lost, nothing comes twice, and the index can always be read."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moviola.store.format import MANIFEST
from moviola.store.index import Index
from moviola.verbs.index import index
from tests.store.fake_encoder import COLOURS, ColourModel, make_picture, make_video

SCRIPT = Path(__file__).with_name("run_index.py")


def contents(folder: Path) -> tuple[list[tuple[bytes, float]], np.ndarray]:
    """All (file, time) rows in order, and their vectors."""
    opened = Index(folder)
    units = opened.units
    rows = [
        (opened.files[f].path, round(float(t), 6)) for f, t in zip(units.file_N, units.start_N, strict=True)
    ]
    return rows, opened.vectors(np.arange(len(units)), unit_length=False)


def start(media: Path, to: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(media), str(to), "0.006", "0.1"],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"go\n"
    return process


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_runs_end_in_the_same_index(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    names = list(COLOURS)
    for n in range(12):
        make_picture(media / f"p{n:02d}.png", names[n % 8])
    for n in range(6):
        make_video(media / f"v{n}.mp4", [(names[n], 3), (names[(n + 3) % 8], 2.3)])
    make_video(media / "long.mp4", [(names[n % 8], 11.7) for n in range(14)], rate=4)
    index(media, tmp_path / "whole", model=ColourModel(), every=0.5, batch_size=8)
    expected_rows, expected_vectors = contents(tmp_path / "whole")
    assert len(expected_rows) > 350

    chance = random.Random(5)
    to = tmp_path / "killed"
    partial = 0
    for _ in range(5):
        process = start(media, to)
        deadline = time.monotonic() + chance.uniform(0.3, 1.6)
        while time.monotonic() < deadline:
            if (to / MANIFEST).exists():
                rows, _ = contents(to)
                assert len(rows) == len(set(rows))
                assert set(rows) <= set(expected_rows)
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (to / MANIFEST).exists():
            rows, _ = contents(to)
            assert len(rows) == len(set(rows))
            assert set(rows) <= set(expected_rows)
            partial += 0 < len(rows) < len(expected_rows)
    assert partial >= 2, "the kills came too early or too late to show anything"
    process = start(media, to)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    rows, vectors = contents(to)
    assert rows == expected_rows
    np.testing.assert_allclose(vectors, expected_vectors, atol=2e-3)
    shots = Index(to).units.shot_N
    np.testing.assert_array_equal(shots, Index(tmp_path / "whole").units.shot_N)


def test_a_long_video_goes_on_where_it_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run embeds only what the first had not committed."""
    from moviola.verbs import index as verb

    media = make_video(tmp_path / "long.mp4", [("red", 30), ("blue", 30)], rate=4)
    monkeypatch.setattr(verb, "COMMIT_SECONDS", 0.0)

    class Stops(ColourModel):
        def embed_frames(self, frames_THWC: np.ndarray, **kwargs: object) -> np.ndarray:
            if self.frames_seen >= 24:
                raise SystemExit("killed")
            return super().embed_frames(frames_THWC, **kwargs)  # type: ignore[arg-type]

    with pytest.raises(SystemExit):
        index(media, tmp_path / "i", model=Stops(), batch_size=8)
    opened = Index(tmp_path / "i")
    assert (opened.files[0].status, opened.files[0].units) == ("partial", 24)
    model = ColourModel()
    report = index(media, tmp_path / "i", model=model, batch_size=8)
    assert (report.resumed, report.new, report.changed) == (1, 0, 0)
    assert model.frames_seen == 60 - 24
    rows, _ = contents(tmp_path / "i")
    assert [t for _, t in rows] == [float(t) for t in range(60)]
    assert Index(tmp_path / "i").units.shot_N.tolist() == [0] * 30 + [1] * 30
