"""Run in a process of its own by the kill test: index a folder with the colour model, slowly."""

from __future__ import annotations

import sys

from fake_encoder import ColourModel

import moviola.media.subtitles
import moviola.media.video
import moviola.store.feed
import moviola.store.writer  # noqa: F401 (loaded before the clock starts)
from moviola.verbs import index as verb

if __name__ == "__main__":
    media, to, delay, commit = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    verb.COMMIT_SECONDS = commit
    print("go", flush=True)
    report = verb.index(media, to, model=ColourModel(delay=delay), every=0.5, batch_size=8)
    print(report.summary())
